"""The paper read slowly: the five quantities, losses and maps by loops over single numbers, in float64.

Independent of the package: nothing here imports it. Everything is written from the formulas, in probability space.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softplus(value: float) -> float:
    """log(1 + e^v), by the two-sided identity that does not overflow."""
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


ACTIVATIONS = {"softplus": softplus, "relu": lambda v: max(v, 0.0), "exp": math.exp}


def prior(scores: Tensor, activation: str) -> Tensor:
    """p(z | x) of scores (B, 1, h, w), as (B, h, w)."""
    out = torch.zeros(scores.shape[0], *scores.shape[2:], dtype=torch.float64)
    for b in range(out.shape[0]):
        values = [ACTIVATIONS[activation](v) for v in scores[b, 0].double().flatten().tolist()]
        total = sum(values)
        masses = [v / total for v in values] if total > 0 else [1 / len(values)] * len(values)
        out[b] = torch.tensor(masses, dtype=torch.float64).view(out.shape[1:])
    return out


def conditional(logits: Tensor) -> Tensor:
    """p(y | x, z) of logits (B, C, h, w)."""
    out = torch.zeros(logits.shape, dtype=torch.float64)
    b_, c_, h_, w_ = logits.shape
    for b in range(b_):
        for i in range(h_):
            for j in range(w_):
                column = logits[b, :, i, j].double().tolist()
                top = max(column)
                powers = [math.exp(v - top) for v in column]
                for c in range(c_):
                    out[b, c, i, j] = powers[c] / sum(powers)
    return out


def joint(logits: Tensor, scores: Tensor, activation: str) -> Tensor:
    """p(y, z | x), (B, C, h, w)."""
    where, what = prior(scores, activation), conditional(logits)
    out = torch.zeros_like(what)
    for b in range(what.shape[0]):
        for c in range(what.shape[1]):
            for i in range(what.shape[2]):
                for j in range(what.shape[3]):
                    out[b, c, i, j] = what[b, c, i, j] * where[b, i, j]
    return out


def likelihood(joint_: Tensor) -> Tensor:
    """p(y | x), (B, C)."""
    out = torch.zeros(joint_.shape[:2], dtype=torch.float64)
    for b in range(joint_.shape[0]):
        for c in range(joint_.shape[1]):
            out[b, c] = sum(joint_[b, c].flatten().tolist())
    return out


def posterior(joint_: Tensor) -> Tensor:
    """p(z | x, y), (B, C, h, w)."""
    total = likelihood(joint_)
    out = torch.zeros_like(joint_)
    for b in range(joint_.shape[0]):
        for c in range(joint_.shape[1]):
            out[b, c] = joint_[b, c] / total[b, c]
    return out


def ml_loss(joint_: Tensor, targets: list[int]) -> float:
    """Mean of -log p(y | x)."""
    total = likelihood(joint_)
    return sum(-math.log(float(total[b, y])) for b, y in enumerate(targets)) / len(targets)


def em_loss(joint_: Tensor, targets: list[int], temperature: float = 1.0, teacher: Tensor | None = None) -> float:
    """Mean of -sum_z q(z) log joint(z), q proportional to teacher ** temperature (teacher: the joint itself)."""
    losses = []
    for b, y in enumerate(targets):
        own = joint_[b, y].flatten().tolist()
        source = (joint_ if teacher is None else teacher)[b, y].flatten().tolist()
        powers = [v**temperature if v > 0 else 0.0 for v in source]
        losses.append(-sum(q / sum(powers) * math.log(v) for q, v in zip(powers, own, strict=True) if q > 0))
    return sum(losses) / len(losses)


def minmax(values: Tensor) -> Tensor:
    """(v - min) / (max - min); zeros for a constant map."""
    low, high = float(values.min()), float(values.max())
    return torch.zeros_like(values) if high == low else (values - low) / (high - low)


def bilinear(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (h, w) to (H, W): bilinear, half-pixel centres, edges held, no antialiasing."""
    h, w = grid.shape
    out = torch.zeros(size, dtype=torch.float64)
    for i in range(size[0]):
        for j in range(size[1]):
            y = max((i + 0.5) * h / size[0] - 0.5, 0.0)
            x = max((j + 0.5) * w / size[1] - 0.5, 0.0)
            y0, x0 = min(int(y), h - 1), min(int(x), w - 1)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            dy, dx = y - y0, x - x0
            top = float(grid[y0, x0]) * (1 - dx) + float(grid[y0, x1]) * dx
            bottom = float(grid[y1, x0]) * (1 - dx) + float(grid[y1, x1]) * dx
            out[i, j] = top * (1 - dy) + bottom * dy
    return out


def pooled(logits: Tensor, scores: Tensor, activation: str, exponent: float) -> Tensor:
    """p(y | x), (B, C): the power mean of the locations' probabilities, weighted by the prior, over its sum."""
    where, what = prior(scores, activation), conditional(logits)
    out = torch.zeros(what.shape[:2], dtype=torch.float64)
    for b in range(out.shape[0]):
        for c in range(out.shape[1]):
            pairs = list(zip(where[b].flatten().tolist(), what[b, c].flatten().tolist(), strict=True))
            if exponent == 0:
                out[b, c] = math.prod(p**weight for weight, p in pairs)
            else:
                out[b, c] = math.fsum(weight * p**exponent for weight, p in pairs) ** (1 / exponent)
    return out / out.sum(dim=1, keepdim=True)


def responsibilities(logits: Tensor, scores: Tensor, activation: str, exponent: float) -> Tensor:
    """p(z | x, y), (B, C, h, w): p(z | x) p(y | x, z) ** exponent, over its sum."""
    mass = prior(scores, activation)[:, None] * conditional(logits) ** exponent
    return mass / mass.sum(dim=(-2, -1), keepdim=True)
