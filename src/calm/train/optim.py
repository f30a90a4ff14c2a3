"""Parameter groups and optimiser: a low rate for the (pretrained) backbone, a higher one for the new layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calm.errors import CalmError

if TYPE_CHECKING:
    from calm.train.config import Grouping, OptimOptions

__all__ = ["build_optimizer", "is_new", "parameter_groups"]

# Substrings of the parameter names that the released code trains at the low rate (main.py of the released code).
RELEASED_BACKBONE_NAMES = {
    "vgg16": ("features.",),
    "resnet50": ("conv1", "layer1", "layer2", "layer3"),
    "inception_v3": ("Mixed", "Conv2d_1", "Conv2d_2", "Conv2d_3", "Conv2d_4"),
}


def is_new(name: str, backbone: str, grouping: Grouping) -> bool:
    """Whether the parameter ``name`` of a `CalmModel` belongs to the new layers, with the higher rate.

    Raises:
        CalmError: ``released`` grouping asked for a backbone that the released code does not have.

    >>> is_new("head.conv_last.weight", "resnet50", "head")
    True
    >>> [is_new(f"backbone.layer4.0.{layer}.weight", "resnet50", "released") for layer in ("conv1", "conv2")]
    [False, True]
    """
    if grouping == "head":
        return name.startswith("head.")
    if backbone not in RELEASED_BACKBONE_NAMES:
        known = ", ".join(RELEASED_BACKBONE_NAMES)
        raise CalmError(f"optim.grouping 'released' is defined for {known}, not for {backbone!r}: use 'head'")
    return not any(part in name for part in RELEASED_BACKBONE_NAMES[backbone])


def parameter_groups(model: nn.Module, backbone: str, lr: float, optim: OptimOptions) -> list[dict[str, Any]]:
    """The parameters by learning rate and weight decay, as ``torch.optim`` takes them.

    Args:
        model: a `CalmModel`; parameters that need no gradient are left out.
        backbone: its backbone's name, for the ``released`` grouping.
        lr: rate of the backbone; the new layers get ``lr * optim.head_ratio``.
        optim: grouping, ratio and decay.

    Returns:
        At most four groups with ``params``, ``lr``, ``peak_lr`` (the same; schedules multiply it), ``weight_decay``
        and ``name``. Parameters shared by two modules appear once.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        new = is_new(name, backbone, optim.grouping)
        decays = optim.decay == "all" or parameter.ndim > 1
        rate = lr * optim.head_ratio if new else lr
        group = groups.setdefault(
            (new, decays),
            {
                "params": [],
                "lr": rate,
                "peak_lr": rate,
                "weight_decay": optim.weight_decay if decays else 0.0,
                "name": ("new" if new else "backbone") + ("" if decays else ", no decay"),
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(model: nn.Module, backbone: str, lr: float, optim: OptimOptions) -> torch.optim.Optimizer:
    """SGD or AdamW over `parameter_groups`."""
    groups = parameter_groups(model, backbone, lr, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov)
    return torch.optim.AdamW(groups, betas=optim.betas)
