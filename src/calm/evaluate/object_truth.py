"""Where the objects are: boxes and masks, scaled to the protocol's size as the published evaluator does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from calm.data.images import image_size, probe, read_pixels
from calm.data.records import Record, Split
from calm.errors import CalmError

__all__ = ["Truth", "box_region", "masks", "scaled_boxes", "truth_kinds"]

Truth = Literal["boxes", "masks"]


def truth_kinds(split: Split) -> tuple[tuple[Truth, ...], str]:
    """What every image of a split is annotated with, masks, boxes, or both; and what only some images have, in words.

    Raises:
        CalmError: no image, no annotation, or images without the one that others have.
    """
    if not split.records:
        raise CalmError(f"split {split.name!r} of {split.root} has no image")
    kinds: tuple[Truth, ...] = ("masks", "boxes")
    without = {kind: [record.id for record in split.records if not getattr(record, kind)] for kind in kinds}
    whole = tuple(kind for kind in kinds if not without[kind])
    if whole:
        partly = [kind for kind in kinds if 0 < len(without[kind]) < len(split.records)]
        return whole, " and ".join(
            f"no figures by {kind}: {len(without[kind])} of {len(split.records)} images of split {split.name!r} have"
            f" none, first {without[kind][0]}"
            for kind in partly
        )
    nearest = min(kinds, key=lambda kind: len(without[kind]))
    if len(without[nearest]) == len(split.records):
        raise CalmError(
            f"split {split.name!r} of {split.root} has neither boxes nor masks: localization needs bounding_boxes.txt "
            "(CUB's layout) or localization.txt (the metadata format)"
        )
    raise CalmError(
        f"{len(without[nearest])} of {len(split.records)} images of split {split.name!r} have no {nearest}, "
        f"first {without[nearest][0]}: annotate them, or take them out of the lists of images"
    )


def scaled_boxes(record: Record, size: tuple[int, int]) -> Int[Tensor, "n 4"]:
    """The boxes of an image in pixels of a map of ``size`` = (height, width): scaled, then truncated.

    Raises:
        CalmError: the image cannot be read (only where its size is not in the lists).
    """
    width, height = record.size or _file_size(record.path)
    corners = torch.tensor(record.boxes, dtype=torch.float64)
    target = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
    return (corners * target / torch.tensor([width, height] * 2, dtype=torch.float64)).long()


def box_region(boxes: Int[Tensor, "n 4"], size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The pixels inside any box, corners included."""
    inside = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = True
    return inside


def masks(record: Record, size: tuple[int, int]) -> tuple[Bool[Tensor, "h w"], Bool[Tensor, "h w"]]:
    """The pixels of any instance, and those to ignore: of the ignore mask and of no instance. Nearest neighbour.

    Raises:
        CalmError: a mask that is missing or no picture.
    """
    positive = _union(record.masks, size)
    ignore = _union([record.ignore] if record.ignore else [], size) & ~positive
    return torch.from_numpy(positive), torch.from_numpy(ignore)


def _union(paths: Sequence[Path], size: tuple[int, int]) -> NDArray[np.bool_]:
    union = np.zeros(size, dtype=np.bool_)
    for path in paths:
        grey = read_pixels(path, lambda image: image.convert("L"), "mask")
        union |= cv2.resize(grey, (size[1], size[0]), interpolation=cv2.INTER_NEAREST) > 0
    return union


def _file_size(path: Path) -> tuple[int, int]:
    """(width, height) as stored."""
    size = image_size(path)
    if size is None:
        raise CalmError(f"cannot read image {path}: {probe(path).message}")
    return size
