"""CUB's vocabulary: its 15 parts, its 312 attributes, and the attributes of a species.

Parts and attributes are in the order of the published files: part 1 is the back, attribute 1 is
``has_bill_shape::curved_(up_or_down)``. Only attributes whose name mentions a part group count when two species are
compared; the others (``has_size``, ``has_shape``, upper and under parts, primary colour) are set to agree with the
picture.
"""

from __future__ import annotations

from collections import Counter

from calm_birds.species import Head, Plumage, Species, Tail

__all__ = ["ATTRIBUTES", "CERTAINTIES", "PARTS", "PART_GROUP", "attribute_group", "species_attributes"]

PARTS = (
    "back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape",
    "right eye", "right leg", "right wing", "tail", "throat",
)  # fmt: skip
_BODY_PARTS = ("back", "belly", "breast", "tail", "leg", "wing")
PART_GROUP = {part: next((body for body in _BODY_PARTS if part.endswith(body)), "head") for part in PARTS}
"""The part group of each part."""
CERTAINTIES = ("not visible", "guessing", "probably", "definitely")

_COLORS = "blue brown iridescent purple rufous grey yellow olive green pink orange black white red buff"
_PATTERNS = "solid spotted striped multi-colored"
_TABLE = (
    ("bill_shape", "curved_(up_or_down) dagger hooked needle "
     "hooked_seabird spatulate all-purpose cone specialized"),
    ("wing_color", _COLORS),
    ("upperparts_color", _COLORS),
    ("underparts_color", _COLORS),
    ("breast_pattern", _PATTERNS),
    ("back_color", _COLORS),
    ("tail_shape", "forked_tail rounded_tail notched_tail fan-shaped_tail pointed_tail squared_tail"),
    ("upper_tail_color", _COLORS),
    ("head_pattern", "spotted malar crested masked unique_pattern "
     "eyebrow eyering plain eyeline striped capped"),
    ("breast_color", _COLORS),
    ("throat_color", _COLORS),
    ("eye_color", _COLORS.replace("iridescent ", "")),
    ("bill_length", "about_the_same_as_head longer_than_head shorter_than_head"),
    ("forehead_color", _COLORS),
    ("under_tail_color", _COLORS),
    ("nape_color", _COLORS),
    ("belly_color", _COLORS),
    ("wing_shape", "rounded-wings pointed-wings broad-wings tapered-wings long-wings"),
    ("size", "large_(16_-_32_in) small_(5_-_9_in) "
     "very_large_(32_-_72_in) medium_(9_-_16_in) very_small_(3_-_5_in)"),
    ("shape", "upright-perching_water-like chicken-like-marsh long-legged-like duck-like owl-like gull-like "
     "hummingbird-like pigeon-like tree-clinging-like hawk-like sandpiper-like upland-ground-like swallow-like "
     "perching-like"),
    ("back_pattern", _PATTERNS),
    ("tail_pattern", _PATTERNS),
    ("belly_pattern", _PATTERNS),
    ("primary_color", _COLORS),
    ("leg_color", _COLORS),
    ("bill_color", _COLORS),
    ("crown_color", _COLORS),
    ("wing_pattern", _PATTERNS),
)  # fmt: skip
ATTRIBUTES = tuple(f"has_{name}::{value}" for name, values in _TABLE for value in values.split())
"""The 312 attribute names in the official order."""

_GROUP_WORDS = {
    "head": ("bill", "crown", "eye", "forehead", "head", "nape", "throat"),
    "back": ("back",), "belly": ("belly",), "breast": ("breast",), "tail": ("tail",), "leg": ("leg",),
    "wing": ("wing",),
}  # fmt: skip


def attribute_group(attribute: str) -> str | None:
    """Return the part group that an attribute describes, None for the whole bird.

    >>> attribute_group("has_under_tail_color::buff"), attribute_group("has_size::small_(5_-_9_in)")
    ('tail', None)
    """
    topic = attribute.split("::")[0]
    return next((group for group, words in _GROUP_WORDS.items() if any(word in topic for word in words)), None)


def _colors(look: Plumage | Tail) -> set[str]:
    return {look.color, look.second} - {""}


def _head(head: Head) -> dict[str, set[str]]:
    shape = head.bill_shape
    lengths = dict.fromkeys(("dagger", "needle"), "longer_than_head")
    lengths |= dict.fromkeys(("cone", "all-purpose"), "shorter_than_head")
    return {
        "bill_shape": {shape}, "bill_length": {lengths.get(shape, "about_the_same_as_head")},
        "bill_color": {head.bill_color},
        "crown_color": {head.crown}, "forehead_color": {head.forehead}, "nape_color": {head.nape},
        "throat_color": {head.throat}, "eye_color": {head.eye}, "head_pattern": {head.pattern},
    }  # fmt: skip


def species_attributes(species: Species) -> tuple[bool, ...]:
    """Return for each of the 312 :data:`ATTRIBUTES`, in order, whether the species has it."""
    back, breast, belly, wing, tail = species.back, species.breast, species.belly, species.wing, species.tail
    weights = Counter({back.color: 2})
    for look, weight in ((wing, 3), (breast, 2), (belly, 2), (tail, 1)):
        weights[look.color] += weight
    has = _head(species.head) | {
        "wing_color": _colors(wing), "wing_pattern": {wing.pattern}, "wing_shape": {"rounded-wings"},
        "back_color": _colors(back), "back_pattern": {back.pattern},
        "breast_color": _colors(breast), "breast_pattern": {breast.pattern},
        "belly_color": _colors(belly), "belly_pattern": {belly.pattern},
        "tail_shape": {tail.shape}, "tail_pattern": {tail.pattern},
        "upper_tail_color": _colors(tail), "under_tail_color": _colors(tail),
        "leg_color": {species.leg},
        "upperparts_color": {back.color, wing.color}, "underparts_color": {breast.color, belly.color},
        "primary_color": {max(weights, key=lambda color: weights[color])},
        "size": {"small_(5_-_9_in)"}, "shape": {"perching-like"},
    }  # fmt: skip
    return tuple(value in has[name] for name, values in _TABLE for value in values.split())
