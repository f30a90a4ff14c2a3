"""CALM-EM as its formulas are written: every quantity for every class, then the target's row is taken.

From the formulas of the paper (section 3), with the two small numbers of the released code. What the benchmarks call
straightforward; it is nobody's code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["StraightforwardHead", "em_loss"]


def em_loss(logits: Tensor, scores: Tensor, targets: Tensor) -> Tensor:
    """The EM loss, mean over the batch, in nats.

    Args:
        logits: f, (B, C, h, w).
        scores: s, (B, 1, h, w); softplus makes the prior of them.
        targets: class indices (B,).
    """
    activation = F.softplus(scores)
    prior = activation / activation.sum(dim=(-2, -1), keepdim=True)
    conditional = logits.softmax(dim=1)
    joint = conditional * prior
    likelihood = joint.sum(dim=(-2, -1), keepdim=True)
    posterior = (joint / (likelihood + 1e-10)).detach()
    log_joint = logits.log_softmax(dim=1) + prior.clamp(min=1e-8).log()
    image = torch.arange(len(targets), device=targets.device)
    return -(posterior * log_joint)[image, targets].sum(dim=(-2, -1)).mean()


class StraightforwardHead(nn.Module):
    """Two 1x1 convolutions on features (B, D, h, w).

    Args:
        channels: D.
        classes: C.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv_last = nn.Conv2d(channels, classes, 1)
        self.attention = nn.Conv2d(channels, 1, 1)
        nn.init.xavier_uniform_(self.conv_last.weight)
        nn.init.zeros_(self.conv_last.bias)

    def loss(self, features: Tensor, targets: Tensor) -> Tensor:
        """`em_loss` of features."""
        return em_loss(self.conv_last(features), self.attention(features), targets)
