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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from calm.atomic import atomic_path
from calm.data.birds.drawing import draw_bird
from calm.data.birds.plan import BirdsConfig, plan_items
from calm.data.birds.species import choose_species

__all__ = ["Truth", "draw_items"]

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
