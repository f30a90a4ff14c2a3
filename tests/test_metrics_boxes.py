"""Boxes of a map against the published evaluator's way: threshold a thousand times, one contour after the other."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calm.errors import CalmError
from calm.metrics import boxes as boxes_module
from calm.metrics.boxes import box_ious, map_boxes, threshold_ious

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
            overlaps = [
                overlap((x, y, min(x + w, width - 1), min(y + h, height - 1)), truth)
                for x, y, w, h in corners
            ]
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
def test_overlaps_equal_those_of_thresholding_a_thousand_times_to_the_last_digit(case, thresholds):
    scores, truth = case
    for ours, theirs in zip(
        threshold_ious(scores, truth, thresholds), oracle(*case, thresholds), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def all_boxes(scores, threshold):
    """The boxes of all contours at a threshold, and that of the largest: the first of those with the most area."""
    grey = (scores * 255).astype(np.uint8)
    height, width = grey.shape
    picture = cv2.threshold(grey, int(threshold * grey.max()), 255, cv2.THRESH_BINARY)[1]
    contours = cv2.findContours(picture, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    found = [
        [x, y, min(x + w, width - 1), min(y + h, height - 1)]
        for x, y, w, h in map(cv2.boundingRect, contours)
    ]
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
def test_spots_that_are_counted_have_the_boxes_of_their_contours_and_holes_and_the_same_largest(
    case, thresholds
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(boxes_module, "MANY", -1)  # count whatever can be counted
        same_as_all_traced(case[0], thresholds)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.6, 0.8])
def test_a_large_map_of_spots_has_the_boxes_of_its_contours(share):
    """Many spots of equal area, rings and spots in holes of others."""
    rng = np.random.default_rng(int(100 * share))
    scores = (rng.random((120, 130)) < share) * rng.choice([0.3, 0.6, 0.9], (120, 130))
    counts = np.diff(map_boxes(scores, np.array([0.0, 0.4, 0.8])).starts)
    assert counts.max() > boxes_module.MANY
    same_as_all_traced(scores, np.array([0.0, 0.4, 0.8]))


@pytest.mark.parametrize("thresholds", [EVEN, LOG], ids=["even", "log"])
@pytest.mark.parametrize("grid", [7, 28, 224])
def test_overlaps_are_equal_at_the_size_of_the_protocol(grid, thresholds):
    rng = np.random.default_rng(grid)
    scores = np.clip(cv2.resize(rng.random((grid, grid)).astype(np.float32), (224, 224)), 0, 1)
    if grid == 224:
        scores, thresholds = np.round(scores, 2), thresholds[::40]  # noise: thousands of contours each
    truth = np.array([[20, 30, 150, 200], [5, 5, 40, 60], [3, 3, 3, 3]])
    for ours, theirs in zip(
        threshold_ious(scores, truth, thresholds), oracle(scores, truth, thresholds), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_block_has_its_box_one_pixel_further_and_a_ring_has_the_box_of_its_hole_too():
    scores = np.zeros((12, 12))
    scores[2:9, 3:10] = 1
    scores[4:7, 5:8] = 0
    found = map_boxes(scores, np.array([0.5]))
    assert sorted(found.boxes.tolist()) == [[3, 2, 10, 9], [4, 3, 9, 8]]
    assert found.boxes[found.largest].tolist() == [[3, 2, 10, 9]]


def test_a_box_ends_at_the_last_pixel_of_the_map():
    assert map_boxes(np.ones((6, 8)), np.array([0.5])).boxes.tolist() == [[0, 0, 7, 5]]


@pytest.mark.parametrize(("value", "threshold"), [(0.0, 0.0), (0.5, 1.0), (0.0039, 0.0)])
def test_nothing_above_the_threshold_gives_the_box_of_zeros(value, threshold):
    assert map_boxes(np.full((5, 5), value), np.array([threshold])).boxes.tolist() == [[0, 0, 0, 0]]


def test_overlap_counts_the_pixels_of_both_corners():
    boxes = np.array([[0, 0, 3, 3], [2, 2, 2, 2]])
    assert box_ious(boxes, np.array([[2, 2, 5, 5]])).tolist() == [[4 / 28], [1 / 16]]


@pytest.mark.parametrize("truth", [np.empty((0, 4), int), np.array([[5, 5, 2, 8]])])
def test_no_true_box_and_a_box_that_ends_before_it_starts_are_refused(truth):
    with pytest.raises(CalmError, match="x0, y0, x1, y1"):
        threshold_ious(np.ones((9, 9)), truth, EVEN)
