"""All problems of a data set in one text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from calm.data.problems import KINDS, Problem
from calm.data.records import Split
from calm.errors import CalmError

__all__ = ["Report"]

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
