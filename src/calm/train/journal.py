"""What a run tells: lines on the screen and in log.txt, a progress bar on a terminal, TensorBoard curves."""

from __future__ import annotations

import datetime
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

from calm.atomic import append_line
from calm.train.event_file import EventFile
from calm.train.module import TrainingModule

__all__ = ["ProgressBar", "RunLog", "TensorBoard"]


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
