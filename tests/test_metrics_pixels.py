"""PxAP and cue localization against loops written from the protocol, and cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from forks import Fork
from hypothesis import given, settings, strategies as st

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
def test_pixel_ap_equals_a_loop_over_thresholds(cells, which, counting):
    kept = [(score, truth) for score, truth, ignored in cells if not ignored]
    if not any(truth for _, truth in kept):
        return
    metric = PixelAP(which, counting, replicates=0)
    scores, truth, ignore = (torch.tensor(column).view(1, 1, -1) for column in zip(*cells, strict=True))
    metric.update(scores.double(), truth, torch.tensor([0]), ignore=ignore)
    expected = oracle([s for s, _ in kept], [t for _, t in kept], thresholds(which).tolist(), counting)
    assert metric.compute().ap.value == pytest.approx(expected, rel=1e-12, nan_ok=True)


def test_pixel_ap_of_two_pixels_by_hand():
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


def test_pixel_ap_released_counting_turns_16_8_into_74_2():
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
def test_pixel_ap_released_counting_is_what_numpy_histograms_give(which):
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


def test_pixel_ap_interval_is_about_the_classical_one():
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


def test_pixel_ap_bands_are_undefined_where_the_curve_is():
    metric = PixelAP(torch.tensor([0.2, 0.6]), replicates=20)
    metric.update(torch.full((3, 1, 1), 0.4), torch.ones(3, 1, 1, dtype=torch.bool), torch.arange(3))
    result = metric.compute()
    assert result.precision_band[0][0] == 1
    assert math.isnan(result.precision[1])
    assert math.isnan(result.precision_band[0][1])
    without = PixelAP(torch.tensor([0.2]), replicates=0)
    without.update(torch.full((1, 1, 1), 0.4), torch.ones(1, 1, 1, dtype=torch.bool), torch.arange(1))
    assert math.isnan(without.compute().recall_band[1][0])


def test_pixel_ap_does_not_depend_on_batches_or_merges():
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
def test_pixel_ap_of_two_processes_is_that_of_one(tmp_path):
    maps, truth = torch.rand(7, 4, 4), torch.rand(7, 4, 4) < 0.5
    arguments = (str(tmp_path / "store"), maps, truth)
    other = Fork(tmp_path / "said", _process, 1, *arguments)
    two = _process(0, *arguments)
    assert other.end().returncode == 0
    assert two == _figures(maps, truth, torch.arange(7))


def test_pixel_ap_refuses_maps_outside_0_and_1():
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


def test_pixel_ap_is_0_where_no_positive_is_counted():
    """All scores are below the smallest threshold, so `released` counting counts no pixel: 0, as in CueLocalization."""
    truth = torch.tensor([[[True, False], [False, False]]])
    metric = PixelAP("log", "released", replicates=20)
    metric.update(torch.full((1, 2, 2), 1e-9), truth, torch.tensor([0]))
    result = metric.compute()
    assert result.ap.value == result.ap.low == result.ap.high == 0
    assert set(result.recall) == {0.0}


def test_thresholds_are_the_protocols():
    assert torch.equal(thresholds("even"), torch.from_numpy(np.arange(0, 1, 0.001)).round(decimals=3))
    log = thresholds("log")
    expected = sorted(10.0 ** -(0.007 * i) for i in range(1000))
    torch.testing.assert_close(log, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert log[-1] == 1


@pytest.mark.parametrize(
    "wrong", [[0.5, 0.5], [0.7, 0.1], [-0.1, 0.5], [0.5, 1.5], [], [float("nan")], [0.1, float("nan"), 0.5]]
)
def test_thresholds_must_ascend_within_0_and_1(wrong):
    with pytest.raises(CalmError, match="ascending"):
        thresholds(torch.tensor(wrong))


def test_thresholds_of_a_wrong_name_get_the_close_one():
    with pytest.raises(CalmError, match="evn"):
        thresholds("evn")


# --- bucketize and histograms

KINDS = {
    "even": pixel_edges("even"),
    "log": pixel_edges("log"),
    "one": torch.tensor([0.5], dtype=torch.float64),
    "zero and one": torch.tensor([0.0, 1.0], dtype=torch.float64),
    "zero": torch.tensor([0.0], dtype=torch.float64),
    "too small for float32": 10 ** -torch.linspace(60, 0, 500, dtype=torch.float64),
    "closer than float32": 0.3 + torch.arange(40, dtype=torch.float64) * 1e-10,
    "unequally spaced": torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort().values,
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
def test_bucketize_equals_a_float64_search_at_and_beside_thresholds(kind, dtype):
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
def test_bucketize_equals_a_search_for_any_thresholds(rows, scores, step):
    # Thresholds that float32 cannot hold, scores that are some of them.
    edges = (torch.tensor(rows, dtype=torch.float64).abs() * (1 - step * 1e-12)).unique()
    values = torch.tensor([*scores, *rows], dtype=torch.float32)
    assert (Bucketize(edges)(values).numpy() == searched(values, edges)).all()


def test_bucketize_needs_no_search_for_the_published_thresholds():
    assert all(Bucketize(pixel_edges(which)).shift is not None for which in ("even", "log"))
    assert Bucketize(KINDS["closer than float32"]).shift is None


def test_bucketize_keeps_the_order_of_views():
    maps = torch.rand(4, 5, 6)
    bucketize = Bucketize(pixel_edges("even"))
    for view in (maps.transpose(1, 2), maps[::2, 1:, ::3]):
        assert (bucketize(view).numpy() == searched(view, bucketize.thresholds)).all()


@pytest.mark.parametrize("which", ["even", "log"])
def test_histograms_count_pixels_one_by_one(which):
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
