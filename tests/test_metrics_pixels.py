"""PxAP and cue localization against loops written from the protocol, and cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.errors import CalmError
from calm.metrics.cue_localization import CueLocalization
from calm.metrics.pixels import Bucketize, PixelAP, histograms, pixel_edges, precision_recall, thresholds


def oracle(scores: list[float], truth: list[bool], edges: list[float], counting: str) -> float:
    """The area, threshold by threshold, pixel by pixel. The published evaluator cuts at 1 too."""
    edges = sorted({*edges, 1.0})
    if counting == "released":
        kept = [(s, t) for s, t in zip(scores, truth, strict=True) if s >= edges[0]]
        scores, truth = [s for s, _ in kept], [t for _, t in kept]
    positives = sum(truth)
    if not positives:
        return 0.0  # positive pixels, none of them counted
    area, recall = 0.0, 0.0
    for edge in sorted(edges, reverse=True):
        above = [t for s, t in zip(scores, truth, strict=True) if s >= edge]
        if above:
            area += sum(above) / len(above) * (sum(above) / positives - recall)
            recall = sum(above) / positives
    return area


LEVELS = [0.0, 1e-8, 2e-7, 0.001, 0.25, 0.5, 0.5004, 0.999, 1.0]  # plateaus, scores on and below thresholds
pixels = st.lists(st.tuples(st.sampled_from(LEVELS), st.booleans(), st.booleans()), min_size=4, max_size=40)


@settings(deadline=None, max_examples=60)
@given(pixels, st.sampled_from(["even", "log"]), st.sampled_from(["strict", "released"]))
def test_pixel_ap_is_the_loop_over_thresholds(cells, which, counting):
    kept = [(score, truth) for score, truth, ignored in cells if not ignored]
    if not any(truth for _, truth in kept):
        return
    metric = PixelAP(which, counting, replicates=0)
    scores, truth, ignore = (torch.tensor(column).view(1, 1, -1) for column in zip(*cells, strict=True))
    metric.update(scores.double(), truth, torch.tensor([0]), ignore=ignore)
    expected = oracle([s for s, _ in kept], [t for _, t in kept], thresholds(which).tolist(), counting)
    assert metric.compute().ap.value == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_two_pixels_by_hand():
    metric = PixelAP(torch.tensor([0.2, 0.6], dtype=torch.float64), replicates=0)
    metric.update(
        torch.tensor([[[0.9, 0.7, 0.3, 0.1]]]), torch.tensor([[[True, False, True, True]]]), torch.tensor([0])
    )
    result = metric.compute()
    assert result.thresholds == (0.2, 0.6, 1.0)
    assert result.precision[:2] == pytest.approx((2 / 3, 1 / 2))
    assert math.isnan(result.precision[2])
    assert result.recall == pytest.approx((2 / 3, 1 / 3, 0))
    assert result.ap.value == pytest.approx(1 / 2 * 1 / 3 + 2 / 3 * 1 / 3)


def area(scores: torch.Tensor, truth: torch.Tensor, which: object, counting: str) -> float:
    metric = PixelAP(which, counting, replicates=0)
    metric.update(scores.view(1, 1, -1), truth.view(1, 1, -1), torch.tensor([0]))
    return metric.compute().ap.value


def test_released_counting_turns_16_8_into_74_2_and_an_edge_at_0_turns_it_back():
    """Of 70,000 pixels 7,000 are positive; 742 of those and 258 others score, equally; all others score 0."""
    scores, truth = torch.zeros(70_000), torch.zeros(70_000, dtype=torch.bool)
    scores[:1000] = 0.5
    truth[258:7258] = True
    with_zero = torch.cat([torch.zeros(1, dtype=torch.float64), thresholds("log")])
    honest = 0.742 * 0.106 + 0.1 * 0.894
    assert area(scores, truth, "even", "released") == pytest.approx(honest)
    assert area(scores, truth, "log", "released") == pytest.approx(0.742)
    assert area(scores, truth, with_zero, "released") == pytest.approx(honest)
    assert area(scores, truth, "even", "strict") == pytest.approx(honest)
    assert area(scores, truth, "log", "strict") == pytest.approx(0.742 * 0.106)  # zeros are missed
    assert round(100 * honest, 1) == 16.8


@pytest.mark.parametrize("which", ["even", "log"])
def test_released_counting_is_what_numpy_histograms_give(which):
    generator = torch.Generator().manual_seed(0)
    scores = 10 ** -(9 * torch.rand(5000, generator=generator, dtype=torch.float64))
    scores[::7] = 0
    scores[::11] = thresholds(which)[torch.randint(1000, (455,), generator=generator)]
    scores[:3] = 1
    truth = torch.rand(5000, generator=generator) < 0.1 + 0.5 * scores
    edges = np.append(thresholds(which).numpy(), [1.0, 2.0, 3.0])
    right = np.histogram(scores[truth], bins=edges)[0][::-1].cumsum()
    wrong = np.histogram(scores[~truth], bins=edges)[0][::-1].cumsum()
    recall = right / right[-1]
    seen = (right + wrong) > 0
    expected = (right[seen] / (right + wrong)[seen] * np.diff(recall, prepend=0)[seen]).sum()
    assert area(scores, truth, which, "released") == pytest.approx(expected, rel=1e-12)


def test_the_interval_is_about_that_of_a_classical_bootstrap():
    generator = torch.Generator().manual_seed(2)
    truth = torch.rand(60, 8, 8, generator=generator) < 0.3
    quality = torch.rand(60, 1, 1, generator=generator)
    maps = (0.4 * quality * truth + 0.6 * torch.rand(60, 8, 8, generator=generator)).double()
    edges = torch.arange(50) / 50
    metric = PixelAP(edges, replicates=500)
    metric.update(maps, truth, torch.arange(60))
    result = metric.compute()
    counts = histograms(maps, truth, Bucketize(pixel_edges(edges))).double()
    drawn = torch.randint(60, (500, 60), generator=generator)
    areas = precision_recall(counts[drawn].sum(dim=1))[2]
    width = float(areas.quantile(0.975) - areas.quantile(0.025))
    assert result.ap.low == pytest.approx(float(areas.quantile(0.025)), abs=0.2 * width)
    assert result.ap.high == pytest.approx(float(areas.quantile(0.975)), abs=0.2 * width)
    for curve, ends in ((result.precision, result.precision_band), (result.recall, result.recall_band)):
        points = [point for point in zip(ends[0], curve, ends[1], strict=True) if not math.isnan(point[1])]
        assert len(points) > 30
        assert all(low <= value <= high for low, value, high in points)


def test_bands_are_undefined_where_the_curve_is_or_nothing_was_drawn():
    metric = PixelAP(torch.tensor([0.2, 0.6]), replicates=20)
    metric.update(torch.full((3, 1, 1), 0.4), torch.ones(3, 1, 1, dtype=torch.bool), torch.arange(3))
    result = metric.compute()
    assert result.precision_band[0][0] == 1
    assert math.isnan(result.precision[1])
    assert math.isnan(result.precision_band[0][1])
    without = PixelAP(torch.tensor([0.2]), replicates=0)
    without.update(torch.full((1, 1, 1), 0.4), torch.ones(1, 1, 1, dtype=torch.bool), torch.arange(1))
    assert math.isnan(without.compute().recall_band[1][0])


def test_batches_and_merged_processes_do_not_change_the_figure_or_the_interval():
    maps, truth = torch.rand(6, 5, 5), torch.rand(6, 5, 5) < 0.4
    whole, parts = PixelAP(replicates=50), PixelAP(replicates=50)
    whole.update(maps, truth, torch.arange(6))
    for rows in (torch.tensor([4, 1]), torch.tensor([0, 2, 3, 5])):
        parts.update(maps[rows], truth[rows], rows)
    assert whole.compute().ap == parts.compute().ap


def _figures(maps: torch.Tensor, truth: torch.Tensor, rows: torch.Tensor) -> list[tuple[float, ...]]:
    pixel, cue = PixelAP(replicates=20), CueLocalization([1, 2], replicates=20)
    pixel.update(maps[rows], truth[rows], rows)
    cue.update(maps[rows], truth[rows], rows % 2)
    return [tuple(pixel.compute().ap), tuple(cue.compute().mean)]


def _process(rank: int, store: str, maps: torch.Tensor, truth: torch.Tensor) -> list[tuple[float, ...]]:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return _figures(maps, truth, torch.arange(rank, len(maps), 2))
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    maps, truth = torch.rand(7, 4, 4), torch.rand(7, 4, 4) < 0.5
    arguments = (str(tmp_path / "store"), maps, truth)
    other = mp.get_context("spawn").Process(target=_process, args=(1, *arguments))
    other.start()
    two = _process(0, *arguments)
    other.join()
    assert other.exitcode == 0
    assert two == _figures(maps, truth, torch.arange(7))


def test_maps_that_no_threshold_can_cut_are_refused():
    metric, truth = PixelAP(), torch.ones(1, 2, 2, dtype=torch.bool)
    for wrong, words in (
        (torch.full((1, 2, 2), 1.5), "go from 1.5 to 1.5"),
        (torch.full((1, 2, 2), math.nan), "nan"),
        (torch.zeros(1, 3, 2), r"shape \(1, 3, 2\)"),
    ):
        with pytest.raises(CalmError, match=words):
            metric.update(wrong, truth, torch.tensor([0]))
    maps, mask = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    with pytest.raises(CalmError, match="truth must be boolean, got torch\\.float32"):
        metric.update(maps, mask, torch.tensor([0]))
    with pytest.raises(CalmError, match="pixels to ignore must be boolean, got torch\\.uint8"):
        metric.update(maps, truth, torch.tensor([0]), mask.byte())
    metric.update(torch.zeros(1, 2, 2), ~truth, torch.tensor([0]))
    with pytest.raises(CalmError, match="no positive pixel"):
        metric.compute()
    with pytest.raises(CalmError, match="stric"):
        PixelAP(counting="stric")


def _cues(
    accumulation: str, counting: str = "strict"
) -> tuple[CueLocalization, list[tuple[list[float], list[bool]]]]:
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
def test_each_pair_has_the_area_of_its_own_pixels(counting):
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
def test_cumulative_pairs_include_the_pixels_of_those_before_them_by_number_of_groups(counting):
    metric, held = _cues("cumulative", counting)
    scores: list[float] = []
    truth: list[bool] = []
    expected = {}
    for pair in (1, 0, 2):
        scores, truth = scores + held[pair][0], truth + held[pair][1]
        expected[pair] = oracle(scores, truth, thresholds("log").tolist(), counting)
    assert metric.compute().per_pair[:3] == pytest.approx(tuple(expected[p] for p in range(3)), rel=1e-12)


def test_without_pairs_or_parts_there_is_no_figure():
    with pytest.raises(CalmError, match="no class pair"):
        CueLocalization([])
    metric = CueLocalization([1])
    metric.update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool), torch.tensor([0]))
    with pytest.raises(CalmError, match="no image shows"):
        metric.compute()


@pytest.mark.parametrize("counting", ["strict", "released"])
def test_a_pair_that_maps_miss_entirely_counts_and_one_that_no_image_shows_does_not(counting):
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
def test_a_pair_that_is_none_is_refused_and_nothing_is_counted(wrong):
    metric = CueLocalization([1, 2])
    maps, truth = torch.ones(2, 1, 2), torch.ones(2, 1, 2, dtype=torch.bool)
    with pytest.raises(CalmError, match=rf"from {min(wrong, 0)} to {max(wrong, 0)}, allowed are 0 to 1"):
        metric.update(maps, truth, torch.tensor([0, wrong]))
    assert not metric.histogram.any()
