"""Where a backbone's weights start: He's random ones, or torchvision's ImageNet ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from calm.errors import CalmError

__all__ = ["imagenet_weights", "initialise", "load_pretrained"]


def initialise(module: nn.Module) -> None:
    """Start every convolution by He's normal rule (fan out, ReLU), its bias at zero; nothing else changes."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def imagenet_weights(weights: WeightsEnum) -> dict[str, Tensor]:
    """The tensors of a torchvision weight set, from torch's hub cache or downloaded into it.

    The file is read without executing anything in it, and a download must match its published hash.

    Raises:
        CalmError: no network and no cached file, or a file that is not what it should be.
    """
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CalmError(
            f"cannot get the pretrained weights {weights.url}: {error}. Connect to the network, or put the "
            f"file into {Path(torch.hub.get_dir()) / 'checkpoints'}, or start from random weights with "
            "pretrained=False (calm train: --model.pretrained false)"
        ) from error
    return state


def load_pretrained(
    backbone: nn.Module, state: Mapping[str, Tensor], new_layers: tuple[str, ...] = ()
) -> None:
    """Copy ``state`` into ``backbone``; only the layers named in ``new_layers`` may stay as they are.

    Raises:
        CalmError: a key or shape differs, so the file does not belong to this backbone.
    """
    try:
        missing, unexpected = backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CalmError(f"the pretrained weights do not fit {type(backbone).__name__}: {error}") from error
    lost = [key for key in missing if not key.startswith(new_layers)]
    if lost or unexpected:
        raise CalmError(
            f"the pretrained weights do not fit {type(backbone).__name__}: missing {lost or 'nothing'}, "
            f"unexpected {unexpected or 'nothing'}"
        )
