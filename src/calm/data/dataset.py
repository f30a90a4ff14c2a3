"""Images of a split as a torch data set, the same however many processes read it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from calm.data.images import read_rgb
from calm.data.randomness import seeded
from calm.data.records import Split
from calm.data.threads import in_threads
from calm.data.transforms import ImageTransform, resize_picture
from calm.errors import CalmError

__all__ = ["ImageDataset"]


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Items are (image, label, index): normalised float32 (3, H, W), class index, position in the split.

    Random choices of the transform depend only on (seed, epoch, index): not on the number of workers or
    processes, the order of reading, or what was drawn before; torch's generators are left as they were. The
    epoch is in shared memory, so that :meth:`set_epoch` reaches workers that live across epochs.

    Args:
        split: the images.
        transform: a picture to a tensor, drawing random numbers from torch's CPU generator only.
        seed: of the random choices.
        cache: decode all images now and keep them (3 bytes a pixel). Worker processes share the memory where
            processes are forked (Linux).
        cache_size: (height, width) that cached images are resized to, as the transform would do first: see
            `calm.data.transforms.fixed_size`. None keeps their own sizes.

    Raises:
        CalmError: ``split`` is empty; the cache would not fit; with ``cache``, an image cannot be read.
    """

    def __init__(
        self,
        split: Split,
        transform: ImageTransform,
        *,
        seed: int = 0,
        cache: bool = False,
        cache_size: tuple[int, int] | None = None,
    ) -> None:
        if not split.records:
            raise CalmError(f"split {split.name!r} of {split.root} has no images")
        self.split, self.transform, self.seed = split, transform, seed
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._cache = _Cache(split, cache_size) if cache else None

    def __len__(self) -> int:
        return len(self.split.records)

    @property
    def epoch(self) -> int:
        """The epoch that random choices are made for."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Make the random choices of this epoch from now on, in all worker processes too."""
        self._epoch.fill_(epoch)

    def picture(self, index: int) -> Image.Image:
        """The image as it is shown to a person: RGB, of its own size, turned where ``split.exif`` says so.

        Raises:
            CalmError: the file cannot be read.
        """
        if self._cache is not None and self._cache.size is None:
            return Image.fromarray(self._cache[index])
        return Image.fromarray(read_rgb(self.split.records[index].path, exif=self.split.exif))

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        picture = self.picture(index) if self._cache is None else Image.fromarray(self._cache[index])
        with seeded(self.seed, self.epoch, index):
            return self.transform(picture), self.split.records[index].label, index


class _Cache:
    """Decoded images of a split, uint8 RGB, in one block of memory; resized to ``size`` unless that is None.

    One block, for it is neither copied nor touched by reference counts when processes fork.
    """

    def __init__(self, split: Split, size: tuple[int, int] | None) -> None:
        self.size = size
        images: list[NDArray[np.uint8]] = []
        total, limit = 0, _memory() // 2
        paths = [record.path for record in split.records]
        for image in in_threads(partial(_decoded, exif=split.exif, size=size), paths):
            total += image.size
            if total > limit:
                raise CalmError(
                    f"a cache of split {split.name!r} needs more than {limit / 2**30:.1f} GiB, half of this"
                    f" machine's memory ({len(images):,} of {len(paths):,} images fit): go without cache"
                )
            images.append(image)
        self.shapes = [(image.shape[0], image.shape[1]) for image in images]
        self.starts = np.cumsum([0, *(image.size for image in images)])
        self.pixels = np.empty(int(self.starts[-1]), dtype=np.uint8)
        for start, image in zip(self.starts, images, strict=False):
            self.pixels[start : start + image.size] = image.ravel()

    def __getitem__(self, index: int) -> NDArray[np.uint8]:
        height, width = self.shapes[index]
        return self.pixels[self.starts[index] : self.starts[index + 1]].reshape(height, width, 3)


def _decoded(path: Path, exif: bool, size: tuple[int, int] | None) -> NDArray[np.uint8]:
    pixels = read_rgb(path, exif=exif)
    return pixels if size is None else np.array(resize_picture(Image.fromarray(pixels), size))


def _memory() -> int:
    """Bytes of physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
