"""Normalisations on hand-made maps: values, edges, and nothing edited in place."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from calm.errors import CalmError
from calm.heatmaps import cell_coverage, normalize, resize_and_normalize, resize_maps

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


@pytest.mark.parametrize("size", [24, (24,)])
def test_resize_maps_refuses_a_size_that_is_no_pair(size):
    unchecked = inspect.unwrap(resize_maps)  # of the types that only our tests enforce
    with pytest.raises(CalmError, match=r"size is .*24.*: give \(height, width\)"):
        unchecked(torch.zeros(1, 2, 2), size)


def test_cell_coverage_of_fractions_is_in_float64():
    assert float(cell_coverage((0, 0, 0.6, 1), (1, 5))[0, 3]) < 1e-15


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))
def test_cell_coverage_of_rectangles_and_masks_counts_points(data, rows, columns, height, width):
    """Against counting: in the common refinement of grid and pixels, each small tile is inside or outside."""
    x0, x1 = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2)))
    y0, y1 = sorted(data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2)))
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    tiles = inside.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    want = tiles.double().view(rows, height, columns, width).mean((1, 3))
    assert_close(cell_coverage((x0, y0, x1, y1), (rows, columns), (height, width)), want)
    assert_close(cell_coverage((x0 / width, y0 / height, x1 / width, y1 / height), (rows, columns)), want)
    assert_close(cell_coverage(inside.numpy(), (rows, columns)), want)
    both = cell_coverage(torch.stack([inside, ~inside]), (rows, columns))
    assert_close(both[0], want)
    assert_close(both.sum(0), torch.ones(rows, columns, dtype=torch.float64))


@pytest.mark.parametrize(
    ("region", "size", "message"),
    [
        ((10, 10, 50, 50), None, "fractions of the image; give size= for pixels"),
        ((0.5, 0, 0.4, 1), None, "0 <= x0 <= x1"),
        ((0, 0, 21, 10), (10, 20), "pixels within 20 x 10"),
        ((0, 0, float("nan"), 1), None, "0 <= x0 <= x1"),
        ((0, 0, 1), None, r"got torch\.int64 of shape \(3,\)"),
        (np.ones((8, 9), np.uint8), None, "a boolean mask"),
        (np.ones((8, 9), bool), (9, 8), r"size is \(9, 8\), but the mask has \(8, 9\)"),
        (np.ones((0, 9), bool), None, "a boolean mask"),
        ("centre", None, "a region is a rectangle .* got 'centre'"),
    ],
)
def test_cell_coverage_refuses_what_is_no_region(region, size, message):
    with pytest.raises(CalmError, match=message):
        cell_coverage(region, (2, 2), size)
