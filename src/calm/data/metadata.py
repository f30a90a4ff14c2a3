"""The metadata format of weakly supervised localization: four text files for each split.

``metadata/val/image_ids.txt``, an image a line, relative to the data root::

    images/val/n01443537_450.jpg
    images/val/n01443537_451.jpg

``metadata/val/class_labels.txt``, id and class index from 0::

    images/val/n01443537_450.jpg,0
    images/val/n01443537_451.jpg,0

``metadata/val/image_sizes.txt`` (may be absent), id, width, height in pixels::

    images/val/n01443537_450.jpg,64,64
    images/val/n01443537_451.jpg,64,48

``metadata/val/localization.txt`` (may be absent or empty), either boxes, any number an image, as corner
pixels x0, y0, x1, y1 from 0, both corners inside the box::

    images/val/n01443537_450.jpg,1,1,57,57
    images/val/n01443537_451.jpg,0,0,63,47

or masks, a line an object instance, the ignore mask on the image's first line, both relative to the data
root::

    val/0f9a.jpg,val/0f9a_m0.png,val/0f9a_ignore.png
    val/0f9a.jpg,val/0f9a_m1.png,

``classes.txt`` (may be absent), beside ``metadata/`` or in it: class index, an optional WordNet id, name::

    0 n01443537 goldfish, Carassius auratus
    1 n01629819 European fire salamander, Salamandra salamandra
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from calm.data.class_names import names_from_folders, read_names
from calm.data.lines import box_problem, inside, numbered
from calm.data.problems import Problem
from calm.data.records import SPLITS, Box, Record, Split
from calm.data.released_roots import images_root

__all__ = ["MetadataSource", "read_boxes_and_masks", "read_ids", "read_labels", "read_sizes"]

T = TypeVar("T")
Problems = list[Problem]
Localization = dict[str, tuple[list[tuple[int, Box]], list[tuple[int, str, str]]]]
"""By id: (line, box) and (line, mask, ignore) of each line."""


def read_ids(path: Path, split: str, problems: Problems) -> dict[str, int]:
    """``image_ids.txt``: id to line number, in file order; duplicates and paths that lead out are reported."""
    lines: dict[str, int] = {}
    for number, name in numbered(path):
        if name in lines:
            message = f"{name}: listed before in line {lines[name]}"
            problems.append(Problem("duplicate-id", split, path, message, number, name))
        elif not inside(name):
            problems.append(Problem("bad-path", split, path, name, number, name))
        else:
            lines[name] = number
    return lines


def _keyed(
    path: Path, split: str, problems: Problems, values: int, parse: Callable[[str, int, list[str]], T | None]
) -> dict[str, tuple[int, T]]:
    """Lines ``id,value,...`` by id as (line, parsed value); ``parse`` returns None for a line it reported."""
    found: dict[str, tuple[int, T]] = {}
    for number, text in numbered(path):
        name, *fields = text.rsplit(",", values)
        name = name.strip()
        if len(fields) != values:
            message = f"{text!r}: needs {values + 1} fields divided by commas"
            problems.append(Problem("malformed-line", split, path, message, number, name))
            continue
        value = parse(name, number, fields)
        if value is None:
            continue
        if name not in found:
            found[name] = number, value
        elif found[name][1] == value:
            problems.append(Problem("repeated-line", split, path, text, number, name))
        else:
            message = f"{text}: line {found[name][0]} says {found[name][1]}"
            problems.append(Problem("two-labels", split, path, message, number, name))
    return found


def read_labels(path: Path, split: str, problems: Problems) -> dict[str, tuple[int, int]]:
    """``class_labels.txt``: id to (line, label). Ranges are not checked here."""

    def parse(name: str, number: int, fields: list[str]) -> int | None:
        try:
            return int(fields[0])
        except ValueError:
            message = f"{fields[0].strip()!r} for {name}"
            problems.append(Problem("label-not-integer", split, path, message, number, name))
            return None

    return _keyed(path, split, problems, 1, parse)


def read_sizes(path: Path, split: str, problems: Problems) -> dict[str, tuple[int, tuple[int, int]]]:
    """``image_sizes.txt``: id to (line, (width, height)); {} if there is no such file."""

    def parse(name: str, number: int, fields: list[str]) -> tuple[int, int] | None:
        try:
            width, height = int(fields[0]), int(fields[1])
        except ValueError:
            width = height = 0
        if width > 0 and height > 0:
            return width, height
        message = f"{','.join(fields)!r} for {name}: width and height are whole numbers from 1"
        problems.append(Problem("malformed-line", split, path, message, number, name))
        return None

    return _keyed(path, split, problems, 2, parse) if path.is_file() else {}


def read_boxes_and_masks(path: Path, split: str, problems: Problems) -> Localization:
    """``localization.txt``: boxes and masks by id; {} if there is no such file. Bounds are not checked here."""
    found: Localization = {}
    if not path.is_file():
        return found
    for number, text in numbered(path):
        name, *corners = text.rsplit(",", 4)
        try:
            x0, y0, x1, y1 = map(int, corners)
        except ValueError:
            fields = [field.strip() for field in text.split(",")]
            masks = [mask for mask in fields[1:] if mask]
            if len(fields) != 3 or not fields[1] or not all(map(inside, masks)):
                message = (
                    f"{text!r}: needs 'id,x0,y0,x1,y1' in whole pixels, or 'id,mask,ignore' as relative paths"
                )
                problems.append(Problem("malformed-line", split, path, message, number, fields[0]))
                continue
            found.setdefault(fields[0], ([], []))[1].append((number, fields[1], fields[2]))
        else:
            found.setdefault(name.strip(), ([], []))[0].append((number, (x0, y0, x1, y1)))
    return found


@dataclass(frozen=True)
class MetadataSource:
    """A data set in the metadata format.

    Attributes:
        root: the data root.
        lists: the folder with ``train/``, ``val/`` and ``test/``.
        name: the released data set (a key of ``released_roots.IMAGE_ROOTS``) whose image folders differ by split;
            empty for a pack whose ids are relative to ``root``.
    """

    root: Path
    lists: Path
    name: str = ""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have an ``image_ids.txt``."""
        return tuple(split for split in SPLITS if (self.lists / split / "image_ids.txt").is_file())

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """From ``classes.txt``; else the images' folders, if each class has one; else "0", "1", ...

        Without ``classes.txt`` the classes are 0 .. the largest label of train (of all splits if there is no
        train).
        """
        for folder in (self.lists, self.root):
            if (folder / "classes.txt").is_file():
                return read_names(folder / "classes.txt")
        sources = [split for split in self.splits if split == "train"] or self.splits
        labels: dict[str, int] = {}
        for split in sources:
            found = read_labels(self.lists / split / "class_labels.txt", split, [])
            labels |= {name: label for name, (_, label) in found.items() if label >= 0}
        return names_from_folders(labels)

    def read(self, split: str) -> Split:
        """Read one of :attr:`splits`; what is wrong with single lines is in the result's ``problems``.

        Raises:
            CalmError: a file that must exist is missing or no text.
        """
        folder, problems = self.lists / split, list[Problem]()
        ids = read_ids(folder / "image_ids.txt", split, problems)
        labels = read_labels(folder / "class_labels.txt", split, problems)
        sizes = read_sizes(folder / "image_sizes.txt", split, problems)
        located = read_boxes_and_masks(folder / "localization.txt", split, problems)
        listed_twice = {problem.record for problem in problems if problem.kind == "bad-path"}
        for file, found in (
            ("class_labels.txt", labels),
            ("image_sizes.txt", sizes),
            ("localization.txt", located),
        ):
            for name in found.keys() - ids.keys() - listed_twice:
                message = f"{name} is not in image_ids.txt"
                problems.append(
                    Problem("unlisted-id", split, folder / file, message, _line(found[name]), name)
                )
        root = images_root(self.root, self.name, split, list(ids))
        records = []
        reported = {problem.record for problem in problems if problem.file.name == "class_labels.txt"}
        for name, number in ids.items():
            if name not in labels:
                if name not in reported:
                    message = f"{name} is not in {folder / 'class_labels.txt'}"
                    problems.append(
                        Problem("no-label", split, folder / "image_ids.txt", message, number, name)
                    )
                continue
            line, label = labels[name]
            if not 0 <= label < len(self.class_names):
                message = f"{label} for {name}: classes are 0 .. {len(self.class_names) - 1}"
                problems.append(
                    Problem("label-range", split, folder / "class_labels.txt", message, line, name)
                )
                continue
            size = sizes[name][1] if name in sizes else None
            boxes, masks = located.get(name, ([], []))
            for line, box in boxes:
                found_problem = box_problem(
                    box, size, split=split, file=folder / "localization.txt", line=line, record=name
                )
                if found_problem:
                    problems.append(found_problem)
            ignore = next((root / path for _, _, path in masks if path), None)
            records.append(
                Record(
                    name,
                    root / name,
                    label,
                    boxes=tuple(box for _, box in boxes),
                    masks=tuple(root / mask for _, mask, _ in masks),
                    ignore=ignore,
                    size=size,
                )
            )
        return Split(split, tuple(records), self.class_names, root, problems=tuple(problems))


def _line(found: object) -> int | None:
    """The line number inside a value of any of the readers above."""
    while isinstance(found, (tuple, list)):
        found = next((part for part in found if part), None)
    return found if isinstance(found, int) else None
