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
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from calm.data.class_names import read_names
from calm.data.images import image_size
from calm.data.lines import box_problem, inside, numbered
from calm.data.problems import Problem
from calm.data.records import Box, Record, Split

__all__ = ["CUB_FILES", "CubSource", "corners"]

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


@dataclass
class _Table:
    """A file of lines ``image-number value...``: values and line numbers by image number."""

    path: Path
    values: dict[int, str]
    lines: dict[int, int]
    malformed: list[tuple[int, str]]


def _table(path: Path) -> _Table:
    table = _Table(path, {}, {}, [])
    for number, text in numbered(path):
        key, _, value = text.partition(" ")
        if not key.isdecimal() or not value.strip():
            table.malformed.append((number, f"{text!r} is not 'image-number value'"))
        elif int(key) in table.values:
            table.malformed.append(
                (number, f"image number {key} is given before, in line {table.lines[int(key)]}")
            )
        else:
            table.values[int(key)], table.lines[int(key)] = value.strip(), number
    return table


@dataclass(frozen=True)
class CubSource:
    """A folder in the official layout, whole or filtered to some images (``classes.txt`` stays whole)."""

    root: Path

    splits = ("train", "test")

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """The official names with their numbers, such as "001.Black_footed_Albatross"."""
        return read_names(self.root / "classes.txt")

    def read(self, split: str) -> Split:
        """Read "train" or "test"; what is wrong with single lines is in the result's ``problems``.

        Reads the header of each image of the split for its size.

        Raises:
            CalmError: a file that must exist is missing or no text.
        """
        names, labels, sides = (_table(self.root / file) for file in (CUB_FILES[0], *CUB_FILES[2:]))
        boxes = self.root / "bounding_boxes.txt"
        boxes_table = _table(boxes) if boxes.is_file() else None
        problems: list[Problem] = []
        records: list[Record] = []
        if split == "train":
            tables = [names, labels, sides] + ([boxes_table] if boxes_table else [])
            problems += [
                Problem("malformed-line", split, table.path, message, line)
                for table in tables
                for line, message in table.malformed
            ]
            problems += [
                Problem(
                    "unlisted-id",
                    split,
                    table.path,
                    f"image number {key} is not in images.txt",
                    table.lines[key],
                )
                for table in tables
                for key in table.values.keys() - names.values.keys()
            ]
        seen: dict[str, int] = {}
        for number, name in names.values.items():
            side = {"1": "train", "0": "test"}.get(sides.values.get(number, ""))
            if (side or "train") != split:
                continue
            line = names.lines[number]
            problem = self._name_problem(name, number, side, seen, names, sides)
            if problem:
                kind, message = problem
                problems.append(Problem(kind, split, names.path, message, line, name))
                continue
            seen[name] = line
            label = self._label(number, name, labels, split, problems)
            if label is not None:
                records.append(self._record(number, name, label, boxes_table, split, problems))
        return Split(split, tuple(records), self.class_names, self.root / "images", problems=tuple(problems))

    def _name_problem(
        self, name: str, number: int, side: str | None, seen: dict[str, int], names: _Table, sides: _Table
    ) -> tuple[str, str] | None:
        if name in seen:
            return "duplicate-id", f"{name}: listed before in line {seen[name]}"
        if not inside(name):
            return "bad-path", name
        if side is None:
            given = sides.values.get(number)
            found = f"has {given!r}, allowed are 1 (train) and 0 (test)" if given else "is not there"
            return "no-split", f"image number {number} ({name}) {found} in train_test_split.txt"
        return None

    def _label(
        self, number: int, name: str, labels: _Table, split: str, problems: list[Problem]
    ) -> int | None:
        if number not in labels.values:
            message = f"image number {number} ({name}) is not there"
            problems.append(Problem("no-label", split, labels.path, message, None, name))
            return None
        value, line = labels.values[number], labels.lines[number]
        try:
            label = int(value)
        except ValueError:
            message = f"{value!r} for image number {number} ({name})"
            problems.append(Problem("label-not-integer", split, labels.path, message, line, name))
            return None
        if not 1 <= label <= len(self.class_names):
            message = f"{label} for image number {number} ({name}): classes are 1 .. {len(self.class_names)}"
            problems.append(Problem("label-range", split, labels.path, message, line, name))
            return None
        return label - 1

    def _record(
        self, number: int, name: str, label: int, boxes: _Table | None, split: str, problems: list[Problem]
    ) -> Record:
        path = self.root / "images" / name
        size = image_size(path)
        found: tuple[Box, ...] = ()
        if boxes is not None and number in boxes.values:
            found = self._box(number, name, size, boxes, split, problems)
        elif boxes is not None:
            message = f"image number {number} ({name}) is not there"
            problems.append(Problem("no-box", split, boxes.path, message, None, name))
        masks: tuple[Path, ...] = ()
        if self._segmented:
            masks = (self.root / "segmentations" / PurePosixPath(name).with_suffix(".png"),)
        return Record(name, path, label, found, masks, size=size)

    @cached_property
    def _segmented(self) -> bool:
        return (self.root / "segmentations").is_dir()

    def _box(
        self,
        number: int,
        name: str,
        size: tuple[int, int] | None,
        boxes: _Table,
        split: str,
        problems: list[Problem],
    ) -> tuple[Box, ...]:
        line = boxes.lines[number]
        try:
            left, top, width, height = map(float, boxes.values[number].split())
            box = corners((left, top, width, height), size)
        except (ValueError, OverflowError):
            message = (
                f"{boxes.values[number]!r} for image number {number}: needs 4 numbers: left top width height"
            )
            problems.append(Problem("malformed-line", split, boxes.path, message, line, name))
            return ()
        problem = box_problem(box, size, split=split, file=boxes.path, line=line, record=name)
        if problem:
            problems.append(problem)
        return (box,)
