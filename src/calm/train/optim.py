"""Optimiser, learning-rate schedule and moving averages of the weights, on PyTorch's own classes."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from calm.errors import unknown
from calm.train.config import OptimOptions, RunLength, is_new

ONE_CYCLE_RISE = 0.3


def parameter_groups(
    model: nn.Module, backbone: str, lr: float, optim: OptimOptions, guidance: nn.Module | None = None
) -> list[dict[str, Any]]:
    """Group the parameters that need a gradient by learning rate and weight decay, as ``torch.optim`` takes them.

    The backbone gets the rate ``lr``, the new layers, which `is_new` tells by the name of the backbone, that times
    ``optim.head_ratio``, and the layer that scores the prior that times ``optim.prior_ratio``. The rate of each part of
    the backbone (`backbone_parts`) is that of the next times ``optim.layer_decay``. The layers of ``guidance``, of
    self-produced guidance (SPG), are new ones. The groups also have a ``name``;
    parameters shared by two modules appear once.
    """
    parts = backbone_parts(model)[1] if optim.layer_decay != 1.0 else {}
    depths = {name: len(parts) - index for index, names in enumerate(parts.values()) for name in names}
    groups: dict[tuple[int, bool, bool, bool], dict[str, Any]] = {}
    branches = () if guidance is None else guidance.named_parameters(prefix="head.guidance")
    for name, parameter in chain(model.named_parameters(), branches):
        if not parameter.requires_grad:
            continue
        new = is_new(name, backbone, optim.grouping)
        prior = optim.prior_ratio != 1.0 and name.startswith("head.attention.")
        decays = optim.decay == "all" or parameter.ndim > 1
        depth = depths.get(name, 0)
        scale = (optim.head_ratio if new else 1.0) * (optim.prior_ratio if prior else 1.0) * optim.layer_decay**depth
        title = "prior" if prior else "new" if new else "backbone"
        group = {
            "params": [],
            "lr": lr * scale,
            "weight_decay": optim.weight_decay if decays else 0.0,
            "name": title + (f", {depth} from the head" if depth else "") + ("" if decays else ", no decay"),
        }
        groups.setdefault((-depth, new, prior, decays), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def backbone_parts(model: nn.Module) -> tuple[str, dict[str, list[str]]]:
    """Return the parts of a model's backbone from input to output with the full names of the parameters of each, after
    the prefix that a part's name needs to be a module of the model.

    A part is a child of the backbone (or of the network that it wraps), or, of a sequence of blocks, one block:
    ``conv1``, ``bn1``, ``layer1.0`` and so on. Networks register their layers in the order in which they run.
    Parameters of no layer (a class token, embeddings of positions) belong to the part after them.
    """
    backbone, prefix = model.get_submodule("backbone"), "backbone."
    while len(children := list(backbone.named_children())) == 1 and not list(backbone.parameters(recurse=False)):
        prefix, backbone = f"{prefix}{children[0][0]}.", children[0][1]
    parts: dict[str, list[str]] = {}
    loose: list[str] = []
    for name, _ in backbone.named_parameters():
        first, _, rest = name.partition(".")
        if not rest:
            loose.append(prefix + name)
            continue
        blocks = isinstance(getattr(backbone, first, None), nn.Sequential | nn.ModuleList)
        part = f"{first}.{rest.partition('.')[0]}" if blocks else first
        if part not in parts:
            parts[part], loose = loose, []
        parts[part].append(prefix + name)
    return prefix, parts | {name.removeprefix(prefix): [name] for name in loose}


def freeze_until(model: nn.Module, part: str | bool, frozen: bool = True) -> int:
    """Freeze a part of the backbone and all before it: no gradients, and evaluation mode; or let them train again.

    Args:
        part: a name of `backbone_parts`, or of a sequence of them (``layer3``, whose last is ``layer3.5``); True is
            the whole backbone.

    Returns:
        How many weights these parts have.

    Raises:
        CalmError: the backbone has no such part.
    """
    if part is True:
        backbone = model.get_submodule("backbone").requires_grad_(not frozen).train(not frozen)
        return sum(parameter.numel() for parameter in backbone.parameters())
    prefix, parts = backbone_parts(model)
    last = [index for index, name in enumerate(parts) if f"{name}.".startswith(f"{part}.")]
    if not last:
        names = dict.fromkeys(name.partition(".")[0] for name in parts)
        raise unknown("part of the backbone", part, list(dict.fromkeys([*names, *parts])), where="model.freeze")
    count = 0
    for name, parameters in list(parts.items())[: last[-1] + 1]:
        for parameter in parameters:
            count += model.get_parameter(parameter).requires_grad_(not frozen).numel()
        if prefix + name not in parameters:  # a parameter of no layer has no mode
            model.get_submodule(prefix + name).train(not frozen)
    return count


def freeze_norm(model: nn.Module) -> None:
    """Set the BatchNorm layers of the backbone to evaluation mode: they use and keep the statistics that they have."""
    for module in model.get_submodule("backbone").modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def build_optimizer(
    model: nn.Module, backbone: str, lr: float, optim: OptimOptions, guidance: nn.Module | None = None
) -> torch.optim.Optimizer:
    """Build SGD or AdamW over `parameter_groups`, which see for the arguments."""
    groups = parameter_groups(model, backbone, lr, optim, guidance)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov)
    return torch.optim.AdamW(groups, betas=optim.betas)


def build_scheduler(optimizer: torch.optim.Optimizer, optim: OptimOptions, run: RunLength) -> lr_scheduler.LRScheduler:
    """Build the learning-rate scheduler of a run, which is to be stepped after every optimiser step.

    The groups' rates are the peak rates. The warm-up rises linearly, and its last step has the full rate.
    """
    warmup = round(optim.warmup_epochs * run.steps_per_epoch)
    if optim.schedule == "one-cycle":
        # PyTorch divides by zero where rise or fall have fewer than two steps.
        steps = max(3, run.steps)
        rise = min(max(2, warmup or round(ONE_CYCLE_RISE * steps)), steps - 1)
        peaks = [group["lr"] for group in optimizer.param_groups]
        return lr_scheduler.OneCycleLR(
            optimizer, peaks, total_steps=steps, pct_start=rise / steps, cycle_momentum=False
        )
    # The released code steps its scheduler before the epoch, so that each decay comes one epoch early.
    early = 1 if optim.schedule == "released-step" else 0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if optim.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - warmup) / max(1, run.steps - warmup))) / 2
        epoch = step // run.steps_per_epoch + early
        return 1.0 if optim.schedule == "constant" else optim.step_factor ** (epoch // optim.step_epochs)

    return lr_scheduler.LambdaLR(optimizer, factor)


class Average(AveragedModel):
    """Exponential moving average of a model's weights and buffers: average = d * average + (1 - d) * new.

    Its decay d at the t-th update (from 0) is min(``decay``, (1 + t) / (10 + t)), so that the random start is forgotten
    early on. Integer buffers (BatchNorm's counters) are copied. The averaged model is ``module``: in evaluation mode,
    without gradients; ``model`` is copied, and ``decay`` in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=self._average, use_buffers=True)
        self.decay = decay
        # AveragedModel copies the weights at its update 0. Here the start weights are the first of the average.
        self.n_averaged.fill_(1)
        self.eval().requires_grad_(False)

    def _average(self, averaged: Any, current: Any, _: Tensor | int) -> None:
        if not averaged[0].is_floating_point():
            torch._foreach_copy_(averaged, current)
            return
        updates = int(self.n_averaged) - 1  # this buffer stays on the CPU: reading it waits for no device
        torch._foreach_lerp_(averaged, current, 1 - min(self.decay, (1 + updates) / (10 + updates)))
