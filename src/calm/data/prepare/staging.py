"""Folders that appear whole or not at all, and what a preparation found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from calm.atomic import working_folder
from calm.errors import CalmError

__all__ = ["Prepared", "merge", "staged"]


@contextmanager
def staged(final: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a working folder beside ``final``, and ``result`` in it, which takes the name ``final`` at the end.

    The working folder is removed at the end, on error too.

    Raises:
        CalmError: nothing was put into ``result``.
    """
    with working_folder(final) as work:
        result = work / "result"
        yield work, result
        if not result.is_dir():
            raise CalmError(f"nothing was found for {final}")
        result.replace(final)


def merge(source: Path, target: Path) -> None:
    """Move all files below ``source`` to the same places below ``target``.

    Raises:
        CalmError: a file is at its place already.
    """
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / path.relative_to(source)
        if place.exists():
            raise CalmError(f"{path.relative_to(source)} is in two archives")
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


@dataclass
class Prepared:
    """What is there after a preparation.

    Attributes:
        name: the data set.
        root: folder to hand to ``calm data check`` and to training.
        metadata_root: its ``--metadata_root``; None where none is needed.
        partial: whether wrong counts are notes and no errors.
        counts: what was counted.
        notes: what is missing, and where to get it.
    """

    name: str
    root: Path
    metadata_root: Path | None = None
    partial: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def expect(self, what: str, found: int, expected: int, where: str = "") -> None:
        """Count something.

        Raises:
            CalmError: the number is not the expected one, and the preparation is not partial.
        """
        self.counts[what] = found
        if found != expected:
            self.complain(f"{found:,} {what}, expected {expected:,}{where and f'; {where}'}")

    def complain(self, message: str) -> None:
        """Note what is wrong; of a whole preparation, raise it.

        Raises:
            CalmError: the preparation is not partial.
        """
        if not self.partial:
            raise CalmError(f"{self.name}: {message} (--partial prepares what is there)")
        self.notes.append(message)

    def __str__(self) -> str:
        lists = f" --metadata_root {self.metadata_root}" if self.metadata_root else ""
        lines = [f"{self.name}: {self.root}"]
        lines += [f"  {count:,} {what}" for what, count in self.counts.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join([*lines, f"next: calm data check {self.root}{lists}"])
