"""Which pixels to erase, and what to put in their place.

A pixel's place in the order of erasure is one 64-bit number: the map's value in the upper half, a random number in
the lower half. The random numbers of an image are all different, so there are no ties left to the whims of a sorting
algorithm: pixels of equal value go in the image's own random order. That is also the order of the random erasure it
is compared with, so a map that says nothing (constant) erases exactly the random pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.choices import Fill
from calm.errors import CalmError, unknown

__all__ = ["FILLS", "Fill", "erase", "erasing_order", "filling", "first_pixels", "random_order"]

FILLS: dict[Fill, str] = {
    "zero": "0 in normalised input, the data set's mean colour (the paper's)",
    "mean": "the image's own mean colour",
    "noise": "normal noise with the image's own mean and standard deviation per channel",
    "blur": "the image blurred by a Gaussian whose standard deviation is a twentieth of its longer side",
}
"""What erased pixels become."""

_LOW = 0xFFFFFFFF


def random_order(keys: Int[Tensor, " b"], pixels: int, seed: int = 0) -> Int[Tensor, "b n"]:
    """A random number for each pixel of each image, all those of an image different.

    A pure function of (seed, key): the same in any batch, in any process, on any device. Two rounds of a bijection
    of 32-bit numbers (the finaliser of MurmurHash3) take the pixel's index to its number.

    Args:
        keys: the index of each image in its data set.
        pixels: n, of an image.
        seed: of the order.

    Returns:
        (B, n) int64, from 0 to below 2^32; the pixels with the largest numbers are erased first.
    """
    indices = torch.arange(pixels, device=keys.device, dtype=torch.int64)
    own = _mix((keys.to(torch.int64) & _LOW) ^ _mix(torch.full_like(keys, seed & _LOW, dtype=torch.int64)))
    other = _mix((own + 0x9E3779B9) & _LOW)
    return _mix(_mix((indices + own[:, None]) & _LOW) ^ other[:, None])


def erasing_order(maps: Float[Tensor, "b h w"], random: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """The order in which a map erases pixels, row by row: larger numbers first, no two of an image equal.

    Args:
        maps: scores in any unit; read as float32.
        random: `random_order` of the same images, which decides between equal scores.

    Raises:
        CalmError: NaN in a map; not one random number per pixel.
    """
    values = maps.flatten(1).float() + 0.0  # -0.0 becomes 0.0
    if values.shape != random.shape:
        raise CalmError(
            f"maps of {tuple(maps.shape)} have {values.shape[1]} pixels, the order {random.shape[1]}: resize the"
            " maps to the images (calm.resample)"
        )
    if bool(values.isnan().any()):
        raise CalmError("a map has NaN: it can not be put in order (calm.normalize makes such maps zero)")
    bits = values.view(torch.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats compare like these integers
    return (ascending.long() << 32) | random


def first_pixels(order: Int[Tensor, "b n"], counts: Sequence[int]) -> Bool[Tensor, "k b n"]:
    """Masks of the first pixels of an order, for several counts; each contains those of smaller counts.

    On the CPU one selection (NumPy's introselect) finds the last pixel of every count at once, in a fifth of the
    time of a sort; elsewhere one sort does. From there on, everything is in the mask.

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
        ranked = torch.from_numpy(np.partition(order.numpy(), inner, axis=1))
    else:
        ranked = order.sort(dim=1).values
    masks = torch.zeros(len(counts), *order.shape, dtype=torch.bool, device=order.device)
    for mask, place in zip(masks, places, strict=True):
        if place < pixels:
            torch.ge(order, ranked[:, place, None], out=mask)
    return masks


def filling(
    images: Float[Tensor, "b c H W"], how: Fill = "zero", *, keys: Int[Tensor, " b"], seed: int = 0
) -> Float[Tensor, "b c H W"]:
    """What erased pixels become, for every pixel of normalised images.

    Args:
        images: normalised input of the model.
        how: one of ``FILLS``.
        keys: the index of each image in its data set; with ``seed`` decides the noise.

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


def erase(
    images: Float[Tensor, "b c H W"], mask: Bool[Tensor, "b n"], fill: Float[Tensor, "b c H W"]
) -> Float[Tensor, "b c H W"]:
    """Images with the pixels of ``mask`` (row by row) taken from ``fill``."""
    return torch.where(mask.view(len(images), 1, *images.shape[-2:]), fill, images)


def _blurred(images: Tensor) -> Tensor:
    """Gaussian blur, one axis after the other; beyond the border the border's pixels go on."""
    sigma = max(images.shape[-2:]) / 20
    radius = math.ceil(3 * sigma)
    at = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-((at / sigma) ** 2) / 2)
    kernel = kernel / kernel.sum()
    planes = images.flatten(0, 1).unsqueeze(1)
    padded = F.pad(planes, (radius, radius, radius, radius), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(rows, kernel.view(1, 1, -1, 1)).view_as(images)


def _mix(bits: Tensor) -> Tensor:
    """MurmurHash3's finaliser: a bijection of the numbers from 0 to below 2^32."""
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & _LOW
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & _LOW
    return bits ^ (bits >> 16)
