"""The end of a run: the saved weights on the test images, and what result.json says.

::

    {"last": {"epoch": 30, "val": {"accuracy": 0.731, "nll": 1.02, "ece": 0.05}, "test": {...}}, "best": {...},
     "train": {"loss": ..., "accuracy": ...}, "images_per_second": 181.5, "seconds": 1490.2}
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import safetensors.torch

from calm.checkpoint import WEIGHTS
from calm.train.checkpoints import Checkpoints
from calm.train.data import RunData
from calm.train.history import History
from calm.train.module import TrainingModule

__all__ = ["closing_line", "measure_outcome"]


def measure_outcome(
    trainer: pl.Trainer, module: TrainingModule, data: RunData, history: History, checkpoints: Checkpoints
) -> dict[str, Any]:
    """Test the last and the best weights, as they were saved; every process takes part."""
    trainer.strategy.barrier()  # the first process may still be writing what the others are about to read
    best, last = checkpoints.best, checkpoints.last
    result: dict[str, Any] = {}
    for name, measures in {"last": last, "best": best}.items():
        validation = {key: value for key, value in measures.items() if key != "epoch"}
        result[name] = {"epoch": int(measures["epoch"]), "val": validation}
        if name == "best" and best["epoch"] == last["epoch"]:
            result[name]["test"] = result["last"]["test"]
            continue
        weights = safetensors.torch.load_file(checkpoints.run_dir / name / WEIGHTS)
        module.evaluated.load_state_dict(weights)
        trainer.test(module, datamodule=data, verbose=False)
        result[name]["test"] = module.test
    final = history.rows[-1]
    result["train"] = {"loss": final["train_loss"], "accuracy": final["train_accuracy"]}
    result["images_per_second"] = statistics.median(row["images_per_second"] for row in history.rows)
    result["seconds"] = round(sum(row["seconds"] for row in history.rows), 1)
    return result


def closing_line(result: dict[str, Any], run_dir: Path) -> str:
    """The result in words."""
    lines = []
    for name in ("best", "last"):
        val, test = result[name]["val"], result[name]["test"]
        lines.append(
            f"{name} (epoch {result[name]['epoch']}): validation accuracy {100 * val['accuracy']:.1f} %, test accuracy"
            f" {100 * test['accuracy']:.1f} %, nll {test['nll']:.3f}, calibration error {test['ece']:.3f}"
        )
    return "\n".join([*lines, f"done in {result['seconds']:.0f} s of training: {run_dir}"])
