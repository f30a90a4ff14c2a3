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

Read the four text files of the metadata format by image id; see ``calm.data.metadata`` for samples.

What is wrong with a line is added to a list of problems, and the line is passed over. What only several
files together can tell (ranges, bounds, ids that do not match) is not looked at here.

Where the images of the three released data sets are, by split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

from calm.data.cub import names_from_folders, read_names
from calm.data.records import SPLITS, Box, Problem, Record, Split, box_problem, inside, numbered, whole_number
from calm.errors import CalmError

__all__ = [
    "IMAGE_ROOTS",
    "MOST_CLASSES",
    "Line",
    "Located",
    "MetadataSource",
    "images_root",
    "read_ids",
    "read_labels",
    "read_localization",
    "read_sizes",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Line(Generic[T]):
    """What a line says, and its number from 1."""

    number: int
    value: T


@dataclass(slots=True)
class Located:
    """What ``localization.txt`` says of one image: boxes, or (mask, ignore mask or "") of each instance."""

    number: int
    boxes: list[Line[Box]] = field(default_factory=list)
    masks: list[Line[tuple[str, str]]] = field(default_factory=list)


def read_ids(path: Path, split: str, problems: list[Problem]) -> dict[str, int]:
    """``image_ids.txt``: id to line number, in file order."""
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


def read_labels(path: Path, split: str, problems: list[Problem]) -> dict[str, Line[int]]:
    """``class_labels.txt``: id to label, any integer."""

    def parse(name: str, fields: list[str]) -> int | tuple[str, str]:
        label = whole_number(fields[0])
        return ("label-not-integer", f"{fields[0].strip()!r} for {name}") if label is None else label

    return _keyed(path, split, problems, 1, parse)


def read_sizes(path: Path, split: str, problems: list[Problem]) -> dict[str, Line[tuple[int, int]]]:
    """``image_sizes.txt``: id to (width, height), both positive; {} if there is no such file."""

    def parse(name: str, fields: list[str]) -> tuple[int, int] | tuple[str, str]:
        width, height = (whole_number(text) or 0 for text in fields)
        if width > 0 and height > 0:
            return width, height
        return "malformed-line", f"{','.join(fields)!r} for {name}: width and height are whole numbers from 1"

    return _keyed(path, split, problems, 2, parse) if path.is_file() else {}


def _keyed(
    path: Path,
    split: str,
    problems: list[Problem],
    count: int,
    parse: Callable[[str, list[str]], T | tuple[str, str]],
) -> dict[str, Line[T]]:
    """Lines of an id and ``count`` values; ``parse`` returns the value, or (kind, message) of a problem."""
    found: dict[str, Line[T]] = {}
    for number, text in numbered(path):
        name, *fields = text.rsplit(",", count)
        name = name.strip()
        if len(fields) != count:
            message = f"{text!r}: needs {count + 1} fields divided by commas"
            problems.append(Problem("malformed-line", split, path, message, number, name))
            continue
        value = parse(name, fields)
        if isinstance(value, tuple) and isinstance(value[0], str):
            problems.append(Problem(value[0], split, path, str(value[1]), number, name))
        elif name not in found:
            found[name] = Line(number, value)  # type: ignore[arg-type]
        elif found[name].value == value:
            problems.append(Problem("repeated-line", split, path, text, number, name))
        else:
            message = f"{text}: line {found[name].number} says {found[name].value}"
            problems.append(Problem("contradiction", split, path, message, number, name))
    return found


def read_localization(path: Path, split: str, problems: list[Problem]) -> dict[str, Located]:
    """``localization.txt``: boxes and masks by id; {} if there is no such file."""
    found: dict[str, Located] = {}
    if not path.is_file():
        return found
    for number, text in numbered(path):
        box, mask = _box(text), _mask(text)
        name = (box or mask or (text.split(",")[0],))[0].strip()
        if box:
            found.setdefault(name, Located(number)).boxes.append(Line(number, box[1]))
        elif mask:
            found.setdefault(name, Located(number)).masks.append(Line(number, mask[1]))
        else:
            message = (
                f"{text!r}: needs 'id,x0,y0,x1,y1' in whole pixels, or 'id,mask,ignore' as relative paths"
            )
            problems.append(Problem("malformed-line", split, path, message, number, name))
    return found


def _box(text: str) -> tuple[str, Box] | None:
    name, *corners = text.rsplit(",", 4)
    box = tuple(corner for corner in map(whole_number, corners) if corner is not None)
    return (name, (box[0], box[1], box[2], box[3])) if len(box) == 4 else None


def _mask(text: str) -> tuple[str, tuple[str, str]] | None:
    fields = [part.strip() for part in text.split(",")]
    if len(fields) != 3 or not inside(fields[1]) or not (fields[2] == "" or inside(fields[2])):
        return None
    return fields[0], (fields[1], fields[2])


IMAGE_ROOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "CUB": {"train": ("CUB/images", "CUB"), "val": ("CUBV2", "CUB/CUBV2"), "test": ("CUB/images", "CUB")},
    "ILSVRC": {"train": ("ILSVRC",), "val": ("ImageNetV2", "ILSVRC"), "test": ("ILSVRC",)},
    "OpenImages": {"train": ("OpenImages",), "val": ("OpenImages",), "test": ("OpenImages",)},
}
"""Folders below the data root that ids of the released metadata are relative to: first where the released
configuration looks, then where its own download scripts put the files."""


def images_root(root: Path, name: str, split: str, ids: Sequence[str]) -> Path:
    """The folder the ids of one split are relative to.

    Args:
        root: the data root: the folder that holds ``CUB/``, ``ILSVRC/`` or ``OpenImages/``; or that folder
            itself; or directly the folder the ids are relative to.
        name: key of :data:`IMAGE_ROOTS`; empty: ``root`` itself, unconditionally.
        split: "train", "val" or "test".
        ids: the ids of the split; up to 20 of them are looked for, and the folder that has most of them wins.

    Raises:
        CalmError: none of the folders has any of those images.
    """
    if not name:
        return root
    below = IMAGE_ROOTS[name][split]
    candidates = [base / folder for base in (root, root.parent) for folder in below] + [root / "images", root]
    sample = ids[:: max(1, len(ids) // 20)][:20]
    found = [sum(_is_file(folder / image) for image in sample) for folder in candidates]
    if sample and not any(found):
        tried = "\n  ".join(map(str, dict.fromkeys(candidates)))
        raise CalmError(
            f"none of the {name} {split} images (such as {sample[0]}) was found below any of\n  {tried}"
        )
    return candidates[found.index(max(found))]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


MOST_CLASSES = 1_000_000
"""Classes that labels alone may stand for: one wrong digit is not to fill the memory."""


@dataclass(frozen=True)
class MetadataSource:
    """A data set in the metadata format.

    Attributes:
        root: the data root.
        lists: the folder with ``train/``, ``val/`` and ``test/``.
        name: the released data set (a key of ``released_roots.IMAGE_ROOTS``) whose image folders differ by
            split; empty for a pack whose ids are relative to ``root``.
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

        Raises:
            CalmError: a file that is missing or malformed, a label of `MOST_CLASSES` or more.
        """
        for folder in (self.lists, self.root):
            if (folder / "classes.txt").is_file():
                return read_names(folder / "classes.txt")
        sources = [split for split in self.splits if split == "train"] or self.splits
        labels: dict[str, int] = {}
        for split in sources:
            path = self.lists / split / "class_labels.txt"
            found = read_labels(path, split, [])
            for name, line in found.items():
                if line.value >= MOST_CLASSES:
                    raise CalmError(
                        f"{path}:{line.number}: label {line.value} of {name}: without classes.txt the classes are"
                        f" 0 .. the largest label, and more than {MOST_CLASSES:,} are not read"
                    )
            labels |= {name: line.value for name, line in found.items() if line.value >= 0}
        return names_from_folders(labels)

    def listing(self, split: str) -> str:
        """The files or folder that say which images a split has, for messages."""
        return str(self.lists / split / "image_ids.txt")

    def read(self, split: str) -> Split:
        """Read one of :attr:`splits`; what is wrong with single lines is in the result's ``problems``.

        Raises:
            CalmError: a file that must exist is missing or no text; no image of a released data set is found.
        """
        files = _Files.read(self.lists / split, split)
        root = images_root(self.root, self.name, split, list(files.ids))
        records = [
            files.record(name, label, root)
            for name in files.ids
            if (label := files.label(name, len(self.class_names))) is not None
        ]
        return Split(split, tuple(records), self.class_names, root, problems=tuple(files.problems))


@dataclass(frozen=True)
class _Files:
    """The four files of one split, and what is wrong in them."""

    folder: Path
    split: str
    problems: list[Problem]
    ids: dict[str, int]
    labels: dict[str, Line[int]]
    sizes: dict[str, Line[tuple[int, int]]]
    located: dict[str, Located]

    @classmethod
    def read(cls, folder: Path, split: str) -> _Files:
        problems: list[Problem] = []
        files = cls(
            folder,
            split,
            problems,
            read_ids(folder / "image_ids.txt", split, problems),
            read_labels(folder / "class_labels.txt", split, problems),
            read_sizes(folder / "image_sizes.txt", split, problems),
            read_localization(folder / "localization.txt", split, problems),
        )
        problems += files._unlisted()
        return files

    def _unlisted(self) -> Iterator[Problem]:
        """Annotations of images that are not listed."""
        lines = (
            ("class_labels.txt", {name: line.number for name, line in self.labels.items()}),
            ("image_sizes.txt", {name: line.number for name, line in self.sizes.items()}),
            ("localization.txt", {name: located.number for name, located in self.located.items()}),
        )
        refused = {problem.record for problem in self.problems if problem.kind == "bad-path"}
        for file, numbers in lines:
            for name, number in numbers.items():
                if name not in self.ids and name not in refused:
                    message = f"{name} is not in image_ids.txt"
                    yield Problem("unlisted-id", self.split, self.folder / file, message, number, name)

    def _note(self, kind: str, file: str, message: str, number: int, name: str) -> None:
        self.problems.append(Problem(kind, self.split, self.folder / file, message, number, name))

    @cached_property
    def _bad_label_lines(self) -> frozenset[str]:
        """Ids whose label is missing because its line is noted already."""
        return frozenset(
            problem.record for problem in self.problems if problem.file.name == "class_labels.txt"
        )

    def label(self, name: str, num_classes: int) -> int | None:
        """The label of an image; None, and a problem, if there is none in range."""
        line = self.labels.get(name)
        if line is None:
            if name not in self._bad_label_lines:
                message = f"{name} has no line in {self.folder / 'class_labels.txt'}"
                self._note("no-label", "image_ids.txt", message, self.ids[name], name)
            return None
        if not 0 <= line.value < num_classes:
            message = f"{line.value} for {name}: classes are 0 .. {num_classes - 1}"
            self._note("label-range", "class_labels.txt", message, line.number, name)
            return None
        return line.value

    def record(self, name: str, label: int, root: Path) -> Record:
        """The record of an image; problems of its boxes are noted, and the boxes kept as they are."""
        size = self.sizes[name].value if name in self.sizes else None
        located = self.located.get(name) or Located(0)
        for box in located.boxes:
            problem = box_problem(
                box.value,
                size,
                split=self.split,
                file=self.folder / "localization.txt",
                line=box.number,
                record=name,
            )
            if problem:
                self.problems.append(problem)
        return Record(
            name,
            root / name,
            label,
            boxes=tuple(box.value for box in located.boxes),
            masks=tuple(root / line.value[0] for line in located.masks),
            ignore=next((root / line.value[1] for line in located.masks if line.value[1]), None),
            size=size,
        )
