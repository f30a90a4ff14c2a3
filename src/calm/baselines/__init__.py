"""Attribution methods of other papers for the same models, behind the same call as CALM's own maps.

``attribute(model, images, targets, method)`` takes every name of ``METHODS``: the maps that the model itself has
(`calm.output`), the gradient family of the paper's tables (`calm.baselines.gradient`) and the Grad-CAM family
(`calm.baselines.gradcam`). To add a baseline, write its function and add a line to ``BASELINES``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm.baselines import gradient
from calm.baselines.gradcam import gradcam
from calm.baselines.gradient import Options, class_scores
from calm.errors import CalmError, needs_extra, unknown
from calm.heatmaps import resize_maps
from calm.images import check_images
from calm.inference import evaluation_mode
from calm.latent import Targets, check_classes
from calm.model import CalmModel
from calm.output import ALIASES as MAP_ALIASES, MAP_KINDS, Superclass

__all__ = ["ALIASES", "BASELINES", "METHODS", "Baseline", "Options", "attribute", "canonical_method", "class_scores"]

Explain: TypeAlias = Callable[[CalmModel, Tensor, Tensor, Options], Tensor]


@dataclass(frozen=True)
class Baseline:
    """A method of the registry."""

    explain: Explain  # from a model, images (B, 3, H, W), targets (B,) and `Options` to maps (B, h, w) of any size
    options: frozenset[str] = frozenset()  # names of the options that it reads


_NOISE = frozenset({"samples", "noise", "seed"})
_LAYER = frozenset({"target_layer"})

BASELINES: dict[str, Baseline] = {
    "gradient": Baseline(gradient.gradient),
    "input-x-gradient": Baseline(gradient.input_x_gradient),
    "integrated-gradients": Baseline(gradient.integrated_gradients, frozenset({"steps"})),
    "smoothgrad": Baseline(gradient.smoothgrad, _NOISE),
    "smoothgrad-squared": Baseline(gradient.smoothgrad_squared, _NOISE),
    "vargrad": Baseline(gradient.vargrad, _NOISE),
    "gradcam": Baseline(gradcam("GradCAM"), _LAYER),
    "gradcam++": Baseline(gradcam("GradCAMPlusPlus"), _LAYER),
    "xgradcam": Baseline(gradcam("XGradCAM"), _LAYER),
    "layercam": Baseline(gradcam("LayerCAM"), _LAYER),
    "hirescam": Baseline(gradcam("HiResCAM"), _LAYER),
    "scorecam": Baseline(gradcam("ScoreCAM"), _LAYER),
    "eigencam": Baseline(gradcam("EigenCAM"), _LAYER),
    "eigengradcam": Baseline(gradcam("EigenGradCAM"), _LAYER),
}

ALIASES = {"vanilla-gradient": "gradient", "grad-cam": "gradcam", "grad-cam++": "gradcam++", "score-cam": "scorecam"}

METHODS: tuple[str, ...] = (*MAP_KINDS, *BASELINES)
"""Every method: the kinds of the model's own maps, then the baselines."""


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
    """Compute one attribution map per image, by any method.

    Baselines explain the target's score: the logit for CAM, log p(y | x) for CALM. The model runs in evaluation mode;
    its mode, gradients, hooks and the random number generators are restored, also after an error. The maps carry no
    gradient; for a differentiable map use ``model(images).attribute``.

    Args:
        model: a model of this package.
        images: normalised images, on the model's device.
        targets: the class to explain in each image, (B,), or one for all.
        method: one of ``METHODS``.
        superclass: for the model's ``-superclass`` maps, the classes of each target.
        size: (height, width) of the maps; None: that of the images.
        batch_size: most images in one pass through the model; lower it when memory runs out. It does not change the
            result.
        steps: points of the integral; integrated-gradients only. 50 if None.
        samples: noisy copies per image; smoothgrad, smoothgrad-squared and vargrad only. 50 if None.
        noise: their standard deviation as a share of (max - min) of each image. 0.25 if None.
        seed: of that noise; the same seed gives the same map. 0 if None.
        target_layer: the layer that the Grad-CAM family reads, a module or its dotted name; it may return a grid
            (B, D, h, w) or a transformer's tokens (B, T, D). The last feature map ("backbone") if None.

    Returns:
        Maps in float32 or wider. Gradient and Grad-CAM families: at least 0, not normalised.

    Raises:
        CalmError: an unknown method, an option that the method does not read, images and targets that do not fit, or
            a method whose library is not installed.

    Source: paper, tables of cue localization and of remove-and-classify.
    """
    name = canonical_method(method)
    baseline = BASELINES.get(name)
    optional = {"steps": steps, "samples": samples, "noise": noise, "seed": seed, "target_layer": target_layer}
    given: dict[str, Any] = {option: value for option, value in optional.items() if value is not None}
    names = given.keys() | ({"superclass"} if superclass is not None else set())
    read = frozenset({"superclass"}) if baseline is None else baseline.options
    if unread := names - read:
        reads = f"it reads {', '.join(sorted(read))}" if read else "it has none"
        raise CalmError(f"method {method!r} does not read the option {min(unread)}: {reads}")
    options = Options(batch_size=batch_size, **given)
    _check_values(options)
    classes = _check_inputs(model, images, targets)
    size = size or (images.shape[-2], images.shape[-1])
    maps = []
    with evaluation_mode(model), needs_extra(f"method {name!r}", "baselines"):
        # A copy: the caller's tensor keeps its flags, and one made in inference mode can enter a graph.
        images, classes = images.detach().clone(), classes.clone().to(images.device)
        for start in range(0, len(images), batch_size):
            part, part_classes = images[start : start + batch_size], classes[start : start + batch_size]
            if baseline is not None:
                part_maps = baseline.explain(model, part.detach(), part_classes, options)
            else:
                part_maps = model.attribute(part, part_classes, name, superclass=superclass, size=size)
            maps.append(resize_maps(part_maps, size))
    return torch.cat(maps)


def canonical_method(method: str, model: CalmModel | None = None) -> str:
    """Return the name in ``METHODS`` of a method or of an alias; of a map kind, one that ``model``, if given, has.

    Raises:
        CalmError: no such method, with the closest name; or a map kind of the other family of models.
    """
    name = ALIASES.get(method, MAP_ALIASES.get(method, method))
    if name not in METHODS:
        raise unknown("attribution method", method, [*METHODS, *ALIASES, *MAP_ALIASES])
    return name if model is None or name in BASELINES else model.map_kind(name)


def _check_values(options: Options) -> None:
    for name in ("steps", "samples", "batch_size"):
        value = getattr(options, name)
        if not isinstance(value, int) or value < 1:
            raise CalmError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not 0 <= options.noise < math.inf:
        raise CalmError(f"noise must be a number of at least 0, got {options.noise!r}")


def _check_inputs(model: CalmModel, images: Tensor, given: Targets) -> Tensor:
    """Check images and targets; return the targets as a tensor."""
    check_images(images)
    if images.device != model.device:
        raise CalmError(f"images are on {images.device}, the model on {model.device}: move them together")
    if not len(images):
        raise CalmError("images is empty: give at least one")
    targets = check_classes(given, len(images), model.config.num_classes)
    if targets.ndim != 1:
        raise CalmError(f"targets must be one class per image, got shape {tuple(targets.shape)}")
    return targets
