"""Read what cue localization needs: class attributes, part points, segmentations.

Files, below the root of CUB_200_2011 or of any data set written like it. ``attributes/attributes.txt``, number and
name; ``attributes/class_attribute_labels_continuous.txt``, one line per class, one percentage per attribute::

    1 has_bill_shape::curved_(up_or_down)
    0.0 2.9197 1.4599 0.0 59.8540 ...

``parts/part_locs.txt``, image number of ``images.txt``, part number, x, y in pixels of the image, visible or not::

    1 2 312.0 182.0 1
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from calm.data.cues import CUB_GROUPS, PROTOCOL_SIZE, CuePair, PartGroup, PartPoints, class_pairs, group_votes
from calm.data.images import read_pixels
from calm.data.lines import numbered
from calm.errors import CalmError

__all__ = ["read_class_attributes", "read_pairs", "read_part_points", "read_segmentation"]

MOST_PARTS = 1000
"""Parts of a data set, at most."""

FARTHEST = 1e6
"""Pixels: the largest coordinate of a part point."""

PRESENT_PERCENT = 50.0
"""A class has an attribute if at least this percentage of its annotations say so."""


def read_class_attributes(root: Path) -> tuple[tuple[str, ...], Bool[Tensor, "c a"]]:
    """Names of the attributes, and which class has which (at least 50 percent).

    ``attributes.txt`` is also found in ``root`` and beside it, where CUB's archive leaves it.

    Raises:
        CalmError: a file that is missing, a line that is not what the format asks for.
    """
    places = (root / "attributes", root, root.parent)
    path = next(
        (place / "attributes.txt" for place in places if (place / "attributes.txt").is_file()),
        places[0] / "attributes.txt",
    )
    names: list[str] = []
    for line, text in numbered(path):
        number, _, name = text.partition(" ")
        if number != str(len(names) + 1) or not name:
            raise CalmError(f"{path}:{line}: {text!r} is not '{len(names) + 1} NAME'")
        names.append(name.strip())
    if not names:
        raise CalmError(f"{path} lists no attribute")
    table = root / "attributes" / "class_attribute_labels_continuous.txt"
    rows = [_percentages(table, line, text, len(names)) for line, text in numbered(table)]
    return tuple(names), torch.tensor(rows, dtype=torch.float64).reshape(-1, len(names)) >= PRESENT_PERCENT


def _percentages(path: Path, line: int, text: str, count: int) -> list[float]:
    values = _floats(text)
    wrong = [word for word, value in zip(text.split(), values, strict=False) if not 0 <= value <= 100]
    if len(values) != count or wrong:
        found = f"{wrong[0]!r:.40} among them" if wrong else f"{len(text.split())} values"
        raise CalmError(
            f"{path}:{line}: needs {count} percentages from 0 to 100, one per attribute, found {found}"
        )
    return values


def read_pairs(
    root: Path, counts: Iterable[int] = (1, 2, 3), groups: Sequence[PartGroup] = CUB_GROUPS
) -> list[CuePair]:
    """`class_pairs` of the attribute table below ``root``. The official files give 31, 64 and 96 pairs."""
    names, present = read_class_attributes(root)
    return class_pairs(present, group_votes(names, groups), counts)


def read_part_points(root: Path) -> PartPoints:
    """The part points of all images of ``images.txt``; ``parts/parts.txt`` says how many parts there are.

    Raises:
        CalmError: a file that is missing, a malformed line, an image or part number that is not listed, an image
            listed twice, more than `MOST_PARTS` parts.
    """
    places: dict[str, int] = {}
    ids: list[str] = []
    seen: set[str] = set()
    for line, text in numbered(root / "images.txt"):
        number, _, name = text.partition(" ")
        if number in places or name.strip() in seen or not name.strip():
            raise CalmError(
                f"{root / 'images.txt'}:{line}: {text!r:.200} is not 'number path', or listed before"
            )
        places[number] = len(ids)
        seen.add(name.strip())
        ids.append(name.strip())
    parts = sum(1 for _ in numbered(root / "parts" / "parts.txt"))
    if parts > MOST_PARTS:
        raise CalmError(
            f"{root / 'parts' / 'parts.txt'} lists {parts:,} parts: at most {MOST_PARTS:,} are read"
        )
    xy, visible = np.zeros((len(ids), parts, 2)), np.zeros((len(ids), parts), dtype=bool)
    path = root / "parts" / "part_locs.txt"
    for line, text in numbered(path):
        number, _, rest = text.partition(" ")
        values = _floats(rest)
        whole = len(values) == 4 and values[0] % 1 == 0 and values[3] in (0, 1)
        if not whole or not all(abs(value) <= FARTHEST for value in values):
            raise CalmError(
                f"{path}:{line}: {text!r:.200} is not 'image-number part-number x y visible(0|1)', or far outside"
            )
        if number not in places or not 1 <= values[0] <= parts:
            raise CalmError(f"{path}:{line}: no image {number} in images.txt, or no part {values[0]:g}")
        place, part = places[number], int(values[0]) - 1
        xy[place, part], visible[place, part] = values[1:3], bool(values[3])
    return PartPoints(tuple(ids), torch.from_numpy(xy), torch.from_numpy(visible))


def read_segmentation(path: Path, size: tuple[int, int] = PROTOCOL_SIZE) -> Bool[Tensor, "h w"]:
    """A segmentation as the protocol reads it: 8-bit grey, resized by Pillow's bicubic filter, object above 0.

    Raises:
        CalmError: the file is missing or no image.
    """
    shape = (size[1], size[0])
    grey = read_pixels(
        path, lambda image: image.convert("L").resize(shape, Image.Resampling.BICUBIC), "segmentation"
    )
    return torch.from_numpy(grey > 0)


def _floats(text: str) -> list[float]:
    """The numbers of a line; none if one of them is not a number."""
    try:
        return [float(word) for word in text.split()]
    except ValueError:
        return []
