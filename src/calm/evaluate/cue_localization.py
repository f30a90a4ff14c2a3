"""Cue localization: whether the difference map of two classes lies on the parts that tell them apart.

Nothing in an image's forward pass depends on the pair. So each image is read and predicted once, its part regions are
drawn once, and only the difference of two maps, its resizing and its histogram are computed pair by pair.

Source: paper, section 5.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.data.cub import read_names
from calm.data.cues import (
    PROTOCOL_SIZE,
    CuePair,
    PartGroup,
    PartPoints,
    class_pairs,
    group_votes,
    part_regions,
    read_class_attributes,
    read_part_groups,
    read_part_points,
    read_segmentation,
)
from calm.data.records import Record, Split
from calm.errors import CalmError, unknown
from calm.evaluate.distributed import all_gather
from calm.evaluate.reading import Reading, predictions, scaled_progress
from calm.evaluate.result import Result
from calm.evaluate.subject import Subject
from calm.files import in_threads
from calm.heatmaps import normalize, resize_usable
from calm.images import image_size
from calm.metrics.bootstrap import REPLICATES, Estimate, estimate, weights
from calm.metrics.cue_localization import Accumulation, CueLocalization, CueLocalizationResult
from calm.metrics.pixels import Counting
from calm.metrics.pointing import count_pixels, energy_inside, peak_hits

Region: TypeAlias = Literal["mask", "box"]
"""What the parts of an object are bounded by."""


@dataclass(frozen=True)
class CueData:
    """The annotation of a data set for cue localization.

    Attributes:
        pairs: pairs of classes with the part groups in which they differ.
        groups: the part groups.
        points: part points of the split's images, in its order.
        sizes: (width, height) of the images, (n, 2).
        absent: number of further pairs, one or both of whose classes have no image in the split.
        samples: by an image's position in the split, the pairs it is evaluated for: one class of the pair is the
            image's, and a differing part is visible. Images without such a pair are left out.
    """

    pairs: tuple[CuePair, ...]
    groups: tuple[PartGroup, ...]
    points: PartPoints
    sizes: Int[Tensor, "n 2"]
    samples: dict[int, tuple[int, ...]]
    absent: int = 0

    def regions(
        self, records: Sequence[Record], images: Int[Tensor, " b"], region: Region = "mask"
    ) -> Int[Tensor, "b H W"]:
        """Return the part group of each pixel of images, -1 outside the object: its segmentation, if any, or box."""
        ids = tuple(self.points.ids[image] for image in images.tolist())
        points = PartPoints(ids, self.points.xy[images], self.points.visible[images])
        object_of = _object_box if region == "box" else _object_mask
        masks = list(in_threads(lambda image: object_of(records[image], self.sizes[image]), images.tolist()))
        return part_regions(points, self.sizes[images], inside=torch.stack(masks), groups=self.groups)

    def bits(self, regions: Int[Tensor, "b H W"]) -> Int[Tensor, "b H W"]:
        """Replace the number of each part group by a bit of its own, and -1 by 0."""
        kind = torch.uint8 if len(self.groups) <= 8 else torch.int64
        table = torch.tensor([0, *(1 << group for group in range(len(self.groups)))], dtype=kind)
        return table.index_select(0, (regions + 1).int().flatten()).view(regions.shape)


def read_cue_data(split: Split, root: Path, counts: Iterable[int] = (1, 2, 3), *, both_shown: bool = False) -> CueData:
    """Read the pairs of classes that differ in one of ``counts`` part groups, and the part points of a split.

    The split may have some of the classes of the attribute table: they are found by their names in ``classes.txt``.
    With ``both_shown``, pairs are left out of which one class has no image in the split.

    ``attributes/`` and ``parts/`` are below ``root``, and perhaps ``parts/groups.yaml`` (`calm.data.cues`).

    Raises:
        CalmError: a file is missing or malformed, no pair differs in that many groups, or no image shows a part.
    """
    groups = read_part_groups(root)
    names, present = read_class_attributes(root)
    if len(present) != split.num_classes:
        listed = root / "classes.txt"
        row_of = {name: row for row, name in enumerate(read_names(listed))} if listed.is_file() else {}
        if len(row_of) != len(present) or not row_of.keys() >= set(split.class_names):
            count = f"describes {len(present)} classes, the data set has {split.num_classes}"
            raise CalmError(f"{root / 'attributes'} {count}, which {listed} does not list among as many names")
        present = present[[row_of[name] for name in split.class_names]]
    counts = tuple(counts)
    pairs = tuple(class_pairs(present, group_votes(names, groups), counts))
    if not pairs:
        raise CalmError(f"no two classes of {root} differ in {' or '.join(map(str, counts))} part groups")
    every, shown = len(pairs), {record.label for record in split.records}
    if both_shown:
        pairs = tuple(pair for pair in pairs if pair.first in shown and pair.second in shown)
    points = read_part_points(root).select(record.id for record in split.records)
    visible = points.visible_groups(groups)
    samples: dict[int, tuple[int, ...]] = {}
    pairs_of: dict[int, list[int]] = {}
    for number, pair in enumerate(pairs):
        for label in (pair.first, pair.second):
            pairs_of.setdefault(label, []).append(number)
    for image, (record, seen) in enumerate(zip(split.records, visible.tolist(), strict=True)):
        own = pairs_of.get(record.label, ())
        if numbers := tuple(n for n in own if any(seen[group] for group in pairs[n].groups)):
            samples[image] = numbers
    if not samples:
        raise CalmError(
            f"no {split.name} image of {root} shows a part that tells two classes apart: is any part of these images"
            f" visible (last column 1) in {root / 'parts' / 'part_locs.txt'}?"
        )
    sizes = [record.size or image_size(record.path) or (0, 0) for record in split.records]
    return CueData(pairs, groups, points, torch.tensor(sizes), samples, every - len(pairs))


def _has_box(record: Record, size: Int[Tensor, " 2"]) -> bool:
    return bool(record.boxes) and bool(size.all())


def _object_mask(record: Record, size: Int[Tensor, " 2"]) -> Bool[Tensor, "H W"]:
    """Return the segmentation of the object in an image of ``size`` (width, height); without one, everything."""
    if not record.masks:
        return torch.ones(PROTOCOL_SIZE, dtype=torch.bool)
    return read_segmentation(record.masks[0], image_size=(int(size[0]), int(size[1])) if size.all() else None)


def _object_box(record: Record, size: Int[Tensor, " 2"]) -> Bool[Tensor, "H W"]:
    """Return the pixels of the protocol that the object's boxes cover in an image of ``size`` (width, height)."""
    inside = torch.zeros(PROTOCOL_SIZE, dtype=torch.bool)
    down, across = (side / int(length) for side, length in zip(PROTOCOL_SIZE, (size[1], size[0]), strict=True))
    for x0, y0, x1, y1 in record.boxes:  # corners inclusive
        rows, columns = (math.floor(y0 * down), math.ceil((y1 + 1) * down)), (x0 * across, (x1 + 1) * across)
        inside[max(0, rows[0]) : rows[1], max(0, math.floor(columns[0])) : math.ceil(columns[1])] = True
    return inside


SAMPLES = 64
"""How many difference maps at the protocol's size are held at once."""
SAMPLES_CPU = 8
"""The same on a CPU, where so few of them stay in the cache."""

COUNTINGS: dict[str, tuple[Counting, Accumulation]] = {
    "": ("strict", "pair"),
    "_released": ("released", "pair"),
    "_cumulative": ("strict", "cumulative"),
    "_published": ("released", "cumulative"),
}
"""Ending of a figure's name, and how its pixels are counted. These are of the published reading: in the method's own
normalisation and thresholds."""

READINGS = ("_raw", "_stretched")
"""Ending of a figure's name, and how all maps alike are read, at exact thresholds: difference maps as they are, or each
stretched to [0, 1] by its own range."""


def cue_localization(
    subject: Subject,
    split: Split,
    root: Path | CueData,
    *,
    counts: Sequence[int] = (1, 2, 3),
    region: Region = "mask",
    replicates: int = REPLICATES,
    seed: int = 0,
    **reading: Unpack[Reading],
) -> Result:
    """Compare difference maps of class pairs with the parts in which the classes differ.

    Args:
        subject: its classes are matched with those of the split by name.
        split: the images.
        root: of the data set, or what `read_cue_data` read there.
        counts: numbers of differing part groups that make a pair; not used if ``root`` is data already.
        replicates: bootstrap samples, of pairs for PxAP and of images for peak and mass.
        seed: of the bootstrap.
        reading: see `calm.evaluate.reading.Reading`.

    Returns:
        Figures ``mpxap``, ``mpxap_1`` ... (every pixel counted, each pair by itself) and the same with the
        endings of ``COUNTINGS``; for pairs that differ in one group ``peak_in_part`` and ``mass_in_part``, and what a
        random pixel of the image and of the object would score there, ``part_of_image`` and ``part_of_object``;
        ``chance``, the share of pixels that belong to the differing parts. Scores per image: the share of its
        difference maps that lies on these parts, mean over its pairs. In ``details["pairs"]`` the same by pair.

    Raises:
        CalmError: see `read_cue_data`.
    """
    data = root if isinstance(root, CueData) else read_cue_data(split, root, counts, both_shown=True)
    if region not in get_args(Region):
        raise unknown("region", region, get_args(Region))
    if region == "box" and (
        bare := [image for image in data.samples if not _has_box(split.records[image], data.sizes[image])]
    ):
        raise CalmError(
            f"region box: image {split.records[bare[0]].id!r} has no box or no known size; take region mask"
        )
    numbers = [len(pair.groups) for pair in data.pairs]
    how: dict[str, Any] = {"replicates": replicates, "seed": seed}
    metric = CueLocalization(numbers, subject.thresholds, **how).to(subject.device)
    exact = [CueLocalization(numbers, "exact", **how).to(subject.device) for _ in READINGS]
    differing = torch.tensor([sum(1 << group for group in pair.groups) for pair in data.pairs])
    measured: list[_Samples] = []
    at_once = SAMPLES_CPU if subject.device.type == "cpu" else SAMPLES
    reading["progress"] = scaled_progress(reading.get("progress"), len(data.samples), len(split.records))
    model_class = subject.classes(split)
    for _, _, keys, prediction in predictions(subject, split, list(data.samples), **reading):
        positions = keys.cpu()
        plan = _Plan.of(data, positions)
        grid = prediction.maps(model_class[plan.classes].to(subject.device))
        bits = data.bits(data.regions(split.records, positions, region)).to(subject.device)
        object_pixels = count_pixels(bits.to(torch.bool))
        parts: list[_Samples] = []
        for chunk in torch.split(torch.arange(len(plan.pair)), at_once):
            row, pair = plan.row[chunk].to(subject.device), plan.pair[chunk]
            first, second = (grid[row, slot[chunk].to(subject.device)] for slot in (plan.first, plan.second))
            raw = resize_usable((first - second).abs(), PROTOCOL_SIZE)
            maps, stretched = normalize(raw, subject.normalization), normalize(raw, "minmax")
            truth = (bits.index_select(0, row) & differing[pair].to(bits)[:, None, None]).to(torch.bool)
            for one, read in zip((metric, *exact), (maps, raw, stretched), strict=True):
                one.update(read, truth, pair.to(subject.device))
            parts.append(_Samples.of(maps, truth, object_pixels[row], positions[plan.row[chunk]], pair))
        measured.append(_Samples.concatenate(parts))
    everything = [part for parts in all_gather(measured) for part in parts]
    samples = _Samples.concatenate(sorted(everything, key=lambda part: int(part.image[0])))
    if not samples.visible.any():
        masks = split.records[next(iter(data.samples))].masks
        raise CalmError(
            f"no {split.name} image has a pixel of a part that tells two classes apart: is the object above 0 in the"
            f" segmentations, such as {masks[0] if masks else 'none'}?"
        )
    return _result(subject, split, data, metric.cpu(), [one.cpu() for one in exact], samples, replicates, seed)


class _Plan(NamedTuple):
    """The classes whose maps a batch needs, and its samples (an image with one of its pairs)."""

    classes: Int[Tensor, "b k"]  # of each image, padded by repetition
    row: Int[Tensor, " s"]  # of each sample's image in the batch
    first: Int[Tensor, " s"]  # place of the map of the pair's first class among the image's classes
    second: Int[Tensor, " s"]  # of its second class
    pair: Int[Tensor, " s"]

    @classmethod
    def of(cls, data: CueData, images: Int[Tensor, " b"]) -> _Plan:
        classes: list[list[int]] = []
        samples: list[tuple[int, int, int, int]] = []
        for row, image in enumerate(images.tolist()):
            pairs = [(data.pairs[n].first, data.pairs[n].second, n) for n in data.samples[image]]
            needed = sorted({label for first, second, _ in pairs for label in (first, second)})
            samples += [(row, needed.index(first), needed.index(second), n) for first, second, n in pairs]
            classes.append(needed)
        most = max(map(len, classes))
        padded = torch.tensor([needed + needed[:1] * (most - len(needed)) for needed in classes])
        return cls(padded, *torch.tensor(samples).unbind(dim=1))


SHARES = ("peak_in_part", "mass_in_part", "part_of_image", "part_of_object")
"""Shares of a map's highest pixels and of its mass that lie in the differing parts, and of the image's pixels (both
figures of a random pixel) and the object's pixels that belong to these parts."""


class _Samples(NamedTuple):
    """Peak and mass of samples, by their image and pair."""

    image: Int[Tensor, " s"]  # position in the split
    pair: Int[Tensor, " s"]
    visible: Bool[Tensor, " s"]  # whether any pixel belongs to a differing part; if not, there is no peak or mass
    shares: Float[Tensor, "s 4"]  # see ``SHARES``

    @classmethod
    def of(cls, maps: Tensor, truth: Tensor, object_pixels: Tensor, image: Tensor, pair: Tensor) -> _Samples:
        area = count_pixels(truth)
        of_whole = (area.double() / whole for whole in (truth[0].numel(), object_pixels.clamp(min=1)))
        shares = torch.stack([peak_hits(maps, truth), energy_inside(maps, truth), *of_whole], dim=1)
        return cls(image, pair, (area > 0).cpu(), shares.cpu())

    @classmethod
    def concatenate(cls, parts: Sequence[_Samples]) -> _Samples:
        return cls(*map(torch.cat, zip(*parts, strict=True)))

    def of_pair(self, number: int) -> dict[str, float]:
        """Return the number of a pair's visible samples, and the means of the shares over them (or NaN)."""
        own = self.visible & (self.pair == number)
        return {"shown": int(own.sum()), **dict(zip(SHARES, self.shares[own].mean(dim=0).tolist(), strict=True))}


def _result(
    subject: Subject,
    split: Split,
    data: CueData,
    metric: CueLocalization,
    exact: Sequence[CueLocalization],
    samples: _Samples,
    replicates: int,
    seed: int,
) -> Result:
    results: dict[str, CueLocalizationResult] = {}
    figures: dict[str, Estimate] = {}
    for ending, (counting, accumulation) in COUNTINGS.items():
        other = deepcopy(metric)  # the same pixels, counted otherwise
        other.counting, other.accumulation = counting, accumulation
        results[ending] = other.compute()
    results |= {ending: one.compute() for ending, one in zip(READINGS, exact, strict=True)}
    for ending, result in results.items():
        figures |= {f"mpxap{ending}_{number}": mean for number, mean in result.by_groups.items()}
        figures[f"mpxap{ending}"] = result.mean
    groups = torch.tensor([len(pair.groups) for pair in data.pairs])
    single = (groups[samples.pair] == 1) & samples.visible
    if single.any():
        columns = torch.nn.functional.pad(samples.shares[single], (0, 1), value=1)
        sums = _bootstrap_sums(samples.image[single], columns, replicates, seed)
        figures |= {name: estimate(sums[:, column] / sums[:, -1]) for column, name in enumerate(SHARES)}
    with metric.sync_context():  # the pixels of all processes
        counted = metric.histogram.sum(dim=1)
    share = counted[:, 1] / counted.sum(dim=1)
    defined = torch.tensor(results[""].per_pair).isfinite()
    figures["chance"] = Estimate(float(share[defined].mean()), float("nan"), float("nan"))
    return Result(
        "cue-localization",
        subject.label,
        figures,
        scores=_scores(samples, split),
        details={
            "pairs": [
                {
                    "first": split.class_names[pair.first],
                    "second": split.class_names[pair.second],
                    "groups": [data.groups[group].name for group in pair.groups],
                    "images": int((samples.pair == number).sum()),
                    **samples.of_pair(number),
                    **{f"pxap{ending}": result.per_pair[number] for ending, result in results.items()},
                }
                for number, pair in enumerate(data.pairs)
            ],
            "pairs_by_groups": {str(n): int((groups == n).sum()) for n in sorted(set(groups.tolist()))},
            "pairs_without_images": results[""].empty,
            "pairs_of_absent_classes": data.absent,
            "images": len(data.samples),
            "samples": len(samples.pair),
            "segmented": all(bool(split.records[image].masks) for image in data.samples),
        },
    )


def _bootstrap_sums(
    keys: Int[Tensor, " s"], columns: Float[Tensor, "s k"], replicates: int, seed: int
) -> Float[Tensor, "r k"]:
    """Return the sums of columns in every bootstrap sample of the keys."""
    unique, place = torch.unique(keys, return_inverse=True)
    of_key = columns.new_zeros(len(unique), columns.shape[1]).index_add_(0, place, columns)
    sums = columns.new_zeros(replicates + 1, columns.shape[1])
    for chunk in torch.split(torch.arange(len(unique)), 256):  # the weights of all keys would be large
        sums += weights(unique[chunk], replicates, seed) @ of_key[chunk]
    return sums


def _scores(samples: _Samples, split: Split) -> dict[str, float]:
    """Return the mean mass in the differing parts of each image, over its pairs."""
    images, place = torch.unique(samples.image[samples.visible], return_inverse=True)
    masses = samples.shares[samples.visible, SHARES.index("mass_in_part")]
    mean = torch.zeros(len(images), dtype=torch.float64).index_add_(0, place, masses) / place.bincount()
    ids = (split.records[image].id for image in images.tolist())
    return dict(zip(ids, mean.tolist(), strict=True))
