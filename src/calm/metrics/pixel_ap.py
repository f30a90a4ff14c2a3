"""PxAP: how well a map's values rank pixels, as the area under the pixel precision-recall curve."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from calm.errors import CalmError, unknown
from calm.metrics.bootstrap import REPLICATES, Estimate, band, estimate, weights
from calm.metrics.cuts import Cuts
from calm.metrics.thresholds import Thresholds, thresholds

__all__ = [
    "COUNTINGS",
    "Counting",
    "PixelAP",
    "PixelAPResult",
    "check_maps",
    "histograms",
    "pixel_edges",
    "precision_recall",
]

Counting = Literal["strict", "released"]
COUNTINGS: tuple[Counting, ...] = ("strict", "released")
"""``strict`` counts every labelled pixel. ``released`` leaves out, as the released evaluator does, every pixel that
scores below the smallest threshold, positives too: recall always reaches 1 and a sparse map is flattered."""


class PixelAPResult(NamedTuple):
    """Area and curve, all in [0, 1].

    Attributes:
        ap: the area.
        thresholds: ascending, (t,).
        precision: share of positives among the pixels that reach each threshold; NaN where none does.
        recall: share of the positives that reach it.
        precision_band: lower and upper ends of the 95 percent intervals of ``precision``, (t,) each.
        recall_band: the same for ``recall``.
    """

    ap: Estimate
    thresholds: tuple[float, ...]
    precision: tuple[float, ...]
    recall: tuple[float, ...]
    precision_band: tuple[tuple[float, ...], tuple[float, ...]]
    recall_band: tuple[tuple[float, ...], tuple[float, ...]]


class PixelAP(Metric):
    """Area under the pixel precision-recall curve, the pixels of all images pooled.

    Higher is better, from 0 to 1; a map without information scores the share of positive pixels. Pooling means
    that values are compared over images: a method whose maps rank the pixels of each image well but are scaled
    differently from image to image is punished for it, and large objects weigh more than small ones.

    Args:
        which: thresholds, see `calm.metrics.thresholds`; 1 is added to them, see `pixel_edges`.
        counting: see ``COUNTINGS``.
        replicates: bootstrap samples of images, for the interval.
        seed: of the bootstrap.

    Source: Choe et al., 2020, section 3.2; the paper's table of cue localization.
    """

    higher_is_better = True
    full_state_update = False
    histogram: Tensor

    def __init__(
        self,
        which: Thresholds | Tensor = "even",
        counting: Counting = "strict",
        *,
        replicates: int = REPLICATES,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if counting not in COUNTINGS:
            raise unknown("counting", counting, COUNTINGS)
        self.counting, self.replicates, self.seed = counting, replicates, seed
        self.cuts = Cuts(pixel_edges(which))
        bins = len(self.cuts) + 1
        zeros = torch.zeros(replicates + 1, bins, 2, dtype=torch.float64)
        self.add_state("histogram", zeros, dist_reduce_fx="sum")

    def update(
        self,
        maps: Float[Tensor, "b h w"],
        positive: Bool[Tensor, "b h w"],
        keys: Int[Tensor, " b"],
        ignore: Bool[Tensor, "b h w"] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            maps: values in [0, 1].
            positive: the object's pixels.
            keys: the index of each image in its data set: which bootstrap samples it is in.
            ignore: pixels that do not count.

        Raises:
            CalmError: a map with NaN or values outside [0, 1], or of another shape than ``positive``; numbers
                of images that differ.
        """
        check_maps(maps, positive, keys, ignore)
        counts = histograms(maps, positive, self.cuts, ignore).double()
        drawn = weights(keys.to(maps.device), self.replicates, self.seed)
        self.histogram += (drawn @ counts.flatten(1)).view_as(self.histogram)

    def compute(self) -> PixelAPResult:
        """The area with its interval, and the curve.

        Raises:
            CalmError: no positive pixel.
        """
        if not self.histogram[0, :, 1].sum():
            raise CalmError("no positive pixel in any image: the masks are empty, or all of them are ignored")
        precision, recall, area = precision_recall(self.histogram, self.counting)
        return PixelAPResult(
            estimate(area),
            tuple(self.cuts.thresholds.tolist()),
            tuple(precision[0].tolist()),
            tuple(recall[0].tolist()),
            band(precision),
            band(recall),
        )


def pixel_edges(which: Thresholds | Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """The thresholds of `calm.metrics.thresholds`, and 1 if they end below it.

    The published evaluator cuts at 1 too: a map that minmax stretched reaches 1 at its peak.
    """
    edges = thresholds(which)
    return edges if edges[-1] == 1 else torch.cat([edges, edges.new_ones(1)])


def check_maps(
    maps: Tensor, truth: Tensor | None, keys: Tensor | None = None, ignore: Tensor | None = None
) -> None:
    """Refuse maps that no threshold in [0, 1] can cut.

    Raises:
        CalmError: a truth that is not boolean; shapes differ; not one key an image; NaN; a value outside [0, 1].
    """
    for what, mask in (("truth", truth), ("pixels to ignore", ignore)):
        if mask is not None and mask.dtype != torch.bool:
            raise CalmError(f"the {what} must be boolean, got {mask.dtype}: such as masks > 0")
    if maps.ndim != 3:
        raise CalmError(f"maps have shape {tuple(maps.shape)}: give (images, height, width)")
    if truth is not None and maps.shape != truth.shape:
        raise CalmError(
            f"maps have shape {tuple(maps.shape)}, the truth {tuple(truth.shape)}: resize the maps (calm.resample)"
        )
    if ignore is not None and ignore.shape != maps.shape:
        raise CalmError(
            f"maps have shape {tuple(maps.shape)}, the pixels to ignore {tuple(ignore.shape)}: one each"
        )
    if keys is not None and keys.shape != maps.shape[:1]:
        raise CalmError(f"{len(maps)} maps and keys of shape {tuple(keys.shape)}: give each image its index")
    if not maps.numel():
        return
    low, high = (float(value) for value in torch.aminmax(maps))
    if not (low >= 0 and high <= 1):
        raise CalmError(
            f"maps must lie in [0, 1], these go from {low:g} to {high:g}: normalise them first (calm.normalize)"
        )


def histograms(
    maps: Float[Tensor, "b h w"],
    positive: Bool[Tensor, "b h w"],
    cuts: Cuts,
    ignore: Bool[Tensor, "b h w"] | None = None,
) -> Int[Tensor, "b t1 2"]:
    """Pixels of each image by the number of thresholds that their score reaches, negative and positive apart."""
    bins = 2 * (len(cuts) + 1)
    place = cuts(maps).mul_(2).add_(positive)
    if ignore is not None:
        place.masked_fill_(ignore, bins)
    rows = torch.arange(len(maps), device=maps.device, dtype=torch.int32).view(-1, 1, 1) * (bins + 1)
    counts = torch.bincount(place.add_(rows).flatten(), minlength=len(maps) * (bins + 1))
    return counts.view(len(maps), bins + 1)[:, :bins].reshape(len(maps), -1, 2)


def precision_recall(
    histogram: Float[Tensor, "*n t1 2"], counting: Counting = "strict"
) -> tuple[Float[Tensor, "*n t"], Float[Tensor, "*n t"], Float[Tensor, "*n"]]:
    """Precision and recall at each threshold, ascending, and the sum of precision times the gain of recall."""
    reached = histogram[..., 1:, :].flip(-2).cumsum(-2).flip(-2)  # at or above each threshold
    positives = reached[..., :1, 1] if counting == "released" else histogram[..., 1].sum(-1, keepdim=True)
    precision, recall = reached[..., 1] / reached.sum(-1), reached[..., 1] / positives
    gain = recall - torch.cat([recall[..., 1:], torch.zeros_like(recall[..., :1])], dim=-1)
    return precision, recall, (torch.nan_to_num(precision) * gain).sum(-1)
