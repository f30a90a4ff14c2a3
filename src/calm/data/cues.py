"""Cue localization: which parts of a bird tell two classes apart, and where they are in a picture.

The ground truth of cue localization (paper, section 5.2). Classes have attributes ("has_bill_shape::hooked"), each
attribute belongs to a part group by its name, and a pair of classes is told apart by the groups of the attributes in
which they differ. Images have part points; every pixel of the bird belongs to its nearest point. docs/cue-data.md
describes the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from calm.data.records import numbered_lines, parsed_lines
from calm.errors import CalmError, shown
from calm.files import read_yaml
from calm.images import read_mask, resize_image

PROTOCOL_SIZE, PRESENT_PERCENT = (224, 224), 50.0
"""(height, width) of the protocol's pixels; a class has an attribute if this percentage of annotations say so."""

MAX_GROUPS, MAX_PARTS, MAX_COORDINATE = 31, 1000, 1e6
"""Limits on the part groups and parts of a data set, and on coordinates of part points, in pixels."""


class PartGroup(NamedTuple):
    """Parts that are compared as one."""

    name: str  # unique
    words: tuple[str, ...]  # an attribute whose name contains one of them belongs to the group
    points: tuple[tuple[int, ...], ...]  # each is the mean of the visible ones of these part numbers (from 1)


CUB_GROUPS = (
    PartGroup("head", ("bill", "crown", "eye", "forehead", "head", "nape", "throat"), ((2, 5, 6, 7, 10, 11, 15),)),
    PartGroup("back", ("back",), ((1,),)),
    PartGroup("belly", ("belly",), ((3,),)),
    PartGroup("breast", ("breast",), ((4,),)),
    PartGroup("tail", ("tail",), ((14,),)),
    PartGroup("leg", ("leg",), ((8,), (12,))),
    PartGroup("wing", ("wing",), ((9,), (13,))),
)
"""The seven part groups of the paper's protocol, in its order."""


class CuePair(NamedTuple):
    """Two classes, ``first < second``, and the part groups (indices, ascending) in which they differ."""

    first: int
    second: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class PartPoints:
    """Part points of images."""

    ids: tuple[str, ...]  # the images, as in ``Record.id``
    xy: Float[Tensor, "n p 2"]  # float64: x to the right, y down, in pixels of the stored image
    visible: Bool[Tensor, "n p"]  # the xy of the others mean nothing

    def select(self, ids: Iterable[str]) -> PartPoints:
        """Return the points of the images ``ids``, in their order; each must have points."""
        wanted = tuple(ids)
        row_of = {name: row for row, name in enumerate(self.ids)}
        if missing := [name for name in wanted if name not in row_of]:
            listed = f"the file of part points lists {len(self.ids)} images"
            raise CalmError(f"{len(missing)} images have no part points, the first is {missing[0]!r}: {listed}")
        rows = torch.tensor([row_of[name] for name in wanted], dtype=torch.int64)
        return PartPoints(wanted, self.xy[rows], self.visible[rows])

    def merged(
        self, scale: Float[Tensor, "n 2"], groups: Sequence[PartGroup] = CUB_GROUPS
    ) -> tuple[Float[Tensor, "n k 2"], Bool[Tensor, "n k"], Int[Tensor, " k"]]:
        """Return the k points of all groups: x and y times ``scale``, which are visible, and the group of each."""
        members = [torch.tensor(parts) - 1 for group in groups for parts in group.points]
        owner = torch.tensor([index for index, group in enumerate(groups) for _ in group.points])
        scaled = self.xy * scale[:, None]
        points, seen = [], []
        for parts in members:
            weights = self.visible[:, parts].to(scaled)
            count = weights.sum(dim=1)
            # Summed part by part, since the order of torch's sum is not fixed, and the last bit decides which pixel the
            # mean is truncated to.
            total = sum((scaled[:, parts] * weights[..., None]).unbind(dim=1), torch.zeros_like(scaled[:, 0]))
            points.append(total / count.clamp(min=1)[:, None])
            seen.append(count > 0)
        return torch.stack(points, dim=1), torch.stack(seen, dim=1), owner

    def visible_groups(self, groups: Sequence[PartGroup] = CUB_GROUPS) -> Bool[Tensor, "n g"]:
        """Return which part groups have a visible point."""
        parts = [torch.tensor([part for point in group.points for part in point]) - 1 for group in groups]
        return torch.stack([self.visible[:, numbers].any(dim=1) for numbers in parts], dim=1)


def group_votes(names: Sequence[str], groups: Sequence[PartGroup] = CUB_GROUPS) -> Bool[Tensor, "a g"]:
    """Return which part groups each attribute belongs to: by substring of its whole name, as in the protocol.

    So ``has_shape::long-legged-like`` votes for the legs, which changes no pair of CUB and none of its groups.

    >>> group_votes(["has_eye_color::black", "has_size::small", "has_under_tail_color::buff"]).int().argmax(1)
    tensor([0, 0, 4])
    """
    return torch.tensor([[any(word in name for word in group.words) for group in groups] for name in names])


def class_pairs(
    present: Bool[Tensor, "c a"], votes: Bool[Tensor, "a g"], counts: Iterable[int] = (1, 2, 3)
) -> list[CuePair]:
    """Return the pairs of classes that differ in one of ``counts`` part groups, by first and second class."""
    wanted = torch.tensor(sorted(set(counts)), dtype=torch.int64)
    pairs = []
    for first, own in enumerate(present):
        attributes = (present[first + 1 :] != own).double()  # of the later classes, one a row
        differing = attributes @ votes.double() > 0
        for second in torch.isin(differing.sum(dim=1), wanted).nonzero().flatten().tolist():
            pairs.append(CuePair(first, first + 1 + second, tuple(differing[second].nonzero().flatten().tolist())))
    return pairs


def group_mask(regions: Int[Tensor, "*n h w"], groups: Iterable[int]) -> Bool[Tensor, "*n h w"]:
    """Return the pixels that belong to one of ``groups``."""
    return torch.isin(regions, torch.tensor(list(groups), dtype=regions.dtype, device=regions.device))


def part_regions(
    points: PartPoints,
    image_sizes: Int[Tensor, "n 2"],
    *,
    size: tuple[int, int] = PROTOCOL_SIZE,
    inside: Bool[Tensor, "n h w"] | None = None,
    groups: Sequence[PartGroup] = CUB_GROUPS,
) -> Int[Tensor, "n h w"]:
    """Return the part group of each pixel: that of the nearest visible point.

    Points are scaled to ``size``, merged, and only then truncated; of equally near ones the first of ``groups`` wins.

    Args:
        points: of n images.
        image_sizes: their (width, height), in the pixels of the points.
        size: (height, width) of the result.
        inside: pixels that count, the bird's segmentation; None: all.
        groups: what the numbers of the result mean; -1 is outside, and where an image has no visible point.
    """
    height, width = size
    scale = torch.tensor([width, height], dtype=torch.float64) / image_sizes.to(torch.float64)
    merged, seen, owner = points.merged(scale, groups)
    whole = merged.trunc().to(torch.int64)
    # Squared distance and group in one number: the least is the nearest, and of equals the first group.
    bits = len(groups).bit_length()
    reach = int(whole.abs().max()) + max(size) if whole.numel() else 0
    kind = torch.int32 if reach**2 << bits < 2**29 else torch.int64
    far = torch.iinfo(kind).max // 2
    nearest = torch.full((len(whole), height, width), far, dtype=kind)
    sums = torch.empty_like(nearest)
    columns, rows = torch.arange(width), torch.arange(height)
    for point, group in enumerate(owner.tolist()):
        across = ((columns - whole[:, point, :1]) ** 2 << bits).to(kind)
        down = ((rows - whole[:, point, 1:]) ** 2 << bits) + group
        down = down.masked_fill(~seen[:, point, None], far).to(kind)
        torch.add(down[:, :, None], across[:, None, :], out=sums)
        torch.minimum(nearest, sums, out=nearest)
    regions = nearest.bitwise_and_((1 << bits) - 1).to(torch.int8)
    regions.masked_fill_(~seen.any(dim=1)[:, None, None], -1)
    return regions if inside is None else regions.masked_fill_(~inside, -1)


def read_part_groups(root: Path) -> tuple[PartGroup, ...]:
    """Return the part groups of ``parts/groups.yaml``, or CUB's without such a file."""
    path = root / "parts" / "groups.yaml"
    if not path.is_file():
        return CUB_GROUPS
    entries = read_yaml(path, "part groups")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_GROUPS:
        raise CalmError(f"{path}: needs a list of 1 to {MAX_GROUPS} groups, each with name, words and points")
    groups = tuple(_part_group(f"{path}: ", f"group {number}", entry) for number, entry in enumerate(entries, 1))
    if len({group.name for group in groups}) < len(groups):
        raise CalmError(f"{path}: two groups have the same name")
    return groups


def _part_group(where: str, group: str, entry: Any) -> PartGroup:
    if not isinstance(entry, dict) or set(entry) != {"name", "words", "points"}:
        raise CalmError(f"{where}{group} needs name, words and points, and nothing else")
    name, words, points = entry["name"], entry["words"], entry["points"]
    if not isinstance(name, str) or not name:
        raise CalmError(f"{where}name of {group} must be a text, got {shown(name)}")
    if not _is_list(words, lambda word: isinstance(word, str) and word != ""):
        raise CalmError(f"{where}words of {group} must be a list of texts, got {shown(words)}")
    if not _is_list(points, lambda point: _is_list(point, lambda n: type(n) is int and 0 < n <= MAX_PARTS)):
        form = f"lists of part numbers, 1 to {MAX_PARTS:,}"
        raise CalmError(f"{where}points of {group} must be {form}, got {shown(points)}")
    return PartGroup(name, tuple(words), tuple(map(tuple, points)))


def _is_list(value: Any, is_member: Callable[[Any], bool]) -> bool:
    """Return whether ``value`` is a list of one member or more, all of which are as ``is_member`` says."""
    return isinstance(value, list) and bool(value) and all(map(is_member, value))


def _needed(*places: Path) -> Path:
    """Return the first of the paths that exists; a `CalmError` if none does."""
    if path := next(filter(Path.exists, places), None):
        return path
    needs = "cue localization needs class attributes and part points as CUB_200_2011 has them (docs/cue-data.md)"
    raise CalmError(f"there is no {places[0]}: {needs}")


def read_class_attributes(root: Path) -> tuple[tuple[str, ...], Bool[Tensor, "c a"]]:
    """Return the names of the attributes, and which class has which (at least 50 percent).

    ``attributes.txt`` is also found in ``root`` and beside it, where CUB's archive leaves it.
    """
    path = _needed(*(folder / "attributes.txt" for folder in (root / "attributes", root, root.parent)))
    names: list[str] = []
    for line, text in numbered_lines(path):
        number, _, name = text.partition(" ")
        if number != str(len(names) + 1) or not name:
            raise CalmError(f"{path}:{line}: {text!r} is not '{len(names) + 1} NAME'")
        names.append(name.strip())
    if not names:
        raise CalmError(f"{path} lists no attribute")

    def percentages(text: str) -> list[float]:
        values = [float(word) for word in text.split()]
        if len(values) != len(names):
            raise CalmError(f"found {len(values)} values")
        if wrong := [value for value in values if not 0 <= value <= 100]:
            raise CalmError(f"found {wrong[0]:g}")
        return values

    table = _needed(root / "attributes" / "class_attribute_labels_continuous.txt")
    form = f"{len(names)} percentages from 0 to 100, one per attribute"
    rows = [values for _, values in parsed_lines(table, percentages, form)]
    return tuple(names), torch.tensor(rows, dtype=torch.float64).reshape(-1, len(names)) >= PRESENT_PERCENT


def read_pairs(
    root: Path, counts: Iterable[int] = (1, 2, 3), groups: Sequence[PartGroup] = CUB_GROUPS
) -> list[CuePair]:
    """Return `class_pairs` of the attribute table below ``root``. The official files give 31, 64 and 96 pairs."""
    names, present = read_class_attributes(root)
    return class_pairs(present, group_votes(names, groups), counts)


def read_part_points(root: Path) -> PartPoints:
    """Return the part points of all images of ``images.txt``; ``parts/parts.txt`` says how many parts there are."""
    rows: dict[str, int] = {}
    ids: dict[str, None] = {}
    images, names, path = (_needed(root / file) for file in ("images.txt", "parts/parts.txt", "parts/part_locs.txt"))
    for line, text in numbered_lines(images):
        number, _, name = (part.strip() for part in text.partition(" "))
        if number in rows or name in ids or not name:
            raise CalmError(f"{images}:{line}: {text!r:.200} is not 'number path', or listed before")
        rows[number] = len(ids)
        ids[name] = None
    parts = sum(1 for _ in numbered_lines(names))
    if parts > MAX_PARTS:
        raise CalmError(f"{names} lists {parts:,} parts: at most {MAX_PARTS:,} are read")
    xy, visible = np.zeros((len(ids), parts, 2)), np.zeros((len(ids), parts), dtype=bool)

    def point(text: str) -> tuple[str, int, float, float, bool]:
        number, *fields = text.split()
        part, x, y, seen = map(float, fields)
        if part % 1 != 0 or seen not in (0, 1) or not (abs(x) <= MAX_COORDINATE and abs(y) <= MAX_COORDINATE):
            raise ValueError
        return number, int(part), x, y, bool(seen)

    form = f"'image-number part-number x y visible(0|1)', x and y at most {MAX_COORDINATE:,.0f}"
    for line, (number, part, x, y, seen) in parsed_lines(path, point, form):
        if number not in rows or not 1 <= part <= parts:
            raise CalmError(f"{path}:{line}: no image {number} in images.txt, or no part {part}")
        xy[rows[number], part - 1], visible[rows[number], part - 1] = (x, y), seen
    return PartPoints(tuple(ids), torch.from_numpy(xy), torch.from_numpy(visible))


def read_segmentation(
    path: Path, size: tuple[int, int] = PROTOCOL_SIZE, image_size: tuple[int, int] | None = None
) -> Bool[Tensor, "h w"]:
    """Return a segmentation (`read_mask`) as the protocol has it: grey, resized by Pillow (bicubic); object above 0."""
    grey = Image.fromarray(read_mask(path, image_size, "segmentation"))
    return torch.from_numpy(np.asarray(resize_image(grey, size, Image.Resampling.BICUBIC)) > 0)
