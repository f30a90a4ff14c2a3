"""``calm demo``: birds, two models, and a report that shows what they see."""

# ruff: noqa: RUF001 -- typographic signs in prose
from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from calm.errors import CalmError

if TYPE_CHECKING:
    from calm.data.records import Split
    from calm.report.found import Run
    from calm.report.story import Study
    from calm.train import TrainConfig
    from calm_birds import BirdsSummary

__all__ = ["demo"]

METHODS = ("calm-em", "cam")


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

    What is complete already is used again: after an interruption the same command goes on where it was, and a
    finished demo only writes its report anew.

    Args:
        out: folder for birds/, runs/, evaluation/ and report.html.
        species: how many species of birds there are; at least two of them must differ in just one part.
        images_per_species: pictures of each, for training and test together.
        size: width and height of the pictures in pixels.
        epochs: passes over the training pictures, the same for both models; by default those of the preset
            "birds".
        seed: of the birds and of both trainings.

    Returns:
        The report.

    Raises:
        CalmError: a value out of range, or a folder that holds something else or a demo with other settings.
    """
    console = Console(highlight=False, soft_wrap=True)
    out, start = Path(out), time.monotonic()
    _step(console, 1, "birds", f"{species} species, {images_per_species} pictures of each")
    with console.status("drawing"):
        birds, test = _birds(out / "birds", species, images_per_species, size, seed)
    console.print(str(birds))
    drawn = time.monotonic()
    runs = []
    for number, method in enumerate(METHODS, start=2):
        _step(
            console, number, method.upper(), "the same network, pictures and number of steps for both models"
        )
        folder = out / "runs" / method
        runs.append(_train(_config(birds, folder, method, epochs, seed), folder, console))
    trained = time.monotonic()
    _step(console, 4, "measuring", f"predictions and maps of {birds.test_images} test pictures")
    study = _measure(birds, test, runs, out / "evaluation", console)
    measured = time.monotonic()
    times = {
        "birds": None if birds.reused else drawn - start,
        **{f"training {run.label}": run.result["seconds"] for run in runs},
        "measuring": measured - trained,
    }
    _step(console, 5, "report", "")
    with console.status("writing"):
        report = _write(study, birds, out, epochs, times)
    _summarise(console, study, report, time.monotonic() - start)
    return report


def _step(console: Console, number: int, title: str, what: str) -> None:
    console.print(f"\n[bold]{number}/5 {title}[/bold]{f'  [dim]{what}[/dim]' if what else ''}")


def _birds(root: Path, species: int, images: int, size: int, seed: int) -> tuple[BirdsSummary, Split]:
    """The birds, drawn or found, and their checked test split."""
    from calm.data import load_checked
    from calm_birds import write_birds

    birds = write_birds(root, species=species, images_per_species=images, size=size, seed=seed)
    if not birds.pairs[0]:
        raise CalmError(f"species={species}: no two of them differ in just one part; give 2 or more than 5")
    splits, _ = load_checked(root)
    return birds, splits["test"]


def _train(config: TrainConfig, folder: Path, console: Console) -> Run:
    from calm.report.found import read_run
    from calm.train import train
    from calm.train.folder import inspect

    if inspect(folder, config, flag="--out") == "finished":
        console.print(f"{folder} is finished already")
    else:
        train(config)
    return read_run(folder)


def _config(birds: BirdsSummary, folder: Path, method: str, epochs: int | None, seed: int) -> TrainConfig:
    """The preset, for this data; small sets get smaller batches."""
    from calm.train import preset

    config = preset(
        "birds", f"--data={birds.root}", f"--run_dir={folder}", f"--method={method}", f"--seed={seed}"
    )
    return replace(
        config,
        epochs=config.epochs if epochs is None else epochs,
        batch_size=min(config.batch_size, max(2, birds.train_images // 4)),
        reading=replace(config.reading, image_size=birds.config.size),
    )


def _measure(birds: BirdsSummary, test: Split, runs: list[Run], out: Path, console: Console) -> Study:
    from calm.report.story import measure

    with console.status("loading") as status:
        return measure(birds.root, test, runs[0], runs[1], out, status.update)


def _write(
    study: Study, birds: BirdsSummary, out: Path, epochs: int | None, times: dict[str, float | None]
) -> Path:
    from calm.report import write
    from calm.report.comparison import comparison_page

    run, config = study.calm_run, birds.config
    weights = sum(parameter.numel() for parameter in study.calm.parameters()) / 1e6
    known = {
        "Birds": f"{config.species} species, {birds.train_images} training pictures (some of them for validation),"
        f" {birds.test_images} test pictures, {config.size}×{config.size} pixels, seed {config.seed};"
        f" fingerprint of the training split {study.calm.training_summary['fingerprint'][:16]}",
        "Models": f"{run.config['backbone']}, {weights:.1f} million weights; preset “birds”, {run.config['epochs']}"
        f" epochs, batches of {run.config['batch_size']}, seed {run.config['seed']}; of each run the weights of the"
        " epoch with the best validation accuracy",
        "Time": ", ".join(
            f"{name} {'used again' if seconds is None else f'{seconds:.0f} s'}"
            for name, seconds in times.items()
        ),
    }
    page = comparison_page(
        study, command=_command(birds, out, epochs), known=known, base=out, seed=config.seed
    )
    return write(page, out / "report.html")


def _command(birds: BirdsSummary, out: Path, epochs: int | None) -> str:
    """The command line that makes the same report; options at their default are left out."""
    given = {
        "out": (out.name, "demo"),
        "species": (birds.config.species, 10),
        "images-per-species": (birds.config.images_per_species, 180),
        "size": (birds.config.size, 96),
        "epochs": (epochs, None),
        "seed": (birds.config.seed, 0),
    }
    return " ".join(
        ["calm demo", *(f"--{name} {value}" for name, (value, usual) in given.items() if value != usual)]
    )


def _summarise(console: Console, study: Study, report: Path, seconds: float) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("", "test accuracy", "nll", "calibration error", "peak in the part that differs"):
        table.add_column(heading, justify="right" if heading else "left")
    for run in (study.calm_run, study.cam_run):
        hit, test = study.pointing[run.label].figures["peak_in_part"].value, run.test
        table.add_row(
            run.label, f"{test['accuracy']:.1%}", f"{test['nll']:.3f}", f"{test['ece']:.3f}", f"{hit:.1%}"
        )
    console.print(table)
    console.print(f"all benchmarks: {report.parent / 'evaluation' / 'table.md'}", style="dim")
    console.print(f"\ndone in {seconds:.0f} s; open [bold]{report}[/bold] in a browser")
