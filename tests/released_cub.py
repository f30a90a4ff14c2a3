"""Small birds laid out as the released code wants CUB: dataset/CUB, metadata/CUB/{train,val,test}."""

from __future__ import annotations

import io
import os
import runpy
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from PIL import Image

from calm_birds import write_birds

ROOT = Path(__file__).parent.parent
SMALL = ("--crop_size=32", "--resize_size=40", "--batch_size=4", "--workers=0", "--epochs=1", "--pretrained=False")


def write_released_cub(project: Path, *, species: int = 3, images: int = 4) -> Path:
    """A project folder with ``dataset/CUB`` and ``metadata/CUB``; half of the images are test images."""
    cub = project / "dataset" / "CUB"
    write_birds(cub, species=species, images_per_species=images, size=48, test_fraction=0.5, workers=1)

    def column(name: str) -> dict[str, str]:
        rows = (line.split(maxsplit=1) for line in (cub / name).read_text().splitlines())
        return dict(rows)  # type: ignore[arg-type]

    paths, labels, sides = map(column, ("images.txt", "image_class_labels.txt", "train_test_split.txt"))
    boxes = column("bounding_boxes.txt")
    side_of = {"train": "1", "val": "1", "test": "0"}
    numbers_of = {split: [number for number in paths if sides[number] == side] for split, side in side_of.items()}
    for split, numbers in numbers_of.items():
        rows: dict[str, list[str]] = {name: [] for name in ("image_ids", "class_labels", "image_sizes", "localization")}
        for number in numbers:
            x, y, w, h = (int(float(value)) for value in boxes[number].split())
            rows["image_ids"].append(paths[number])
            rows["class_labels"].append(f"{paths[number]},{int(labels[number]) - 1}")
            rows["image_sizes"].append(f"{paths[number]},48,48")
            rows["localization"].append(f"{paths[number]},{x},{y},{min(x + w, 47)},{min(y + h, 47)}")
        folder = project / "metadata" / "CUB" / split
        folder.mkdir(parents=True)
        for name, lines in rows.items():
            (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    # The validation images of the released layout are another data set, CUBV2, with the same folders.
    for number in numbers_of["val"]:
        place = project / "dataset" / "CUBV2" / paths[number]
        place.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(cub / "images" / paths[number]) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(place)
    return project


def call(project: Path, script: str, *flags: str) -> tuple[int, str]:
    """Run a script of the repository's root in the project's folder, as ``python SCRIPT FLAGS`` would.

    Returns:
        Its exit code, and what it printed.
    """
    argv, here, printed = sys.argv, Path.cwd(), io.StringIO()
    sys.argv = [script, *flags]
    os.chdir(project)
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0), printed.getvalue()
    finally:
        sys.argv = argv
        os.chdir(here)
    raise AssertionError(f"{script} did not say how it ended")
