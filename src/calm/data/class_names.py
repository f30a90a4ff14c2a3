"""Names of classes: from ``classes.txt``, or from the folders the images are in."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from calm.data.lines import numbered, whole_number
from calm.errors import CalmError

__all__ = ["names_from_folders", "read_names"]

_WORDNET = re.compile(r"n\d{8}\s+(?=\S)")


def read_names(path: Path) -> tuple[str, ...]:
    """Names of ``classes.txt`` by class index.

    The indices of the file are 0 .. C-1, or 1 .. C as in the official CUB file; lines may be in any order.
    A WordNet id before the name is dropped. Of several synonyms divided by commas the first is the name,
    unless two classes would then share it.

    Raises:
        CalmError: a line of another form, an index missing or given twice, two classes of one name.
    """
    by_index: dict[int, str] = {}
    for number, text in numbered(path):
        key, *rest = text.split(maxsplit=1)
        index = whole_number(key)
        name = _WORDNET.sub("", rest[0], count=1) if rest else ""
        if index is None or not name:
            raise CalmError(f"{path}:{number}: {text!r} is not 'index name'")
        if index in by_index:
            raise CalmError(f"{path}:{number}: class index {index} is given twice")
        by_index[index] = name
    first = min(by_index, default=0)
    missing = set(range(first, first + len(by_index))) - by_index.keys()
    if first not in (0, 1) or missing or not by_index:
        wanted = (
            f"{min(missing)} is missing"
            if missing
            else f"the first is {first}"
            if by_index
            else "there are none"
        )
        raise CalmError(f"{path}: class indices must run from 0 (or 1) without gaps, {wanted}")
    full = [by_index[index] for index in sorted(by_index)]
    short = [name.split(",")[0].strip() for name in full]
    names = short if len(set(short)) == len(short) else full
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise CalmError(f"{path}: two classes are called {repeated[0]!r}; names must differ")
    return tuple(names)


def names_from_folders(labels: Mapping[str, int]) -> tuple[str, ...]:
    """The name of the folder that holds each class's images, or the index as text.

    Args:
        labels: image id (a relative path) to class index.

    Returns:
        0 .. the largest label. Folders give the names only if they and the classes pair one to one.

    >>> names_from_folders({"train/cat/1.jpg": 0, "train/dog/1.jpg": 1, "train/dog/2.jpg": 1})
    ('cat', 'dog')
    >>> names_from_folders({"train/1.jpg": 0, "train/2.jpg": 1})
    ('0', '1')
    """
    size = max(labels.values(), default=-1) + 1
    pairs = {(label, PurePosixPath(name).parent.name) for name, label in labels.items()}
    folders = dict(pairs)
    names = {folder for _, folder in pairs}
    if len(pairs) == size == len(folders) == len(names) and "" not in names:
        return tuple(folders[index] for index in range(size))
    return tuple(map(str, range(size)))
