"""Whether the files that cue localization needs are there, and right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from calm.data.problems import Problem
from calm.data.records import Split
from calm.errors import CalmError

__all__ = ["check_cue_files"]

_FOLDERS = ("attributes", "parts")

T = TypeVar("T")


def check_cue_files(root: Path, splits: Mapping[str, Split]) -> tuple[list[Problem], str]:
    """Read the class attributes, part groups and part points of a data set, if it has any.

    Args:
        root: of the data set.
        splits: all that it has.

    Returns:
        What is wrong, and a line about what is there; neither for a data set without such files.
    """
    there = [name for name in _FOLDERS if (root / name).is_dir()]
    if not there:
        return [], ""
    if len(there) < len(_FOLDERS):
        (lacking,) = set(_FOLDERS) - set(there)
        return [], f"no cue localization: there is {there[0]}/ but no {lacking}/"
    from calm.data.cue_files import (  # with PyTorch, which takes seconds
        read_class_attributes,
        read_part_points,
    )
    from calm.data.cues import class_pairs, group_votes
    from calm.data.part_groups import read_part_groups

    problems: list[Problem] = []

    def read(what: Path, reader: Callable[[], T]) -> T | None:
        try:
            return reader()
        except CalmError as error:
            problems.append(Problem("cue-file", "cues", what, str(error)))
            return None

    groups = read(root / "parts" / "groups.yaml", lambda: read_part_groups(root))
    attributes = read(root / "attributes", lambda: read_class_attributes(root))
    points = read(root / "parts" / "part_locs.txt", lambda: read_part_points(root))
    if points is not None:
        ids = [record.id for split in splits.values() for record in split.records]
        read(root / "images.txt", lambda: points.select(ids))
    if attributes is not None:
        names, present = attributes
        classes = next(iter(splits.values())).num_classes
        if len(present) != classes:
            message = f"describes {len(present)} classes, the data set has {classes}"
            problems.append(Problem("cue-file", "cues", root / "attributes", message))
    if problems or groups is None or attributes is None or points is None:
        return problems, ""
    every = class_pairs(present, group_votes(names, groups), range(1, len(groups) + 1))
    differing = Counter(len(pair.groups) for pair in every)
    pairs = ", ".join(f"{differing[count]} in {count}" for count in sorted(differing)) or "none"
    counted = f"{points.xy.shape[1]} parts in {len(groups)} groups, {len(names)} attributes"
    return [], f"cue localization: {counted}; pairs of classes by differing groups: {pairs}"
