"""The images of a split as a torch data set, and the order of reading, the same for any number of processes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, distributed
from torch.utils.data import Dataset, Sampler

from calm.data.records import Split
from calm.data.transforms import ImageTransform
from calm.errors import CalmError, unknown
from calm.files import in_threads
from calm.images import Preprocessing, as_pixels, resize_pixels
from calm.inference import mix_seed, seeded

Remainder = Literal["drop", "keep"]


class EpochSampler(Sampler[int]):
    """The indices of this process, batch after batch, in an order that depends only on (seed, epoch).

    Of each global batch, process ``rank`` takes the ``rank``-th of ``world_size`` equal runs, so that the processes'
    t-th batches together are the t-th batch of a single process. Give :attr:`local_batch_size` to the data loader, and
    call :meth:`set_epoch` before each epoch.

    Args:
        dataset: the images; `set_epoch` sets its epoch too, for its augmentation.
        batch_size: images of a global batch, over all processes.
        seed: of the order.
        shuffle: a new order each epoch; else always that of the split.
        balance: with ``shuffle``: draw images with replacement, so that each class comes equally often.
        remainder: last images that fill no global batch are left out in this epoch ("drop", which training in several
            processes needs), or divided as evenly as can be and nothing twice ("keep", for exact counts of a test).
        rank: of this process among ``world_size``; None asks torch.distributed, for either.

    Raises:
        CalmError: no batch comes out, or ``batch_size`` is no multiple of ``world_size``.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        balance: bool = False,
        remainder: Remainder = "drop",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        is_distributed = distributed.is_available() and distributed.is_initialized()
        current = (distributed.get_rank(), distributed.get_world_size()) if is_distributed else (0, 1)
        rank, world_size = (now if own is None else own for own, now in zip((rank, world_size), current, strict=True))
        if not 0 <= rank < world_size:
            raise CalmError(f"rank is {rank}: allowed are 0 to world_size - 1 = {world_size - 1}")
        if batch_size < 1 or batch_size % world_size:
            raise CalmError(f"batch_size is {batch_size}: give a multiple of the {world_size} processes")
        if remainder not in get_args(Remainder):
            raise unknown("remainder", remainder, get_args(Remainder))
        if remainder == "drop" and batch_size > len(dataset):
            raise CalmError(f"batch_size is {batch_size}, but there are only {len(dataset)} images: no batch is full")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.remainder, self.epoch = shuffle, remainder, dataset.epoch
        labels = torch.tensor([record.label for record in dataset.split.records])
        self.weights = 1 / labels.bincount()[labels].double() if balance and shuffle else None  # of each image
        self.rank, self.world_size = rank, world_size

    @property
    def local_batch_size(self) -> int:
        """Images of this process in a full global batch."""
        return self.batch_size // self.world_size

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and self.remainder == "keep")

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the order, and of the data set's augmentation."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def order(self) -> list[int]:
        """Return all indices of the data set in the order of the current epoch, for any number of processes."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        images = len(self.dataset)
        if self.weights is not None:
            return list(torch.multinomial(self.weights, images, replacement=True, generator=generator).tolist())
        return list(torch.randperm(images, generator=generator).tolist() if self.shuffle else range(images))

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        for start in range(0, self.steps * self.batch_size, self.batch_size):
            yield from self._run(order[start : start + self.batch_size])

    def _run(self, batch: Sequence[int]) -> list[int]:
        """Return this process's run of a batch; of a short one the first runs may be one image longer."""
        return list(np.array_split(batch, self.world_size)[self.rank].tolist())

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full * self.local_batch_size + (len(self._run(range(rest))) if self.remainder == "keep" else 0)


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """The images of a split as (image, label, index): normalised float32 (C, H, W), class index, position in the split.

    Random choices of the transform depend only on (seed, epoch, index), and leave torch's generators as they were. The
    epoch is in shared memory, so that :meth:`set_epoch` reaches workers that live across epochs.

    Args:
        split: the images.
        transform: a picture to a tensor, drawing random numbers from torch's CPU generator only.
        seed: of the random choices.
        preprocessing: how files are read (channels, bits), and which channels :meth:`picture` shows.
        cache: decode all images now and keep them (a byte for each value), shared by forked worker processes (Linux).
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
        preprocessing: Preprocessing | None = None,
        cache: bool = False,
        cache_size: tuple[int, int] | None = None,
    ) -> None:
        if not split.records:
            raise CalmError(f"split {split.name!r} of {split.root} has no images")
        self.split, self.transform, self.seed = split, transform, seed
        self.preprocessing = preprocessing or Preprocessing()
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        self._cache_size = cache_size
        self._cache = self._decode_all() if cache else None

    def __len__(self) -> int:
        return len(self.split.records)

    @property
    def epoch(self) -> int:
        """The epoch on which random choices depend."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Let random choices depend on this epoch from now on, in all worker processes too."""
        self._epoch.fill_(epoch)

    def picture(self, index: int) -> Image.Image:
        """Return the image as people see it, RGB of its own size; a `CalmError` if the file cannot be read."""
        kept = self._cache[index] if self._cache is not None and self._cache_size is None else None
        return Image.fromarray(self.preprocessing.picture(self._read(index) if kept is None else kept))

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} images")
        pixels = as_pixels(self._read(index) if self._cache is None else self._cache[index])
        with seeded(self.seed, self.epoch, index):
            return self.transform(pixels), self.split.records[index].label, index

    def _read(self, index: int, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
        array = self.preprocessing.read(self.split.records[index].path, exif=self.split.exif)
        how = self.preprocessing.interpolation
        return array if size is None else np.atleast_3d(np.asarray(resize_pixels(as_pixels(array), size, how)))

    def _decode_all(self) -> list[NDArray[np.uint8]]:
        """Decode all images, if they take at most half of the machine's memory."""
        images: list[NDArray[np.uint8]] = []
        total, limit = 0, _memory() // 2
        for image in in_threads(partial(self._read, size=self._cache_size), range(len(self))):
            total += image.size
            if total > limit:
                needed = f"more than {limit / 2**30:.1f} GiB, half of this machine's memory"
                fit = f"{len(images):,} of {len(self):,} images fit"
                raise CalmError(f"a cache of split {self.split.name!r} needs {needed} ({fit}): go without it")
            images.append(image)
        return images


def _memory() -> int:
    """Return the bytes of physical memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
