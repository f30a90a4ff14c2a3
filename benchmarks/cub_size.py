"""Birds of CUB's size: 200 species, 30 or 29 test images of each, 191 pairs of species."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np

from calm.evaluate.cue_localization import CueData

__all__ = ["IMAGES", "PAIRS", "SPECIES", "cub_pairs"]

SPECIES, IMAGES = 200, 5794
"""Classes and test images of CUB."""

PAIRS = {1: 31, 2: 64, 3: 96}
"""CUB's pairs of classes, by the number of part groups in which they differ."""


def cub_pairs(data: CueData) -> CueData:
    """As many pairs as CUB has of each kind, evenly from those that there are, and the images that have one of them."""
    of_kind = defaultdict(list)
    for number, pair in enumerate(data.pairs):
        of_kind[len(pair.groups)].append(number)
    chosen = [
        numbers[place]
        for kind, numbers in sorted(of_kind.items())
        for place in np.linspace(0, len(numbers) - 1, PAIRS[kind]).astype(int).tolist()
    ]
    if len(set(chosen)) != sum(PAIRS.values()):
        raise ValueError("not as many pairs as CUB has: draw 200 species")
    new = {number: place for place, number in enumerate(chosen)}
    kept = {image: tuple(new[n] for n in numbers if n in new) for image, numbers in data.samples.items()}
    samples = {image: numbers for image, numbers in kept.items() if numbers}
    return replace(data, pairs=tuple(data.pairs[number] for number in chosen), samples=samples)
