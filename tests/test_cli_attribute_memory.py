"""`calm attribute` on thin and large pictures: whole, and in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stress_counts import FULL

import calm
from calm.render import table

HEAT = tuple(table("heat")[0].tolist())  # where the bar of colours below an overlay begins

pytestmark = pytest.mark.stress

EXPLAIN = """
import resource, sys
from pathlib import Path
import calm.explain
from calm.cli.attribute import attribute_files
model, out, megabytes, *pictures = sys.argv[1:]
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = used + int(megabytes) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for picture in pictures:
    attribute_files([picture], model=model, out=Path(out))
"""


def explained(folder: Path, sizes: dict[str, tuple[int, int]], megabytes: int) -> dict[str, tuple[int, int]]:
    """The sizes of the overlays of pictures, (width, height) without the legend.

    They are explained with so much memory beyond the libraries'. The legend begins with its bar of colours.
    """
    model = calm.create_model("tiny_resnet", 7).save_pretrained(folder / "model")
    for name, size in sizes.items():
        Image.new("RGB", size, (9, 200, 30)).save(folder / f"{name}.png", compress_level=1)
    pictures = [str(folder / f"{name}.png") for name in sizes]
    command = [sys.executable, "-W", "error", "-c", EXPLAIN, str(model), str(folder / "out"), str(megabytes)]
    subprocess.run([*command, *pictures], check=True, timeout=300, stdout=subprocess.DEVNULL)
    overlays = {}
    for name, (width, height) in sizes.items():
        written = np.load(folder / "out" / f"{name}.joint.npy", mmap_mode="r")
        assert (written.shape, written.dtype) == ((height, width), np.float32)
        with Image.open(folder / "out" / f"{name}.joint.png") as overlay:
            low = [y for y in range(max(0, overlay.height - 150), overlay.height) if overlay.getpixel((0, y)) == HEAT]
            overlays[name] = overlay.width, low[0] if low else overlay.height
    return overlays


def test_attribute_explains_thin_and_large_pictures_in_bounded_memory(tmp_path: Path) -> None:
    """The overlay of a line, if made as high as SMALLEST_PICTURE, would have 13 million columns."""
    sizes = {"wide": (60_000, 1), "high": (1, 60_000), "one": (1, 1), "short": (300, 2), "large": (3600, 2800)}
    assert explained(tmp_path, sizes, 700) == {
        "wide": (60_000, 1),
        "high": (1, 60_000),
        "one": (224, 224),
        "short": (1800, 12),
        "large": (2268, 1764),
    }


@pytest.mark.skipif(not FULL, reason="takes a minute: CALM_STRESS=full")
def test_attribute_explains_larger_pictures_in_bounded_memory(tmp_path: Path) -> None:
    sizes = {"square": (5000, 5000), "line": (500_000, 1), "column": (2, 500_000)}
    assert explained(tmp_path, sizes, 1500) == {"square": (2000, 2000), "line": (65_535, 1), "column": (1, 65_535)}
