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

from calm.data.birds.anatomy import PART_ID, TAIL_PIVOT, Array
from calm.data.birds.light import Light
from calm.data.birds.plumage import bird_surfaces, rgb
from calm.data.birds.pose import Leg, Pose, wing_points
from calm.data.birds.species import Species

__all__ = ["Painting", "paint_bird"]

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
    """Soft sun plus a sky that is brighter than the ground, and a thin darker rim that rounds the body."""
    sun = np.clip(normals @ light.sun * 0.75 + 0.25, 0, 1)[:, None]
    up = (normals[:, 1:2] + 1) / 2
    rim = 0.78 + 0.22 * np.clip(normals[:, 2:3] * 1.8, 0, 1)
    glow = light.sky * up + light.ground * (1 - up)
    return np.asarray(colors * (glow + light.strength * sun) * rim, np.float32)


@dataclass(frozen=True)
class _Placed:
    """A surface in its pose: points and normals in the bird's frame, colours, labels of its points."""

    points: Array
    normals: Array
    colors: Array
    part: NDArray[np.uint8]


def _parts(species: Species, pose: Pose, density: float) -> list[_Placed]:
    """All surfaces of the bird, turned about their joints; paired ones twice, the right one's labels 4 higher."""
    placed = []
    for name, (surface, colors) in bird_surfaces(species, density).items():
        points, normals, part = surface.points, surface.normals, surface.part
        if name == "body":
            placed.append(_Placed(points, normals, colors, part))
        elif name == "tail":
            placed.append(_Placed(points @ pose.tail.T + TAIL_PIVOT, normals @ pose.tail.T, colors, part))
        elif name == "wing":
            for hand, turn, label in ((1.0, pose.wings[0], part), (-1.0, pose.wings[1], part + _TO_RIGHT)):
                mirrored = normals * np.array([1, hand, 1], np.float32)
                placed.append(_Placed(wing_points(points, turn, hand), mirrored @ turn.T, colors, label))
        else:
            head = pose.head.T
            placed.append(_Placed(points @ head + pose.head_at, normals @ head, colors, part))
            if name == "eye":
                other = (points * _MIRROR) @ head + pose.head_at
                placed.append(_Placed(other, (normals * _MIRROR) @ head, colors, part + _TO_RIGHT))
    return placed


def _paint_leg(painting: Painting, leg: Leg, label: int, color: Array, pose: Pose, light: Light) -> None:
    """Thigh, shank and toes as thick strokes; what lies under the body is painted over later."""
    unit, facing = pose.unit, float(np.sign(pose.view[0, 0]))
    tone = color * (0.5 * (light.sky + light.ground) + 0.55 * light.strength)

    def stroke(a: Array, b: Array, width: float, gain: float = 1.0, mark: bool = True) -> None:
        start, end = ((round(float(x) * 16), round(float(y) * 16)) for x, y in (a, b))
        thick = max(1, round(width * unit))
        cv2.line(painting.color, start, end, tuple(float(c) * gain for c in tone), thick, cv2.LINE_8, 4)
        if mark:
            cv2.line(painting.part, start, end, label, thick, cv2.LINE_8, 4)

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
    for surface in _parts(species, pose, density):
        turned = surface.normals @ turn
        if surface.part[0] in _THIN:
            turned *= np.where(turned[:, 2:] < 0, -1, 1).astype(np.float32)
        front = np.flatnonzero(turned[:, 2] > -0.05)
        positions.append(pose.place(surface.points[front]))
        normals.append(turned[front])
        colors.append(surface.colors[front])
        labels.append(surface.part[front])
    where = np.concatenate(positions)
    column, row = (where[:, :2] - 0.5).astype(np.int32).T  # cut, not floored: outside is left out below
    inside = np.flatnonzero((where[:, :2] >= 0.5).all(1) & (column < side - 1) & (row < side - 1))
    order = inside[np.argsort(where[inside, 2])]
    flat = row[order] * side + column[order]
    winner = np.full(side * side, -1, np.int32)
    footprint = (flat[:, None] + np.array([0, 1, side, side + 1], np.int32)).ravel()
    winner[footprint] = np.repeat(
        order.astype(np.int32), 4
    )  # far to near: the last write, the nearest, stays
    hit = np.flatnonzero(winner >= 0)
    seen = winner[hit]
    shaded = _shade(np.concatenate(colors)[seen] * tint, np.concatenate(normals)[seen], light)
    painting.color.reshape(-1, 3)[hit] = shaded
    painting.part.reshape(-1)[hit] = np.concatenate(labels)[seen]
