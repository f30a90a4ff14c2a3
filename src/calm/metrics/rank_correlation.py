"""Do two maps rank the places alike?"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["rank_correlation"]


def rank_correlation(first: Float[Tensor, "*n p"], second: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    """Spearman's rank correlation over the last axis, float64, in [-1, 1].

    Equal values share the mean of their ranks. NaN where one of the two is constant or has NaN.
    """
    one, two = (_centred_ranks(values) for values in (first, second))
    scale = (one.square().sum(-1) * two.square().sum(-1)).sqrt()
    correlation = (one * two).sum(-1) / scale
    return torch.where(scale > 0, correlation.clamp(-1, 1), torch.nan)


def _centred_ranks(values: Tensor) -> Tensor:
    values = values.double().contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, right=False)
    reached = torch.searchsorted(ordered, values, right=True)
    ranks = (below + reached - 1).double() / 2
    unusable = values.isnan().any(dim=-1, keepdim=True)
    return (ranks - (values.shape[-1] - 1) / 2).masked_fill(unusable, 0.0)
