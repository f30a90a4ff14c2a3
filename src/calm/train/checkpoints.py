"""Last and best checkpoints: written whole or not at all, after every epoch.

``checkpoints/last.ckpt`` holds everything that continuing needs. ``last/`` and ``best/`` are saved models for
`calm.load`: the weights that were evaluated (the average, if there is one). Best is the highest validation accuracy;
of equal ones the lower nll; of equal ones the earlier.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from calm.errors import CalmError
from calm.files import atomic_path, read_torch
from calm.train.module import TrainingModule

__all__ = ["AtomicCheckpointIO", "Checkpoints"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name, to the disk, and renames it: a kill leaves the former one.

    (Lightning's own goes through the system's temporary folder, which may be another file system, where a rename
    becomes a copy.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write ``checkpoint`` to ``path``."""
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote; nothing in it is run, whatever ``weights_only`` says.

        Raises:
            CalmError: the file is damaged, or no checkpoint of a training run.
        """
        found = read_torch(Path(path), "checkpoint", map_location=map_location)
        lacking = [name for name in _PARTS if not isinstance(found, dict) or name not in found]
        if lacking:
            raise CalmError(f"{path} is no checkpoint of a training run: it lacks {', '.join(lacking)}")
        checkpoint: dict[str, Any] = found
        return checkpoint


_PARTS = ("state_dict", "epoch", "global_step", "loops", "callbacks", "optimizer_states", "lr_schedulers")


class Checkpoints(Checkpoint):
    """Saves after each epoch. Lightning calls it after all other callbacks, so that their state is up to date.

    Args:
        run_dir: the run folder.
        say: tells the user something.

    Attributes:
        last: epoch (from 1) and validation measures of the last epoch done; empty before the first.
        best: the same of the best epoch.
        saved: epochs in the checkpoint.
        restored: whether all that was saved is back, and training goes on.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]) -> None:
        self.run_dir, self.say = run_dir, say
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.saved = 0
        self.restored = False

    @property
    def path(self) -> Path:
        """The checkpoint that a killed run continues from."""
        return self.run_dir / "checkpoints" / "last.ckpt"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """On resume write the saved models again: the kill may have come between them and the checkpoint."""
        if self.last and trainer.is_global_zero:
            self._export(pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing is left to be restored."""
        self.restored = True

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save the epoch; every process must come here."""
        assert isinstance(pl_module, TrainingModule)
        self.last = {"epoch": trainer.current_epoch + 1, **pl_module.validation}
        if not self.best or _rank(self.last) > _rank(self.best):
            self.best = self.last
        trainer.save_checkpoint(self.path)
        self.saved = trainer.current_epoch + 1
        if trainer.is_global_zero:
            self._export(pl_module)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Say what an interruption means."""
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.is_global_zero:
            ahead = (
                f"continues after epoch {self.saved}" if self.saved else "starts again: no epoch was finished"
            )
            self.say(f"interrupted: the same command {ahead}")

    def _export(self, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        model = pl_module.evaluated
        model.training_summary = {**model.training_summary, "validation": self.last}
        model.save_pretrained(self.run_dir / "last")
        if self.best["epoch"] == self.last["epoch"]:
            model.save_pretrained(self.run_dir / "best")
            _copy(self.path, self.path.with_name("best.ckpt"))

    def state_dict(self) -> dict[str, Any]:
        """The last and the best epoch so far."""
        return {"last": self.last, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.last, self.best = dict(state_dict["last"]), dict(state_dict["best"])
        self.saved = int(self.last.get("epoch", 0))


def _rank(measures: dict[str, float]) -> tuple[float, float]:
    return measures["accuracy"], -measures["nll"]


def _copy(source: Path, target: Path) -> None:
    """Give the file a second name, atomically. It is replaced, never written in place: sharing its bytes is safe."""
    with atomic_path(target) as temporary:
        temporary.unlink()
        try:
            temporary.hardlink_to(source)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
