"""The score that baselines explain, and the gradient family of the paper's tables.

Each function explains ``class_scores(model(images))[targets]`` and returns what the published tables show: the absolute
value of the attribution, then the maximum over colour channels. Values are in score units per input unit (gradient,
SmoothGrad), in its square (SmoothGrad-squared, VarGrad), or in score units (the two that multiply by the input).

Gradients come from Captum, but the noise is drawn here: Captum's NoiseTunnel has one standard deviation per batch and
uses the global random numbers, while the paper's noise is a quarter of the range of *each* image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from calm.errors import CalmError
from calm.output import CalmOutput, CamOutput

Images = Float[Tensor, "b 3 h w"]
Targets = Int[Tensor, " b"]
Maps = Float[Tensor, "b h w"]


@dataclass(frozen=True)
class Options:
    """The options of all baselines; `calm.baselines.BASELINES` says which method reads which.

    Attributes:
        steps: Points of the integral of integrated gradients.
        samples: Noisy copies of each image (SmoothGrad, SmoothGrad-squared, VarGrad).
        noise: Standard deviation of the noise, as a share of the image's own range (max - min over its pixels and
            channels, in normalised input units).
        seed: Seed of the noise; the same seed gives the same map.
        batch_size: Most images in one pass through the model; it does not change the result.
        target_layer: The layer that the Grad-CAM family reads, a module of the model or its dotted name; it may return
            a grid (B, D, h, w) or a transformer's tokens (B, T, D). The default, None, is the last feature map.

    Raises:
        CalmError: If a number is out of its range.
    """

    steps: int = 50
    samples: int = 50
    noise: float = 0.25
    seed: int = 0
    batch_size: int = 16
    target_layer: nn.Module | str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "samples", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise CalmError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.noise < math.inf:
            raise CalmError(f"noise must be a number of at least 0, got {self.noise!r}")


def class_scores(output: Any) -> Float[Tensor, "b c"]:
    """Return the score that is explained: the logit (mean over locations of f) for CAM, log p(y | x) for CALM.

    The output of any other classifier is its logits (B, C), or an object whose attribute ``logits`` they are.

    Raises:
        CalmError: If it is something else.

    Source: paper, section 4 (comparison with gradient-based methods).
    """
    if isinstance(output, CalmOutput):
        return output.log_probs
    scores = output.class_scores if isinstance(output, CamOutput) else getattr(output, "logits", output)
    if not isinstance(scores, Tensor) or scores.ndim != 2:
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(output).__name__}"
        raise CalmError(f"a classifier returns logits (B, C), this one returned {found}: wrap it in one that does")
    return scores


def gradient(model: nn.Module, images: Images, targets: Targets, options: Options) -> Maps:
    """Return |d score / d x| (Simonyan et al., 2014)."""
    return _over_colours(_gradients(model, images, targets))


def input_x_gradient(model: nn.Module, images: Images, targets: Targets, options: Options) -> Maps:
    """Return |x * d score / d x| (Shrikumar et al., 2017), x in normalised input units."""
    return _over_colours(images * _gradients(model, images, targets))


def integrated_gradients(model: nn.Module, images: Images, targets: Targets, options: Options) -> Maps:
    """Return |x * mean of the gradients on the straight line from 0 to x| (Sundararajan et al., 2017).

    The baseline 0 is the data set's mean colour, since inputs are normalised. The integral is a Gauss-Legendre
    quadrature of ``options.steps`` points; before the absolute value the attributions sum to score(x) - score(0), up to
    the error of the quadrature.
    """
    from captum.attr import IntegratedGradients

    quadrature = {"n_steps": options.steps, "method": "gausslegendre", "internal_batch_size": options.batch_size}
    explainer = IntegratedGradients(lambda images: class_scores(model(images)))
    return _over_colours(explainer.attribute(images, baselines=0, target=targets, **quadrature))


def smoothgrad(model: nn.Module, images: Images, targets: Targets, options: Options) -> Maps:
    """Return the |mean| of the gradients at noisy copies of the image (Smilkov et al., 2017)."""
    sums = (part.sum(dim=0) for part in _noisy(model, images, targets, options))
    return _over_colours(sum(sums, torch.zeros_like(images)) / options.samples)


def smoothgrad_squared(model: nn.Module, images: Images, targets: Targets, options: Options) -> Maps:
    """Return the mean of the squared gradients at noisy copies of the image (Hooker et al., 2019)."""
    sums = (part.square().sum(dim=0) for part in _noisy(model, images, targets, options))
    return _over_colours(sum(sums, torch.zeros_like(images)) / options.samples)


def vargrad(model: nn.Module, images: Images, targets: Targets, options: Options) -> Maps:
    """Return the variance (division by n, not n - 1) of the gradients at noisy copies (Adebayo et al., 2018)."""
    first, total, squares = None, torch.zeros_like(images), torch.zeros_like(images)
    for part in _noisy(model, images, targets, options):
        # Deviations from one of the gradients: a difference of two large sums would lose digits.
        first = part[0] if first is None else first
        total += (part - first).sum(dim=0)
        squares += (part - first).square().sum(dim=0)
    return _over_colours(squares / options.samples - (total / options.samples).square())


def _gradients(model: nn.Module, images: Images, targets: Targets) -> Images:
    """Return d score / d x with its sign."""
    from captum.attr import Saliency

    explainer = Saliency(lambda images: class_scores(model(images)))
    attributions: Tensor = explainer.attribute(images.detach().requires_grad_(), target=targets, abs=False)
    return attributions.detach()


def _noisy(
    model: nn.Module, images: Images, targets: Targets, options: Options
) -> Iterator[Float[Tensor, "k b 3 h w"]]:
    """Yield gradients at noisy copies of the images, k copies at a time, ``options.samples`` in all.

    Sample number i has the same unit noise for every image, drawn on the CPU from ``options.seed``: so the map of an
    image depends neither on its neighbours, nor on the batch size, nor (up to rounding) on the device.
    """
    generator = torch.Generator().manual_seed(options.seed)
    sigma = options.noise * (images.amax(dim=(1, 2, 3), keepdim=True) - images.amin(dim=(1, 2, 3), keepdim=True))
    at_once = max(1, options.batch_size // len(images))
    for start in range(0, options.samples, at_once):
        copies = range(start, min(start + at_once, options.samples))
        unit = torch.stack([torch.randn(images.shape[1:], generator=generator, dtype=images.dtype) for _ in copies])
        noisy = images + sigma * unit[:, None].to(images.device)
        gradients = _gradients(model, noisy.flatten(0, 1), targets.repeat(len(copies)))
        yield gradients.view(len(copies), *images.shape)


def _over_colours(attributions: Images) -> Maps:
    """Return the largest absolute value over the colour channels."""
    return attributions.detach().abs().amax(dim=1)
