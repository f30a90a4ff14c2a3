"""The figures that the released training keeps: loss and accuracy by split and epoch.

performance_log.json, after two epochs (loss in nats, accuracy ``cls`` in percent)::

    {"train": {"loss": {"current_value": 5.1, "value_per_epoch": [5.3, 5.1]}, "cls": {...}, "cue_1": ...},
     "val": {...}, "test": {...}}

The released pickle held objects of a class of its script, which nothing but that script can read; ours holds the same
names and values as plain dicts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calm.atomic import write_text
from calm.documents import read_columns, read_json
from calm.errors import CalmError
from calm.released_commands.experiment import save_measures

__all__ = ["METRICS", "SPLITS", "Performance"]

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
