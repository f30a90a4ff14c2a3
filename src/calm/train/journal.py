"""What a run tells: lines on the screen and in log.txt, a progress bar on a terminal, TensorBoard curves.

A file of events for TensorBoard, written where it is asked to: `SummaryWriter` does it in a thread of its own, which
ends with a traceback, and a message without a file name, when the disk is full.

One row of numbers per epoch: metrics.csv, TensorBoard, a line on the screen.

A row, with the columns of a CALM-EM run::

    epoch,step,seconds,images_per_second,lr,temperature,train_loss,train_accuracy,prior_entropy,...,val_accuracy,...
    1,140,48.1,186.5,0.0021,1.0,2.731,0.188,3.92,0.943,3.20,0.770,0.0,0.241,0.602,2.51,0.031

``lr`` is the backbone's rate of the epoch's last step. Accuracies run from 0 to 1, entropies and nll are in nats.
"""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from calm.files import append_line, disk_errors_about, write_text
from calm.train.module import TrainingModule

__all__ = ["EventFile", "History", "ProgressBar", "RunLog", "TensorBoard"]


class EventFile:
    """A new file that grows.

    Args:
        folder: made if it is missing.
        purge_step: events of other files from this step on are hidden; None: none are.

    Raises:
        OSError: from every method, the disk is full: the file is its file name.
    """

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

        name = f"events.out.tfevents.{time.time_ns()}.{platform.node()}.{os.getpid()}"
        self.path = folder / name
        with disk_errors_about(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""
        from torch.utils.tensorboard.summary import scalar

        self._write(step=step, summary=scalar(name, value))  # type: ignore[no-untyped-call]

    def image(self, name: str, pixels: Tensor, step: int) -> None:
        """A picture, uint8 RGB, (H, W, 3)."""
        from torch.utils.tensorboard.summary import image

        self._write(step=step, summary=image(name, pixels, dataformats="HWC"))  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Make what was written visible."""
        with disk_errors_about(self.path):
            self._records.flush()

    def close(self) -> None:
        """No more events."""
        with disk_errors_about(self.path):
            self._records.close()

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        with disk_errors_about(self.path):
            self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


Row = dict[str, float]


class History(pl.Callback):
    """Collects the rows; keeps them in the checkpoint, so that a resumed run has one gapless table.

    Args:
        path: metrics.csv, rewritten after each epoch.
        say: for the line of each epoch.
        board: for the curves.
    """

    def __init__(self, path: Path, say: RunLog, board: TensorBoard) -> None:
        self.path, self.say, self.board = path, say, board
        self.rows: list[Row] = []
        self._start = self._seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock: training is over, validation is not counted."""
        synchronize(pl_module.device)
        self._seconds = time.monotonic() - self._start

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum up the epoch; every process must come here, one of them writes."""
        assert isinstance(pl_module, TrainingModule)
        step, run = trainer.global_step, pl_module.run
        images = run.steps_per_epoch * pl_module.config.batch_size
        row: Row = {
            "epoch": trainer.current_epoch + 1,
            "step": step,
            "seconds": round(self._seconds, 3),
            "images_per_second": round(images / self._seconds, 1),
            "lr": pl_module.backbone_learning_rate(),
        }
        if pl_module.config.method == "calm-em":
            row["temperature"] = pl_module.temperature(step - 1)
        row |= pl_module.training_measures.compute()
        row |= {f"val_{name}": value for name, value in pl_module.validation.items()}
        self.rows.append(row)
        if trainer.is_global_zero:
            self.write()
            self.say(epoch_line(row, int(trainer.max_epochs or 0)))
            self.board.scalars(
                {f"epoch/{name}": row[name] for name in row if name not in ("epoch", "step")}, step - 1
            )
            self.board.flush()

    def write(self) -> None:
        """Write metrics.csv anew."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(self.rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """The rows so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after these rows."""
        self.rows = list(state_dict["rows"])


def epoch_line(row: Row, epochs: int) -> str:
    """The row in words, on one line."""
    parts = [
        f"epoch {row['epoch']:>{len(str(epochs))}.0f}/{epochs}",
        f"loss {row['train_loss']:.3f}",
        f"train {100 * row['train_accuracy']:.1f} %",
        f"val {100 * row['val_accuracy']:.1f} %",
        f"nll {row['val_nll']:.3f}",
    ]
    if "prior_entropy_relative" in row:
        parts.append(f"prior entropy {row['prior_entropy_relative']:.2f} of uniform")
    if row.get("dead_prior"):
        parts.append(f"dead priors {100 * row['dead_prior']:.1f} %")
    parts.append(f"{row['images_per_second']:.0f} images/s")
    return "  ".join(parts)


class RunLog:
    """Prints lines and appends them, with the time, to a file.

    Args:
        path: the file; None: print only (processes other than the first print nothing either, with ``quiet``).
        quiet: do not print.
    """

    def __init__(self, path: Path | None, *, quiet: bool = False) -> None:
        self.path = path
        self.console = Console(quiet=quiet, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def __call__(self, text: str) -> None:
        """Say a line."""
        self.console.print(text)
        if self.path is not None:
            now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%SZ")
            append_line(self.path, f"{now}  {text}")


class ProgressBar(pl.Callback):
    """Loss, accuracy and images per second of the running epoch. Shows nothing where there is no terminal.

    Args:
        console: where to draw; lines printed to it appear above the bar.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._images, self._start = 0, 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar."""
        if trainer.is_global_zero and self.console.is_terminal and not self.console.quiet:
            text = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._progress = Progress(
                *text, TextColumn("{task.fields[values]}"), console=self.console, transient=True
            )
            self._task = self._progress.add_task("", values="", total=None)
            self._progress.start()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start over."""
        self._images, self._start = 0, time.monotonic()
        if self._progress is not None:
            name = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
            self._progress.reset(self._task, total=trainer.num_training_batches, description=name, values="")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance; the values are those that the module last looked at, so that nothing waits for the device."""
        if self._progress is None:
            return
        assert isinstance(pl_module, TrainingModule)
        self._images += len(batch[0]) * trainer.world_size
        speed = self._images / max(1e-9, time.monotonic() - self._start)
        shown = pl_module.shown
        values = f"loss {shown['loss']:.3f}  accuracy {100 * shown['accuracy']:.1f} %  {speed:.0f} images/s"
        self._progress.update(self._task, advance=1, values=values)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what is going on."""
        if self._progress is not None:
            self._progress.update(self._task, values="validation")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the bar, so that the message stands alone."""
        self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class TensorBoard(pl.Callback):
    """Curves and pictures for TensorBoard; opened by the first process only.

    Args:
        folder: where the event files go. Events that a killed run wrote past its last checkpoint are hidden.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: EventFile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the event file."""
        if trainer.is_global_zero:
            self._file = EventFile(self.folder, trainer.global_step or None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write loss and learning rates of the steps that are looked at."""
        assert isinstance(pl_module, TrainingModule)
        step = trainer.global_step - 1
        if self._file is not None and step % pl_module.config.log.every_n_steps == 0:
            rates = {f"lr/{name}": value for name, value in pl_module.learning_rates().items()}
            self.scalars({"step/loss": pl_module.shown["loss"], **rates}, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers by name."""
        if self._file is not None:
            for name, value in values.items():
                self._file.scalar(name, value, step)

    def image(self, name: str, pixels: Tensor, step: int) -> None:
        """Write a uint8 RGB picture (H, W, 3)."""
        if self._file is not None:
            self._file.image(name, pixels, step)

    def flush(self) -> None:
        """Make what was written visible."""
        if self._file is not None:
            self._file.flush()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the event file."""
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Close the event file."""
        with suppress(OSError):  # the disk may be full, which is being told already
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
