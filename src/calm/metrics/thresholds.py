"""The thresholds at which score maps are cut."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from calm.errors import CalmError, unknown

__all__ = ["Thresholds", "thresholds"]

Thresholds = Literal["even", "log"]


def thresholds(which: Thresholds | Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Ascending thresholds in [0, 1], float64.

    Args:
        which: ``even``: 0, 0.001, ..., 0.999. ``log``: 10^-t for t = 0, 0.007, ... below 7, for maps of small
            probabilities. Or your own, ascending.

    Raises:
        CalmError: an unknown name; own thresholds that do not ascend, or leave [0, 1].

    Source: the paper's evaluation; "even" is that of Choe et al., 2020.
    """
    if isinstance(which, Tensor):
        own = which.double()
        row = own.ndim == 1 and len(own) > 0
        if not row or not bool((own.diff() > 0).all()) or not 0 <= own[0] <= own[-1] <= 1:
            raise CalmError("own thresholds must be a row of ascending numbers from 0 to 1")
        return own
    if which == "even":
        return torch.arange(1000, dtype=torch.float64) / 1000
    if which == "log":
        return 10 ** -(torch.arange(1000, dtype=torch.float64) * 0.007).flip(0)
    raise unknown("thresholds", which, ("even", "log"))
