"""Light on the bird, and the camera that takes the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calm.data.birds.anatomy import Array

__all__ = ["Light", "finish", "sample_light"]


@dataclass(frozen=True)
class Light:
    """A sun (unit vector towards it, view frame), its strength, and the sky's and the ground's glow (RGB)."""

    sun: Array
    strength: float
    sky: Array
    ground: Array


def sample_light(rng: np.random.Generator) -> Light:
    """A sun from above, left or right, in front of the bird, with sky and ground glow."""
    sun = np.array([rng.uniform(-0.8, 0.8), rng.uniform(0.45, 1.0), rng.uniform(0.35, 0.9)], np.float32)
    strength = rng.uniform(0.45, 0.75)
    warm = rng.normal(0, 0.03)
    sky = (1.18 - strength) * np.array([0.96 + warm, 1.0, 1.04 - warm], np.float32)
    ground = np.array([0.36, 0.36, 0.31], np.float32) * rng.uniform(0.7, 1.15)
    return Light(sun / np.linalg.norm(sun), float(strength), sky.astype(np.float32), ground)


def finish(picture: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The camera: exposure, colour temperature, a gradient of brightness, a little noise -> uint8 (h, w, 3)."""
    height, width = picture.shape[:2]
    warm = rng.normal(0, 0.035)
    gain = rng.uniform(0.86, 1.10) * np.array([1 + warm, 1.0, 1 - warm], np.float32)
    slope = rng.uniform(-0.12, 0.12, 2)
    gradient = 1 + slope[0] * np.linspace(-1, 1, width)[None] + slope[1] * np.linspace(-1, 1, height)[:, None]
    noise = rng.normal(0, 0.007, (height, width, 1))
    lit = picture * gain * gradient[..., None].astype(np.float32) + noise.astype(np.float32)
    return np.asarray(np.clip(lit, 0, 1) * 255 + 0.5, np.float32).astype(np.uint8)
