"""One row of numbers per epoch: metrics.csv, TensorBoard, a line on the screen.

A row, with the columns of a CALM-EM run::

    epoch,step,seconds,images_per_second,lr,temperature,train_loss,train_accuracy,prior_entropy,...,val_accuracy,...
    1,140,48.1,186.5,0.0021,1.0,2.731,0.188,3.92,0.943,3.20,0.770,0.0,0.241,0.602,2.51,0.031

``lr`` is the backbone's rate of the epoch's last step. Accuracies run from 0 to 1, entropies and nll are in nats.
"""

from __future__ import annotations

import csv
import io
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from calm.atomic import write_text
from calm.train.journal import RunLog, TensorBoard, synchronize
from calm.train.module import TrainingModule

__all__ = ["History"]

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
