"""The parts of a run, made from its configuration: splits, data sets, loaders and the model at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader

from calm.config import parse_code
from calm.data.dataset import EpochSampler, ImageDataset
from calm.data.loading import match_classes
from calm.data.records import Split, first_of
from calm.data.transforms import eval_transform, fixed_size, train_transform
from calm.errors import CalmError
from calm.images import Preprocessing
from calm.model import CalmModel, create_model, load
from calm.train.config import TrainConfig
from calm.train.wsol import SelfProducedGuidance, add_attention_dropout

WEIGHTS_REMEDY = "Give --model.pretrained true, --model.weights FILE or --model.init_from RUN"


def build_loader(
    dataset: ImageDataset, config: TrainConfig, fabric: Fabric, *, shuffle: bool, workers: int
) -> DataLoader[Any]:
    """Build the loader of this process's share of a split; its batches are (images, labels, indices).

    ``batch_size`` images make one optimiser step, over all processes and accumulated parts together: however they are
    divided, each step sees the same images, in an order that depends on seed and epoch alone.

    With ``shuffle``, for training, the order is random and images that fill no batch are left out. Otherwise each image
    is in exactly one process.

    Raises:
        CalmError: the batch size does not divide into the processes and ``optim.accumulate`` parts.
    """
    sampler = EpochSampler(
        dataset,
        config.batch_size,
        seed=config.seed,
        shuffle=shuffle,
        balance=config.reading.balance,
        remainder="drop" if shuffle else "keep",
    )
    size, rest = divmod(sampler.local_batch_size, config.optim.accumulate)
    if rest:
        raise CalmError(
            f"batch_size {config.batch_size} over {fabric.world_size} processes gives {sampler.local_batch_size}"
            f" images each, which do not divide into optim.accumulate = {config.optim.accumulate} equal parts"
        )
    return DataLoader(
        dataset,
        batch_size=size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=fabric.device.type == "cuda",
        # A loader draws a seed for its workers whenever it is iterated: not from the generator that dropout uses.
        generator=torch.Generator(),
    )


def build_model(config: TrainConfig, split: Split, backbone: nn.Module | None) -> tuple[CalmModel, str]:
    """Build the model of a run at its start, in training mode: for the classes of ``split``, with configured weights
    and input size; ``backbone`` takes the place of the named one."""
    options, reading = config.model, config.reading
    size = None if reading.image_size is None else Preprocessing(size=(reading.image_size, reading.image_size))
    own = backbone is not None or parse_code(config.backbone) is not None  # which starts as it is built
    pretrained = options.pretrained and not own and options.init_from is None
    model = create_model(
        config.backbone if backbone is None else backbone,
        split.num_classes,
        config.method,
        options.large_feature_map,
        options.weights or pretrained,
        use_bn=options.use_bn,
        output_stride=options.output_stride,
        prior_activation=options.prior_activation,
        prior_denominator=options.prior_denominator,
        pooling_exponent=options.pooling_exponent,
        in_channels=reading.channels,
        acol_threshold=config.wsol.acol_threshold if "acol" in config.wsol.methods else None,
        acol_channels=config.wsol.acol_channels,
        class_names=split.class_names,
        preprocessing=size,
    )
    given = {name: getattr(reading, name) for name in ("mean", "std", "bits", "view", "interpolation")}
    origin = str(getattr(model.backbone, "weights_report", ""))
    if not (own or pretrained or options.weights or options.init_from) and (options.freeze or options.freeze_norm):
        what = "freeze keeps the backbone at its random start, whose features say little"
        if not options.freeze:
            what = "freeze_norm keeps BatchNorm's statistics, which are none of a random start: training may diverge"
        origin = f"warning: model.{what}. {WEIGHTS_REMEDY}"
    if options.init_from is not None:
        origin = _initialise(model, options.init_from, config.data.name, backbone)
    chosen = {name: value for name, value in given.items() if value is not None}
    model.preprocessing = replace(model.preprocessing, **chosen)
    if "adl" in config.wsol.methods:
        names = add_attention_dropout(model.backbone, config.wsol, (reading.channels, *model.preprocessing.size))
        origin = "\n".join(filter(None, (origin, f"attention-based dropout after {', '.join(names)}")))
    if config.hardware.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.train(), origin  # a backbone that was loaded comes in evaluation mode


def build_guidance(config: TrainConfig, model: CalmModel) -> SelfProducedGuidance | None:
    """Build the branches of self-produced guidance for a run's model, if it has them, in training mode."""
    if "spg" not in config.wsol.methods:
        return None
    guidance = SelfProducedGuidance(model.backbone, config.wsol, (model.config.in_channels, *model.preprocessing.size))
    return guidance.to(memory_format=torch.channels_last) if config.hardware.channels_last else guidance


def _initialise(model: CalmModel, source: str, data: str, backbone: nn.Module | None) -> str:
    """Start from a saved model's backbone and, class by class, from its head; return a line about what was kept."""
    start = load(source, backbone=backbone)
    try:
        model.backbone.load_state_dict(start.backbone.state_dict())
    except RuntimeError as error:
        raise CalmError(f"model.init_from {source!r}: its backbone {start.config.backbone!r} is another one") from error
    # Its weights were trained on images of this mean, deviation and filter.
    model.preprocessing = replace(start.preprocessing, size=model.preprocessing.size)
    head, saved, names = model.head.state_dict(), start.head.state_dict(), model.class_names
    try:
        rows = dict(enumerate(match_classes(start.class_names, names, model=source, data=data)))
    except CalmError:  # other classes, of which some may be the same
        rows = {i: start.class_names.index(name) for i, name in enumerate(names) if name in start.class_names}
    if not rows or head.keys() != saved.keys():
        return f"started from the backbone of {source}: its head, of other classes or another method, is left out"
    for name, value in saved.items():
        if "conv_last." in name:  # of one head or two
            head[name][list(rows)] = value[list(rows.values())]
        else:
            head[name].copy_(value)
    new = [name for i, name in enumerate(names) if i not in rows]
    rest = f"; new are {first_of(new)}" if new else ""
    return f"started from {source}: {len(rows)} of {len(names)} classes have the weights of its head{rest}"


def build_datasets(
    config: TrainConfig, splits: Mapping[str, Split], preprocessing: Preprocessing
) -> dict[str, ImageDataset]:
    """Build the data set of each split: training images augmented, the others by the model's own preprocessing."""
    test = eval_transform(preprocessing)
    transforms = {"train": train_transform(config.augment, preprocessing), "val": test, "test": test}
    sizes = {"train": fixed_size(config.augment, preprocessing.size)}
    cache, size = config.reading.cache, preprocessing.size
    return {
        name: ImageDataset(
            split,
            transforms[name],
            seed=config.seed,
            preprocessing=preprocessing,
            cache=cache,
            cache_size=sizes.get(name, size),
        )
        for name, split in splits.items()
    }
