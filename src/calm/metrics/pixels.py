"""Pixel average precision (PxAP): how well map values separate object pixels from the others, over all images."""

from __future__ import annotations

from typing import Literal, NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from calm.errors import CalmError, unknown
from calm.metrics.bootstrap import Bootstrap, BootstrapMetric, Estimate, band, estimate

Thresholds = Literal["even", "log"]

Counting = Literal["strict", "released"]
COUNTINGS: tuple[Counting, ...] = ("strict", "released")
"""``strict`` counts every labelled pixel. ``released`` leaves out, as the released evaluator does, every pixel that
scores below the smallest threshold, positives too: recall always reaches 1, which flatters sparse maps. In both, the
area is 0 where there are positive pixels but none of them is counted at any threshold."""


def thresholds(which: Thresholds | Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Return ascending thresholds in [0, 1], float64.

    Args:
        which: ``even``: 0, 0.001, ..., 0.999. ``log``: 10^-t for t = 0, 0.007, ... below 7, for maps of small
            probabilities. Or a tensor of ascending thresholds, which is checked and returned.

    Raises:
        CalmError: an unknown name; thresholds that do not ascend, or that leave [0, 1].

    Source: the paper's evaluation; "even" is that of Choe et al., 2020.
    """
    if isinstance(which, Tensor):
        given = which.double()
        row = given.ndim == 1 and len(given) > 0
        if not row or not bool((given.diff() > 0).all()) or not 0 <= given[0] <= given[-1] <= 1:
            raise CalmError("own thresholds must be a row of ascending numbers from 0 to 1")
        return given
    if which == "even":
        return torch.arange(1000, dtype=torch.float64) / 1000
    if which == "log":
        return 10 ** -(torch.arange(1000, dtype=torch.float64) * 0.007).flip(0)
    raise unknown("thresholds", which, ("even", "log"))


def pixel_edges(which: Thresholds | Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Return the thresholds of the pixel precision-recall curve: those of `thresholds`, and 1 if they end below it.

    The published evaluator has 1 as its last threshold too: a map normalised by ``minmax`` reaches 1 at its peak.
    """
    edges = thresholds(which)
    return edges if edges[-1] == 1 else torch.cat([edges, edges.new_ones(1)])


class Bucketize(nn.Module):
    """``torch.bucketize(scores, thresholds, right=True)`` for scores in [0, 1], by a table: about 20 times as fast.

    The bits of a float32 in [0, 1], read as an integer, ascend with its value. Their upper bits number cells that hold
    at most one threshold each; a table says how many thresholds lie below a cell, and one comparison decides about the
    threshold inside it. A float32 reaches a float64 threshold if it reaches the smallest float32 that is not below that
    threshold, so results are exact. Thresholds too close for a small table, and float64 scores, are searched.
    """

    thresholds: Tensor
    edges: Tensor
    table: Tensor

    def __init__(self, thresholds: Float[Tensor, " t"]) -> None:
        super().__init__()
        nearest = thresholds.float()
        above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
        edges = torch.where(nearest.double() < thresholds, above, nearest)
        bits, one = edges.view(torch.int32), torch.ones((), dtype=torch.float32).view(torch.int32)
        # From the largest cells on; a table of the smallest tried has 130,000 entries.
        fitting = (shift for shift in range(20, 12, -1) if bool(((bits >> shift).diff() > 0).all()))
        self.shift = next(fitting, None)
        table = torch.zeros(0, dtype=torch.int32)
        if self.shift is not None:
            cells = torch.arange(int(one >> self.shift) + 1, dtype=torch.int32, device=bits.device)
            table = torch.searchsorted(bits >> self.shift, cells, out_int32=True)
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.register_buffer("edges", torch.cat([edges, edges.new_full((1,), torch.inf)]), persistent=False)
        self.register_buffer("table", table, persistent=False)

    def __len__(self) -> int:
        return len(self.thresholds)

    def forward(self, scores: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Return the number of thresholds t with score >= t, int32; scores, in [0, 1], are not checked."""
        if scores.dtype == torch.float64 or self.shift is None:
            return torch.bucketize(scores.double(), self.thresholds, right=True, out_int32=True)
        values = scores.detach().float().contiguous().flatten()
        cells = values.view(torch.int32).clamp(min=0).bitwise_right_shift_(self.shift)  # at least 0: -0.0 is 0
        below = self.table.index_select(0, cells)
        return below.add_(values >= self.edges.index_select(0, below)).view(scores.shape)


class FloatBins(nn.Module):
    """Thresholds 1,024 to an octave from 2^-64 to 2^32, and 0: nearly every distinct value.

    They are for maps of any range at or above 0, and an alternative to `Bucketize`: the upper bits of a float32 number
    them. Higher scores reach the last one, lower ones than 2^-64 only the first, which is 0.
    """

    _SHIFT, _LOWEST, _HIGHEST = 13, (127 - 64) << 10, (127 + 32) << 10

    def __len__(self) -> int:
        return self._HIGHEST - self._LOWEST

    def forward(self, scores: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Return the number of thresholds t with score >= t, int32; scores, at least 0, are not checked."""
        bits = scores.detach().float().contiguous().view(torch.int32) >> self._SHIFT
        return bits.sub_(self._LOWEST).clamp_(0, len(self) - 1).add_(1)


class PixelAPResult(NamedTuple):
    """Area and curve, all in [0, 1].

    Attributes:
        ap: the area under the curve.
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


class PixelAP(BootstrapMetric):
    """Area under the pixel precision-recall curve, with the pixels of all images pooled.

    Higher is better, from 0 to 1; a map without information scores the share of positive pixels. Since pixels are
    pooled, values are compared across images: a method that ranks the pixels of each image well but scales its maps
    differently from image to image scores low, and large objects weigh more than small ones.

    Args:
        which: thresholds, see `thresholds`; 1 is added to them, see `pixel_edges`.
        counting: see ``COUNTINGS``.
        bootstrap: see `calm.metrics.bootstrap.Bootstrap`.

    Source: Choe et al., 2020, section 3.2; the paper's table of cue localization.
    """

    higher_is_better = True
    histogram: Tensor

    def __init__(
        self, which: Thresholds | Tensor = "even", counting: Counting = "strict", **bootstrap: Unpack[Bootstrap]
    ) -> None:
        super().__init__(**bootstrap)
        if counting not in COUNTINGS:
            raise unknown("counting", counting, COUNTINGS)
        self.counting = counting
        self.bucketize = Bucketize(pixel_edges(which))
        self.add_sums("histogram", len(self.bucketize) + 1, 2)
        self.latest = torch.empty(0)
        """(b, t + 1, 2) `histograms` of each image of the last batch."""

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
            positive: True at the object's pixels.
            keys: the index of each image in its data set, which decides in which bootstrap samples it is.
            ignore: True at pixels that are not counted.

        Raises:
            CalmError: see `check_maps`.
        """
        check_maps(maps, positive, keys, ignore)
        self.latest = histograms(maps, positive, self.bucketize, ignore).double()
        self.histogram += (self.draw(keys) @ self.latest.flatten(1)).view_as(self.histogram)

    def compute(self) -> PixelAPResult:
        """Return the area with its interval, and the curve.

        Raises:
            CalmError: no image has a positive pixel.
        """
        if not self.histogram[0, :, 1].sum():
            raise CalmError("no positive pixel in any image: the masks are empty, or all of them are ignored")
        precision, recall, area = precision_recall(self.histogram, self.counting)
        return PixelAPResult(
            estimate(area),
            tuple(self.bucketize.thresholds.tolist()),
            tuple(precision[0].tolist()),
            tuple(recall[0].tolist()),
            band(precision),
            band(recall),
        )


def check_maps(
    maps: Tensor, truth: Tensor | None, keys: Tensor | None = None, ignore: Tensor | None = None, highest: float = 1
) -> None:
    """Check the arguments of a metric of maps.

    Raises:
        CalmError: a truth that is not boolean; shapes differ; not one key an image; NaN; a value outside [0, highest].
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
        raise CalmError(f"maps have shape {tuple(maps.shape)}, the pixels to ignore {tuple(ignore.shape)}: one each")
    if keys is not None and keys.shape != maps.shape[:1]:
        raise CalmError(f"{len(maps)} maps and keys of shape {tuple(keys.shape)}: give each image its index")
    if not maps.numel():
        return
    low, high = (float(value) for value in torch.aminmax(maps))
    if not (low >= 0 and high <= highest):
        raise CalmError(
            f"maps must lie in [0, {highest:g}], these go from {low:g} to {high:g}: normalise them first"
            " (calm.normalize)"
        )


def histograms(
    maps: Float[Tensor, "b h w"],
    positive: Bool[Tensor, "b h w"],
    bucketize: Bucketize,
    ignore: Bool[Tensor, "b h w"] | None = None,
) -> Int[Tensor, "b t1 2"]:
    """Count the pixels of each image by the number of thresholds that they reach, negative and positive ones apart."""
    bins = 2 * (len(bucketize) + 1)
    place = bucketize(maps).mul_(2).add_(positive)
    if ignore is not None:
        place.masked_fill_(ignore, bins)
    rows = torch.arange(len(maps), device=maps.device, dtype=torch.int32).view(-1, 1, 1) * (bins + 1)
    counts = torch.bincount(place.add_(rows).flatten(), minlength=len(maps) * (bins + 1))
    return counts.view(len(maps), bins + 1)[:, :bins].reshape(len(maps), -1, 2)


def precision_recall(
    histogram: Float[Tensor, "*n t1 2"], counting: Counting = "strict"
) -> tuple[Float[Tensor, "*n t"], Float[Tensor, "*n t"], Float[Tensor, "*n"]]:
    """Return precision and recall at each threshold, ascending, and the area: sum of precision times gain of recall.

    Recall and area are NaN without a positive pixel, and 0 where there are positives but none is counted.
    """
    reached = histogram[..., 1:, :].flip(-2).cumsum(-2).flip(-2)  # at or above each threshold
    labelled = histogram[..., 1].sum(-1, keepdim=True)
    positives = reached[..., :1, 1] if counting == "released" else labelled
    precision, recall = reached[..., 1] / reached.sum(-1), reached[..., 1] / positives
    recall = recall.where((positives > 0) | (labelled == 0), 0.0)
    gain = recall - torch.cat([recall[..., 1:], torch.zeros_like(recall[..., :1])], dim=-1)
    return precision, recall, (torch.nan_to_num(precision) * gain).sum(-1)
