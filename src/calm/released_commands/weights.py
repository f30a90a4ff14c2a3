"""Which weights a released command starts from: ImageNet's, or a checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from calm import checkpoint
from calm.backbones import build_backbone
from calm.card import Card
from calm.errors import CalmError
from calm.model import CalmModel, ModelConfig, create_model
from calm.preprocess import Preprocessing
from calm.released import load_released
from calm.released_commands.experiment import finished
from calm.released_commands.flags import Flags, method
from calm.released_file import FILE_NAME

__all__ = ["check_pretrained", "load_model", "transplant"]


def check_pretrained(flags: Flags) -> None:
    """See that the ImageNet weights can be had, which may download them.

    Raises:
        CalmError: they cannot; the message names ``--pretrained=False``.
    """
    try:
        build_backbone(
            flags.architecture,
            pretrained=True,
            large_feature_map=flags.large_feature_map,
            use_bn=flags.batch_norm,
        )
    except CalmError as error:
        raise CalmError(f"--pretrained=True (the default): {error}: here --pretrained=False") from error


def load_model(flags: Flags) -> CalmModel:
    """The model of ``--load_checkpoint``, in eval mode, on the GPU if there is one. Nothing is downloaded.

    Raises:
        CalmError: no checkpoint asked for, none there, or one that is not what the flags say.
    """
    if not flags.use_load_checkpoint:
        raise CalmError(
            "nothing to evaluate: give --use_load_checkpoint=True and --load_checkpoint=FOLDER. (The released code "
            "scores a random head then.)"
        )
    source = _source(flags)
    size = (flags.crop_size, flags.crop_size)
    if (source / FILE_NAME).is_file():
        card = source / "run" / "last" / checkpoint.CARD
        if card.is_file():
            _check(flags, Card.read(card).model, source)
        model = load_released(
            source,
            method=method(flags),
            large_feature_map=flags.large_feature_map,
            use_bn=flags.batch_norm,
        )
        model.preprocessing = Preprocessing(size)
    else:
        model = checkpoint.load(source)
        model.preprocessing = replace(model.preprocessing, size=size)
    _check(flags, model.config, source)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def transplant(model: CalmModel, num_classes: int, *, seed: int) -> CalmModel:
    """``model`` for other classes: all its weights but the classifier's, which start anew.

    As the released code's ``--is_different_checkpoint``.
    """
    config = model.config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        other = create_model(
            config.backbone,
            num_classes,
            config.method,
            config.large_feature_map,
            use_bn=config.use_bn,
            prior_activation=config.prior_activation,
            prior_denominator=config.prior_denominator,
            preprocessing=model.preprocessing,
        )
    kept = {
        name: value for name, value in model.state_dict().items() if not name.startswith("head.conv_last")
    }
    other.load_state_dict(kept, strict=False)
    return other


def _source(flags: Flags) -> Path:
    """The checkpoint's folder: as given, or below ``--save_root``; by default the experiment's own."""
    if flags.load_checkpoint is None:
        places = [flags.folder]
    else:
        places = [Path(flags.load_checkpoint), Path(flags.save_root) / flags.load_checkpoint]
    for place in places:
        if place.is_dir():
            return place
    own = f"; leave it out to take {flags.folder / FILE_NAME}" if finished(flags) else ""
    raise CalmError(
        f"no checkpoint: there is no folder {' nor '.join(map(str, places))}, which --load_checkpoint names{own}"
    )


def _check(flags: Flags, found: ModelConfig, source: Path) -> None:
    """See that the flags say what the checkpoint is. What a released file does not say is taken from the flags."""
    asked = {
        "--architecture": (flags.architecture, found.backbone),
        "--attribution_method": (method(flags), found.method),
        "--large_feature_map": (flags.large_feature_map, found.large_feature_map),
        "--use_bn": (flags.batch_norm, found.use_bn),
    }
    for flag, (given, actual) in asked.items():
        if given != actual:
            raise CalmError(f"{flag} says {given}, but the checkpoint in {source} is of {actual}")
