"""Class names, and the official CUB_200_2011 folder, read directly (docs/reading.md describes its files).

Official boxes are read as the published localization metadata of CUB reads them, so that both routes to the same image
give the same box. Left and top do occur as 0, so they count from 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar

from calm.data.records import (
    Box,
    Layout,
    Line,
    ProblemLog,
    Record,
    Split,
    is_inside,
    numbered_lines,
    parsed_lines,
    whole_number,
)
from calm.errors import CalmError
from calm.images import image_size

CUB_FILES = ("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt")
"""The files without which a folder is not read as CUB_200_2011."""

OVERHANG = 2  # pixels by which official boxes reach over the right and lower edge, and are clipped without a warning
_WORDNET_ID = re.compile(r"n\d{8}\s+(?=\S)")


def read_names(path: Path) -> tuple[str, ...]:
    """Return the class names of ``classes.txt``, which must differ, by class index.

    The indices of the file are 0 .. C-1, or 1 .. C as in the official CUB file; lines may be in any order. A WordNet id
    before the name is dropped. Of several synonyms divided by commas the first is the name, unless two classes would
    then share it.
    """
    by_index: dict[int, str] = {}
    for number, (index, name) in parsed_lines(path, _index_and_name, "'index name'"):
        if index in by_index:
            raise CalmError(f"{path}:{number}: class index {index} is given twice")
        by_index[index] = name
    first = min(by_index, default=0)
    missing = set(range(first, first + len(by_index))) - by_index.keys()
    if first not in (0, 1) or missing or not by_index:
        fault = f"{min(missing)} is missing" if missing else f"the first is {first}" if by_index else "there are none"
        raise CalmError(f"{path}: class indices must run from 0 (or 1) without gaps, {fault}")
    full = [by_index[index] for index in sorted(by_index)]
    short = [name.split(",")[0].strip() for name in full]
    names = short if len(set(short)) == len(short) else full
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise CalmError(f"{path}: two classes are called {repeated[0]!r}; names must differ")
    return tuple(names)


def _index_and_name(text: str) -> tuple[int, str]:
    key, name = text.split(maxsplit=1)
    if (index := whole_number(key)) is None:
        raise ValueError
    return index, _WORDNET_ID.sub("", name, count=1)


def names_from_folders(labels: Mapping[str, int]) -> tuple[str, ...]:
    """Return the name of the folder that holds each class's images, or the index as text.

    ``labels`` maps image ids (relative paths) to class indices; the result has the names of 0 .. the largest. Folders
    give the names only if they and the classes pair one to one.

    >>> names_from_folders({"train/cat/1.jpg": 0, "train/dog/1.jpg": 1, "train/dog/2.jpg": 1})
    ('cat', 'dog')
    >>> names_from_folders({"train/1.jpg": 0, "train/2.jpg": 1})
    ('0', '1')
    """
    size = max(labels.values(), default=-1) + 1
    pairs = sorted({(label, PurePosixPath(name).parent.name) for name, label in labels.items()})
    names = tuple(folder for _, folder in pairs)
    one_to_one = [label for label, _ in pairs] == list(range(size)) and len(set(names)) == size and "" not in names
    return names if one_to_one else tuple(map(str, range(size)))


def corners(box: tuple[float, float, float, float], size: tuple[int, int] | None) -> Box:
    """Convert left, top, width, height of ``bounding_boxes.txt`` to inclusive corner pixels (see the module).

    >>> corners((5.0, 127.0, 496.0, 131.0), (500, 275))
    (5, 127, 499, 258)
    """
    left, top, width, height = box
    x1, y1 = int(left + width), int(top + height)
    if size is not None:
        x1 = size[0] - 1 if size[0] <= x1 < size[0] + OVERHANG else x1
        y1 = size[1] - 1 if size[1] <= y1 < size[1] + OVERHANG else y1
    return int(left), int(top), x1, y1


@dataclass(frozen=True)
class CubSource:
    """A folder in the official layout, whole or filtered to some images (``classes.txt`` stays whole)."""

    root: Path
    layout: ClassVar[Layout] = "cub"
    listing: ClassVar[str] = "images.txt and train_test_split.txt"
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The official names with their numbers, such as "001.Black_footed_Albatross"."""
        return read_names(self.root / "classes.txt")

    def read(self, split: str) -> Split:
        """Read "train" or "test", and the sizes of its images; what is wrong with single lines is in ``problems``.

        Lines that belong to no image, and images of no split, are problems of train.
        """
        log = ProblemLog(split)
        images, _, labels, sides = (self.root / name for name in CUB_FILES)
        name_of, label_of, side_of = (_read_table(path, log) for path in (images, labels, sides))
        boxes, segmentations = self.root / "bounding_boxes.txt", self.root / "segmentations"
        box_of = _read_table(boxes, log) if boxes.is_file() else None
        has_masks = segmentations.is_dir()
        if split == "train":
            for path, rows in ((labels, label_of), (sides, side_of), (boxes, box_of or {})):
                for number, row in rows.items():
                    if number not in name_of:
                        log.add("unlisted-id", path, f"image number {number} is not in images.txt", row.number)
        records: list[Record] = []
        seen: dict[str, int] = {}
        for number, (line, name) in name_of.items():
            image, given = f"image number {number} ({name})", side_of.get(number, Line(0, "")).value
            side = {"1": "train", "0": "test"}.get(given)
            if (side or "train") != split:
                continue
            if name in seen:
                log.add("duplicate-id", images, f"{name}: listed before in line {seen[name]}", line, name)
            elif not is_inside(name):
                log.add("bad-path", images, name, line, name)
            elif side is None:
                fault = f"has {given!r}, allowed are 1 (train) and 0 (test)" if given else "is not there"
                log.add("no-split", images, f"{image} {fault} in train_test_split.txt", line, name)
            else:
                seen[name] = line
                label = _label(label_of.get(number), len(self.class_names), labels, image, name, log)
                if label is not None:
                    path = self.root / "images" / name
                    size = image_size(path)
                    box = () if box_of is None else _box(box_of.get(number), size, boxes, image, name, log)
                    masks = (segmentations / PurePosixPath(name).with_suffix(".png"),) if has_masks else ()
                    records.append(Record(name, path, label, box, masks, size=size))
        if not any(mask.exists() for record in records for mask in record.masks):  # segmentations of test alone, say
            records = [replace(record, masks=()) for record in records]
        return Split(split, tuple(records), self.class_names, self.root / "images", problems=tuple(log.problems))


def _read_table(path: Path, log: ProblemLog) -> dict[int, Line[str]]:
    """Read lines ``image-number value``, by image number; what is wrong with them are problems of train."""
    rows: dict[int, Line[str]] = {}
    for line, text in numbered_lines(path):
        key, *value = text.split(maxsplit=1)
        number = whole_number(key)
        if number is not None and value and number not in rows:
            rows[number] = Line(line, value[0])
        elif log.split == "train":
            given = f"image number {key} is given before" if value and number in rows else ""
            log.add("malformed-line", path, given or f"{text!r} is not 'image-number value'", line)
    return rows


def _label(row: Line[str] | None, classes: int, path: Path, image: str, name: str, log: ProblemLog) -> int | None:
    """Return the class index from 0 of an image; None, and a problem, if there is none in range."""
    label = None if row is None else whole_number(row.value)
    if label is not None and 1 <= label <= classes:
        return label - 1
    if row is None:
        log.add("no-label", path, f"{image} is not there", None, name)
    elif label is None:
        log.add("label-not-integer", path, f"{row.value!r} for {image}", row.number, name)
    else:
        log.add("label-range", path, f"{label} for {image}: classes are 1 .. {classes}", row.number, name)
    return None


def _box(
    row: Line[str] | None, size: tuple[int, int] | None, path: Path, image: str, name: str, log: ProblemLog
) -> tuple[Box, ...]:
    """Return the box of an image; nothing, and a problem, if it has none."""
    if row is None:
        log.add("no-box", path, f"{image} is not there", record=name)
        return ()
    try:
        left, top, width, height = map(float, row.value.split())
        box = corners((left, top, width, height), size)
    except (ValueError, OverflowError):
        form = "needs 4 numbers: left top width height"
        log.add("malformed-line", path, f"{row.value!r} for {image}: {form}", row.number, name)
        return ()
    log.check_box(box, size, path, row.number, name)
    return (box,)
