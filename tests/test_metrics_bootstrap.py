"""The Poisson bootstrap: same draws everywhere, right moments, the classical interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from calm.errors import CalmError
from calm.metrics.bootstrap import Estimate, bootstrap_mean, estimate, weights


def test_weights_do_not_depend_on_the_batch():
    keys = torch.tensor([5, 0, 123456, 7])
    whole = weights(keys, 50, seed=3)
    assert torch.equal(whole, torch.cat([weights(key[None], 50, seed=3) for key in keys], dim=1))
    assert torch.equal(whole[:21], weights(keys, 20, seed=3))


def test_weights_row_0_is_the_data_set_and_seeds_differ():
    keys = torch.arange(100)
    assert (weights(keys, 3)[0] == 1).all()
    assert weights(keys, 0).shape == (1, 100)
    assert not torch.equal(weights(keys, 3)[1:], weights(keys, 3, seed=1)[1:])


def test_weights_are_poisson_and_independent():
    drawn = weights(torch.arange(4000), 100)[1:].numpy()
    for count in range(6):
        assert (drawn == count).mean() == pytest.approx(math.exp(-1) / math.factorial(count), abs=2e-3)
    limit = 6 / math.sqrt(4000)  # six standard errors
    assert np.abs(np.corrcoef(drawn) - np.eye(100)).max() < limit
    assert np.abs(np.corrcoef(drawn.T[:100]) - np.eye(100)).max() < 0.6


def test_bootstrap_mean_interval_is_the_classical_one():
    values = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 2
    got = bootstrap_mean(values)
    half = 1.96 * float(values.std()) / 20
    assert got.value == pytest.approx(float(values.mean()))
    assert got.low == pytest.approx(got.value - half, abs=0.12 * half)
    assert got.high == pytest.approx(got.value + half, abs=0.12 * half)


def test_estimate_leaves_out_undefined_samples():
    nan = math.nan
    assert estimate(torch.tensor([0.5, nan, 0.25, 0.25])) == Estimate(0.5, 0.25, 0.25)
    assert math.isnan(estimate(torch.tensor([nan, 0.5])).low)
    assert math.isnan(estimate(torch.tensor([0.5])).low)


def test_estimate_is_printed_in_percent():
    assert str(Estimate(0.5, 0.25, 0.755)) == "50.0 (25.0-75.5)"


def test_bootstrap_mean_refuses_wrong_input():
    with pytest.raises(CalmError, match="replicates is -1"):
        weights(torch.arange(2), -1)
    with pytest.raises(CalmError, match="no value"):
        bootstrap_mean(torch.empty(0))
