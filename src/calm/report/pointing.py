"""Does the difference map of two classes point at the part that tells them apart?

A small form of cue localization (paper, section 5.2) for pairs that differ in exactly one part group: where the
map's peak is, and how much of its mass lies in the part. Pixels are those of the protocol, 224x224.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.data.cue_files import read_pairs, read_part_points, read_segmentation
from calm.data.cues import PROTOCOL_SIZE, CuePair, group_mask, part_regions
from calm.data.records import Split
from calm.errors import CalmError
from calm.normalize import Normalization, normalize

__all__ = ["CueTask", "Explain", "Pointing", "chance", "interval", "point", "read_task"]

Explain = Callable[[Int[Tensor, " b"], Int[Tensor, " b"], Int[Tensor, " b"]], Float[Tensor, "b H W"]]
"""(indices of images, first classes, second classes) to difference maps at the protocol's size."""

CHUNK = 64


@dataclass(frozen=True)
class CueTask:
    """Images and pairs to be tested.

    Attributes:
        pairs: of classes; each differs in one part group.
        regions: part group of each pixel of each image of the split, -1 outside the bird, (n, H, W) int8.
        image: of each sample, its image in the split, (s,).
        pair: of each sample, its pair; the image shows one of its classes, and its part is visible, (s,).
    """

    pairs: tuple[CuePair, ...]
    regions: Int[Tensor, "n H W"]
    image: Int[Tensor, " s"]
    pair: Int[Tensor, " s"]

    def truth(self, samples: Int[Tensor, " b"]) -> Bool[Tensor, "b H W"]:
        """The pixels of the part that differs."""
        masks = [
            group_mask(self.regions[image], self.pairs[pair].groups)
            for image, pair in zip(self.image[samples].tolist(), self.pair[samples].tolist(), strict=True)
        ]
        return torch.stack(masks)

    def batches(self) -> Iterator[Int[Tensor, " b"]]:
        """All samples, some at a time."""
        yield from torch.split(torch.arange(len(self.image)), CHUNK)


@dataclass(frozen=True)
class Pointing:
    """How one method did, sample by sample.

    Attributes:
        hit: whether the highest value of the map lies in the part, (s,).
        mass: which share of the map lies in the part, 0 to 1, (s,).
    """

    hit: Bool[Tensor, " s"]
    mass: Float[Tensor, " s"]


def read_task(split: Split, root: Path) -> CueTask:
    """The task of a split of CUB or birds below ``root``.

    Raises:
        CalmError: a file is missing, or no pair of classes differs in just one part group.
    """
    pairs = tuple(read_pairs(root, (1,)))
    if not pairs:
        raise CalmError(f"no two classes of {root} differ in exactly one part group: try more species")
    records = split.records
    points = read_part_points(root).select(record.id for record in records)
    sizes = torch.tensor([record.size or (0, 0) for record in records])
    with ThreadPoolExecutor() as pool:
        masks = list(pool.map(lambda record: read_segmentation(record.masks[0]), records))
    chunks = torch.split(torch.arange(len(records)), CHUNK)
    regions = [
        part_regions(
            points.select(records[i].id for i in chunk.tolist()),
            sizes[chunk],
            inside=torch.stack([masks[i] for i in chunk.tolist()]),
        )
        for chunk in chunks
    ]
    everywhere = torch.cat(regions)
    visible = points.visible_groups()
    samples = [
        (image, number)
        for number, pair in enumerate(pairs)
        for image, record in enumerate(records)
        if record.label in (pair.first, pair.second)
        and visible[image, pair.groups[0]]
        and bool((everywhere[image] == pair.groups[0]).any())
    ]
    if not samples:
        raise CalmError(f"no test image of {root} shows a part that tells two classes apart: try more images")
    image, pair = torch.tensor(samples).unbind(dim=1)
    return CueTask(pairs, everywhere, image, pair)


def point(task: CueTask, explain: Explain, how: Normalization) -> Pointing:
    """Test a method.

    Args:
        task: what is asked.
        explain: the method's difference maps.
        how: its protocol's normalisation, before mass is summed: ``clipping`` for CALM, ``minmax`` for others.
    """
    classes = torch.tensor([(pair.first, pair.second) for pair in task.pairs])
    hits, masses = [], []
    for samples in task.batches():
        first, second = classes[task.pair[samples]].unbind(dim=1)
        maps = explain(task.image[samples], first, second).float()
        truth = task.truth(samples).flatten(1)
        flat = normalize(maps, how).flatten(1)
        hits.append(truth.gather(1, maps.flatten(1).argmax(dim=1, keepdim=True)).squeeze(1))
        masses.append((flat * truth).sum(dim=1) / flat.sum(dim=1).clamp(min=torch.finfo(flat.dtype).tiny))
    return Pointing(torch.cat(hits), torch.cat(masses))


def chance(task: CueTask) -> tuple[Pointing, Pointing]:
    """What a random pixel of the picture, and of the bird, would do: ``hit`` then has probabilities."""
    total = PROTOCOL_SIZE[0] * PROTOCOL_SIZE[1]
    part, bird = [], []
    for samples in task.batches():
        part.append(task.truth(samples).flatten(1).sum(dim=1))
        bird.append((task.regions[task.image[samples]] >= 0).flatten(1).sum(dim=1))
    area = torch.cat(part).float()
    anywhere, inside = area / total, area / torch.cat(bird)
    return Pointing(anywhere, anywhere), Pointing(inside, inside)


def interval(
    values: Tensor, image: Int[Tensor, " s"], *, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """The 95 percent bootstrap interval of a mean over samples; images are drawn, with all their samples.

    Args:
        values: one per sample.
        image: the image of each sample.
    """
    _, place, counts = np.unique(image.numpy(), return_inverse=True, return_counts=True)
    number = len(counts)
    sums = np.bincount(place, weights=values.double().numpy(), minlength=number)
    drawn = np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), size=draws)
    low, high = np.percentile((drawn @ sums) / (drawn @ counts), (2.5, 97.5))
    return float(low), float(high)
