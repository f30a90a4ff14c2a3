"""Normalisations on hand-made maps: values, edges, and nothing edited in place."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from calm.heatmaps import normalize, resize_and_normalize

MAPS = torch.tensor([[[-1.0, 0.0], [1.0, 3.0]]])


@pytest.mark.parametrize(
    ("how", "want"),
    [
        ("minmax", [[0.0, 0.25], [0.5, 1.0]]),
        ("max", [[0.0, 0.0], [1 / 3, 1.0]]),
        ("clipping", [[0.0, 0.0], [1.0, 1.0]]),
    ],
)
def test_normalize_gives_the_values_by_hand(how, want):
    before = MAPS.clone()
    assert_close(normalize(MAPS, how), torch.tensor([want]))
    assert torch.equal(MAPS, before)


@pytest.mark.parametrize("how", ["minmax", "max", "clipping"])
@pytest.mark.parametrize(
    "bad",
    [
        torch.full((2, 2), 0.7),
        torch.tensor([[0.1, math.nan], [0.2, 0.3]]),
        torch.tensor([[0.1, math.inf], [0, 0]]),
        torch.tensor([[-3e38, 3e38], [0, 1]]),
    ],
)
def test_normalize_zeroes_constant_and_non_finite_maps_only(how, bad):
    good = torch.tensor([[0.0, 0.5], [0.25, 1.0]])
    got = normalize(torch.stack([bad, good]), how)
    assert torch.equal(got[0], torch.zeros(2, 2))
    assert_close(got[1], good)


def test_normalize_by_max_of_a_negative_map_is_zeros():
    assert torch.equal(normalize(-torch.rand(1, 3, 3) - 0.1, "max"), torch.zeros(1, 3, 3))


def test_normalize_computes_half_precision_in_float32():
    assert normalize(torch.rand(2, 3, 3).half(), "minmax").dtype == torch.float32


@pytest.mark.parametrize("how", ["minmax", "max", "clipping"])
@pytest.mark.parametrize("side", [5, 6, 7, 12, 14, 28])
def test_resize_and_normalize_keeps_constant_maps_zero(how, side):
    """Interpolation leaves differences in the last bit: 1/144 on a 12x12 grid comes out in two values."""
    maps = torch.stack([torch.full((side, side), 1 / side**2), torch.rand(side, side)])
    got = resize_and_normalize(maps, (224, 224), how)
    assert not got[0].any()
    assert got[1].max() > 0.5
    assert got[1].min() < 0.5


@pytest.mark.parametrize("how", ["minmax", "max", "clipping"])
def test_normalize_passes_gradients(how):
    maps = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda maps: normalize(maps, how), maps)
