"""The shape of a bird as points on surfaces, and the pose that places it in the picture.

In the bird's own frame x points forward, y to the bird's left and z up; 1 unit is about the length of body and head.
Every part is a rigid :class:`Surface`, a dense grid of points with normals and two texture coordinates, so that a pose
consists of a few rotations and the plumage follows the body. Surfaces depend only on the grid density and on the
outlines of bill, crest and tail that a species has, and are cached.

In the view frame X points right, Y up and Z towards the viewer, without perspective. The direction that a bird faces is
a rotation of the bird and never a mirrored picture, so left and right stay the bird's own: a bird that faces right
shows its right eye and its right wing. A pose does not depend on the species.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calm_birds.attributes import PARTS

__all__ = [
    "CHEEK", "EYE", "HEAD_PIVOT", "PART_ID", "TAIL_PIVOT", "Array", "Leg", "Pose", "Surface",
    "bill", "body", "crest", "eye", "head", "sample_pose", "tail", "wing", "wing_points",
]  # fmt: skip

Array = NDArray[np.floating[Any]]

PART_ID = {part: index + 1 for index, part in enumerate(PARTS)}
"""Part name to its official number; 0 is "not bird"."""
CHEEK = 16
"""A 16th label: the rest of the head, which has no point of its own."""

HEAD_PIVOT = np.array([0.40, 0.0, 0.285], np.float32)
SHOULDER = np.array([0.25, 0.20, 0.06], np.float32)  # of the left wing; mirror y for the right one
TAIL_PIVOT = np.array([-0.46, 0.0, 0.03], np.float32)
HIP = np.array([-0.03, 0.09, -0.15], np.float32)
EYE = np.array([0.075, 0.1175, 0.035], np.float32)  # from HEAD_PIVOT, left side

_HEAD_RADII = np.array([0.165, 0.135, 0.150], np.float32)
# The trunk, from tail root to neck: centre x and z, half-width, half-height.
_TRUNK = np.array([
    [-0.52, 0.040, 0.020, 0.018], [-0.46, 0.035, 0.070, 0.060], [-0.36, 0.020, 0.130, 0.120],
    [-0.22, -0.005, 0.185, 0.185], [-0.04, -0.020, 0.225, 0.235], [0.13, 0.000, 0.225, 0.240],
    [0.26, 0.065, 0.190, 0.205], [0.35, 0.165, 0.145, 0.155], [0.40, 0.260, 0.115, 0.125],
], np.float32)  # fmt: skip


@dataclass(frozen=True)
class Surface:
    """A part's points: position and outward unit normal (N, 3), texture coordinates u, v (N,), part label (N,)."""

    points: Array
    normals: Array
    u: Array
    v: Array
    part: NDArray[np.uint8]


def _smooth(knots: Array, count: int) -> Array:
    """Sample a Catmull-Rom curve through ``knots`` (K, M) at ``count`` places -> (count, M)."""
    padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    t = np.linspace(0, len(knots) - 1, count)
    i = np.minimum(t.astype(int), len(knots) - 2)
    f = (t - i)[:, None]
    a, b, c, d = (padded[i + k] for k in range(4))
    curve = b + 0.5 * f * (c - a + f * (2 * a - 5 * b + 4 * c - d + f * (3 * (b - c) + d - a)))
    return np.asarray(curve, np.float32)


def _surface(grid: Array, u: Array, v: Array, part: NDArray[np.uint8] | int, *, inside: Array) -> Surface:
    """Flatten a (m, n, 3) grid; normals point away from ``inside`` (broadcast to the grid)."""
    normal = np.cross(np.gradient(grid, axis=0), np.gradient(grid, axis=1))
    normal *= np.where((normal * (grid - inside)).sum(-1, keepdims=True) < 0, -1.0, 1.0)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True) + 1e-9
    shape = grid.shape[:2]
    parts = np.broadcast_to(np.asarray(part, np.uint8), shape)
    return Surface(
        grid.reshape(-1, 3).astype(np.float32),
        normal.reshape(-1, 3).astype(np.float32),
        np.ascontiguousarray(np.broadcast_to(u, shape), np.float32).ravel(),
        np.ascontiguousarray(np.broadcast_to(v, shape), np.float32).ravel(),
        np.ascontiguousarray(parts).ravel(),
    )


def _steps(length: float, density: float) -> int:
    return max(6, int(np.ceil(length * density)))


@lru_cache(maxsize=64)
def body(density: float) -> Surface:
    """Return trunk and neck, ``density`` points per unit. u is x along the body, v the angle from back (0) to belly."""
    spine = _smooth(_TRUNK, _steps(1.25, density))
    tangent = np.gradient(spine[:, :2], axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    angle = np.linspace(-np.pi, np.pi, _steps(1.55, density), dtype=np.float32)[None]
    side, rise = spine[:, 2:3] * np.sin(angle), spine[:, 3:4] * np.cos(angle)
    grid = np.stack([spine[:, :1] - tangent[:, 1:] * rise, side, spine[:, 1:2] + tangent[:, :1] * rise], -1)
    centre = np.stack([spine[:, 0], 0 * spine[:, 0], spine[:, 1]], -1)[:, None]
    height, x = np.cos(angle), np.broadcast_to(spine[:, :1], grid.shape[:2])
    below = np.where(x + 0.10 * height > 0.01, PART_ID["breast"], PART_ID["belly"])
    part = np.where(height > 0.22, PART_ID["back"], below)
    neck = (grid[..., 2] > 0.125 + 0.06 * height) & (x > 0.22)
    part = np.where(neck, np.where(height > -0.35, PART_ID["nape"], PART_ID["throat"]), part)
    return _surface(grid, x, np.abs(angle), part.astype(np.uint8), inside=centre)


@lru_cache(maxsize=64)
def head(density: float) -> Surface:
    """Return the skull, centred on 0 (its place is HEAD_PIVOT). u is the longitude, v the height in -1..1."""
    polar = np.linspace(0, np.pi, _steps(0.55, density), dtype=np.float32)[:, None]
    angle = np.linspace(-np.pi, np.pi, _steps(1.1, density), dtype=np.float32)[None]
    ones = np.ones_like(angle)
    unit = np.stack([np.cos(polar) * ones, np.sin(polar) * np.sin(angle), np.sin(polar) * np.cos(angle)], -1)
    x, z = unit[..., 0], unit[..., 2]
    part = np.full(x.shape, CHEEK)
    part[(x < -0.30) & (z > -0.60)] = PART_ID["nape"]
    part[(z < -0.38) & (x > -0.45)] = PART_ID["throat"]
    part[z + 0.25 * x > 0.52] = PART_ID["crown"]
    part[(x > 0.52) & (z > 0.12)] = PART_ID["forehead"]
    return _surface(unit * _HEAD_RADII, x, z, part.astype(np.uint8), inside=np.zeros(3, np.float32))


def _cone(
    root: Array,
    axis: Array,
    bend: Array,
    length: float,
    radius: tuple[float, float],
    power: float,
    part: str,
    density: float,
) -> Surface:
    """A tapering, bent tube: bill and crest. u runs from root (0) to tip (1), v is the angle (0 top, pi bottom)."""
    t = np.linspace(0, 1, _steps(length * 1.3, density), dtype=np.float32)[:, None]
    angle = np.linspace(-np.pi, np.pi, _steps(6.3 * max(radius), density), dtype=np.float32)[None]
    centre = root + axis * (length * t) + bend * t**2
    up = np.array([-axis[2], 0, axis[0]], np.float32)
    taper = ((1 - t) ** power)[..., None]
    grid = centre[:, None] + taper * (
        up * (radius[0] * np.cos(angle))[..., None]
        + np.array([0, 1, 0], np.float32) * (radius[1] * np.sin(angle))[..., None]
    )
    return _surface(grid, t, np.abs(angle), PART_ID[part], inside=centre[:, None])


_BILLS = {  # length, bend downward, half-height, half-width, taper
    "cone": (0.155, 0.015, 0.068, 0.055, 0.9),
    "all-purpose": (0.175, 0.010, 0.042, 0.036, 0.8),
    "hooked": (0.200, 0.085, 0.058, 0.045, 0.55),
    "dagger": (0.270, 0.000, 0.046, 0.036, 0.9),
    "needle": (0.300, 0.010, 0.024, 0.024, 0.5),
    "curved_(up_or_down)": (0.270, 0.110, 0.034, 0.030, 0.5),
}


@lru_cache(maxsize=64)
def bill(shape: str, density: float) -> Surface:
    """Return a bill of one of CUB's shapes, in the head's frame."""
    length, bend, high, wide, power = _BILLS[shape]
    root, axis = np.array([0.130, 0, -0.012], np.float32), np.array([1, 0, 0], np.float32)
    return _cone(root, axis, np.array([0, 0, -bend], np.float32), length, (high, wide), power, "beak", density)


@lru_cache(maxsize=64)
def crest(density: float) -> Surface:
    """Return the raised crown feathers of a crested head, in the head's frame."""
    axis = np.array([-0.70, 0, 0.714], np.float32)
    bend = np.array([-0.05, 0, 0.035], np.float32)
    root = np.array([0.035, 0, 0.075], np.float32)
    return _cone(root, axis, bend, 0.23, (0.085, 0.05), 0.8, "crown", density)


@lru_cache(maxsize=64)
def eye(density: float) -> Surface:
    """Return the left eye, a disc around EYE facing outward. u is the distance from its centre (0..1), v the angle."""
    outward = EYE / _HEAD_RADII**2
    outward /= np.linalg.norm(outward)
    across = np.cross(np.array([0, 0, 1], np.float32), outward)
    across /= np.linalg.norm(across)
    up = np.cross(outward, across)
    r = np.linspace(0.01, 1, _steps(0.06, density), dtype=np.float32)[:, None]
    angle = np.linspace(0, 2 * np.pi, _steps(0.25, density), dtype=np.float32)[None]
    flat = 0.036 * r[..., None] * (across * np.cos(angle)[..., None] + up * np.sin(angle)[..., None])
    grid = EYE + flat + outward * (0.008 + 0.010 * np.sqrt(np.maximum(0, 1 - r**2)))[..., None]
    return _surface(grid, r, angle, PART_ID["left eye"], inside=EYE - 0.1 * outward)


_WING = np.array([  # upper and lower edge (z) from shoulder to tip
    [0.080, 0.050], [0.140, -0.030], [0.150, -0.085], [0.138, -0.110], [0.112, -0.095], [0.086, -0.045],
    [0.055, 0.010], [0.025, 0.025],
], np.float32)  # fmt: skip


@lru_cache(maxsize=64)
def wing(density: float) -> Surface:
    """Return the folded left wing. u runs from shoulder (0) to tip (1), v from upper (-1) to lower edge (1)."""
    u = np.linspace(0, 1, _steps(0.95, density), dtype=np.float32)[:, None]
    v = np.linspace(-1, 1, _steps(0.36, density), dtype=np.float32)[None]
    edge = _smooth(_WING, len(u))
    x = 0.25 - 0.77 * u + 0 * v
    z = edge[:, :1] * (1 - v) / 2 + edge[:, 1:] * (1 + v) / 2
    trunk = [np.interp(x, _TRUNK[:, 0], _TRUNK[:, k]) for k in (1, 2, 3)]
    inside = np.clip(1 - ((z - trunk[0]) / np.maximum(trunk[2], 0.02)) ** 2, 0, None)
    flank = np.maximum(trunk[1] * np.sqrt(inside), 0.03 + 0.10 * np.clip((0.45 + x) / 0.2, 0, 1))
    puff = 0.045 * np.sqrt(np.clip(1 - v**2, 0, None)) * np.clip(4 * u, 0, 1) * np.clip(6 * (1 - u), 0.15, 1)
    grid = np.stack([x, flank + 0.014 + puff, z], -1).astype(np.float32)
    return _surface(grid, u, v, PART_ID["left wing"], inside=grid * np.array([1, 0, 1], np.float32))


def _tail_outline(shape: str, v: Array) -> Array:
    """Return how long the tail is at each place across it, relative to its longest feather."""
    a = np.abs(v)
    curves = {
        "rounded_tail": 1 - 0.22 * v**2, "squared_tail": 1 - 0.10 * a**8, "notched_tail": 0.86 + 0.14 * a,
        "forked_tail": 0.50 + 0.50 * a**0.9, "fan-shaped_tail": np.sqrt(np.clip(1 - 0.30 * v**2, 0, 1)),
        "pointed_tail": 1 - 0.55 * a,
    }  # fmt: skip
    return np.asarray(curves[shape], np.float32)


@lru_cache(maxsize=64)
def tail(shape: str, density: float) -> Surface:
    """Return the tail around TAIL_PIVOT. u runs from root (0) to longest tip (1), v from right (-1) to left (1)."""
    fan = shape == "fan-shaped_tail"
    u = np.linspace(0, 1, _steps(0.5, density), dtype=np.float32)[:, None]
    v = np.linspace(-1, 1, _steps(0.5 if fan else 0.32, density), dtype=np.float32)[None]
    along = u * _tail_outline(shape, v)
    half = 0.055 + (0.20 if fan else 0.075) * along ** (0.8 if fan else 1.2)
    y = half * v * (1.25 if shape == "forked_tail" else 1)
    grid = np.stack([-0.46 * along, y, 0.05 * (1 - v**2) - 0.8 * y**2], -1)
    return _surface(grid, along, v, PART_ID["tail"], inside=grid - np.array([0, 0, 1], np.float32))


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
    """The rotations of the rigid parts and the place of the bird in the picture.

    Attributes:
        view: matrix (3, 3) from the bird's frame to the view, in pixels.
        centre: pixel (x, y) of the origin of the bird's frame.
        head, tail, wings: rotations about the parts' pivots in the bird's frame; wings are left and right.
        head_at: the head's pivot in the bird's frame.
        legs: left and right leg.
        unit: pixels of one unit of the bird's frame.
        perch: two pixels of the line on which the feet stand.
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
        """Map points of the bird's frame (N, 3) to pixel x, pixel y (downwards) and depth (N, 3)."""
        seen = points @ self.view.T
        return np.stack([self.centre[0] + seen[:, 0], self.centre[1] - seen[:, 1], seen[:, 2]], 1)

    def scaled(self, factor: float) -> Pose:
        """Return the same pose for a picture ``factor`` times as large."""
        k = np.float32(factor)
        legs = [Leg(leg.hip * k, leg.ankle * k, leg.foot * k, leg.depth * factor) for leg in self.legs]
        perch = (self.perch[0] * k, self.perch[1] * k)
        return Pose(self.view * k, self.centre * k, self.head, self.head_at, self.tail, self.wings,
                    (legs[0], legs[1]), self.unit * factor, perch)  # fmt: skip


def _rotation(axis: str, degrees: float) -> Array:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    a, b = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3, dtype=np.float32)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def _outline(head_turn: Array, head_at: Array, tail_turn: Array) -> Array:
    """Return points that bound any species in this pose: body, wings, head with a bill, tail."""
    bill = np.array([[0.36, 0, -0.04]], np.float32)
    tips = np.array([[-0.48, 0.13, 0], [-0.48, -0.13, 0]], np.float32)
    flank = wing(12.0).points
    return np.concatenate([
        body(12.0).points, flank, flank * np.array([1, -1, 1], np.float32),
        np.concatenate([head(12.0).points, bill]) @ head_turn.T + head_at, tips @ tail_turn.T + TAIL_PIVOT,
    ])  # fmt: skip


def _sample_turns(rng: np.random.Generator, near: float, upright: float) -> tuple[Array, Array, Array]:
    """Draw the head's rotation and pivot, and the tail's rotation; ``near`` is the side that faces the viewer."""
    look = float(np.clip(rng.normal(-8, 22), -50, 45)) * -near  # negative values look at the viewer
    nod, tilt = upright * 0.8 + rng.normal(0, 8), rng.normal(0, 7)
    head_turn = _rotation("z", look) @ _rotation("y", nod) @ _rotation("x", tilt)
    shift = rng.uniform(-0.025, 0.025, 3).astype(np.float32) * np.array([1, 0.3, 1.0], np.float32)
    # A tail that is seen edge-on would show nothing: it is rolled, with its upper side to the viewer.
    roll, aside, lift = -near * rng.uniform(32, 62), rng.normal(0, 6), rng.uniform(-22, 16)
    tail_turn = _rotation("x", roll) @ _rotation("z", aside) @ _rotation("y", lift)
    return head_turn, HEAD_PIVOT + shift, tail_turn


def _sample_wing(rng: np.random.Generator, hand: float) -> Array:
    droop, lift = rng.uniform(-9, 12), abs(rng.normal(0, 4))
    return _rotation("x", hand * lift * 0.6) @ _rotation("y", -droop) @ _rotation("z", hand * lift * -0.3)


def _sample_legs(
    rng: np.random.Generator, view: Array, forward: float
) -> tuple[list[list[Array]], float, float, float]:
    """Draw hip, ankle and foot of both legs in the view, and the perch: its slope, lowest foot and middle."""
    legs: list[list[Array]] = []
    length = rng.uniform(0.33, 0.42)
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
    return legs, slope, low, middle


def sample_pose(rng: np.random.Generator, side: int) -> Pose:
    """Draw a random pose for a square picture of ``side`` pixels.

    The bird is seen from its side to three-quarters (at most 38 degrees off), level to 32 degrees upright, from level
    to 20 degrees above; the head looks up to 50 degrees aside. The longer extent of bird and legs fills 62 to 92
    percent of the picture. A bird may touch the border and crosses it by at most a few percent.
    """
    facing_left = rng.random() < 0.5
    yaw = float(np.clip(rng.normal(0, 18), -38, 38))
    upright, roll, elevation = rng.uniform(2, 32), rng.normal(0, 4), rng.uniform(0, 20)
    near = 1.0 if facing_left else -1.0  # the side that faces the viewer: +1 left, -1 right
    head_turn, head_at, tail_turn = _sample_turns(rng, near, upright)
    wings = (_sample_wing(rng, 1.0), _sample_wing(rng, -1.0))
    turn = _rotation("z", yaw + 180 * facing_left) @ _rotation("y", -upright) @ _rotation("x", roll)
    plump = np.diag(np.array([rng.uniform(0.95, 1.04), 1, rng.uniform(0.94, 1.06)], np.float32))
    view = _rotation("x", elevation) @ _BIRD_TO_VIEW @ turn @ plump
    legs, slope, low, middle = _sample_legs(rng, view, -near)

    feet = np.array([leg[2][:2] for leg in legs])
    points = np.concatenate([(_outline(head_turn, head_at, tail_turn) @ view.T)[:, :2], feet - [0, 0.03]])
    lowest, highest = points.min(0), points.max(0)
    extent = highest - lowest
    unit = side * rng.uniform(0.62, 0.92) / extent.max()
    room = np.maximum(side - unit * extent, 0)
    corner = room * (rng.uniform(0.03, 0.97, 2) if rng.random() < 0.9 else rng.uniform(-0.12, 1.12, 2))
    corner = np.minimum(corner, room + 0.06 * side)
    centre = np.array([corner[0] - unit * lowest[0], corner[1] + unit * highest[1]], np.float32)

    def pixel(point: Array) -> Array:
        return np.array([centre[0] + unit * point[0], centre[1] - unit * point[1]], np.float32)

    left, right = (Leg(pixel(hip), pixel(ankle), pixel(foot), float(unit * hip[2])) for hip, ankle, foot in legs)
    along = np.array([1, slope, 0], np.float32)
    anchor = np.array([middle, low - 0.02, 0], np.float32)
    perch = (pixel(anchor - along), pixel(anchor + along))
    view = view * np.float32(unit)
    return Pose(view, centre, head_turn, head_at, tail_turn, wings, (left, right), float(unit), perch)


def wing_points(points: Array, turn: Array, hand: float) -> Array:
    """Turn left-wing points about the shoulder and mirror them to the right side if ``hand`` is -1."""
    mirror = np.array([1, hand, 1], np.float32)
    return (points * mirror - SHOULDER * mirror) @ turn.T + SHOULDER * mirror
