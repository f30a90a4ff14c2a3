"""The Poisson bootstrap: confidence intervals in one pass over the data and in constant memory.

In a bootstrap sample of a large data set the number of times that an image occurs is very nearly Poisson(1)
distributed, independently of the other images. So each metric keeps its sums R + 1 times: once with every image
weighted by 1, which gives the figure itself, and R times with Poisson(1) weights. Nothing about single images is kept,
batches may come in any order, and processes add their sums.

Source: Hanley and MacGibbon, Creating non-parametric bootstrap samples using Poisson frequencies, 2006.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from calm.config import REPLICATES as REPLICATES
from calm.errors import CalmError


class Estimate(NamedTuple):
    """A figure and the ends of its 95 percent interval, in the figure's unit; NaN where undefined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f}-{100 * self.high:.1f})"


def weights(keys: Int[Tensor, " b"], replicates: int, seed: int = 0) -> Float[Tensor, "r b"]:
    """Return how often each image occurs in each bootstrap sample; row 0 is the data set itself, all ones.

    The result, (R + 1, B) float64, whole numbers, depends on seed, key (the image's index in its data set) and
    replicate alone: it is the same in any batch, process and device.

    Raises:
        CalmError: a negative number of replicates.
    """
    if replicates < 0:
        raise CalmError(f"replicates is {replicates}: give 0 (no interval) or more")
    rows = torch.arange(1, replicates + 1, device=keys.device, dtype=torch.int64)
    odd = torch.tensor(_ODD, device=keys.device)  # a tensor, whose products wrap around
    mixed = _mix(_mix(keys.to(torch.int64) + odd * (seed + 1))[None, :] + odd * rows[:, None])
    uniform = ((mixed >> 11) & (2**53 - 1)).double() / 2**53
    draws = torch.bucketize(uniform, _CUMULATIVE.to(keys.device), right=True).double()
    return torch.cat([torch.ones(1, len(keys), dtype=torch.float64, device=keys.device), draws])


def estimate(values: Float[Tensor, " r"]) -> Estimate:
    """Return the estimate of a figure from its value in the data set, first, and in each bootstrap sample.

    Samples in which the figure is undefined (NaN) are left out of the interval.
    """
    (low,), (high,) = band(values[:, None])
    return Estimate(float(values[0]), low, high)


def estimate_share(values: Float[Tensor, " r"], images: int) -> Estimate:
    """Return the estimate of a share of ``images`` images, as `estimate`, but where all or none of them count.

    Then every bootstrap sample is alike, and the interval is Wilson's, whose width shrinks with the number of images.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    found, width = estimate(values), _Z**2 / (images + _Z**2)
    if found.value not in (0, 1) or math.isnan(found.low):
        return found
    return found._replace(low=1 - width) if found.value else found._replace(high=width)


def band(values: Float[Tensor, "r t"]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the lower and upper ends of the 95 percent intervals along a curve, NaN where it is undefined.

    Args:
        values: the curve in the data set, first, and in each bootstrap sample. Undefined points (NaN) are left out.
    """
    drawn = values[1:].double()
    if not len(drawn):
        drawn = torch.full_like(values[:1], torch.nan, dtype=torch.float64)
    ends = torch.tensor([0.025, 0.975], dtype=drawn.dtype, device=drawn.device)
    low, high = torch.nanquantile(drawn, ends, dim=0).masked_fill(values[0].isnan(), torch.nan)
    return tuple(low.tolist()), tuple(high.tolist())


def bootstrap_mean(values: Float[Tensor, " n"], replicates: int = REPLICATES, seed: int = 0) -> Estimate:
    """Return the mean of values and its interval.

    Raises:
        CalmError: no value.
    """
    if not len(values):
        raise CalmError("no value to average")
    drawn = weights(torch.arange(len(values), device=values.device), replicates, seed)
    return estimate((drawn @ values.double()) / drawn.sum(dim=1))


class Bootstrap(TypedDict, total=False):
    """Keyword arguments of every metric.

    Attributes:
        replicates: bootstrap samples of images (of pairs for `CueLocalization`), 1,000 by default; 0: no intervals.
        seed: of the bootstrap, 0 by default.
    """

    replicates: int
    seed: int


class BootstrapMetric(Metric):
    """A metric that keeps its sums once for the data set and once for each bootstrap sample (see `Bootstrap`)."""

    full_state_update = False

    def __init__(self, *, replicates: int = REPLICATES, seed: int = 0) -> None:
        super().__init__()
        self.replicates, self.seed = replicates, seed

    def add_sums(self, name: str, *shape: int) -> None:
        """Add a state of zeros, (R + 1, ``*shape``) float64, which processes add up."""
        self.add_state(name, torch.zeros(self.replicates + 1, *shape, dtype=torch.float64), dist_reduce_fx="sum")

    def draw(self, keys: Int[Tensor, " b"]) -> Float[Tensor, "r b"]:
        """Return the `weights` of images."""
        return weights(keys.to(self.device), self.replicates, self.seed)


_Z = 1.959963984540054  # below which a standard normal variable is in 97.5 percent of cases
_ODD = -7046029254386353131  # 2^64 divided by the golden ratio, as a signed number
_CUMULATIVE = torch.tensor([1 / math.factorial(n) for n in range(21)], dtype=torch.float64).cumsum(0) / math.e


def _mix(bits: Tensor) -> Tensor:
    """Apply the finaliser of splitmix64: each input bit flips each output bit with probability 1/2."""
    bits = (bits ^ _logical_shift(bits, 30)) * -4658895280553007687
    bits = (bits ^ _logical_shift(bits, 27)) * -7723592293110705685
    return bits ^ _logical_shift(bits, 31)


def _logical_shift(bits: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros; the shift of signed integers would copy the sign."""
    return (bits >> by) & ((1 << (64 - by)) - 1)
