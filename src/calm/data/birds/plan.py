"""What to draw: the configuration of a data set, and the list of images that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from calm.data.birds.species import Species

__all__ = ["BirdsConfig", "Item", "plan_items"]


@dataclass(frozen=True)
class BirdsConfig:
    """What decides every byte of the data set."""

    species: int
    images_per_species: int
    size: int
    seed: int
    test_fraction: float

    @property
    def test_images(self) -> int:
        """Test images of each species."""
        return round(self.images_per_species * self.test_fraction)


@dataclass(frozen=True)
class Item:
    """One image to be: its id (from 1), class (from 0), path without suffix, and whether it is for training."""

    number: int
    label: int
    stem: str
    train: bool


def plan_items(config: BirdsConfig, species: Sequence[Species]) -> list[Item]:
    """Every image in the order of its id: species by species, the test images drawn by lot within each."""
    items: list[Item] = []
    for label, kind in enumerate(species):
        order = np.random.default_rng([config.seed, label, 1]).permutation(config.images_per_species)
        test = set(order[: config.test_images].tolist())
        for index in range(config.images_per_species):
            number = len(items) + 1
            stem = f"{label + 1:03d}.{kind.name}/{kind.name}_{index + 1:04d}_{number}"
            items.append(Item(number, label, stem, index not in test))
    return items
