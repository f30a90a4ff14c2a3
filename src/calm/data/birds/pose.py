"""How a bird holds itself, and where it stands in the picture.

The view frame is X right, Y up, Z towards the viewer, without perspective. Which way the bird faces is a turn of
the bird, never a mirrored picture, so left and right stay the bird's own: a bird that faces right shows its
right eye and its right wing. A pose does not depend on the species.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from calm.data.birds.anatomy import HEAD_PIVOT, HIP, SHOULDER, TAIL_PIVOT, Array, body, head, wing

__all__ = ["Leg", "Pose", "sample_pose", "wing_points"]

_BIRD_TO_VIEW = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32)


@dataclass(frozen=True)
class Leg:
    """Hip, ankle and foot in view pixels, and the depth (pixels towards the viewer)."""

    hip: Array
    ankle: Array
    foot: Array
    depth: float


@dataclass(frozen=True)
class Pose:
    """Rotations of the rigid parts and the placing of the whole.

    ``view`` (3, 3) takes the bird's frame, already scaled to pixels, to the view; ``centre`` is the pixel of the
    bird's origin. ``head``, ``tail`` and ``wings`` (left, right) turn about their pivots in the bird's frame.
    """

    view: Array
    centre: Array
    head: Array
    head_at: Array
    tail: Array
    wings: tuple[Array, Array]
    legs: tuple[Leg, Leg]
    unit: float
    perch: tuple[Array, Array]

    def place(self, points: Array) -> Array:
        """Bird-frame points (N, 3) -> pixel x, pixel y (downwards), depth (N, 3)."""
        seen = points @ self.view.T
        return np.stack([self.centre[0] + seen[:, 0], self.centre[1] - seen[:, 1], seen[:, 2]], 1)

    def scaled(self, factor: float) -> Pose:
        """The same pose in a picture ``factor`` times as large."""
        k = np.float32(factor)
        legs = [Leg(leg.hip * k, leg.ankle * k, leg.foot * k, leg.depth * factor) for leg in self.legs]
        return replace(
            self,
            view=self.view * k,
            centre=self.centre * k,
            legs=(legs[0], legs[1]),
            unit=self.unit * factor,
            perch=(self.perch[0] * k, self.perch[1] * k),
        )


def _rotation(axis: str, degrees: float) -> Array:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    a, b = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3, dtype=np.float32)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def _outline(head_turn: Array, head_at: Array, tail_turn: Array) -> Array:
    """Points that bound any species in this pose: body, wings, head with a bill, tail."""
    bill = np.array([[0.36, 0, -0.04]], np.float32)
    tips = np.array([[-0.48, 0.13, 0], [-0.48, -0.13, 0]], np.float32)
    flank = wing(12.0).points
    return np.concatenate([
        body(12.0).points, flank, flank * np.array([1, -1, 1], np.float32),
        np.concatenate([head(12.0).points, bill]) @ head_turn.T + head_at, tips @ tail_turn.T + TAIL_PIVOT,
    ])  # fmt: skip


def sample_pose(rng: np.random.Generator, side: int) -> Pose:
    """A random pose for a square picture of ``side`` pixels.

    The bird is seen from its side to three-quarters (at most 38 degrees off), level to 32 degrees upright, from
    level to 20 degrees above; the head looks up to 50 degrees aside; the longer extent of bird and legs fills 62 to
    92 percent of the picture; a bird may touch the border but hardly cross it.
    """
    facing_left = rng.random() < 0.5
    yaw = float(np.clip(rng.normal(0, 18), -38, 38))
    upright, roll, elevation = rng.uniform(2, 32), rng.normal(0, 4), rng.uniform(0, 20)
    near = 1.0 if facing_left else -1.0  # the side that faces the viewer: +1 left, -1 right
    look = float(np.clip(rng.normal(-8, 22), -50, 45)) * -near  # negative values look at the viewer
    head_turn = (
        _rotation("z", look)
        @ _rotation("y", upright * 0.8 + rng.normal(0, 8))
        @ _rotation("x", rng.normal(0, 7))
    )
    head_at = HEAD_PIVOT + rng.uniform(-0.025, 0.025, 3).astype(np.float32) * np.array(
        [1, 0.3, 1.0], np.float32
    )
    # A tail seen edge-on would show nothing: birds here hold it tilted, its upper side to the viewer.
    tail_turn = (
        _rotation("x", -near * rng.uniform(32, 62))
        @ _rotation("z", rng.normal(0, 6))
        @ _rotation("y", rng.uniform(-22, 16))
    )
    wings = []
    for hand in (1.0, -1.0):
        droop, lift = rng.uniform(-9, 12), abs(rng.normal(0, 4))
        wings.append(
            _rotation("x", hand * lift * 0.6) @ _rotation("y", -droop) @ _rotation("z", hand * lift * -0.3)
        )
    turn = _rotation("z", yaw + 180 * facing_left) @ _rotation("y", -upright) @ _rotation("x", roll)
    plump = np.diag(np.array([rng.uniform(0.95, 1.04), 1, rng.uniform(0.94, 1.06)], np.float32))
    view = _rotation("x", elevation) @ _BIRD_TO_VIEW @ turn @ plump

    seen = _outline(head_turn, head_at, tail_turn) @ view.T
    forward = -near  # in view X
    legs, length = [], rng.uniform(0.33, 0.42)
    for hand in (1.0, -1.0):
        hip = view @ (HIP * np.array([1, hand, 1], np.float32))
        ankle = hip + np.array([-forward * rng.uniform(0.02, 0.07), -0.55 * length, 0], np.float32)
        step = rng.uniform(-0.03, 0.09) + 0.05 * hand
        legs.append([hip, ankle, hip + np.array([forward * step, -length, 0], np.float32)])
    slope = np.tan(np.radians(rng.normal(0, 7)))
    low = min(leg[2][1] for leg in legs)
    middle = (legs[0][2][0] + legs[1][2][0]) / 2
    for leg in legs:
        leg[2][1] = low + slope * (leg[2][0] - middle)

    joints = np.array([leg[2][:2] for leg in legs])
    points = np.concatenate([seen[:, :2], joints - [0, 0.03]])
    lowest, highest = points.min(0), points.max(0)
    extent = highest - lowest
    unit = side * rng.uniform(0.62, 0.92) / extent.max()
    room = np.maximum(side - unit * extent, 0)
    corner = room * (rng.uniform(0.03, 0.97, 2) if rng.random() < 0.9 else rng.uniform(-0.12, 1.12, 2))
    corner = np.minimum(corner, room + 0.06 * side)
    centre = np.array([corner[0] - unit * lowest[0], corner[1] + unit * highest[1]], np.float32)

    def pixel(point: Array) -> Array:
        return np.array([centre[0] + unit * point[0], centre[1] - unit * point[1]], np.float32)

    placed = [Leg(pixel(leg[0]), pixel(leg[1]), pixel(leg[2]), float(unit * leg[0][2])) for leg in legs]
    along = np.array([1, slope, 0], np.float32)
    anchor = np.array([middle, low - 0.02, 0], np.float32)
    return Pose(
        view * np.float32(unit),
        centre,
        head_turn,
        head_at,
        tail_turn,
        (wings[0], wings[1]),
        (placed[0], placed[1]),
        float(unit),
        (pixel(anchor - along), pixel(anchor + along)),
    )


def wing_points(points: Array, turn: Array, hand: float) -> Array:
    """Turn left-wing points about the shoulder and mirror them to the right side if ``hand`` is -1."""
    mirror = np.array([1, hand, 1], np.float32)
    return (points * mirror - SHOULDER * mirror) @ turn.T + SHOULDER * mirror
