"""All problems of a data set in one text.

What a reader returns: one image with its annotation, and one split of a data set.

Read the text files of a data set line by line, keeping line numbers for messages.

The kinds of problem a data set can have, and one problem found.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from calm.errors import CalmError
from calm.files import open_regular

__all__ = [
    "KINDS",
    "SPLITS",
    "Box",
    "Kind",
    "Problem",
    "Record",
    "Report",
    "Split",
    "box_problem",
    "inside",
    "is_text",
    "numbered",
    "whole_number",
]


SPLITS = ("train", "val", "test")
"""The names of the splits, everywhere."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1: the corner pixels of a rectangle, both inside it, counted from 0 at the top left."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what is known about it.

    All geometry is in pixels of the file as stored, before any EXIF rotation and any resizing.

    Attributes:
        id: relative POSIX path that names the image within its data set.
        path: where the file is.
        label: class index, 0 .. number of classes - 1.
        boxes: any number of :data:`Box`, corners inclusive. A box may be one pixel wide or high.
        masks: one grey image per object instance; object where the value is above 0.
        ignore: grey image of the pixels that no metric counts (unless an instance covers them), or None.
        size: (width, height) as the annotation states it, or as the file's header does where the reader
            looked; None if the reader did not look.
    """

    id: str
    path: Path
    label: int
    boxes: tuple[Box, ...] = ()
    masks: tuple[Path, ...] = ()
    ignore: Path | None = None
    size: tuple[int, int] | None = None

    @property
    def all_masks(self) -> tuple[Path, ...]:
        """The masks, and the ignore mask if there is one."""
        return self.masks if self.ignore is None else (*self.masks, self.ignore)


@dataclass(frozen=True)
class Split:
    """The images of one split, in the order of the files that list them.

    Attributes:
        name: "train", "val" or "test".
        records: the images.
        class_names: one unique name per class index, the same for all splits of a data set.
        root: folder below which the images are.
        exif: whether pictures are to be turned as their EXIF orientation says. False for CUB and the
            metadata format, whose boxes and masks are in the frame of the stored pixels; True for folders
            of a user's own photographs.
        origin: "own files", or how the split was carved from another one.
        problems: what the reader found wrong, warnings too. Errors appear here only after reading with
            ``strict=False``; lines that yield no record are then missing from ``records``.
    """

    name: str
    records: tuple[Record, ...]
    class_names: tuple[str, ...]
    root: Path
    exif: bool = False
    origin: str = "own files"
    problems: tuple[Problem, ...] = ()

    @property
    def num_classes(self) -> int:
        """C, the length of ``class_names``."""
        return len(self.class_names)

    def class_counts(self) -> tuple[int, ...]:
        """Images of each class, (C,)."""
        counts = [0] * self.num_classes
        for record in self.records:
            counts[record.label] += 1
        return tuple(counts)


LONGEST_LINE = 1_000_000
"""Characters of a line, at most."""

_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,18}\s*")


def numbered(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without surrounding white space) of each line that is not blank.

    Raises:
        CalmError: the file is missing, no regular file, unreadable, or not UTF-8 text, or a line is longer than
            `LONGEST_LINE`.
    """
    try:
        with (
            open_regular(path, "the data set's") as binary,
            io.TextIOWrapper(binary, encoding="utf-8-sig", newline=None) as file,
        ):
            for number in count(1):
                line = file.readline(LONGEST_LINE + 1)
                if len(line) > LONGEST_LINE:
                    raise CalmError(f"{path}:{number}: a line of more than {LONGEST_LINE:,} characters")
                if text := line.strip():
                    yield number, text
                if not line:
                    return
    except OSError as error:
        raise CalmError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalmError(
            f"{path} is not UTF-8 text (byte {error.start} of a block): save it as UTF-8"
        ) from error


def whole_number(text: str) -> int | None:
    """The integer that ``text`` spells in ASCII digits, or None.

    >>> whole_number(" -3"), whole_number("1.0"), whole_number("1_000"), whole_number("--1")
    (-3, None, None, None)
    """
    return int(text) if _WHOLE.fullmatch(text) else None


def is_text(name: str) -> bool:
    """Whether a file's name can be written as UTF-8: names of bytes that are not UTF-8 cannot."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def inside(path: str) -> bool:
    """Whether ``path`` is relative, names something, and stays below the folder it is relative to."""
    return (
        bool(PurePosixPath(path).name) and path[0] != "/" and "\0" not in path and ".." not in path.split("/")
    )


def box_problem(
    box: Box, size: tuple[int, int] | None, *, split: str, file: Path, line: int | None, record: str
) -> Problem | None:
    """The problem of one box (corners inclusive, in an image of ``size`` = width, height), or None.

    A box whose corners coincide in x or in y is a warning; without a ``size`` only the lower bounds count.
    """
    x0, y0, x1, y1 = box
    text = f"{x0},{y0},{x1},{y1}"
    kind = ""
    if x1 < x0 or y1 < y0:
        kind, message = "box-inverted", f"box {text} of {record}: x1 < x0 or y1 < y0"
    elif min(x0, y0) < 0 or (size is not None and (x1 >= size[0] or y1 >= size[1])):
        extent = f"{size[0]} x {size[1]} pixels" if size else "not known"
        kind, message = "box-outside", f"box {text} of {record}: the image is {extent}"
    elif x0 == x1 or y0 == y1:
        kind, message = "box-thin", f"box {text} of {record}"
    return Problem(kind, split, file, message, line, record) if kind else None


Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Kind:
    """What problems of one kind have in common.

    Attributes:
        title: heading of their group in a report.
        fix: what to do about them.
        severity: an "error" stops training (or leaves the image out, with ``--skip-bad``); a "warning" is
            only shown.
    """

    title: str
    fix: str
    severity: Severity = "error"


KINDS: dict[str, Kind] = {
    "malformed-line": Kind("line of another form", "write the line as shown in the message"),
    "label-not-integer": Kind("label that is no integer", "give the class index, a whole number from 0"),
    "label-range": Kind("label out of range", "correct the label, or list the class in classes.txt"),
    "no-label": Kind("image without a label", "add its line to the label file, or take its id out"),
    "contradiction": Kind("two lines that contradict each other", "keep the right one"),
    "duplicate-id": Kind("id listed twice", "keep one of the lines"),
    "bad-path": Kind(
        "path that leaves the data folder", "write the path relative to the data folder, without '..'"
    ),
    "no-split": Kind("image in no split", "add its line to train_test_split.txt"),
    "two-splits": Kind("image in two splits", "keep it in one: a test image seen in training is a leak"),
    "missing-file": Kind("missing image", "put the file there, or take its id out of the list"),
    "empty-file": Kind("empty file (0 bytes)", "fetch the file again"),
    "not-an-image": Kind("file that is not an image", "fetch the file again, or take its id out of the list"),
    "truncated": Kind("broken or truncated image", "fetch the file again"),
    "too-large": Kind("image of too many pixels", "scale it down, or take its id out of the list"),
    "box-inverted": Kind("box with its corners exchanged", "write x0,y0,x1,y1 with x0 <= x1 and y0 <= y1"),
    "box-outside": Kind(
        "box outside its image", "corners are inclusive: 0 <= x0 <= x1 <= width - 1, the same for y"
    ),
    "size-mismatch": Kind(
        "image of another size than stated", "correct image_sizes.txt, and the boxes with it"
    ),
    "missing-mask": Kind("missing or unreadable mask", "put the file there, or take its line out"),
    "cue-file": Kind(
        "attributes or parts that cue localization cannot read", "correct the file; nothing else needs it"
    ),
    "box-thin": Kind(
        "box of zero width or height", "nothing to do if it is meant (one pixel thin)", "warning"
    ),
    "no-box": Kind("image without a box", "add its line, if boxes are to be evaluated", "warning"),
    "unlisted-id": Kind(
        "annotation of an image that is not listed", "add its id, or remove the line", "warning"
    ),
    "repeated-line": Kind("line given twice", "remove one of them", "warning"),
    "empty-class": Kind(
        "class without images",
        "add images, or keep only the classes present (present_classes_only)",
        "warning",
    ),
}
"""Every kind by name, in the order of a report: errors first."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        kind: key of :data:`KINDS`.
        split: the split it was found in.
        file: the file that is wrong, or that says something wrong.
        message: the value found, and what is wrong with it.
        line: line number in ``file``, from 1; None if the file has no lines or the whole of it is meant.
        record: id of the image it concerns; empty if it cannot be told.
    """

    kind: str
    split: str
    file: Path
    message: str
    line: int | None = None
    record: str = ""

    @property
    def severity(self) -> Severity:
        """That of its kind."""
        return KINDS[self.kind].severity

    @property
    def place(self) -> str:
        """The file, and the line where there is one."""
        return f"{self.file}:{self.line}" if self.line is not None else str(self.file)


SHOWN = 5
"""Problems of one kind that the text of a report shows."""


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes:
        problems: everything, in the order found.
        images: images looked at, by split.
        found: lines about what the data set is, for people.
    """

    problems: tuple[Problem, ...]
    images: dict[str, int]
    found: tuple[str, ...] = ()

    @classmethod
    def of(cls, splits: Iterable[Split], found: Iterable[Problem] = ()) -> Report:
        """A report of what the readers of ``splits`` noted, and of what else was ``found``."""
        listed = list(splits)
        noted = [problem for split in listed for problem in split.problems]
        return cls((*noted, *found), {split.name: len(split.records) for split in listed})

    @cached_property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that stop training."""
        return tuple(problem for problem in self.problems if problem.severity == "error")

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings may be there."""
        return not self.errors

    def bad_ids(self, split: str) -> frozenset[str]:
        """Ids of the images of a split that have an error."""
        return frozenset(
            problem.record for problem in self.errors if problem.split == split and problem.record
        )

    def left_out(self, split: str) -> int:
        """How many images or lines of a split ``drop_bad`` and the reader leave out."""
        wrong = [problem for problem in self.errors if problem.split == split]
        return len({problem.record or problem.place for problem in wrong})

    @property
    def summary(self) -> dict[str, Any]:
        """Counts for a run's records: images, errors, warnings, problems by kind, and left out by split."""
        return {
            "images": dict(self.images),
            "errors": len(self.errors),
            "warnings": len(self.problems) - len(self.errors),
            "kinds": {kind: len(members) for kind, members in self._groups().items()},
            "left_out": {split: self.left_out(split) for split in self.images},
        }

    def raise_if_bad(self) -> None:
        """Raise if there is an error.

        Raises:
            CalmError: with the whole report as its message.
        """
        if not self.ok:
            raise CalmError(str(self))

    def _groups(self) -> dict[str, list[Problem]]:
        groups: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            groups[problem.kind].append(problem)
        return {kind: groups[kind] for kind in KINDS if kind in groups}

    def __str__(self) -> str:
        """The report: grouped by kind, errors first, a few of each kind, with counts and what to do."""
        images = ", ".join(f"{count:,} {name}" for name, count in self.images.items())
        errors, warnings = len(self.errors), len(self.problems) - len(self.errors)
        lines = [*self.found, f"{images} images: {_count(errors, 'error')}, {_count(warnings, 'warning')}"]
        for kind, members in self._groups().items():
            about = KINDS[kind]
            lines += ["", f"{about.severity}: {about.title} ({len(members):,})"]
            lines += [
                f"  [{problem.split}] {_brief(problem.place)}: {_brief(problem.message)}"
                for problem in members[:SHOWN]
            ]
            if len(members) > SHOWN:
                lines.append(f"  ... and {len(members) - SHOWN:,} more")
            lines.append(f"  fix: {about.fix}")
        return "\n".join(lines)


def _brief(text: str) -> str:
    """Without its middle, if it is long: it may be any line of any file."""
    return text if len(text) <= 400 else f"{text[:250]} ... {text[-100:]}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if number else f"no {noun}s"
