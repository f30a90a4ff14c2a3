"""The latent variable model of CALM: its probabilities, its two training losses and the E-step, as pure functions.

Where the cue for recognition lies is a latent variable z, one of the h * w locations of the feature grid. A head
reads two activation maps from the same features: ``logits`` f (B, C, h, w) score the classes y at each location,
``scores`` s (B, 1, h, w) score the locations. All follows from them (docs/mathematics.md has the table of quantities).
Values are mass (a probability per grid cell, not a density per pixel) in natural logarithms. They are computed in
float32 or wider whatever the dtype of the activations: this file is where half precision is widened.

**EM and ML learn the same thing (Fisher's identity).** With the posterior q taken from the current parameters, in the
same step and untempered, the gradient of the EM loss is -sum_z q(z) d log joint(z) = -d log sum_z joint(z), which is
the gradient of the ML loss (docs/mathematics.md). It differs with a teacher, or a temperature other than 1.

Source: Kim, Choe, Akata, Oh, "Keep CALM and Improve Visual Feature Attribution", ICCV 2021, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, SupportsIndex, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from calm.config import PriorActivation, PriorDenominator, class_index
from calm.errors import CalmError, shown, unknown

Targets: TypeAlias = Tensor | Sequence[SupportsIndex] | Sequence[Sequence[SupportsIndex]] | SupportsIndex
"""Class indices (B,) or (B, K), or one index for all images."""

NamedTargets: TypeAlias = Targets | str | Sequence[str] | Sequence[Sequence[str]]
"""Class indices, or names as `calm.config.class_index` takes them: (B,), (B, K), or one for all images."""


def widen(values: Tensor) -> Tensor:
    """Return ``values`` in float32, or unchanged if they are float32 or float64.

    Activations beyond the range of float16 are infinite, and infinities cancel to NaN: they become its largest value.
    """
    if values.dtype == torch.float16:
        return values.float().clamp(-65504, 65504)
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def log_conditional(logits: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Return log p(y | x, z), the class if the cue is at z: log-softmax of f over the classes, at each location."""
    return F.log_softmax(widen(logits), dim=1)


def target_log_conditional(logits: Float[Tensor, "b c *grid"], targets: Int[Tensor, " b"]) -> Float[Tensor, b * grid]:
    """Return log p(y | x, z) of each image's target class y alone: cross-entropy at each location."""
    expanded = targets.view(-1, *(1,) * (logits.ndim - 2)).expand(-1, *logits.shape[2:])
    # No class index is ignored; PyTorch's default would give the loss of a target -100 as 0.
    return -F.cross_entropy(widen(logits), expanded, reduction="none", ignore_index=torch.iinfo(torch.int64).min)


def log_prior(
    scores: Float[Tensor, "b 1 h w"],
    activation: PriorActivation = "softplus",
    denominator: PriorDenominator = "differentiated",
) -> Float[Tensor, "b h w"]:
    """Return log p(z | x), where the cue is: a(s) / sum over the locations of a(s).

    Args:
        scores: One location score per grid cell.
        activation: The function a. ``softplus`` is the paper's, ``relu`` the released code's (released
            weights need it), and ``exp`` makes the prior a spatial softmax.
        denominator: ``differentiated`` gives the exact gradient. ``constant`` treats the sum over locations as a
            constant in the backward pass, as the released code does; the gradient can then only raise scores.

    Returns:
        Log-probabilities whose exponentials sum to 1 over (h, w); -inf where a location has no mass. An image whose
        activations are all 0 (possible with ``relu``) gets the uniform prior, and its scores get no gradient.

    Raises:
        CalmError: If the activation or the denominator is unknown.
    """
    if activation not in _LOG_ACTIVATIONS:
        raise unknown("prior activation", activation, _LOG_ACTIVATIONS)
    if denominator not in get_args(PriorDenominator):
        raise unknown("prior denominator", denominator, get_args(PriorDenominator))
    log_activation = _LOG_ACTIVATIONS[activation](widen(scores).squeeze(1))
    dead = (log_activation == -math.inf).all(dim=(-2, -1), keepdim=True)
    log_activation = torch.where(dead, torch.zeros_like(log_activation), log_activation)
    # Shift the maximum to 0: beside -10,000 a float32 has no digits left for the logarithm of a few locations.
    log_activation = log_activation - log_activation.detach().amax(dim=(-2, -1), keepdim=True)
    log_sum = torch.logsumexp(log_activation, dim=(-2, -1), keepdim=True)
    return log_activation - (log_sum.detach() if denominator == "constant" else log_sum)


def log_joint(log_conditional: Float[Tensor, "b c h w"], log_prior: Float[Tensor, "b h w"]) -> Float[Tensor, "b c h w"]:
    """Return log p(y, z | x) = log p(y | x, z) + log p(z | x): the attribution map of the paper."""
    return log_conditional + log_prior.unsqueeze(1)


def log_likelihood(log_joint: Float[Tensor, "*rows h w"]) -> Float[Tensor, "*rows"]:
    """Return log p(y | x) = log sum_z p(y, z | x): the prediction."""
    return torch.logsumexp(log_joint, dim=(-2, -1))


def log_posterior(log_joint: Float[Tensor, "*rows h w"]) -> Float[Tensor, "*rows h w"]:
    """Return log p(z | x, y) = log p(y, z | x) - log p(y | x): where the cue is, given the class."""
    return log_joint - log_likelihood(log_joint)[..., None, None]


def pooled(
    log_conditional: Float[Tensor, "b k h w"], log_prior: Float[Tensor, "b h w"], exponent: float
) -> Float[Tensor, "b k"]:
    """Return the logarithm of the power mean over the locations of p(y | x, z), weighted by p(z | x).

    It is log(sum_z p(z | x) p(y | x, z) ** a) / a, and in the limit of a = 0 sum_z p(z | x) log p(y | x, z), the
    geometric mean. Normalised over the classes it is the prediction (docs/mathematics.md): with a = 1, where it is that
    already, of CALM; with a = 0 and a uniform prior, of CAM.

    Args:
        log_conditional: log p(y | x, z) of K classes. With a = 0 any logits, which differ from it by what all classes
            at a location share, give the same prediction.
        log_prior: log p(z | x).
        exponent: a, from 0 to 1.
    """
    prior = log_prior.exp().unsqueeze(1)
    if exponent == 0:
        return (prior * log_conditional).sum(dim=(-2, -1))
    mean = log_likelihood(exponent * log_conditional + log_prior.unsqueeze(1)) / exponent
    if exponent >= 0.1:
        return mean
    # The mean of p ** a is almost 1, and the division by a enlarges its rounding: sum its distance from the largest.
    peak = log_conditional.detach().amax(dim=(-2, -1), keepdim=True)
    below = (prior * torch.expm1(exponent * (log_conditional - peak))).sum(dim=(-2, -1))
    return torch.where(below < -0.5, mean, peak[..., 0, 0] + torch.log1p(below.clamp(min=-0.5)) / exponent)


def check_exponent(exponent: float) -> None:
    """Raise a `CalmError` if the exponent of a prior is negative or not finite."""
    if not (exponent >= 0 and math.isfinite(exponent)):
        raise CalmError(f"prior_exponent is {exponent:g}: give 0 (a uniform prior), 1 (the model's prior) or any above")


def temper(log_prior: Float[Tensor, "*rows h w"], exponent: float) -> Float[Tensor, "*rows h w"]:
    """Return log of p(z | x) ** exponent, normalised: below 1 it is flatter, above 1 sharper, at 0 uniform.

    A location without probability stays without, whatever the exponent.

    Raises:
        CalmError: See `check_exponent`.
    """
    check_exponent(exponent)
    return _tempered(log_prior, exponent)


def _tempered(log_values: Float[Tensor, "*rows h w"], exponent: float) -> Float[Tensor, "*rows h w"]:
    """Return the logarithm of values ** exponent, normalised over the grid."""
    # 0 * -inf is NaN, but a location without mass stays without, whatever the exponent.
    tempered = torch.where(log_values.isneginf(), log_values, exponent * log_values)
    # Shift the maximum to 0: beside -10,000 a float32 has no digits left for a logarithm of 2: the sum would not be 1.
    return log_posterior(tempered - tempered.amax(dim=(-2, -1), keepdim=True))


EVIDENCE_FLOOR = -30.0
"""Least log p(y | x, z) that `evidence` reads, in nats: 1e-13, below which a float32 softmax is mostly rounding."""


def evidence(log_conditional: Float[Tensor, "b k h w"], log_prior: Float[Tensor, "b h w"]) -> Float[Tensor, "b k h w"]:
    """Return p(z | x) * log p(y | x, z) in nats, the logarithm cut at `EVIDENCE_FLOOR`: 0 or less.

    The difference of two classes is each location's share of the expected log-odds, the sum over the grid:
    E_{z ~ p(z | x)}[log p(y1 | x, z) - log p(y2 | x, z)] (docs/mathematics.md).
    """
    return log_prior.exp().unsqueeze(1) * log_conditional.clamp(min=EVIDENCE_FLOOR)


def _log_softplus(scores: Tensor) -> Tensor:
    """Return log softplus(s). Below -15 it is the series s - e^s/2, exact to float64 there, so it never underflows."""
    far = scores < -15
    near = F.softplus(scores.masked_fill(far, 0.0), threshold=40).log()
    tail = scores.masked_fill(~far, -15.0)
    return torch.where(far, tail - tail.exp() / 2, near)


def _log_relu(scores: Tensor) -> Tensor:
    """Return log max(s, 0): -inf, without a gradient, where s <= 0."""
    off = scores <= 0
    return scores.masked_fill(off, 1.0).log().masked_fill(off, -math.inf)


_LOG_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": _log_softplus,
    "relu": _log_relu,
    "exp": lambda scores: scores,
}


def check_method(method: str, has_e_step_options: bool) -> None:
    """Raise a `CalmError` if there is no such loss, or options of the E-step are given to one without."""
    if method not in ("calm-em", "calm-ml"):
        raise unknown("loss method", method, ("calm-em", "calm-ml"))
    if method == "calm-ml" and has_e_step_options:
        raise CalmError("temperature and teacher belong to the E-step: they need method 'calm-em'")


def ml_loss(log_joint: Float[Tensor, "*rows h w"]) -> Float[Tensor, "*rows"]:
    """Return the CALM-ML loss -log p(y | x), in nats, one value per row of the joint.

    The loss is finite for any finite activations, since it never leaves log space.
    """
    return -log_likelihood(log_joint)


@torch.no_grad()
def e_step(
    log_joint: Float[Tensor, "*rows h w"], temperature: float = 1.0, teacher: Float[Tensor, "*rows h w"] | None = None
) -> Float[Tensor, "*rows h w"]:
    """Return q(z), the posterior that the M-step takes as given: joint ** temperature, normalised. It has no gradient.

    Args:
        log_joint: log p(y, z | x) of the model in training.
        temperature: The exponent beta. 1 is the published EM; a value below 1 spreads q over more locations, down to 0
            (all locations with mass count the same); a value above 1 sharpens q.
        teacher: log p(y, z | x) of the teacher that q is taken from; None takes it from ``log_joint``.
    """
    source = log_joint
    if teacher is not None:
        # A ReLU prior may have no mass where the teacher's has: those locations cannot be taught, and an image without
        # any other location keeps the posterior of its own model.
        teacher = teacher.masked_fill(log_joint.isneginf(), -math.inf)
        without_mass = teacher.isneginf().flatten(-2).all(dim=-1)[..., None, None]
        source = torch.where(without_mass, log_joint, teacher)
    return _tempered(source, temperature).exp()


def em_loss(posterior: Float[Tensor, "*rows h w"], log_joint: Float[Tensor, "*rows h w"]) -> Float[Tensor, "*rows"]:
    """Return the CALM-EM loss of the M-step, -sum_z q(z) log p(y, z | x), in nats, one value per row.

    A location with q(z) = 0 adds nothing to the value or the gradient, even where its log joint is -inf. Where q (of a
    teacher) has mass and the log joint is -inf, the value is infinite, as the formula says.
    """
    unused = posterior == 0
    return -(posterior * log_joint.masked_fill(unused, 0.0)).sum(dim=(-2, -1))


def prior_penalty(log_prior: Float[Tensor, "*rows h w"]) -> Float[Tensor, "*rows"]:
    """Return -mean over z of log p(z | x), in nats: log N, the least, for the uniform prior; infinite for zeros.

    Times lambda it is, up to a constant, minus the logarithm of a symmetric Dirichlet density of p(z | x) with
    concentration 1 + lambda / N: it makes maximum likelihood maximum a posteriori (docs/mathematics.md).
    """
    return -log_prior.mean(dim=(-2, -1))


def check_targets(targets: Tensor, batch: int, classes: int) -> Tensor:
    """Return checked targets of a loss: class indices as int64, soft targets (rows of probabilities) unchanged.

    A GPU asserts the values itself, so that a training step need not wait for it: a wrong value becomes an error of the
    device at its next synchronisation. Elsewhere it is a `CalmError` at once.

    Raises:
        CalmError: If the targets are neither one class index below C per image, nor one row of C probabilities per
            image, at least 0 and with sum 1 (within 0.001; within 0.01 in half precision).
    """
    if not isinstance(targets, Tensor) or targets.dtype == torch.bool or targets.is_complex():
        raise CalmError(f"targets {shown(targets)}: give a tensor of class indices, or of rows of probabilities")
    soft = targets.is_floating_point()
    if targets.shape != ((batch, classes) if soft else (batch,)):
        raise CalmError(
            f"targets of shape {tuple(targets.shape)} for {batch} images, {targets.dtype}: give a class index for each,"
            f" or a row of {classes} probabilities"
        )
    if soft:
        tolerance = 1e-3 if targets.dtype in (torch.float32, torch.float64) else 1e-2
        valid = (targets >= 0).all(dim=1) & ((widen(targets).sum(dim=1) - 1).abs() <= tolerance)
        allowed = "a row of probabilities (at least 0, with sum 1)"
    else:
        targets, allowed = targets.long(), f"a class index from 0 to {classes - 1}"
        valid = (targets >= 0) & (targets < classes)
    try:
        torch._assert_async(valid.all(), f"each target must be {allowed}")
    except RuntimeError:  # at once on a CPU, and where there is no such assertion
        with suppress(RuntimeError):  # within torch.func.vmap, which hides the values
            for image in valid.logical_not().nonzero().flatten()[:1].tolist():
                given = shown(targets[image].tolist())
                raise CalmError(f"target {given} of image {image}: it must be {allowed}") from None
    return targets


def class_indices(targets: Any, names: Sequence[str]) -> Any:
    """Return targets, in which names of classes may stand for their indices (`class_index`), with indices alone.

    Raises:
        CalmError: If there is no such class, or ``names`` is empty as those of the classes are not known.
    """
    if isinstance(targets, str):
        if not names:
            raise CalmError(f"target {targets!r}: this output knows no names of classes: give their indices")
        return class_index(names, targets)
    if isinstance(targets, (list, tuple)):
        return [class_indices(target, names) for target in targets]
    return targets


def check_classes(targets: Any, images: int, classes: int) -> Int[Tensor, " b"] | Int[Tensor, "b k"]:
    """Return class indices (B,) or (B, K) as int64; one index alone becomes that of all images.

    Raises:
        CalmError: If the targets are not class indices below ``classes`` for B = ``images``.
    """
    try:
        tensor = torch.as_tensor(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalmError(f"targets must be class indices, one or a list or a tensor, got {shown(targets)}") from error
    tensor = tensor if tensor.ndim else tensor.expand(images)
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.ndim not in (1, 2):
        raise CalmError(
            f"targets must be class indices of shape (B,) or (B, K), got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    if tensor.shape[0] != images:
        raise CalmError(f"{tensor.shape[0]} targets for {images} images: give one row per image")
    if not torch.compiler.is_compiling():
        wrong = tensor[(tensor < 0) | (tensor >= classes)]
        if len(wrong):
            raise CalmError(f"targets out of range: {int(wrong[0])}, allowed are 0 to {classes - 1}")
    return tensor.long()
