"""PxAP: how well a map's values rank pixels, as the area under the pixel precision-recall curve.

The thresholds at which score maps are cut.

How many thresholds a score reaches: counted exactly, without a search.

A float32 in [0, 1] is, read as a whole number, in the same order as its value. Its upper bits name a cell so small
that it holds one threshold at most, and one look into a table of the cells tells how many thresholds lie below the
cell; a carry from the lower bits adds the threshold inside it. Comparing a float32 with a float64 threshold is
comparing it with the smallest float32 that is not below the threshold, so nothing is rounded.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchmetrics import Metric

from calm.errors import CalmError, unknown
from calm.metrics.bootstrap import REPLICATES, Estimate, band, estimate, weights

__all__ = [
    "COUNTINGS",
    "Counting",
    "Cuts",
    "PixelAP",
    "PixelAPResult",
    "Thresholds",
    "check_maps",
    "histograms",
    "pixel_edges",
    "precision_recall",
    "thresholds",
]

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


ONE = 0x3F800000
"""The bits of 1.0."""

COARSEST = 20
"""Cells are at most that many bits wide: the count of thresholds needs the bits above."""

LARGEST = 2**16
"""Cells of the largest table; thresholds that would need more are searched."""


class Cuts(nn.Module):
    """Ascending thresholds, ready to be counted.

    Args:
        thresholds: (t,) float64, ascending, in [0, 1].
    """

    thresholds: Tensor
    table: Tensor

    def __init__(self, thresholds: Float[Tensor, " t"]) -> None:
        super().__init__()
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.shift, self.lowest, table = _table(thresholds.cpu())
        self.register_buffer("table", table.to(thresholds.device), persistent=False)

    def __len__(self) -> int:
        return len(self.thresholds)

    def forward(self, scores: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The number of thresholds t with score >= t, int32.

        Args:
            scores: in [0, 1], not checked; compared as they are, whatever their dtype.
        """
        if scores.dtype == torch.float64 or not len(self.table):
            return torch.bucketize(scores.double(), self.thresholds, right=True, out_int32=True)
        bits = scores.detach().float().contiguous().view(torch.int32).clamp(min=self.lowest << self.shift)
        below = self.table.index_select(0, ((bits >> self.shift) - self.lowest).flatten()).view_as(bits)
        return below.add_(bits.bitwise_and_((1 << self.shift) - 1)).bitwise_right_shift_(self.shift)


def _table(thresholds: Float[Tensor, " t"]) -> tuple[int, int, Int[Tensor, " c"]]:
    """Bits of a cell, the lowest cell, and the entries of the cells from there to that of 1.

    An entry is (thresholds below the cell) * 2^bits, and 2^bits - (lower bits of the threshold inside) where there
    is one: adding a score's lower bits to it carries if the score reaches that threshold. The lowest cell is below
    all thresholds but 0, and stands for what is lower still. Without cells if the thresholds lie too close.
    """
    nearest = thresholds.float()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    bits = torch.where(nearest.double() < thresholds, above, nearest).view(torch.int32).long()
    positive = bits[bits > 0]
    zeros = len(bits) - len(positive)
    for shift in range(COARSEST, 0, -1):
        cells = positive >> shift
        lowest = int(cells[0]) - 1 if len(cells) else (ONE >> shift)
        count = (ONE >> shift) - lowest + 1
        if lowest < 0 or count > LARGEST or len(thresholds) >> (30 - shift):
            continue
        if bool((cells.diff() > 0).all()):
            inside = torch.zeros(count, dtype=torch.int64)
            inside[cells - lowest] = 1
            entries = (zeros + inside.cumsum(0) - inside) << shift
            entries[cells - lowest] += (1 << shift) - (positive & ((1 << shift) - 1))
            return shift, lowest, entries.to(torch.int32)
    return 0, 0, torch.zeros(0, dtype=torch.int32)


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
        which: thresholds, see `calm.metrics.pixels`; 1 is added to them, see `pixel_edges`.
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
    """The thresholds of `calm.metrics.pixels`, and 1 if they end below it.

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
            f"maps have shape {tuple(maps.shape)}, the truth {tuple(truth.shape)}: resize the maps (calm.heatmaps)"
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
