"""Cue localization: does the difference map of two classes lie on the parts that tell them apart?

Nothing that a forward pass computes depends on the pair. So every image is read and looked at once, its part regions
are drawn once, the maps of all classes that its pairs need come from that look, and only the difference, its
resizing and its histogram are done pair by pair.

Source: paper, section 5.2.

What the annotation of a data set says about cues: pairs of classes, and where the parts are that tell them apart.

Source: paper, section 5.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
from calm.data.seeds import in_threads
from calm.errors import CalmError
from calm.evaluate.reading import Progress, batches, gathered, paced
from calm.evaluate.result import Result
from calm.evaluate.subject import Subject
from calm.heatmaps import resize_and_normalize
from calm.images import image_size
from calm.metrics.bootstrap import REPLICATES, Estimate, estimate, weights
from calm.metrics.cue_localization import Accumulation, CueLocalization, CueLocalizationResult
from calm.metrics.pixels import Counting
from calm.metrics.pointing import energy_inside, peak_hits, pixels
from calm.output import difference

__all__ = ["CueData", "cue_localization", "read_cue_data"]


@dataclass(frozen=True)
class CueData:
    """What the annotation says.

    Attributes:
        pairs: of classes, and the part groups in which they differ.
        groups: the part groups.
        points: part points of the split's images, in its order.
        sizes: (width, height) of the images, (n, 2).
        samples: image of the split to its pairs: one of the classes is the image's, and a part that differs is
            visible. Images without a pair are left out.
    """

    pairs: tuple[CuePair, ...]
    groups: tuple[PartGroup, ...]
    points: PartPoints
    sizes: Int[Tensor, "n 2"]
    samples: dict[int, tuple[int, ...]]

    def regions(self, records: Sequence[Record], images: Int[Tensor, " b"]) -> Int[Tensor, "b H W"]:
        """Part group of each pixel of some images, -1 outside the object's segmentation (if there is one)."""
        ids = tuple(self.points.ids[image] for image in images.tolist())
        points = PartPoints(ids, self.points.xy[images], self.points.visible[images])
        masks = list(in_threads(_object, [records[image] for image in images.tolist()]))
        return part_regions(points, self.sizes[images], inside=torch.stack(masks), groups=self.groups)

    def bits(self, regions: Int[Tensor, "b H W"]) -> Int[Tensor, "b H W"]:
        """A bit for each part group in place of its number, 0 in place of -1."""
        kind = torch.uint8 if len(self.groups) <= 8 else torch.int64
        table = torch.tensor([0, *(1 << group for group in range(len(self.groups)))], dtype=kind)
        return table.index_select(0, (regions + 1).int().flatten()).view(regions.shape)


def read_cue_data(split: Split, root: Path, counts: Iterable[int] = (1, 2, 3)) -> CueData:
    """Read the pairs and part points of a data set.

    Args:
        split: the images.
        root: of the data set: ``attributes/`` and ``parts/`` are below it (`calm.data.cues`), and perhaps
            ``parts/groups.yaml`` (`calm.data.cues`).
        counts: numbers of differing part groups that make a pair.

    Raises:
        CalmError: a file is missing or malformed, no pair differs in so many groups, or no image shows a part.
    """
    groups = read_part_groups(root)
    names, present = read_class_attributes(root)
    if len(present) != split.num_classes:
        raise CalmError(
            f"{root / 'attributes'} describes {len(present)} classes, the data set has {split.num_classes}"
        )
    wanted = tuple(counts)
    pairs = tuple(class_pairs(present, group_votes(names, groups), wanted))
    if not pairs:
        raise CalmError(f"no two classes of {root} differ in {' or '.join(map(str, wanted))} part groups")
    points = read_part_points(root).select(record.id for record in split.records)
    visible = points.visible_groups(groups)
    of_class: dict[int, list[int]] = {}
    for number, pair in enumerate(pairs):
        for label in (pair.first, pair.second):
            of_class.setdefault(label, []).append(number)
    samples = {}
    for image, (record, seen) in enumerate(zip(split.records, visible.tolist(), strict=True)):
        shown = tuple(
            number
            for number in of_class.get(record.label, ())
            if any(seen[group] for group in pairs[number].groups)
        )
        if shown:
            samples[image] = shown
    if not samples:
        raise CalmError(
            f"no {split.name} image of {root} shows a part that tells two classes apart: is any part of these images"
            f" visible (last column 1) in {root / 'parts' / 'part_locs.txt'}?"
        )
    sizes = [record.size or image_size(record.path) or (0, 0) for record in split.records]
    return CueData(pairs, groups, points, torch.tensor(sizes), samples)


def _object(record: Record) -> Bool[Tensor, "H W"]:
    """Where the object is: everywhere if nothing says so."""
    if not record.masks:
        return torch.ones(PROTOCOL_SIZE, dtype=torch.bool)
    return read_segmentation(record.masks[0])


SAMPLES = 64
"""Difference maps at the protocol's size that are held at once."""
SAMPLES_CPU = 8
"""The same on a CPU: what is computed from so few of them stays in its cache."""

WAYS: dict[str, tuple[Counting, Accumulation]] = {
    "": ("strict", "pair"),
    "_released": ("released", "pair"),
    "_cumulative": ("strict", "cumulative"),
    "_published": ("released", "cumulative"),
}
"""Ending of a figure's name, and how its pixels are counted."""


def cue_localization(
    subject: Subject,
    split: Split,
    root: Path | CueData,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    counts: Sequence[int] = (1, 2, 3),
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Result:
    """Benchmark a subject.

    Args:
        subject: its class indices are those of the split.
        split: the images.
        root: of the data set, or what `read_cue_data` read there.
        batch_size: images of one forward pass. It does not change the figures.
        workers: processes that read images.
        progress: told after each batch its share of the work, as a number of the split's images.
        counts: numbers of differing part groups that make a pair; not used if ``root`` is data already.
        replicates: bootstrap samples, of pairs for PxAP and of images for peak and mass.
        seed: of the bootstrap.

    Returns:
        Figures ``mpxap``, ``mpxap_1`` ... (every pixel counted, each pair by itself) and the same with the
        endings of ``WAYS``; for pairs that differ in one group ``peak_in_part`` and ``mass_in_part``, and what a
        random pixel of the image and of the object would score there, ``part_of_image`` and ``part_of_object``;
        ``chance``, the share of pixels that belong to the differing parts. Scores per image: the share of its
        difference maps that lies on these parts, mean over its pairs. In ``details["pairs"]`` the same by pair.

    Raises:
        CalmError: see `read_cue_data`.
    """
    data = root if isinstance(root, CueData) else read_cue_data(split, root, counts)
    numbers = [len(pair.groups) for pair in data.pairs]
    metric = CueLocalization(numbers, subject.thresholds, replicates=replicates, seed=seed).to(subject.device)
    bits = torch.tensor([sum(1 << group for group in pair.groups) for pair in data.pairs])
    found: list[_Found] = []
    together = SAMPLES_CPU if subject.device.type == "cpu" else SAMPLES
    for images, _, positions in batches(
        split,
        subject.preprocessing,
        subject.device,
        batch_size=batch_size,
        workers=workers,
        progress=paced(progress, len(data.samples), len(split.records)),
        indices=list(data.samples),
    ):
        asked = _Asked.of(data, positions)
        grid = subject.look(images).maps(asked.classes.to(subject.device))
        own_bits = data.bits(data.regions(split.records, positions)).to(subject.device)
        objects = pixels(own_bits.to(torch.bool))
        of_batch: list[_Found] = []
        for some in torch.split(torch.arange(len(asked.pair)), together):
            row, pair = asked.row[some].to(subject.device), asked.pair[some]
            one, other = (grid[row, slot[some].to(subject.device)] for slot in (asked.first, asked.second))
            maps = resize_and_normalize(difference(one, other), PROTOCOL_SIZE, subject.normalization)
            differing = bits[pair].to(own_bits)[:, None, None]
            truth = (own_bits.index_select(0, row) & differing).to(torch.bool)
            metric.update(maps, truth, pair.to(subject.device))
            of_batch.append(_Found.of(maps, truth, objects[row], positions[asked.row[some]], pair))
        found.append(_Found.joined(of_batch))
    every = sorted((part for parts in gathered(found) for part in parts), key=lambda part: int(part.image[0]))
    samples = _Found.joined(every)
    if not samples.shown.any():
        masks = split.records[next(iter(data.samples))].masks
        raise CalmError(
            f"no {split.name} image has a pixel of a part that tells two classes apart: is the object above 0 in the"
            f" segmentations, such as {masks[0] if masks else 'none'}?"
        )
    return _result(subject, split, data, metric.cpu(), samples, replicates, seed)


@dataclass(frozen=True)
class _Asked:
    """What a batch is asked: the classes of each image, and its samples as places among them."""

    classes: Int[Tensor, "b k"]
    row: Int[Tensor, " s"]
    first: Int[Tensor, " s"]
    second: Int[Tensor, " s"]
    pair: Int[Tensor, " s"]

    @classmethod
    def of(cls, data: CueData, images: Int[Tensor, " b"]) -> _Asked:
        classes: list[list[int]] = []
        samples: list[tuple[int, int, int, int]] = []
        for row, image in enumerate(images.tolist()):
            pairs = data.samples[image]
            needed = sorted({label for n in pairs for label in (data.pairs[n].first, data.pairs[n].second)})
            place = {label: slot for slot, label in enumerate(needed)}
            samples += [(row, place[data.pairs[n].first], place[data.pairs[n].second], n) for n in pairs]
            classes.append(needed)
        most = max(map(len, classes))
        padded = torch.tensor([needed + needed[:1] * (most - len(needed)) for needed in classes])
        return cls(padded, *torch.tensor(samples).unbind(dim=1))


@dataclass(frozen=True)
class _Found:
    """Peak and mass of samples, and the truth's share of the image's and of the object's pixels: what both would be
    at a random one. Where the truth has no pixel there is nothing to find: ``shown`` is False."""

    image: Int[Tensor, " s"]
    pair: Int[Tensor, " s"]
    shown: Bool[Tensor, " s"]
    hit: Float[Tensor, " s"]
    mass: Float[Tensor, " s"]
    of_image: Float[Tensor, " s"]
    of_object: Float[Tensor, " s"]

    @classmethod
    def of(cls, maps: Tensor, truth: Tensor, objects: Tensor, image: Tensor, pair: Tensor) -> _Found:
        shown = pixels(truth)
        shares = (shown.double() / area for area in (truth[0].numel(), objects.clamp(min=1)))
        values = (shown > 0, peak_hits(maps, truth), energy_inside(maps, truth), *shares)
        return cls(image, pair, *(value.cpu() for value in values))

    @classmethod
    def joined(cls, parts: Sequence[_Found]) -> _Found:
        return cls(*(torch.cat([getattr(part, name) for part in parts]) for name in cls.__annotations__))

    def shares(self) -> dict[str, Tensor]:
        """By the names of their figures."""
        return {
            "peak_in_part": self.hit,
            "mass_in_part": self.mass,
            "part_of_image": self.of_image,
            "part_of_object": self.of_object,
        }

    def of_pair(self, number: int) -> dict[str, float]:
        """How many samples of a pair show what is asked for, and the means of the shares over them (or NaN)."""
        own = self.shown & (self.pair == number)
        means = {name: float(values[own].mean()) for name, values in self.shares().items()}
        return {"shown": int(own.sum()), **means}


def _result(
    subject: Subject,
    split: Split,
    data: CueData,
    metric: CueLocalization,
    found: _Found,
    replicates: int,
    seed: int,
) -> Result:
    results: dict[str, CueLocalizationResult] = {}
    for ending, (counting, accumulation) in WAYS.items():
        other = deepcopy(metric)
        other.counting, other.accumulation = counting, accumulation
        results[ending] = other.compute()
    figures: dict[str, Estimate] = {}
    for ending, result in results.items():
        figures |= {f"mpxap{ending}_{number}": mean for number, mean in result.by_groups.items()}
        figures[f"mpxap{ending}"] = result.mean
    single = torch.tensor([len(pair.groups) == 1 for pair in data.pairs])[found.pair] & found.shown
    if single.any():
        shares = found.shares()
        columns = torch.stack([torch.ones_like(found.mass), *shares.values()], dim=1)[single]
        sums = _drawn_sums(found.image[single], columns, replicates, seed)
        for place, name in enumerate(shares, start=1):
            figures[name] = estimate(sums[:, place] / sums[:, 0])
    with metric.sync_context():  # the pixels of all processes
        counted = metric.histogram.sum(dim=1)
    share = counted[:, 1] / counted.sum(dim=1)
    seen = torch.tensor(results[""].per_pair).isfinite()
    figures["chance"] = Estimate(float(share[seen].mean()), float("nan"), float("nan"))
    return Result(
        "cue-localization",
        subject.label,
        figures,
        scores=_scores(found, split),
        details={
            "pairs": [
                {
                    "first": split.class_names[pair.first],
                    "second": split.class_names[pair.second],
                    "groups": [data.groups[group].name for group in pair.groups],
                    "images": int((found.pair == number).sum()),
                    **found.of_pair(number),
                    **{f"pxap{ending}": result.per_pair[number] for ending, result in results.items()},
                }
                for number, pair in enumerate(data.pairs)
            ],
            "pairs_by_groups": {
                str(n): sum(len(pair.groups) == n for pair in data.pairs)
                for n in sorted({len(pair.groups) for pair in data.pairs})
            },
            "pairs_without_images": results[""].empty,
            "images": len(data.samples),
            "samples": len(found.pair),
            "segmented": all(bool(split.records[image].masks) for image in data.samples),
            "normalization": subject.normalization,
            "thresholds": subject.thresholds,
        },
    )


def _drawn_sums(
    keys: Int[Tensor, " s"], columns: Float[Tensor, "s k"], replicates: int, seed: int
) -> Float[Tensor, "r k"]:
    """Sums of columns in every bootstrap sample of the keys, some keys at a time: the weights of all are large."""
    each, place = torch.unique(keys, return_inverse=True)
    own = columns.new_zeros(len(each), columns.shape[1]).index_add_(0, place, columns)
    sums = columns.new_zeros(replicates + 1, columns.shape[1])
    for some in torch.split(torch.arange(len(each)), 256):
        sums += weights(each[some], replicates, seed) @ own[some]
    return sums


def _scores(found: _Found, split: Split) -> dict[str, float]:
    images, place = torch.unique(found.image[found.shown], return_inverse=True)
    total = torch.zeros(len(images), dtype=torch.float64).index_add_(0, place, found.mass[found.shown])
    mean = total / place.bincount(minlength=len(images))
    return {
        split.records[image].id: value for image, value in zip(images.tolist(), mean.tolist(), strict=True)
    }
