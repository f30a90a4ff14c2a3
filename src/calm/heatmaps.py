"""Heatmaps: normalisation, resizing from the grid to pixels, cells in a region, and the place of the peak in words.

Functions take maps of any leading shape, treat each map (the last two axes) separately, and return new tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from calm.errors import CalmError, shown, unknown
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
    if isinstance(size, int) or len(size) != 2:
        raise CalmError(f"size is {shown(size)}: give (height, width) in pixels")
    maps = widen(maps)
    if maps.shape[-2:] == size:
        return maps
    resized = F.interpolate(maps.reshape(-1, 1, *maps.shape[-2:]), size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*maps.shape[:-2], *size)


Region: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]
"""A rectangle x0, y0, x1, y1 (4,), or one per image (B, 4); or a boolean mask (H, W), or each its own (B, H, W)."""


def cell_coverage(
    region: Region, grid: tuple[int, int], size: tuple[int, int] | None = None
) -> Float[Tensor, "*b h w"]:
    """Return the share of the area of each grid cell that lies in a region: 0 to 1, in float64, on the CPU.

    The cells of a grid are equal tiles of the image, as in `resize_maps`.

    Args:
        region: A `Region`. A rectangle's x grows to the right and y downwards, and its sides are places, not indices:
            the left half of an image is (0, 0, 0.5, 1), its first pixel of 200 x 100 is (0, 0, 1, 1) with ``size``. A
            box whose corner pixels x1, y1 belong to it ends at x1 + 1, y1 + 1. A mask covers the whole image, at any
            resolution.
        grid: (rows, columns).
        size: (height, width) of the image, for a rectangle in pixels; None is for one in fractions of the image.

    Raises:
        CalmError: If the region is of another form, or a rectangle is reversed or leaves the image.

    >>> cell_coverage((0, 0, 0.75, 0.5), grid=(1, 2))
    tensor([[0.5000, 0.2500]], dtype=torch.float64)
    """
    try:
        # Python's floats are float32 to PyTorch, and float64 to NumPy.
        values = (region if isinstance(region, Tensor) else torch.as_tensor(np.asarray(region))).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalmError(f"a region is a rectangle x0, y0, x1, y1 or a boolean mask, got {shown(region)}") from error
    rows, columns = grid
    if values.dtype == torch.bool and values.ndim in (2, 3) and values.numel():
        if size not in (None, values.shape[-2:]):
            raise CalmError(f"size is {size}, but the mask has {tuple(values.shape[-2:])} pixels: leave it out")
        down, across = (torch.arange(length + 1.0, dtype=torch.float64) / length for length in values.shape[-2:])
        down, across = _overlap(down[:-1], down[1:], rows), _overlap(across[:-1], across[1:], columns)
        return torch.einsum("yi,...yx,xj->...ij", down, values.double(), across)
    if values.dtype == torch.bool or values.ndim not in (1, 2) or values.shape[-1] != 4:
        given = f"{values.dtype} of shape {tuple(values.shape)}"
        raise CalmError(f"a region is a rectangle x0, y0, x1, y1 or a boolean mask (H, W), got {given}")
    height, width = size or (1, 1)
    x0, y0, x1, y1 = (values.double() / torch.tensor([width, height, width, height])).unbind(-1)
    ordered = (x0 >= 0) & (x0 <= x1) & (x1 <= 1) & (y0 >= 0) & (y0 <= y1) & (y1 <= 1)
    if not ordered.all():
        inside = f"pixels within {width} x {height}" if size else "fractions of the image; give size= for pixels"
        raise CalmError(f"a rectangle is 0 <= x0 <= x1, 0 <= y0 <= y1 in {inside}: got {shown(values.tolist())}")
    return _overlap(y0, y1, rows).unsqueeze(-1) * _overlap(x0, x1, columns).unsqueeze(-2)


def _overlap(start: Float[Tensor, "*n"], end: Float[Tensor, "*n"], cells: int) -> Float[Tensor, "*n cells"]:
    """Return how much of each of the equal cells of [0, 1] lies in intervals, in cells."""
    edges = torch.arange(cells, dtype=torch.float64)
    start, end = (cells * start).unsqueeze(-1), (cells * end).unsqueeze(-1)
    return (torch.minimum(end, edges + 1) - torch.maximum(start, edges)).clamp(min=0)


NINTHS = (("upper left", "top", "upper right"), ("left", "centre", "right"), ("lower left", "bottom", "lower right"))
"""The words for the ninths of a picture, in three rows."""


def channels_last(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Return whether features of four axes are (B, h, w, D): axes 1 and 2, and not 2 and 3, have the image's shape.

    >>> channels_last((1, 7, 7, 96), (224, 224)), channels_last((1, 96, 7, 7), (224, 224))
    (True, False)
    """
    height, width = size
    first, second = (abs(h * width - w * height) < max(height, width) for h, w in (shape[1:3], shape[2:4]))
    return first and not second


@dataclass(frozen=True)
class Place:
    """The highest point of a map, and the ninth of the image (in a three by three grid) that contains it.

    Attributes:
        x: The column of the pixel, from 0 at the left.
        y: The row of the pixel, from 0 at the top.
        value: The map's value there, in the map's unit.
        words: The name of the ninth: "upper left", "centre", "bottom", ...
        share: The share of the map's positive mass in that ninth, 0 to 1; 0 for a map without any.
        area: The share of the pixels in that ninth, 0 to 1: what a uniform map has there.
    """

    x: int
    y: int
    value: float
    words: str
    share: float
    area: float

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
    total, ninth = _mass(values), values[rows, columns]
    share = _mass(ninth) / total if total > 0 else 0.0
    return Place(x, y, float(values[y, x]), NINTHS[row][column], share, ninth.numel() / values.numel())


def _mass(values: Tensor) -> float:
    """Return the sum of the positive values in float64, in parts, since a map may be as large as a photograph."""
    parts = torch.split(values.reshape(-1), 2**22)
    return sum((float(part.clamp(min=0).sum(dtype=torch.float64)) for part in parts), 0.0)
