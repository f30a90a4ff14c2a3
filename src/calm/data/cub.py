"""The official CUB_200_2011 folder, read directly.

``images.txt``, image number and path below ``images/``::

    1 001.Black_footed_Albatross/Black_Footed_Albatross_0046_18.jpg

``classes.txt``, class number from 1 and name; ``image_class_labels.txt``, image number and class number;
``train_test_split.txt``, image number and 1 for train, 0 for test::

    1 001.Black_footed_Albatross
    1 1
    1 0

``bounding_boxes.txt`` (may be absent), image number, left, top, width, height in pixels::

    1 60.0 27.0 325.0 304.0

``segmentations/<class>/<image>.png`` (may be absent; the official separate download): grey, bird above 0.

**Boxes.** The official numbers are read as the published localization metadata of CUB reads them, so that
both routes to the same image give the same box: x0 = left, y0 = top, x1 = left + width, y1 = top + height,
truncated to integers, and x1, y1 clipped to the last column and row. Left and top do occur as 0, so they
count from 0. Some official boxes reach up to two pixels over the right or lower edge; more than that is
reported as a problem and not clipped.

Names of classes: from ``classes.txt``, or from the folders the images are in.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import ClassVar

from calm.data.records import (
    Box,
    Layout,
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

OVERHANG = 2
"""Pixels by which official boxes reach over the right and lower edge, and are clipped without a warning."""

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
    pairs = {(label, PurePosixPath(name).parent.name) for name, label in labels.items()}
    folders = dict(pairs)
    names = {folder for _, folder in pairs}
    if len(pairs) == size == len(folders) == len(names) and "" not in names:
        return tuple(folders[index] for index in range(size))
    return tuple(map(str, range(size)))


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
    splits: ClassVar[tuple[str, ...]] = ("train", "test")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The official names with their numbers, such as "001.Black_footed_Albatross"."""
        return read_names(self.root / "classes.txt")

    def listing(self, split: str) -> str:
        """Return the files that say which images a split has, for messages."""
        return "images.txt and train_test_split.txt"

    def read(self, split: str) -> Split:
        """Read "train" or "test"; what is wrong with single lines is in the result's ``problems``.

        Lines that belong to no image are problems of train. The header of each image of the split is read for its size.
        """
        log = ProblemLog(split)
        records = _Files(self.root, log, len(self.class_names)).records()
        return Split(split, records, self.class_names, self.root / "images", problems=tuple(log.problems))


class _Table:
    """A file of lines ``image-number value``; ``rows`` maps an image number to (line number, value)."""

    def __init__(self, path: Path, log: ProblemLog) -> None:
        self.path = path
        self.rows: dict[int, tuple[int, str]] = {}
        for line, text in numbered_lines(path):
            key, *value = text.split(maxsplit=1)
            number = whole_number(key)
            if number is not None and value and number not in self.rows:
                self.rows[number] = line, value[0]
            elif log.split == "train":
                given = f"image number {key} is given before" if value and number in self.rows else ""
                log.add("malformed-line", path, given or f"{text!r} is not 'image-number value'", line)

    def get(self, number: int) -> tuple[int | None, str]:
        """Return (line number, value) of an image number, or (None, "")."""
        return self.rows.get(number, (None, ""))


class _Files:
    """The files of a folder, read for the split of ``log``; problems of that split's images are added to ``log``."""

    def __init__(self, root: Path, log: ProblemLog, num_classes: int) -> None:
        self.root, self.log, self.num_classes = root, log, num_classes
        names, _, labels, sides = CUB_FILES
        self.names, self.labels, self.sides = (_Table(root / name, log) for name in (names, labels, sides))
        boxes = root / "bounding_boxes.txt"
        self.boxes = _Table(boxes, log) if boxes.is_file() else None
        self.segmented = (root / "segmentations").is_dir()

    def records(self) -> tuple[Record, ...]:
        """Return the records of the split's images; images of no split count as train."""
        if self.log.split == "train":
            self._check_listed()
        records: list[Record] = []
        seen: dict[str, int] = {}
        for number, (line, name) in self.names.rows.items():
            given = self.sides.get(number)[1]
            side = {"1": "train", "0": "test"}.get(given)
            if (side or "train") != self.log.split:
                continue
            path = self.names.path
            if name in seen:
                self.log.add("duplicate-id", path, f"{name}: listed before in line {seen[name]}", line, name)
            elif not is_inside(name):
                self.log.add("bad-path", path, name, line, name)
            elif side is None:
                fault = f"has {given!r}, allowed are 1 (train) and 0 (test)" if given else "is not there"
                message = f"image number {number} ({name}) {fault} in train_test_split.txt"
                self.log.add("no-split", path, message, line, name)
            else:
                seen[name] = line
                if (label := self._label(number, name)) is not None:
                    records.append(self._record(number, name, label))
        return tuple(records)

    def _check_listed(self) -> None:
        for table in filter(None, (self.labels, self.sides, self.boxes)):
            for number, (line, _) in table.rows.items():
                if number not in self.names.rows:
                    self.log.add("unlisted-id", table.path, f"image number {number} is not in images.txt", line)

    def _label(self, number: int, name: str) -> int | None:
        """Return the class index from 0 of an image; None, and a problem, if there is none in range."""
        line, value = self.labels.get(number)
        label = whole_number(value)
        image = f"image number {number} ({name})"
        if line is None:
            kind, message = "no-label", f"{image} is not there"
        elif label is None:
            kind, message = "label-not-integer", f"{value!r} for {image}"
        elif not 1 <= label <= self.num_classes:
            kind, message = "label-range", f"{label} for {image}: classes are 1 .. {self.num_classes}"
        else:
            return label - 1
        self.log.add(kind, self.labels.path, message, line, name)
        return None

    def _record(self, number: int, name: str, label: int) -> Record:
        path = self.root / "images" / name
        size = image_size(path)
        mask = self.root / "segmentations" / PurePosixPath(name).with_suffix(".png")
        masks = (mask,) if self.segmented else ()
        return Record(name, path, label, self._boxes(number, name, size), masks, size=size)

    def _boxes(self, number: int, name: str, size: tuple[int, int] | None) -> tuple[Box, ...]:
        if self.boxes is None:
            return ()
        line, value = self.boxes.get(number)
        if line is None:
            self.log.add("no-box", self.boxes.path, f"image number {number} ({name}) is not there", record=name)
            return ()
        try:
            left, top, width, height = map(float, value.split())
            box = corners((left, top, width, height), size)
        except (ValueError, OverflowError):
            message = f"{value!r} for image number {number}: needs 4 numbers: left top width height"
            self.log.add("malformed-line", self.boxes.path, message, line, name)
            return ()
        self.log.check_box(box, size, self.boxes.path, line, name)
        return (box,)
