"""Which images make up which batch: the same global batches for one process and for many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import distributed
from torch.utils.data import Sampler

from calm.data.dataset import ImageDataset
from calm.data.randomness import mix_seed
from calm.errors import CalmError, unknown

__all__ = ["EpochSampler", "Remainder"]

Remainder = Literal["drop", "pad", "keep"]


class EpochSampler(Sampler[int]):
    """The indices of this process, batch after batch, in an order that depends only on (seed, epoch).

    The order is cut into global batches of ``batch_size``; of each, process ``rank`` takes the
    ``rank``-th of ``world_size`` equal runs. So the union of the processes' t-th batches is the t-th batch of
    a single process. Give the data loader :attr:`local_batch_size`, and Lightning
    ``use_distributed_sampler=False``; it calls :meth:`set_epoch` itself.

    Args:
        dataset: its length counts, and it is told the epoch, for its augmentation.
        batch_size: images of a global batch, over all processes.
        seed: of the order.
        shuffle: a new order each epoch; else always that of the split.
        remainder: what becomes of the last images if they do not fill a global batch. "drop": left out in
            this epoch. "pad": filled up from the start of the order to the next multiple of
            ``world_size``, so that all processes have equally many (nothing is added for one process).
            "keep": divided as evenly as can be, nothing twice; some processes may have an image or a batch
            less. Training in several processes wants "drop" or "pad", exact counts of a test want "keep".
        rank: of this process; None asks torch.distributed.
        world_size: number of processes; None asks torch.distributed.

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
        remainder: Remainder = "drop",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.rank = (distributed.get_rank() if together else 0) if rank is None else rank
        self.world_size = (
            (distributed.get_world_size() if together else 1) if world_size is None else world_size
        )
        if not 0 <= self.rank < self.world_size:
            raise CalmError(f"rank is {self.rank}: allowed are 0 to world_size - 1 = {self.world_size - 1}")
        if batch_size < 1 or batch_size % self.world_size:
            raise CalmError(f"batch_size is {batch_size}: give a multiple of the {self.world_size} processes")
        if remainder not in get_args(Remainder):
            raise unknown("remainder", remainder, get_args(Remainder))
        if remainder == "drop" and batch_size > len(dataset):
            raise CalmError(
                f"batch_size is {batch_size}, but there are only {len(dataset)} images: no batch is full"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.remainder, self.epoch = shuffle, remainder, dataset.epoch

    @property
    def local_batch_size(self) -> int:
        """Images of this process in a full global batch."""
        return self.batch_size // self.world_size

    @property
    def steps(self) -> int:
        """Global batches of an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and self.remainder != "drop")

    def set_epoch(self, epoch: int) -> None:
        """Give the order of this epoch from now on, and tell the data set."""
        self.epoch = epoch
        self.dataset.set_epoch(epoch)

    def order(self) -> list[int]:
        """All indices of the data set in the order of the current epoch, for any number of processes."""
        if not self.shuffle:
            return list(range(len(self.dataset)))
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order: list[int] = torch.randperm(len(self.dataset), generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[int]:
        order = self.order()
        for start in range(0, self.steps * self.batch_size, self.batch_size):
            yield from self._share(order, order[start : start + self.batch_size])

    def _share(self, order: list[int], batch: list[int]) -> list[int]:
        if self.remainder == "pad":
            batch = batch + _cycle(order, -len(batch) % self.world_size)
        return batch[self._bound(self.rank, len(batch)) : self._bound(self.rank + 1, len(batch))]

    def _bound(self, rank: int, size: int) -> int:
        """Where the run of ``rank`` begins: the first ``size % world_size`` runs are one longer."""
        each, longer = divmod(size, self.world_size)
        return rank * each + min(rank, longer)

    def __len__(self) -> int:
        full, rest = divmod(len(self.dataset), self.batch_size)
        if self.remainder == "pad":
            rest += -rest % self.world_size
        last = (
            0 if self.remainder == "drop" else self._bound(self.rank + 1, rest) - self._bound(self.rank, rest)
        )
        return full * self.local_batch_size + last


def _cycle(order: list[int], count: int) -> list[int]:
    return [order[position % len(order)] for position in range(count)]
