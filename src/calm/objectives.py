"""What training minimises: maximum likelihood (CALM-ML), expectation-maximisation (CALM-EM), cross-entropy (CAM).

The CALM losses read one row of the joint, the target's: log p(y, z | x) = log p(y | x, z) + log p(z | x) at the
target y. `calm.target_conditional` makes it; nothing of shape (B, C, h, w) is made here.

**EM and ML learn the same thing (Fisher's identity).** With the posterior q taken from the current parameters, in the
same step and untempered, d/dw of the EM loss = -sum_z q(z) d/dw log joint(z) = -d/dw log sum_z joint(z): the gradient
of the ML loss. The two differ in the loss value that is shown. They learn different things when q comes from elsewhere:
a teacher, or a temperature other than 1 (docs/mathematics.md has the derivation).

Source: paper, section 3 (learning the latent variable model).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm.errors import CalmError

__all__ = ["check_targets", "draw", "e_step", "em_loss", "ml_loss"]


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
