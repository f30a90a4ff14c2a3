"""Write birds as a CUB_200_2011 folder, to the letter, plus segmentations.

Order matters: pictures first, then the lists, and last of all ``birds.json``. A run that was killed leaves
``birds.partial.json`` and no ``birds.json``; the same call completes it, any other call refuses to mix.

What to draw: the configuration of a data set, and the list of images that follows from it.

Draw a share of a data set, in this process or in others.

Drawing is many small array operations, which threads of one Python process cannot overlap. So further workers
are separate processes that run this module: they need no guard in the user's script, no fork of a process that
has threads, and end by themselves when their parent is gone. Each image has its own seed, so shares are free.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from calm.errors import CalmError
from calm.files import atomic_path, remove_abandoned, write_json, write_text
from calm_birds.attributes import (
    ATTRIBUTES,
    CERTAINTIES,
    PART_GROUP,
    PARTS,
    attribute_group,
    species_attributes,
)
from calm_birds.scene import draw_bird
from calm_birds.species import GROUPS, MAX_SPECIES, Species, choose_species

__all__ = ["BirdsConfig", "BirdsSummary", "Item", "Truth", "draw_items", "plan_items", "write_birds"]


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


_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


@dataclass(frozen=True)
class Truth:
    """Of a drawn image: the box (x, y, width, height) and per official part its pixel (x, y), None if unseen."""

    box: tuple[int, int, int, int]
    points: tuple[tuple[int, int] | None, ...]


def _write(path: Path, encoded: tuple[bool, Any]) -> None:
    if not encoded[0]:
        raise OSError(f"OpenCV could not encode {path}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded[1].tobytes())


def _draw_share(
    root: Path, config: BirdsConfig, share: int, shares: int, wanted: Callable[[], bool] = lambda: True
) -> list[Truth]:
    """Draw every ``shares``-th image from the ``share``-th on, picture and segmentation, while ``wanted``."""
    species = choose_species(config.species)
    truths = []
    for item in plan_items(config, species)[share::shares]:
        if not wanted():
            break
        seed = np.random.SeedSequence([config.seed, item.number, 0])
        drawing = draw_bird(species[item.label], seed, config.size)
        _write(root / "images" / f"{item.stem}.jpg", cv2.imencode(".jpg", drawing.image[..., ::-1], _JPEG))
        mask = drawing.mask.astype(np.uint8) * np.uint8(255)
        _write(root / "segmentations" / f"{item.stem}.png", cv2.imencode(".png", mask))
        truths.append(Truth(drawing.box, drawing.points))
    return truths


def draw_items(root: Path, config: BirdsConfig, workers: int) -> list[Truth]:
    """Draw all images with ``workers`` processes, this one included, and return their truths in order.

    Raises:
        RuntimeError: a worker process failed; its last words are in the message.
        OSError: a picture cannot be written.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    children = []
    try:
        for share in range(1, workers):
            task = {
                "parent": os.getpid(),
                "root": str(root),
                "config": asdict(config),
                "share": share,
                "shares": workers,
            }
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", __name__, json.dumps(task)],
                    env=environment,
                    text=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        results = [_draw_share(root, config, 0, workers)]
        for child in children:
            output, errors = child.communicate()
            if child.returncode != 0:
                raise RuntimeError(
                    f"a process that draws birds ended with code {child.returncode}: {errors[-800:]}"
                )
            results.append(
                [
                    Truth(tuple(box), tuple(tuple(p) if p else None for p in points))
                    for box, points in json.loads(output)
                ]
            )
    finally:
        for child in children:
            child.kill()  # does nothing to one that has ended
            child.communicate()
    count = sum(len(result) for result in results)
    return [results[index % workers][index // workers] for index in range(count)]


def _main(task: dict[str, Any]) -> None:
    """Draw the share that the parent process described; answer with its truths on standard output."""
    cv2.setNumThreads(1)
    truths = _draw_share(
        Path(task["root"]),
        BirdsConfig(**task["config"]),
        task["share"],
        task["shares"],
        lambda: os.getppid() == task["parent"],
    )
    json.dump([[truth.box, truth.points] for truth in truths], sys.stdout)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))


GENERATOR_VERSION = 2
"""Grows whenever the same configuration gives other files."""
MANIFEST, PARTIAL = "birds.json", "birds.partial.json"


@dataclass(frozen=True)
class BirdsSummary:
    """What is in the folder.

    Attributes:
        root: the folder, in the layout of CUB_200_2011.
        config: what it was made from.
        class_names: names of the species, class 0 first, without the number.
        train_images: number of training images.
        test_images: number of test images.
        pairs: number of species pairs that differ in exactly 1, 2 and 3 part groups.
        reused: whether the folder was complete already and nothing was drawn.
    """

    root: Path
    config: BirdsConfig
    class_names: tuple[str, ...]
    train_images: int
    test_images: int
    pairs: tuple[int, int, int]
    reused: bool

    def __str__(self) -> str:
        one, two, three = self.pairs
        state = "already complete, nothing drawn" if self.reused else "written"
        return (
            f"{self.root}: {len(self.class_names)} species, {self.train_images} training and "
            f"{self.test_images} test images of {self.config.size}x{self.config.size} pixels; species pairs "
            f"that differ in 1, 2, 3 part groups: {one}, {two}, {three} ({state})"
        )


def _validate(config: BirdsConfig, workers: int | None) -> None:
    for name, value, low, high in (
        ("species", config.species, 2, MAX_SPECIES), ("images_per_species", config.images_per_species, 2, 9999),
        ("size", config.size, 32, 512), ("seed", config.seed, 0, 2**63),
        ("workers", 1 if workers is None else workers, 1, 256),
    ):  # fmt: skip
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise CalmError(f"{name}={value!r}: give a whole number between {low} and {high}")
    if not 0 < config.test_images < config.images_per_species:
        raise CalmError(
            f"test_fraction={config.test_fraction!r} makes {config.test_images} of {config.images_per_species} "
            "images a species test images: both train and test need at least one; try 0.3"
        )


def _lines(rows: Iterator[str] | Sequence[str]) -> str:
    return "".join(f"{row}\n" for row in rows)


def _numbered(names: Sequence[str]) -> str:
    return _lines([f"{index} {name}" for index, name in enumerate(names, 1)])


def _write_image_lists(
    root: Path, items: Sequence[Item], truths: Sequence[Truth], class_names: Sequence[str]
) -> None:
    boxes = [truth.box for truth in truths]
    write_text(root / "images.txt", _lines([f"{item.number} {item.stem}.jpg" for item in items]))
    write_text(root / "classes.txt", _numbered(class_names))
    write_text(root / "image_class_labels.txt", _lines([f"{item.number} {item.label + 1}" for item in items]))
    write_text(root / "train_test_split.txt", _lines([f"{item.number} {int(item.train)}" for item in items]))
    write_text(
        root / "bounding_boxes.txt",
        _lines(
            [
                f"{item.number} {x}.0 {y}.0 {w}.0 {h}.0"
                for item, (x, y, w, h) in zip(items, boxes, strict=True)
            ]
        ),
    )


def _write_parts(root: Path, items: Sequence[Item], truths: Sequence[Truth], seed: int) -> None:
    """Part names, points, and the clicks of three imagined annotators whose median is the point."""
    locations, clicks = [], []
    for item, truth in zip(items, truths, strict=True):
        rng = np.random.default_rng([seed, item.number, 2])
        offsets, times = rng.integers(0, 2, (len(PARTS), 2)), rng.uniform(1, 9, (len(PARTS), 3))
        for part, point in enumerate(truth.points, 1):
            key = f"{item.number} {part}"
            x, y, seen = (point[0], point[1], 1) if point else (0, 0, 0)
            locations.append(f"{key} {x}.0 {y}.0 {seen}")
            dx, dy = offsets[part - 1] * seen
            for (px, py), time in zip(
                ((x, y), (x - dx, y - dy), (x + dx, y + dy)), times[part - 1], strict=True
            ):
                clicks.append(f"{key} {px}.0 {py}.0 {seen} {time:.3f}")
    write_text(root / "parts" / "parts.txt", _numbered(PARTS))
    write_text(root / "parts" / "part_locs.txt", _lines(locations))
    write_text(root / "parts" / "part_click_locs.txt", _lines(clicks))


def _write_attributes(
    root: Path, items: Sequence[Item], truths: Sequence[Truth], species: Sequence[Species], seed: int
) -> None:
    """Attributes of classes (0 or 100 percent) and of images (certainty 1, and absent, where not visible)."""
    folder = root / "attributes"
    classes = [species_attributes(kind) for kind in species]
    groups = [attribute_group(name) for name in ATTRIBUTES]
    rows = []
    for item, truth in zip(items, truths, strict=True):
        seen = {PART_GROUP[part] for part, point in zip(PARTS, truth.points, strict=True) if point}
        times = np.random.default_rng([seed, item.number, 3]).uniform(1, 30, len(ATTRIBUTES)).tolist()
        for number, (present, group, time) in enumerate(
            zip(classes[item.label], groups, times, strict=True), 1
        ):
            visible = group is None or group in seen
            rows.append(f"{item.number} {number} {int(present and visible)} {4 if visible else 1} {time:.3f}")
    write_text(folder / "attributes.txt", _numbered(ATTRIBUTES))
    write_text(folder / "certainties.txt", _numbered(CERTAINTIES))
    write_text(folder / "image_attribute_labels.txt", _lines(rows))
    write_text(
        folder / "class_attribute_labels_continuous.txt",
        _lines([" ".join("100.0" if present else "0.0" for present in row) for row in classes]),
    )


def _claim(root: Path, record: dict[str, Any]) -> bool:
    """Whether ``root`` already holds exactly this set; otherwise make it ours to fill, or refuse."""
    if root.exists() and not root.is_dir():
        raise CalmError(f"cannot write birds to {root}: it is a file; give a folder")
    remove_abandoned(root)
    for name in (MANIFEST, PARTIAL):
        path = root / name
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CalmError(
                f"cannot write birds to {root}: {path} is not readable ({error}); delete the folder "
                "or choose another"
            ) from error
        same = isinstance(found, dict) and all(
            found.get(key) == record[key] for key in ("config", "generator")
        )
        if not same:
            raise CalmError(
                f"cannot write birds to {root}: it holds birds made from {found.get('config')} "
                f"(generator {found.get('generator')}), asked for {record['config']} (generator "
                f"{record['generator']}); choose another folder, or delete this one"
            )
        return name == MANIFEST
    if root.exists() and any(root.iterdir()):
        raise CalmError(
            f"cannot write birds to {root}: the folder is not empty and not a set of birds; choose "
            "an empty or new folder"
        )
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / PARTIAL, record)
    return False


def write_birds(
    out: str | os.PathLike[str],
    *,
    species: int = 10,
    images_per_species: int = 180,
    size: int = 96,
    seed: int = 0,
    test_fraction: float = 0.3,
    workers: int | None = None,
) -> BirdsSummary:
    """Draw a data set of birds in the layout of CUB_200_2011, with segmentations.

    The same arguments give the same bytes whatever ``workers`` is. Boxes and segmentations are of the *visible*
    bird (without what a leaf hides or the border cuts), exact to the pixel.

    Args:
        out: the folder to fill: a new or empty one, or one of an earlier call. If that call completed with the
            same arguments, nothing is drawn; if it was killed, this one completes it.
        species: number of species, 2 to 208. They differ by the part groups of CUB's attributes; 10 species
            have 4 pairs each of 1, 2 and 3 differing groups, 24 have 60 such pairs.
        images_per_species: images of each species, train and test together.
        size: width and height of the images in pixels, 32 to 512.
        seed: decides everything else; any whole number from 0.
        test_fraction: share of each species' images that are test images.
        workers: processes that draw (default: one a core, but none for less than 200 images).

    Returns:
        What the folder holds.

    Raises:
        CalmError: an argument out of range, or a folder that holds something else.
        OSError: the folder cannot be written.
    """
    config = BirdsConfig(species, images_per_species, size, seed, test_fraction)
    _validate(config, workers)
    root = Path(out)
    chosen = choose_species(species)
    items = plan_items(config, chosen)
    differing = [len(a.differing_groups(b)) for a, b in combinations(chosen, 2)]
    one, two, three = (differing.count(count) for count in (1, 2, 3))
    record = {
        "format": "CUB_200_2011",
        "generator": GENERATOR_VERSION,
        "config": asdict(config),
        "class_names": [kind.name for kind in chosen],
        "part_groups": list(GROUPS),
        "pairs": {"1": one, "2": two, "3": three},
    }
    reused = _claim(root, record)
    if not reused:
        _fill(root, config, chosen, items, workers or min(os.cpu_count() or 1, 1 + len(items) // 200))
        write_json(root / MANIFEST, record)
    (root / PARTIAL).unlink(missing_ok=True)
    train = sum(item.train for item in items)
    return BirdsSummary(
        root,
        config,
        tuple(kind.name for kind in chosen),
        train,
        len(items) - train,
        (one, two, three),
        reused,
    )


def _fill(
    root: Path, config: BirdsConfig, species: Sequence[Species], items: Sequence[Item], workers: int
) -> None:
    class_names = [f"{label:03d}.{kind.name}" for label, kind in enumerate(species, 1)]
    for kind in ("images", "segmentations"):
        for name in class_names:
            (root / kind / name).mkdir(parents=True, exist_ok=True)
    truths = draw_items(root, config, workers)
    _write_image_lists(root, items, truths, class_names)
    _write_parts(root, items, truths, config.seed)
    _write_attributes(root, items, truths, species, config.seed)
