"""The folder of an experiment, ``save_root/experiment_name``, which training makes and the evaluations share.

::

    log.log                   what the commands printed
    last_checkpoint.pth.tar   the weights after the last epoch, for the released code too
    performance_log.pickle    loss (nats) and accuracy ``cls`` (percent) by split and epoch; .json is the same
    reports/                  the same by epoch, one JSON object per file
    measure_PROCESS.pickle    remove-and-classify; .json is the same
    cue_PROCESS.pickle        cue localization; .json is the same
    run/                      the run folder of this package's training

performance_log.json, after two epochs::

    {"train": {"loss": {"current_value": 5.1, "value_per_epoch": [5.3, 5.1]}, "cls": {...}, "cue_1": ...},
     "val": {...}, "test": {...}}

The released pickle holds objects of a class of its script, which nothing but that script can read; ours holds the same
names and values as plain dicts.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calm.data.records import SPLITS
from calm.errors import CalmError
from calm.files import read_columns, read_json, write_bytes, write_json
from calm.released import FILE_NAME
from calm.released_commands.flags import Flags

METRICS = ("loss", "cls", "cue_1", "cue_2", "cue_3")

WRITTEN = ("log.log", FILE_NAME, "performance_log.*", "reports", "measure_*", "cue_*", "run", "start", "proxy")
"""Patterns of what the commands write into an experiment's folder. Nothing else is ever deleted."""


@dataclass
class Performance:
    """Values per epoch by split and metric; for test one value. Most are empty, as in the released code."""

    values: dict[str, dict[str, list[float]]] = field(
        default_factory=lambda: {split: {metric: [] for metric in METRICS} for split in SPLITS}
    )

    @classmethod
    def of_run(cls, run_dir: Path) -> Performance:
        """Return the figures of a finished run; those of test are of the last epoch's weights."""
        columns = read_columns(run_dir / "metrics.csv", need=("train_loss", "train_accuracy", "val_accuracy"))
        test = read_json(run_dir / "result.json")["last"]["test"]
        performance = cls()
        performance.values["train"]["loss"] = columns["train_loss"]
        for split in ("train", "val"):
            performance.values[split]["cls"] = [100 * value for value in columns[f"{split}_accuracy"]]
        performance.values["test"]["cls"] = [100 * test["accuracy"]]
        return performance

    @classmethod
    def read(cls, folder: Path) -> Performance:
        """Return what an experiment's folder holds already, if anything; a `CalmError` if it is damaged."""
        path, performance = folder / "performance_log.json", cls()
        if path.is_file():
            try:
                for split, metrics in read_json(path).items():
                    performance.values[split] |= {name: meter["value_per_epoch"] for name, meter in metrics.items()}
            except (AttributeError, KeyError, TypeError) as error:
                raise CalmError(f"{path} is not the log that training writes: delete it") from error
        return performance

    def save(self, folder: Path) -> None:
        """Write performance_log and reports/: N is of training epoch N, and N_ and N__ are of val and test after it."""
        meters: dict[str, Any] = {split: {} for split in self.values}
        for split, metrics in self.values.items():
            for metric, values in metrics.items():
                current = values[-1] if values else None
                meters[split][metric] = {"current_value": current, "value_per_epoch": values}
        save_measures(folder / "performance_log", meters)

        def report(name: str, step: int, split: str, epoch: int, metrics: Iterable[str] = METRICS) -> None:
            values = {f"{split}/{metric}": self._at(split, metric, epoch) for metric in metrics}
            write_json(folder / "reports" / name, {"summary": True, "step": step, **values})

        epochs = len(self.values["train"]["loss"])
        for epoch in range(1, epochs + 1):
            report(f"{epoch}", epoch, "train", epoch, ("cls", "loss"))
            report(f"{epoch}_", epoch, "val", epoch)
        report(f"{epochs}__", epochs, "test", 1)

    def _at(self, split: str, metric: str, epoch: int) -> float | None:
        values = self.values[split][metric]
        return values[epoch - 1] if epoch <= len(values) else None

    def epoch_lines(self) -> list[str]:
        """Return what the released code prints after each epoch."""
        lines = []
        for epoch in range(1, len(self.values["train"]["loss"]) + 1):
            values = {(split, m): self._at(split, m, epoch) for split in ("train", "val") for m in METRICS}
            lines.append(f"Start epoch {epoch} ...")
            lines += [f"Split {s}, metric {m}: {v}" for (s, m), v in values.items() if v is not None]
            lines.append(f"Epoch {epoch} done.")
        return lines

    def last_lines(self) -> str:
        """Return the last value of each split and metric, as the released code prints them at the end."""
        values = {(split, m): v for split, metrics in self.values.items() for m, v in metrics.items()}
        return "\n".join(f"Split {split}, metric {m}: {v[-1]}" for (split, m), v in values.items() if v)


def check_place(flags: Flags) -> None:
    """Check that the experiment's folder is below ``--save_root``, and no file in its place."""
    name, root = flags.experiment_name, flags.save_root
    if Path(root).resolve() not in flags.folder.resolve().parents:
        raise CalmError(f"--experiment_name={name!r} is no folder below --save_root={root!r}: give a plain name")
    if flags.folder.exists() and not flags.folder.is_dir():
        raise CalmError(f"{flags.folder} is a file: choose another --experiment_name")


def finished(flags: Flags) -> bool:
    """Return whether the experiment's folder holds a complete training."""
    return (flags.folder / FILE_NAME).is_file()


def clear(flags: Flags) -> None:
    """Delete a former experiment for ``--override_cache=True``.

    Raises:
        CalmError: before anything is deleted, if the folder holds the checkpoint to load, or files of others.
    """
    folder = flags.folder
    if not folder.is_dir():
        return
    if flags.use_load_checkpoint:
        source = Path(flags.load_checkpoint or folder).resolve()
        if folder.resolve() in (source, *source.parents):
            raise CalmError(
                f"--override_cache=True would delete {folder} with the checkpoint in it that is to be loaded: "
                "choose another --experiment_name"
            )
    foreign = sorted(path.name for path in folder.iterdir() if not any(map(path.match, WRITTEN)))
    if foreign or folder.is_symlink():
        problem = "is a link" if folder.is_symlink() else f"holds {foreign[0]!r}, which no command wrote"
        raise CalmError(f"--override_cache=True does not delete {folder}: it {problem}. Move it away yourself")
    shutil.rmtree(folder)


def save_measures(path: Path, measures: Any) -> None:
    """Write plain values to ``path``.pickle, as the released code does, and to ``path``.json, where NaN is null."""
    write_bytes(path.with_name(f"{path.name}.pickle"), pickle.dumps(measures))
    write_json(path.with_name(f"{path.name}.json"), measures)
