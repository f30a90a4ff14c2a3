"""Counting the thresholds that a score reaches, against a search among them in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.metrics.pixels import Bucketize, histograms, pixel_edges

KINDS = {
    "even": pixel_edges("even"),
    "log": pixel_edges("log"),
    "one": torch.tensor([0.5], dtype=torch.float64),
    "zero and one": torch.tensor([0.0, 1.0], dtype=torch.float64),
    "zero": torch.tensor([0.0], dtype=torch.float64),
    "too small for float32": 10 ** -torch.linspace(60, 0, 500, dtype=torch.float64),
    "closer than float32": 0.3 + torch.arange(40, dtype=torch.float64) * 1e-10,
    "unequally spaced": torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    .sort()
    .values,
}


def searched(scores: torch.Tensor, edges: torch.Tensor) -> np.ndarray:
    """By NumPy, in float64: float32, float16 and bfloat16 are in it exactly."""
    return np.searchsorted(edges.numpy(), scores.double().numpy(), side="right")


def near(edges: torch.Tensor) -> torch.Tensor:
    """float32 at each threshold and beside it, what is between, and the ends of [0, 1]."""
    at = [edges.float()]
    for direction in (-1.0, 2.0):
        for _ in range(2):
            at.append(torch.nextafter(at[-1] if len(at) % 2 else at[0], torch.tensor(direction)))
    generator = torch.Generator().manual_seed(1)
    even, small = torch.rand(20_000, generator=generator), torch.rand(20_000, generator=generator)
    ends = torch.tensor([0.0, -0.0, 1.0, 1e-45, 1e-38])
    scores = torch.cat([*at, even, 10 ** (-46 * small), ends])
    return scores[(scores >= 0) & (scores <= 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_scores_at_and_beside_thresholds_are_counted_as_a_search_in_float64_counts_them(kind, dtype):
    edges = KINDS[kind]
    scores = near(edges).to(dtype)
    if dtype == torch.float64:
        scores = torch.cat([scores, edges, torch.nextafter(edges, torch.zeros_like(edges))])
    found = Bucketize(edges)(scores)
    assert found.dtype == torch.int32
    assert (found.numpy() == searched(scores, edges)).all()


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30, unique=True),
    st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
    st.integers(0, 2**20),
)
def test_any_thresholds_and_scores_are_counted_as_a_search_counts_them(rows, scores, step):
    # Thresholds that float32 cannot hold, scores that are some of them.
    edges = (torch.tensor(rows, dtype=torch.float64).abs() * (1 - step * 1e-12)).unique()
    values = torch.tensor([*scores, *rows], dtype=torch.float32)
    assert (Bucketize(edges)(values).numpy() == searched(values, edges)).all()


def test_the_published_thresholds_need_no_search():
    assert all(Bucketize(pixel_edges(which)).shift is not None for which in ("even", "log"))
    assert Bucketize(KINDS["closer than float32"]).shift is None


def test_a_transposed_or_sliced_map_is_counted_in_its_own_order():
    maps = torch.rand(4, 5, 6)
    bucketize = Bucketize(pixel_edges("even"))
    for view in (maps.transpose(1, 2), maps[::2, 1:, ::3]):
        assert (bucketize(view).numpy() == searched(view, bucketize.thresholds)).all()


@pytest.mark.parametrize("which", ["even", "log"])
def test_histograms_are_counts_of_pixels_one_by_one(which):
    generator = torch.Generator().manual_seed(3)
    edges = pixel_edges(which)
    maps = 10 ** (-9 * torch.rand(3, 20, 30, generator=generator))
    maps[:, ::4] = edges[torch.randint(len(edges), (3, 5, 30), generator=generator)].float()
    positive, ignore = (torch.rand(3, 20, 30, generator=generator) < share for share in (0.3, 0.2))
    for left_out in (None, ignore):
        got = histograms(maps, positive, Bucketize(edges), left_out)
        expected = np.zeros((3, len(edges) + 1, 2), dtype=int)
        place = searched(maps, edges)
        for image, y, x in np.ndindex(3, 20, 30):
            if left_out is None or not left_out[image, y, x]:
                expected[image, place[image, y, x], int(positive[image, y, x])] += 1
        assert (got.numpy() == expected).all()
