"""Which part of a bird tells two classes apart, and where that part is in a picture.

The ground truth of cue localization (paper, section 5.2). Classes have attributes ("has_bill_shape::hooked"), each
attribute belongs to a part group by its name, and a pair of classes is told apart by the groups of the attributes
in which they differ. Images have part points; every pixel of the bird belongs to its nearest point.

Here is what is done with attributes and points; `calm.data.cue_files` reads them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.errors import CalmError

__all__ = [
    "CUB_GROUPS",
    "CuePair",
    "PartGroup",
    "PartPoints",
    "class_pairs",
    "group_mask",
    "group_votes",
    "part_regions",
]

PROTOCOL_SIZE = (224, 224)
"""(height, width) of the protocol's pixels."""


@dataclass(frozen=True)
class PartGroup:
    """Parts that count as one when classes are compared.

    Attributes:
        name: what to call it.
        words: an attribute whose name contains one of them belongs to the group.
        points: the group's points; each is the mean of the visible ones of these part numbers (from 1).
    """

    name: str
    words: tuple[str, ...]
    points: tuple[tuple[int, ...], ...]


CUB_GROUPS = (
    PartGroup(
        "head",
        ("bill", "crown", "eye", "forehead", "head", "nape", "throat"),
        ((2, 5, 6, 7, 10, 11, 15),),
    ),
    PartGroup("back", ("back",), ((1,),)),
    PartGroup("belly", ("belly",), ((3,),)),
    PartGroup("breast", ("breast",), ((4,),)),
    PartGroup("tail", ("tail",), ((14,),)),
    PartGroup("leg", ("leg",), ((8,), (12,))),
    PartGroup("wing", ("wing",), ((9,), (13,))),
)
"""The seven part groups of the paper's protocol, in its order."""


@dataclass(frozen=True)
class CuePair:
    """Two classes, ``first < second``, and the part groups (indices, ascending) in which they differ."""

    first: int
    second: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class PartPoints:
    """Part points of images.

    Attributes:
        ids: the images, as in ``Record.id``.
        xy: (n, parts, 2) float64: x to the right, y down, in pixels of the stored image.
        visible: (n, parts) bool; the xy of the others mean nothing.
    """

    ids: tuple[str, ...]
    xy: Float[Tensor, "n p 2"]
    visible: Bool[Tensor, "n p"]

    def select(self, ids: Iterable[str]) -> PartPoints:
        """The points of some images, in their order.

        Raises:
            CalmError: an image without points.
        """
        wanted = tuple(ids)
        places = {name: place for place, name in enumerate(self.ids)}
        missing = [name for name in wanted if name not in places]
        if missing:
            raise CalmError(
                f"{len(missing)} images have no part points, the first is {missing[0]!r}: the file of part"
                f" points lists {len(self.ids)} images"
            )
        rows = torch.tensor([places[name] for name in wanted], dtype=torch.int64)
        return PartPoints(wanted, self.xy[rows], self.visible[rows])

    def merged(
        self, scale: Float[Tensor, "n 2"], groups: Sequence[PartGroup] = CUB_GROUPS
    ) -> tuple[Float[Tensor, "n k 2"], Bool[Tensor, "n k"], Int[Tensor, " k"]]:
        """The groups' points: scaled x and y, which of them are visible, and the group of each.

        Args:
            scale: per image the factors of x and y.
            groups: k points in all.
        """
        members = [torch.tensor(parts) - 1 for group in groups for parts in group.points]
        owner = torch.tensor([index for index, group in enumerate(groups) for _ in group.points])
        scaled = self.xy * scale[:, None]
        points, seen = [], []
        for parts in members:
            weights = self.visible[:, parts].to(scaled)
            count = weights.sum(dim=1)
            # Part by part, not by torch's sum: its order is its own, and the last bit decides which pixel the
            # mean is truncated to.
            total = sum((scaled[:, parts] * weights[..., None]).unbind(dim=1), torch.zeros_like(scaled[:, 0]))
            points.append(total / count.clamp(min=1)[:, None])
            seen.append(count > 0)
        return torch.stack(points, dim=1), torch.stack(seen, dim=1), owner

    def visible_groups(self, groups: Sequence[PartGroup] = CUB_GROUPS) -> Bool[Tensor, "n g"]:
        """Which part groups have a visible point."""
        parts = [torch.tensor([part for point in group.points for part in point]) - 1 for group in groups]
        return torch.stack([self.visible[:, numbers].any(dim=1) for numbers in parts], dim=1)


def group_votes(names: Sequence[str], groups: Sequence[PartGroup] = CUB_GROUPS) -> Bool[Tensor, "a g"]:
    """Which part groups each attribute belongs to: by substring of its whole name, as in the protocol.

    So ``has_shape::long-legged-like`` votes for the legs, though it is about the whole bird. On CUB that changes no
    pair and none of its groups (tests/test_cues.py).

    >>> group_votes(["has_eye_color::black", "has_size::small", "has_under_tail_color::buff"]).int().argmax(1)
    tensor([0, 0, 4])
    """
    return torch.tensor([[any(word in name for word in group.words) for group in groups] for name in names])


def class_pairs(
    present: Bool[Tensor, "c a"], votes: Bool[Tensor, "a g"], counts: Iterable[int] = (1, 2, 3)
) -> list[CuePair]:
    """The pairs of classes that differ in one of these numbers of part groups, by first and second class."""
    wanted = torch.tensor(sorted(set(counts)), dtype=torch.int64)
    pairs = []
    for first, own in enumerate(present):
        attributes = (present[first + 1 :] != own).double()  # of the later classes, one a row
        differing = attributes @ votes.double() > 0
        for second in torch.isin(differing.sum(dim=1), wanted).nonzero().flatten().tolist():
            groups = tuple(differing[second].nonzero().flatten().tolist())
            pairs.append(CuePair(first, first + 1 + second, groups))
    return pairs


def group_mask(regions: Int[Tensor, "*n h w"], groups: Iterable[int]) -> Bool[Tensor, "*n h w"]:
    """The pixels that belong to one of some part groups."""
    return torch.isin(regions, torch.tensor(list(groups), dtype=regions.dtype, device=regions.device))


def part_regions(
    points: PartPoints,
    image_sizes: Int[Tensor, "n 2"],
    *,
    size: tuple[int, int] = PROTOCOL_SIZE,
    inside: Bool[Tensor, "n h w"] | None = None,
    groups: Sequence[PartGroup] = CUB_GROUPS,
) -> Int[Tensor, "n h w"]:
    """The part group of each pixel: that of the nearest visible point.

    Points are scaled to ``size``, merged, and only then truncated to whole pixels. Of points at the same
    distance the first in the order of ``groups`` wins.

    Args:
        points: of n images.
        image_sizes: their (width, height), in the pixels of the points.
        size: (height, width) of the result.
        inside: pixels that count, the bird's segmentation; None: all.
        groups: what the numbers of the result mean.

    Returns:
        int8, (n, height, width): index of the group; -1 outside and where an image has no visible point.
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
