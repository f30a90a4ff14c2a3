"""The ``calm demo`` command: five other commands, one after another."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from calm.cli import run
from calm.errors import CalmError


def demo(
    out: Path = Path("demo"),
    *,
    species: int = 10,
    images_per_species: int = 180,
    size: int = 96,
    epochs: int | None = None,
    seed: int = 0,
) -> Path:
    """Make birds, train CALM-EM and CAM on them, benchmark both, and write one HTML file that shows what they see.

    What is complete already is used again: after an interruption the same command goes on where it was, and a finished
    demo only writes its report anew.

    Args:
        out: folder for birds/, runs/, evaluation/ and report.html.
        species: how many species of birds there are.
        images_per_species: pictures of each, for training and test together.
        size: width and height of the pictures in pixels.
        epochs: passes over the training pictures, the same for both models; by default those of the preset "birds".
        seed: of the birds and of both trainings.

    Returns:
        The report.

    Raises:
        CalmError: a value out of range, or a folder that holds something else or a demo with other settings.
    """
    start = time.monotonic()
    lines = _commands(Path(out), species, images_per_species, size, epochs, seed)
    for number, words in enumerate(lines, start=1):
        print(f"\n{number}/{len(lines)}  calm {shlex.join(words)}", flush=True)
        try:
            run(words)
        except CalmError as error:  # the folders are chosen here, by --out
            raise CalmError(str(error).replace("--run_dir", "--out").replace("run_dir", "folder")) from error
    report = Path(out) / "report.html"
    print(f"\ndone in {time.monotonic() - start:.0f} s; open {report} in a browser")
    return report


def _commands(
    out: Path, species: int, images_per_species: int, size: int, epochs: int | None, seed: int
) -> list[list[str]]:
    """Return the command lines, each as its words."""
    birds, evaluation = str(out / "birds"), str(out / "evaluation")
    runs = {method: str(out / "runs" / method) for method in ("calm-em", "cam")}
    made = f"--species {species} --images_per_species {images_per_species} --size {size} --seed {seed}"
    trained = f"--seed {seed} --reading.image_size {size}"
    if epochs is not None:
        trained += f" --epochs {epochs}"
    train_images = species * (images_per_species - round(images_per_species * 0.3))
    if train_images < 128:  # fewer than four batches of the preset
        trained += f" --batch_size {max(2, train_images // 4)}"
    train = ["train", "--preset", "birds", "--data", birds, "--report", "false"]
    methods = ["--method", "joint", "cam", "evidence", "gradient"]
    return [
        ["data", "birds", birds, *made.split()],
        *([*train, "--method", method, "--run_dir", folder, *trained.split()] for method, folder in runs.items()),
        ["evaluate", "all", "--data", birds, "--model", *runs.values(), *methods, "--out", evaluation],
        ["report", evaluation, "--out", str(out / "report.html")],
    ]
