"""Normalisations of a score map before it is thresholded, shown or compared.

Each takes maps of any leading shape, looks at one map (the last two axes) at a time, and returns new tensors.
A constant map says nothing about where, and a NaN or infinite one (or one whose range is) says nothing at all: all
become zeros.
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from calm.errors import unknown
from calm.latent import widen
from calm.resample import resize_maps

__all__ = ["Normalization", "normalize", "resize_and_normalize"]

Normalization: TypeAlias = Literal["max", "minmax", "clipping"]


def normalize(maps: Float[Tensor, "*n h w"], how: Normalization) -> Float[Tensor, "*n h w"]:
    """Bring maps to [0, 1].

    Args:
        maps: score maps, each over its last two axes.
        how: ``minmax`` maps the range of each map to [0, 1]. ``max`` divides by the maximum and clips at 0, so
            an all-negative map is all zeros (the released code divides by the negative maximum and gets all ones).
            ``clipping`` only cuts at 0 and 1: for values that are probabilities already.

    Returns:
        Maps in [0, 1], of the same shape; constant and non-finite maps are zeros.

    Raises:
        CalmError: an unknown normalisation.
    """
    if how not in get_args(Normalization):
        raise unknown("normalisation", how, get_args(Normalization))
    values = widen(maps)
    low = values.amin(dim=(-2, -1), keepdim=True)
    high = values.amax(dim=(-2, -1), keepdim=True)
    usable = (high - low).isfinite() & (high > low)
    # In place, from the first new tensor on: to allocate one of this size takes longer than to fill it.
    if how == "clipping":
        scaled = values.clamp(0, 1)
    elif how == "max":
        scaled = values.clamp(min=0).div_(torch.where(high > 0, high, 1.0))
    else:
        scaled = (values - low).div_(torch.where(usable, high - low, 1.0))
    # Faster on a CPU than to fill the maps that are not usable: 0 times NaN and infinity is NaN.
    return scaled.mul_(usable.to(scaled)).nan_to_num_(nan=0.0)


def resize_and_normalize(
    maps: Float[Tensor, "*n h w"], size: tuple[int, int], how: Normalization
) -> Float[Tensor, "*n H W"]:
    """Maps as protocols compare them: resized to ``size`` = (height, width) in pixels, then normalised.

    A map that is constant on its own grid becomes zeros, as in `normalize`: interpolation would give it differences in
    the last bit, which ``minmax`` would stretch to [0, 1].
    """
    constant = (maps == maps[..., :1, :1]).flatten(-2).all(dim=-1)
    return normalize(resize_maps(maps.masked_fill(constant[..., None, None], 0), size), how)
