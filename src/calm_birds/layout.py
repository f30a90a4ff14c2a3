"""Write a data set of birds as a CUB_200_2011 folder, with segmentations.

The pictures are written first, then the lists, and ``birds.json`` last of all. A run that was killed leaves
``birds.partial.json`` and no ``birds.json``: the same call completes the folder, and a call with other arguments
refuses to add to it.

Drawing consists of many small array operations, which threads of one Python process cannot overlap. Further workers are
therefore separate processes that run this module: they need no guard in the user's script, do not fork a process that
has threads, and end by themselves when their parent is gone. Each image has its own seed, so that any process can draw
any image.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from calm.errors import CalmError
from calm.files import atomic_path, remove_abandoned, write_json, write_text
from calm_birds.attributes import ATTRIBUTES, CERTAINTIES, PART_GROUP, PARTS, attribute_group, species_attributes
from calm_birds.scene import draw_bird
from calm_birds.species import GROUPS, MAX_SPECIES, Species, choose_species

__all__ = ["BirdsConfig", "BirdsSummary", "Item", "Truth", "draw_items", "plan_items", "write_birds"]

GENERATOR_VERSION = 3
"""Must be raised whenever the same configuration gives other files."""
MANIFEST, PARTIAL = "birds.json", "birds.partial.json"

_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


@dataclass(frozen=True)
class BirdsConfig:
    """The arguments that determine every byte of the data set."""

    species: int
    images_per_species: int
    size: int
    seed: int
    test_fraction: float

    @property
    def test_images(self) -> int:
        """Number of test images of each species."""
        return round(self.images_per_species * self.test_fraction)


@dataclass(frozen=True)
class BirdsSummary:
    """The contents of a folder that :func:`write_birds` filled.

    Attributes:
        root: the folder, in the layout of CUB_200_2011.
        config: the arguments that it was made from.
        class_names: names of the species, class 0 first, without the number.
        train_images: number of training images.
        test_images: number of test images.
        pairs: number of species pairs that differ in exactly 1, 2 and 3 part groups.
        reused: whether the folder was complete already and nothing was drawn.
        opencv: version of OpenCV that drew it.
    """

    root: Path
    config: BirdsConfig
    class_names: tuple[str, ...]
    train_images: int
    test_images: int
    pairs: tuple[int, int, int]
    reused: bool
    opencv: str

    def __str__(self) -> str:
        one, two, three = self.pairs
        state = "already complete, nothing drawn" if self.reused else "written"
        if self.opencv != cv2.__version__:
            state += f"; drawn with OpenCV {self.opencv}, this is {cv2.__version__}"
        return (
            f"{self.root}: {len(self.class_names)} species, {self.train_images} training and "
            f"{self.test_images} test images of {self.config.size}x{self.config.size} pixels; species pairs "
            f"that differ in 1, 2, 3 part groups: {one}, {two}, {three} ({state})"
        )


@dataclass(frozen=True)
class Item:
    """An image to draw: its id (from 1), class (from 0), path without suffix, and whether it is for training."""

    number: int
    label: int
    stem: str
    train: bool


@dataclass(frozen=True)
class Truth:
    """The truth of a drawn image: its box (x, y, width, height) and the pixel (x, y) of each part, None if hidden."""

    box: tuple[int, int, int, int]
    points: tuple[tuple[int, int] | None, ...]


def plan_items(config: BirdsConfig, species: Sequence[Species]) -> list[Item]:
    """Return all images in the order of their ids, species by species; test images are a random choice of each."""
    items: list[Item] = []
    for label, kind in enumerate(species):
        order = np.random.default_rng([config.seed, label, 1]).permutation(config.images_per_species)
        test = set(order[: config.test_images].tolist())
        for index in range(config.images_per_species):
            number = len(items) + 1
            stem = f"{label + 1:03d}.{kind.name}/{kind.name}_{index + 1:04d}_{number}"
            items.append(Item(number, label, stem, index not in test))
    return items


def _write_image(path: Path, pixels: NDArray[np.uint8], options: Sequence[int] = ()) -> None:
    encoded, data = cv2.imencode(path.suffix, pixels, options)
    if not encoded:
        raise OSError(f"OpenCV could not encode {path}")
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.tobytes())


def _draw_share(
    root: Path, config: BirdsConfig, share: int, shares: int, proceed: Callable[[], bool] = lambda: True
) -> list[Truth]:
    """Draw every ``shares``-th picture and segmentation from the ``share``-th on, as long as ``proceed`` is true."""
    species = choose_species(config.species)
    truths = []
    for item in plan_items(config, species)[share::shares]:
        if not proceed():
            break
        seed = np.random.SeedSequence([config.seed, item.number, 0])
        drawing = draw_bird(species[item.label], seed, config.size)
        _write_image(root / "images" / f"{item.stem}.jpg", drawing.image[..., ::-1], _JPEG)
        _write_image(root / "segmentations" / f"{item.stem}.png", drawing.mask.astype(np.uint8) * np.uint8(255))
        truths.append(Truth(drawing.box, drawing.points))
    return truths


def _start_worker(task: dict[str, Any]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", __name__, json.dumps(task)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe)


def _work(task: dict[str, Any]) -> None:
    """Draw the share that the parent process described, and print its truths as JSON."""
    cv2.setNumThreads(1)
    root, config = Path(task["root"]), BirdsConfig(**task["config"])
    truths = _draw_share(root, config, task["share"], task["shares"], lambda: os.getppid() == task["parent"])
    json.dump([[truth.box, truth.points] for truth in truths], sys.stdout)


def _read_truth(box: Sequence[int], points: Sequence[Sequence[int] | None]) -> Truth:
    x, y, width, height = box
    return Truth((x, y, width, height), tuple((point[0], point[1]) if point else None for point in points))


def draw_items(root: Path, config: BirdsConfig, workers: int) -> list[Truth]:
    """Draw all images with ``workers`` processes, this one included, and return their truths in order.

    Raises:
        RuntimeError: a worker process failed; the message ends with what it printed last.
        OSError: a picture cannot be written.
    """
    task = {"parent": os.getpid(), "root": str(root), "config": asdict(config), "shares": workers}
    children: list[subprocess.Popen[str]] = []
    try:
        for share in range(1, workers):
            children.append(_start_worker(task | {"share": share}))
        results = [_draw_share(root, config, 0, workers)]
        for child in children:
            output, errors = child.communicate()
            if child.returncode != 0:
                raise RuntimeError(f"a process that draws birds ended with code {child.returncode}: {errors[-800:]}")
            results.append([_read_truth(*row) for row in json.loads(output)])
    finally:
        for child in children:
            child.kill()  # has no effect on a process that has ended
            child.communicate()
    count = sum(len(result) for result in results)
    return [results[index % workers][index // workers] for index in range(count)]


def _write_lines(path: Path, rows: Iterable[str]) -> None:
    write_text(path, "".join(f"{row}\n" for row in rows))


def _write_numbered(path: Path, names: Sequence[str]) -> None:
    _write_lines(path, (f"{number} {name}" for number, name in enumerate(names, 1)))


def _write_image_lists(root: Path, items: Sequence[Item], truths: Sequence[Truth], class_names: Sequence[str]) -> None:
    _write_numbered(root / "classes.txt", class_names)
    boxes = [" ".join(f"{value}.0" for value in truth.box) for truth in truths]
    for name, values in (
        ("images", [f"{item.stem}.jpg" for item in items]),
        ("image_class_labels", [item.label + 1 for item in items]),
        ("train_test_split", [int(item.train) for item in items]),
        ("bounding_boxes", boxes),
    ):
        rows = (f"{item.number} {value}" for item, value in zip(items, values, strict=True))
        _write_lines(root / f"{name}.txt", rows)


def _write_parts(root: Path, items: Sequence[Item], truths: Sequence[Truth], seed: int) -> None:
    """Write part names, part points, and the clicks of three simulated annotators, whose median is the point."""
    locations, clicks = [], []
    for item, truth in zip(items, truths, strict=True):
        rng = np.random.default_rng([seed, item.number, 2])
        offsets, times = rng.integers(0, 2, (len(PARTS), 2)), rng.uniform(1, 9, (len(PARTS), 3))
        for index, point in enumerate(truth.points):
            key = f"{item.number} {index + 1}"
            x, y, visible = (*point, 1) if point else (0, 0, 0)
            locations.append(f"{key} {x}.0 {y}.0 {visible}")
            dx, dy = offsets[index] * visible
            for sign, time in zip((0, -1, 1), times[index], strict=True):
                clicks.append(f"{key} {x + sign * dx}.0 {y + sign * dy}.0 {visible} {time:.3f}")
    _write_numbered(root / "parts" / "parts.txt", PARTS)
    _write_lines(root / "parts" / "part_locs.txt", locations)
    _write_lines(root / "parts" / "part_click_locs.txt", clicks)


def _write_attributes(
    root: Path, items: Sequence[Item], truths: Sequence[Truth], species: Sequence[Species], seed: int
) -> None:
    """Write the attributes of classes (0 or 100 percent) and of images.

    An attribute of a part that is hidden in an image is absent there, with the certainty "not visible".
    """
    folder = root / "attributes"
    classes = [species_attributes(kind) for kind in species]
    groups = [attribute_group(name) for name in ATTRIBUTES]
    rows = []
    for item, truth in zip(items, truths, strict=True):
        seen = {PART_GROUP[part] for part, point in zip(PARTS, truth.points, strict=True) if point}
        times = np.random.default_rng([seed, item.number, 3]).uniform(1, 30, len(ATTRIBUTES)).tolist()
        columns = zip(classes[item.label], groups, times, strict=True)
        for number, (present, group, time) in enumerate(columns, 1):
            visible = group is None or group in seen
            rows.append(f"{item.number} {number} {int(present and visible)} {4 if visible else 1} {time:.3f}")
    _write_numbered(folder / "attributes.txt", ATTRIBUTES)
    _write_numbered(folder / "certainties.txt", CERTAINTIES)
    _write_lines(folder / "image_attribute_labels.txt", rows)
    percentages = (" ".join("100.0" if present else "0.0" for present in row) for row in classes)
    _write_lines(folder / "class_attribute_labels_continuous.txt", percentages)


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


def _claim(root: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record of ``root`` if it already holds exactly this data set; otherwise mark it as partial.

    Raises:
        CalmError: the folder holds something else.
    """
    where = f"cannot write birds to {root}"
    if root.exists() and not root.is_dir():
        raise CalmError(f"{where}: it is a file; give a folder")
    remove_abandoned(root)
    path = next((root / name for name in (MANIFEST, PARTIAL) if (root / name).exists()), None)
    if path is not None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CalmError(
                f"{where}: {path} is not readable ({error}); delete the folder or choose another"
            ) from error
        found = found if isinstance(found, dict) else {}
        if any(found.get(key) != record[key] for key in ("config", "generator")):
            raise CalmError(
                f"{where}: it holds birds made from {found.get('config')} (generator {found.get('generator')}), "
                f"not from {record['config']} (generator {record['generator']}); choose another folder, or delete "
                "this one"
            )
        if path.name == MANIFEST:
            return found
    if path is None and root.exists() and any(root.iterdir()):
        raise CalmError(f"{where}: the folder is not empty and not a set of birds; choose an empty or new folder")
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / PARTIAL, record)
    return None


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

    The same arguments give the same pixels for any number of workers and, as far as known (4.11 to 5.0), any version
    of OpenCV; the same bytes for one version, which ``birds.json`` names.
    Boxes and segmentations are those of the *visible* bird, without what a leaf hides or the border cuts, exact to the
    pixel.

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
    root, kinds = Path(out), choose_species(species)
    names = tuple(kind.name for kind in kinds)
    items = plan_items(config, kinds)
    differing = [len(first.differing_groups(second)) for first, second in combinations(kinds, 2)]
    pairs = (differing.count(1), differing.count(2), differing.count(3))
    record: dict[str, Any] = {
        "format": "CUB_200_2011",
        "generator": GENERATOR_VERSION,
        "versions": {"opencv": cv2.__version__, "numpy": np.__version__},
        "config": asdict(config),
        "class_names": names,
        "part_groups": GROUPS,
        "pairs": dict(zip("123", pairs, strict=True)),
    }
    found = _claim(root, record)
    if found is None:
        class_names = [f"{number:03d}.{name}" for number, name in enumerate(names, 1)]
        for kind, name in product(("images", "segmentations"), class_names):
            (root / kind / name).mkdir(parents=True, exist_ok=True)
        truths = draw_items(root, config, workers or min(os.cpu_count() or 1, 1 + len(items) // 200))
        _write_image_lists(root, items, truths, class_names)
        _write_parts(root, items, truths, seed)
        _write_attributes(root, items, truths, kinds, seed)
        write_json(root / MANIFEST, record)
    (root / PARTIAL).unlink(missing_ok=True)
    train = sum(item.train for item in items)
    versions = record["versions"] if found is None else found.get("versions")
    opencv = str(versions.get("opencv") if isinstance(versions, dict) else None)
    return BirdsSummary(root, config, names, train, len(items) - train, pairs, found is not None, opencv)


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
