"""Parameter groups and optimiser: a low rate for the (pretrained) backbone, a higher one for the new layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from calm.train.grouping import is_new

if TYPE_CHECKING:
    from calm.train.config import OptimOptions

__all__ = ["build_optimizer", "parameter_groups"]


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
