"""One picture with everything that is true of it: the bird in its scene, mask, box and part points.

Five independent random streams come from the picture's seed: pose, plumage tint, background, foreground, camera.
None depends on the species, so the same seed drawn for two species differs only where the species do.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from calm.data.birds.anatomy import PART_ID
from calm.data.birds.attributes import PART_GROUP, PARTS
from calm.data.birds.draw import Painting, paint_bird
from calm.data.birds.light import Light, finish, sample_light
from calm.data.birds.pose import Pose, sample_pose
from calm.data.birds.scene import paint_background, paint_foreground, paint_perch
from calm.data.birds.species import GROUPS, Species, choose_species

__all__ = ["Drawing", "draw_bird"]

SUPERSAMPLE = 2
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
        """The visible bird (size, size)."""
        return self.labels > 0

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, width, height of the visible bird, in whole pixels, as `calm.data.cub` reads them: left + width
        and top + height are its last column and row."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return (int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]), int(rows[-1] - rows[0]))

    def group(self, name: str) -> NDArray[np.bool_]:
        """The visible pixels of a part group (size, size)."""
        return np.asarray(_GROUP_OF_LABEL[self.labels] == GROUPS.index(name))


def _shrink_labels(part: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Labels at picture size: bird where at least half of a pixel is, with the label of one such quarter."""
    corners = [part[i::SUPERSAMPLE, j::SUPERSAMPLE] for i, j in ((0, 0), (1, 1), (0, 1), (1, 0))]
    label, covered = np.zeros((size, size), np.uint8), np.zeros((size, size), np.uint8)
    for corner in corners:
        covered += corner > 0
        label = np.where(label > 0, label, corner)
    return np.where(covered >= 2, label, 0).astype(np.uint8)


def _part_points(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> tuple[tuple[int, int] | None, ...]:
    """Where an annotator would click: the visible pixel of the part that is nearest to its middle.

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
    """Where each part group of the pose is (side, side), coarsely, for one fixed species."""
    small = side // 4
    coarse = Painting(np.zeros((small, small, 3), np.float32), np.zeros((small, small), np.uint8))
    paint_bird(coarse, _REFERENCE, pose.scaled(small / side), light, np.ones(3, np.float32))
    labels = cv2.resize(coarse.part, (side, side), interpolation=cv2.INTER_NEAREST)
    return {group: _GROUP_OF_LABEL[labels] == index for index, group in enumerate(GROUPS)}


def draw_bird(species: Species, seed: np.random.SeedSequence, size: int = 96) -> Drawing:
    """Draw one picture of ``size`` x ``size`` pixels; the same arguments give the same bytes."""
    fresh = np.random.SeedSequence(
        seed.entropy, spawn_key=seed.spawn_key
    )  # spawning counts: not on the caller's
    streams = [np.random.default_rng(child) for child in fresh.spawn(5)]
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
