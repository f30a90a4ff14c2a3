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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from calm.data.records import Box, Problem, Record, Split, box_problem, inside, numbered, whole_number
from calm.errors import CalmError
from calm.images import image_size

__all__ = ["CUB_FILES", "CubSource", "corners", "names_from_folders", "read_names"]

_WORDNET = re.compile(r"n\d{8}\s+(?=\S)")


def read_names(path: Path) -> tuple[str, ...]:
    """Names of ``classes.txt`` by class index.

    The indices of the file are 0 .. C-1, or 1 .. C as in the official CUB file; lines may be in any order.
    A WordNet id before the name is dropped. Of several synonyms divided by commas the first is the name,
    unless two classes would then share it.

    Raises:
        CalmError: a line of another form, an index missing or given twice, two classes of one name.
    """
    by_index: dict[int, str] = {}
    for number, text in numbered(path):
        key, *rest = text.split(maxsplit=1)
        index = whole_number(key)
        name = _WORDNET.sub("", rest[0], count=1) if rest else ""
        if index is None or not name:
            raise CalmError(f"{path}:{number}: {text!r} is not 'index name'")
        if index in by_index:
            raise CalmError(f"{path}:{number}: class index {index} is given twice")
        by_index[index] = name
    first = min(by_index, default=0)
    missing = set(range(first, first + len(by_index))) - by_index.keys()
    if first not in (0, 1) or missing or not by_index:
        wanted = (
            f"{min(missing)} is missing"
            if missing
            else f"the first is {first}"
            if by_index
            else "there are none"
        )
        raise CalmError(f"{path}: class indices must run from 0 (or 1) without gaps, {wanted}")
    full = [by_index[index] for index in sorted(by_index)]
    short = [name.split(",")[0].strip() for name in full]
    names = short if len(set(short)) == len(short) else full
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise CalmError(f"{path}: two classes are called {repeated[0]!r}; names must differ")
    return tuple(names)


def names_from_folders(labels: Mapping[str, int]) -> tuple[str, ...]:
    """The name of the folder that holds each class's images, or the index as text.

    Args:
        labels: image id (a relative path) to class index.

    Returns:
        0 .. the largest label. Folders give the names only if they and the classes pair one to one.

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


CUB_FILES = ("images.txt", "classes.txt", "image_class_labels.txt", "train_test_split.txt")
"""The files without which a folder is not read as CUB_200_2011."""

OVERHANG = 2
"""Pixels by which official boxes reach over the right and lower edge and are clipped without a word."""


def corners(box: tuple[float, float, float, float], size: tuple[int, int] | None) -> Box:
    """Left, top, width, height of ``bounding_boxes.txt`` to inclusive corner pixels (see the module).

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

    splits = ("train", "test")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The official names with their numbers, such as "001.Black_footed_Albatross"."""
        return read_names(self.root / "classes.txt")

    def listing(self, split: str) -> str:
        """The files or folder that say which images a split has, for messages."""
        return "images.txt and train_test_split.txt"

    def read(self, split: str) -> Split:
        """Read "train" or "test"; what is wrong with single lines is in the result's ``problems``.

        Lines that belong to no image are problems of train. Reads the header of each image of the split for
        its size.

        Raises:
            CalmError: a file that must exist is missing or no text.
        """
        files = _Files.read(self.root, split, len(self.class_names))
        records = tuple(
            files.record(number, name, label)
            for number, name in files.images()
            if (label := files.label(number, name)) is not None
        )
        problems = (*(files.stray_lines() if split == "train" else ()), *files.problems)
        return Split(split, records, self.class_names, self.root / "images", problems=problems)


@dataclass(frozen=True)
class _Table:
    """A file of lines ``image-number value``: (line number, value) by image number, and (line number, complaint)."""

    path: Path
    rows: dict[int, tuple[int, str]]
    malformed: list[tuple[int, str]]

    @classmethod
    def read(cls, path: Path) -> _Table:
        rows: dict[int, tuple[int, str]] = {}
        malformed: list[tuple[int, str]] = []
        for line, text in numbered(path):
            key, *value = text.split(maxsplit=1)
            number = whole_number(key)
            if number is None or not value:
                malformed.append((line, f"{text!r} is not 'image-number value'"))
            elif number in rows:
                malformed.append((line, f"image number {key} is given before, in line {rows[number][0]}"))
            else:
                rows[number] = line, value[0]
        return cls(path, rows, malformed)


@dataclass(frozen=True)
class _Files:
    """The files of a folder, read for one split, and what is wrong with that split's images."""

    root: Path
    split: str
    num_classes: int
    names: _Table
    labels: _Table
    sides: _Table
    boxes: _Table | None
    segmented: bool
    problems: list[Problem]

    @classmethod
    def read(cls, root: Path, split: str, num_classes: int) -> _Files:
        names, _, labels, sides = CUB_FILES
        boxes = root / "bounding_boxes.txt"
        return cls(
            root,
            split,
            num_classes,
            _Table.read(root / names),
            _Table.read(root / labels),
            _Table.read(root / sides),
            _Table.read(boxes) if boxes.is_file() else None,
            (root / "segmentations").is_dir(),
            [],
        )

    def stray_lines(self) -> Iterator[Problem]:
        """Lines of another form, and lines about image numbers that are not listed."""
        for table in filter(None, (self.names, self.labels, self.sides, self.boxes)):
            for line, message in table.malformed:
                yield Problem("malformed-line", self.split, table.path, message, line)
            for number, (line, _) in table.rows.items():
                if number not in self.names.rows:
                    message = f"image number {number} is not in images.txt"
                    yield Problem("unlisted-id", self.split, table.path, message, line)

    def images(self) -> Iterator[tuple[int, str]]:
        """(image number, path below images/) of the split's images; images of no split count as train."""
        seen: dict[str, int] = {}
        for number, (line, name) in self.names.rows.items():
            given = self.sides.rows.get(number, (0, ""))[1]
            side = {"1": "train", "0": "test"}.get(given)
            if (side or "train") != self.split:
                continue
            if name in seen:
                self._note(
                    "duplicate-id", self.names, f"{name}: listed before in line {seen[name]}", line, name
                )
            elif not inside(name):
                self._note("bad-path", self.names, name, line, name)
            elif side is None:
                found = f"has {given!r}, allowed are 1 (train) and 0 (test)" if given else "is not there"
                message = f"image number {number} ({name}) {found} in train_test_split.txt"
                self._note("no-split", self.names, message, line, name)
            else:
                seen[name] = line
                yield number, name

    def label(self, number: int, name: str) -> int | None:
        """The class index from 0 of an image; None, and a problem, if there is none in range."""
        line, value = self.labels.rows.get(number, (None, ""))
        label = whole_number(value)
        if line is None:
            self._note("no-label", self.labels, f"image number {number} ({name}) is not there", None, name)
        elif label is None:
            message = f"{value!r} for image number {number} ({name})"
            self._note("label-not-integer", self.labels, message, line, name)
        elif not 1 <= label <= self.num_classes:
            message = f"{label} for image number {number} ({name}): classes are 1 .. {self.num_classes}"
            self._note("label-range", self.labels, message, line, name)
        else:
            return label - 1
        return None

    def record(self, number: int, name: str, label: int) -> Record:
        """The record of an image; problems of its box are noted."""
        path = self.root / "images" / name
        size = image_size(path)
        mask = self.root / "segmentations" / PurePosixPath(name).with_suffix(".png")
        masks = (mask,) if self.segmented else ()
        return Record(name, path, label, self._boxes(number, name, size), masks, size=size)

    def _boxes(self, number: int, name: str, size: tuple[int, int] | None) -> tuple[Box, ...]:
        if self.boxes is None:
            return ()
        line, value = self.boxes.rows.get(number, (None, ""))
        if line is None:
            self._note("no-box", self.boxes, f"image number {number} ({name}) is not there", None, name)
            return ()
        try:
            left, top, width, height = map(float, value.split())
            box = corners((left, top, width, height), size)
        except (ValueError, OverflowError):
            message = f"{value!r} for image number {number}: needs 4 numbers: left top width height"
            self._note("malformed-line", self.boxes, message, line, name)
            return ()
        problem = box_problem(box, size, split=self.split, file=self.boxes.path, line=line, record=name)
        if problem:
            self.problems.append(problem)
        return (box,)

    def _note(self, kind: str, table: _Table, message: str, line: int | None, name: str) -> None:
        self.problems.append(Problem(kind, self.split, table.path, message, line, name))
