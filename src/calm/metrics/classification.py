"""Classification metrics with bootstrap intervals, and the rank correlation of maps."""

from __future__ import annotations

from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm.errors import CalmError
from calm.metrics.bootstrap import Bootstrap, BootstrapMetric, Estimate, estimate, estimate_share

BINS = 15
"""Bins of the calibration error."""


class ClassificationResult(NamedTuple):
    """Figures of a classifier.

    Attributes:
        top1: share of images whose most probable class is the label, in [0, 1].
        top5: share of images whose label is among the five most probable classes; 1 with five classes or fewer.
        nll: negative log-likelihood of the label, mean, in nats. Probabilities below 1.2e-38 count as that.
        ece: expected calibration error, in [0, 1].
        bins: share of images, mean confidence and accuracy by confidence, (15, 3); NaN in empty bins. Row i has
            the confidences from i/15 to below (i + 1)/15, the last one also 1.
    """

    top1: Estimate
    top5: Estimate
    nll: Estimate
    ece: Estimate
    bins: Float[Tensor, "15 3"]


class Classification(BootstrapMetric):
    """Top-1, top-5, negative log-likelihood and expected calibration error of p(y | x).

    The figures equal those of torchmetrics' ``MulticlassAccuracy`` (micro) and ``MulticlassCalibrationError``
    (15 bins, l1); the sums also carry the bootstrap samples. With few images the calibration error is biased upward,
    and slightly more so in bootstrap samples: compare intervals, not figures.

    Args:
        bootstrap: see `calm.metrics.bootstrap.Bootstrap`.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, for the calibration error.
    """

    sums: Tensor
    binned: Tensor

    def __init__(self, **bootstrap: Unpack[Bootstrap]) -> None:
        super().__init__(**bootstrap)
        # Columns: images, label is the most probable class, label is among the first five, nll.
        self.add_sums("sums", 4)
        # By bin: images, confidence, right. torchmetrics gives a confidence of exactly 1 a bin of its own, the last.
        self.add_sums("binned", BINS + 1, 3)

    def update(self, probs: Float[Tensor, "b c"], labels: Int[Tensor, " b"], keys: Int[Tensor, " b"]) -> None:
        """Add a batch.

        Args:
            probs: p(y | x); rows sum to 1.
            labels: the right classes.
            keys: the index of each image in its data set.

        Raises:
            CalmError: NaN or values outside [0, 1]; a label that is no class.
        """
        if not len(labels):
            return
        low, high = (float(value) for value in torch.aminmax(probs))
        if not (low >= 0 and high <= 1 + 1e-4):
            raise CalmError(f"probabilities go from {low:g} to {high:g}: give p(y | x), in [0, 1]")
        if not 0 <= int(labels.min()) <= int(labels.max()) < probs.shape[1]:
            raise CalmError(
                f"labels go from {int(labels.min())} to {int(labels.max())}, the classifier has classes 0 to"
                f" {probs.shape[1] - 1}: the data set is not the one it was trained for"
            )
        best = probs.topk(min(5, probs.shape[1]), dim=1)
        hits = best.indices == labels[:, None]
        likelihood = probs.gather(1, labels[:, None]).squeeze(1)
        nll = -likelihood.clamp(min=torch.finfo(torch.float32).tiny).double().log()
        confidence = best.values[:, 0].clamp(max=1)
        edges = torch.linspace(0, 1, BINS + 1, dtype=confidence.dtype, device=confidence.device)
        place = torch.bucketize(confidence, edges, right=True) - 1
        drawn = self.draw(keys)
        ones = torch.ones_like(nll)
        self.sums += drawn @ torch.stack([ones, hits[:, 0], hits.any(dim=1), nll], dim=1).double()
        rows = torch.stack([ones, confidence, hits[:, 0]], dim=1).double()
        spread = torch.zeros(len(labels), BINS + 1, 3, dtype=torch.float64, device=probs.device)
        spread[torch.arange(len(labels), device=probs.device), place] = rows
        self.binned += (drawn @ spread.flatten(1)).view_as(self.binned)

    def compute(self) -> ClassificationResult:
        """Return the figures with their intervals.

        Raises:
            CalmError: no image.
        """
        if not self.sums[0, 0]:
            raise CalmError("no image was classified: the split is empty")
        images = self.sums[:, :1]
        top1, top5, nll = (self.sums[:, 1:] / images).unbind(1)
        ece = (self.binned[..., 2] - self.binned[..., 1]).abs().sum(dim=1) / images.squeeze(1)
        bins = self.binned[0, :BINS].clone()
        bins[-1] += self.binned[0, BINS]
        shares = torch.cat([bins[:, :1] / images[0], bins[:, 1:] / bins[:, :1]], dim=1)
        accuracy = estimate_share(top1, int(images[0]))
        return ClassificationResult(accuracy, estimate(top5), estimate(nll), estimate(ece), shares)


def rank_correlation(first: Float[Tensor, "*n p"], second: Float[Tensor, "*n p"]) -> Float[Tensor, "*n"]:
    """Return Spearman's rank correlation over the last axis, float64, in [-1, 1].

    Equal values share the mean of their ranks. The result is NaN where one of the two rows is constant or has NaN.
    """
    # torchmetrics' spearman_corrcoef sums ranks in int32, which overflows on a 384x384 map that is half zeros.
    one, two = (_centred_ranks(values) for values in (first, second))
    scale = (one.square().sum(-1) * two.square().sum(-1)).sqrt()
    return torch.where(scale > 0, ((one * two).sum(-1) / scale).clamp(-1, 1), torch.nan)


def _centred_ranks(values: Tensor) -> Tensor:
    """Return the ranks less their mean; all are zero for a row with NaN."""
    values = values.double().contiguous()
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values, right=False)
    reached = torch.searchsorted(ordered, values, right=True)
    ranks = (below + reached - 1).double() / 2 - (values.shape[-1] - 1) / 2
    return ranks.masked_fill(values.isnan().any(dim=-1, keepdim=True), 0.0)
