"""State of a training run, and its checkpoints: written whole or not at all, after every epoch.

``checkpoints/last.ckpt`` holds everything that continuing needs. ``last/`` and ``best/`` are saved models for
`calm.load`: the weights that were evaluated (their average, if there is one). Best has the least validation nll of the
epochs whose accuracy is within one standard error of the highest so far: few images cannot tell such accuracies apart.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning.fabric.plugins import Precision
from torch.optim.lr_scheduler import LRScheduler

from calm.errors import CalmError
from calm.files import atomic_path, read_torch
from calm.model import CalmModel
from calm.train.config import RunLength, TrainConfig
from calm.train.optim import Average, build_optimizer, build_scheduler
from calm.train.wsol import SelfProducedGuidance

Row: TypeAlias = dict[str, float]
"""Numbers of an epoch by name: a row of metrics.csv, or the measures of a split."""

PARTS, NUMBERS = ("model", "optimizer", "scheduler", "precision"), ("epoch", "step", "history", "last", "best")
CHECKPOINT = Path("checkpoints", "last.ckpt")
"""The file of a run folder that the run continues from."""


@dataclass
class TrainingState:
    """Everything that a training run changes."""

    model: CalmModel  # the model that is trained
    averages: dict[str, Average]  # its moving averages: "teacher" of the E-step, "ema" to be evaluated and saved
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    precision: Precision  # Fabric's plugin, for the scale of float16 gradients
    guidance: SelfProducedGuidance | None = None  # the branches of SPG
    epoch: int = 0  # whole epochs done
    step: int = 0  # optimiser steps done
    rates: dict[str, float] = field(default_factory=dict)  # of each parameter group at the latest step
    history: list[Row] = field(default_factory=list)  # a row of metrics.csv per epoch
    last: Row = field(default_factory=dict)  # epoch (from 1) and validation measures of the last epoch
    best: Row = field(default_factory=dict)  # the same of the best epoch

    @classmethod
    def start(
        cls,
        model: CalmModel,
        config: TrainConfig,
        run: RunLength,
        precision: Precision,
        guidance: SelfProducedGuidance | None = None,
    ) -> TrainingState:
        """Return the state before the first step; the averages are on the model's device."""
        averages: dict[str, Average] = {}
        if config.loss.posterior == "ema":
            averages["teacher"] = Average(model, config.loss.teacher_decay)
        if config.optim.ema_decay:
            averages["ema"] = Average(model, config.optim.ema_decay)
        optimizer = build_optimizer(model, config.backbone, config.lr, config.optim, guidance)
        return cls(model, averages, optimizer, build_scheduler(optimizer, config.optim, run), precision, guidance)

    @property
    def evaluated(self) -> CalmModel:
        """The model that is evaluated and saved: the average of the weights if there is one."""
        model = self.averages["ema"].module if "ema" in self.averages else self.model
        assert isinstance(model, CalmModel)
        return model

    def finish_epoch(self, row: Row, validation: Row, images: int) -> None:
        """Count an epoch: its row of metrics.csv and its validation measures, which are of so many ``images``."""
        self.epoch += 1
        self.history.append(row)
        self.last = {"epoch": self.epoch, **validation}
        top = max(epoch["val_accuracy"] for epoch in self.history)
        least = top - math.sqrt(top * (1 - top) / images)
        if not self.best or (
            self.last["accuracy"] >= least and (self.best["accuracy"] < least or self.last["nll"] < self.best["nll"])
        ):
            self.best = self.last

    def _parts(self) -> tuple[str, ...]:
        return PARTS if self.guidance is None else (*PARTS, "guidance")

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to continue to the bit."""
        averages = {name: average.state_dict() for name, average in self.averages.items()}
        parts = {name: getattr(self, name).state_dict() for name in self._parts()}
        return {**parts, "averages": averages, **{name: getattr(self, name) for name in NUMBERS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            Exception: of any kind, if ``state`` is not that of a run with the same configuration.
        """
        for name in self._parts():
            getattr(self, name).load_state_dict(state[name])
        for name, average in self.averages.items():
            average.load_state_dict(state["averages"][name])
        self.epoch, self.step = int(state["epoch"]), int(state["step"])
        self.history = [dict(row) for row in state["history"]]
        self.last, self.best = dict(state["last"]), dict(state["best"])
        if not all(isinstance(value, (int, float)) for row in self.history for value in row.values()):
            raise ValueError("a measure is no number")
        epochs = {self.epoch, len(self.history), self.history[-1]["epoch"], self.last["epoch"]}
        if len(epochs) > 1 or self.scheduler.last_epoch != self.step:
            raise ValueError("its numbers of epochs or steps contradict each other")
        if not {"accuracy", "nll"} <= self.best.keys():
            raise ValueError("the best epoch has no measures")


def save_checkpoint(state: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint beside its final name, to the disk, and rename it: a kill leaves the former one."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())


def restore(state: TrainingState, path: Path) -> None:
    """Load a checkpoint into the state of a run; nothing in the file is run.

    Raises:
        CalmError: the checkpoint is damaged or does not fit this run.
    """
    checkpoint = read_torch(path, "checkpoint")
    try:
        state.load_state_dict(checkpoint)
    except Exception as error:  # PyTorch's classes check what they load in ways of their own
        raise CalmError(
            f"cannot continue from {path}: it does not fit this run ({type(error).__name__}: {str(error)[:500]});"
            " delete the run folder to train from the start"
        ) from error


def export(state: TrainingState, run_dir: Path, model: CalmModel) -> None:
    """Write the models ``last/`` and, if the last epoch is the best, ``best/`` and ``checkpoints/best.ckpt``.

    The model is that of ``state``, or one that shares its head.
    """
    path = run_dir / CHECKPOINT
    model.training_summary = {**model.training_summary, "validation": state.last}
    spread = "posterior_entropy_relative"
    model.training_summary |= {name: value for name, value in state.history[-1].items() if name == spread}
    model.save_pretrained(run_dir / "last")
    if state.best["epoch"] == state.last["epoch"]:
        model.save_pretrained(run_dir / "best")
        # A checkpoint is replaced and never written in place, so that two names may share its bytes.
        with atomic_path(path.with_name("best.ckpt")) as temporary:
            temporary.unlink()
            try:
                temporary.hardlink_to(path)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
