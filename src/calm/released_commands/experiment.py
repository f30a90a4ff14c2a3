"""The folder of an experiment, ``save_root/experiment_name``, which training makes and the evaluations share.

::

    log.log                   what the commands printed
    last_checkpoint.pth.tar   the weights after the last epoch, for the released code too
    performance_log.pickle    figures by split and epoch; performance_log.json is the same
    reports/                  the same by epoch, one JSON object a file
    measure_PROCESS.pickle    remove-and-classify; .json is the same
    run/                      the run folder of this package's training

The figures that the released training keeps: loss and accuracy by split and epoch.

performance_log.json, after two epochs (loss in nats, accuracy ``cls`` in percent)::

    {"train": {"loss": {"current_value": 5.1, "value_per_epoch": [5.3, 5.1]}, "cls": {...}, "cue_1": ...},
     "val": {...}, "test": {...}}

The released pickle held objects of a class of its script, which nothing but that script can read; ours holds the same
names and values as plain dicts.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm.errors import CalmError
from calm.files import read_columns, read_json, write_bytes, write_json, write_text
from calm.released import FILE_NAME
from calm.released_commands.flags import Flags

__all__ = [
    "METRICS",
    "OWN_NAMES",
    "SPLITS",
    "Performance",
    "check_place",
    "clear",
    "finished",
    "save_measures",
]


SPLITS = ("train", "val", "test")
METRICS = ("loss", "cls", "cue_1", "cue_2", "cue_3")


@dataclass
class Performance:
    """Values per epoch, by split and metric; for test one value. Most are empty, as in the released code."""

    values: dict[str, dict[str, list[float]]]

    @classmethod
    def of_run(cls, run_dir: Path) -> Performance:
        """The figures of a finished run; those of test are of the last epoch's weights."""
        history = read_columns(run_dir / "metrics.csv", need=("train_loss", "train_accuracy", "val_accuracy"))
        result = read_json(run_dir / "result.json")
        values = _empty()
        values["train"]["loss"] = history["train_loss"]
        values["train"]["cls"] = [100 * value for value in history["train_accuracy"]]
        values["val"]["cls"] = [100 * value for value in history["val_accuracy"]]
        values["test"]["cls"] = [100 * result["last"]["test"]["accuracy"]]
        return cls(values)

    @classmethod
    def read(cls, folder: Path) -> Performance:
        """What an experiment's folder holds already; nothing if there is no file.

        Raises:
            CalmError: the file is damaged.
        """
        path, values = folder / "performance_log.json", _empty()
        if path.is_file():
            try:
                for split, metrics in read_json(path).items():
                    values[split] |= {metric: meter["value_per_epoch"] for metric, meter in metrics.items()}
            except (AttributeError, KeyError, TypeError) as error:
                raise CalmError(f"{path} is not the log that training writes: delete it") from error
        return cls(values)

    def save(self, folder: Path) -> None:
        """Write performance_log and reports/: a file a training epoch, and its name with ``_`` for what follows."""
        meters = {
            split: {
                metric: {"current_value": values[-1] if values else None, "value_per_epoch": values}
                for metric, values in metrics.items()
            }
            for split, metrics in self.values.items()
        }
        save_measures(folder / "performance_log", meters)
        epochs = len(self.values["train"]["loss"])
        for epoch in range(1, epochs + 1):
            for suffix, split, metrics in (("", "train", ("cls", "loss")), ("_", "val", METRICS)):
                _report(folder, epoch, suffix, {f"{split}/{m}": self._at(split, m, epoch) for m in metrics})
        last = {f"test/{metric}": self._at("test", metric, 1) for metric in METRICS}
        _report(folder, epochs, "__", last)

    def epoch_lines(self) -> list[str]:
        """For each epoch what the released code prints after it."""
        lines = []
        for epoch in range(1, len(self.values["train"]["loss"]) + 1):
            lines.append(f"Start epoch {epoch} ...")
            for split in ("train", "val"):
                lines += [
                    f"Split {split}, metric {metric}: {value}"
                    for metric in METRICS
                    if (value := self._at(split, metric, epoch)) is not None
                ]
            lines.append(f"Epoch {epoch} done.")
        return lines

    def last_lines(self) -> str:
        """The current figure of each split and metric, as the released code's last lines."""
        return "\n".join(
            f"Split {split}, metric {metric}: {values[-1]}"
            for split, metrics in self.values.items()
            for metric, values in metrics.items()
            if values
        )

    def _at(self, split: str, metric: str, epoch: int) -> float | None:
        values = self.values[split][metric]
        return values[epoch - 1] if epoch <= len(values) else None


def _empty() -> dict[str, dict[str, list[float]]]:
    return {split: {metric: [] for metric in METRICS} for split in SPLITS}


def _report(folder: Path, epoch: int, suffix: str, values: dict[str, Any]) -> None:
    content = {"summary": True, "step": epoch, **values}
    write_text(folder / "reports" / f"{epoch}{suffix}", json.dumps(content))


OWN_NAMES = (
    "log.log",
    FILE_NAME,
    "performance_log.*",
    "reports",
    "measure_*",
    "cue_*",
    "run",
    "start",
    "proxy",
)
"""What the commands write into an experiment's folder, as patterns; nothing else is ever deleted."""


def check_place(flags: Flags) -> None:
    """See that the experiment's folder is one folder below ``--save_root``.

    Raises:
        CalmError: it is not, or a file is in its place.
    """
    root, folder = Path(flags.save_root).resolve(), flags.folder.resolve()
    if root not in folder.parents:
        raise CalmError(
            f"--experiment_name={flags.experiment_name!r} is no folder below --save_root={flags.save_root!r}: "
            "give a plain name"
        )
    if folder.exists() and not folder.is_dir():
        raise CalmError(f"{flags.folder} is a file: choose another --experiment_name")


def finished(flags: Flags) -> bool:
    """Whether the folder holds a training that came to its end."""
    return (flags.folder / FILE_NAME).is_file()


def clear(flags: Flags) -> None:
    """Delete a former experiment for ``--override_cache=True``, if nothing but that is lost.

    Raises:
        CalmError: the folder holds the checkpoint that is to be loaded, or files that no command wrote. Nothing was
            deleted then.
    """
    folder = flags.folder
    if not folder.is_dir():
        return
    if flags.use_load_checkpoint:
        source = folder if flags.load_checkpoint is None else Path(flags.load_checkpoint)
        if folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise CalmError(
                f"--override_cache=True would delete {folder} with the checkpoint in it that is to be loaded: "
                "choose another --experiment_name"
            )
    foreign = [path.name for path in folder.iterdir() if not any(map(path.match, OWN_NAMES))]
    if foreign or folder.is_symlink():
        what = "is a link" if folder.is_symlink() else f"holds {sorted(foreign)[0]!r}, which no command wrote"
        raise CalmError(f"--override_cache=True does not delete {folder}: it {what}. Move it away yourself")
    shutil.rmtree(folder)


def save_measures(path: Path, measures: Any) -> None:
    """Write plain values to ``path``.pickle, as the released code does, and to ``path``.json, where NaN is null."""
    write_bytes(path.with_name(f"{path.name}.pickle"), pickle.dumps(measures))
    write_json(path.with_name(f"{path.name}.json"), _without_nan(measures))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and math.isnan(value) else value
