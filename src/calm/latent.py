"""What training minimises: maximum likelihood (CALM-ML), expectation-maximisation (CALM-EM), cross-entropy (CAM).

The CALM losses read one row of the joint, the target's: log p(y, z | x) = log p(y | x, z) + log p(z | x) at the
target y. `calm.fused` makes it; nothing of shape (B, C, h, w) is made here.

**EM and ML learn the same thing (Fisher's identity).** With the posterior q taken from the current parameters, in the
same step and untempered, d/dw of the EM loss = -sum_z q(z) d/dw log joint(z) = -d/dw log sum_z joint(z): the gradient
of the ML loss. The two differ in the loss value that is shown. They learn different things when q comes from elsewhere:
a teacher, or a temperature other than 1 (docs/mathematics.md has the derivation).

Source: paper, section 3 (learning the latent variable model).

The idea of CALM: where the cue is, is a latent variable of the classifier.

Two grids of activations, read from the same features, say everything. ``logits`` f (B, C, h, w) scores the
classes at each location, ``scores`` s (B, 1, h, w) scores the locations. With y a class and z a location:

==================  =====================  ==============================================  ===============
quantity            formula                 in words                                        sums to 1 over
==================  =====================  ==============================================  ===============
conditional         softmax_y f[y, z]       p(y | x, z): the class, if the cue is at z      classes
prior               a(s[z]) / sum_z a(s)    p(z | x): where the cue is                      locations
joint               conditional * prior     p(y, z | x): the attribution map                both together
likelihood          sum_z joint             p(y | x): the prediction                        classes
posterior           joint / likelihood      p(z | x, y): where, given the class             locations
==================  =====================  ==============================================  ===============

All values are mass (a probability per grid cell, not a density per pixel), in natural logarithms, computed in
float32 or wider whatever the dtype of the activations: this module is the one float32 island of the package.

Source: Kim, Choe, Akata, Oh, "Keep CALM and Improve Visual Feature Attribution", ICCV 2021, section 3.
"""

from __future__ import annotations

import math
from typing import get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from calm.config import PriorActivation, PriorDenominator
from calm.errors import CalmError, unknown

__all__ = [
    "PriorActivation",
    "PriorDenominator",
    "check_targets",
    "draw",
    "e_step",
    "em_loss",
    "log_conditional",
    "log_joint",
    "log_likelihood",
    "log_normalizer",
    "log_posterior",
    "log_prior",
    "ml_loss",
    "widen",
]

FLOAT16_MAX = 65504.0
"""Largest finite float16. Activations of more are infinite, and a difference of two such is not a number."""


def widen(values: Tensor) -> Tensor:
    """``values`` in float32, or unchanged where they are wider: the entrance to the float32 island. Infinite float16
    becomes the largest finite one."""
    if values.dtype == torch.float16:
        return values.float().clamp(-FLOAT16_MAX, FLOAT16_MAX)
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def log_normalizer(logits: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """log sum over classes of exp f: what turns logits into the conditional. The only pass over all classes
    that a training loss needs."""
    return torch.logsumexp(widen(logits), dim=1)


def log_conditional(logits: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """log p(y | x, z): the softmax over classes, at each location."""
    return F.log_softmax(widen(logits), dim=1)


def log_prior(
    scores: Float[Tensor, "b 1 h w"],
    activation: PriorActivation = "softplus",
    denominator: PriorDenominator = "differentiated",
) -> Float[Tensor, "b h w"]:
    """log p(z | x): the activated scores, normalised over the locations. The "saliency" of the paper.

    Args:
        scores: one location score per grid cell.
        activation: a in the formula. ``softplus`` is the paper's, ``relu`` the released code's (released weights
            need it), ``exp`` makes the prior a spatial softmax.
        denominator: ``differentiated`` is the exact gradient; ``constant`` treats the sum over locations as a
            constant in the backward pass, as the released code does: the gradient can then only raise scores.

    Returns:
        Log-probabilities whose exponentials sum to 1 over (h, w); -inf where a location has no mass. An image whose
        activations are all 0 (possible with ``relu``) gets the uniform prior, and no gradient to its scores.

    Raises:
        CalmError: an unknown activation or denominator.
    """
    if activation not in _LOG_ACTIVATIONS:
        raise unknown("prior activation", activation, _LOG_ACTIVATIONS)
    if denominator not in get_args(PriorDenominator):
        raise unknown("prior denominator", denominator, get_args(PriorDenominator))
    log_activation = _LOG_ACTIVATIONS[activation](widen(scores).squeeze(1))
    dead = (log_activation == -math.inf).all(dim=(-2, -1), keepdim=True)
    log_activation = torch.where(dead, torch.zeros_like(log_activation), log_activation)
    # Numbers near 0: a float32 beside -10,000 has no place for the logarithm of a number of locations.
    log_activation = log_activation - log_activation.detach().amax(dim=(-2, -1), keepdim=True)
    log_sum = torch.logsumexp(log_activation, dim=(-2, -1), keepdim=True)
    return log_activation - (log_sum.detach() if denominator == "constant" else log_sum)


def log_joint(
    log_conditional: Float[Tensor, "b c h w"], log_prior: Float[Tensor, "b h w"]
) -> Float[Tensor, "b c h w"]:
    """log p(y, z | x) = log p(y | x, z) + log p(z | x): the attribution map of the paper."""
    return log_conditional + log_prior.unsqueeze(1)


def log_likelihood(log_joint: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
    """log p(y | x) = log of the joint's sum over locations: the prediction."""
    return torch.logsumexp(log_joint, dim=(-2, -1))


def log_posterior(log_joint: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """log p(z | x, y) = log p(y, z | x) - log p(y | x): the "ground-truth conditional" of the released code."""
    return log_joint - log_likelihood(log_joint)[..., None, None]


def _log_softplus(scores: Tensor) -> Tensor:
    """log softplus(s). Below -15 by its series s - e^s/2, exact to float64 there, so that it never underflows."""
    far = scores < -15
    near = F.softplus(scores.masked_fill(far, 0.0), threshold=40).log()
    tail = scores.masked_fill(~far, -15.0)
    return torch.where(far, tail - tail.exp() / 2, near)


def _log_relu(scores: Tensor) -> Tensor:
    """log max(s, 0), with -inf and no gradient where s <= 0."""
    off = scores <= 0
    return scores.masked_fill(off, 1.0).log().masked_fill(off, -math.inf)


def _log_exp(scores: Tensor) -> Tensor:
    """log exp(s)."""
    return scores


_LOG_ACTIVATIONS = {"softplus": _log_softplus, "relu": _log_relu, "exp": _log_exp}


def ml_loss(log_joint: Float[Tensor, "*rows h w"]) -> Float[Tensor, "*rows"]:
    """-log p(y | x), in nats, one value per row of the joint. Finite for any finite activations: it never leaves
    log space."""
    return -torch.logsumexp(log_joint, dim=(-2, -1))


@torch.no_grad()
def e_step(log_joint: Float[Tensor, "*rows h w"], temperature: float = 1.0) -> Float[Tensor, "*rows h w"]:
    """q(z), the posterior that the M-step takes as given: proportional to joint ** temperature. No gradient.

    Args:
        log_joint: log p(y, z | x) of the target, from the model in training or from a teacher.
        temperature: the exponent beta. 1 is the published EM; below 1 spreads q over more locations, down to
            0 (every location with mass counts the same); above 1 sharpens it.
    """
    # 0 * -inf is not 0: a location without mass stays without, whatever the temperature.
    tempered = torch.where(log_joint.isneginf(), log_joint, temperature * log_joint)
    # Of numbers near 0: beside -10,000 a float32 has no place for a logarithm of 2, and q would not sum to 1.
    tempered = tempered - tempered.amax(dim=(-2, -1), keepdim=True)
    return (tempered - torch.logsumexp(tempered, dim=(-2, -1), keepdim=True)).exp()


def em_loss(
    posterior: Float[Tensor, "*rows h w"], log_joint: Float[Tensor, "*rows h w"]
) -> Float[Tensor, "*rows"]:
    """The M-step: -sum_z q(z) [log p(y | x, z) + log p(z | x)], in nats, one value per row.

    A location with q(z) = 0 adds nothing to value or gradient, even where its log joint is -inf. Where q (a teacher's)
    has mass and the log joint is -inf the value is infinite, as the formula says.
    """
    unused = posterior == 0
    return -(posterior * log_joint.masked_fill(unused, 0.0)).sum(dim=(-2, -1))


@torch.no_grad()
def draw(posterior: Float[Tensor, "b h w"], samples: int) -> Int[Tensor, "b s"]:
    """Locations of each image (flat indices, in order), drawn from q: their average has the expectation under q.

    Systematic sampling: one random number an image, and equal steps through the cumulative q from there. A location
    with mass q is drawn ``samples * q`` times, rounded up or down; so it varies less than with independent draws
    (measured: benchmarks/README.md). A location without mass is never drawn.
    """
    mass = posterior.flatten(1).double()
    edges = mass.cumsum(dim=1)
    start = torch.rand(len(mass), 1, dtype=torch.float64, device=mass.device)
    steps = (torch.arange(samples, device=mass.device) + start) / samples * edges[:, -1:]
    past = (mass > 0).flip(1).int().argmax(dim=1, keepdim=True)  # locations without mass at the end
    return torch.minimum(torch.searchsorted(edges, steps, right=True), mass.shape[1] - 1 - past)


def check_targets(targets: Tensor, batch: int, classes: int) -> Tensor:
    """The targets of a loss, indices as int64, after a look at their shape and dtype. To look at their range would wait
    for a GPU.

    Raises:
        CalmError: neither a class index for each image nor a row of probabilities.
    """
    soft = targets.is_floating_point()
    if targets.shape != ((batch, classes) if soft else (batch,)):
        raise CalmError(
            f"targets of shape {tuple(targets.shape)} for {batch} images, {targets.dtype}: give a class index for each,"
            f" or a row of {classes} probabilities"
        )
    return targets if soft else targets.long()
