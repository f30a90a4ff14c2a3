"""What the annotation of a data set says about cues: pairs of classes, and where the parts are that tell them apart.

Source: paper, section 5.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from calm.data.cue_files import read_class_attributes, read_part_points, read_segmentation
from calm.data.cues import (
    PROTOCOL_SIZE,
    CuePair,
    PartGroup,
    PartPoints,
    class_pairs,
    group_votes,
    part_regions,
)
from calm.data.images import image_size
from calm.data.part_groups import read_part_groups
from calm.data.records import Record, Split
from calm.data.threads import in_threads
from calm.errors import CalmError

__all__ = ["CueData", "read_cue_data"]


@dataclass(frozen=True)
class CueData:
    """What the annotation says.

    Attributes:
        pairs: of classes, and the part groups in which they differ.
        groups: the part groups.
        points: part points of the split's images, in its order.
        sizes: (width, height) of the images, (n, 2).
        samples: image of the split to its pairs: one of the classes is the image's, and a part that differs is
            visible. Images without a pair are left out.
    """

    pairs: tuple[CuePair, ...]
    groups: tuple[PartGroup, ...]
    points: PartPoints
    sizes: Int[Tensor, "n 2"]
    samples: dict[int, tuple[int, ...]]

    def regions(self, records: Sequence[Record], images: Int[Tensor, " b"]) -> Int[Tensor, "b H W"]:
        """Part group of each pixel of some images, -1 outside the object's segmentation (if there is one)."""
        ids = tuple(self.points.ids[image] for image in images.tolist())
        points = PartPoints(ids, self.points.xy[images], self.points.visible[images])
        masks = list(in_threads(_object, [records[image] for image in images.tolist()]))
        return part_regions(points, self.sizes[images], inside=torch.stack(masks), groups=self.groups)

    def bits(self, regions: Int[Tensor, "b H W"]) -> Int[Tensor, "b H W"]:
        """A bit for each part group in place of its number, 0 in place of -1."""
        kind = torch.uint8 if len(self.groups) <= 8 else torch.int64
        table = torch.tensor([0, *(1 << group for group in range(len(self.groups)))], dtype=kind)
        return table.index_select(0, (regions + 1).int().flatten()).view(regions.shape)


def read_cue_data(split: Split, root: Path, counts: Iterable[int] = (1, 2, 3)) -> CueData:
    """Read the pairs and part points of a data set.

    Args:
        split: the images.
        root: of the data set: ``attributes/`` and ``parts/`` are below it (`calm.data.cue_files`), and perhaps
            ``parts/groups.yaml`` (`calm.data.part_groups`).
        counts: numbers of differing part groups that make a pair.

    Raises:
        CalmError: a file is missing or malformed, no pair differs in so many groups, or no image shows a part.
    """
    groups = read_part_groups(root)
    names, present = read_class_attributes(root)
    if len(present) != split.num_classes:
        raise CalmError(
            f"{root / 'attributes'} describes {len(present)} classes, the data set has {split.num_classes}"
        )
    wanted = tuple(counts)
    pairs = tuple(class_pairs(present, group_votes(names, groups), wanted))
    if not pairs:
        raise CalmError(f"no two classes of {root} differ in {' or '.join(map(str, wanted))} part groups")
    points = read_part_points(root).select(record.id for record in split.records)
    visible = points.visible_groups(groups)
    of_class: dict[int, list[int]] = {}
    for number, pair in enumerate(pairs):
        for label in (pair.first, pair.second):
            of_class.setdefault(label, []).append(number)
    samples = {}
    for image, (record, seen) in enumerate(zip(split.records, visible.tolist(), strict=True)):
        shown = tuple(
            number
            for number in of_class.get(record.label, ())
            if any(seen[group] for group in pairs[number].groups)
        )
        if shown:
            samples[image] = shown
    if not samples:
        raise CalmError(
            f"no {split.name} image of {root} shows a part that tells two classes apart: is any part of these images"
            f" visible (last column 1) in {root / 'parts' / 'part_locs.txt'}?"
        )
    sizes = [record.size or image_size(record.path) or (0, 0) for record in split.records]
    return CueData(pairs, groups, points, torch.tensor(sizes), samples)


def _object(record: Record) -> Bool[Tensor, "H W"]:
    """Where the object is: everywhere if nothing says so."""
    if not record.masks:
        return torch.ones(PROTOCOL_SIZE, dtype=torch.bool)
    return read_segmentation(record.masks[0])
