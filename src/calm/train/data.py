"""The parts of a run, put together from its configuration: splits, model, data sets.

The loaders of a run: training images in an order and with an augmentation that depend on seed and epoch alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from calm.data.check import load_checked
from calm.data.dataset import EpochSampler, ImageDataset
from calm.data.records import Report, Split
from calm.data.transforms import eval_transform, fixed_size, train_transform
from calm.errors import CalmError
from calm.images import Preprocessing
from calm.model import CalmHead, CalmModel, create_model, load
from calm.train.config import TrainConfig

__all__ = ["RunData", "build_datasets", "build_model", "read_splits", "steps_per_epoch"]


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


def read_splits(config: TrainConfig, *, progress: bool) -> tuple[dict[str, Split], Report]:
    """The checked splits. What is carved into val and test does not depend on the run's seed."""
    reading = config.reading
    return load_checked(
        config.data,
        layout=reading.layout,
        metadata_root=reading.metadata_root,
        val_fraction=reading.val_fraction,
        present_classes_only=reading.present_classes_only,
        skip_bad=reading.skip_bad,
        progress=progress,
    )


def build_model(config: TrainConfig, split: Split, backbone: nn.Module | None) -> CalmModel:
    """The model at its start, with the input size, class names and weights that the configuration asks for."""
    options = config.model
    size = config.reading.image_size
    model = create_model(
        config.backbone if backbone is None else backbone,
        split.num_classes,
        config.method,
        options.large_feature_map,
        options.pretrained and backbone is None and options.init_from is None,
        use_bn=options.use_bn,
        output_stride=options.output_stride,
        prior_activation=options.prior_activation,
        prior_denominator=options.prior_denominator,
        class_names=split.class_names,
        preprocessing=Preprocessing(size=(size, size)),
    )
    if options.init_from is not None:
        _initialise(model, options.init_from, backbone)
    if isinstance(model.head, CalmHead):
        model.head.keep_logits = config.hardware.keep_logits
    if config.hardware.channels_last:
        model.to(memory_format=torch.channels_last)
    # Lightning trains each module in the mode it comes in, and one that was loaded comes in evaluation mode.
    return model.train()


def _initialise(model: CalmModel, source: str, backbone: nn.Module | None) -> None:
    """Start from the weights of a saved model: its backbone, and its head where the shapes are the same."""
    start = load(source, backbone=backbone)
    try:
        model.backbone.load_state_dict(start.backbone.state_dict())
    except RuntimeError as error:
        raise CalmError(
            f"model.init_from {source!r}: its backbone {start.config.backbone!r} is another one"
        ) from error
    own, theirs = model.head.state_dict(), start.head.state_dict()
    shapes, given = ({name: value.shape for name, value in state.items()} for state in (own, theirs))
    if shapes == given:
        model.head.load_state_dict(theirs)


def build_datasets(
    config: TrainConfig, splits: Mapping[str, Split], preprocessing: Preprocessing
) -> dict[str, ImageDataset]:
    """The images of each split: training images augmented, the others as the model sees images later."""
    test = eval_transform(preprocessing)
    transforms = {"train": train_transform(config.augment, preprocessing), "val": test, "test": test}
    sizes = {"train": fixed_size(config.augment, preprocessing.size)}
    return {
        name: ImageDataset(
            split,
            transforms[name],
            seed=config.seed,
            cache=config.reading.cache,
            cache_size=sizes.get(name, preprocessing.size),
        )
        for name, split in splits.items()
    }
