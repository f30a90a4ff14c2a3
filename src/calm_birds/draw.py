"""Paint a bird: the colours of its plumage, the light on it, and the pixels of its surfaces.

The plumage of a part group decides the colour of that group's points and of no others. Colours are RGB in 0..1 before
lighting. Feather texture (soft streaks, rows of wing feathers) multiplies them and is the same for all species.

The renderer writes every point of every surface that faces the viewer to the pixels that it covers, far points first,
so that near ones hide them. Colour, part label and mask come from the same write and agree to the pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from calm_birds import anatomy
from calm_birds.anatomy import PART_ID, TAIL_PIVOT, Array, Leg, Pose, Surface, wing_points
from calm_birds.species import Head, Plumage, Species

__all__ = ["COLORS", "Light", "Painting", "bird_surfaces", "finish", "paint_bird", "rgb", "sample_light"]

COLORS = {
    "blue": (46, 104, 190), "brown": (112, 76, 48), "purple": (118, 62, 152), "rufous": (176, 84, 40),
    "grey": (128, 135, 143), "yellow": (246, 205, 62), "olive": (126, 128, 58), "green": (56, 142, 72),
    "pink": (238, 138, 158), "orange": (240, 132, 40), "black": (36, 36, 44), "white": (244, 242, 234),
    "red": (206, 44, 48), "buff": (226, 194, 146), "iridescent": (40, 124, 130),
}  # fmt: skip
"""RGB of CUB's colour words."""


def rgb(color: str) -> Array:
    """Return a colour word as RGB in 0..1."""
    return np.array(COLORS[color], np.float32) / 255


def enlarge(values: Array, side: int, *, cubic: bool = False) -> Array:
    """Interpolate a square array (n, n, ...) at side x side points, linearly or by Keys' cubic (a = -0.75).

    Versions of OpenCV differ in the last bit of an enlarged array, and that bit may decide a pixel. NumPy's sums and
    products of single values do not.
    """
    place = (np.arange(side) + 0.5) * len(values) / side - 0.5
    first, t = np.floor(place).astype(int), (place % 1).astype(np.float32)
    weights = [1 - t, t]
    if cubic:
        u, a = 1 - t, np.float32(-0.75)
        inner = [((a + 2) * x - (a + 3)) * x * x + 1 for x in (t, u)]
        first, weights = first - 1, [a * t * u * u, *inner, a * u * t * t]
    for _ in range(2):  # down the rows, then across
        rows = [values[np.clip(first + tap, 0, len(values) - 1)] for tap in range(len(weights))]
        shape = (-1,) + (1,) * (values.ndim - 1)
        parts = [weight.reshape(shape) * row for weight, row in zip(weights, rows, strict=True)]
        values = sum(parts[1:], parts[0]).swapaxes(0, 1)
    return values


@lru_cache(maxsize=4)
def _noise(size: int) -> Array:
    """Return a fixed tile of smooth noise (size, size), mean 0, standard deviation 1."""
    rng = np.random.default_rng(7)
    coarse = rng.standard_normal((size // 4, size // 4)).astype(np.float32)
    tile = enlarge(coarse, size, cubic=True)
    return np.asarray((tile - tile.mean()) / tile.std(), np.float32)


def _grain(u: Array, v: Array, along: float, across: float) -> Array:
    """Look noise up in texture coordinates: features are ``1 / along`` long and ``1 / across`` wide."""
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
    """Return where the second colour shows on back, breast or belly (N,), 0 or 1."""
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
    out = np.tile(rgb(look.nape), (len(x), 1))
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
    out = np.full((len(surface.u), 3), 0.05, np.float32)
    if look.eye != "black":
        out[surface.u > 0.55] = rgb(look.eye)
    out[surface.u > 0.90] *= 0.6
    glint = (surface.u * np.cos(surface.v) - 0.30) ** 2 + (surface.u * np.sin(surface.v) - 0.38) ** 2
    out[glint < 0.10] = 1.6
    return out


@lru_cache(maxsize=512)
def bird_surfaces(species: Species, density: float) -> dict[str, tuple[Surface, Array]]:
    """Return every surface of the species at rest with its colours (N, 3).

    Keys: body, wing (the left one), tail, and in the head's frame head, bill, eye (the left one), crest (only
    for crested species).
    """
    look = species.head
    trunk, skull, flank = anatomy.body(density), anatomy.head(density), anatomy.wing(density)
    rear, beak = anatomy.tail(species.tail.shape, density), anatomy.bill(look.bill_shape, density)
    disc = anatomy.eye(2 * density)
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


@dataclass(frozen=True)
class Light:
    """A sun (unit vector towards it, view frame), its strength, and the sky's and the ground's glow (RGB)."""

    sun: Array
    strength: float
    sky: Array
    ground: Array


def sample_light(rng: np.random.Generator) -> Light:
    """Draw random light: a sun above and before the bird, left or right, with the glow of sky and ground."""
    sun = np.array([rng.uniform(-0.8, 0.8), rng.uniform(0.45, 1.0), rng.uniform(0.35, 0.9)], np.float32)
    strength = rng.uniform(0.45, 0.75)
    warm = rng.normal(0, 0.03)
    sky = (1.18 - strength) * np.array([0.96 + warm, 1.0, 1.04 - warm], np.float32)
    ground = np.array([0.36, 0.36, 0.31], np.float32) * rng.uniform(0.7, 1.15)
    return Light(sun / np.linalg.norm(sun), float(strength), sky.astype(np.float32), ground)


def finish(picture: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Apply exposure, colour temperature, a brightness gradient and a little noise; return uint8 (h, w, 3)."""
    height, width = picture.shape[:2]
    warm = rng.normal(0, 0.035)
    gain = rng.uniform(0.86, 1.10) * np.array([1 + warm, 1.0, 1 - warm], np.float32)
    slope = rng.uniform(-0.12, 0.12, 2)
    gradient = 1 + slope[0] * np.linspace(-1, 1, width)[None] + slope[1] * np.linspace(-1, 1, height)[:, None]
    noise = rng.normal(0, 0.007, (height, width, 1))
    lit = picture * gain * gradient[..., None].astype(np.float32) + noise.astype(np.float32)
    return np.asarray(np.clip(lit, 0, 1) * 255 + 0.5, np.float32).astype(np.uint8)


_DENSITY_STEP = 1.15  # point grids are cached at powers of this many points per unit
_TO_RIGHT = np.uint8(PART_ID["right wing"] - PART_ID["left wing"])
_THIN = (PART_ID["tail"], PART_ID["left wing"], PART_ID["right wing"])  # seen from both sides
_MIRROR = np.array([1, -1, 1], np.float32)


@dataclass
class Painting:
    """Colours (n, n, 3) in 0..1 and the part label of each pixel (n, n), 0 where no bird is."""

    color: Array
    part: NDArray[np.uint8]


def _shade(colors: Array, normals: Array, light: Light) -> Array:
    """Light by a soft sun and a sky brighter than the ground, with a thin darker rim that rounds the body."""
    sun = np.clip(normals @ light.sun * 0.75 + 0.25, 0, 1)[:, None]
    up = (normals[:, 1:2] + 1) / 2
    rim = 0.78 + 0.22 * np.clip(normals[:, 2:3] * 1.8, 0, 1)
    glow = light.sky * up + light.ground * (1 - up)
    return np.asarray(colors * (glow + light.strength * sun) * rim, np.float32)


def _placed_surfaces(
    species: Species, pose: Pose, density: float
) -> Iterator[tuple[Array, Array, Array, NDArray[np.uint8]]]:
    """Yield points and normals in the bird's frame, colours and part labels of every surface in its pose.

    Paired parts come twice; the labels of the right one are 4 higher.
    """
    for name, (surface, colors) in bird_surfaces(species, density).items():
        points, normals, part = surface.points, surface.normals, surface.part
        if name == "body":
            yield points, normals, colors, part
        elif name == "tail":
            yield points @ pose.tail.T + TAIL_PIVOT, normals @ pose.tail.T, colors, part
        elif name == "wing":
            left, right = pose.wings
            yield wing_points(points, left, 1.0), normals @ left.T, colors, part
            yield wing_points(points, right, -1.0), (normals * _MIRROR) @ right.T, colors, part + _TO_RIGHT
        else:
            head = pose.head.T
            yield points @ head + pose.head_at, normals @ head, colors, part
            if name == "eye":
                right_eye = (points * _MIRROR) @ head + pose.head_at
                yield right_eye, (normals * _MIRROR) @ head, colors, part + _TO_RIGHT


def _paint_leg(painting: Painting, leg: Leg, label: int, color: Array, pose: Pose, light: Light) -> None:
    """Paint thigh, shank and toes as thick strokes; what lies under the body is painted over later."""
    unit, facing = pose.unit, float(np.sign(pose.view[0, 0]))
    tone = color * (0.5 * (light.sky + light.ground) + 0.55 * light.strength)

    def stroke(a: Array, b: Array, width: float, gain: float = 1.0, mark: bool = True) -> None:
        thick = max(1, round(width * unit))
        shift = 4 if thick > 1 else 0
        start, end = ((round(float(x) * 2**shift), round(float(y) * 2**shift)) for x, y in (a, b))
        cv2.line(painting.color, start, end, tuple(float(c) * gain for c in tone), thick, cv2.LINE_8, shift)
        if mark:
            cv2.line(painting.part, start, end, label, thick, cv2.LINE_8, shift)

    foot = leg.foot
    stroke(leg.hip, leg.ankle, 0.085, 0.95)
    stroke(leg.ankle, foot, 0.048)
    for reach, drop in ((0.105, 0.030), (0.085, 0.048), (-0.065, 0.030)):
        stroke(foot, foot + np.array([facing * reach * unit, drop * unit], np.float32), 0.034, 0.88)
    shine = np.array([-0.008 * unit, 0], np.float32)
    stroke(leg.ankle + shine, foot + shine, 0.014, 1.25, mark=False)


def paint_bird(painting: Painting, species: Species, pose: Pose, light: Light, tint: Array) -> None:
    """Paint a bird over a background, in place.

    Args:
        painting: the picture to paint on; square, at the supersampled size.
        species: the species whose plumage is used.
        pose: place and posture of the bird; its pixels are those of ``painting``.
        light: shading of the surfaces.
        tint: RGB factors of this individual's plumage, the same for every species.
    """
    side = painting.part.shape[0]
    legs = sorted(zip(pose.legs, ("left leg", "right leg"), strict=True), key=lambda pair: pair[0].depth)
    for leg, name in legs:
        far = 0.82 if leg is legs[0][0] else 1.0
        _paint_leg(painting, leg, PART_ID[name], rgb(species.leg) * tint * np.float32(far), pose, light)

    density = _DENSITY_STEP ** int(np.ceil(np.log(0.86 * pose.unit) / np.log(_DENSITY_STEP)))
    visible = []
    turn = (pose.view / pose.unit).T
    for points, normals, colors, part in _placed_surfaces(species, pose, density):
        turned = normals @ turn
        if part[0] in _THIN:
            turned *= np.where(turned[:, 2:] < 0, -1, 1).astype(np.float32)
        front = np.flatnonzero(turned[:, 2] > -0.05)
        visible.append((pose.place(points[front]), turned[front], colors[front], part[front]))
    where, normals, colors, labels = (np.concatenate(arrays) for arrays in zip(*visible, strict=True))
    column, row = (where[:, :2] - 0.5).astype(np.int32).T  # truncated, not floored: points outside are left out below
    inside = np.flatnonzero((where[:, :2] >= 0.5).all(1) & (column < side - 1) & (row < side - 1))
    order = inside[np.argsort(where[inside, 2])]
    flat = row[order] * side + column[order]
    winner = np.full(side * side, -1, np.int32)
    footprint = (flat[:, None] + np.array([0, 1, side, side + 1], np.int32)).ravel()
    # Far points are written first, so that the nearest point of each pixel is the one that stays.
    winner[footprint] = np.repeat(order.astype(np.int32), 4)
    hit = np.flatnonzero(winner >= 0)
    seen = winner[hit]
    painting.color.reshape(-1, 3)[hit] = _shade(colors[seen] * tint, normals[seen], light)
    painting.part.reshape(-1)[hit] = labels[seen]
