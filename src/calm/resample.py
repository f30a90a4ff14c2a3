"""From the grid to pixels: the only interpolation in the package."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from calm.latent import widen

__all__ = ["resize_maps"]


def resize_maps(maps: Float[Tensor, "*n h w"], size: tuple[int, int]) -> Float[Tensor, "*n H W"]:
    """Resize maps to ``size`` = (height, width) in pixels: bilinear, half-pixel centres, no antialiasing.

    The values keep the unit they have on the grid (the probability of a grid cell, for CALM's maps); a resized map
    therefore does not sum to p(y | x) any more, the grid's does. Computed in float32 or wider.

    Source: the protocol of the paper's evaluation (OpenCV's and PyTorch's ``bilinear``, ``align_corners=False``).
    """
    if maps.shape[-2:] == size:
        return maps
    flat = widen(maps).reshape(-1, 1, *maps.shape[-2:])
    resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return resized.reshape(*maps.shape[:-2], *size)
