"""Images per second of one processor core, of each step between a file and the batch: reading, augmenting, both.

JPEG files (quality 90, smooth noise) of two sizes are read and augmented by each preset, for the input size that goes
with them. "from the cache" is `reading.cache`: pictures are decoded once, and kept in the size that the preset resizes
them to before anything random. Files lie in the page cache of the system. Prints a Markdown table.

Run: python benchmarks/data.py [--images 64] [--rounds 5]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch
from PIL import Image

from calm.data.augmentation import AUGMENTATIONS
from calm.data.dataset import ImageDataset
from calm.data.records import Record, Split
from calm.data.transforms import eval_transform, fixed_size, train_transform
from calm.images import Preprocessing, read_image

SIZES = [((500, 375), 224), ((96, 96), 96)]
TEST = "testing"


def write(folder: Path, size: tuple[int, int], images: int) -> Split:
    """JPEG files of (width, height) pixels."""
    rng = np.random.default_rng(0)
    records = []
    for number in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
        path = folder / f"{size[0]}-{number}.jpg"
        coarse.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        records.append(Record(path.name, path, 0))
    return Split("train", tuple(records), ("one",), folder)


def ways(split: Split, side: int) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed: (preset, step) to a pass over all images."""
    prepared = Preprocessing(size=(side, side))
    pictures = [Image.fromarray(read_image(record.path)) for record in split.records]
    transforms = {name: train_transform(options, prepared) for name, options in AUGMENTATIONS.items()}
    transforms[TEST] = eval_transform(prepared)
    sizes = {name: fixed_size(options, prepared.size) for name, options in AUGMENTATIONS.items()}
    sizes[TEST] = prepared.size
    found: dict[tuple[str, str], Callable[[], object]] = {}
    found["", "read"] = lambda: [read_image(record.path) for record in split.records]
    for name, transform in transforms.items():
        plain = ImageDataset(split, transform)
        cached = ImageDataset(split, transform, cache=True, cache_size=sizes[name])
        found[name, "augment"] = lambda transform=transform: [transform(picture) for picture in pictures]
        found[name, "read and augment"] = lambda plain=plain: [plain[i] for i in range(len(plain))]
        found[name, "from the cache"] = lambda cached=cached: [cached[i] for i in range(len(cached))]
    return found


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for size, side in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            cases = ways(write(Path(folder), size, flags.images), side)
            times = measure.seconds({"|".join(case): way for case, way in cases.items()}, flags.rounds)
        speed = {case: f"{flags.images / measure.median(times['|'.join(case)]):.0f}" for case in cases}
        for name in (*AUGMENTATIONS, TEST):
            steps = [speed[name, step] for step in ("augment", "read and augment", "from the cache")]
            rows.append([f"{size[0]}x{size[1]} to {side}x{side}", name, speed["", "read"], *steps])
    print("Images per second of one core:\n")
    print(measure.table(["files", "preset", "read", "augment", "read and augment", "from the cache"], rows))


if __name__ == "__main__":
    main()
