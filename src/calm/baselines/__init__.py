"""Attribution methods of other papers for the same models, behind the same call as CALM's own maps.

They are the gradient family of the paper's tables (`calm.baselines.gradient`), the Grad-CAM family
(`calm.baselines.gradcam`), and attention and maps that look at no image (`calm.baselines.attention`). To add a
baseline, write its function and add a line to ``BASELINES``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm.baselines import attention, gradient
from calm.baselines.gradcam import gradcam
from calm.baselines.gradient import Options, class_scores
from calm.errors import CalmError, needs_extra, unknown
from calm.heatmaps import resize_maps
from calm.images import check_images
from calm.inference import evaluation_mode
from calm.latent import NamedTargets, check_classes, widen
from calm.model import CalmModel
from calm.output import ALIASES as MAP_ALIASES, MAP_KINDS, Superclass

__all__ = [
    "ALIASES",
    "BASELINES",
    "METHODS",
    "Baseline",
    "Options",
    "attribute",
    "canonical_method",
    "class_scores",
    "list_methods",
]


@dataclass(frozen=True)
class Baseline:
    """A method of the registry: its function, to maps (B, h, w) of any size, and the names of the options it reads."""

    explain: Callable[[nn.Module, Tensor, Tensor, Options], Tensor]  # of images (B, 3, H, W) and targets (B,)
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
    "gradcam": Baseline(gradcam("GradCAM"), _LAYER),
    "gradcam++": Baseline(gradcam("GradCAMPlusPlus"), _LAYER),
    "xgradcam": Baseline(gradcam("XGradCAM"), _LAYER),
    "layercam": Baseline(gradcam("LayerCAM"), _LAYER),
    "hirescam": Baseline(gradcam("HiResCAM"), _LAYER),
    "scorecam": Baseline(gradcam("ScoreCAM"), _LAYER),
    "eigencam": Baseline(gradcam("EigenCAM"), _LAYER),
    "eigengradcam": Baseline(gradcam("EigenGradCAM"), _LAYER),
    "attention-rollout": Baseline(attention.attention_rollout),
    "cls-attention": Baseline(attention.cls_attention),
    "center": Baseline(attention.center),
    "whole-image": Baseline(attention.whole_image),
}

ALIASES = {"vanilla-gradient": "gradient", "grad-cam": "gradcam", "grad-cam++": "gradcam++", "score-cam": "scorecam"}

METHODS: tuple[str, ...] = (*MAP_KINDS, *BASELINES)
"""Every method: the kinds of the model's own maps, then the baselines."""


def attribute(
    model: nn.Module,
    images: Float[Tensor, "b 3 h w"],
    targets: NamedTargets | None = None,
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
        model: A model of this package; or, for the baselines, any other classifier of images (B, K, H, W) whose output
            is logits (B, C), such as those of timm, torchvision and transformers. The score is then the logit.
        images: Normalised images, on the model's device.
        targets: The class to explain in each image by index or name, (B,), or one for all; None is the most probable.
        method: One of ``METHODS``.
        superclass: For the model's ``-superclass`` maps, the classes of each target.
        size: (height, width) of the maps; None is that of the images.

    The other arguments are those of `Options`; None is the default there.

    Returns:
        Maps in float32 or wider. Gradient and Grad-CAM families: at least 0, not normalised.

    Raises:
        CalmError: If the method is unknown, does not read an option or is not installed, or images or targets do not
            fit.

    Source: paper, tables of cue localization and of remove-and-classify.
    """
    name = canonical_method(method)
    baseline = BASELINES.get(name)
    values = {"steps": steps, "samples": samples, "noise": noise, "seed": seed, "target_layer": target_layer}
    given: dict[str, Any] = {option: value for option, value in values.items() if value is not None}
    names = {*given, *({"superclass"} if superclass is not None else ())}
    read = frozenset({"superclass"}) if baseline is None else baseline.options
    if unread := names - read:
        reads = f"it reads {', '.join(sorted(read))}" if read else "it has none"
        raise CalmError(f"method {method!r} does not read the option {min(unread)}: {reads}")
    options = Options(batch_size=batch_size, **given)
    if not isinstance(model, nn.Module):
        raise CalmError(f"model must be an nn.Module, got a {type(model).__name__}: put a function into one's forward")
    own = model if isinstance(model, CalmModel) else None
    if own is not None:
        own.check_finite()
    elif baseline is None:
        kind = type(model).__name__
        raise CalmError(f"method {method!r} is a map of this package's models: of a {kind} take {', '.join(BASELINES)}")
    check_images(images, None if own is None else own.config.in_channels)
    device = next((parameter.device for parameter in model.parameters()), images.device)
    if images.device != device:
        raise CalmError(f"images are on {images.device}, the model on {device}: move them together")
    if not len(images):
        raise CalmError("images is empty: give at least one")
    num_classes = sys.maxsize if own is None else own.config.num_classes
    if targets is None:
        with evaluation_mode(model), torch.no_grad():
            scores = torch.cat([class_scores(model(part)) for part in torch.split(images, batch_size)])
        targets = scores.argmax(dim=1)
    elif own is not None:
        targets = own.class_indices(targets)
    classes = check_classes(targets, len(images), num_classes)
    if classes.ndim != 1:
        raise CalmError(f"targets must be one class per image, got shape {tuple(classes.shape)}")
    size = size or (images.shape[-2], images.shape[-1])
    maps = []
    checked = nullcontext() if own else model.register_forward_hook(partial(_check_range, classes))
    with evaluation_mode(model), checked, needs_extra(f"method {name!r}", "baselines"):
        # A copy: the caller's tensor keeps its flags, and one made in inference mode can enter a graph. It is wide, so
        # that noise, gradients and their sums are, too, where the model computes in half precision.
        images, classes = images.detach().clone(), classes.clone().to(images.device)
        images = images if own is None else widen(images)
        for start in range(0, len(images), batch_size):
            part, part_classes = images[start : start + batch_size], classes[start : start + batch_size]
            if own is None or baseline is not None:
                assert baseline is not None
                part_maps = baseline.explain(model, part.detach(), part_classes, options)
            else:
                part_maps = own.attribute(part, part_classes, name, superclass=superclass, size=size)
            maps.append(resize_maps(part_maps, size))
    return torch.cat(maps)


def _check_range(classes: Tensor, model: nn.Module, inputs: Any, output: Any) -> None:
    """Check targets when a classifier that is not ours first says how many classes it has: no pass is spent on that."""
    check_classes(classes, len(classes), class_scores(output).shape[1])


def canonical_method(method: str, model: CalmModel | None = None) -> str:
    """Return the name in ``METHODS`` of a method or of an alias; of a map kind, one that ``model``, if given, has.

    Raises:
        CalmError: no such method, with the closest name; or a map kind of the other family of models.
    """
    name = ALIASES.get(method, MAP_ALIASES.get(method, method))
    known = {**MAP_KINDS, **BASELINES}  # now, since users add to both
    if name not in known:
        raise unknown("attribution method", method, [*known, *ALIASES, *MAP_ALIASES])
    return name if model is None or name in BASELINES else model.map_kind(name)


def list_methods(model: CalmModel | None = None) -> list[str]:
    """Return the names of all attribution methods, or of those that a model has, its own maps first.

    >>> list_methods()[:3]
    ['joint', 'joint-superclass', 'joint-superclass-mean']
    """
    own = MAP_KINDS.items()
    family = None if model is None else "cam" if model.config.method == "cam" else "calm"
    return [*(name for name, kind in own if family is None or family in kind.families), *BASELINES]
