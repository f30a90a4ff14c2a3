"""What a run reports: lines on the screen and in log.txt, a progress bar, metrics.csv, loggers, and drawn maps.

A row of metrics.csv, with the columns of a CALM-EM run::

    epoch,step,seconds,images_per_second,lr,temperature,train_loss,train_accuracy,prior_entropy,...,val_accuracy,...
    1,140,48.1,186.5,0.0021,1.0,2.731,0.188,3.92,0.943,3.20,0.770,0.0,0.241,0.602,2.51,0.031

``lr`` is the backbone's highest rate in the epoch's last step, or the head's where the backbone is not trained.
Accuracies run from 0 to 1, entropies and nll are in nats.
"""

from __future__ import annotations

import datetime
import hashlib
import inspect
import os
import platform
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import Logger
from rich.console import Console
from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
from torch import Tensor
from torch.utils.tensorboard import summary

from calm.backbones import grid_size
from calm.config import parse_code
from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.errors import CalmError, unknown
from calm.files import append_line, disk_errors_about, write_text
from calm.heatmaps import Normalization
from calm.inference import evaluation_mode
from calm.model import CalmModel
from calm.output import CalmOutput
from calm.render import Picture, Tile, overlay, panel
from calm.train.checkpoints import Row
from calm.train.config import IMBALANCE, TrainConfig


class RunLog:
    """Print lines unless ``quiet``, and append them with the time to the file ``path`` if there is one."""

    def __init__(self, path: Path | None = None, *, quiet: bool = False) -> None:
        self.path, self.started = path, time.monotonic()
        self.console = Console(quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def __call__(self, text: str) -> None:
        """Print and append a line."""
        self.console.print(text)
        if self.path is not None:
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
            append_line(self.path, f"{now}  {text}")

    @property
    def interactive(self) -> bool:
        """Whether a progress bar can be drawn."""
        return self.console.is_terminal and not self.console.quiet


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write metrics.csv anew, so that a resumed run has one table without gaps."""
    lines = [rows[0], *(row.values() for row in rows)]
    write_text(path, "".join(f"{','.join(map(str, line))}\n" for line in lines))


def epoch_line(row: Row, epochs: int) -> str:
    """Return the row of an epoch in words, on one line."""
    line = f"epoch {row['epoch']:>{len(str(epochs))}.0f}/{epochs}  loss {row['train_loss']:.3f}"
    line += f"  train {100 * row['train_accuracy']:.1f} %"
    line += f"  val {100 * row['val_accuracy']:.1f} %  nll {row['val_nll']:.3f}"
    if "prior_entropy_relative" in row:
        line += f"  prior entropy {row['prior_entropy_relative']:.2f} of uniform"
    if row.get("dead_prior"):
        line += f"  dead priors {100 * row['dead_prior']:.1f} %"
    return f"{line}  {row['images_per_second']:.0f} images/s"


def imbalance_line(split: Split, balance: bool) -> str:
    """Return a line about the numbers of training images of the classes, if they differ much; else nothing."""
    counts = sorted((count, name) for count, name in zip(split.class_counts(), split.class_names, strict=True) if count)
    (least, rarest), (most, commonest) = counts[0], counts[-1]
    if most < IMBALANCE * least:
        return ""
    how = "drawn equally often" if balance else "--reading.balance true draws all classes equally often"
    return f"the classes have {least:,} ({rarest}) to {most:,} ({commonest}) training images: {how}"


def duration(seconds: float) -> str:
    """Return a time for people.

    >>> [duration(seconds) for seconds in (4, 119, 121, 4000)]
    ['4 s', '119 s', '2 min', '1 h 7 min']
    """
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def grid_line(model: CalmModel) -> str:
    """Return a line about the model's grid, if it can be known before a forward pass; else nothing."""
    height, width = model.preprocessing.size
    if (grid := grid_size(model.backbone, (height, width), model.config.in_channels)) is None:
        return ""
    cells = f"maps have {grid[0]}x{grid[1]} cells for images of {height}x{width} pixels"
    return f"{cells}; a larger --reading.image_size makes a finer grid"


def closing_lines(
    result: Mapping[str, Any], run_dir: Path, config: TrainConfig, validated: int, seconds: float, trained: float
) -> str:
    """Return what came out of a run, how long it took, and the commands that go on from here.

    Args:
        result: what result.json says.
        run_dir: the run's folder.
        config: its configuration; the commands trust the code that it names for the backbone.
        validated: the number of validation images.
        seconds: since the run was started, or continued.
        trained: seconds of the epochs since then.
    """
    lines = []
    abouts = {"best": f"chosen by {validated:,} validation images; --model and calm.load take it", "last": "in last/"}
    for name, about in abouts.items():
        epoch, val, test = (result[name][key] for key in ("epoch", "val", "test"))
        figures = f"validation accuracy {100 * val['accuracy']:.1f} %, test accuracy {100 * test['accuracy']:.1f} %"
        figures += f", nll {test['nll']:.3f}, calibration error {test['ece']:.3f}"
        lines.append(f"{name} (epoch {epoch}, {about}): {figures}")
    spent = f"{duration(seconds)}, {duration(trained)} of them for training"
    whole = f" ({duration(result['seconds'])} with the epochs before)" if result["seconds"] - trained > 1 else ""
    lines.append(f"done in {spent}{whole}: {run_dir}")
    if config.backbone != "custom":  # a module that no command can build
        run, data = shlex.quote(str(run_dir)), shlex.quote(str(config.data))
        calm = f"calm --trust {shlex.quote(config.backbone)}" if parse_code(config.backbone) else "calm"
        lines.append(f"next: {calm} attribute --model {run} IMAGE.jpg   # overlays of its maps")
        lines.append(f"      {calm} evaluate all --model {run} --data {data}   # benchmarks")
        lines.append(f"      {calm} report {run}   # all of it on one page")
    return "\n".join(lines)


class TensorBoardLogger(Logger):
    """Curves and pictures for TensorBoard, in a new event file of the folder ``tensorboard`` in ``save_dir``.

    Lightning's own logger writes in a thread, which ends with a traceback, and a message without a file name, when the
    disk is full. This one writes when it is called, and raises an OSError about the event file.

    Args:
        save_dir: the run folder.
        purge_step: points of earlier event files from this step on are hidden, as a killed run may have written them
            after its last checkpoint.
    """

    name, version = "tensorboard", None

    def __init__(self, save_dir: Path, purge_step: int | None = None) -> None:
        folder = Path(save_dir) / self.name
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        with disk_errors_about(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._records = RecordWriter(self.path.open("xb"))
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Write nothing: config.yaml is in the run folder."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write a point of each curve."""
        for name, value in metrics.items():
            self._write(step=step, summary=summary.scalar(name, value))  # type: ignore[no-untyped-call]

    def log_image(self, key: str, images: Sequence[Picture], step: int | None = None) -> None:
        """Write pictures, uint8 RGB (H, W, 3)."""
        for pixels in images:
            picture = summary.image(key, torch.from_numpy(pixels), dataformats="HWC")  # type: ignore[no-untyped-call]
            self._write(step=step, summary=picture)

    def save(self) -> None:
        """Make what was written visible to readers."""
        with disk_errors_about(self.path):
            self._records.flush()

    def finalize(self, status: str) -> None:
        """Close the file."""
        with disk_errors_about(self.path):
            self._records.close()

    def _write(self, **fields: Any) -> None:
        with disk_errors_about(self.path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


def caution_line(model: CalmModel, config: TrainConfig) -> str:
    """Return `CalmModel.caution`; of flat maps with what may help, of what the run's settings have."""
    if not model.flat:
        return model.caution and f"note: {model.caution}"
    loss, exponent = config.loss, config.loss.pooling_exponent
    exponent = config.model.pooling_exponent if exponent is None else exponent
    tries = ["a pooling exponent above 0 in the loss (1 is CALM)"] if exponent == 0 else []
    if config.method == "calm-em" and exponent and loss.temperature != 1.0:
        tries.append("--loss.temperature 1.0 (below 1 spreads)")
    if loss.prior_weight:
        tries.append("a smaller --loss.prior_weight")
    return f"warning: {model.caution}. Try {', '.join([*tries, 'more epochs'])} or larger images"


def logger_class(name: str) -> type[Logger]:
    """Return the class of a logger by its name; `calm.train.config.LogOptions` says which there are.

    Raises:
        CalmError: there is no such class, or it is no logger.
    """
    from lightning.pytorch import loggers  # slow

    classes = {known.removesuffix("Logger").lower(): getattr(loggers, known) for known in loggers.__all__}
    classes = {short: known for short, known in classes.items() if short} | {"tensorboard": TensorBoardLogger}
    module, _, attribute = name.rpartition(".")
    short = name.removesuffix("Logger").lower()
    if not module and short not in classes:
        raise unknown("logger", name, [*classes, "or an import path"], where="log.loggers")
    try:
        found = getattr(import_module(module), attribute) if module else classes[short]
    except (ImportError, AttributeError) as error:
        raise CalmError(f"log.loggers: cannot import {name}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Logger)):
        raise CalmError(f"log.loggers: {name} is no subclass of lightning.fabric.loggers.Logger")
    return found


@contextmanager
def open_loggers(
    names: Iterable[str], run_dir: Path, step: int = 0, more: Iterable[Logger] = ()
) -> Iterator[list[Logger]]:
    """Open loggers for a run; at the end of the block they and ``more`` are finalized.

    Args:
        names: see `logger_class`.
        run_dir: where they write, as far as they write files; the run's name is the folder's.
        step: optimiser steps that the run has done already, if it is continued.
        more: loggers that were made already.

    Raises:
        CalmError: see `logger_class`; or a logger's package is not installed.
    """
    options: dict[str, Any] = {
        "save_dir": run_dir,
        "root_dir": run_dir,
        "name": run_dir.name,
        "id": hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],  # wandb continues the run of this id
        "purge_step": step or None,
    }
    opened: list[Logger] = []
    for name in names:
        kind = logger_class(name)
        accepted = options.keys() & inspect.signature(kind).parameters.keys()
        try:
            opened.append(kind(**{option: options[option] for option in accepted}))
        except ModuleNotFoundError as error:
            raise CalmError(f"log.loggers: {name} needs a package that is not installed: {error}") from error
    every = [*opened, *more]
    try:
        yield every
    except BaseException:
        for logger in every:
            with suppress(OSError):  # the disk may be full, which is being reported already
                logger.finalize("failed")
        raise
    else:
        for logger in every:
            logger.finalize("success")
    finally:
        for logger in opened:  # a run of wandb would stay open, and the next training of this process write to it
            if finish := getattr(getattr(logger, "experiment", None), "finish", None):
                finish()


MAPS = {"calm": ("prior", "joint"), "cam": ("cam",)}
RIGHT, WRONG = (70, 160, 90), (200, 80, 70)


def choose_images(split: Split, count: int) -> list[int]:
    """Return indices of ``count`` images: the first of classes spread evenly over all, then the second, and so on."""
    members: dict[int, list[int]] = {}
    for index, record in enumerate(split.records):
        members.setdefault(record.label, []).append(index)
    labels = sorted(members)
    width = min(count, len(labels))
    spread = [labels[position * len(labels) // width] for position in range(width)]
    rounds = range(max(len(images) for images in members.values()))
    ordered = [members[label][turn] for turn in rounds for label in spread if turn < len(members[label])]
    return ordered[:count]


def draw_maps(model: CalmModel, dataset: ImageDataset, indices: Sequence[int], *, title: str = "") -> Picture:
    """Draw a column for each of the images ``indices`` of ``dataset``, with the true class's maps below it, under a
    title; the frame is green where the prediction is right. The model is left in its mode."""
    items = [dataset[index] for index in indices]
    images = torch.stack([image for image, _, _ in items]).to(model.device)
    labels = torch.tensor([label for _, label, _ in items], device=model.device)
    with evaluation_mode(model), torch.no_grad():
        output = model(images)
        kinds = MAPS["calm" if isinstance(output, CalmOutput) else "cam"]
        maps = {kind: output.attribute(labels, kind).float().cpu() for kind in kinds}
        probs = output.probs.cpu()
    levels = model.preprocessing.denormalize(images.float()).mul(255).round().byte()
    pixels = [model.preprocessing.picture(image) for image in levels.permute(0, 2, 3, 1).cpu().numpy()]
    how: Normalization = "minmax" if kinds == ("cam",) else "max"
    rows: list[Sequence[Tile]] = [
        [
            Tile(image, _caption(model.class_names, row, label), RIGHT if int(row.argmax()) == label else WRONG)
            for image, row, label in zip(pixels, probs, labels.tolist(), strict=True)
        ]
    ]
    for kind in kinds:
        overlays = [overlay(image, values, how=how) for image, values in zip(pixels, maps[kind], strict=True)]
        rows.append([Tile(image) for image in overlays])
    return panel(rows, title=title, labels=["", *kinds], cell=128)


def _caption(names: Sequence[str], probs: Tensor, label: int) -> str:
    guess = int(probs.argmax())
    truth = f"{names[label]}: {100 * float(probs[label]):.0f} %"
    return truth if guess == label else f"{truth}\n{names[guess]}: {100 * float(probs[guess]):.0f} %"
