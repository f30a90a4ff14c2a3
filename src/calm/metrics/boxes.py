"""Boxes around what a score map leaves above each threshold, and how well they fit the true ones.

A map is cut as 8-bit grey, so a thousand thresholds make at most 255 different pictures. Contours are found once
for each picture that differs from the one below it, in the part of the map that is not yet empty; all the boxes of
a map are then compared with the truth in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from calm.errors import CalmError

__all__ = ["Boxes", "MapBoxes", "box_ious", "map_boxes", "threshold_ious"]

Boxes: TypeAlias = NDArray[np.int64]
"""(n, 4): x0, y0, x1, y1 in pixels of the map, both corners inside the box."""


MANY = 400
"""Contours of a picture from which on it is quicker to count spots in the next than to trace them."""


class MapBoxes(NamedTuple):
    """The boxes of a map at every cut that makes a picture of its own.

    Attributes:
        boxes: (n, 4), cut by cut; a cut that leaves nothing has the box 0, 0, 0, 0.
        starts: (c,) place of each cut's first box.
        largest: (c,) place of the box of each cut's largest contour, by the area that the contour encloses.
        cut: (t,) the cut that each threshold makes.
    """

    boxes: Boxes
    starts: NDArray[np.int64]
    largest: NDArray[np.int64]
    cut: NDArray[np.int64]


def map_boxes(scores: NDArray[np.floating[Any]], thresholds: NDArray[np.float64]) -> MapBoxes:
    """The boxes of all contours at all thresholds, as the published evaluator of MaxBoxAcc finds them.

    The map becomes 8-bit grey by truncation; a threshold t becomes the whole part of t times the brightest grey;
    what is brighter than that is the foreground. Its contours include the borders of holes. A box goes from a
    contour's first pixel to one beyond its last, cut off at the last pixel of the map.

    Args:
        scores: (h, w) in [0, 1], not checked.
        thresholds: (t,) in [0, 1], in any order.

    Source: Choe et al., 2020, appendix on the computation of boxes; OpenCV's ``findContours``.
    """
    grey = (scores * 255).astype(np.uint8)
    shades = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
    levels = (thresholds * int(shades[-1])).astype(np.int64)
    removed = np.searchsorted(shades, levels, side="right")  # shades that a threshold takes away
    removed, first, cut = np.unique(removed, return_index=True, return_inverse=True)
    boxes, areas, counts = _found(grey, levels[first].tolist())
    if removed[-1] == len(shades):
        boxes[-1] = 0
    height, width = grey.shape
    boxes[:, 2:] = np.minimum(boxes[:, 2:], [width - 1, height - 1])
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    top = np.repeat(np.maximum.reduceat(areas, starts), counts)
    candidates = np.flatnonzero(areas == top)  # the first of equals is the largest, as Python's max has it
    largest = candidates[np.searchsorted(candidates, starts)]
    return MapBoxes(boxes, starts, largest, cut.reshape(-1))


def box_ious(boxes: Boxes, truth: Boxes) -> NDArray[np.float64]:
    """Intersection over union of every box with every true one, (n, m); pixels counted, both corners inside."""
    left, top, right, bottom = np.ascontiguousarray(boxes.T)
    columns = np.ascontiguousarray(truth.T)[:, :, None]
    wide = np.maximum(np.minimum(right, columns[2]) - np.maximum(left, columns[0]) + 1, 0)
    high = np.maximum(np.minimum(bottom, columns[3]) - np.maximum(top, columns[1]) + 1, 0)
    shared = wide * high
    union = (right - left + 1) * (bottom - top + 1) + _pixels(truth)[:, None] - shared
    ratio: NDArray[np.float64] = shared / union
    return ratio.T


def threshold_ious(
    scores: NDArray[np.floating[Any]], truth: Boxes, thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How well the boxes of a map fit, at each threshold: with the best of the true boxes.

    Args:
        scores: (h, w) in [0, 1], not checked.
        truth: (m, 4) at least one box, in pixels of the map.
        thresholds: (t,) in [0, 1].

    Returns:
        (t,) the largest contour's intersection over union, and (t,) that of the best contour.

    Raises:
        CalmError: no true box, or one whose corners are in the wrong order.
    """
    if truth.ndim != 2 or truth.shape[1] != 4 or not len(truth):
        raise CalmError(f"true boxes have shape {truth.shape}: give at least one, as x0, y0, x1, y1")
    if (truth[:, 2:] < truth[:, :2]).any():
        wrong = truth[(truth[:, 2:] < truth[:, :2]).any(axis=1)][0].tolist()
        raise CalmError(f"true box {wrong} ends before it starts: give x0, y0, x1, y1")
    found = map_boxes(scores, thresholds)
    fits = box_ious(found.boxes, truth).max(axis=1)
    return fits[found.largest][found.cut], np.maximum.reduceat(fits, found.starts)[found.cut]


def _found(
    grey: NDArray[np.uint8], levels: Sequence[int]
) -> tuple[Boxes, NDArray[np.int64], NDArray[np.int64]]:
    """Boxes of what is brighter than each of the ascending levels, twice their contours' areas, and how many each
    level has; of levels that were not traced, areas tell only which is the largest.

    Where nothing is left, a single point stands for the contour that there is not.
    """
    traced: list[Any] = []
    counted: dict[int, tuple[Boxes, NDArray[np.int64]]] = {}
    counts = np.ones(len(levels), dtype=np.int64)
    part, left, top = grey, 0, 0
    for place, level in enumerate(levels):
        picture: Any = cv2.threshold(part, level, 255, cv2.THRESH_BINARY)[1]
        x, y, width, height = cv2.boundingRect(picture)
        if not width:
            traced.append(np.zeros((1, 1, 2), dtype=np.int32))
            continue
        window = np.s_[y : y + height, x : x + width]
        part, picture, left, top = part[window], picture[window], left + x, top + y
        if place and counts[place - 1] > MANY:
            counted[place] = _spots(picture, left, top)
            counts[place] = len(counted[place][1])
        else:
            mode, offset = cv2.RETR_TREE, (left, top)
            contours = cv2.findContours(picture, mode, cv2.CHAIN_APPROX_SIMPLE, offset=offset)[0]
            traced += contours
            counts[place] = len(contours)
    boxes = np.empty((counts.sum(), 4), dtype=np.int64)
    areas = np.empty(len(boxes), dtype=np.int64)
    starts = np.cumsum(counts) - counts
    was_traced = np.ones(len(boxes), dtype=bool)
    for place, (own, marks) in counted.items():
        here = np.s_[starts[place] : starts[place] + counts[place]]
        boxes[here], areas[here], was_traced[here] = own, marks, False
    if traced:
        boxes[was_traced], areas[was_traced] = _boxes_and_areas(traced)
    return boxes, areas, counts


def _spots(picture: NDArray[np.uint8], left: int, top: int) -> tuple[Boxes, NDArray[np.int64]]:
    """Boxes of the contours of a picture without tracing all, and a mark on that of the largest: 1, the others 0.

    An outer contour has the box of its connected component. A hole's contour runs through the pixels around the hole,
    so its box is one pixel larger on each side, and it cuts the box's corners. A contour's area is at most that of the
    polygon through its box's outermost pixels: spots too small for the largest contour are left out, and holes, unless
    one is large enough to be the largest.
    """
    labels, stats = cv2.connectedComponentsWithStats(picture, connectivity=8)[1:3]
    outer = stats[1:, :4].T
    x, y, wide, high = cv2.connectedComponentsWithStats(cv2.bitwise_not(picture), connectivity=4)[2][1:, :4].T
    height, width = picture.shape
    enclosed = (x > 0) & (y > 0) & (x + wide < width) & (y + high < height)
    holes = np.stack([x - 1, y - 1, wide + 2, high + 2])[:, enclosed]
    most, most_of_hole = ((each[2] - 1) * (each[3] - 1) for each in (outer, holes))
    least = max(map(cv2.contourArea, _outlines(labels == int(most.argmax()) + 1)))
    with_holes = bool((most_of_hole - 2 >= least).any())
    rivals = np.append(False, most >= least)[labels]
    largest = max(_outlines(rivals, with_holes), key=cv2.contourArea)  # of equals the first, as if traced
    x, y, wide, high = every = np.concatenate([outer, holes], axis=1)
    same = np.logical_and.reduce(
        [side == own for side, own in zip(every, cv2.boundingRect(largest), strict=True)]
    )
    marks = np.zeros(len(same), dtype=np.int64)
    marks[same.argmax()] = 1
    return np.stack([x + left, y + top, x + wide + left, y + high + top], axis=1).astype(np.int64), marks


def _outlines(mask: NDArray[np.bool_], holes: bool = False) -> Sequence[Any]:
    mode = cv2.RETR_TREE if holes else cv2.RETR_EXTERNAL
    return cv2.findContours(mask.view(np.uint8), mode, cv2.CHAIN_APPROX_SIMPLE)[0]


def _boxes_and_areas(contours: Sequence[Any]) -> tuple[Boxes, NDArray[np.int64]]:
    """Boxes (n, 4), the second corner one beyond the last pixel, and twice the enclosed areas (n,)."""
    ends = np.cumsum([len(contour) for contour in contours])
    starts = np.concatenate([[0], ends[:-1]])
    points = np.concatenate(contours)[:, 0]
    x, y = np.ascontiguousarray(points[:, 0]), np.ascontiguousarray(points[:, 1])
    first = [np.minimum.reduceat(axis, starts) for axis in (x, y)]
    beyond = [np.maximum.reduceat(axis, starts) + 1 for axis in (x, y)]
    turned = np.empty(len(x), dtype=np.int64)
    turned[:-1] = x[:-1] * y[1:] - y[:-1] * x[1:]
    last = ends - 1
    turned[last] = x[last] * y[starts] - y[last] * x[starts]
    return np.stack(first + beyond, axis=1).astype(np.int64), np.abs(np.add.reduceat(turned, starts))


def _pixels(boxes: Boxes) -> NDArray[np.int64]:
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    return sides[:, 0] * sides[:, 1]
