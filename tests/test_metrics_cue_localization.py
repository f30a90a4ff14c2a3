"""mPxAP of class pairs, against the loop of test_metrics_pixels over the pixels of each pair."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_metrics_pixels import oracle

from calm.errors import CalmError
from calm.metrics.cue_localization import CueLocalization
from calm.metrics.pixels import thresholds


def _cues(accumulation: str, counting: str = "strict") -> tuple[CueLocalization, list[tuple[list[float], list[bool]]]]:
    """Three pairs, given in an order that is not that of their groups; and their pixels."""
    metric = CueLocalization([2, 1, 2, 3], "log", counting, accumulation, replicates=100)
    held: list[tuple[list[float], list[bool]]] = [([], []) for _ in range(4)]
    for pair in (0, 1, 2, 1, 0, 2, 2):
        maps = torch.rand(1, 3, 4, dtype=torch.float64) * (torch.rand(1, 3, 4) < 0.6)
        truth = torch.rand(1, 3, 4) < 0.4
        metric.update(maps, truth, torch.tensor([pair]))
        held[pair][0].extend(maps.flatten().tolist())
        held[pair][1].extend(truth.flatten().tolist())
    return metric, held


@pytest.mark.parametrize("counting", ["strict", "released"])
def test_cue_localization_scores_each_pair_by_its_own_pixels(counting):
    metric, held = _cues("pair", counting)
    expected = [oracle(*held[pair], thresholds("log").tolist(), counting) for pair in range(3)]
    result = metric.compute()
    assert result.per_pair[:3] == pytest.approx(tuple(expected), rel=1e-12)
    assert math.isnan(result.per_pair[3])
    assert result.empty == 1
    assert result.mean.value == pytest.approx(sum(expected) / 3)
    assert {n: e.value for n, e in result.by_groups.items()} == pytest.approx(
        {1: expected[1], 2: (expected[0] + expected[2]) / 2}
    )
    assert result.mean.low <= result.mean.value <= result.mean.high


@pytest.mark.parametrize("counting", ["strict", "released"])
def test_cue_localization_cumulative_includes_earlier_pairs(counting):
    metric, held = _cues("cumulative", counting)
    scores: list[float] = []
    truth: list[bool] = []
    expected = {}
    for pair in (1, 0, 2):
        scores, truth = scores + held[pair][0], truth + held[pair][1]
        expected[pair] = oracle(scores, truth, thresholds("log").tolist(), counting)
    assert metric.compute().per_pair[:3] == pytest.approx(tuple(expected[p] for p in range(3)), rel=1e-12)


def test_cue_localization_refuses_no_pairs_and_no_parts():
    with pytest.raises(CalmError, match="no class pair"):
        CueLocalization([])
    metric = CueLocalization([1])
    metric.update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool), torch.tensor([0]))
    with pytest.raises(CalmError, match="no image shows"):
        metric.compute()


@pytest.mark.parametrize("counting", ["strict", "released"])
def test_cue_localization_counts_missed_pairs_and_not_empty_ones(counting):
    """By hand: a map of zeros is below all thresholds: its precision is 0 or, as released, no pixel is counted."""
    truth = torch.tensor([[[True, False], [False, False]]])
    metric = CueLocalization([1, 1, 1], "log", counting, replicates=20)
    metric.update(truth.float(), truth, torch.tensor([0]))
    metric.update(torch.zeros(1, 2, 2), truth, torch.tensor([1]))
    metric.update(truth.float(), torch.zeros_like(truth), torch.tensor([2]))
    result = metric.compute()
    assert result.per_pair[:2] == (1.0, 0.0)
    assert (math.isnan(result.per_pair[2]), result.empty) == (True, 1)
    assert result.mean.value == 0.5


@pytest.mark.parametrize("wrong", [-1, 2])
def test_cue_localization_refuses_unknown_pairs(wrong):
    metric = CueLocalization([1, 2])
    maps, truth = torch.ones(2, 1, 2), torch.ones(2, 1, 2, dtype=torch.bool)
    with pytest.raises(CalmError, match=rf"from {min(wrong, 0)} to {max(wrong, 0)}, allowed are 0 to 1"):
        metric.update(maps, truth, torch.tensor([0, wrong]))
    assert not metric.histogram.any()


def exact_area(scores: torch.Tensor, truth: torch.Tensor) -> float:
    """The area with every distinct value as a threshold."""
    order = scores.argsort(descending=True)
    hits, last = truth[order].double().cumsum(0), torch.ones(len(scores), dtype=torch.bool)
    last[:-1] = scores[order].diff() < 0
    precision, recall = (hits / torch.arange(1, len(hits) + 1))[last], (hits / hits[-1])[last]
    return float((precision * recall.diff(prepend=recall.new_zeros(1))).sum())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 99), st.sampled_from([1e-12, 1.0, 1e4]), st.floats(0.2, 3))
def test_cue_localization_exact_is_the_area_by_every_distinct_value(seed, scale, spread):
    """Values with ten bits of mantissa are bins of their own."""
    generator = torch.Generator().manual_seed(seed)
    maps = scale * (spread * torch.randn(6, 8, 9, generator=generator)).exp()
    maps *= torch.rand(6, 8, 9, generator=generator) < 0.8
    maps = (maps.view(torch.int32) >> 13 << 13).view(torch.float32)
    truth = torch.rand(6, 8, 9, generator=generator) < 0.2
    truth[:2, 0, 0] = True
    pair = torch.tensor([0, 1, 0, 1, 0, 1])
    metric = CueLocalization([1, 1], "exact", replicates=0)
    for chunk in torch.split(torch.arange(6), 4):
        metric.update(maps[chunk], truth[chunk], pair[chunk])
    expected = [exact_area(maps[pair == number].flatten(), truth[pair == number].flatten()) for number in (0, 1)]
    assert metric.compute().per_pair == pytest.approx(tuple(expected), rel=1e-12)


@pytest.mark.parametrize("stretched", [False, True])
def test_cue_localization_exact_is_within_two_hundredths_of_a_point_for_any_values(stretched):
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(8, 1, 14, 14, generator=generator)
    maps = torch.nn.functional.interpolate(grid.abs(), size=(112, 112), mode="bilinear")[:, 0]
    maps = (maps - maps.amin((1, 2), keepdim=True)) / maps.amax((1, 2), keepdim=True) if stretched else 1e-5 * maps
    truth = torch.nn.functional.interpolate(grid + torch.randn(8, 1, 14, 14, generator=generator), (112, 112))[:, 0] > 2
    metric = CueLocalization([1], "exact", replicates=0)
    metric.update(maps, truth, torch.zeros(8, dtype=torch.int64))
    assert metric.compute().mean.value == pytest.approx(exact_area(maps.flatten(), truth.flatten()), abs=2e-4)


def test_cue_localization_exact_refuses_what_is_below_zero():
    metric = CueLocalization([1], "exact")
    for wrong in (-1.0, math.nan):
        with pytest.raises(CalmError, match=r"maps must lie in \[0, inf\]"):
            metric.update(torch.full((1, 2, 2), wrong), torch.ones(1, 2, 2, dtype=torch.bool), torch.tensor([0]))
