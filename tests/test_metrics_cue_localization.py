"""mPxAP of class pairs, against the loop of test_metrics_pixels over the pixels of each pair."""

from __future__ import annotations

import math

import pytest
import torch
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
