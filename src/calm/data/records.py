"""Images with their annotations (`Record`, `Split`), problems of a data set (`Problem`, `Report`), and text files."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Generic, Literal, NamedTuple, TypeVar

from calm.errors import CalmError
from calm.files import open_regular

SPLITS = ("train", "val", "test")
"""The names of the splits."""

Layout = Literal["auto", "cub", "metadata", "folder"]
"""How a data set is laid out; "auto" is to be detected."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1: the corner pixels of a rectangle, both inside it, counted from 0 at the top left."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image and its annotation.

    All geometry is in pixels of the file as stored, before any EXIF rotation and any resizing.

    Attributes:
        id: relative POSIX path that names the image within its data set.
        path: where the file is.
        label: class index, 0 .. number of classes - 1.
        boxes: any number of `Box`, corners inclusive. A box may be one pixel wide or high.
        masks: one grey image per object instance; object where the value is above 0.
        ignore: grey image of the pixels that no metric counts (unless an instance covers them), or None.
        size: (width, height) as the annotation states it, or as the file's header does where the reader looked; None
            if the reader did not look.
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
        name: "train", "val", "test" or "all".
        records: the images.
        class_names: one unique name per class index, the same for all splits of a data set.
        root: folder below which the images are.
        exif: whether pictures are to be rotated as their EXIF orientation says. False for CUB and the metadata format,
            whose boxes and masks are in the frame of the stored pixels; True for folders of a user's own photographs.
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
        """Return the number of images of each class, (C,)."""
        counts = Counter(record.label for record in self.records)
        return tuple(counts[label] for label in range(self.num_classes))


class Kind(NamedTuple):
    """A kind of problem that a data set can have: the heading of its group in a report, and what the user can do.

    An "error" stops training (or leaves the image out, with ``--skip-bad``); a "warning" is only shown.
    """

    title: str
    fix: str
    severity: Literal["error", "warning"] = "error"


ONE_CLASS = "a model gives each image one class, and the probabilities of all classes add up to 1"
"""Why data of several labels are refused."""

_TAKE_OUT = "take its id out of the list"
KINDS: dict[str, Kind] = {
    "malformed-line": Kind("line of another form", "write the line as shown in the message"),
    "label-not-integer": Kind("label that is no integer", "give the class index, a whole number from 0"),
    "several-labels": Kind(
        "image with several labels", f"{ONE_CLASS}: keep the main label, or make a class of each combination"
    ),
    "label-range": Kind("label out of range", "correct the label, or list the class in classes.txt"),
    "no-label": Kind("image without a label", "add its line to the label file, or take its id out"),
    "contradiction": Kind("two lines that contradict each other", "keep the right one"),
    "duplicate-id": Kind("id listed twice", "keep one of the lines"),
    "bad-path": Kind("path that leaves the data folder", "write it relative to the data folder, without '..'"),
    "no-split": Kind("image in no split", "add its line to train_test_split.txt"),
    "two-splits": Kind("image in two splits", "keep it in one: a test image seen in training is a leak"),
    "missing-file": Kind("missing image", f"put the file there, or {_TAKE_OUT}"),
    "empty-file": Kind("empty file (0 bytes)", "fetch the file again"),
    "not-an-image": Kind("file that is not an image", f"fetch the file again, or {_TAKE_OUT}"),
    "other-bands": Kind(
        "image of other bands than are read", f"give --reading.channels (--channels here), or {_TAKE_OUT}"
    ),
    "floating-point": Kind("image of floating-point values", f"convert it to 8 or 16 bits, or {_TAKE_OUT}"),
    "truncated": Kind("broken or truncated image", "fetch the file again"),
    "too-large": Kind("image of too many pixels", f"scale it down, or {_TAKE_OUT}"),
    "box-inverted": Kind("box with its corners exchanged", "write x0,y0,x1,y1 with x0 <= x1 and y0 <= y1"),
    "box-outside": Kind("box outside its image", "corners are inclusive: 0 <= x0 <= x1 < width, the same for y"),
    "size-mismatch": Kind("image of another size than stated", "correct image_sizes.txt, and the boxes with it"),
    "missing-mask": Kind("missing, unreadable or misshapen mask", "put the right file there, or take its line out"),
    "cue-file": Kind("attributes or parts that cannot be read", "correct the file; only cue localization needs it"),
    "box-thin": Kind("box of zero width or height", "nothing, if one pixel is meant", "warning"),
    "no-box": Kind("image without a box", "add its line, if boxes are to be evaluated", "warning"),
    "unlisted-id": Kind("annotation of an image not listed", "add its id, or remove the line", "warning"),
    "repeated-line": Kind("line given twice", "remove one of them", "warning"),
    "not-read": Kind("files that are not read", "turn images among them into JPEG or PNG", "warning"),
    "other-depth": Kind("images with other bits than they use", "give --reading.bits (--bits here)", "warning"),
    "two-classes": Kind("image in two classes", f"keep it in one: {ONE_CLASS}", "warning"),
    "copy": Kind(
        "image whose copy is in another split", "keep one: a test image seen in training is a leak", "warning"
    ),
    "empty-class": Kind(
        "class without images", "add images, or keep only present classes (present_classes_only)", "warning"
    ),
}
"""Every kind by name, in the order of a report: errors first."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a data set."""

    kind: str  # key of `KINDS`
    split: str  # that it was found in
    file: Path  # that is wrong, or says something wrong
    message: str  # the value found, and what is wrong with it
    line: int | None = None  # in ``file``, from 1; None if it has no lines or the whole of it is meant
    record: str = ""  # id of the image it concerns, if it can be told

    @property
    def is_error(self) -> bool:
        """Whether it stops training; otherwise it is a warning."""
        return KINDS[self.kind].severity == "error"

    @property
    def place(self) -> str:
        """The file, and the line where there is one."""
        return f"{self.file}:{self.line}" if self.line is not None else str(self.file)


@dataclass
class ProblemLog:
    """The problems of one split, collected while its files are read."""

    split: str
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: str, file: Path, message: str, line: int | None = None, record: str = "") -> None:
        """Add a `Problem` of this split."""
        self.problems.append(Problem(kind, self.split, file, message, line, record))

    def check_box(self, box: Box, size: tuple[int, int] | None, file: Path, line: int | None, record: str) -> None:
        """Add the problem of a box in an image of ``size`` (width, height), if it has one."""
        x0, y0, x1, y1 = box
        text = f"box {x0},{y0},{x1},{y1} of {record}"
        if x1 < x0 or y1 < y0:
            self.add("box-inverted", file, f"{text}: x1 < x0 or y1 < y0", line, record)
        elif min(x0, y0) < 0 or (size is not None and (x1 >= size[0] or y1 >= size[1])):
            extent = f"{size[0]} x {size[1]} pixels" if size else "not known"
            self.add("box-outside", file, f"{text}: the image is {extent}", line, record)
        elif x0 == x1 or y0 == y1:
            self.add("box-thin", file, text, line, record)


@dataclass(frozen=True)
class Report:
    """The result of checking a data set.

    Attributes:
        problems: all problems, in the order found.
        images: number of images checked, by split.
        description: lines about what the data set is, for people.
    """

    problems: tuple[Problem, ...]
    images: dict[str, int]
    description: tuple[str, ...] = ()

    @classmethod
    def of(cls, splits: Iterable[Split], others: Iterable[Problem] = ()) -> Report:
        """Return a report of the problems that the readers of ``splits`` noted, and of ``others``."""
        listed = list(splits)
        noted = [problem for split in listed for problem in split.problems]
        return cls((*noted, *others), {split.name: len(split.records) for split in listed})

    @cached_property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that stop training."""
        return tuple(problem for problem in self.problems if problem.is_error)

    @property
    def ok(self) -> bool:
        """Whether there is no error; warnings may be there."""
        return not self.errors

    def bad_ids(self, split: str) -> frozenset[str]:
        """Return the ids of the images of a split that have an error."""
        return frozenset(error.record for error in self.errors if error.split == split and error.record)

    def left_out(self, split: str) -> int:
        """Return how many images or lines of a split ``drop_bad`` and the reader leave out."""
        return len({error.record or error.place for error in self.errors if error.split == split})

    @property
    def summary(self) -> dict[str, Any]:
        """Counts for a run's records: images, errors, warnings, problems by kind, and left out by split."""
        return {
            "images": dict(self.images),
            "errors": len(self.errors),
            "warnings": len(self.problems) - len(self.errors),
            "kinds": {kind: len(members) for kind, members in self._by_kind().items()},
            "left_out": {split: self.left_out(split) for split in self.images},
        }

    def raise_if_bad(self) -> None:
        """Raise a CalmError with the whole report as its message if there is an error."""
        if not self.ok:
            raise CalmError(str(self))

    def _by_kind(self) -> dict[str, list[Problem]]:
        return {
            kind: found for kind in KINDS if (found := [problem for problem in self.problems if problem.kind == kind])
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, most: int = 5) -> str:
        """Return the report as text: by kind, errors first, ``most`` of each at most, with counts and what to do."""
        images = ", ".join(f"{count:,} {name}" for name, count in self.images.items())
        errors, warnings = len(self.errors), len(self.problems) - len(self.errors)
        lines = [*self.description, f"{images} images: {_counted(errors, 'error')}, {_counted(warnings, 'warning')}"]
        for kind, members in self._by_kind().items():
            lines += ["", f"{KINDS[kind].severity}: {KINDS[kind].title} ({len(members):,})"]
            for problem in members[:most]:
                lines.append(f"  [{problem.split}] {_shortened(problem.place)}: {_shortened(problem.message)}")
            if len(members) > most:
                lines.append(f"  ... and {len(members) - most:,} more")
            lines.append(f"  fix: {KINDS[kind].fix}")
        return "\n".join(lines)


def _shortened(text: str) -> str:
    """Leave out the middle of a long text, which may be any line of any file."""
    return text if len(text) <= 400 else f"{text[:250]} ... {text[-100:]}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}" if number else f"no {noun}s"


def first_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first of ``names`` and how many more there are, for a message.

    >>> first_of(["cat", "dog", "owl"], 2), first_of([])
    ('cat, dog and 1 more', 'nothing')
    """
    rest = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(f"{name:.100}" for name in names[:most]) + rest or "nothing"


T = TypeVar("T")


class Line(NamedTuple, Generic[T]):
    """The value of a line of a text file, and its number from 1."""

    number: int
    value: T


MAX_LINE = 1_000_000  # most characters of a line
_WHOLE = re.compile(r"\s*([+-]?[0-9]{1,18})\s*")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text without surrounding white space) of each line that is not blank.

    Raises:
        CalmError: the file is missing, no regular file, unreadable, or not UTF-8, or a line is longer than `MAX_LINE`.
    """
    try:
        with io.TextIOWrapper(open_regular(path, "the data set's"), encoding="utf-8-sig", newline=None) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), start=1):
                if len(line) > MAX_LINE:
                    raise CalmError(f"{path}:{number}: a line of more than {MAX_LINE:,} characters")
                if text := line.strip():
                    yield number, text
    except OSError as error:
        raise CalmError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CalmError(f"{path} is not UTF-8 text (byte {error.start} of a block): save it as UTF-8") from error


def parsed_lines(path: Path, parse: Callable[[str], T], form: str) -> Iterator[tuple[int, T]]:
    """Yield (line number, ``parse(text)``) of each line that is not blank.

    Raises:
        CalmError: see `numbered_lines`; or the first line for which ``parse`` raises ValueError: it is not ``form``.
    """
    for number, text in numbered_lines(path):
        try:
            value = parse(text)
        except ValueError as error:
            reason = f": {error}" if isinstance(error, CalmError) else ""
            raise CalmError(f"{path}:{number}: {text!r:.200} is not {form}{reason}") from error
        yield number, value


def whole_number(text: str) -> int | None:
    """Return the integer that ``text`` spells in ASCII digits, or None.

    >>> whole_number(" -3"), whole_number("1.0"), whole_number("1_000"), whole_number("--1")
    (-3, None, None, None)
    """
    return int(match[1]) if (match := _WHOLE.fullmatch(text)) else None


def is_text(name: str) -> bool:
    """Return whether a file's name can be written as UTF-8: names of bytes that are not UTF-8 cannot."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def is_inside(path: str) -> bool:
    """Return whether ``path`` is relative, names something, and stays below the folder it is relative to."""
    return bool(PurePosixPath(path).name) and path[0] != "/" and "\0" not in path and ".." not in path.split("/")
