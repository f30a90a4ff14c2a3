"""Splits that a data set does not have: shares of train, and fewer classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256

from calm.data.records import Record, Split
from calm.errors import CalmError

__all__ = ["carve", "keep_present_classes"]


def carve(
    records: Sequence[Record], fraction: float, seed: int, salt: str
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Part ``records`` in two, class by class, by nothing but ids and seed.

    Of each class the images with the smallest hash of (seed, salt, id) are carved: round(fraction * n), but
    at least one where the class has two images or more, and never the last. The same on every machine, in
    whatever order the records come.

    Args:
        records: images of all classes.
        fraction: share to carve, in (0, 1).
        seed: another seed, another choice.
        salt: makes carvings for different ends independent.

    Returns:
        (the rest, the carved part), each in the order of ``records``.

    Raises:
        CalmError: ``fraction`` out of range.
    """
    if not 0 < fraction < 1:
        raise CalmError(f"val_fraction is {fraction}: a share to carve lies between 0 and 1")
    by_class: dict[int, list[tuple[bytes, str]]] = defaultdict(list)
    for record in records:
        digest = sha256(f"{seed}:{salt}:{record.id}".encode()).digest()
        by_class[record.label].append((digest, record.id))
    carved: set[str] = set()
    for members in by_class.values():
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        carved.update(name for _, name in sorted(members)[:count])
    rest = tuple(record for record in records if record.id not in carved)
    return rest, tuple(record for record in records if record.id in carved)


def keep_present_classes(splits: Mapping[str, Split]) -> dict[str, Split]:
    """The same images with only the classes that occur in any of the splits, numbered anew in their order."""
    present = sorted({record.label for split in splits.values() for record in split.records})
    new = {old: index for index, old in enumerate(present)}
    return {
        name: replace(
            split,
            records=tuple(replace(record, label=new[record.label]) for record in split.records),
            class_names=tuple(split.class_names[old] for old in present),
        )
        for name, split in splits.items()
    }
