"""A folder for each class, with or without a folder for each split above.

::

    photos/train/cat/1.jpg        or        photos/cat/1.jpg
    photos/train/dog/2.png                  photos/dog/2.png
    photos/test/cat/3.jpg

Class names are the folders' names in alphabetical order. Files are images by their suffix
(:data:`SUFFIXES`, any case), at any depth below the class folder; hidden files and all others are passed
over. Pictures are turned as their EXIF orientation says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from calm.data.lines import is_text
from calm.data.records import SPLITS, Record, Split
from calm.errors import CalmError, unknown

__all__ = ["SUFFIXES", "FolderSource", "count_class_folders"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


@dataclass(frozen=True)
class FolderSource:
    """An ImageFolder-style tree."""

    root: Path

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a folder; just "train" if the class folders are directly below the root."""
        own = tuple(split for split in SPLITS if (self.root / split).is_dir())
        return own if "train" in own else ("train",)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Sorted names of the class folders of train.

        Raises:
            CalmError: fewer than two class folders, a name that is not UTF-8 text.
        """
        names = tuple(folder.name for folder in _folders(self._base("train")))
        if len(names) < 2:
            found = f"only {names[0]!r}" if names else "none"
            raise CalmError(
                f"{self._base('train')}: a classifier needs two class folders or more, found {found}"
            )
        return names

    def _base(self, split: str) -> Path:
        return self.root / split if (self.root / "train").is_dir() else self.root

    def listing(self, split: str) -> str:
        """The files or folder that say which images a split has, for messages."""
        return f"the folder {self.root / split if (self.root / split).is_dir() else self.root}"

    def read(self, split: str) -> Split:
        """Read one of :attr:`splits`.

        Raises:
            CalmError: a class folder that train does not have, a name that is not UTF-8 text.
        """
        index = {name: label for label, name in enumerate(self.class_names)}
        base = self._base(split)
        records: list[Record] = []
        for folder in _folders(base):
            if folder.name not in index:
                raise unknown(
                    "class folder", folder.name, self.class_names, where=f"{base}; train has no such class"
                )
            files = _named(path for path in folder.rglob("*") if _is_image(path, folder))
            label = index[folder.name]
            records += [Record(path.relative_to(self.root).as_posix(), path, label) for path in files]
        return Split(split, tuple(records), self.class_names, base, exif=True)


def _folders(base: Path) -> list[Path]:
    return _named(path for path in base.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))


def _named(paths: Iterable[Path]) -> list[Path]:
    """``paths``, sorted: their names are in every result, and must be text."""
    found = sorted(paths)
    for path in found:
        if not is_text(str(path)):
            raise CalmError(f"the name of {str(path)!r} is not UTF-8 text: rename it")
    return found


def _is_image(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def count_class_folders(base: Path) -> int:
    """How many folders directly below ``base`` have an image in them or below; 0 if there is no ``base``."""
    if not base.is_dir():
        return 0
    return sum(any(_is_image(path, folder) for path in folder.rglob("*")) for folder in _folders(base))
