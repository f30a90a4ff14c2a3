"""The loaders of a run: training images in an order and with an augmentation that depend on seed and epoch alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from calm.data.dataset import ImageDataset
from calm.data.sampler import EpochSampler
from calm.errors import CalmError
from calm.train.config import TrainConfig

__all__ = ["RunData", "steps_per_epoch"]


def steps_per_epoch(images: int, config: TrainConfig) -> int:
    """Optimiser steps of an epoch: full batches; the images that are over are left out, others in each epoch.

    Raises:
        CalmError: not even one batch is full.
    """
    if images < config.batch_size:
        raise CalmError(
            f"batch_size is {config.batch_size}, but there are only {images} training images: lower it"
        )
    return images // config.batch_size


class RunData(pl.LightningDataModule):
    """Training, validation and test loaders of this process; batches are (images, labels, indices).

    ``batch_size`` images make one optimiser step, over all processes and accumulated parts together: however they are
    divided, each step sees the same images.

    Args:
        datasets: by split name.
        config: the run.
    """

    def __init__(self, datasets: Mapping[str, ImageDataset], config: TrainConfig) -> None:
        super().__init__()
        self.datasets, self.config = dict(datasets), config

    def train_dataloader(self) -> DataLoader[Any]:
        """This process's share of each training batch, in ``optim.accumulate`` parts."""
        trainer = self._trainer
        # Lightning starts iterating when it sets up the loader, before it tells the sampler the epoch. With worker
        # processes, a resumed run would otherwise begin with the first batches of epoch 0.
        progress: Any = trainer.fit_loop.epoch_progress.current
        self.datasets["train"].set_epoch(progress.processed)
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """This process's share of the validation images, each image in exactly one process."""
        return self._loader("val", shuffle=False)

    def test_dataloader(self) -> DataLoader[Any]:
        """This process's share of the test images."""
        return self._loader("test", shuffle=False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Put the images into the memory format of the network."""
        if not self.config.hardware.channels_last:
            return batch
        images, *rest = batch
        return (images.contiguous(memory_format=torch.channels_last), *rest)

    def _loader(self, split: str, *, shuffle: bool) -> DataLoader[Any]:
        trainer, dataset, config = self._trainer, self.datasets[split], self.config
        sampler = EpochSampler(
            dataset,
            config.batch_size,
            seed=config.seed,
            shuffle=shuffle,
            remainder="drop" if shuffle else "keep",
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        size, rest = divmod(sampler.local_batch_size, config.optim.accumulate)
        if rest:
            raise CalmError(
                f"batch_size {config.batch_size} over {trainer.world_size} processes gives {sampler.local_batch_size}"
                f" images each, which do not divide into optim.accumulate = {config.optim.accumulate} equal parts"
            )
        workers = config.reading.workers
        return DataLoader(
            dataset,
            batch_size=size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            # A loader draws a seed for its workers whenever it is iterated: not from the generator that dropout uses.
            generator=torch.Generator(),
        )

    @property
    def _trainer(self) -> pl.Trainer:
        assert self.trainer is not None
        return self.trainer
