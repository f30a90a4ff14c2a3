"""Read the text files of a data set line by line, keeping line numbers for messages."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path, PurePosixPath

from calm.data.problems import Problem
from calm.data.records import Box
from calm.documents import open_regular
from calm.errors import CalmError

__all__ = ["box_problem", "inside", "is_text", "numbered", "whole_number"]

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
