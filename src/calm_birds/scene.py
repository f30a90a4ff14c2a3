"""Draw one picture: background, perch, bird and foreground, with mask, box and part points of the visible bird.

Backgrounds are cluttered on purpose with leaves, grass, water, berries and feather-like shapes in every colour that
birds have, from one palette for all species, so that only the bird itself tells its species.

Five independent random streams come from the picture's seed: pose, plumage tint, background, foreground and camera.
None depends on the species, so that two species drawn with the same seed differ only where the species do.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from calm_birds.anatomy import PART_ID, Array, Pose, sample_pose
from calm_birds.attributes import PART_GROUP, PARTS
from calm_birds.draw import COLORS, Light, Painting, enlarge, finish, paint_bird, sample_light
from calm_birds.species import GROUPS, Species, choose_species

__all__ = ["Drawing", "draw_bird", "paint_background", "paint_foreground", "paint_perch"]


SUPERSAMPLE = 2
"""Birds are painted this many times larger than the picture and averaged down."""

Generator = np.random.Generator
_Canvas = NDArray[np.float32] | NDArray[np.uint8]
_Color = tuple[int, int, int]
_SHIFT = 4  # fixed-point bits of OpenCV's drawing coordinates

_SCENES: dict[str, tuple[tuple[_Color, ...], tuple[_Color, ...]]] = {
    # top-to-bottom gradient, colours of the soft shapes
    "forest": (((116, 148, 104), (66, 98, 62), (44, 68, 46)),
               ((150, 176, 104), (92, 132, 74), (48, 84, 52), (206, 214, 150), (98, 84, 58))),
    "canopy": (((214, 226, 206), (150, 186, 126), (88, 132, 80)),
               ((226, 234, 196), (122, 166, 88), (170, 196, 110), (70, 110, 66), (190, 170, 90))),
    "meadow": (((176, 208, 226), (190, 206, 152), (112, 148, 74)),
               ((206, 200, 110), (128, 166, 80), (232, 226, 190), (90, 130, 66), (196, 132, 150))),
    "shore": (((190, 214, 228), (140, 180, 200), (84, 126, 150)),
              ((214, 226, 226), (110, 156, 172), (176, 168, 140), (72, 112, 132), (150, 172, 130))),
    "sky": (((122, 172, 220), (170, 206, 232), (222, 232, 232)),
            ((240, 244, 244), (214, 228, 238), (150, 190, 226), (130, 160, 120), (232, 214, 196))),
    "autumn": (((208, 190, 150), (170, 124, 78), (104, 76, 54)),
               ((222, 160, 64), (188, 92, 48), (226, 200, 120), (110, 96, 56), (150, 54, 44))),
    "dusk": (((86, 92, 128), (182, 140, 140), (230, 176, 128)),
             ((240, 200, 150), (140, 112, 140), (80, 82, 110), (220, 150, 120), (96, 96, 84))),
}  # fmt: skip
_BARK = ((98, 76, 58), (122, 100, 80), (80, 70, 64), (140, 116, 88))
_LEAF = ((84, 128, 58), (122, 160, 74), (60, 104, 62), (150, 160, 70), (178, 128, 56), (164, 74, 48))


def _tone(rng: Generator, color: _Color, spread: float = 0.08) -> tuple[float, float, float]:
    r, g, b = np.clip(np.array(color) / 255 * (1 + rng.normal(0, spread)) + rng.normal(0, spread / 4, 3), 0, 1)
    return float(r), float(g), float(b)


def _pick(rng: Generator, colors: tuple[_Color, ...]) -> _Color:
    return colors[int(rng.integers(len(colors)))]


def _fixed(points: Array) -> NDArray[np.int32]:
    return np.asarray(np.round(points * (1 << _SHIFT)), np.int32)


def _polygon(canvas: _Canvas, points: Array, color: tuple[float, ...] | int) -> None:
    cv2.fillPoly(canvas, [_fixed(points)], color, cv2.LINE_8, _SHIFT)


def _line(canvas: _Canvas, points: Array, color: tuple[float, ...] | int, width: float) -> None:
    thick = round(width)
    # Versions of OpenCV differ in lines of one pixel whose ends lie between pixels.
    whole = np.asarray(np.round(points), np.int32)
    fixed, shift = (_fixed(points), _SHIFT) if thick > 1 else (whole, 0)
    cv2.polylines(canvas, [fixed], False, color, max(1, thick), cv2.LINE_8, shift)


def _ellipse(canvas: Array, at: Array, axes: tuple[float, float], color: tuple[float, ...], angle: float = 0.0) -> None:
    """Fill an ellipse around ``at``; centre and semi-axes are cut to whole pixels, axes to at least 1."""
    whole = (max(1, int(axes[0])), max(1, int(axes[1])))
    cv2.ellipse(canvas, (int(at[0]), int(at[1])), whole, angle, 0, 360, color, -1)


def _disc(canvas: Array, at: Array, radius: float, color: tuple[float, ...]) -> None:
    cv2.circle(canvas, (int(at[0]), int(at[1])), max(1, int(radius)), color, -1)


def _leaf_shape(at: Array, length: float, width: float, angle: float, bend: float = 0.0) -> tuple[Array, Array]:
    """Return outline (26, 2) and midrib (13, 2) of a leaf whose stem is at ``at``."""
    t = np.linspace(0, 1, 13)
    half = width * np.sin(np.pi * t**0.8) * (1 - 0.25 * t)
    axis, side = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    rib = at + np.outer(t * length, axis) + np.outer(bend * length * t**2, side)
    outline = np.concatenate([rib + np.outer(half, side), (rib - np.outer(half, side))[::-1]])
    return np.asarray(outline, np.float32), np.asarray(rib, np.float32)


def _paint_leaf(canvas: Array, rng: Generator, shape: tuple[Array, Array], color: _Color, rib_width: float) -> None:
    outline, rib = shape
    base = _tone(rng, color)
    _polygon(canvas, outline, base)
    _polygon(canvas, np.concatenate([rib, outline[13:]]), tuple(c * 0.86 for c in base))
    _line(canvas, rib, tuple(min(1.0, c * 1.25) for c in base), rib_width)


def _curve(start: Array, end: Array, sag: float) -> Array:
    t = np.linspace(0, 1, 12)[:, None]
    side = np.array([start[1] - end[1], end[0] - start[0]]) * sag
    return np.asarray(start * (1 - t) + end * t + side * (4 * t * (1 - t)), np.float32)


def _soft_layer(canvas: Array, rng: Generator, colors: tuple[_Color, ...], count: int) -> None:
    """Paint round out-of-focus shapes and blur the whole canvas, at half size, which is enough for soft shapes."""
    side = canvas.shape[0]
    for _ in range(count):
        at = rng.uniform(-0.05, 1.05, 2) * side
        wide, high = rng.uniform(0.08, 0.25) * side * rng.uniform(0.7, 1.3, 2)
        angle = float(rng.uniform(0, 180))
        _ellipse(canvas, at, (wide, high), _tone(rng, _pick(rng, colors)), angle)
    small = cv2.resize(canvas, (side // 2, side // 2), interpolation=cv2.INTER_AREA)
    small = cv2.GaussianBlur(small, (0, 0), max(0.3, 0.035 * side / 2))
    canvas[:] = enlarge(np.asarray(small, np.float32), side)


def _distractors(canvas: Array, rng: Generator, count: int) -> None:
    """Paint flowers, berries and feather-like shapes in the colours that birds have."""
    side = canvas.shape[0]
    words = list(COLORS)
    for _ in range(count):
        color = COLORS[words[int(rng.integers(len(words)))]]
        at = np.asarray(rng.uniform(0, 1, 2) * side, np.float32)
        size = float(rng.uniform(0.025, 0.075)) * side
        kind = int(rng.integers(4))
        if kind == 0:
            shape = _leaf_shape(at, 2.6 * size, 0.5 * size, rng.uniform(0, 6.3), rng.normal(0, 0.2))
            _paint_leaf(canvas, rng, shape, color, 0.006 * side)
        elif kind == 1:  # berries
            tone = _tone(rng, color)
            for offset in rng.normal(0, 0.6 * size, (4, 2)):
                centre = np.trunc(at + offset)
                _disc(canvas, centre, 0.38 * size, tone)
                _disc(canvas, centre - 0.12 * size, 0.12 * size, tuple(min(1.0, c * 1.5 + 0.1) for c in tone))
        elif kind == 2:  # a flower
            turn = rng.uniform(0, 6.3)
            for petal in range(5):
                outline, _ = _leaf_shape(at, 0.95 * size, 0.34 * size, turn + petal * 1.2566)
                _polygon(canvas, outline, _tone(rng, color, 0.05))
            _disc(canvas, at, 0.25 * size, (0.95, 0.78, 0.30))
        else:  # a round or egg-like patch
            angle = float(rng.uniform(0, 180))
            _ellipse(canvas, at, (1.1 * size, 0.7 * size), _tone(rng, color), angle)


def paint_background(rng: Generator, side: int) -> Array:
    """Return a random backdrop (side, side, 3), RGB in 0..1, with soft colours far away and clutter nearer."""
    names = list(_SCENES)
    name = names[int(rng.integers(len(names)))]
    stops, colors = _SCENES[name]
    ramp = np.array([_tone(rng, stop, 0.05) for stop in stops], np.float32)
    height = np.linspace(0, 2, side) + rng.uniform(-0.3, 0.3)
    rows = np.stack([np.interp(height, [0, 1, 2], ramp[:, channel]) for channel in range(3)], 1)
    canvas = np.ascontiguousarray(np.broadcast_to(rows[:, None].astype(np.float32), (side, side, 3)))
    _soft_layer(canvas, rng, colors, int(rng.integers(6, 12)))
    _distractors(canvas, rng, int(rng.integers(1, 5)))
    if name == "shore":
        for y in np.sort(rng.uniform(0.45, 1.0, 7)) * side:
            at = np.array([rng.uniform(0, side), y])
            _ellipse(canvas, at, (rng.uniform(0.1, 0.35) * side, 0.008 * side), _tone(rng, (206, 224, 230)))
    else:
        for _ in range(int(rng.integers(1, 4))):  # distant branches
            ends = np.asarray(rng.uniform(-0.1, 1.1, (2, 2)) * side, np.float32)
            branch = _curve(ends[0], ends[1], rng.normal(0, 0.12))
            _line(canvas, branch, _tone(rng, _pick(rng, _BARK)), rng.uniform(0.012, 0.035) * side)
    for _ in range(int(rng.integers(3, 10))):
        at = np.asarray(rng.uniform(0, 1, 2) * side, np.float32)
        length, width = rng.uniform(0.08, 0.22) * side, rng.uniform(0.018, 0.05) * side
        shape = _leaf_shape(at, length, width, rng.uniform(0, 6.3), rng.normal(0, 0.2))
        _paint_leaf(canvas, rng, shape, _pick(rng, _LEAF), 0.006 * side)
    canvas[:] = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.004, 0.012) * side)
    _distractors(canvas, rng, int(rng.integers(1, 4)))
    if name in ("meadow", "autumn"):
        for _ in range(int(rng.integers(8, 18))):  # blades of grass
            root = np.array([rng.uniform(0, 1), 1.02], np.float32) * side
            tip = root + np.array([rng.normal(0, 0.10), -rng.uniform(0.15, 0.45)], np.float32) * side
            tone = _tone(rng, _pick(rng, _LEAF[:5] if name == "meadow" else ((176, 140, 80), (140, 120, 60))))
            _line(canvas, _curve(root, tip, rng.normal(0, 0.12)), tone, 0.010 * side)
    return np.asarray(cv2.GaussianBlur(canvas, (0, 0), 0.003 * side), np.float32)


def _paint_rock(canvas: Array, rng: Generator, top: Array, unit: float) -> None:
    """Paint a boulder with a flat top at ``top``, lit from above, with a rough surface and sometimes moss."""
    side = canvas.shape[0]
    angle = np.linspace(0, 2 * np.pi, 40)[:-1]
    width, height = rng.uniform(0.8, 1.5) * unit, rng.uniform(0.4, 0.8) * unit
    edge = 1 + np.convolve(rng.normal(0, 0.05, 41), [0.25, 0.5, 0.25], "valid")
    x, y = np.cos(angle), np.sin(angle)
    round_box = [np.sign(x) * np.abs(x) ** 0.7 * width, np.sign(y) * np.abs(y) ** 0.6 * height]
    shape = np.stack(round_box, 1) * edge[:, None]
    cover = np.zeros((side, side), np.uint8)
    _polygon(cover, np.asarray(shape + top + [0, height * 0.97], np.float32), 1)
    rows, columns = np.nonzero(cover)
    depth = np.clip((rows - top[1]) / (2 * height), 0, 1)
    coarse = rng.normal(0, 1, (40, 40)).astype(np.float32)
    rough = enlarge(coarse, side, cubic=True)
    slant = (columns - top[0]) / width * rng.uniform(-0.18, 0.18)
    stone = np.array(_tone(rng, _pick(rng, ((136, 130, 122), (156, 144, 126), (110, 112, 116)))), np.float32)
    moss = np.array(_tone(rng, (104, 132, 66)), np.float32)
    grown = np.clip(rng.uniform(-0.5, 1.0) - 4 * depth + 0.35 * rough[rows, columns], 0, 1)[:, None]
    light = 1.18 - 0.75 * depth + 0.05 * rough[rows, columns] + slant
    canvas[rows, columns] = np.clip((stone * (1 - grown) + moss * grown) * light[:, None], 0, 1)


def _paint_post(canvas: Array, rng: Generator, middle: Array, half: float, bark: tuple[float, ...]) -> None:
    """Paint a round wooden post down to the lower border, shaded across, with a pale cut top."""
    side = canvas.shape[0]
    left, right = (int(np.clip(middle[0] + k * half, 0, side)) for k in (-1, 1))
    top = int(np.clip(middle[1], 0, side))
    across = (np.arange(left, right) - middle[0]) / half
    grain = np.repeat(rng.normal(0, 0.05, (right - left) // 3 + 1), 3)[: right - left]
    shade = np.sqrt(np.clip(1 - (across - 0.25) ** 2 / 1.6, 0.05, 1)) + grain
    canvas[top:, left:right] = np.clip(np.array(bark, np.float32) * shade[:, None], 0, 1)
    for size, gain in ((1.0, 1.35), (0.72, 1.15), (0.62, 1.4), (0.34, 1.2), (0.26, 1.4)):
        axes = (half * size, 0.26 * half * size)
        _ellipse(canvas, middle, axes, tuple(min(1.0, c * gain) for c in bark))


def _paint_branch(
    canvas: Array, rng: Generator, middle: Array, along: Array, down: Array, thick: float, bark: tuple[float, ...]
) -> None:
    """Paint a branch across the picture, ``thick`` below the feet, with cracks in its bark and a few leaves."""
    side = canvas.shape[0]
    reach = 1.6 * side
    spine = _curve(middle - along * reach + down * thick, middle + along * reach + down * thick, 0.0)
    wobble = np.convolve(rng.normal(0, 0.05 * thick, 14), [0.3, 0.4, 0.3], "valid")[:, None]
    spine = np.asarray(spine + wobble * down, np.float32)
    for shift, width, gain in ((0.0, 2.0, 0.72), (-0.25, 1.4, 1.0), (-0.55, 0.55, 1.22)):
        tone = tuple(min(1.0, c * gain) for c in bark)
        _line(canvas, spine + down * thick * shift, tone, width * thick)
    for place in rng.uniform(-0.9, 0.9, 7):  # cracks in the bark
        spot = middle + along * place * side + down * thick * rng.uniform(0.3, 1.5)
        crack = np.array([spot, spot + along * 0.05 * side])
        _line(canvas, crack, tuple(c * 0.6 for c in bark), 0.006 * side)
    for place in rng.uniform(-0.8, 0.8, int(rng.integers(2, 6))):
        stem = np.asarray(middle + along * place * side + down * thick, np.float32)
        angle = rng.uniform(0.2, 2.9) if rng.random() < 0.65 else rng.uniform(-2.6, -0.5)
        length, width = rng.uniform(0.09, 0.19) * side, rng.uniform(0.02, 0.045) * side
        shape = _leaf_shape(stem, length, width, angle, rng.normal(0, 0.2))
        _paint_leaf(canvas, rng, shape, _pick(rng, _LEAF), 0.006 * side)


def paint_perch(canvas: Array, rng: Generator, pose: Pose) -> None:
    """Paint what the feet stand on: a branch with bark and leaves, a rock, or a post."""
    left, right = pose.perch
    middle, along = (left + right) / 2, (right - left) / (np.linalg.norm(right - left) + 1e-6)
    down = np.array([-along[1], along[0]], np.float32)
    down *= np.sign(down[1])
    thick = float(rng.uniform(0.055, 0.10)) * pose.unit + 0.008 * canvas.shape[0]
    kind = rng.random()
    bark = _tone(rng, _pick(rng, _BARK))
    if kind < 0.68:
        _paint_branch(canvas, rng, middle, along, down, thick, bark)
    elif kind < 0.90:
        _paint_rock(canvas, rng, middle + down * 0.03 * pose.unit, pose.unit)
    else:
        _paint_post(canvas, rng, middle, float(rng.uniform(0.24, 0.34)) * pose.unit, bark)


def paint_foreground(painting: Painting, rng: Generator, extents: dict[str, NDArray[np.bool_]]) -> None:
    """Paint, in about two of three pictures, a leaf or twig before the bird, over at most half of any part group.

    Args:
        painting: the picture, changed in place; covered pixels lose their part label.
        rng: source of shape and place; the numbers drawn do not depend on the species.
        extents: mask of each part group (side, side), the same for all species of a pose.
    """
    side = painting.part.shape[0]
    bird = np.logical_or.reduce(list(extents.values()))
    rows, columns = np.nonzero(bird)
    if rng.random() < 0.35 or not len(rows):
        return
    for _ in range(4):
        pick = int(rng.integers(1 << 30)) % len(rows)
        at = np.array([columns[pick], rows[pick]], np.float32)
        angle = rng.uniform(0, 2 * np.pi)
        twig = rng.random() < 0.4
        length = rng.uniform(0.5, 1.0) if twig else rng.uniform(0.16, 0.30)
        width = 0.011 if twig else rng.uniform(0.03, 0.05)
        axis = np.array([np.cos(angle), np.sin(angle)], np.float32)
        stem = at - axis * length * side * rng.uniform(0.45, 1.0)
        shape = _leaf_shape(stem, length * side, width * side, angle, rng.normal(0, 0.18))
        color = _pick(rng, _BARK if twig else _LEAF)
        cover = np.zeros((side, side), np.uint8)
        _polygon(cover, shape[0], 1)
        hidden = cover > 0
        if all((hidden & extent).sum() <= 0.5 * extent.sum() for extent in extents.values()):
            layer = painting.color.copy()
            _paint_leaf(layer, rng, shape, color, 0.005 * side)
            painting.color[hidden] = layer[hidden]
            painting.part[hidden] = 0
            return


# Clicks on outer parts go a little outward from the bird's middle (as a share of the distance), on the tail inward:
# then the nearest-point regions of the cue protocol meet near where the parts themselves meet.
_OUTWARD = {"back": 0.25, "breast": 0.15, "tail": -0.08}
_GROUP_OF_LABEL = np.array([-1] + [GROUPS.index(PART_GROUP[part]) for part in PARTS] + [GROUPS.index("head")])
_REFERENCE = choose_species(2)[0]


@dataclass(frozen=True)
class Drawing:
    """A drawn bird and its ground truth.

    Attributes:
        image: RGB, uint8 (size, size, 3).
        labels: visible part of each pixel, uint8 (size, size): 0 none, 1..15 the official part numbers,
            16 the rest of the head.
        points: per official part its pixel (x, y), or None if it is not visible.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    points: tuple[tuple[int, int] | None, ...]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """Mask of the visible bird (size, size)."""
        return self.labels > 0

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width and height of the visible bird in whole pixels, in CUB's convention: left + width and
        top + height are its last column and row."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]), int(rows[-1] - rows[0]))

    def group(self, name: str) -> NDArray[np.bool_]:
        """Return the mask of the visible pixels of a part group (size, size)."""
        return np.asarray(_GROUP_OF_LABEL[self.labels] == GROUPS.index(name))


def _shrink_labels(part: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Shrink labels to picture size; a pixel is bird where at least half of it is, with the label of such a quarter."""
    corners = [part[i::SUPERSAMPLE, j::SUPERSAMPLE] for i, j in ((0, 0), (1, 1), (0, 1), (1, 0))]
    label, covered = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    for corner in corners:
        covered += corner > 0
        label = np.where(label > 0, label, corner)
    return np.where(covered >= 2, label, 0).astype(np.uint8)


def _part_points(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[tuple[int, int] | None, ...]:
    """Return for each part the pixel that an annotator would click: the visible one nearest to its middle.

    A part counts as visible when at least 3 of its pixels (2 of an eye) and a third of those that the foreground
    could have covered are seen.
    """
    points: list[tuple[int, int] | None] = []
    middle = [axis.mean() for axis in np.nonzero(after)]
    for part in PARTS:
        rows, columns = np.nonzero(after == PART_ID[part])
        whole = int((before == PART_ID[part]).sum())
        if len(rows) < (2 if part.endswith("eye") else 3) or 3 * len(rows) < whole:
            points.append(None)
            continue
        y, x = rows.mean(), columns.mean()
        push = _OUTWARD.get(part, 0.0)
        y, x = y + push * (y - middle[0]), x + push * (x - middle[1])
        nearest = int(np.argmin((rows - y) ** 2 + (columns - x) ** 2))
        points.append((int(columns[nearest]), int(rows[nearest])))
    return tuple(points)


def _extents(pose: Pose, light: Light, side: int) -> dict[str, NDArray[np.bool_]]:
    """Return a coarse mask (side, side) of each part group in the pose, drawn for one fixed species."""
    small = side // 4
    coarse = Painting(np.zeros((small, small, 3), np.float32), np.zeros((small, small), np.uint8))
    paint_bird(coarse, _REFERENCE, pose.scaled(small / side), light, np.ones(3, np.float32))
    labels = cv2.resize(coarse.part, (side, side), interpolation=cv2.INTER_NEAREST)
    return {group: _GROUP_OF_LABEL[labels] == index for index, group in enumerate(GROUPS)}


def draw_bird(species: Species, seed: np.random.SeedSequence, size: int = 96) -> Drawing:
    """Draw one picture of ``size`` x ``size`` pixels; the same arguments give the same bytes."""
    # `spawn` changes the sequence that it is called on, so it is called on a copy of the caller's.
    copy = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key)
    streams = [np.random.default_rng(child) for child in copy.spawn(5)]
    side = size * SUPERSAMPLE
    pose = sample_pose(streams[0], side)
    tint = (streams[1].normal(1, 0.05) * streams[1].normal(1, 0.02, 3)).astype(np.float32)
    light = sample_light(streams[4])
    painting = Painting(paint_background(streams[2], side), np.zeros((side, side), np.uint8))
    paint_perch(painting.color, streams[2], pose)
    paint_bird(painting, species, pose, light, tint)
    before = _shrink_labels(painting.part, size)
    paint_foreground(painting, streams[3], _extents(pose, light, side))
    labels = _shrink_labels(painting.part, size)
    shrunk = np.asarray(cv2.resize(painting.color, (size, size), interpolation=cv2.INTER_AREA), np.float32)
    return Drawing(finish(shrunk, streams[4]), labels, _part_points(before, labels))
