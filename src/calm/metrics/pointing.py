"""Pointing game and energy inside: where a map's peak and its mass lie."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from calm.errors import CalmError
from calm.metrics.bootstrap import Bootstrap, BootstrapMetric, Estimate, estimate
from calm.metrics.pixels import check_maps


class PointingResult(NamedTuple):
    """Mean over the images that have a true pixel.

    Attributes:
        mean: in [0, 1].
        images: number of images that the mean is over.
        left_out: number of images without a true pixel, which have nothing to find and are not in the mean.
        blank: number of images in the mean whose map is zero everywhere; they count as 0.
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
    """Return whether each map's highest-scored pixel is a true one: float64, in [0, 1].

    Where several pixels share the highest score, the value is the share of them that hit, the expectation of a random
    choice among them. A map of zeros points nowhere and gets 0.

    Args:
        maps: scores, zero or more.
        truth: the object's pixels.
        ignore: True at pixels that cannot be the peak.
        tolerance: distance in pixels at which a true pixel still counts as a hit; 0: the peak itself.
    """
    if ignore is not None:
        maps, truth = maps.masked_fill(ignore, 0), truth & ~ignore
    top = maps.amax(dim=(1, 2), keepdim=True)
    peak = ~(maps - top).to(torch.bool)  # much faster on a CPU than ==
    share = count_pixels(peak & _dilated(truth, tolerance)).double() / count_pixels(peak).clamp(min=1)
    return torch.where(top.flatten() > 0, share, 0.0)


def count_pixels(mask: Bool[Tensor, "b h w"]) -> Int[Tensor, " b"]:
    """Return the number of True pixels of each mask."""
    return mask.view(torch.uint8).sum(dim=(1, 2), dtype=torch.int32)


def energy_inside(
    maps: Float[Tensor, "b h w"], truth: Bool[Tensor, "b h w"], ignore: Bool[Tensor, "b h w"] | None = None
) -> Float[Tensor, " b"]:
    """Return the share of each map's sum that lies at true pixels: float64, in [0, 1]; 0 for a map of zeros.

    Arguments are those of `peak_hits`; scores at ignored pixels are not counted.
    """
    scores = maps if ignore is None else maps.masked_fill(ignore, 0)
    whole = scores.sum(dim=(1, 2), dtype=torch.float64)
    inside = truth.view(torch.uint8).to(scores.dtype).mul_(scores)
    return torch.where(whole > 0, inside.sum(dim=(1, 2), dtype=torch.float64) / whole, 0.0)


class _ImageMean(BootstrapMetric):
    """Mean of a per-image figure, with its bootstrap interval."""

    higher_is_better = True
    sums: Tensor
    counts: Tensor

    def __init__(self, **bootstrap: Unpack[Bootstrap]) -> None:
        super().__init__(**bootstrap)
        self.add_sums("sums", 2)  # sum of the figure, images with a true pixel
        # Images left out, and images with a blank map.
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        maps: Float[Tensor, "b h w"],
        truth: Bool[Tensor, "b h w"],
        keys: Int[Tensor, " b"],
        ignore: Bool[Tensor, "b h w"] | None = None,
    ) -> None:
        """Add a batch, as `calm.metrics.PixelAP.update` does, where ``truth`` is called ``positive``."""
        check_maps(maps, truth, keys, ignore)
        counted = truth if ignore is None else truth & ~ignore
        seen = counted.any(dim=2).any(dim=1)
        scores = maps if ignore is None else maps.masked_fill(ignore, 0)
        figure = self._figure(scores, counted)
        self.sums += self.draw(keys) @ torch.stack([figure * seen, seen.double()], dim=1)
        blank = seen & (scores == 0).all(dim=2).all(dim=1)
        self.counts += torch.stack([(~seen).sum(), blank.sum()]).double()

    def compute(self) -> PointingResult:
        """Return the mean with its interval.

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
        """Return the figure of each image, (b,) float64; ignored pixels are zero in both arguments."""


class PointingGame(_ImageMean):
    """Pointing game: share of images whose highest-scored pixel is a true one.

    Higher is better, from 0 to 1; a map without information scores the mean share of true pixels. The figure depends on
    one pixel per image: it does not measure the map's extent, and any map hits a truth that fills the image.

    Args:
        tolerance: distance in pixels at which a near miss is a hit, see `peak_hits`. The source takes 15.
        bootstrap: see `calm.metrics.bootstrap.Bootstrap`.

    Source: Zhang et al., Top-down Neural Attention by Excitation Backprop, 2018, section 4.1. There the mean is
    over the classes of a data set; here it is over images.
    """

    def __init__(self, *, tolerance: int = 0, **bootstrap: Unpack[Bootstrap]) -> None:
        super().__init__(**bootstrap)
        if tolerance < 0:
            raise CalmError(f"tolerance is {tolerance}: give a radius of 0 pixels or more")
        self.tolerance = tolerance

    def _figure(self, maps: Tensor, truth: Tensor) -> Tensor:
        return peak_hits(maps, truth, tolerance=self.tolerance)


class EnergyInside(_ImageMean):
    """Energy inside: mean share of a map's sum that lies in the truth.

    Higher is better, from 0 to 1; a constant map scores the mean share of true pixels. The figure depends on how the
    maps were normalised (an offset adds mass everywhere), is highest for a map that is a single dot in the truth, and
    does not measure whether the truth is covered.

    Args:
        bootstrap: see `calm.metrics.bootstrap.Bootstrap`.

    Source: Wang et al., Score-CAM, 2020, section 4.3 (energy-based pointing game).
    """

    def _figure(self, maps: Tensor, truth: Tensor) -> Tensor:
        return energy_inside(maps, truth)


def _dilated(truth: Bool[Tensor, "b h w"], radius: int) -> Bool[Tensor, "b h w"]:
    """Return the pixels at most ``radius`` from a true one, by the Euclidean distance of their centres."""
    if not radius:
        return truth
    steps = torch.arange(-radius, radius + 1, device=truth.device)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    near = F.conv2d(truth.float()[:, None], disk[None, None], padding=radius)[:, 0]
    return near > 0.5  # counts of pixels, in float
