"""The Poisson bootstrap: same draws everywhere, right moments, the classical interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calm.errors import CalmError
from calm.metrics.bootstrap import Estimate, bootstrap_mean, estimate, weights
from calm.metrics.pixels import thresholds


def test_the_draws_of_an_image_do_not_depend_on_its_batch():
    keys = torch.tensor([5, 0, 123456, 7])
    whole = weights(keys, 50, seed=3)
    assert torch.equal(whole, torch.cat([weights(key[None], 50, seed=3) for key in keys], dim=1))
    assert torch.equal(whole[:21], weights(keys, 20, seed=3))


def test_row_0_is_the_data_set_and_seeds_differ():
    keys = torch.arange(100)
    assert (weights(keys, 3)[0] == 1).all()
    assert weights(keys, 0).shape == (1, 100)
    assert not torch.equal(weights(keys, 3)[1:], weights(keys, 3, seed=1)[1:])


def test_draws_are_poisson_and_independent():
    drawn = weights(torch.arange(4000), 100)[1:].numpy()
    for count in range(6):
        assert (drawn == count).mean() == pytest.approx(math.exp(-1) / math.factorial(count), abs=2e-3)
    limit = 6 / math.sqrt(4000)  # six standard errors
    assert np.abs(np.corrcoef(drawn) - np.eye(100)).max() < limit
    assert np.abs(np.corrcoef(drawn.T[:100]) - np.eye(100)).max() < 0.6


def test_the_interval_of_a_mean_is_the_classical_one():
    values = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 2
    got = bootstrap_mean(values)
    half = 1.96 * float(values.std()) / 20
    assert got.value == pytest.approx(float(values.mean()))
    assert got.low == pytest.approx(got.value - half, abs=0.12 * half)
    assert got.high == pytest.approx(got.value + half, abs=0.12 * half)


def test_undefined_samples_are_left_out():
    nan = math.nan
    assert estimate(torch.tensor([0.5, nan, 0.25, 0.25])) == Estimate(0.5, 0.25, 0.25)
    assert math.isnan(estimate(torch.tensor([nan, 0.5])).low)
    assert math.isnan(estimate(torch.tensor([0.5])).low)


def test_estimates_are_written_in_percent():
    assert str(Estimate(0.5, 0.25, 0.755)) == "50.0 (25.0-75.5)"


def test_refusals():
    with pytest.raises(CalmError, match="replicates is -1"):
        weights(torch.arange(2), -1)
    with pytest.raises(CalmError, match="no value"):
        bootstrap_mean(torch.empty(0))


def test_thresholds_are_the_protocols():
    assert torch.equal(thresholds("even"), torch.from_numpy(np.arange(0, 1, 0.001)).round(decimals=3))
    log = thresholds("log")
    expected = sorted(10.0 ** -(0.007 * i) for i in range(1000))
    torch.testing.assert_close(log, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert log[-1] == 1


@pytest.mark.parametrize(
    "wrong", [[0.5, 0.5], [0.7, 0.1], [-0.1, 0.5], [0.5, 1.5], [], [float("nan")], [0.1, float("nan"), 0.5]]
)
def test_own_thresholds_must_ascend_within_0_and_1(wrong):
    with pytest.raises(CalmError, match="ascending"):
        thresholds(torch.tensor(wrong))


def test_a_wrong_name_of_thresholds_gets_the_close_one():
    with pytest.raises(CalmError, match="evn"):
        thresholds("evn")
