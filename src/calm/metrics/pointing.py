"""Where a map points: its peak and its mass against the truth."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from calm.errors import CalmError
from calm.metrics.bootstrap import REPLICATES, Estimate, estimate, weights
from calm.metrics.pixels import check_maps

__all__ = ["EnergyInside", "PointingGame", "PointingResult", "energy_inside", "peak_hits", "pixels"]


class PointingResult(NamedTuple):
    """Mean over the images that have a true pixel.

    Attributes:
        mean: in [0, 1].
        images: how many images it is the mean of.
        left_out: images without a true pixel: there is nothing to find in them, they are in no mean.
        blank: images among ``images`` whose map is zero everywhere; they count as 0.
    """

    mean: Estimate
    images: int
    left_out: int
    blank: int


def peak_hits(
    maps: Float[Tensor, "b h w"],
    truth: Bool[Tensor, "b h w"],
    ignore: Bool[Tensor, "b h w"] | None = None,
    *,
    tolerance: int = 0,
) -> Float[Tensor, " b"]:
    """Is the highest-scored pixel in the truth? float64, in [0, 1].

    Pixels that share the highest score share the answer: the value is the part of them that hits, which is what a
    random choice among them hits on average. A map of zeros points nowhere and gets 0.

    Args:
        maps: scores, zero or more.
        truth: the object's pixels.
        ignore: pixels that can be no peak.
        tolerance: radius in pixels around the peak in which a true pixel is a hit; 0 is the peak itself.
    """
    if ignore is not None:
        maps, truth = maps.masked_fill(ignore, 0), truth & ~ignore
    top = maps.amax(dim=(1, 2), keepdim=True)
    peak = ~(maps - top).to(torch.bool)  # much faster than to compare
    found = pixels(peak & _grown(truth, tolerance)).double() / pixels(peak).clamp(min=1)
    return torch.where(top.flatten() > 0, found, 0.0)


def pixels(mask: Bool[Tensor, "b h w"]) -> Int[Tensor, " b"]:
    """Number of pixels that are True."""
    return mask.view(torch.uint8).sum(dim=(1, 2), dtype=torch.int32)


def energy_inside(
    maps: Float[Tensor, "b h w"],
    truth: Bool[Tensor, "b h w"],
    ignore: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, " b"]:
    """Share of each map's sum that lies in the truth; float64, in [0, 1]. A map of zeros has none of it there: 0.

    Args:
        maps: scores, zero or more.
        truth: the object's pixels.
        ignore: pixels whose scores do not count.
    """
    scores = maps if ignore is None else maps.masked_fill(ignore, 0)
    whole = scores.sum(dim=(1, 2), dtype=torch.float64)
    shown = truth.view(torch.uint8).to(scores.dtype).mul_(scores)
    return torch.where(whole > 0, shown.sum(dim=(1, 2), dtype=torch.float64) / whole, 0.0)


class _Sums(Metric):
    """Sums of a per-image figure over images, in every bootstrap sample."""

    full_state_update = False
    higher_is_better = True
    sums: Tensor
    counts: Tensor

    def __init__(self, *, replicates: int = REPLICATES, seed: int = 0) -> None:
        super().__init__()
        self.replicates, self.seed = replicates, seed
        # (replicates + 1) by: sum of the figure, images with a true pixel
        self.add_state("sums", torch.zeros(replicates + 1, 2, dtype=torch.float64), dist_reduce_fx="sum")
        # left out, blank
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        maps: Float[Tensor, "b h w"],
        truth: Bool[Tensor, "b h w"],
        keys: Int[Tensor, " b"],
        ignore: Bool[Tensor, "b h w"] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            maps: values in [0, 1].
            truth: the object's pixels.
            keys: the index of each image in its data set: which bootstrap samples it is in.
            ignore: pixels that do not count.

        Raises:
            CalmError: a map with NaN or values outside [0, 1], or of another shape than ``truth``; numbers of
                images that differ.
        """
        check_maps(maps, truth, keys, ignore)
        counted = truth if ignore is None else truth & ~ignore
        seen = counted.any(dim=2).any(dim=1)
        scores = maps if ignore is None else maps.masked_fill(ignore, 0)
        figure = self._figure(scores, counted)
        drawn = weights(keys.to(maps.device), self.replicates, self.seed)
        self.sums += drawn @ torch.stack([figure * seen, seen.double()], dim=1)
        blank = seen & (scores == 0).all(dim=2).all(dim=1)
        self.counts += torch.stack([(~seen).sum(), blank.sum()]).double()

    def compute(self) -> PointingResult:
        """The mean with its interval.

        Raises:
            CalmError: no positive pixel.
        """
        images = self.sums[:, 1]
        if not images[0]:
            raise CalmError("no positive pixel in any image: the truth is empty, or all of it is ignored")
        left_out, blank = (int(count) for count in self.counts)
        return PointingResult(estimate(self.sums[:, 0] / images), int(images[0]), left_out, blank)

    @abstractmethod
    def _figure(self, maps: Tensor, truth: Tensor) -> Tensor:
        """The figure of each image, (b,) float64; ignored pixels are zero in both."""


class PointingGame(_Sums):
    """Pointing game: share of images whose highest-scored pixel lies in the truth.

    Higher is better, from 0 to 1; a map without information scores the truth's mean share of the image. It looks at
    one pixel: it says nothing about the map's extent, and a truth that fills the picture is hit by anything.

    Args:
        tolerance: radius in pixels in which a near miss is a hit, see `peak_hits`. The source takes 15.
        replicates: bootstrap samples of images, for the interval.
        seed: of the bootstrap.

    Source: Zhang et al., Top-down Neural Attention by Excitation Backprop, 2018, section 4.1. There the mean is over
    classes of one data set; here it is over images.
    """

    def __init__(self, *, tolerance: int = 0, replicates: int = REPLICATES, seed: int = 0) -> None:
        super().__init__(replicates=replicates, seed=seed)
        if tolerance < 0:
            raise CalmError(f"tolerance is {tolerance}: give a radius of 0 pixels or more")
        self.tolerance = tolerance

    def _figure(self, maps: Tensor, truth: Tensor) -> Tensor:
        return peak_hits(maps, truth, tolerance=self.tolerance)


class EnergyInside(_Sums):
    """Energy inside: mean share of a map's sum that lies in the truth.

    Higher is better, from 0 to 1; a constant map scores the truth's mean share of the image. It depends on how the
    maps were normalised (an offset adds mass everywhere), rewards maps that are a single dot in the truth, and says
    nothing about whether the truth is covered.

    Args:
        replicates: bootstrap samples of images, for the interval.
        seed: of the bootstrap.

    Source: Wang et al., Score-CAM, 2020, section 4.3 (energy-based pointing game).
    """

    def _figure(self, maps: Tensor, truth: Tensor) -> Tensor:
        return energy_inside(maps, truth)


def _grown(truth: Bool[Tensor, "b h w"], radius: int) -> Bool[Tensor, "b h w"]:
    """Pixels at most ``radius`` from a true one, by Euclidean distance of their centres."""
    if not radius:
        return truth
    steps = torch.arange(-radius, radius + 1, device=truth.device)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    near = F.conv2d(truth.float()[:, None], disk[None, None], padding=radius)[:, 0]
    return near > 0.5  # counts of pixels, in float
