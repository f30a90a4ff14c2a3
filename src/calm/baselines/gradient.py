"""The score that baselines explain, and the gradient family of the paper's tables, through Captum.

Each function explains ``class_scores(model(images))[targets]`` and returns what the published tables show: the absolute
value of the attribution, then the maximum over colour channels. Values are in score units per input unit (gradient,
SmoothGrad), in its square (SmoothGrad-squared, VarGrad), or in score units (the two that multiply by the input).

SmoothGrad and its kin take their gradients from Captum, but the noise is drawn here: Captum's NoiseTunnel has one
standard deviation per batch and uses the global random numbers, while the paper's noise is a quarter of the range of
*each* image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from calm.model import CalmModel
from calm.output import CalmOutput, CamOutput

Images = Float[Tensor, "b 3 h w"]
Targets = Int[Tensor, " b"]
Maps = Float[Tensor, "b h w"]


@dataclass(frozen=True)
class Options:
    """The options of all baselines; `calm.baselines.BASELINES` says which method reads which.

    Attributes:
        steps: points of the integral of integrated gradients.
        samples: noisy copies of an image (SmoothGrad, SmoothGrad-squared, VarGrad).
        noise: standard deviation of the noise, as a share of the image's own range (max - min over its pixels and
            channels, in normalised input units).
        seed: of the noise.
        batch_size: most images in one pass through the model.
        target_layer: the layer that the Grad-CAM family reads: a module of the model or its dotted name.
    """

    steps: int = 50
    samples: int = 50
    noise: float = 0.25
    seed: int = 0
    batch_size: int = 16
    target_layer: nn.Module | str = "backbone"


def class_scores(output: CalmOutput | CamOutput) -> Float[Tensor, "b c"]:
    """Return the score that is explained: the logit (mean over locations of f) for CAM, log p(y | x) for CALM.

    Source: paper, section 4 (comparison with gradient-based methods).
    """
    return output.class_scores if isinstance(output, CamOutput) else output.log_probs


def gradient(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Return |d score / d x| (Simonyan et al., 2014)."""
    return _over_colours(_gradients(model, images, targets))


def input_x_gradient(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Return |x * d score / d x| (Shrikumar et al., 2017), x in normalised input units."""
    from captum.attr import InputXGradient

    explainer = InputXGradient(_forward(model))
    return _over_colours(explainer.attribute(images.requires_grad_(), target=targets))


def integrated_gradients(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Return |x * mean of the gradients on the straight line from 0 to x| (Sundararajan et al., 2017).

    The baseline 0 is the data set's mean colour, since inputs are normalised. The integral is a Gauss-Legendre
    quadrature of ``options.steps`` points; before the absolute value the attributions sum to score(x) - score(0), up to
    the error of the quadrature.
    """
    from captum.attr import IntegratedGradients

    quadrature = {"n_steps": options.steps, "method": "gausslegendre", "internal_batch_size": options.batch_size}
    explainer = IntegratedGradients(_forward(model))
    return _over_colours(explainer.attribute(images, baselines=0, target=targets, **quadrature))


def smoothgrad(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Return the |mean| of the gradients at noisy copies of the image (Smilkov et al., 2017)."""
    return _mean_over_noise(model, images, targets, options, lambda gradients: gradients)


def smoothgrad_squared(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Return the mean of the squared gradients at noisy copies of the image (Hooker et al., 2019)."""
    return _mean_over_noise(model, images, targets, options, torch.square)


def vargrad(model: CalmModel, images: Images, targets: Targets, options: Options) -> Maps:
    """Return the variance (division by n, not n - 1) of the gradients at noisy copies (Adebayo et al., 2018).

    Mean and squared deviations are merged pass by pass (Chan et al., 1979), as a difference of two large sums would
    lose digits.
    """
    count = 0
    mean, deviations = torch.zeros_like(images), torch.zeros_like(images)
    for gradients in _noisy_gradients(model, images, targets, options):
        new = len(gradients)
        new_mean = gradients.mean(dim=0)
        step = new_mean - mean
        deviations += (gradients - new_mean).square().sum(dim=0) + step.square() * (count * new / (count + new))
        mean += step * (new / (count + new))
        count += new
    return _over_colours(deviations / count)


def _forward(model: CalmModel) -> Callable[[Tensor], Tensor]:
    return lambda images: class_scores(model(images))


def _gradients(model: CalmModel, images: Tensor, targets: Tensor) -> Tensor:
    """d score / d x with its sign, (B, 3, H, W), from Captum."""
    from captum.attr import Saliency

    attributions: Tensor = Saliency(_forward(model)).attribute(images.requires_grad_(), target=targets, abs=False)
    return attributions.detach()


def _mean_over_noise(
    model: CalmModel, images: Images, targets: Targets, options: Options, of: Callable[[Tensor], Tensor]
) -> Maps:
    """The mean, over the noisy copies, of a function of the gradients."""
    total = torch.zeros_like(images)
    for gradients in _noisy_gradients(model, images, targets, options):
        total += of(gradients).sum(dim=0)
    return _over_colours(total / options.samples)


def _noisy_gradients(
    model: CalmModel, images: Images, targets: Targets, options: Options
) -> Iterator[Float[Tensor, "k b 3 h w"]]:
    """Yield gradients at noisy copies of the images, k copies at a time, ``options.samples`` in all.

    Sample number i has the same unit noise for every image, drawn on the CPU from ``options.seed``: so the map of an
    image depends neither on its neighbours, nor on the batch size, nor (up to rounding) on the device.
    """
    generator = torch.Generator().manual_seed(options.seed)
    extent = images.amax(dim=(1, 2, 3), keepdim=True) - images.amin(dim=(1, 2, 3), keepdim=True)
    sigma = options.noise * extent
    at_once = max(1, options.batch_size // len(images))
    for start in range(0, options.samples, at_once):
        copies = range(start, min(start + at_once, options.samples))
        unit = torch.stack([torch.randn(images.shape[1:], generator=generator, dtype=images.dtype) for _ in copies])
        noisy = images + sigma * unit[:, None].to(images.device)
        gradients = _gradients(model, noisy.flatten(0, 1).detach(), targets.repeat(len(copies)))
        yield gradients.view(len(copies), *images.shape)


def _over_colours(attributions: Images) -> Maps:
    """Absolute value, then the maximum over the colour channels."""
    return attributions.detach().abs().amax(dim=1)
