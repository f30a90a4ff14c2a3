"""PxAP and cue localization against loops written from the protocol, and cases computed by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.errors import CalmError
from calm.metrics.cue_localization import CueLocalization
from calm.metrics.pixel_ap import PixelAP
from calm.metrics.thresholds import thresholds


def oracle(scores: list[float], truth: list[bool], edges: list[float], counting: str) -> float:
    """The area, threshold by threshold, pixel by pixel."""
    if counting == "released":
        kept = [(s, t) for s, t in zip(scores, truth, strict=True) if s >= edges[0]]
        scores, truth = [s for s, _ in kept], [t for _, t in kept]
    positives = sum(truth)
    if not positives:
        return math.nan
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
    metric = PixelAP(torch.tensor([0.2, 0.6]), replicates=0)
    metric.update(
        torch.tensor([[[0.9, 0.7, 0.3, 0.1]]]), torch.tensor([[[True, False, True, True]]]), torch.tensor([0])
    )
    result = metric.compute()
    assert result.precision == pytest.approx((2 / 3, 1 / 2))
    assert result.recall == pytest.approx((2 / 3, 1 / 3))
    assert result.ap.value == pytest.approx(1 / 2 * 1 / 3 + 2 / 3 * 1 / 3)


def test_released_counting_flatters_a_sparse_map():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(1, 100, 100, generator=generator) < 0.1
    maps = torch.rand(1, 100, 100, generator=generator) * (
        truth | (torch.rand(1, 100, 100, generator=generator) < 0.05)
    )
    maps = torch.where(torch.rand(1, 100, 100, generator=generator) < 0.5, maps, torch.zeros(()))
    area = {}
    for which, counting in (("log", "strict"), ("log", "released"), ("even", "strict"), ("even", "released")):
        metric = PixelAP(which, counting, replicates=0)
        metric.update(maps, truth, torch.tensor([0]))
        area[which, counting] = metric.compute().ap.value
    assert area["log", "released"] > area["log", "strict"] + 0.2
    assert area["even", "released"] == area["even", "strict"]  # nothing scores below 0


def test_batches_and_merged_processes_do_not_change_the_figure_or_the_interval():
    maps, truth = torch.rand(6, 5, 5), torch.rand(6, 5, 5) < 0.4
    whole, parts = PixelAP(replicates=50), PixelAP(replicates=50)
    whole.update(maps, truth, torch.arange(6))
    for rows in (torch.tensor([4, 1]), torch.tensor([0, 2, 3, 5])):
        parts.update(maps[rows], truth[rows], rows)
    assert whole.compute().ap == parts.compute().ap


def _process(rank: int, port: int, maps: torch.Tensor, truth: torch.Tensor, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    pixel, cue = PixelAP(replicates=20), CueLocalization([1, 2], replicates=20)
    rows = torch.arange(rank, len(maps), 2)
    pixel.update(maps[rows], truth[rows], rows)
    cue.update(maps[rows], truth[rows], rows % 2)
    figures = (pixel.compute().ap, cue.compute().mean)
    if rank == 0:
        torch.save([(f.value, f.low, f.high) for f in figures], out)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    maps, truth = torch.rand(6, 4, 4), torch.rand(6, 4, 4) < 0.5
    mp.spawn(_process, (port, maps, truth, str(tmp_path / "two.pt")), nprocs=2)
    pixel, cue = PixelAP(replicates=20), CueLocalization([1, 2], replicates=20)
    pixel.update(maps, truth, torch.arange(6))
    cue.update(maps, truth, torch.arange(6) % 2)
    one = [(f.value, f.low, f.high) for f in (pixel.compute().ap, cue.compute().mean)]
    assert torch.load(tmp_path / "two.pt") == one


def test_maps_that_no_threshold_can_cut_are_refused():
    metric, truth = PixelAP(), torch.ones(1, 2, 2, dtype=torch.bool)
    for wrong, words in (
        (torch.full((1, 2, 2), 1.5), "go from 1.5 to 1.5"),
        (torch.full((1, 2, 2), math.nan), "nan"),
        (torch.zeros(1, 3, 2), r"shape \(1, 3, 2\)"),
    ):
        with pytest.raises(CalmError, match=words):
            metric.update(wrong, truth, torch.tensor([0]))
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


def test_cumulative_pairs_include_the_pixels_of_those_before_them_by_number_of_groups():
    metric, held = _cues("cumulative")
    scores: list[float] = []
    truth: list[bool] = []
    expected = {}
    for pair in (1, 0, 2):
        scores, truth = scores + held[pair][0], truth + held[pair][1]
        expected[pair] = oracle(scores, truth, thresholds("log").tolist(), "strict")
    assert metric.compute().per_pair[:3] == pytest.approx(tuple(expected[p] for p in range(3)), rel=1e-12)


def test_without_pairs_or_parts_there_is_no_figure():
    with pytest.raises(CalmError, match="no class pair"):
        CueLocalization([])
    metric = CueLocalization([1])
    metric.update(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool), torch.tensor([0]))
    with pytest.raises(CalmError, match="no image shows"):
        metric.compute()
