"""MaxBoxAcc: how well boxes around the foreground of a thresholded map fit the object's boxes.

A map is thresholded as an 8-bit image, so a thousand thresholds give at most 255 different binary images. The boxes of
all their contours are found in one pass over the pixels (`calm.metrics.components`), and compared with the true ones in
one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, Unpack

import cv2
import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from calm.errors import CalmError
from calm.metrics.bootstrap import Bootstrap, BootstrapMetric, Estimate, band, estimate
from calm.metrics.components import component_boxes
from calm.metrics.pixels import Thresholds, check_maps, thresholds

Boxes: TypeAlias = NDArray[np.int64]
"""(n, 4): x0, y0, x1, y1 in pixels of the map, both corners inside the box."""


class MapBoxes(NamedTuple):
    """The boxes of a map for every distinct binary image that the thresholds make of it ("level").

    Attributes:
        boxes: (n, 4), level by level; a level without foreground has the box 0, 0, 0, 0.
        starts: (l,) index of each level's first box.
        largest: (l,) index of the box of each level's largest contour, by enclosed area.
        level: (t,) the level of each threshold.
    """

    boxes: Boxes
    starts: NDArray[np.int64]
    largest: NDArray[np.int64]
    level: NDArray[np.int64]


def map_boxes(scores: NDArray[np.floating[Any]], thresholds: NDArray[np.float64]) -> MapBoxes:
    """Return the boxes of all contours at all thresholds, as the published evaluator of MaxBoxAcc finds them.

    The map is quantised to 8 bits by truncation; a threshold t becomes the integer part of t times the largest value;
    values above that are foreground. Contours include the borders of holes. A box goes from a contour's first pixel to
    one beyond its last, clipped to the last pixel of the map.

    Args:
        scores: (h, w) in [0, 1], not checked.
        thresholds: (t,) in [0, 1], in any order.

    Source: Choe et al., 2020, appendix on the computation of boxes; OpenCV's ``findContours``.
    """
    grey = (scores * 255).astype(np.uint8)
    shades = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
    levels = (thresholds * int(shades[-1])).astype(np.int64)
    removed = np.searchsorted(shades, levels, side="right")  # how many shades a threshold makes background
    removed, first, level = np.unique(removed, return_index=True, return_inverse=True)
    levels = levels[first]
    whole = levels if removed[-1] < len(shades) else levels[:-1]  # levels with a foreground
    boxes, counts, largest = component_boxes(grey, whole)
    height, width = grey.shape
    boxes[:, 2:] = np.minimum(boxes[:, 2:] + 1, [width - 1, height - 1])
    starts = np.cumsum(counts) - counts
    for place in np.flatnonzero(largest < 0):
        own = boxes[starts[place] : starts[place] + counts[place]]
        largest[place] = starts[place] + (own == _largest_box(grey, int(whole[place]))).all(axis=1).argmax()
    if len(whole) < len(levels):
        starts, largest = np.append(starts, len(boxes)), np.append(largest, len(boxes))
        boxes = np.concatenate([boxes, np.zeros((1, 4), dtype=np.int64)])
    return MapBoxes(boxes, starts, largest, level.reshape(-1))


def _largest_box(grey: NDArray[np.uint8], level: int) -> NDArray[np.int64]:
    """Return the box of the largest contour above a level: of equals the first, in the order of OpenCV."""
    picture: Any = cv2.threshold(grey, level, 255, cv2.THRESH_BINARY)[1]
    contours = cv2.findContours(picture, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    x, y, width, height = cv2.boundingRect(max(contours, key=cv2.contourArea))
    return np.array([x, y, min(x + width, grey.shape[1] - 1), min(y + height, grey.shape[0] - 1)])


def box_ious(boxes: Boxes, truth: Boxes) -> NDArray[np.float64]:
    """Return the intersection over union of every box with every true box, (n, m), in pixels, both corners inside."""
    left, top, right, bottom = np.ascontiguousarray(boxes.T)
    columns = np.ascontiguousarray(truth.T)[:, :, None]
    wide = np.maximum(np.minimum(right, columns[2]) - np.maximum(left, columns[0]) + 1, 0)
    high = np.maximum(np.minimum(bottom, columns[3]) - np.maximum(top, columns[1]) + 1, 0)
    shared = wide * high
    of_truth = (truth[:, 2] - truth[:, 0] + 1) * (truth[:, 3] - truth[:, 1] + 1)
    ratio: NDArray[np.float64] = shared / ((right - left + 1) * (bottom - top + 1) + of_truth[:, None] - shared)
    return ratio.T


def threshold_ious(
    scores: NDArray[np.floating[Any]], truth: Boxes, thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the overlap (IoU) of a map's boxes with the best-fitting of (m, 4) true boxes, at each threshold.

    It is that of the largest contour's box, (t,), and that of the best contour's, (t,); arguments as for `map_boxes`.

    Raises:
        CalmError: no true box, or one whose corners are in the wrong order.
    """
    if truth.ndim != 2 or truth.shape[1] != 4 or not len(truth):
        raise CalmError(f"true boxes have shape {truth.shape}: give at least one, as x0, y0, x1, y1")
    if (truth[:, 2:] < truth[:, :2]).any():
        wrong = truth[(truth[:, 2:] < truth[:, :2]).any(axis=1)][0].tolist()
        raise CalmError(f"true box {wrong} ends before it starts: give x0, y0, x1, y1")
    own = map_boxes(scores, thresholds)
    ious = box_ious(own.boxes, truth).max(axis=1)
    return ious[own.largest][own.level], np.maximum.reduceat(ious, own.starts)[own.level]


V1_IOU = 0.5
"""The overlap at which MaxBoxAcc counts a box as right."""


class BoxCurve(NamedTuple):
    """Accuracy at each threshold and the ends of its 95 percent interval, (t,) each, in [0, 1]."""

    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class MaxBoxAccResult(NamedTuple):
    """Shares of images in [0, 1], each figure at its best threshold; higher is better.

    Attributes:
        v1: MaxBoxAcc: the box of the largest contour has an IoU of at least 0.5 with a true box. It is also called
            GT-known localization, since the map is that of the true class.
        v2: MaxBoxAccV2: mean of ``per_iou``.
        per_iou: by required IoU, with the best of all contours.
        top1: as v1, and the predicted class is right; None if no predictions were given.
        top5: as v1, and the class is among the five most probable.
        thresholds: (t,) ascending.
        best_threshold: the lowest of the thresholds at which v1 is reached.
        v1_curve: of v1 over the thresholds.
        curves: of ``per_iou``.
        images: number of images.
    """

    v1: Estimate
    v2: Estimate
    per_iou: dict[float, Estimate]
    top1: Estimate | None
    top5: Estimate | None
    thresholds: tuple[float, ...]
    best_threshold: float
    v1_curve: BoxCurve
    curves: dict[float, BoxCurve]
    images: int

    @property
    def gt_known(self) -> Estimate:
        """GT-known localization, the other name of ``v1``."""
        return self.v1


class MaxBoxAcc(BootstrapMetric):
    """Box accuracy at the best threshold, versions 1 and 2, with Top-1 and Top-5 localization.

    Higher is better, from 0 to 1. The threshold is chosen on the images that the figure is reported for, so it is an
    upper bound of what a user gets; and a box around the whole image scores well on large objects. Each bootstrap
    sample has its own best threshold.

    Args:
        which: thresholds, see `calm.metrics.pixels`.
        ious: IoUs required in version 2.
        bootstrap: see `calm.metrics.bootstrap.Bootstrap`.

    Raises:
        CalmError: no overlap, or one outside (0, 1].

    Source: Choe et al., 2020, section 3.3, and its journal version for V2.
    """

    higher_is_better = True
    thresholds: Tensor
    largest: Tensor
    best: Tensor
    top1: Tensor
    top5: Tensor
    images: Tensor
    predicted: Tensor

    def __init__(
        self,
        which: Thresholds | Tensor = "even",
        ious: Sequence[float] = (0.3, 0.5, 0.7),
        **bootstrap: Unpack[Bootstrap],
    ) -> None:
        super().__init__(**bootstrap)
        if not ious or not all(0 < iou <= 1 for iou in ious):
            raise CalmError(f"ious are {tuple(ious)}: give at least one above 0 and at most 1")
        self.ious = tuple(ious)
        self.register_buffer("thresholds", thresholds(which))
        self.latest = torch.empty(0)
        """(b,) IoU of the largest contour's box at the image's best threshold, for each image of the last batch."""
        for name in ("largest", "top1", "top5"):
            self.add_sums(name, len(self.thresholds))
        self.add_sums("best", len(self.thresholds), len(self.ious))
        self.add_sums("images")
        self.add_state("predicted", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        maps: Float[Tensor, "b h w"],
        boxes: Sequence[Int[Tensor, "n 4"]],
        keys: Int[Tensor, " b"],
        predictions: Int[Tensor, "b k"] | None = None,
        labels: Int[Tensor, " b"] | None = None,
    ) -> None:
        """Add a batch.

        Args:
            maps: of each image's true class, values in [0, 1].
            boxes: of each image, x0, y0, x1, y1 in pixels of the map, corners inside, any number from 1.
            keys: the index of each image in its data set, which decides in which bootstrap samples it is.
            predictions: classes by falling probability; five, or all where there are fewer.
            labels: the true classes, with ``predictions``.

        Raises:
            CalmError: a map with NaN or values outside [0, 1]; an image without a box; ``predictions`` without
                ``labels``; numbers of images that differ.
        """
        check_maps(maps, None)
        if not len(maps) == len(boxes) == len(keys):
            raise CalmError(f"{len(maps)} maps, boxes of {len(boxes)} images and {len(keys)} keys: one each")
        if (predictions is None) != (labels is None):
            raise CalmError("give predictions and labels, or neither")
        shapes = None if predictions is None or labels is None else (tuple(predictions.shape), tuple(labels.shape))
        if shapes and (len(shapes[0]) != 2 or shapes[0][0] != len(maps) or shapes[1] != keys.shape):
            raise CalmError(
                f"{len(maps)} maps, predictions of shape {shapes[0]} and labels of shape {shapes[1]}: give (b, k)"
                " classes by falling probability, and (b,) true ones"
            )
        if not len(maps):
            self.latest = torch.empty(0)
            return
        levels = self.thresholds.cpu().numpy()
        arrays = (maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps).cpu().numpy()
        ious = [
            threshold_ious(scores, truth.cpu().numpy().astype(np.int64), levels)
            for scores, truth in zip(arrays, boxes, strict=True)
        ]
        largest, best = (np.stack(each) for each in zip(*ious, strict=True))
        self.latest = torch.from_numpy(largest).amax(dim=1).to(self.device)
        # Neighbouring thresholds cut most maps alike: the sums are of the hits' changes from one threshold to the next,
        # at the thresholds that have some. They are whole numbers, and exact.
        hits = np.stack([largest >= V1_IOU, *(best >= iou for iou in self.ious)]).astype(np.int8)
        changes = np.diff(hits, axis=-1, prepend=np.int8(0))
        at = np.flatnonzero(changes.any(axis=(0, 1)))
        hit, *fits = torch.from_numpy(changes[..., at]).to(self.device).double()
        column, drawn = torch.from_numpy(at).to(self.device), self.draw(keys)
        self.largest[:, column] += drawn @ hit
        for place, fit in enumerate(fits):
            self.best[:, column, place] += drawn @ fit
        self.images += drawn.sum(dim=1)
        if predictions is not None and labels is not None:
            right = (predictions == labels.to(predictions.device)[:, None]).to(self.device)
            self.top1[:, column] += drawn @ (hit * right[:, :1])
            self.top5[:, column] += drawn @ (hit * right[:, :5].any(dim=1, keepdim=True))
            self.predicted += len(maps)

    def compute(self) -> MaxBoxAccResult:
        """Return the figures with intervals, and the curves.

        Raises:
            CalmError: no image; predictions for some of the images only.
        """
        images, predicted = int(self.images[0]), int(self.predicted)
        if not images:
            raise CalmError("no image with a box was given")
        if predicted not in (0, images):
            raise CalmError(f"predictions were given for {predicted} of {images} images: give all or none")
        v1, each = self._share(self.largest), [self._share(hits) for hits in self.best.unbind(-1)]
        reached = [share.amax(dim=1) for share in each]
        return MaxBoxAccResult(
            v1=estimate(v1.amax(dim=1)),
            v2=estimate(torch.stack(reached).mean(dim=0)),
            per_iou={iou: estimate(top) for iou, top in zip(self.ious, reached, strict=True)},
            top1=estimate(self._share(self.top1).amax(dim=1)) if predicted else None,
            top5=estimate(self._share(self.top5).amax(dim=1)) if predicted else None,
            thresholds=tuple(self.thresholds.tolist()),
            best_threshold=float(self.thresholds[v1[0].argmax()]),
            v1_curve=_curve(v1),
            curves={iou: _curve(share) for iou, share in zip(self.ious, each, strict=True)},
            images=images,
        )

    def _share(self, hits: Float[Tensor, "r t"]) -> Float[Tensor, "r t"]:
        """Return the hits per image in each bootstrap sample from their changes; NaN in a sample without images."""
        return hits.cumsum(dim=1) / self.images[:, None]


def _curve(share: Float[Tensor, "r t"]) -> BoxCurve:
    return BoxCurve(tuple(share[0].tolist()), *band(share))
