"""Which attributes and part points belong together, for data sets that are not birds.

``parts/groups.yaml`` below the root; without it the groups of CUB are taken. Cars, say, whose attributes are called
``has_wheel_colour::black`` and whose keypoints 1 to 4 are the wheels and 5 the roof::

    - name: wheels
      words: [wheel, tyre]            # an attribute whose name contains one of them belongs to the group
      points: [[1], [2], [3], [4]]    # four points; the pixels nearest to any of them are the group's
    - name: cabin
      words: [roof, window]
      points: [[5, 6]]                # one point: the mean of the visible ones of these parts (from 1)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calm.data.cue_files import MOST_PARTS
from calm.data.cues import CUB_GROUPS, PartGroup
from calm.documents import read_yaml
from calm.errors import CalmError, shown

__all__ = ["read_part_groups"]

MOST = 31
"""Groups of a data set, at most."""


def read_part_groups(root: Path) -> tuple[PartGroup, ...]:
    """The part groups of a data set: of ``parts/groups.yaml``, or CUB's where there is no such file.

    Raises:
        CalmError: the file is no YAML, or an entry is not as in the example at the top of this module.
    """
    path = root / "parts" / "groups.yaml"
    if not path.is_file():
        return CUB_GROUPS
    entries = read_yaml(path, "part groups")
    if not isinstance(entries, list) or not 1 <= len(entries) <= MOST:
        raise CalmError(f"{path}: needs a list of 1 to {MOST} groups, each with name, words and points")
    groups = tuple(_group(path, number, entry) for number, entry in enumerate(entries, 1))
    if len({group.name for group in groups}) < len(groups):
        raise CalmError(f"{path}: two groups have the same name")
    return groups


def _group(path: Path, number: int, entry: Any) -> PartGroup:
    if not isinstance(entry, dict) or set(entry) != {"name", "words", "points"}:
        raise CalmError(f"{path}: group {number} needs name, words and points, and nothing else")
    name, words, points = entry["name"], entry["words"], entry["points"]
    if not isinstance(name, str) or not name:
        raise CalmError(f"{path}: name of group {number} must be a text, got {shown(name)}")
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w for w in words):
        raise CalmError(f"{path}: words of group {number} must be a list of texts, got {shown(words)}")
    good = (
        isinstance(points, list)
        and points
        and all(
            isinstance(point, list)
            and point
            and all(type(part) is int and 0 < part <= MOST_PARTS for part in point)
            for point in points
        )
    )
    if not good:
        raise CalmError(
            f"{path}: points of group {number} must be lists of part numbers, 1 to {MOST_PARTS:,}, got {shown(points)}"
        )
    return PartGroup(name, tuple(words), tuple(map(tuple, points)))
