"""Metrics that erase pixels and classify again: remove-and-classify, insertion and deletion.

The order of erasure is one 64-bit integer per pixel: the map's value in the upper half, a random number, different for
each pixel of an image, in the lower half. So pixels of equal value are erased in the image's own random order, and a
constant map erases exactly the random pixels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Unpack, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from calm.config import DRAWS as DRAWS, FRACTIONS as FRACTIONS, Fill as Fill
from calm.errors import CalmError, unknown
from calm.metrics.bootstrap import Bootstrap, BootstrapMetric, Estimate, estimate, estimate_share

FILLS: dict[Fill, str] = {
    "zero": "0 in normalised input, the data set's mean colour (the paper's)",
    "mean": "the image's own mean colour",
    "noise": "normal noise with the image's own mean and standard deviation per channel",
    "blur": "the image blurred by a Gaussian whose standard deviation is a twentieth of its longer side",
}
"""What erased pixels become."""

_LOW = 0xFFFFFFFF


def random_order(keys: Int[Tensor, " b"], pixels: int, seed: int = 0) -> Int[Tensor, "b n"]:
    """Return a random number for each pixel of each image, all those of an image different.

    The result, int64 from 0 to below 2^32, depends on the key (the image's index in its data set) and the lower 32 bits
    of the seed alone: it is the same in any batch, process and device. Two rounds of a bijection of 32-bit numbers (the
    finaliser of MurmurHash3) take the pixel's index to its number. Pixels with larger numbers are erased first.
    """
    indices = torch.arange(pixels, device=keys.device, dtype=torch.int64)
    own = _mix((keys.to(torch.int64) & _LOW) ^ _mix(torch.full_like(keys, seed & _LOW, dtype=torch.int64)))
    other = _mix((own + 0x9E3779B9) & _LOW)
    return _mix(_mix((indices + own[:, None]) & _LOW) ^ other[:, None])


def _mix(bits: Tensor) -> Tensor:
    """Apply MurmurHash3's finaliser, a bijection of the integers from 0 to below 2^32."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _LOW
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _LOW
    return bits ^ (bits >> 16)


def erasing_order(maps: Float[Tensor, "b h w"], random: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return the order in which a map erases pixels, row by row: larger numbers first, no two of an image equal.

    Scores are read as float32; ``random``, the `random_order` of the images, decides between equal ones.

    Raises:
        CalmError: NaN in a map; not one random number per pixel.
    """
    values = maps.flatten(1).float() + 0.0  # -0.0 becomes 0.0
    if values.shape != random.shape:
        raise CalmError(
            f"maps of {tuple(maps.shape)} have {values.shape[1]} pixels, the order {random.shape[1]}: resize the"
            " maps to the images (calm.heatmaps)"
        )
    if bool(values.isnan().any()):
        raise CalmError("a map has NaN: it can not be put in order (calm.normalize makes such maps zero)")
    bits = values.view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats compare like these integers
    return (ascending.long() << 32) | random


def first_pixels(order: Int[Tensor, "b n"], counts: Sequence[int]) -> Bool[Tensor, "k b n"]:
    """Return masks of the first pixels of an order, one for each count; each contains those of smaller counts.

    Raises:
        CalmError: a count below 0 or above the number of pixels.
    """
    pixels = order.shape[1]
    for count in counts:
        if not 0 <= count <= pixels:
            raise CalmError(f"can not erase {count} of {pixels} pixels")
    places = [pixels - count for count in counts]
    inner = sorted({place for place in places if place < pixels})
    if order.device.type == "cpu" and inner:
        # One introselect finds the last pixel of every count, in a fifth of the time of a sort.
        ranked = torch.from_numpy(np.partition(order.numpy(), inner, axis=1))
    else:
        ranked = order.sort(dim=1).values
    masks = torch.zeros(len(counts), *order.shape, dtype=torch.bool, device=order.device)
    for mask, place in zip(masks, places, strict=True):
        if place < pixels:
            torch.ge(order, ranked[:, place, None], out=mask)
    return masks


def filling(
    images: Float[Tensor, "b channels H W"], how: Fill = "zero", *, keys: Int[Tensor, " b"], seed: int = 0
) -> Float[Tensor, "b channels H W"]:
    """Return what erased pixels become (see ``FILLS``), for every pixel of normalised images.

    Noise depends on the seed and the keys, the images' indices in their data set.

    Raises:
        CalmError: an unknown fill.
    """
    if how not in get_args(Fill):
        raise unknown("fill", how, get_args(Fill))
    if how == "zero":
        return torch.zeros_like(images)
    if how == "blur":
        return _blurred(images)
    mean = images.mean(dim=(-2, -1), keepdim=True)
    if how == "mean":
        return mean.expand_as(images)
    drawn = random_order(keys, images[0].numel(), seed ^ 0x5DEECE66).view(images.shape).double()
    normal = torch.special.ndtri((drawn + 0.5) / 2**32).to(images.dtype)
    noisy: Tensor = mean + images.std(dim=(-2, -1), keepdim=True, correction=0) * normal
    return noisy


def _blurred(images: Tensor) -> Tensor:
    """Blur by a Gaussian, as if the border's pixels went on beyond the border."""
    sigma = max(images.shape[-2:]) / 20
    radius = math.ceil(3 * sigma)
    blurred = F.pad(images, (radius, radius, radius, radius), mode="replicate")
    for kernel in ([2 * radius + 1, 1], [1, 2 * radius + 1]):  # a square kernel would take 14 times as long
        blurred = gaussian_blur(blurred, kernel, [sigma, sigma])
    return blurred[..., radius:-radius, radius:-radius]


def erase(
    images: Float[Tensor, "b channels H W"], mask: Bool[Tensor, "b n"], fill: Float[Tensor, "b channels H W"]
) -> Float[Tensor, "b channels H W"]:
    """Return images whose pixels in ``mask`` (row by row) are taken from ``fill``."""
    return torch.where(mask.view(len(images), 1, *images.shape[-2:]), fill, images)


class RemoveAndClassifyResult(NamedTuple):
    """Figures by share of erased pixels, in the order of ``fractions``.

    Attributes:
        fractions: shares of the pixels, in (0, 1].
        ratio: R_k, images that are still right without their highest-scored pixels over images that are still
            right without as many random ones, mean over draws. NaN where no image is right without random ones.
        topk: accuracy without the highest-scored pixels, in [0, 1].
        random: accuracy without random pixels, mean over draws, in [0, 1].
        accuracy: with all pixels.
        ratio_area: mean height of the curve of R_k from 0 (where it is 1) to the largest fraction.
        topk_area: the same of ``topk``, which is ``accuracy`` at 0.
        random_area: the same of ``random``.
    """

    fractions: tuple[float, ...]
    ratio: tuple[Estimate, ...]
    topk: tuple[Estimate, ...]
    random: tuple[Estimate, ...]
    accuracy: Estimate
    ratio_area: Estimate
    topk_area: Estimate
    random_area: Estimate


class RemoveAndClassify(BootstrapMetric):
    """R_k of the paper: accuracy without the k percent highest-scored pixels, over that without k percent random ones.

    Lower is better: 1 means that the map picks pixels no better than chance. Compare methods for one classifier, or
    classifiers of similar accuracy. Erased images are unlike any image that the classifier was trained on, and the
    highest-scored pixels form blobs where random ones are salt and pepper: the ratio mixes relevance with that.

    The random pixels of an image are drawn independently of those of other images. A bootstrap sample of images is
    therefore one of images and draws, and the intervals cover both.

    Args:
        fractions: shares of pixels erased, ascending.
        bootstrap: see `calm.metrics.bootstrap.Bootstrap`.

    Source: paper, section 5.3 (remove-and-classify).
    """

    higher_is_better = False
    right_topk: Tensor
    right_random: Tensor
    right: Tensor
    images: Tensor

    def __init__(self, fractions: Sequence[float] = FRACTIONS, **bootstrap: Unpack[Bootstrap]) -> None:
        super().__init__(**bootstrap)
        self.fractions = check_fractions(fractions)
        self.add_sums("right_topk", len(self.fractions))
        self.add_sums("right_random", len(self.fractions))
        self.add_sums("right")
        self.add_sums("images")

    def update(
        self,
        correct_topk: Bool[Tensor, "b k"] | Float[Tensor, "b k"],
        correct_random: Bool[Tensor, "b k"] | Float[Tensor, "b k"],
        correct: Bool[Tensor, " b"],
        keys: Int[Tensor, " b"],
    ) -> None:
        """Add a batch.

        Args:
            correct_topk: whether each image is classified right without its highest-scored pixels, by fraction; or,
                of several draws, the share of them in which it is.
            correct_random: the same without random pixels.
            correct: the same with all pixels.
            keys: the index of each image in its data set.

        Raises:
            CalmError: not one column per fraction.
        """
        expected = (len(keys), len(self.fractions))
        for name, values in (("correct_topk", correct_topk), ("correct_random", correct_random)):
            if values.shape != expected:
                raise CalmError(f"{name} has shape {tuple(values.shape)}, needed is {expected}: (images, fractions)")
        drawn = self.draw(keys)
        self.right_topk += drawn @ correct_topk.double()
        self.right_random += drawn @ correct_random.double()
        self.right += drawn @ correct.double()
        self.images += drawn.sum(dim=1)

    def compute(self) -> RemoveAndClassifyResult:
        """Return the figures with their intervals.

        Raises:
            CalmError: no image.
        """
        if not self.images[0]:
            raise CalmError("no image was classified: the split is empty")
        ratio = (self.right_topk / self.right_random).where(self.right_random > 0, torch.nan)
        whole = self.right / self.images
        topk, random = self.right_topk / self.images[:, None], self.right_random / self.images[:, None]
        return RemoveAndClassifyResult(
            fractions=self.fractions,
            ratio=_columns(ratio),
            topk=_columns(topk),
            random=_columns(random),
            accuracy=estimate_share(whole, int(self.images[0])),
            ratio_area=estimate(self._height(torch.ones_like(whole), ratio)),
            topk_area=estimate(self._height(whole, topk)),
            random_area=estimate(self._height(whole, random)),
        )

    def _height(self, start: Float[Tensor, " r"], curve: Float[Tensor, "r k"]) -> Float[Tensor, " r"]:
        """Return the mean height of a curve that starts at fraction 0, by trapezoids."""
        at = torch.tensor((0.0, *self.fractions), dtype=torch.float64, device=curve.device)
        return torch.trapezoid(torch.cat([start[:, None], curve], dim=1), at, dim=1) / at[-1]


def _columns(curve: Float[Tensor, "r k"]) -> tuple[Estimate, ...]:
    return tuple(estimate(point) for point in curve.unbind(1))


def check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """Return the fractions as a tuple.

    Raises:
        CalmError: none, one outside (0, 1], or not ascending.
    """
    given = tuple(float(fraction) for fraction in fractions)
    ascending = all(a < b for a, b in itertools.pairwise(given))
    if not given or not ascending or not (given[0] > 0 and given[-1] <= 1):
        raise CalmError(f"fractions are {given}: give ascending shares of the pixels, above 0 and at most 1")
    return given


def insertion_deletion_curves(
    classify: Callable[[Float[Tensor, "b channels H W"]], Float[Tensor, "b c"]],
    images: Float[Tensor, "b channels H W"],
    order: Int[Tensor, "b n"],
    targets: Int[Tensor, " b"],
    *,
    inserted_into: Float[Tensor, "b channels H W"],
    deleted_to: Float[Tensor, "b channels H W"],
    whole: Float[Tensor, "b c"],
    steps: int = 20,
) -> tuple[Float[Tensor, "b s1"], Float[Tensor, "b s1"]]:
    """Return the target's probability after 0, 1/S, ..., 1 of the pixels, highest score first.

    Args:
        classify: p(y | x) of a batch.
        images: normalised input of the model.
        order: `erasing_order` of the maps.
        targets: the class that each map explains.
        inserted_into: where insertion starts, by custom the blurred image (`filling`).
        deleted_to: where deletion ends, by custom zeros.
        whole: p(y | x) of ``images``, the last point of insertion and the first of deletion.
        steps: S; 2 S forward passes of the batch.

    Returns:
        Insertion and deletion, (B, S + 1) each.

    Raises:
        CalmError: fewer than one step.
    """
    if steps < 1:
        raise CalmError(f"steps is {steps}: give 1 or more")
    pixels = order.shape[1]
    masks = first_pixels(order, [round(pixels * step / steps) for step in range(steps + 1)])

    def probability(probs: Tensor) -> Tensor:
        return probs.gather(1, targets[:, None]).squeeze(1)

    full = probability(whole)
    inserted = [probability(classify(erase(inserted_into, mask, images))) for mask in masks[:-1]]
    deleted = [probability(classify(erase(images, mask, deleted_to))) for mask in masks[1:]]
    return torch.stack([*inserted, full], dim=1), torch.stack([full, *deleted], dim=1)


class InsertionDeletionResult(NamedTuple):
    """Mean probability by share of the pixels inserted or deleted (``fractions``, S + 1 from 0 to 1), all in [0, 1].

    Areas are the mean heights of the curves; of insertion higher is better, of deletion lower.
    """

    fractions: tuple[float, ...]
    insertion: tuple[Estimate, ...]
    deletion: tuple[Estimate, ...]
    insertion_area: Estimate
    deletion_area: Estimate


class InsertionDeletion(BootstrapMetric):
    """Area under the insertion and the deletion curve, averaged over images.

    Both depend on the classifier's confidence as well as on the map: compare maps of one classifier. As in
    remove-and-classify, the intermediate images are unlike any that the classifier was trained on.

    Args:
        steps: S of the curves.
        bootstrap: see `calm.metrics.bootstrap.Bootstrap`.

    Source: Petsiuk, Das, Saenko, RISE, 2018, section 4.2.
    """

    curves: Tensor
    images: Tensor

    def __init__(self, steps: int = 20, **bootstrap: Unpack[Bootstrap]) -> None:
        super().__init__(**bootstrap)
        if steps < 1:
            raise CalmError(f"steps is {steps}: give 1 or more")
        self.steps = steps
        self.add_sums("curves", 2, steps + 1)
        self.add_sums("images")

    def update(self, inserted: Float[Tensor, "b s1"], deleted: Float[Tensor, "b s1"], keys: Int[Tensor, " b"]) -> None:
        """Add the curves of a batch (`insertion_deletion_curves`).

        Raises:
            CalmError: another number of steps; NaN or values outside [0, 1].
        """
        both = torch.stack([inserted, deleted], dim=1).double()
        if both.shape[2] != self.steps + 1:
            raise CalmError(f"curves have {both.shape[2]} points, {self.steps} steps have {self.steps + 1}")
        if not bool(((both >= 0) & (both <= 1 + 1e-4)).all()):
            raise CalmError("curves must be probabilities, in [0, 1]")
        drawn = self.draw(keys)
        self.curves += (drawn @ both.flatten(1)).view_as(self.curves)
        self.images += drawn.sum(dim=1)

    def compute(self) -> InsertionDeletionResult:
        """Return the mean curves and their areas.

        Raises:
            CalmError: no image.
        """
        if not self.images[0]:
            raise CalmError("no image was classified: the split is empty")
        mean = self.curves / self.images[:, None, None]
        areas = torch.trapezoid(mean, dx=1 / self.steps, dim=2)
        return InsertionDeletionResult(
            fractions=tuple(step / self.steps for step in range(self.steps + 1)),
            insertion=_columns(mean[:, 0]),
            deletion=_columns(mean[:, 1]),
            insertion_area=estimate(areas[:, 0]),
            deletion_area=estimate(areas[:, 1]),
        )
