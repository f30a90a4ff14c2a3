"""The metadata format: text files of each split, as docs/reading.md describes them."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

from calm.data.cub import names_from_folders, read_names
from calm.data.records import (
    SPLITS,
    Box,
    Layout,
    Line,
    ProblemLog,
    Record,
    Split,
    is_inside,
    numbered_lines,
    whole_number,
)
from calm.errors import CalmError

IDS, LABELS, SIZES, LOCALIZATION = "image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt"

Masks: TypeAlias = tuple[str, str]  # the mask of an object instance, and that of the pixels to ignore, or ""
T = TypeVar("T")


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


def read_labels(path: Path, log: ProblemLog) -> dict[str, Line[int]]:
    """Read ``class_labels.txt``: id to label, any integer."""
    labels = _by_id(path, log, 1, lambda fields: whole_number(*fields), "label-not-integer", "")
    for name in [name for name in labels if re.search(r",\s*\d+$", name)]:  # a.jpg,3,7
        image = re.split(r",\s*\d+(?=,|$)", name)[0]
        log.add("several-labels", path, f"{name},{labels[name].value}", labels.pop(name).number, image)
    return labels


def read_sizes(path: Path, log: ProblemLog) -> dict[str, Line[tuple[int, int]]]:
    """Read ``image_sizes.txt``: id to (width, height), both positive; {} if there is no such file."""

    def parse(fields: list[str]) -> tuple[int, int] | None:
        width, height = (whole_number(text) or 0 for text in fields)
        return (width, height) if width > 0 and height > 0 else None

    rule = ": width and height are whole numbers from 1"
    return _by_id(path, log, 2, parse, "malformed-line", rule) if path.is_file() else {}


def _by_id(
    path: Path, log: ProblemLog, count: int, parse: Callable[[list[str]], T | None], kind: str, rule: str
) -> dict[str, Line[T]]:
    """Read lines of an id and ``count`` fields; lines that ``parse`` gives None for are problems of ``kind``."""
    result: dict[str, Line[T]] = {}
    for number, text in numbered_lines(path):
        name, *fields = text.rsplit(",", count)
        name = name.strip()
        if len(fields) != count:
            form = f"needs {count + 1} fields divided by commas"
            log.add("malformed-line", path, f"{text!r}: {form}", number, name)
        elif (value := parse(fields)) is None:
            log.add(kind, path, f"{','.join(fields).strip()!r} for {name}{rule}", number, name)
        elif (former := result.setdefault(name, Line(number, value))).number == number:
            continue
        elif former.value == value:
            log.add("repeated-line", path, text, number, name)
        else:
            log.add("contradiction", path, f"{text}: line {former.number} says {former.value}", number, name)
    return result


def read_localization(path: Path, log: ProblemLog) -> tuple[dict[str, list[Line[Box]]], dict[str, list[Line[Masks]]]]:
    """Read ``localization.txt``: boxes by id, and (mask, ignore mask or "") by id; nothing if there is no such file."""
    boxes: dict[str, list[Line[Box]]] = defaultdict(list)
    masks: dict[str, list[Line[Masks]]] = defaultdict(list)
    for number, text in numbered_lines(path) if path.is_file() else ():
        name, *fields = text.rsplit(",", 4)
        box = tuple(corner for corner in map(whole_number, fields) if corner is not None)
        first, *files = (part.strip() for part in text.split(","))
        if len(box) == 4:
            boxes[name.strip()].append(Line(number, (box[0], box[1], box[2], box[3])))
        elif len(files) == 2 and is_inside(files[0]) and (not files[1] or is_inside(files[1])):
            masks[first].append(Line(number, (files[0], files[1])))
        else:
            form = "needs 'id,x0,y0,x1,y1' in whole pixels, or 'id,mask,ignore' as relative paths"
            log.add("malformed-line", path, f"{text!r}: {form}", number, first)
    return boxes, masks


IMAGE_ROOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "CUB": {"train": ("CUB/images", "CUB"), "val": ("CUBV2", "CUB/CUBV2"), "test": ("CUB/images", "CUB")},
    "ILSVRC": {"train": ("ILSVRC",), "val": ("ImageNetV2", "ILSVRC"), "test": ("ILSVRC",)},
    "OpenImages": dict.fromkeys(SPLITS, ("OpenImages",)),
}
"""Folders below the data root that ids of the released metadata are relative to: first where the released configuration
looks, then where its own download scripts put the files."""


def images_root(root: Path, name: str, split: str, ids: Sequence[str]) -> Path:
    """Return the folder that the ids of one split are relative to.

    Of released data (``name`` is a key of `IMAGE_ROOTS`) it is the folder that has most of 20 of them, where ``root``
    is the folder that holds ``CUB/``, ``ILSVRC/`` or ``OpenImages/``, that folder itself, or the answer.
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


MAX_CLASSES = 1_000_000  # without ``classes.txt``: one wrong digit in a label is not to fill the memory with names


@dataclass(frozen=True)
class MetadataSource:
    """A data set in the metadata format."""

    root: Path
    lists: Path  # the folder with train/, val/ and test/
    name: str = ""  # of the released data set (see `images_root`), if it is one
    layout: ClassVar[Layout] = "metadata"

    @property
    def listing(self) -> str:
        """The files that say which images a split has."""
        return str(self.lists / "SPLIT" / IDS)

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
                    rule = f"are 0 .. the largest label, and more than {MAX_CLASSES:,} are not read"
                    label = f"{path}:{line.number}: label {line.value} of {name}"
                    raise CalmError(f"{label}: without classes.txt the classes {rule}")
                if line.value >= 0:
                    labels[name] = line.value
        return names_from_folders(labels)

    def read(self, split: str) -> Split:
        """Read one of :attr:`splits`; what is wrong with single lines is in the result's ``problems``."""
        folder, log = self.lists / split, ProblemLog(split)
        ids = read_ids(folder / IDS, log)
        labels = read_labels(folder / LABELS, log)
        mentioned = {problem.record for problem in log.problems if problem.file.name == LABELS}
        sizes = read_sizes(folder / SIZES, log)
        boxes, masks = read_localization(folder / LOCALIZATION, log)
        known = ids.keys() | {problem.record for problem in log.problems if problem.kind == "bad-path"}
        located = {name: of[0] for name, of in boxes.items()} | {name: of[0] for name, of in masks.items()}
        lists: dict[str, Mapping[str, Line[Any]]] = {LABELS: labels, SIZES: sizes, LOCALIZATION: located}
        for file, lines in lists.items():
            for name, line in lines.items():
                if name not in known:
                    log.add("unlisted-id", folder / file, f"{name} is not in {IDS}", line.number, name)
        root = images_root(self.root, self.name, split, list(ids))
        classes = len(self.class_names)
        records: list[Record] = []
        for name, number in ids.items():
            label = labels.get(name)
            if label is None:
                if name not in mentioned:
                    log.add("no-label", folder / IDS, f"{name} has no line in {folder / LABELS}", number, name)
            elif not 0 <= label.value < classes:
                message = f"{label.value} for {name}: classes are 0 .. {classes - 1}"
                log.add("label-range", folder / LABELS, message, label.number, name)
            else:
                size = sizes[name].value if name in sizes else None
                found = tuple(box for _, box in boxes[name])
                for place, box in boxes[name]:
                    log.check_box(box, size, folder / LOCALIZATION, place, name)
                objects = tuple(root / mask for _, (mask, _) in masks[name])
                ignore = next((root / ignored for _, (_, ignored) in masks[name] if ignored), None)
                records.append(Record(name, root / name, label.value, found, objects, ignore, size))
        return Split(split, tuple(records), self.class_names, root, problems=tuple(log.problems))
