"""Draw a share of a data set, in this process or in others.

Drawing is many small array operations, which threads of one Python process cannot overlap. So further workers
are separate processes that run this module: they need no guard in the user's script, no fork of a process that
has threads, and end by themselves when their parent is gone. Each image has its own seed, so shares are free.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from calm.data.birds.drawing import draw_bird
from calm.data.birds.species import choose_species

__all__ = ["Item", "Truth", "draw_items"]


@dataclass(frozen=True)
class Item:
    """One image to be: its id (from 1), class (from 0), path without suffix, and whether it is for training."""

    number: int
    label: int
    stem: str
    train: bool


@dataclass(frozen=True)
class Truth:
    """Of a drawn image: the box (x, y, width, height) and per official part its pixel (x, y), None if unseen."""

    box: tuple[int, int, int, int]
    points: tuple[tuple[int, int] | None, ...]


def _write(path: Path, encoded: tuple[bool, Any]) -> None:
    if not encoded[0]:
        raise OSError(f"OpenCV could not encode {path}")
    path.write_bytes(encoded[1].tobytes())


def _draw_share(root: Path, species: int, seed: int, size: int, items: Sequence[Item],
                wanted: Callable[[], bool]) -> list[Truth]:
    """Draw items and write each one's picture and segmentation, as long as they are ``wanted``."""
    kinds = choose_species(species)
    truths = []
    options = [cv2.IMWRITE_JPEG_QUALITY, 95,
               cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    for item in items:
        if not wanted():
            break
        drawing = draw_bird(kinds[item.label], np.random.SeedSequence([seed, item.number, 0]), size)
        _write(root / "images" / f"{item.stem}.jpg", cv2.imencode(".jpg", drawing.image[..., ::-1], options))
        mask = drawing.mask.astype(np.uint8) * np.uint8(255)
        _write(root / "segmentations" / f"{item.stem}.png", cv2.imencode(".png", mask))
        truths.append(Truth(drawing.box, drawing.points))
    return truths


def draw_items(root: Path, species: int, seed: int, size: int, items: Sequence[Item], workers: int) -> list[Truth]:
    """Draw all items with ``workers`` processes, this one included, and return their truths in order.

    Raises:
        RuntimeError: a worker process failed; its last words are in the message.
        OSError: a picture cannot be written.
    """
    shares = [list(items[k::workers]) for k in range(workers)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    children = []
    try:
        for share in shares[1:]:
            child = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, text=True,
                                     stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
            children.append(child)
            assert child.stdin is not None
            task = {"parent": os.getpid(), "root": str(root), "species": species, "seed": seed, "size": size,
                    "items": [list(vars(item).values()) for item in share]}
            child.stdin.write(json.dumps(task))
            child.stdin.close()
            child.stdin = None
        results = [_draw_share(root, species, seed, size, shares[0], lambda: True)]
        for child in children:
            output, errors = child.communicate()
            if child.returncode != 0:
                raise RuntimeError(f"a process that draws birds ended with code {child.returncode}: {errors[-800:]}")
            results.append([Truth(tuple(box), tuple(tuple(p) if p else None for p in points))
                            for box, points in json.loads(output)])
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
    return [results[index % workers][index // workers] for index in range(len(items))]


def _main() -> None:
    """Draw the share that standard input describes; answer with its truths on standard output."""
    task = json.load(sys.stdin)
    cv2.setNumThreads(1)
    items = [Item(*values) for values in task["items"]]
    truths = _draw_share(Path(task["root"]), task["species"], task["seed"], task["size"], items,
                         lambda: os.getppid() == task["parent"])
    json.dump([[truth.box, truth.points] for truth in truths], sys.stdout)


if __name__ == "__main__":
    _main()
