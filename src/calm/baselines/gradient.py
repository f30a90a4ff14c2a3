"""The gradient family of the paper's tables, through Captum.

Each function explains ``class_scores(model(images))[targets]`` and returns what the published tables show:
the absolute value of the attribution, then the maximum over colour channels. Values are in score units per
input unit (gradient, SmoothGrad), its square (SmoothGrad-squared, VarGrad), or score units (the two that
multiply by the input).

SmoothGrad and its kin take their gradients from Captum but draw the noise here: Captum's NoiseTunnel knows
one standard deviation a batch and the global random numbers, while the paper's noise is a quarter of *each*
image's range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm.baselines.score import Options, class_scores

if TYPE_CHECKING:
    from calm.model import CalmModel

__all__ = [
    "gradient",
    "input_x_gradient",
    "integrated_gradients",
    "smoothgrad",
    "smoothgrad_squared",
    "vargrad",
]

Images = Float[Tensor, "b 3 h w"]
Targets = Int[Tensor, " b"]
Maps = Float[Tensor, "b h w"]


def gradient(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """d score / d x (Simonyan et al., 2014)."""
    return _over_colours(_gradients(model, images, targets))


def input_x_gradient(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """x * d score / d x (Shrikumar et al., 2017), in normalised input units."""
    from captum.attr import InputXGradient

    explainer = InputXGradient(_forward(model))
    return _over_colours(explainer.attribute(images.requires_grad_(), target=targets))


def integrated_gradients(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """x * mean of the gradients on the straight line from 0 to x (Sundararajan et al., 2017).

    The baseline 0 is the data set's mean colour, since inputs are normalised. The integral is Gauss-Legendre
    quadrature of ``options.steps`` points; before the absolute value the attributions sum to
    score(x) - score(0), up to the quadrature's error.
    """
    from captum.attr import IntegratedGradients

    explainer = IntegratedGradients(_forward(model))
    attributions = explainer.attribute(
        images,
        baselines=0,
        target=targets,
        n_steps=options.steps,
        method="gausslegendre",
        internal_batch_size=options.batch_size,
    )
    return _over_colours(attributions)


def smoothgrad(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Mean of the gradients at noisy copies of the image (Smilkov et al., 2017)."""
    total = torch.zeros_like(images)
    for gradients in _noisy_gradients(model, images, targets, options):
        total += gradients.sum(dim=0)
    return _over_colours(total / options.samples)


def smoothgrad_squared(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Mean of the squared gradients at noisy copies of the image (Hooker et al., 2019)."""
    total = torch.zeros_like(images)
    for gradients in _noisy_gradients(model, images, targets, options):
        total += gradients.square().sum(dim=0)
    return _over_colours(total / options.samples)


def vargrad(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Variance (over the samples, not their n - 1) of the gradients at noisy copies (Adebayo et al., 2018).

    Mean and squared deviations are merged pass by pass (Chan et al., 1979): no difference of two large sums.
    """
    count = 0
    mean, deviations = torch.zeros_like(images), torch.zeros_like(images)
    for gradients in _noisy_gradients(model, images, targets, options):
        new = len(gradients)
        new_mean = gradients.mean(dim=0)
        step = new_mean - mean
        deviations += (gradients - new_mean).square().sum(dim=0) + step.square() * (
            count * new / (count + new)
        )
        mean += step * (new / (count + new))
        count += new
    return _over_colours(deviations / count)


def _forward(model: CalmModel) -> Callable[[Tensor], Tensor]:
    return lambda images: class_scores(model(images))


def _gradients(model: CalmModel, images: Tensor, targets: Tensor) -> Tensor:
    """d score / d x with its sign, in the shape of the images, from Captum."""
    from captum.attr import Saliency

    attributions: Tensor = Saliency(_forward(model)).attribute(
        images.requires_grad_(), target=targets, abs=False
    )
    return attributions.detach()


def _noisy_gradients(
    model: CalmModel, images: Images, targets: Targets, options: Options
) -> Iterator[Float[Tensor, "k b 3 h w"]]:
    """Gradients at noisy copies of the images, k copies a time, ``options.samples`` in all.

    Sample number i has the same unit noise for every image, drawn on the CPU from ``options.seed``: the map
    of an image depends neither on its neighbours, nor on the batch size, nor (up to rounding) on the device.
    """
    generator = torch.Generator().manual_seed(options.seed)
    extent = images.amax(dim=(1, 2, 3), keepdim=True) - images.amin(dim=(1, 2, 3), keepdim=True)
    sigma = options.noise * extent
    at_once = max(1, options.batch_size // len(images))
    for start in range(0, options.samples, at_once):
        copies = range(start, min(start + at_once, options.samples))
        unit = torch.stack(
            [torch.randn(images.shape[1:], generator=generator, dtype=images.dtype) for _ in copies]
        )
        noisy = images + sigma * unit[:, None].to(images.device)
        gradients = _gradients(model, noisy.flatten(0, 1).detach(), targets.repeat(len(copies)))
        yield gradients.view(len(copies), *images.shape)


def _over_colours(attributions: Images) -> Maps:
    """Absolute value, then the maximum over the colour channels."""
    return attributions.detach().abs().amax(dim=1)
