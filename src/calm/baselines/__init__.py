"""Other people's explanations of the same models, behind the same call as CALM's own.

``attribute(model, images, targets, method)`` takes every name of ``METHODS``: the maps that the model itself
offers (`calm.output`), the gradient family of the paper's tables (`calm.baselines.gradient`) and the Grad-CAM
family (`calm.baselines.gradcam`). To add a baseline: write its function, and add a line to ``BASELINES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm.baselines import gradient
from calm.baselines.gradcam import GRADCAMS, gradcam
from calm.baselines.score import Options, class_scores, left_as_found
from calm.errors import CalmError, unknown
from calm.heatmaps import resize_maps
from calm.images import check_images
from calm.model import CalmModel
from calm.output import ALIASES as MAP_ALIASES
from calm.output import MAP_KINDS, Superclass, Targets, as_targets

__all__ = [
    "ALIASES",
    "BASELINES",
    "METHODS",
    "Baseline",
    "Options",
    "attribute",
    "canonical_method",
    "class_scores",
]

Explain: TypeAlias = Callable[[CalmModel, Tensor, Tensor, Options], Tensor]


@dataclass(frozen=True)
class Baseline:
    """A method: ``explain(model, images, targets, options)`` -> maps (B, h, w), and the options it reads."""

    explain: Explain
    options: frozenset[str] = frozenset()


_NOISE = frozenset({"samples", "noise", "seed"})
_LAYER = frozenset({"target_layer"})

BASELINES: dict[str, Baseline] = {
    "gradient": Baseline(gradient.gradient),
    "input-x-gradient": Baseline(gradient.input_x_gradient),
    "integrated-gradients": Baseline(gradient.integrated_gradients, frozenset({"steps"})),
    "smoothgrad": Baseline(gradient.smoothgrad, _NOISE),
    "smoothgrad-squared": Baseline(gradient.smoothgrad_squared, _NOISE),
    "vargrad": Baseline(gradient.vargrad, _NOISE),
    **{name: Baseline(gradcam(name), _LAYER) for name in GRADCAMS},
}

ALIASES = {
    "vanilla-gradient": "gradient",
    "grad-cam": "gradcam",
    "grad-cam++": "gradcam++",
    "score-cam": "scorecam",
}

METHODS: tuple[str, ...] = (*MAP_KINDS, *BASELINES)
"""Every method, the model's own maps first."""


def attribute(
    model: CalmModel,
    images: Float[Tensor, "b 3 h w"],
    targets: Targets,
    method: str = "integrated-gradients",
    *,
    superclass: Superclass | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int = 16,
    steps: int | None = None,
    samples: int | None = None,
    noise: float | None = None,
    seed: int | None = None,
    target_layer: nn.Module | str | None = None,
) -> Float[Tensor, "b H W"]:
    """One attribution map per image, by any method.

    Baselines explain the target's score: the logit for CAM, log p(y | x) for CALM. The model is left as it
    was found (mode, gradients, hooks, random numbers), also after an error, and is asked in evaluation mode.
    The maps carry no gradient; for a differentiable map use ``model(images).attribute``.

    Args:
        model: a model of this package.
        images: normalised images, on the model's device.
        targets: the class to explain in each image, (B,), or one for all.
        method: one of ``METHODS``.
        superclass: for the model's ``-superclass`` maps, the classes of each target.
        size: (height, width) of the maps; None: that of the images.
        batch_size: most images in one pass through the model; lower it when memory runs out. It does not
            change the result.
        steps: points of the integral; integrated-gradients only. 50 if None.
        samples: noisy copies per image; smoothgrad, smoothgrad-squared and vargrad only. 50 if None.
        noise: their standard deviation as a share of (max - min) of each image. 0.25 if None.
        seed: of that noise; the same seed gives the same map. 0 if None.
        target_layer: the layer that the Grad-CAM family reads, a module or its dotted name; it may return a
            grid (B, D, h, w) or a transformer's tokens (B, T, D). The last feature map ("backbone") if None.

    Returns:
        Maps in float32 or wider. Gradient and Grad-CAM families: at least 0, not normalised.

    Raises:
        CalmError: an unknown method, an option that the method does not read, or images and targets that do
            not fit.

    Source: paper, tables of cue localization and of remove-and-classify.
    """
    name = canonical_method(method)
    knobs = {"steps": steps, "samples": samples, "noise": noise, "seed": seed, "target_layer": target_layer}
    given: dict[str, Any] = {option: value for option, value in knobs.items() if value is not None}
    asked = given.keys() | ({"superclass"} if superclass is not None else set())
    _check_options(method, asked, BASELINES[name].options if name in BASELINES else frozenset({"superclass"}))
    options = Options(batch_size=batch_size, **given)
    _check_values(options)
    classes = _checked(model, images, targets)
    size = size or (images.shape[-2], images.shape[-1])
    maps = []
    with left_as_found(model):
        # A copy: the caller's tensor keeps its flags, and one made in inference mode can enter a graph.
        images, classes = images.detach().clone(), classes.clone().to(images.device, torch.int64)
        for some_images, some_targets in zip(
            torch.split(images, batch_size), torch.split(classes, batch_size), strict=True
        ):
            if name in BASELINES:
                some_maps = BASELINES[name].explain(model, some_images.detach(), some_targets, options)
            else:
                some_maps = model.attribute(some_images, some_targets, name, superclass=superclass, size=size)
            maps.append(resize_maps(some_maps, size))
    return torch.cat(maps)


def canonical_method(method: str) -> str:
    """The name in ``METHODS`` of a method or of an alias.

    Raises:
        CalmError: no such method; the message has the closest name.
    """
    name = ALIASES.get(method, MAP_ALIASES.get(method, method))
    if name not in METHODS:
        raise unknown("attribution method", method, [*METHODS, *ALIASES, *MAP_ALIASES])
    return name


def _check_options(method: str, asked: Set[str], read: frozenset[str]) -> None:
    """Refuse an option that the method does not read."""
    for option in sorted(asked - read):
        reads = f"it reads {', '.join(sorted(read))}" if read else "it has none"
        raise CalmError(f"method {method!r} does not read the option {option}: {reads}")


def _check_values(options: Options) -> None:
    for name in ("steps", "samples", "batch_size"):
        value = getattr(options, name)
        if not isinstance(value, int) or value < 1:
            raise CalmError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0 <= options.noise < math.inf:
        raise CalmError(f"noise must be a number of at least 0, got {options.noise!r}")


def _checked(model: CalmModel, images: Tensor, given: Targets) -> Tensor:
    """The targets as a tensor, after a look at images and targets."""
    check_images(images)
    if images.device != model.device:
        raise CalmError(f"images are on {images.device}, the model on {model.device}: move them together")
    if not len(images):
        raise CalmError("images is empty: give at least one")
    targets = as_targets(given, len(images))
    if targets.shape != images.shape[:1] or targets.is_floating_point() or targets.dtype == torch.bool:
        raise CalmError(
            f"targets must be class indices of shape ({len(images)},), one per image, "
            f"got {targets.dtype} {tuple(targets.shape)}"
        )
    low, high, classes = int(targets.min()), int(targets.max()), model.config.num_classes
    if low < 0 or high >= classes:
        raise CalmError(f"targets out of range: {low if low < 0 else high}, allowed are 0 to {classes - 1}")
    return targets
