"""Small data sets on disk, for the tests of the readers and checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (8, 6), seed: int = 0) -> Path:
    """A picture of noise, (width, height) pixels, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_broken(folder: Path) -> dict[str, Path]:
    """A file for each kind of problem an image can have; "too-large" has 120 x 100 pixels, for a lowered limit."""
    whole = write_image(folder / "whole.jpg", (64, 48)).read_bytes()
    png = write_image(folder / "whole.png", (64, 48)).read_bytes()
    files = {
        "empty-file": b"",
        "not-an-image": b"<!DOCTYPE html><html>Not found</html>",
        "truncated": whole[: len(whole) // 2],
        "truncated-png": png[: len(png) // 2],
        "truncated-header": png[:20],
    }
    paths = {kind: folder / f"{kind}.jpg" for kind in files}
    for kind, content in files.items():
        paths[kind].write_bytes(content)
    paths["too-large"] = write_image(folder / "too-large.png", (120, 100))
    paths["missing-file"] = folder / "nowhere.jpg"
    return paths


def write_lines(path: Path, lines: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_pack(
    root: Path,
    labels: Mapping[str, Sequence[int]] = {"train": (0, 0, 0, 1, 1, 1), "val": (0, 1), "test": (0, 1)},
    *,
    classes: Sequence[str] | None = ("0 n00000001 cat, felis", "1 n00000002 dog, canis"),
    size: tuple[int, int] = (8, 6),
) -> Path:
    """A pack in the metadata format: PNG images of 8x6 pixels, one box each."""
    seed = 0
    for split, of_split in labels.items():
        ids = [f"images/{split}/{index}.png" for index in range(len(of_split))]
        for name in ids:
            seed += 1
            write_image(root / name, size, seed)
        lists = root / "metadata" / split
        write_lines(lists / "image_ids.txt", ids)
        write_lines(lists / "class_labels.txt", [f"{name},{label}" for name, label in zip(ids, of_split, strict=True)])
        write_lines(lists / "image_sizes.txt", [f"{name},{size[0]},{size[1]}" for name in ids])
        write_lines(lists / "localization.txt", [f"{name},1,1,5,4" for name in ids])
    if classes is not None:
        write_lines(root / "classes.txt", classes)
    return root


def write_cub(root: Path, *, masks: bool = False) -> Path:
    """Three classes of the official layout, of which the second has no image; 4 train and 2 test images."""
    names = [f"{c:03d}.Bird_{c}/Bird_{c}_{i}.jpg" for c in (1, 3) for i in range(3)]
    for index, name in enumerate(names, start=1):
        write_image(root / "images" / name, (20, 10), index)
        if masks:
            write_image(root / "segmentations" / Path(name).with_suffix(".png"), (20, 10))
    write_lines(root / "images.txt", [f"{i} {name}" for i, name in enumerate(names, start=1)])
    write_lines(root / "classes.txt", [f"{c} {c:03d}.Bird_{c}" for c in (1, 2, 3)])
    write_lines(root / "image_class_labels.txt", [f"{i} {1 if i <= 3 else 3}" for i in range(1, 7)])
    write_lines(root / "train_test_split.txt", [f"{i} {0 if i in (3, 6) else 1}" for i in range(1, 7)])
    write_lines(root / "bounding_boxes.txt", [f"{i} 2.0 1.0 10.0 5.0" for i in range(1, 7)])
    return root


def edit(path: Path, old: str, new: str) -> None:
    """Replace the one occurrence of ``old`` in a text file."""
    text = path.read_text()
    assert text.count(old) == 1, (path, old, text)
    path.write_text(text.replace(old, new))
