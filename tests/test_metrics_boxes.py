"""Boxes of a map against the published evaluator's way: threshold a thousand times, one contour after the other."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from calm.errors import CalmError
from calm.metrics.bootstrap import weights
from calm.metrics.boxes import MaxBoxAcc, box_ious, map_boxes, threshold_ious

EVEN = np.arange(1000) / 1000
LOG = 10 ** -(np.arange(1000) * 0.007)[::-1]


def oracle(scores, truth, thresholds):
    """The largest contour's and the best contour's overlap at each threshold, by the letter of the protocol."""
    grey = np.expand_dims((scores * 255).astype(np.uint8), 2)
    height, width = scores.shape
    largest, best = [], []
    for threshold in thresholds:
        level = int(threshold * np.max(grey))
        picture = cv2.threshold(grey, level, 255, cv2.THRESH_BINARY)[1]
        contours = cv2.findContours(picture, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
        overlaps = [overlap((0, 0, 0, 0), truth)]
        chosen = 0
        if contours:
            corners = [cv2.boundingRect(contour) for contour in contours]
            overlaps = [overlap((x, y, min(x + w, width - 1), min(y + h, height - 1)), truth) for x, y, w, h in corners]
            areas = [cv2.contourArea(contour) for contour in contours]
            chosen = areas.index(max(areas))
        largest.append(overlaps[chosen])
        best.append(max(overlaps))
    return np.array(largest), np.array(best)


def overlap(box, truth):
    found = []
    for other in truth.tolist():
        wide = min(box[2], other[2]) - max(box[0], other[0]) + 1
        high = min(box[3], other[3]) - max(box[1], other[1]) + 1
        shared = max(wide, 0) * max(high, 0)
        areas = [(b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other)]
        found.append(shared / (sum(areas) - shared))
    return max(found)


@st.composite
def cases(draw):
    height, width = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["noise", "plateaus", "constant", "smooth", "dots", "rings", "faint"]))
    scores = rng.random((height, width))
    if kind == "plateaus":
        scores = rng.integers(0, draw(st.integers(2, 6)), (height, width)) / 5
    elif kind == "constant":
        scores = np.full((height, width), draw(st.sampled_from([0.0, 0.003, 0.004, 0.5, 1.0])))
    elif kind == "smooth":
        scores = cv2.resize(rng.random((3, 3)), (width, height), interpolation=cv2.INTER_LINEAR)
    elif kind == "dots":
        scores = (rng.random((height, width)) > 0.9) * rng.random((height, width))
    elif kind == "rings":
        y, x = np.mgrid[:height, :width]
        scores = (np.cos(np.hypot(y - height / 2, x - width / 2) * 1.5) + 1) / 2
    elif kind == "faint":
        scores = scores * 0.02
    corners = rng.integers(0, [width, height] * 2, (draw(st.integers(1, 4)), 4))
    truth = np.concatenate(
        [np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:])], axis=1
    )
    return scores.astype(draw(st.sampled_from([np.float32, np.float64]))), truth


@settings(max_examples=120, deadline=None)
@given(cases(), st.sampled_from([EVEN[::7], LOG[::7], np.array([0.0, 0.2, 0.5, 1.0])]))
def test_threshold_ious_equal_thresholding_a_thousand_times(case, thresholds):
    scores, truth = case
    for ours, theirs in zip(threshold_ious(scores, truth, thresholds), oracle(*case, thresholds), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def all_boxes(scores, threshold):
    """The boxes of all contours at a threshold, and that of the largest: the first of those with the most area."""
    grey = (scores * 255).astype(np.uint8)
    height, width = grey.shape
    picture = cv2.threshold(grey, int(threshold * grey.max()), 255, cv2.THRESH_BINARY)[1]
    contours = cv2.findContours(picture, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    found = [[x, y, min(x + w, width - 1), min(y + h, height - 1)] for x, y, w, h in map(cv2.boundingRect, contours)]
    areas = [cv2.contourArea(contour) for contour in contours]
    return found, found[areas.index(max(areas))] if found else None


def same_as_all_traced(scores, thresholds):
    got = map_boxes(scores, thresholds)
    ends = [*got.starts[1:], len(got.boxes)]
    for threshold, cut in zip(thresholds, got.level, strict=True):
        found, largest = all_boxes(scores, threshold)
        if found:
            assert sorted(got.boxes[got.starts[cut] : ends[cut]].tolist()) == sorted(found)
            assert got.boxes[got.largest[cut]].tolist() == largest


@settings(max_examples=150, deadline=None)
@given(cases(), st.sampled_from([LOG[::50], np.arange(0, 1, 0.07)]))
def test_map_boxes_equal_those_of_contours(case, thresholds):
    same_as_all_traced(case[0], thresholds)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.8])
def test_map_boxes_of_a_large_noisy_map_equal_its_contours(share):
    """Many spots of equal area, rings and spots in holes of others."""
    rng = np.random.default_rng(int(100 * share))
    scores = (rng.random((120, 130)) < share) * rng.choice([0.3, 0.6, 0.9], (120, 130))
    same_as_all_traced(scores, np.array([0.0, 0.4, 0.8]))


@pytest.mark.parametrize("thresholds", [EVEN, LOG], ids=["even", "log"])
@pytest.mark.parametrize("grid", [7, 28, 224])
def test_threshold_ious_are_equal_at_the_size_of_the_protocol(grid, thresholds):
    rng = np.random.default_rng(grid)
    scores = np.clip(cv2.resize(rng.random((grid, grid)).astype(np.float32), (224, 224)), 0, 1)
    if grid == 224:
        scores, thresholds = np.round(scores, 2), thresholds[::40]  # noise: thousands of contours each
    truth = np.array([[20, 30, 150, 200], [5, 5, 40, 60], [3, 3, 3, 3]])
    for ours, theirs in zip(threshold_ious(scores, truth, thresholds), oracle(scores, truth, thresholds), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_map_boxes_end_one_pixel_further_and_include_holes():
    scores = np.zeros((12, 12))
    scores[2:9, 3:10] = 1
    scores[4:7, 5:8] = 0
    found = map_boxes(scores, np.array([0.5]))
    assert sorted(found.boxes.tolist()) == [[3, 2, 10, 9], [4, 3, 9, 8]]
    assert found.boxes[found.largest].tolist() == [[3, 2, 10, 9]]


def test_map_boxes_end_at_the_last_pixel():
    assert map_boxes(np.ones((6, 8)), np.array([0.5])).boxes.tolist() == [[0, 0, 7, 5]]


@pytest.mark.parametrize(("value", "threshold"), [(0.0, 0.0), (0.5, 1.0), (0.0039, 0.0)])
def test_map_boxes_without_foreground_are_zeros(value, threshold):
    assert map_boxes(np.full((5, 5), value), np.array([threshold])).boxes.tolist() == [[0, 0, 0, 0]]


def test_box_ious_count_the_pixels_of_both_corners():
    boxes = np.array([[0, 0, 3, 3], [2, 2, 2, 2]])
    assert box_ious(boxes, np.array([[2, 2, 5, 5]])).tolist() == [[4 / 28], [1 / 16]]


@pytest.mark.parametrize("truth", [np.empty((0, 4), int), np.array([[5, 5, 2, 8]])])
def test_threshold_ious_refuse_missing_and_reversed_boxes(truth):
    with pytest.raises(CalmError, match="x0, y0, x1, y1"):
        threshold_ious(np.ones((9, 9)), truth, EVEN)


# --- MaxBoxAcc

CUTS = torch.linspace(0, 1, 21, dtype=torch.float64)


def cases(count=12):
    rng = np.random.default_rng(5)
    maps = torch.from_numpy(rng.integers(0, 9, (count, 16, 16)) / 8.0)
    for place in range(count):
        maps[place, 3:12, 4:13] = (maps[place, 3:12, 4:13] + place / count).clamp(max=1)
    boxes = [torch.tensor([[3, 3, 12, 12], [0, 0, 5, 6]])[: 1 + place % 2] for place in range(count)]
    labels = torch.from_numpy(rng.integers(0, 7, count))
    predictions = torch.stack([torch.from_numpy(rng.permutation(7)[:5]) for _ in range(count)])
    return maps, boxes, torch.arange(count), predictions, labels


def fed(sizes, replicates=50):
    maps, boxes, keys, predictions, labels = cases()
    metric, start = MaxBoxAcc(CUTS, replicates=replicates), 0
    for size in sizes:
        part = slice(start, start + size)
        metric.update(maps[part], boxes[part], keys[part], predictions[part], labels[part])
        start += size
    return metric


def test_max_box_acc_equals_a_loop_over_images_and_thresholds():
    maps, boxes, _, predictions, labels = cases()
    found = [oracle(m.numpy(), b.numpy(), CUTS.tolist()) for m, b in zip(maps, boxes, strict=True)]
    largest, best = (np.stack(each) for each in zip(*found, strict=True))
    right1 = (predictions[:, 0] == labels).numpy()[:, None]
    right5 = (predictions == labels[:, None]).any(1).numpy()[:, None]
    result = fed([12]).compute()
    assert result.v1.value == (largest >= 0.5).mean(0).max()
    assert result.gt_known == result.v1
    each = [(best >= iou).mean(0).max() for iou in (0.3, 0.5, 0.7)]
    assert [figure.value for figure in result.per_iou.values()] == pytest.approx(each)
    assert result.v2.value == pytest.approx(np.mean(each))
    assert result.top1.value == pytest.approx(((largest >= 0.5) & right1).mean(0).max())
    assert result.top5.value == pytest.approx(((largest >= 0.5) & right5).mean(0).max())
    assert result.v1_curve.value == pytest.approx((largest >= 0.5).mean(0).tolist())
    assert result.best_threshold == CUTS[(largest >= 0.5).mean(0).argmax()]
    assert 0 < result.v1.value < 1


def test_max_box_acc_interval_has_its_own_best_threshold():
    maps, boxes, keys, *_ = cases()
    hits = np.stack([oracle(m.numpy(), b.numpy(), CUTS.tolist())[0] for m, b in zip(maps, boxes, strict=True)])
    drawn = weights(keys, 50)[1:].numpy()
    values = [(row[:, None] * (hits >= 0.5)).sum(0).max() / row.sum() for row in drawn]
    result = fed([12]).compute()
    assert result.v1[1:] == pytest.approx(np.quantile(values, [0.025, 0.975]))


def test_max_box_acc_does_not_depend_on_batches_or_processes():
    whole = fed([12]).compute()
    assert fed([5, 4, 3]).compute() == whole
    maps, boxes, keys, predictions, labels = cases()
    halves = []
    for part in (slice(0, 7), slice(7, 12)):
        half = MaxBoxAcc(CUTS, replicates=50)
        half.update(maps[part], boxes[part], keys[part], predictions[part], labels[part])
        halves.append(half)
    for name in ("largest", "best", "top1", "top5", "images", "predicted"):
        setattr(halves[0], name, getattr(halves[0], name) + getattr(halves[1], name))
    assert halves[0].compute() == whole


def test_max_box_acc_of_the_box_itself_is_one():
    maps = torch.zeros(1, 20, 20)
    maps[0, 5:11, 4:13] = 1
    metric = MaxBoxAcc(replicates=0)
    metric.update(maps, [torch.tensor([[4, 5, 13, 11]])], torch.tensor([0]))
    result = metric.compute()
    assert (result.v1.value, result.v2.value, result.top1, result.top5) == (1, 1, None, None)
    assert metric.latest.tolist() == [1]


def test_max_box_acc_memory_does_not_grow_with_images():
    sizes = [sum(getattr(metric, name).numel() for name in metric._defaults) for metric in (fed([12]), fed([3]))]
    assert sizes[0] == sizes[1]


def test_max_box_acc_refuses_wrong_input():
    maps, boxes, keys, predictions, labels = cases(2)
    metric = MaxBoxAcc(CUTS, replicates=2)
    metric.update(maps[:0], [], keys[:0])
    with pytest.raises(CalmError, match="no image"):
        metric.compute()
    for bad in (maps * 2, maps - 1, maps * torch.nan):
        with pytest.raises(CalmError, match="0, 1"):
            metric.update(bad, boxes, keys)
    with pytest.raises(CalmError, match="at least one"):
        metric.update(maps, [boxes[0], torch.empty(0, 4)], keys)
    with pytest.raises(CalmError, match="one each"):
        metric.update(maps, boxes[:1], keys)
    with pytest.raises(CalmError, match="labels"):
        metric.update(maps, boxes, keys, predictions)
    for wrong in (predictions[:, 0], predictions[:1], predictions[None]):
        with pytest.raises(CalmError, match="by falling probability"):
            metric.update(maps, boxes, keys, wrong, labels)
    with pytest.raises(CalmError, match="by falling probability"):
        metric.update(maps, boxes, keys, predictions, labels[:1])
    with pytest.raises(CalmError, match="images, height, width"):
        metric.update(maps[:, None], boxes, keys)
    assert not metric.images.any()
    with pytest.raises(CalmError, match="ious"):
        MaxBoxAcc(ious=(0.5, 30))
    metric.update(maps, boxes, keys, predictions, labels)
    metric.update(maps, boxes, keys + 2)
    with pytest.raises(CalmError, match="2 of 4"):
        metric.compute()
