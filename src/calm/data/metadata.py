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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from calm.data.class_names import names_from_folders, read_names
from calm.data.lines import box_problem
from calm.data.metadata_files import Line, Located, read_ids, read_labels, read_localization, read_sizes
from calm.data.problems import Problem
from calm.data.records import SPLITS, Record, Split
from calm.data.released_roots import images_root
from calm.errors import CalmError

__all__ = ["MOST_CLASSES", "MetadataSource"]

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
