"""Pointing game and energy inside against loops over pixels, and cases computed by hand."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings, strategies as st

import calm.metrics
from calm.errors import CalmError
from calm.metrics.bootstrap import weights
from calm.metrics.pointing import EnergyInside, PointingGame, energy_inside, peak_hits

LEVELS = [0.0, 0.0, 1e-30, 0.25, 1.0]  # plateaus, maps of zeros, tiny numbers
H, W = 4, 5
cells = st.tuples(st.sampled_from(LEVELS), st.booleans(), st.booleans())
images = st.lists(cells, min_size=H * W, max_size=H * W)


def tensors(pixels: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, truth, ignore = zip(*pixels, strict=True)
    return (
        torch.tensor(scores, dtype=torch.float64).view(1, H, W),
        torch.tensor(truth).view(1, H, W),
        torch.tensor(ignore).view(1, H, W),
    )


@settings(deadline=None, max_examples=80)
@given(images, st.sampled_from([0, 1, 2]))
def test_pointing_metrics_equal_loops_over_pixels(pixels, tolerance):
    maps, truth, ignore = tensors(pixels)
    places = [(y, x) for y, x in product(range(H), range(W)) if not ignore[0, y, x]]
    true = [place for place in places if truth[0][place]]
    top = max((float(maps[0][place]) for place in places), default=0.0)
    peaks = [place for place in places if float(maps[0][place]) == top] if top else []
    hits = [any(math.dist(peak, place) <= tolerance for place in true) for peak in peaks]
    whole = math.fsum(float(maps[0][place]) for place in places)
    inside = math.fsum(float(maps[0][place]) for place in true)
    got = float(peak_hits(maps, truth, ignore, tolerance=tolerance))
    assert got == pytest.approx(sum(hits) / len(hits) if hits else 0.0)
    assert float(energy_inside(maps, truth, ignore)) == pytest.approx(inside / whole if whole else 0.0, rel=1e-12)


def test_pointing_metrics_of_a_case_by_hand():
    maps = torch.tensor([[[0.2, 0.6, 0.2]], [[0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0]], [[0.9, 0.0, 0.0]]])
    truth = torch.tensor([[[False, True, False]], [[True, False, True]], [[True, True, True]], [[False] * 3]])
    game, energy = PointingGame(replicates=200), EnergyInside(replicates=200)
    for metric in (game, energy):
        metric.update(maps, truth, torch.arange(4))
    assert game.compute().mean.value == pytest.approx((1 + 0.5 + 0) / 3)  # of a tie, half
    assert energy.compute().mean.value == pytest.approx((0.6 + 0.5 + 0) / 3)
    for metric in (game, energy):
        result = metric.compute()
        assert (result.images, result.left_out, result.blank) == (3, 1, 1)
        assert result.mean.low < result.mean.value < result.mean.high


def test_pointing_metrics_interval_is_that_of_weighted_means():
    maps, truth = torch.rand(7, 3, 3), torch.rand(7, 3, 3) < 0.5
    truth[2] = False
    whole, parts = PointingGame(replicates=60, seed=4), PointingGame(replicates=60, seed=4)
    whole.update(maps, truth, torch.arange(7))
    for rows in (torch.tensor([6, 2]), torch.tensor([0, 1, 3]), torch.tensor([5, 4])):
        parts.update(maps[rows], truth[rows], rows)
    result = whole.compute()
    assert parts.compute() == result
    kept = torch.tensor([0, 1, 3, 4, 5, 6])
    drawn = weights(kept, 60, seed=4)
    means = (drawn @ peak_hits(maps, truth)[kept]) / drawn.sum(dim=1)
    assert result.mean.low == pytest.approx(float(means[1:].quantile(0.025)))
    assert result.mean.high == pytest.approx(float(means[1:].quantile(0.975)))


def test_pointing_metrics_ignore_pixels():
    maps = torch.tensor([[[1.0, 0.5, 0.25]]])
    truth = torch.tensor([[[True, False, True]]])
    ignore = torch.tensor([[[True, False, False]]])
    game, energy = PointingGame(replicates=0), EnergyInside(replicates=0)
    game.update(maps, truth, torch.tensor([0]), ignore)
    energy.update(maps, truth, torch.tensor([0]), ignore)
    assert game.compute().mean.value == 0
    assert energy.compute().mean.value == pytest.approx(0.25 / 0.75)
    game.reset()
    game.update(maps, truth, torch.tensor([0]), torch.ones_like(ignore))
    with pytest.raises(CalmError, match="no positive pixel"):
        game.compute()


def test_pointing_metrics_refuse_wrong_input():
    game, truth, key = PointingGame(), torch.ones(1, 2, 2, dtype=torch.bool), torch.tensor([0])
    for wrong, keys, ignore, words in (
        (torch.full((1, 2, 2), -0.5), key, None, "go from -0.5"),
        (torch.full((1, 2, 2), math.nan), key, None, "nan"),
        (torch.zeros(1, 3, 2), key, None, r"shape \(1, 3, 2\)"),
        (torch.zeros(1, 2, 2), torch.arange(2), None, "1 maps and keys"),
        (torch.zeros(1, 2, 2), key, truth[:, :1], "ignore"),
    ):
        with pytest.raises(CalmError, match=words):
            game.update(wrong, truth, keys, ignore)
    with pytest.raises(CalmError, match="tolerance is -1"):
        PointingGame(tolerance=-1)
    with pytest.raises(CalmError, match="no positive pixel"):
        game.compute()


def test_metrics_package_has_all_its_names():
    for name in calm.metrics.__all__:
        assert getattr(calm.metrics, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        calm.metrics.nothing  # noqa: B018
