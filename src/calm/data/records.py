"""What a reader returns: one image with its annotation, and one split of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from calm.data.problems import Problem

__all__ = ["SPLITS", "Box", "Record", "Split"]

SPLITS = ("train", "val", "test")
"""The names of the splits, everywhere."""

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1: the corner pixels of a rectangle, both inside it, counted from 0 at the top left."""


@dataclass(frozen=True, slots=True)
class Record:
    """One image and what is known about it.

    All geometry is in pixels of the file as stored, before any EXIF rotation and any resizing.

    Attributes:
        id: relative POSIX path that names the image within its data set.
        path: where the file is.
        label: class index, 0 .. number of classes - 1.
        boxes: any number of :data:`Box`, corners inclusive. A box may be one pixel wide or high.
        masks: one grey image per object instance; object where the value is above 0.
        ignore: grey image of the pixels that no metric counts (unless an instance covers them), or None.
        size: (width, height) as the annotation states it, or as the file's header does where the reader
            looked; None if the reader did not look.
    """

    id: str
    path: Path
    label: int
    boxes: tuple[Box, ...] = ()
    masks: tuple[Path, ...] = ()
    ignore: Path | None = None
    size: tuple[int, int] | None = None

    @property
    def all_masks(self) -> tuple[Path, ...]:
        """The masks, and the ignore mask if there is one."""
        return self.masks if self.ignore is None else (*self.masks, self.ignore)


@dataclass(frozen=True)
class Split:
    """The images of one split, in the order of the files that list them.

    Attributes:
        name: "train", "val" or "test".
        records: the images.
        class_names: one unique name per class index, the same for all splits of a data set.
        root: folder below which the images are.
        exif: whether pictures are to be turned as their EXIF orientation says. False for CUB and the
            metadata format, whose boxes and masks are in the frame of the stored pixels; True for folders
            of a user's own photographs.
        origin: "own files", or how the split was carved from another one.
        problems: what the reader found wrong, warnings too. Errors appear here only after reading with
            ``strict=False``; lines that yield no record are then missing from ``records``.
    """

    name: str
    records: tuple[Record, ...]
    class_names: tuple[str, ...]
    root: Path
    exif: bool = False
    origin: str = "own files"
    problems: tuple[Problem, ...] = ()

    @property
    def num_classes(self) -> int:
        """C, the length of ``class_names``."""
        return len(self.class_names)

    def class_counts(self) -> tuple[int, ...]:
        """Images of each class, (C,)."""
        counts = [0] * self.num_classes
        for record in self.records:
            counts[record.label] += 1
        return tuple(counts)
