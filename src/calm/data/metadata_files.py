"""Read the four text files of the metadata format by image id; see ``calm.data.metadata`` for samples.

What is wrong with a line is added to a list of problems, and the line is passed over. What only several
files together can tell (ranges, bounds, ids that do not match) is not looked at here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from calm.data.lines import inside, numbered, whole_number
from calm.data.problems import Problem
from calm.data.records import Box

__all__ = ["Line", "Located", "read_ids", "read_labels", "read_localization", "read_sizes"]

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
