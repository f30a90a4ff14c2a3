"""The colours of feathers: a species' words turned into a colour for every point of every surface.

What a group's look says decides the colour of that group's points and of nothing else. Colours are RGB in
0..1 before lighting. Feather texture (soft streaks, wing rows) multiplies them and is the same for all species.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from calm.data.birds import anatomy
from calm.data.birds.anatomy import PART_ID, Array, Surface
from calm.data.birds.species import Head, Plumage, Species

__all__ = ["COLORS", "bird_surfaces", "rgb"]

COLORS = {
    "blue": (46, 104, 190), "brown": (112, 76, 48), "purple": (118, 62, 152), "rufous": (176, 84, 40),
    "grey": (128, 135, 143), "yellow": (246, 205, 62), "olive": (126, 128, 58), "green": (56, 142, 72),
    "pink": (238, 138, 158), "orange": (240, 132, 40), "black": (36, 36, 44), "white": (244, 242, 234),
    "red": (206, 44, 48), "buff": (226, 194, 146), "iridescent": (40, 124, 130),
}  # fmt: skip
"""RGB of CUB's colour words."""


def rgb(color: str) -> Array:
    """A colour word as RGB in 0..1."""
    return np.array(COLORS[color], np.float32) / 255


@lru_cache(maxsize=4)
def _noise(size: int) -> Array:
    """A fixed tile of smooth noise (size, size), mean 0, standard deviation 1."""
    rng = np.random.default_rng(7)
    tile = cv2.resize(
        rng.standard_normal((size // 4, size // 4)).astype(np.float32),
        (size, size),
        interpolation=cv2.INTER_CUBIC,
    )
    return np.asarray((tile - tile.mean()) / tile.std(), np.float32)


def _grain(u: Array, v: Array, along: float, across: float) -> Array:
    """Noise looked up in texture coordinates: features are ``1 / along`` long and ``1 / across`` wide."""
    tile = _noise(256)
    rows = (u * along * 4).astype(int) % 256
    columns = (v * across * 4).astype(int) % 256
    return np.asarray(tile[rows, columns], np.float32)


def _spots(u: Array, v: Array, pitch: float, radius: float) -> NDArray[np.bool_]:
    row = np.floor(u / pitch)
    du = u / pitch - row - 0.5
    shifted = v / pitch + 0.5 * (row % 2)
    dv = shifted - np.floor(shifted) - 0.5
    return np.asarray(du**2 + dv**2 < (radius / pitch) ** 2)


def _trunk_pattern(look: Plumage, surface: Surface) -> Array:
    """Where the second colour shows on back, breast or belly (N,), 0 or 1."""
    u, v = surface.u, surface.v * 0.22
    if look.pattern == "spotted":
        return _spots(u, v, 0.088, 0.031).astype(np.float32)
    if look.pattern == "striped":
        wave = v + 0.006 * np.sin(40 * u)
        return (np.mod(wave + 0.02, 0.085) < 0.036).astype(np.float32)
    if look.pattern == "multi-colored":
        return (_grain(u, v, 12, 12) > 0.2).astype(np.float32)
    return np.zeros_like(u)


def _mix(color: str, second: str, where: Array) -> Array:
    if not second:
        return np.broadcast_to(rgb(color), (len(where), 3)).copy()
    return rgb(color) * (1 - where[:, None]) + rgb(second) * where[:, None]


def _trunk(species: Species, surface: Surface) -> Array:
    out = np.empty((len(surface.u), 3), np.float32)
    fine = _grain(surface.u, surface.v, 16, 10)[:, None]
    for group in ("back", "breast", "belly"):
        look: Plumage = getattr(species, group)
        where = surface.part == PART_ID[group]
        out[where] = _mix(look.color, look.second, _trunk_pattern(look, surface))[where]
    for part in ("nape", "throat"):
        out[surface.part == PART_ID[part]] = rgb(getattr(species.head, part))
    return out * (1 + 0.06 * fine)


def _skull(look: Head, surface: Surface, shape: Array) -> Array:
    x, z = surface.u, surface.v
    out = np.empty((len(x), 3), np.float32)
    out[:] = rgb(look.nape)
    for part in ("crown", "forehead", "throat"):
        out[surface.part == PART_ID[part]] = rgb(getattr(look, part))
    from_eye = np.stack([shape[:, 0], np.abs(shape[:, 1]), shape[:, 2]], 1) - anatomy.EYE
    line = z - 0.22 - 0.12 * (0.45 - x)  # height over a line from the bill through the eye
    if look.pattern == "capped":
        out[(z + 0.1 * x > 0.30)] = rgb(look.crown)
    elif look.pattern == "masked":
        out[((x - 0.42) / 0.80) ** 2 + (line / 0.36) ** 2 < 1] = rgb("black")
    elif look.pattern == "eyeline":
        out[(np.abs(line) < 0.14) & (x > -0.75)] = rgb("black")
    elif look.pattern == "eyebrow":
        out[(np.abs(line - 0.36) < 0.15) & (x > -0.75)] = rgb("white")
        out[(np.abs(line) < 0.13) & (x > -0.75)] = rgb("black")
    elif look.pattern == "malar":
        out[(np.abs(z + 0.36) < 0.13) & (x > 0.0)] = rgb("black")
    elif look.pattern == "eyering":
        out[np.linalg.norm(from_eye, axis=1) < 0.062] = rgb("white")
    elif look.pattern == "striped":
        out[(z > 0.45) & (np.abs(np.abs(shape[:, 1]) - 0.06) < 0.02)] = rgb("black")
    return out * (1 + 0.05 * _grain(x, z, 10, 10)[:, None])


def _wing(look: Plumage, surface: Surface) -> Array:
    u, v = surface.u, surface.v
    second = np.zeros_like(u)
    if look.pattern == "striped":  # two wing bars
        for bar in (0.30, 0.50):
            second += (np.abs(u - bar - 0.05 * v) < 0.045) & (v > -0.75)
    elif look.pattern == "spotted":
        second += _spots(u * 0.9, v * 0.16, 0.088, 0.031)
    elif look.pattern == "multi-colored":  # flight feathers in the second colour
        second += u + 0.12 * v > 0.52
    out = _mix(look.color, look.second, second)
    # Rows of small feathers in front, long flight feathers behind: dark seams, lighter middles.
    scale = np.cos(u * 60 + 3.0 * np.cos(v * 9.0)) * (u < 0.42)
    quill = np.cos((v + 0.35 * u) * 15) * (u >= 0.42)
    edge = 1 - 0.30 * np.clip((np.abs(v) - 0.80) / 0.2, 0, 1) - 0.25 * np.clip((u - 0.85) / 0.15, 0, 1)
    return np.asarray(out * ((1 + 0.10 * scale + 0.13 * quill) * edge)[:, None], np.float32)


def _tail(species: Species, surface: Surface) -> Array:
    u, v = surface.u, surface.v
    second = np.zeros_like(u)
    if species.tail.pattern == "striped":
        second += np.mod(u * 4 + 0.3, 1) < 0.42
    elif species.tail.pattern == "multi-colored":
        second += u > 0.62
    elif species.tail.pattern == "spotted":
        second += _spots(u * 0.46, v * 0.12, 0.088, 0.031)
    return _mix(species.tail.color, species.tail.second, second) * (1 + 0.12 * np.cos(v * 14))[:, None]


def _eye(look: Head, surface: Surface) -> Array:
    out = np.empty((len(surface.u), 3), np.float32)
    out[:] = 0.05
    if look.eye != "black":
        out[surface.u > 0.55] = rgb(look.eye)
    out[surface.u > 0.90] *= 0.6
    glint = (surface.u * np.cos(surface.v) - 0.30) ** 2 + (surface.u * np.sin(surface.v) - 0.38) ** 2
    out[glint < 0.10] = 1.6
    return out


@lru_cache(maxsize=512)
def bird_surfaces(species: Species, density: float) -> dict[str, tuple[Surface, Array]]:
    """Every surface of the species at rest with its colours (N, 3).

    Keys: body, wing (the left one), tail, and in the head's frame head, bill, eye (the left one), crest (only
    for crested species).
    """
    look = species.head
    trunk, skull, flank = anatomy.body(density), anatomy.head(density), anatomy.wing(density)
    rear, beak, disc = (
        anatomy.tail(species.tail.shape, density),
        anatomy.bill(look.bill_shape, density),
        anatomy.eye(2 * density),
    )
    lower = np.where(beak.v > 1.75, 0.72, 1.0) * np.where(np.abs(beak.v - 1.75) < 0.14, 0.6, 1.0)
    surfaces = {
        "body": (trunk, _trunk(species, trunk)),
        "wing": (flank, _wing(species.wing, flank)),
        "tail": (rear, _tail(species, rear)),
        "head": (skull, _skull(look, skull, skull.points)),
        "bill": (beak, rgb(look.bill_color) * (lower * (1.1 - 0.2 * beak.u))[:, None]),
        "eye": (disc, _eye(look, disc)),
    }  # fmt: skip
    if look.pattern == "crested":
        tuft = anatomy.crest(density)
        surfaces["crest"] = (tuft, rgb(look.crown) * (1 + 0.10 * np.cos(tuft.v * 8))[:, None])
    return {name: (surface, colors.astype(np.float32)) for name, (surface, colors) in surfaces.items()}
