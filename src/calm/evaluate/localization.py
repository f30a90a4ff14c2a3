"""Localization over a split: how well maps of the true class fit the object's boxes and masks.

Boxes and masks are scaled to the protocol's size as in the published evaluator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from calm.data.cues import PROTOCOL_SIZE
from calm.data.records import Record, Split
from calm.errors import CalmError
from calm.evaluate.reading import Reading, own_batches, predictions, scores_by_id
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import MapFolder, Subject
from calm.heatmaps import resize_and_normalize
from calm.images import image_size, probe, read_mask
from calm.metrics.bootstrap import REPLICATES, Bootstrap, Estimate
from calm.metrics.boxes import MaxBoxAcc
from calm.metrics.pixels import PixelAP, Thresholds, precision_recall
from calm.metrics.pointing import EnergyInside, PointingGame

Truth = Literal["boxes", "masks"]
_Figures: TypeAlias = dict[str, Estimate]
_Curves: TypeAlias = dict[str, Curve]


def truth_kinds(split: Split) -> tuple[tuple[Truth, ...], str]:
    """Return what every image of a split is annotated with, and a sentence about what only some images have.

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
    """Return the boxes of an image in pixels of a map of ``size`` = (height, width): scaled, then truncated.

    Raises:
        CalmError: the image cannot be read (only where its size is not in the lists).
    """
    stored = record.size or image_size(record.path)
    if stored is None:
        raise CalmError(f"cannot read image {record.path}: {probe(record.path).message}")
    corners = torch.tensor(record.boxes, dtype=torch.float64)
    target = torch.tensor([size[1], size[0]] * 2, dtype=torch.float64)
    return (corners * target / torch.tensor(stored * 2, dtype=torch.float64)).long()


def box_region(boxes: Int[Tensor, "n 4"], size: tuple[int, int]) -> Bool[Tensor, "h w"]:
    """Return the mask of the pixels inside any box, corners included."""
    inside = torch.zeros(size, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside[max(y0, 0) : y1 + 1, max(x0, 0) : x1 + 1] = True
    return inside


def masks(record: Record, size: tuple[int, int]) -> tuple[Bool[Tensor, "h w"], Bool[Tensor, "h w"]]:
    """Return masks of the pixels of any instance, and of those to ignore: in the ignore mask and of no instance.

    Masks are resized by nearest neighbour.

    Raises:
        CalmError: a mask that is missing, no picture, or of another shape than its image.
    """
    positive = _union(record.masks, record, size)
    ignore = _union([record.ignore] if record.ignore else [], record, size) & ~positive
    return torch.from_numpy(positive), torch.from_numpy(ignore)


def _union(paths: Sequence[Path], record: Record, size: tuple[int, int]) -> NDArray[np.bool_]:
    union = np.zeros(size, dtype=np.bool_)
    for path in paths:
        grey = read_mask(path, record.size or image_size(record.path))
        union |= cv2.resize(grey, (size[1], size[0]), interpolation=cv2.INTER_NEAREST) > 0
    return union


def localization(
    subject: Subject | MapFolder,
    split: Split,
    *,
    size: tuple[int, int] = PROTOCOL_SIZE,
    replicates: int = REPLICATES,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> Result:
    """Compare a subject's maps of the true classes with the boxes or masks of a split.

    Boxes, fitted to maps in ``subject.box_normalization``, give ``maxboxacc`` (also called GT-known), ``maxboxacc_v2``
    and its parts ``maxboxacc_30`` ..., and, of a model, ``top1_localization`` and, with more than five classes,
    ``top5_localization``. Masks give ``pxap`` and ``pxap_released``, the two countings of `calm.metrics.pixels`.
    ``pointing`` and ``energy_inside`` are about the union of the objects: their masks, or else their boxes.

    Args:
        subject: a model with its explanation, or a folder of maps in [0, 1], which are used as they are.
        split: every image needs a box, or every image a mask; with both, all figures are given.
        size: (height, width) to which maps are resized, bilinear and before normalisation, and the truth too.
        replicates: bootstrap samples of images.
        seed: of the bootstrap.
        reading: see `calm.evaluate.reading.Reading`.

    Returns:
        Figures, curves, and for each image the area under its own precision-recall curve where there are masks, or else
        the overlap of the largest contour's box at its best threshold.

    Raises:
        CalmError: images without annotation; unreadable files; maps that are not in [0, 1].
    """
    kinds, partly = truth_kinds(split)
    device = subject.device if isinstance(subject, Subject) else torch.device("cpu")
    boots = Bootstrap(replicates=replicates, seed=seed)
    scorers: list[_Masks | _Boxes] = [
        _Masks(subject.thresholds, boots) if kind == "masks" else _Boxes(subject.box_thresholds, boots)
        for kind in kinds
    ]
    pointing, energy = PointingGame(**boots), EnergyInside(**boots)
    for metric in (pointing, energy, *(scorer.metric for scorer in scorers)):
        metric.to(device)
    scores: dict[int, float] = {}
    for maps in _maps(subject, split, size, **reading):
        records = [split.records[position] for position in maps.positions.tolist()]
        updated = [scorer.update(maps, records, size) for scorer in scorers]
        inside, ignore, own = updated[0]
        for metric in (pointing, energy):
            metric.update(maps.maps, inside, maps.positions, ignore)
        scores |= dict(zip(maps.positions.tolist(), own, strict=True))
    scores_of_all = scores_by_id(split, scores)
    figures: _Figures = {}
    curves: _Curves = {}
    details: dict[str, Any] = {"truth": list(kinds), "images": len(split.records), "size": list(size)}
    for scorer in scorers:
        scorer.compute(split, figures, curves, details)
    pointed = pointing.cpu().compute()
    figures |= {"pointing": pointed.mean, "energy_inside": energy.cpu().compute().mean}
    details |= {"blank_maps": pointed.blank, "partly": partly}
    return Result("localization", subject.label, figures, curves, scores_of_all, details)


class _Maps(NamedTuple):
    """Maps of a batch at the protocol's size, in [0, 1]."""

    maps: Float[Tensor, "b h w"]  # as pixels are compared
    box_maps: Float[Tensor, "b h w"]  # as boxes are fitted
    positions: Int[Tensor, " b"]  # of the images in the split
    labels: Int[Tensor, " b"]
    predictions: Int[Tensor, "b k"] | None  # classes by falling probability; None without a model


def _maps(
    subject: Subject | MapFolder, split: Split, size: tuple[int, int], **reading: Unpack[Reading]
) -> Iterator[_Maps]:
    """Yield the maps of the true classes, batch by batch."""
    if isinstance(subject, MapFolder):
        labels = torch.tensor([record.label for record in split.records])
        batches = own_batches(range(len(split.records)), reading.get("batch_size", 32), reading.get("progress"))
        for batch in batches:
            maps = subject.maps(batch)
            yield _Maps(maps, maps, torch.tensor(batch), labels[torch.tensor(batch)], None)
        return
    for _, labels, positions, prediction in predictions(subject, split, **reading):
        probs = prediction.probs.detach()
        grid = prediction.maps(labels[:, None])[:, 0].detach()
        maps = resize_and_normalize(grid, size, subject.normalization)
        same = subject.box_normalization == subject.normalization
        box_maps = maps if same else resize_and_normalize(grid, size, subject.box_normalization)
        top = probs.topk(min(6, probs.shape[1]), dim=1).indices  # a sixth says that there are more than five classes
        yield _Maps(maps, box_maps, positions, labels, top)


_Updated = tuple[Bool[Tensor, "b h w"], Bool[Tensor, "b h w"] | None, Sequence[float]]
"""Masks of the objects and of pixels to ignore, and each image's own score."""


class _Boxes:
    """Compare maps with boxes."""

    def __init__(self, which: Thresholds, boots: Bootstrap) -> None:
        self.metric = MaxBoxAcc(which, **boots)
        self.x_name = "threshold (log)" if which == "log" else "threshold"
        self.more_than_five = True

    def update(self, maps: _Maps, records: Sequence[Record], size: tuple[int, int]) -> _Updated:
        if maps.predictions is not None:
            self.more_than_five = maps.predictions.shape[1] > 5
        boxes = [scaled_boxes(record, size) for record in records]
        labels = None if maps.predictions is None else maps.labels
        self.metric.update(maps.box_maps, boxes, maps.positions, maps.predictions, labels)
        inside = torch.stack([box_region(each, size) for each in boxes]).to(maps.maps.device)
        return inside, None, self.metric.latest.tolist()

    def compute(self, split: Split, figures: _Figures, curves: _Curves, details: dict[str, Any]) -> None:
        result = self.metric.cpu().compute()
        figures |= {"maxboxacc": result.v1, "maxboxacc_v2": result.v2}
        figures |= {f"maxboxacc_{round(100 * iou)}": figure for iou, figure in result.per_iou.items()}
        if result.top1 is not None:
            figures["top1_localization"] = result.top1
        if result.top5 is not None and self.more_than_five:
            figures["top5_localization"] = result.top5
        titled = {f"box accuracy V2 at IoU {iou:g}": curve for iou, curve in result.curves.items()}
        for title, curve in {"box accuracy": result.v1_curve, **titled}.items():
            value, low, high = map(list, curve)
            curves[title] = Curve(list(result.thresholds), value, low, high, self.x_name, "images localized")
        details["best_threshold"] = result.best_threshold


class _Masks:
    """Compare maps with masks."""

    def __init__(self, which: Thresholds, boots: Bootstrap) -> None:
        self.metric = PixelAP(which, **boots)

    def update(self, maps: _Maps, records: Sequence[Record], size: tuple[int, int]) -> _Updated:
        pairs = [masks(record, size) for record in records]
        inside, ignore = (torch.stack(each).to(maps.maps.device) for each in zip(*pairs, strict=True))
        self.metric.update(maps.maps, inside, maps.positions, ignore)
        return inside, ignore, precision_recall(self.metric.latest)[2].tolist()

    def compute(self, split: Split, figures: _Figures, curves: _Curves, details: dict[str, Any]) -> None:
        released = deepcopy(self.metric.cpu())  # the same pixels, counted otherwise
        released.counting = "released"
        for name, metric in (("pxap", self.metric), ("pxap_released", released)):
            try:
                result = metric.compute()
            except CalmError as error:
                first = split.records[0].masks[0]
                raise CalmError(
                    f"split {split.name!r}, masks such as {first}: {error}. An object's pixels are above 0"
                ) from error
            figures[name] = result.ap
            title = "precision and recall" + (", released counting" if name == "pxap_released" else "")
            low, high = map(list, result.precision_band)
            curves[title] = Curve(list(result.recall), list(result.precision), low, high, "recall", "precision")
