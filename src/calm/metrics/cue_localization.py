"""mPxAP: how well the difference of two classes' maps finds the parts in which the classes differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.errors import CalmError, unknown
from calm.metrics.bootstrap import Bootstrap, BootstrapMetric, Estimate, bootstrap_mean
from calm.metrics.pixels import (
    COUNTINGS,
    Bucketize,
    Counting,
    FloatBins,
    Thresholds,
    check_maps,
    pixel_edges,
    precision_recall,
)

Accumulation = Literal["pair", "cumulative"]
ACCUMULATIONS: tuple[Accumulation, ...] = ("pair", "cumulative")
"""``pair`` scores each pair by its own pixels. ``cumulative`` adds the pixels of all pairs with fewer differing groups
and of those before it, as the released code does, which never resets its histogram."""


class CueLocalizationResult(NamedTuple):
    """PxAP of class pairs, in [0, 1].

    Attributes:
        per_pair: of each pair; NaN if no image of the pair shows a differing part, and 0 if its parts have pixels but
            "released" counting leaves all of them out (the released code gets NaN there).
        by_groups: mean over the pairs that differ in this many part groups.
        mean: over all pairs: mPxAP.
        empty: number of pairs of which no image shows a differing part; they are in no mean.
    """

    per_pair: tuple[float, ...]
    by_groups: dict[int, Estimate]
    mean: Estimate
    empty: int


class CueLocalization(BootstrapMetric):
    """Mean over class pairs of the PxAP of their difference maps (mPxAP), with intervals over pairs.

    Higher is better, from 0 to 1. A random map scores the share of pixels of the differing parts, a few percent; a map
    of zeros scores the same with even thresholds and 0 with log ones, which begin above 0. The figure does not say
    whether the classifier can tell the classes apart.

    Args:
        groups: the number of part groups in which each pair differs, (p,).
        which: thresholds, see `calm.metrics.pixels`; 1 is added to them, as for `calm.metrics.PixelAP`. "exact" takes
            every value as a threshold, to one part in 1,024, and maps of any range at or above 0.
        counting: see `calm.metrics.pixels.COUNTINGS`.
        accumulation: see ``ACCUMULATIONS``.
        bootstrap: see `calm.metrics.bootstrap.Bootstrap`.

    Source: paper, section 5.2 and its table of mPxAP.
    """

    higher_is_better = True
    histogram: Tensor

    def __init__(
        self,
        groups: Sequence[int],
        which: Thresholds | Tensor | Literal["exact"] = "even",
        counting: Counting = "strict",
        accumulation: Accumulation = "pair",
        **bootstrap: Unpack[Bootstrap],
    ) -> None:
        super().__init__(**bootstrap)
        if counting not in COUNTINGS:
            raise unknown("counting", counting, COUNTINGS)
        if accumulation not in ACCUMULATIONS:
            raise unknown("accumulation", accumulation, ACCUMULATIONS)
        if not groups:
            raise CalmError("no class pair: give the number of differing part groups of at least one")
        self.groups, self.counting, self.accumulation = tuple(groups), counting, accumulation
        self.bucketize: FloatBins | Bucketize
        if isinstance(which, str) and which == "exact":
            self.highest, self.bucketize = math.inf, FloatBins()
        else:
            self.highest, self.bucketize = 1.0, Bucketize(pixel_edges(which))
        zeros = torch.zeros(len(groups), len(self.bucketize) + 1, 2, dtype=torch.int32)
        self.add_state("histogram", zeros, dist_reduce_fx="sum")

    def update(self, maps: Float[Tensor, "s h w"], positive: Bool[Tensor, "s h w"], pair: Int[Tensor, " s"]) -> None:
        """Add samples, each the map of one image for one pair.

        Args:
            maps: normalised difference maps, in [0, 1]; at least 0 if the thresholds are "exact".
            positive: True at the pixels of the parts that differ.
            pair: index of each sample's pair.

        Raises:
            CalmError: a map with NaN or values outside that range, or of another shape than ``positive``; numbers
                of samples that differ; an index that is no pair's.
        """
        check_maps(maps, positive, pair, highest=self.highest)
        if len(pair) and not 0 <= int(pair.min()) <= int(pair.max()) < len(self.groups):
            raise CalmError(
                f"indices of pairs go from {int(pair.min())} to {int(pair.max())}, allowed are 0 to"
                f" {len(self.groups) - 1}: groups has {len(self.groups)} pairs"
            )
        counts = self.histogram.view(-1)
        first = pair.to(counts.device) * self.histogram[0].numel()
        place = self.bucketize(maps).mul_(2).add_(positive) + first[:, None, None]
        counts.index_add_(0, place.flatten(), counts.new_ones(1).expand(place.numel()))

    def compute(self) -> CueLocalizationResult:
        """Return the figures.

        Raises:
            CalmError: no pair has a positive pixel.
        """
        positives = self.histogram[..., 1].sum(1)
        if not positives.any():
            raise CalmError("no image shows a part that tells a pair of classes apart")
        histogram = self.histogram
        if self.accumulation == "cumulative":
            order = torch.tensor(sorted(range(len(self.groups)), key=lambda pair: self.groups[pair]))
            histogram = torch.empty_like(histogram, dtype=torch.int64)
            histogram[order] = self.histogram[order].cumsum(0)
        # Pair by pair, since the exact thresholds of all of them in float64 would be large.
        per_pair = torch.stack([precision_recall(row.double(), self.counting)[2] for row in histogram])
        per_pair = per_pair.masked_fill(positives == 0, torch.nan)  # in ``cumulative``, others may have some
        groups = torch.tensor(self.groups, device=per_pair.device)
        defined = per_pair.isfinite()

        def mean(chosen: Tensor) -> Estimate:
            return bootstrap_mean(per_pair[chosen & defined], self.replicates, self.seed)

        by_groups = {n: mean(groups == n) for n in sorted(set(groups[defined].tolist()))}
        return CueLocalizationResult(tuple(per_pair.tolist()), by_groups, mean(defined), int((~defined).sum()))
