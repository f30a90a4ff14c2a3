"""Localization: does the map of an image's class cover the object? Boxes, masks, or both, as the data set has them.

Where the objects are: boxes and masks, scaled to the protocol's size as the published evaluator does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from calm.data.records import Record, Split
from calm.errors import CalmError
from calm.evaluate.reading import Progress, by_id, looks, turns
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import MapFolder, Subject
from calm.heatmaps import resize_and_normalize
from calm.images import image_size, probe, read_pixels
from calm.metrics.bootstrap import REPLICATES, Estimate
from calm.metrics.boxes import BoxCurve, MaxBoxAcc
from calm.metrics.pixels import Cuts, PixelAP, Thresholds, histograms, precision_recall, thresholds
from calm.metrics.pointing import EnergyInside, PointingGame

__all__ = ["PROTOCOL_SIZE", "Truth", "box_region", "localization", "masks", "scaled_boxes", "truth_kinds"]

Truth = Literal["boxes", "masks"]


def truth_kinds(split: Split) -> tuple[tuple[Truth, ...], str]:
    """What every image of a split is annotated with, masks, boxes, or both; and what only some images have, in words.

    Raises:
        CalmError: no image, no annotation, or images without the one that others have.
    """
    if not split.records:
        raise CalmError(f"split {split.name!r} of {split.root} has no image")
    kinds: tuple[Truth, ...] = ("masks", "boxes")
    without = {kind: [record.id for record in split.records if not getattr(record, kind)] for kind in kinds}
    whole = tuple(kind for kind in kinds if not without[kind])
    if whole:
        partly = [kind for kind in kinds if 0 < len(without[kind]) < len(split.records)]
        return whole, " and ".join(
            f"no figures by {kind}: {len(without[kind])} of {len(split.records)} images of split {split.name!r} have"
            f" none, first {without[kind][0]}"
            for kind in partly
        )
    nearest = min(kinds, key=lambda kind: len(without[kind]))
    if len(without[nearest]) == len(split.records):
        raise CalmError(
            f"split {split.name!r} of {split.root} has neither boxes nor masks: localization needs bounding_boxes.txt "
            "(CUB's layout) or localization.txt (the metadata format)"
        )
    raise CalmError(
        f"{len(without[nearest])} of {len(split.records)} images of split {split.name!r} have no {nearest}, "
        f"first {without[nearest][0]}: annotate them, or take them out of the lists of images"
    )


def scaled_boxes(record: Record, size: tuple[int, int]) -> Int[Tensor, "n 4"]:
    """The boxes of an image in pixels of a map of ``size`` = (height, width): scaled, then truncated.

    Raises:
        CalmError: the image cannot be read (only where its size is not in the lists).
    """
    width, height = record.size or _file_size(record.path)
    corners = torch.tensor(record.boxes, dtype=torch.float64)
    target = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
    return (corners * target / torch.tensor([width, height] * 2, dtype=torch.float64)).long()


def box_region(boxes: Int[Tensor, "n 4"], size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """The pixels inside any box, corners included."""
    inside = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = True
    return inside


def masks(record: Record, size: tuple[int, int]) -> tuple[Bool[Tensor, "h w"], Bool[Tensor, "h w"]]:
    """The pixels of any instance, and those to ignore: of the ignore mask and of no instance. Nearest neighbour.

    Raises:
        CalmError: a mask that is missing or no picture.
    """
    positive = _union(record.masks, size)
    ignore = _union([record.ignore] if record.ignore else [], size) & ~positive
    return torch.from_numpy(positive), torch.from_numpy(ignore)


def _union(paths: Sequence[Path], size: tuple[int, int]) -> NDArray[np.bool_]:
    union = np.zeros(size, dtype=np.bool_)
    for path in paths:
        grey = read_pixels(path, lambda image: image.convert("L"), "mask")
        union |= cv2.resize(grey, (size[1], size[0]), interpolation=cv2.INTER_NEAREST) > 0
    return union


def _file_size(path: Path) -> tuple[int, int]:
    """(width, height) as stored."""
    size = image_size(path)
    if size is None:
        raise CalmError(f"cannot read image {path}: {probe(path).message}")
    return size


PROTOCOL_SIZE = (224, 224)
"""(height, width) at which maps meet boxes and masks."""


def localization(
    subject: Subject | MapFolder,
    split: Split,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    size: tuple[int, int] = PROTOCOL_SIZE,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Result:
    """Score a subject's maps of the true classes on a split with boxes or masks.

    Boxes, fitted to maps in ``subject.box_normalization``, give ``maxboxacc`` (also called GT-known), ``maxboxacc_v2``
    and its parts ``maxboxacc_30`` ..., and, of a model, ``top1_localization`` and ``top5_localization``. Masks give
    ``pxap`` and ``pxap_released``, the two countings of `calm.metrics.pixels`. ``pointing`` and ``energy_inside`` are
    about the union of the objects: their masks, or else their boxes.

    Args:
        subject: a model with its explanation, or a folder of maps in [0, 1], which are taken as they are.
        split: every image needs a box, or every image a mask; with both, all figures are given.
        batch_size: most images at a time.
        workers: processes that read images ahead.
        progress: told after each batch how many images it had.
        size: (height, width) to which maps are resized, bilinear and before normalisation, and the truth too.
        replicates: bootstrap samples of images.
        seed: of the bootstrap.

    Returns:
        Figures, curves, and for each image the overlap of the largest contour's box at its best threshold, or the
        area under its own precision-recall curve where there are masks.

    Raises:
        CalmError: images without annotation; unreadable files; maps that are not in [0, 1].
    """
    kinds, partly = truth_kinds(split)
    if batch_size < 1:
        raise CalmError(f"batch_size must be at least 1, got {batch_size}")
    device = subject.device if isinstance(subject, Subject) else torch.device("cpu")
    cuts = {"masks": subject.thresholds, "boxes": subject.box_thresholds}
    judges = [_JUDGES[kind](cuts[kind], split, size, replicates, seed, device) for kind in kinds]
    pointing = PointingGame(replicates=replicates, seed=seed).to(device)
    energy = EnergyInside(replicates=replicates, seed=seed).to(device)
    scores: dict[int, float] = {}
    for seen in _looks(subject, split, size, batch_size, workers, progress):
        updated = [judge.update(seen) for judge in judges]
        inside, ignore, own = updated[0]
        for metric in (pointing, energy):
            metric.update(seen.maps, inside, seen.places, ignore)
        scores |= dict(zip(seen.places.tolist(), own, strict=True))
    named = by_id(split, scores)
    figures: dict[str, Estimate] = {}
    curves: dict[str, Curve] = {}
    details: dict[str, Any] = {"truth": list(kinds), "images": len(split.records), "size": list(size)}
    for judge in judges:
        more_figures, more_curves, more_details = judge.compute()
        figures |= more_figures
        curves |= more_curves
        details |= more_details
    pointed = pointing.cpu().compute()
    figures |= {"pointing": pointed.mean, "energy_inside": energy.cpu().compute().mean}
    details |= {"blank_maps": pointed.blank, "partly": partly}
    return Result("localization", subject.label, figures, curves, named, details)


class _Seen(NamedTuple):
    """A batch of maps at the size of the protocol, in [0, 1], the second time as boxes are fitted to them; predictions
    are None where there is no model."""

    maps: Float[Tensor, "b h w"]
    for_boxes: Float[Tensor, "b h w"]
    places: Int[Tensor, " b"]
    labels: Int[Tensor, " b"]
    predictions: Int[Tensor, "b k"] | None


def _looks(
    subject: Subject | MapFolder,
    split: Split,
    size: tuple[int, int],
    batch_size: int,
    workers: int,
    progress: Progress | None,
) -> Iterator[_Seen]:
    """The maps of the true classes, batch by batch."""
    if isinstance(subject, MapFolder):
        labels = torch.tensor([record.label for record in split.records])
        for some in turns(range(len(split.records)), batch_size, progress):
            places = torch.tensor(some)
            maps = subject.maps(some)
            yield _Seen(maps, maps, places, labels[places], None)
        return
    for _, labels, places, looked in looks(
        subject, split, batch_size=batch_size, workers=workers, progress=progress
    ):
        probs = looked.probs.detach()
        grid = looked.maps(labels[:, None])[:, 0].detach()
        maps = resize_and_normalize(grid, size, subject.normalization)
        same = subject.box_normalization == subject.normalization
        for_boxes = maps if same else resize_and_normalize(grid, size, subject.box_normalization)
        yield _Seen(maps, for_boxes, places, labels, probs.topk(min(5, probs.shape[1]), dim=1).indices)


_Updated = tuple[Bool[Tensor, "b h w"], Bool[Tensor, "b h w"], Sequence[float]]
"""What one batch is judged by: pixels of the objects, pixels to ignore, and each image's own score."""

_Computed = tuple[dict[str, Estimate], dict[str, Curve], dict[str, Any]]
"""Figures, curves and details."""


class _Boxes:
    def __init__(
        self,
        cuts: Thresholds,
        split: Split,
        size: tuple[int, int],
        replicates: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.split, self.size = split, size
        self.metric = MaxBoxAcc(thresholds(cuts), replicates=replicates, seed=seed).to(device)
        self.x_name = "threshold (log)" if cuts == "log" else "threshold"

    def update(self, seen: _Seen) -> _Updated:
        boxes = [scaled_boxes(self.split.records[place], self.size) for place in seen.places.tolist()]
        labels = None if seen.predictions is None else seen.labels
        self.metric.update(seen.for_boxes, boxes, seen.places, seen.predictions, labels)
        inside = torch.stack([box_region(each, self.size) for each in boxes]).to(seen.maps.device)
        return inside, torch.zeros_like(inside), self.metric.latest.tolist()

    def compute(self) -> _Computed:
        result = self.metric.cpu().compute()
        figures = {"maxboxacc": result.v1, "maxboxacc_v2": result.v2}
        figures |= {f"maxboxacc_{round(100 * iou)}": figure for iou, figure in result.per_iou.items()}
        if result.top1 is not None and result.top5 is not None:
            figures |= {"top1_localization": result.top1, "top5_localization": result.top5}
        curves = {"box accuracy": self._curve(result.thresholds, result.v1_curve)}
        for iou, curve in result.curves.items():
            curves[f"box accuracy V2 at IoU {iou:g}"] = self._curve(result.thresholds, curve)
        return figures, curves, {"best_threshold": result.best_threshold}

    def _curve(self, cuts: Sequence[float], curve: BoxCurve) -> Curve:
        bands = list(curve.value), list(curve.low), list(curve.high)
        return Curve(list(cuts), *bands, self.x_name, "images localized")


class _Masks:
    def __init__(
        self,
        cuts: Thresholds,
        split: Split,
        size: tuple[int, int],
        replicates: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.split, self.size = split, size
        self.cuts = Cuts(thresholds(cuts)).to(device)
        self.strict, self.released = (
            PixelAP(thresholds(cuts), counting, replicates=replicates, seed=seed).to(device)
            for counting in ("strict", "released")
        )

    def update(self, seen: _Seen) -> _Updated:
        found = [masks(self.split.records[place], self.size) for place in seen.places.tolist()]
        inside, ignore = (torch.stack(each).to(seen.maps.device) for each in zip(*found, strict=True))
        for metric in (self.strict, self.released):
            metric.update(seen.maps, inside, seen.places, ignore)
        counts = histograms(seen.maps, inside, self.cuts, ignore).double()
        return inside, ignore, precision_recall(counts)[2].tolist()

    def compute(self) -> _Computed:
        figures, curves = {}, {}
        for name, metric in (("pxap", self.strict), ("pxap_released", self.released)):
            try:
                result = metric.cpu().compute()
            except CalmError as error:
                first = self.split.records[0].masks[0]
                raise CalmError(
                    f"split {self.split.name!r}, masks such as {first}: {error}. An object's pixels are above 0"
                ) from error
            figures[name] = result.ap
            title = "precision and recall" + (", released counting" if name == "pxap_released" else "")
            low, high = map(list, result.precision_band)
            curves[title] = Curve(
                list(result.recall), list(result.precision), low, high, "recall", "precision"
            )
        return figures, curves, {}


_JUDGES: dict[Truth, type[_Boxes] | type[_Masks]] = {"masks": _Masks, "boxes": _Boxes}
