"""The kinds of problem a data set can have, and one problem found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["KINDS", "Kind", "Problem"]

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
