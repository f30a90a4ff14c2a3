"""Open files that nobody vouches for: regular files only, JSON, YAML, CSV of bounded size that mean what they seem to.

Nothing in a file is run, and a small file never becomes a large one in memory.
"""

from __future__ import annotations

import csv
import json
import os
import stat
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from calm.errors import CalmError

__all__ = ["open_regular", "read_columns", "read_json", "read_text", "read_yaml"]

MOST_JSON = 16 * 2**20
"""Bytes of a JSON file, at most."""

MOST_YAML = 20_000
"""Bytes of a YAML file, at most."""

MOST_NODES = 5_000
"""Values in a YAML file, at most, each alias counted as what it stands for."""


DEEPEST = 50
"""Brackets within brackets in a YAML file, at most: the parser needs seconds for hundreds."""


def open_regular(path: str | os.PathLike[str], what: str = "file") -> BinaryIO:
    """Open a file to read its bytes. Never waits: a pipe or device is no file.

    Args:
        path: the file.
        what: what it is, for the message.

    Raises:
        CalmError: it is missing, a folder, a pipe, a device, a loop of links, or not readable.
    """
    place = Path(path)
    try:
        if not stat.S_ISREG(place.stat().st_mode):
            kind = "a folder" if place.is_dir() else "a pipe or device"
            raise CalmError(f"cannot read {what} {path}: it is {kind}, not a file")
        return place.open("rb")
    except FileNotFoundError as error:
        raise CalmError(f"cannot read {what} {path}: no such file") from error
    except OSError as error:
        raise CalmError(f"cannot read {what} {path}: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, CalmError):
            raise
        raise CalmError(f"cannot read {what} {str(path)!r}: {error}") from error  # a name with a NUL


def read_text(path: str | os.PathLike[str], what: str = "file", *, most: int = MOST_JSON) -> str:
    """The text of a UTF-8 file of at most ``most`` bytes; a byte order mark is dropped.

    Raises:
        CalmError: see `open_regular`; or the file is larger, or not UTF-8.
    """
    with open_regular(path, what) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise CalmError(f"{what} {path} is larger than {most:,} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CalmError(f"{what} {path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def read_json(path: str | os.PathLike[str], what: str = "file") -> Any:
    """The content of a JSON file.

    Raises:
        CalmError: see `read_text`; or it is no JSON, nests too deeply, or an object has a name twice.
    """
    try:
        return json.loads(read_text(path, what), object_pairs_hook=_object)
    except CalmError:
        raise
    except (ValueError, RecursionError) as error:
        raise CalmError(f"cannot read {what} {path} as JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name[:80]!r} is there twice in one object")
        found[name] = value
    return found


def read_columns(
    path: str | os.PathLike[str], what: str = "file", *, need: Sequence[str] = ()
) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers whose first line names them; nan is a number here.

    Args:
        path: the file.
        what: what it is, for messages.
        need: columns that it must have.

    Raises:
        CalmError: see `read_text`; or a column of ``need`` is missing, a name is twice there, a row has more or fewer
            fields than there are names or a field that is no number, or there is no row.
    """
    text = read_text(path, what)
    try:
        names, *rows = [row for row in csv.reader(text.splitlines()) if row] or [[]]
        lacking = [name for name in need if name not in names]
        if lacking or len(set(names)) < len(names):
            fault = f"has no column {lacking[0]!r}" if lacking else "names a column twice"
            raise CalmError(f"{what} {path} {fault}: its first line is {','.join(names)[:200]!r}")
        if not rows:
            raise CalmError(f"{what} {path} has no row of numbers")
        for number, row in enumerate(rows, start=1):
            if len(row) != len(names):
                raise ValueError(f"row {number} has {len(row)} fields, not {len(names)}")
        return {name: [float(row[place]) for row in rows] for place, name in enumerate(names)}
    except CalmError:
        raise
    except (ValueError, csv.Error) as error:
        raise CalmError(f"cannot read {what} {path} as a table of numbers: {str(error)[:300]}") from error


def read_yaml(path: str | os.PathLike[str], what: str = "file") -> Any:
    """The content of a YAML file: plain values, lists and mappings.

    Raises:
        CalmError: see `read_text`; or it is no YAML, has a tag that asks for an object, nests too deeply, has a key
            twice in one mapping, or aliases that stand for more than `MOST_NODES` values.
    """
    text = read_text(path, what, most=MOST_YAML)
    if max(accumulate((character in "[{") - (character in "]}") for character in text), default=0) > DEEPEST:
        raise CalmError(f"{what} {path} nests brackets more than {DEEPEST} deep")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _size(node, {}) > MOST_NODES:
            raise CalmError(f"{what} {path} stands for more than {MOST_NODES:,} values: write fewer aliases")
        return loader.construct_document(node)
    except CalmError:
        raise
    except Exception as error:  # PyYAML's makers of values fail in any way: IndexError for an empty !!float
        raise CalmError(f"cannot read {what} {path} as YAML: {error}") from error


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """How many values ``node`` stands for, aliases written out; infinite if it contains itself."""
    if id(node) not in sizes:
        sizes[id(node)] = float("inf")  # until it is known: who asks meanwhile asks from inside
        members: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            members = [member for pair in node.value for member in pair]
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise ValueError(f"{twice[:80]!r} is twice in the mapping of line {node.start_mark.line + 1}")
        elif isinstance(node, yaml.SequenceNode):
            members = node.value
        sizes[id(node)] = 1 + sum(_size(member, sizes) for member in members)
    return sizes[id(node)]
