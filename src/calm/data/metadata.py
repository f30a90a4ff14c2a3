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

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, TypeVar

from calm.data.cub import names_from_folders, read_names
from calm.data.records import SPLITS, Box, Layout, ProblemLog, Record, Split, is_inside, numbered_lines, whole_number
from calm.errors import CalmError

IDS, LABELS, SIZES, LOCALIZATION = "image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt"

T = TypeVar("T")


class Line(NamedTuple, Generic[T]):
    """The value of a line, and its number from 1."""

    number: int
    value: T


@dataclass(slots=True)
class Located:
    """The lines of ``localization.txt`` about one image: boxes, or (mask, ignore mask or "") of each instance."""

    number: int
    boxes: list[Line[Box]] = field(default_factory=list)
    masks: list[Line[tuple[str, str]]] = field(default_factory=list)


# Each reader adds what is wrong with a line to the log, and goes on with the next. What only several files together
# can tell (ranges, bounds, ids that do not match) is checked by `MetadataSource`.


def read_ids(path: Path, log: ProblemLog) -> dict[str, int]:
    """Read ``image_ids.txt``: id to line number, in file order."""
    lines: dict[str, int] = {}
    for number, name in numbered_lines(path):
        if name in lines:
            log.add("duplicate-id", path, f"{name}: listed before in line {lines[name]}", number, name)
        elif not is_inside(name):
            log.add("bad-path", path, name, number, name)
        else:
            lines[name] = number
    return lines


class _LineError(Exception):
    """A line is wrong: kind and message of its problem."""


def read_labels(path: Path, log: ProblemLog) -> dict[str, Line[int]]:
    """Read ``class_labels.txt``: id to label, any integer."""

    def parse(name: str, fields: list[str]) -> int:
        label = whole_number(fields[0])
        if label is None:
            raise _LineError("label-not-integer", f"{fields[0].strip()!r} for {name}")
        return label

    return _by_id(path, log, 1, parse)


def read_sizes(path: Path, log: ProblemLog) -> dict[str, Line[tuple[int, int]]]:
    """Read ``image_sizes.txt``: id to (width, height), both positive; {} if there is no such file."""

    def parse(name: str, fields: list[str]) -> tuple[int, int]:
        width, height = (whole_number(text) or 0 for text in fields)
        if width > 0 and height > 0:
            return width, height
        given = ",".join(fields)
        raise _LineError("malformed-line", f"{given!r} for {name}: width and height are whole numbers from 1")

    return _by_id(path, log, 2, parse) if path.is_file() else {}


def _by_id(path: Path, log: ProblemLog, count: int, parse: Callable[[str, list[str]], T]) -> dict[str, Line[T]]:
    """Read lines of an id and ``count`` fields, from which ``parse`` makes a value or raises _LineError."""
    result: dict[str, Line[T]] = {}
    for number, text in numbered_lines(path):
        name, *fields = text.rsplit(",", count)
        name = name.strip()
        try:
            if len(fields) != count:
                raise _LineError("malformed-line", f"{text!r}: needs {count + 1} fields divided by commas")
            value = parse(name, fields)
            former = result.setdefault(name, Line(number, value))
            if former.number != number and former.value == value:
                raise _LineError("repeated-line", text)
            if former.number != number:
                raise _LineError("contradiction", f"{text}: line {former.number} says {former.value}")
        except _LineError as error:
            kind, message = error.args
            log.add(kind, path, message, number, name)
    return result


def read_localization(path: Path, log: ProblemLog) -> dict[str, Located]:
    """Read ``localization.txt``: boxes and masks by id; {} if there is no such file."""
    result: dict[str, Located] = {}
    if not path.is_file():
        return result
    for number, text in numbered_lines(path):
        box, mask = _box(text), _mask(text)
        name = (box or mask or (text.split(",")[0],))[0].strip()
        if box:
            result.setdefault(name, Located(number)).boxes.append(Line(number, box[1]))
        elif mask:
            result.setdefault(name, Located(number)).masks.append(Line(number, mask[1]))
        else:
            form = "needs 'id,x0,y0,x1,y1' in whole pixels, or 'id,mask,ignore' as relative paths"
            log.add("malformed-line", path, f"{text!r}: {form}", number, name)
    return result


def _box(text: str) -> tuple[str, Box] | None:
    name, *corners = text.rsplit(",", 4)
    box = tuple(corner for corner in map(whole_number, corners) if corner is not None)
    return (name, (box[0], box[1], box[2], box[3])) if len(box) == 4 else None


def _mask(text: str) -> tuple[str, tuple[str, str]] | None:
    fields = [part.strip() for part in text.split(",")]
    if len(fields) != 3 or not is_inside(fields[1]) or not (fields[2] == "" or is_inside(fields[2])):
        return None
    return fields[0], (fields[1], fields[2])


IMAGE_ROOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "CUB": {"train": ("CUB/images", "CUB"), "val": ("CUBV2", "CUB/CUBV2"), "test": ("CUB/images", "CUB")},
    "ILSVRC": {"train": ("ILSVRC",), "val": ("ImageNetV2", "ILSVRC"), "test": ("ILSVRC",)},
    "OpenImages": {"train": ("OpenImages",), "val": ("OpenImages",), "test": ("OpenImages",)},
}
"""Folders below the data root that ids of the released metadata are relative to: first where the released configuration
looks, then where its own download scripts put the files."""


def images_root(root: Path, name: str, split: str, ids: Sequence[str]) -> Path:
    """Return the folder that the ids of one split are relative to.

    Args:
        root: the folder that holds ``CUB/``, ``ILSVRC/`` or ``OpenImages/``; or that folder itself; or the folder that
            the ids are relative to.
        name: key of `IMAGE_ROOTS`; empty: ``root`` is the answer.
        split: its name.
        ids: its ids; the folder that has most of 20 of them is the answer.

    Raises:
        CalmError: none of the folders has any of those images.
    """
    if not name:
        return root
    candidates = [base / folder for base in (root, root.parent) for folder in IMAGE_ROOTS[name][split]]
    candidates += [root / "images", root]
    sample = ids[:: max(1, len(ids) // 20)][:20]
    # Not Path.is_file, which raises for a name that no file can have.
    counts = [sum(os.path.isfile(folder / image) for image in sample) for folder in candidates]  # noqa: PTH113
    if sample and not any(counts):
        tried = "\n  ".join(map(str, dict.fromkeys(candidates)))
        raise CalmError(f"none of the {name} {split} images (such as {sample[0]}) was found below any of\n  {tried}")
    return candidates[counts.index(max(counts))]


MAX_CLASSES = 1_000_000
"""Most classes without ``classes.txt``: one wrong digit in a label is not to fill the memory with names."""


@dataclass(frozen=True)
class MetadataSource:
    """A data set in the metadata format.

    Attributes:
        root: the data root.
        lists: the folder with ``train/``, ``val/`` and ``test/``.
        name: the released data set (a key of `IMAGE_ROOTS`) whose image folders differ by split; empty for a data set
            whose ids are relative to ``root``.
    """

    root: Path
    lists: Path
    name: str = ""
    layout: ClassVar[Layout] = "metadata"

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have an ``image_ids.txt``."""
        return tuple(split for split in SPLITS if (self.lists / split / IDS).is_file())

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """From ``classes.txt``; else the images' folders, if each class has one; else "0", "1", ...

        Without ``classes.txt`` the classes are 0 .. the largest label of train (of all splits if there is no train).
        """
        for folder in (self.lists, self.root):
            if (folder / "classes.txt").is_file():
                return read_names(folder / "classes.txt")
        labels: dict[str, int] = {}
        for split in ["train"] if "train" in self.splits else self.splits:
            path = self.lists / split / LABELS
            for name, line in read_labels(path, ProblemLog(split)).items():
                if line.value >= MAX_CLASSES:
                    raise CalmError(
                        f"{path}:{line.number}: label {line.value} of {name}: without classes.txt the classes are"
                        f" 0 .. the largest label, and more than {MAX_CLASSES:,} are not read"
                    )
                if line.value >= 0:
                    labels[name] = line.value
        return names_from_folders(labels)

    def listing(self, split: str) -> str:
        """Return the file that says which images a split has, for messages."""
        return str(self.lists / split / IDS)

    def read(self, split: str) -> Split:
        """Read one of :attr:`splits`; what is wrong with single lines is in the result's ``problems``."""
        log = ProblemLog(split)
        files = _Files(self.lists / split, log)
        root = images_root(self.root, self.name, split, list(files.ids))
        records = files.records(root, len(self.class_names))
        return Split(split, records, self.class_names, root, problems=tuple(log.problems))


class _Files:
    """The four files of one split; problems are added to ``log``."""

    def __init__(self, folder: Path, log: ProblemLog) -> None:
        self.folder, self.log = folder, log
        self.ids = read_ids(folder / IDS, log)
        self.labels = read_labels(folder / LABELS, log)
        self.bad_labels = {problem.record for problem in log.problems if problem.file.name == LABELS}
        self.sizes = read_sizes(folder / SIZES, log)
        self.located = read_localization(folder / LOCALIZATION, log)
        known = self.ids.keys() | {problem.record for problem in log.problems if problem.kind == "bad-path"}
        for file, lines in ((LABELS, self.labels), (SIZES, self.sizes), (LOCALIZATION, self.located)):
            for name, line in lines.items():
                if name not in known:
                    log.add("unlisted-id", folder / file, f"{name} is not in {IDS}", line.number, name)

    def records(self, root: Path, num_classes: int) -> tuple[Record, ...]:
        """Return the records of the images that have a label in range."""
        labels = {name: self._label(name, num_classes) for name in self.ids}
        return tuple(self._record(name, label, root) for name, label in labels.items() if label is not None)

    def _label(self, name: str, num_classes: int) -> int | None:
        line = self.labels.get(name)
        if line is None:
            if name not in self.bad_labels:
                message = f"{name} has no line in {self.folder / LABELS}"
                self.log.add("no-label", self.folder / IDS, message, self.ids[name], name)
            return None
        if not 0 <= line.value < num_classes:
            message = f"{line.value} for {name}: classes are 0 .. {num_classes - 1}"
            self.log.add("label-range", self.folder / LABELS, message, line.number, name)
            return None
        return line.value

    def _record(self, name: str, label: int, root: Path) -> Record:
        """Return the record of an image; problems of its boxes are logged, and the boxes kept as they are."""
        size = self.sizes[name].value if name in self.sizes else None
        located = self.located.get(name) or Located(0)
        for box in located.boxes:
            self.log.check_box(box.value, size, self.folder / LOCALIZATION, box.number, name)
        boxes = tuple(box.value for box in located.boxes)
        masks = tuple(root / line.value[0] for line in located.masks)
        ignore = next((root / line.value[1] for line in located.masks if line.value[1]), None)
        return Record(name, root / name, label, boxes, masks, ignore, size)
