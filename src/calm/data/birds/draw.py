"""Draw one bird: turn its surfaces, keep what the viewer sees, and shade it.

The renderer splats points: every point of every surface that faces the viewer is written to the pixels it
covers, far points first, so that near ones hide them. Colour, part label and mask come from the same write and
agree to the pixel. It works in a picture ``SUPERSAMPLE`` times larger than asked, averaged down at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from calm.data.birds.anatomy import PART_ID, TAIL_PIVOT, Array, Surface
from calm.data.birds.plumage import bird_surfaces, rgb
from calm.data.birds.pose import Leg, Pose, wing_points
from calm.data.birds.species import Species

__all__ = ["Light", "Painting", "paint_bird"]

_DENSITY_STEP = 1.15  # point grids are cached at powers of this many points per unit
_MIRROR = np.array([1, -1, 1], np.float32)


@dataclass(frozen=True)
class Light:
    """A sun (unit vector towards it, view frame), its strength, and the sky's and the ground's glow (RGB)."""

    sun: Array
    strength: float
    sky: Array
    ground: Array


@dataclass
class Painting:
    """Colours (n, n, 3) in 0..1 and the part label of each pixel (n, n), 0 where no bird is."""

    color: Array
    part: NDArray[np.uint8]


def _shade(colors: Array, normals: Array, light: Light) -> Array:
    """Soft sun plus a sky that is brighter than the ground, and a thin darker rim that rounds the body."""
    sun = np.clip(normals @ light.sun * 0.75 + 0.25, 0, 1)[:, None]
    up = (normals[:, 1:2] + 1) / 2
    rim = 0.78 + 0.22 * np.clip(normals[:, 2:3] * 1.8, 0, 1)
    glow = light.sky * up + light.ground * (1 - up)
    return colors * (glow + light.strength * sun) * rim


def _parts(species: Species, pose: Pose, density: float) -> list[tuple[Surface, Array, Array, Array, int]]:
    """Surface, colours, posed points and normals (bird frame), and what to add to a label for the right side."""
    surfaces = bird_surfaces(species, density)
    posed = []
    for name, (surface, colors) in surfaces.items():
        points, normals = surface.points, surface.normals
        if name == "tail":
            posed.append((surface, colors, points @ pose.tail.T + TAIL_PIVOT, normals @ pose.tail.T, 0))
        elif name == "wing":
            for hand, turn, other in ((1.0, pose.wings[0], 0), (-1.0, pose.wings[1], 4)):
                mirror = np.array([1, hand, 1], np.float32)
                posed.append((surface, colors, wing_points(points, turn, hand), (normals * mirror) @ turn.T, other))
        elif name == "eye":
            for mirror, other in ((np.ones(3, np.float32), 0), (_MIRROR, 4)):
                posed.append((surface, colors, (points * mirror) @ pose.head.T + pose.head_at,
                              (normals * mirror) @ pose.head.T, other))
        elif name == "body":
            posed.append((surface, colors, points, normals, 0))
        else:
            posed.append((surface, colors, points @ pose.head.T + pose.head_at, normals @ pose.head.T, 0))
    return posed


def _paint_leg(painting: Painting, leg: Leg, label: int, color: Array, pose: Pose, light: Light) -> None:
    """Thigh, shank and toes as thick strokes; what lies under the body is painted over later."""
    unit, facing = pose.unit, float(np.sign(pose.view[0, 0]))
    tone = color * (0.5 * (light.sky + light.ground) + 0.55 * light.strength)

    def stroke(a: Array, b: Array, width: float, gain: float = 1.0, mark: bool = True) -> None:
        ends = [tuple(int(round(float(c) * 16)) for c in point) for point in (a, b)]
        thick = max(1, round(width * unit))
        cv2.line(painting.color, *ends, tuple(float(c) * gain for c in tone), thick, cv2.LINE_8, 4)
        if mark:
            cv2.line(painting.part, *ends, label, thick, cv2.LINE_8, 4)

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
        painting: what to paint on; square, at the supersampled size.
        species: whose plumage to use.
        pose: where and how the bird stands; its pixels are those of ``painting``.
        light: shading of the surfaces.
        tint: RGB factors of this individual's plumage, the same for every species.
    """
    side = painting.part.shape[0]
    legs = sorted(zip(pose.legs, ("left leg", "right leg"), strict=True), key=lambda pair: pair[0].depth)
    for leg, name in legs:
        far = 0.82 if leg is legs[0][0] else 1.0
        _paint_leg(painting, leg, PART_ID[name], rgb(species.leg) * tint * np.float32(far), pose, light)

    density = _DENSITY_STEP ** int(np.ceil(np.log(0.86 * pose.unit) / np.log(_DENSITY_STEP)))
    positions, normals, colors, labels = [], [], [], []
    turn = (pose.view / pose.unit).T
    for surface, color, points, normal, other in _parts(species, pose, density):
        turned = normal @ turn
        if surface.part[0] in (PART_ID["tail"], PART_ID["left wing"]):  # thin: seen from both sides
            turned *= np.where(turned[:, 2:] < 0, -1, 1).astype(np.float32)
        front = np.flatnonzero(turned[:, 2] > -0.05)
        positions.append(pose.place(points[front]))
        normals.append(turned[front])
        colors.append(color[front])
        labels.append(surface.part[front] + np.uint8(other))
    where = np.concatenate(positions)
    column, row = (where[:, :2] - 0.5).astype(np.int32).T  # cut, not floored: outside is left out below
    inside = np.flatnonzero((where[:, :2] >= 0.5).all(1) & (column < side - 1) & (row < side - 1))
    order = inside[np.argsort(where[inside, 2])]
    flat = row[order] * side + column[order]
    winner = np.full(side * side, -1, np.int32)
    footprint = (flat[:, None] + np.array([0, 1, side, side + 1], np.int32)).ravel()
    winner[footprint] = np.repeat(order.astype(np.int32), 4)  # far to near: the last write, the nearest, stays
    hit = np.flatnonzero(winner >= 0)
    seen = winner[hit]
    shaded = _shade(np.concatenate(colors)[seen] * tint, np.concatenate(normals)[seen], light)
    painting.color.reshape(-1, 3)[hit] = shaded
    painting.part.reshape(-1)[hit] = np.concatenate(labels)[seen]
