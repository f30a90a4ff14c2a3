"""Classification figures equal torchmetrics', and rank correlation SciPy's."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings, strategies as st
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from calm.errors import CalmError
from calm.metrics.bootstrap import weights
from calm.metrics.classification import Classification, rank_correlation


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("images", [1, 18, 500])
def test_top1_of_images_that_are_all_right_or_wrong_has_wilsons_interval(images: int, right: bool) -> None:
    """Every bootstrap sample of them is alike, which would claim certainty after a single image."""
    metric = Classification(replicates=20)
    probs = torch.tensor([[0.2, 0.8]]).repeat(images, 1)
    metric.update(probs, torch.full((images,), int(right)), torch.arange(images))
    found = metric.compute().top1
    expected = scipy.stats.binomtest(images * right, images).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((float(right), expected.low, expected.high))


def drawn(seed: int, images: int, classes: int, spread: float):
    generator = torch.Generator().manual_seed(seed)
    probs = (torch.randn(images, classes, generator=generator) * spread).softmax(dim=1)
    return probs, torch.randint(classes, (images,), generator=generator), torch.arange(images) * 3


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 9), st.sampled_from([0.0, 0.5, 2.0, 200.0]))
@settings(max_examples=40, deadline=None)
def test_classification_equals_torchmetrics(seed, images, classes, spread):
    probs, labels, keys = drawn(seed, images, classes, spread)
    metric = Classification(replicates=3)
    for part in torch.randperm(images).split(7):
        metric.update(probs[part], labels[part], keys[part])
    found = metric.compute()
    if spread:  # without, all classes tie
        assert found.top1.value == pytest.approx(float(MulticlassAccuracy(classes, average="micro")(probs, labels)))
        five = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        assert found.top5.value == pytest.approx(float(five(probs, labels)))
        error = MulticlassCalibrationError(classes, n_bins=15)(probs, labels)
        assert found.ece.value == pytest.approx(float(error), abs=1e-5)
    chances = [max(float(probs[i, labels[i]]), 2.0**-126) for i in range(images)]
    assert found.nll.value == pytest.approx(-sum(map(math.log, chances)) / images, rel=1e-6)
    assert float(found.bins[:, 0].sum()) == pytest.approx(1)


def test_classification_bootstrap_sample_repeats_images():
    probs, labels, keys = drawn(3, 40, 4, 1.0)
    metric = Classification(replicates=5, seed=9)
    metric.update(probs, labels, keys)
    times = weights(keys, 5, 9)
    for r in range(1, 6):
        rows = torch.repeat_interleave(torch.arange(40), times[r].long())
        top1 = MulticlassAccuracy(4, average="micro")(probs[rows], labels[rows])
        assert float(metric.sums[r, 1] / metric.sums[r, 0]) == pytest.approx(float(top1))
        gap = (metric.binned[r, :, 2] - metric.binned[r, :, 1]).abs().sum() / metric.sums[r, 0]
        error = MulticlassCalibrationError(4, n_bins=15)(probs[rows], labels[rows])
        assert float(gap) == pytest.approx(float(error), abs=1e-5)
    found = metric.compute()
    assert found.ece.low <= found.ece.high
    assert found.top1.low <= found.top1.value <= found.top1.high


def test_classification_bins_are_means():
    probs = torch.tensor([[0.9, 0.1], [0.88, 0.12], [0.45, 0.55], [1.0, 0.0]])
    metric = Classification(replicates=0)
    metric.update(probs, torch.tensor([0, 1, 1, 0]), torch.arange(4))
    bins = metric.compute().bins
    assert bins[13].tolist() == pytest.approx([0.5, 0.89, 0.5])
    assert bins[8].tolist() == pytest.approx([0.25, 0.55, 1.0])
    assert bins[14].tolist() == pytest.approx([0.25, 1.0, 1.0])
    assert math.isnan(bins[0, 1])


def test_classification_refuses_wrong_input():
    metric = Classification(replicates=0)
    with pytest.raises(CalmError, match=r"in \[0, 1\]"):
        metric.update(torch.tensor([[2.0, -1.0]]), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(CalmError, match="nan"):
        metric.update(torch.tensor([[math.nan, 0.5]]), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(CalmError, match="classes 0 to 1"):
        metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([2]), torch.tensor([0]))
    with pytest.raises(CalmError, match="no image"):
        metric.compute()


@given(st.integers(0, 10**6), st.integers(2, 30), st.sampled_from([0, 1, 6]))
@settings(max_examples=40, deadline=None)
def test_rank_correlation_equals_scipy(seed, places, decimals):
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(3, places, generator=generator).round(decimals=decimals)
    two = torch.randn(3, places, generator=generator).round(decimals=decimals)
    found = rank_correlation(one, two)
    for i in range(3):
        if len(one[i].unique()) == 1 or len(two[i].unique()) == 1:
            assert found[i].isnan()
        else:
            assert float(found[i]) == pytest.approx(scipy.stats.spearmanr(one[i], two[i]).statistic)


def test_rank_correlation_of_monotone_maps_is_one_and_of_nan_is_nan():
    values = torch.rand(1, 20)
    assert float(rank_correlation(values, values.exp())) == 1
    assert float(rank_correlation(values, -values)) == -1
    broken = values.clone()
    broken[0, 3] = math.nan
    assert rank_correlation(values, broken).isnan().all()
