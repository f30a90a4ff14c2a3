"""The parts of a run, put together from its configuration: splits, model, data sets."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from calm import checkpoint
from calm.data.check import load_checked
from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.report import Report
from calm.data.transforms import eval_transform, fixed_size, train_transform
from calm.errors import CalmError
from calm.head import CalmHead
from calm.model import CalmModel, create_model
from calm.preprocess import Preprocessing
from calm.train.config import TrainConfig

__all__ = ["build_datasets", "build_model", "read_splits"]


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
    start = checkpoint.load(source, backbone=backbone)
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
