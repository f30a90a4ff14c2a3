"""Heatmaps: normalisation, resizing from the grid to pixels, and the place of the peak in words.

Functions take maps of any leading shape, treat each map (the last two axes) separately, and return new tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from calm.errors import unknown
from calm.latent import widen

Normalization: TypeAlias = Literal["max", "minmax", "clipping"]


def normalize(maps: Float[Tensor, "*n h w"], how: Normalization) -> Float[Tensor, "*n h w"]:
    """Normalise maps to [0, 1].

    Args:
        maps: Score maps.
        how: ``minmax`` maps the range of each map to [0, 1]. ``max`` divides by the maximum and clips at 0, so an
            all-negative map is all zeros (the released code divides by the negative maximum and gets all ones).
            ``clipping`` only cuts at 0 and 1; it is for values that are probabilities already.

    Returns:
        Maps in [0, 1], of the same shape. A constant map, which says nothing about the place, and a map with NaN,
        infinite values or an infinite range become zeros.

    Raises:
        CalmError: If the normalisation is unknown.
    """
    if how not in get_args(Normalization):
        raise unknown("normalisation", how, get_args(Normalization))
    values = widen(maps)
    low = values.amin(dim=(-2, -1), keepdim=True)
    high = values.amax(dim=(-2, -1), keepdim=True)
    usable = (high - low).isfinite() & (high > low)
    # In place from the first new tensor on: allocating a tensor of this size takes longer than filling it.
    if how == "clipping":
        scaled = values.clamp(0, 1)
    elif how == "max":
        scaled = values.clamp(min=0).div_(torch.where(high > 0, high, 1.0))
    else:
        scaled = (values - low).div_(torch.where(usable, high - low, 1.0))
    # 0 * NaN and 0 * infinity are NaN; on a CPU this is faster than filling the unusable maps.
    return scaled.mul_(usable.to(scaled)).nan_to_num_(nan=0.0)


def resize_and_normalize(
    maps: Float[Tensor, "*n h w"], size: tuple[int, int], how: Normalization
) -> Float[Tensor, "*n H W"]:
    """Resize maps to ``size`` = (height, width) in pixels, then normalise them, as the protocols require."""
    return normalize(resize_usable(maps, size), how)


def resize_usable(maps: Float[Tensor, "*n h w"], size: tuple[int, int]) -> Float[Tensor, "*n H W"]:
    """Resize maps as `resize_maps` does; a map without information becomes zeros, as in `normalize`.

    That is one with NaN or infinite values, and one that is constant on its grid: interpolation would give it
    differences in the last bit, which ``minmax`` would stretch to [0, 1].
    """
    useless = (maps == maps[..., :1, :1]).flatten(-2).all(dim=-1) | ~maps.isfinite().flatten(-2).all(dim=-1)
    return resize_maps(maps.masked_fill(useless[..., None, None], 0), size)


def resize_maps(maps: Float[Tensor, "*n h w"], size: tuple[int, int]) -> Float[Tensor, "*n H W"]:
    """Resize maps to ``size`` = (height, width) in pixels: bilinear, half-pixel centres, no antialiasing.

    The values keep the unit of the grid (the probability of a grid cell, for CALM's maps): the map on the grid sums to
    p(y | x), the resized map does not. Computed in float32 or wider.

    Source: the protocol of the paper's evaluation (OpenCV's and PyTorch's ``bilinear``, ``align_corners=False``).
    """
    maps = widen(maps)
    if maps.shape[-2:] == size:
        return maps
    resized = F.interpolate(maps.reshape(-1, 1, *maps.shape[-2:]), size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*maps.shape[:-2], *size)


_NINTHS = (("upper left", "top", "upper right"), ("left", "centre", "right"), ("lower left", "bottom", "lower right"))


@dataclass(frozen=True)
class Place:
    """The highest point of a map, and the ninth of the image (in a three by three grid) that contains it.

    Attributes:
        x: The column of the pixel, from 0 at the left.
        y: The row of the pixel, from 0 at the top.
        value: The map's value there, in the map's unit.
        words: The name of the ninth: "upper left", "centre", "bottom", ...
        share: The share of the map's positive mass in that ninth, 0 to 1; 0 for a map without any.
    """

    x: int
    y: int
    value: float
    words: str
    share: float

    def __str__(self) -> str:
        return f"{self.words} ({self.x}, {self.y})"


def locate(values: Float[Tensor, "h w"]) -> Place:
    """Return the place of a map's highest value, the first in reading order if there are several.

    >>> import torch
    >>> values = torch.zeros(90, 90)
    >>> values[80, 10], values[45, 45] = 3, 1
    >>> str(locate(values)), locate(values).share
    ('lower left (10, 80)', 0.75)
    """
    height, width = values.shape
    y, x = divmod(int(values.argmax()), width)
    row, column = 3 * y // height, 3 * x // width
    # All i with 3 * i // length == third, so that the ninths tile the image.
    thirds = ((row, height), (column, width))
    rows, columns = (slice(-(-third * length // 3), -(-(third + 1) * length // 3)) for third, length in thirds)
    total = _mass(values)
    share = _mass(values[rows, columns]) / total if total > 0 else 0.0
    return Place(x, y, float(values[y, x]), _NINTHS[row][column], share)


def _mass(values: Tensor) -> float:
    """Return the sum of the positive values in float64, in parts, since a map may be as large as a photograph."""
    parts = torch.split(values.reshape(-1), 2**22)
    return sum((float(part.clamp(min=0).sum(dtype=torch.float64)) for part in parts), 0.0)
