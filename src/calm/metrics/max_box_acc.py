"""MaxBoxAcc: do the boxes around what a map leaves above a threshold fit the object's boxes?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from calm.errors import CalmError
from calm.metrics.bootstrap import REPLICATES, Estimate, estimate, weights
from calm.metrics.boxes import threshold_ious
from calm.metrics.pixel_ap import check_maps
from calm.metrics.thresholds import Thresholds, thresholds

__all__ = ["BoxCurve", "MaxBoxAcc", "MaxBoxAccResult"]

V1_IOU = 0.5


class BoxCurve(NamedTuple):
    """Accuracy at each threshold, and its 95 percent interval, (t,) each, in [0, 1]."""

    value: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


class MaxBoxAccResult(NamedTuple):
    """Shares of images in [0, 1], each at the threshold that is best for it, higher is better.

    Attributes:
        v1: MaxBoxAcc: the box of the largest contour overlaps a true box by half. The true class's map is
            looked at, so this is the figure also called GT-known localization.
        v2: MaxBoxAccV2: mean of ``per_iou``.
        per_iou: by the overlap asked for, with the best of all contours.
        top1: as v1, and the class predicted is right; None where no prediction was given.
        top5: as v1, and the class is among the five most probable.
        thresholds: (t,) ascending.
        best_threshold: the lowest of the thresholds at which v1 is reached.
        v1_curve: of v1 over the thresholds.
        curves: of ``per_iou``.
        images: how many were counted.
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
        """Localization of the class known to be there: ``v1``."""
        return self.v1


class MaxBoxAcc(Metric):
    """Box accuracy at the best threshold, versions 1 and 2, with Top-1 and Top-5 localization.

    Higher is better, from 0 to 1. Since the threshold is chosen on the images it is reported for, the figure is an
    upper bound of what a user gets, and a box around the whole image scores well on large objects. Intervals take
    the maximum anew in every bootstrap sample.

    Memory depends on the number of thresholds alone. Boxes are found on the CPU, with OpenCV; sums are kept
    on the metric's device.

    Args:
        which: thresholds, see `calm.metrics.thresholds`.
        ious: overlaps asked for in version 2.
        replicates: bootstrap samples of images.
        seed: of the bootstrap.

    Raises:
        CalmError: no overlap, or one outside (0, 1].

    Source: Choe et al., 2020, section 3.3, and its journal version for V2.
    """

    higher_is_better = True
    full_state_update = False
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
        *,
        replicates: int = REPLICATES,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not ious or not all(0 < iou <= 1 for iou in ious):
            raise CalmError(f"ious are {tuple(ious)}: give at least one above 0 and at most 1")
        self.ious, self.replicates, self.seed = tuple(ious), replicates, seed
        self.register_buffer("thresholds", thresholds(which))
        self.latest = torch.empty(0)
        """(b,) per image of the last batch: the overlap of the largest contour's box at the image's best threshold."""
        zeros = torch.zeros(replicates + 1, len(self.thresholds), dtype=torch.float64)
        for name in ("largest", "top1", "top5"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        self.add_state("best", zeros.repeat(len(self.ious), 1, 1), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(replicates + 1, dtype=torch.float64), dist_reduce_fx="sum")
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
            keys: the index of each image in its data set: which bootstrap samples it is in.
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
        if (
            predictions is not None
            and labels is not None
            and (predictions.ndim != 2 or len(predictions) != len(maps) or labels.shape != keys.shape)
        ):
            raise CalmError(
                f"{len(maps)} maps, predictions of shape {tuple(predictions.shape)} and labels of shape"
                f" {tuple(labels.shape)}: give (b, k) classes by falling probability, and (b,) true ones"
            )
        if not len(maps):
            self.latest = torch.empty(0)
            return
        cuts = self.thresholds.cpu().numpy()
        arrays = (maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps).cpu().numpy()
        found = [
            threshold_ious(scores, truth.cpu().numpy().astype(np.int64), cuts)
            for scores, truth in zip(arrays, boxes, strict=True)
        ]
        device = self.largest.device
        largest, best = (torch.from_numpy(np.stack(each)).to(device) for each in zip(*found, strict=True))
        drawn = weights(keys.to(device), self.replicates, self.seed)
        hit = (largest >= V1_IOU).double()
        self.largest += drawn @ hit
        for place, iou in enumerate(self.ious):
            self.best[place] += drawn @ (best >= iou).double()
        self.images += drawn.sum(dim=1)
        self.latest = largest.amax(dim=1)
        if predictions is not None and labels is not None:
            right = (predictions == labels.to(predictions.device)[:, None]).to(device)
            self.top1 += drawn @ (hit * right[:, :1])
            self.top5 += drawn @ (hit * right[:, :5].any(dim=1, keepdim=True))
            self.predicted += len(maps)

    def compute(self) -> MaxBoxAccResult:
        """The figures with intervals, and the curves.

        Raises:
            CalmError: no image; predictions for some of the images only.
        """
        images, predicted = int(self.images[0]), int(self.predicted)
        if not images:
            raise CalmError("no image with a box was given")
        if predicted not in (0, images):
            raise CalmError(f"predictions were given for {predicted} of {images} images: give all or none")
        v1, each = self._share(self.largest), [self._share(hits) for hits in self.best]
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
        """Hits per image, in each bootstrap sample; NaN in a sample without images."""
        return hits / self.images[:, None]


def _curve(share: Float[Tensor, "r t"]) -> BoxCurve:
    drawn = share[1:][share[1:].isfinite().all(dim=1)]
    if not len(drawn):
        nothing = (float("nan"),) * share.shape[1]
        return BoxCurve(tuple(share[0].tolist()), nothing, nothing)
    ends = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=drawn.dtype, device=drawn.device), dim=0)
    return BoxCurve(tuple(share[0].tolist()), tuple(ends[0].tolist()), tuple(ends[1].tolist()))
