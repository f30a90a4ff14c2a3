"""The species of the generated birds, and the part groups in which they differ.

A species has one *look* for each of the seven part groups of CUB's attributes: head, back, breast, belly, wing, tail
and leg. Species come in families. All members of a family share a base plumage, and each member replaces the looks of
up to three groups (in large sets four) by the family's alternatives. Two members therefore differ in exactly the groups
that only one of them replaced: pairs that differ in 1, 2 or 3 groups exist by construction, and birds of different
families differ nearly everywhere.

A look is written in the words of CUB's attributes (:mod:`calm_birds.attributes`) and drawn from the same words
(:mod:`calm_birds.draw`), so that the labels agree with the picture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from calm.errors import CalmError

__all__ = ["GROUPS", "MAX_SPECIES", "Head", "Plumage", "Species", "Tail", "choose_species"]

GROUPS = ("head", "back", "belly", "breast", "tail", "leg", "wing")
"""The part groups of the cue-localization protocol, in its order."""


@dataclass(frozen=True)
class Head:
    """Colours of the head's parts, its marking, and the bill. The cheeks have the nape's colour."""

    crown: str
    forehead: str
    nape: str
    throat: str
    bill_color: str = "black"
    bill_shape: str = "all-purpose"
    pattern: str = "plain"
    eye: str = "black"


@dataclass(frozen=True)
class Plumage:
    """Feathers of one colour, or patterned with a second one (``second`` is "" when solid)."""

    color: str
    pattern: str = "solid"
    second: str = ""


@dataclass(frozen=True)
class Tail:
    """Colour, pattern and outline of the tail."""

    color: str
    shape: str = "rounded_tail"
    pattern: str = "solid"
    second: str = ""


@dataclass(frozen=True)
class Species:
    """One species: its name in CUB's spelling (``Bar_winged_Finch``) and the look of every part group."""

    name: str
    head: Head
    back: Plumage
    breast: Plumage
    belly: Plumage
    wing: Plumage
    tail: Tail
    leg: str

    def differing_groups(self, other: Species) -> tuple[str, ...]:
        """Return the part groups, in protocol order, in which the two species look different."""
        return tuple(group for group in GROUPS if getattr(self, group) != getattr(other, group))


@dataclass(frozen=True)
class _Family:
    """A base species, and for four part groups an alternative look with the epithet that it gives a member."""

    base: Species
    swaps: dict[str, tuple[str, Head | Plumage | Tail | str]]


def _family(base: Species, **swaps: tuple[str, Head | Plumage | Tail | str]) -> _Family:
    return _Family(base, swaps)


_HABITATS = (
    "Meadow", "Willow", "Highland", "Coastal", "Orchard", "Marsh",
    "Island", "Canyon", "Lakeside", "Northern", "Sunset", "Valley",
)  # fmt: skip
# The alternatives (by position in the family's `swaps`) that each member takes, in the order in which members join a
# set. The first eight members swap at most three groups, so any two of them differ in at most three.
_MEMBERS = (
    (), (0,), (0, 1, 2), (1, 2), (1,), (0, 2), (2,), (0, 1),
    (3,), (0, 3), (1, 3), (2, 3), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3),
)  # fmt: skip
_FAMILIES = (
    _family(
        Species("Red_crowned_Finch", Head("red", "red", "brown", "red", "grey", "cone"),
                Plumage("brown", "striped", "black"), Plumage("buff"), Plumage("white"),
                Plumage("brown"), Tail("brown", "notched_tail"), "pink"),
        wing=("Bar_winged", Plumage("black", "striped", "white")),
        tail=("Fork_tailed", Tail("yellow", "forked_tail")),
        breast=("Rosy_breasted", Plumage("red")),
        head=("Black_capped", Head("black", "black", "white", "black", "orange", "cone", "capped")),
    ),
    _family(
        Species("Sapphire_Bunting", Head("blue", "blue", "blue", "blue", "black", "cone"),
                Plumage("blue"), Plumage("orange"), Plumage("white"),
                Plumage("blue"), Tail("blue", "squared_tail"), "black"),
        head=("Masked", Head("white", "white", "white", "white", "orange", "cone", "masked", "yellow")),
        belly=("Spot_bellied", Plumage("yellow", "spotted", "black")),
        wing=("White_winged", Plumage("white", "multi-colored", "black")),
        leg=("Red_legged", "red"),
    ),
    _family(
        Species("Lemon_Warbler", Head("black", "yellow", "yellow", "yellow", "black", "all-purpose", "capped"),
                Plumage("olive"), Plumage("yellow"), Plumage("yellow"),
                Plumage("grey", "striped", "white"), Tail("grey"), "pink"),
        breast=("Streak_breasted", Plumage("white", "striped", "black")),
        leg=("Blue_legged", "blue"),
        back=("Chestnut_backed", Plumage("rufous")),
        tail=("White_tailed", Tail("white", "fan-shaped_tail", "multi-colored", "black")),
    ),
    _family(
        Species("Scarlet_crested_Tanager", Head("red", "red", "red", "red", "yellow", "hooked", "crested"),
                Plumage("red"), Plumage("red"), Plumage("red"),
                Plumage("black"), Tail("black", "squared_tail"), "grey"),
        belly=("White_bellied", Plumage("white")),
        head=("Gold_hooded", Head("yellow", "yellow", "yellow", "yellow", "black", "hooked")),
        tail=("Fan_tailed", Tail("orange", "fan-shaped_tail", "striped", "black")),
        wing=("Olive_winged", Plumage("olive", "striped", "yellow")),
    ),
    _family(
        Species("Emerald_Leafbird", Head("green", "green", "green", "black", "black", "curved_(up_or_down)"),
                Plumage("green"), Plumage("green"), Plumage("yellow"),
                Plumage("green"), Tail("green", "pointed_tail"), "grey"),
        wing=("Purple_winged", Plumage("purple")),
        breast=("Flame_breasted", Plumage("orange")),
        head=("Blue_headed", Head("blue", "orange", "blue", "blue", "red", "curved_(up_or_down)")),
        leg=("Coral_legged", "orange"),
    ),
    _family(
        Species("Eyebrowed_Sparrow", Head("rufous", "rufous", "buff", "white", "grey", "cone", "eyebrow"),
                Plumage("brown", "striped", "black"), Plumage("white", "spotted", "brown"), Plumage("buff"),
                Plumage("rufous", "striped", "white"), Tail("brown", "notched_tail"), "pink"),
        breast=("Grey_breasted", Plumage("grey")),
        tail=("White_tailed", Tail("white", "notched_tail")),
        wing=("Slate_winged", Plumage("grey", "spotted", "white")),
        belly=("Barred", Plumage("white", "striped", "black")),
    ),
    _family(
        Species("Silver_Shrike", Head("grey", "grey", "grey", "white", "black", "hooked", "masked"),
                Plumage("grey"), Plumage("white"), Plumage("white"),
                Plumage("black", "striped", "white"), Tail("black", "pointed_tail"), "black"),
        back=("Chestnut_backed", Plumage("rufous")),
        breast=("Pink_breasted", Plumage("pink")),
        leg=("Yellow_legged", "yellow"),
        tail=("Rufous_tailed", Tail("rufous", "fan-shaped_tail")),
    ),
    _family(
        Species("Violet_Starling", Head("purple", "purple", "purple", "purple", "yellow", "dagger", "plain", "yellow"),
                Plumage("purple"), Plumage("pink"), Plumage("pink"),
                Plumage("purple"), Tail("purple", "squared_tail"), "yellow"),
        tail=("Swallow_tailed", Tail("white", "forked_tail")),
        back=("Golden_backed", Plumage("yellow")),
        belly=("Spangled", Plumage("black", "spotted", "white")),
        wing=("Copper_winged", Plumage("orange", "multi-colored", "brown")),
    ),
    _family(
        Species("Azure_Kingfisher", Head("blue", "blue", "white", "white", "black", "dagger", "crested"),
                Plumage("blue", "spotted", "white"), Plumage("rufous"), Plumage("rufous"),
                Plumage("blue", "striped", "black"), Tail("blue", "squared_tail", "striped", "black"), "red"),
        belly=("White_bellied", Plumage("white")),
        wing=("Emerald_winged", Plumage("green")),
        head=("Green_headed", Head("green", "green", "orange", "white", "red", "dagger", "eyeline")),
        tail=("Plain_tailed", Tail("grey", "squared_tail")),
    ),
    _family(
        Species("Brook_Thrush", Head("brown", "brown", "brown", "buff", "yellow", "all-purpose", "eyering"),
                Plumage("brown"), Plumage("buff", "spotted", "brown"), Plumage("buff"),
                Plumage("brown", "striped", "buff"), Tail("rufous"), "brown"),
        breast=("Orange_breasted", Plumage("orange")),
        back=("Slaty_backed", Plumage("grey")),
        wing=("Rusty_winged", Plumage("rufous")),
        leg=("Yellow_legged", "yellow"),
    ),
    _family(
        Species("Amber_Oriole", Head("orange", "orange", "orange", "black", "grey", "needle"),
                Plumage("black"), Plumage("orange"), Plumage("orange"),
                Plumage("black", "spotted", "white"), Tail("black"), "grey"),
        head=("Hooded", Head("black", "black", "black", "black", "grey", "needle")),
        back=("Olive_backed", Plumage("olive", "striped", "black")),
        tail=("Fan_tailed", Tail("orange", "fan-shaped_tail")),
        belly=("Lemon_bellied", Plumage("yellow")),
    ),
    _family(
        Species("Rose_Dove", Head("pink", "pink", "pink", "pink", "red", "all-purpose", "plain", "orange"),
                Plumage("grey"), Plumage("pink"), Plumage("white"),
                Plumage("grey", "spotted", "black"), Tail("grey", "fan-shaped_tail"), "red"),
        wing=("Green_winged", Plumage("green")),
        breast=("Purple_breasted", Plumage("purple")),
        tail=("Banded", Tail("white", "fan-shaped_tail", "striped", "black")),
        head=("Pale_headed", Head("white", "white", "grey", "white", "black", "all-purpose", "eyering", "red")),
    ),
    _family(
        Species("Ladder_backed_Woodpecker", Head("red", "black", "red", "white", "grey", "needle", "malar"),
                Plumage("black", "striped", "white"), Plumage("white"), Plumage("buff"),
                Plumage("black", "spotted", "white"), Tail("black", "pointed_tail"), "grey"),
        head=("Yellow_crowned", Head("yellow", "yellow", "black", "white", "grey", "needle", "eyeline")),
        belly=("Red_bellied", Plumage("red")),
        back=("Golden_backed", Plumage("yellow")),
        breast=("Spotted", Plumage("white", "spotted", "black")),
    ),
)  # fmt: skip

MAX_SPECIES = len(_FAMILIES) * len(_MEMBERS)


def _member(number: int, member: int) -> Species:
    """Return the ``member``-th species of a family, named after its one swap, or a habitat if it has several."""
    family = _FAMILIES[number]
    swaps = [list(family.swaps.items())[swap] for swap in _MEMBERS[member]]
    if not swaps:
        return family.base
    epithet = swaps[0][1][0]
    if len(swaps) > 1:
        several = [index for index, taken in enumerate(_MEMBERS) if len(taken) > 1]
        epithet = _HABITATS[(several.index(member) + 3 * number) % len(_HABITATS)]
    noun = family.base.name.rpartition("_")[2]
    looks = {group: look for group, (_, look) in swaps}
    return replace(family.base, name=f"{epithet}_{noun}", **looks)  # type: ignore[arg-type]


def choose_species(count: int) -> tuple[Species, ...]:
    """Return the first ``count`` species, family by family; the same count always gives the same ones.

    10 species are three families with 4 pairs each of 1, 2 and 3 differing part groups; 24 species are four
    families of six with 60 such pairs; 30 have 75. More than eight families come with more than 128 species.

    Raises:
        CalmError: ``count`` is not between 2 and :data:`MAX_SPECIES`.
    """
    if not 2 <= count <= MAX_SPECIES:
        raise CalmError(f"species={count}: choose between 2 and {MAX_SPECIES} species")
    families = 1 if count < 6 else min(8, 2 + count // 10)
    families = max(families, -(-count // len(_MEMBERS)))
    sizes = [count // families + (family < count % families) for family in range(families)]
    return tuple(_member(f, m) for f in range(families) for m in range(sizes[f]))
