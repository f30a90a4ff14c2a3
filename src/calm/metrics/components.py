"""Connected components of a grey image above every level at once: union-find over pixels in the order of their grey.

Each pixel is added once, to the components of its neighbours, instead of tracing the contours of every binary image.
The functions are compiled by Numba, at the first call of a version of this file, and cached on the disk.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Boxes = NDArray[np.int64]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    try:
        compiled: Callable[..., Any] = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder to cache in can be written to
        compiled = njit(nogil=True)(function)
    return compiled


@_compiled
def _root(parent: Any, place: int) -> int:
    while parent[place] != place:
        parent[place] = parent[parent[place]]
        place = parent[place]
    return place


@_compiled
def _in_order(grey: Any) -> Any:
    """Return the rows and columns of the pixels by rising value: a counting sort."""
    starts = np.zeros(257, np.int64)
    for value in grey.ravel():
        starts[value + 1] += 1
    starts = np.cumsum(starts)
    rows, columns = np.empty(grey.size, np.int32), np.empty(grey.size, np.int32)
    for y in range(grey.shape[0]):
        for x in range(grey.shape[1]):
            place = starts[grey[y, x]]
            rows[place], columns[place] = y, x
            starts[grey[y, x]] += 1
    return rows, columns


RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))
"""The 8 neighbours of a pixel, (rows, columns) from it, clockwise; the odd ones share a side with it."""
SIDES = 0b10101010
"""The bits of the neighbours that share a side with a pixel."""


def _tables(foreground: bool) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
    """Return, for each set of neighbours (bits in the order of `RING`), what the pixel joins and what it completes.

    The first has one neighbour of each group that is connected without the pixel (by sides and corners in the
    foreground, by sides in the background), then 8. The second is how many of the four 2 x 2 pixels around have 3 or 4.
    The third is what the pixel adds to the foreground's Euler number, components minus holes: 1, less the groups that
    it connects; where they surround it, it fills a hole instead.
    """
    joins, completes, euler = np.full((256, 9), 8, np.uint8), np.zeros(256, np.uint8), np.zeros(256, np.int64)
    for bits in range(256):
        there = [number for number in range(8) if bits >> number & 1]
        group = {number: number for number in there if foreground or number % 2}
        for first, second in permutations(group, 2):
            apart, corner = (second - first) % 8, bits >> (first + 1) % 8 & 1
            if apart == 1 or (apart == 2 and first % 2 and (foreground or corner)):
                group = {k: group[first] if own == group[second] else own for k, own in group.items()}
        joins[bits, : len(set(group.values()))] = sorted(set(group.values()))
        euler[bits] = 1 if bits & SIDES == SIDES else 1 - len(set(group.values()))
        completes[bits] = sum(sum((k + step) % 8 in there for step in range(3)) >= 2 for k in (7, 1, 3, 5))
    return joins, completes, euler


_TABLES = {foreground: _tables(foreground) for foreground in (True, False)}


@_compiled
def _sweep(
    grey: Any,
    rows: Any,
    columns: Any,
    levels: Any,
    holes: Any,
    foreground: bool,
    joins: Any,
    completes: Any,
    euler: Any,
) -> Any:
    """Return boxes (n, 4), twice the areas (n,) and the number (l,) of the components at each level, in sweep order.

    The number of holes at each level, (l,), is written by the sweep of the foreground, and read by the other one: at a
    level without holes all the background is connected to the outside.

    The foreground, values above the level, grows as levels fall; its pixels have 8 neighbours. The background grows as
    they rise; its pixels have 4, and what touches the image's edge is left out, so that components are holes. A box is
    the first and last column and row. The area of the foreground is that of the polygons and triangles between the
    centres of its pixels: of each 2 x 2 pixels all four make 1, three 1/2.
    """
    height, width = grey.shape
    stride = width + 2  # with a frame of one pixel: the outside, which is background
    frame, size = 0, (height + 2) * stride
    there = np.ones(size, np.uint8)
    parent = np.zeros(size, np.int32)
    for y in range(1, height + 1):
        there[y * stride + 1 : y * stride + width + 1] = 0
    if foreground:
        there[:] = 0
    steps = (-stride - 1, -stride, -stride + 1, 1, stride + 1, stride, stride - 1, -1)
    x0, y0 = np.zeros(size, np.int32), np.zeros(size, np.int32)
    x1, y1 = np.zeros(size, np.int32), np.zeros(size, np.int32)
    area = np.zeros(size, np.int32)
    active = np.empty(grey.size, np.int32)
    found, areas = np.empty((1024, 4), np.int64), np.empty(1024, np.int64)
    alive, added, count, less = 0, 0, 0, 0
    counts = np.zeros(len(levels), np.int64)
    last = len(levels)
    while not foreground and last and holes[last - 1] == 0:
        last -= 1
    for step in range(last):
        at = len(levels) - 1 - step if foreground else step
        if not foreground and holes[at] == 0:
            for number in range(alive):
                parent[active[number]] = frame
            alive = 0
            while added < len(rows) and grey[rows[added], columns[added]] <= levels[at]:
                place = (rows[added] + 1) * stride + columns[added] + 1
                there[place], parent[place] = 1, frame
                added += 1
            continue
        while added < len(rows):
            turn = len(rows) - 1 - added if foreground else added
            y, x = rows[turn], columns[turn]
            if (grey[y, x] > levels[at]) != foreground:
                break
            added += 1
            place = (y + 1) * stride + x + 1
            bits = 0
            for number in range(8):
                bits |= there[place + steps[number]] << number
            there[place] = 1
            less -= euler[bits]
            own = -1
            for number in range(8):
                step_to = joins[bits, number]
                if step_to == 8:
                    break
                other = _root(parent, place + steps[step_to])
                if own == -1:
                    own = other
                elif other != own:
                    if own != frame and (other == frame or x1[other] - x0[other] > x1[own] - x0[own]):
                        own, other = other, own
                    parent[other] = own
                    x0[own], y0[own] = min(x0[own], x0[other]), min(y0[own], y0[other])
                    x1[own], y1[own] = max(x1[own], x1[other]), max(y1[own], y1[other])
                    area[own] += area[other]
            if own == -1:
                own = place
                x0[own], y0[own], x1[own], y1[own] = x, y, x, y
                active[alive] = place
                alive += 1
            parent[place] = own
            x0[own], y0[own] = min(x0[own], x), min(y0[own], y)
            x1[own], y1[own] = max(x1[own], x), max(y1[own], y)
            area[own] += completes[bits]
        kept = 0
        for number in range(alive):
            place = active[number]
            if parent[place] != place:
                continue
            active[kept] = place
            kept += 1
            if count == len(found):
                found = np.concatenate((found, np.empty_like(found)))
                areas = np.concatenate((areas, np.empty_like(areas)))
            found[count] = x0[place], y0[place], x1[place], y1[place]
            areas[count] = area[place]
            count += 1
        alive = kept
        counts[at] = kept
        if foreground:
            holes[at] = kept + less  # components less the Euler number
    return found[:count], areas[:count], counts


@_compiled
def _largest(
    outer: Any, areas: Any, outer_starts: Any, outer_counts: Any, hole: Any, hole_starts: Any, hole_counts: Any
) -> Any:
    """Return the index of each level's component with the largest outer contour, -1 where areas alone do not tell.

    The contour encloses the holes, too, so a component's area is exact if no hole is in its box, and otherwise at most
    that of the box.
    """
    chosen = np.full(len(outer_starts), -1)
    for level in range(len(outer_starts)):
        first, count = outer_starts[level], outer_counts[level]
        best = -1
        for place in range(first, first + count):
            if best == -1 or areas[place] > areas[best]:
                best = place
        decided = best != -1
        for place in range(first, first + count):
            x0, y0, x1, y1 = outer[place]
            if place == best or 2 * (x1 - x0) * (y1 - y0) < areas[best]:
                continue
            if areas[place] >= areas[best]:
                decided = False
                break
            for number in range(hole_starts[level], hole_starts[level] + hole_counts[level]):
                if x0 < hole[number, 0] and y0 < hole[number, 1] and hole[number, 2] < x1 and hole[number, 3] < y1:
                    decided = False
                    break
            if not decided:
                break
        if decided:
            chosen[level] = best
    return chosen


def component_boxes(
    grey: NDArray[np.uint8], levels: NDArray[np.int64]
) -> tuple[Boxes, NDArray[np.int64], NDArray[np.int64]]:
    """Return the boxes of the contours of a grey image above each of the ascending levels.

    Returns:
        Boxes (n, 4) of first and last column and row, level by level, of the outer contours and of those around holes,
        which are one pixel larger than the hole; their number at each level (l,); and the index of the box of each
        level's contour with the largest area, (l,), -1 where it is not known: two may have the same.
    """
    grey = np.ascontiguousarray(grey)
    rows, columns = _in_order(grey)
    holes = np.zeros(len(levels), np.int64)
    outer, areas, outer_counts = _sweep(grey, rows, columns, levels, holes, True, *_TABLES[True])
    outer, areas = outer[::-1], areas[::-1]  # by rising levels
    hole, _, hole_counts = _sweep(grey, rows, columns, levels, holes, False, *_TABLES[False])
    outer_starts, hole_starts = np.cumsum(outer_counts) - outer_counts, np.cumsum(hole_counts) - hole_counts
    chosen = _largest(outer, areas, outer_starts, outer_counts, hole, hole_starts, hole_counts)
    levels_of = np.repeat(np.tile(np.arange(len(levels)), 2), np.concatenate([outer_counts, hole_counts]))
    order = np.argsort(levels_of, kind="stable")
    boxes = np.concatenate([outer, hole + np.array([-1, -1, 1, 1])])[order]
    counts = outer_counts + hole_counts
    starts = np.cumsum(counts) - counts
    return boxes, counts, np.where(chosen < 0, -1, chosen - outer_starts + starts)
