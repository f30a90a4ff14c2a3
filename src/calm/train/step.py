"""One training step: forward pass, loss and measures of a batch, and the guard against NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from calm.data.transforms import BatchMix
from calm.errors import CalmError
from calm.model import CalmModel
from calm.output import CalmOutput, CamOutput
from calm.train.config import RunLength, TrainConfig, temperature_schedule
from calm.train.optim import Average

__all__ = ["FiniteGuard", "Position", "TrainingMeasures", "TrainingStep", "check_weights", "diagnose"]

Output: TypeAlias = CalmOutput | CamOutput

PROBES_PER_EPOCH = 50
"""Batches of an epoch whose predictions and maps are measured; the loss is measured in all of them."""


class TrainingMeasures(Metric):
    """Loss of every batch; accuracy and state of the explanation of some, on the augmented images.

    Sums stay on the device, without synchronisation, until `compute` adds them up over all processes.
    """

    full_state_update = False
    losses: Tensor
    probes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", torch.zeros(2), dist_reduce_fx="sum")  # images, loss
        # images, right, nll, prior entropy, posterior entropy, dead prior
        self.add_state("probes", torch.zeros(6), dist_reduce_fx="sum")
        self.locations = 0

    def update(self, loss: Tensor, images: int, output: Output | None = None, targets: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            loss: mean over the images of the batch.
            images: how many they are.
            output: the model's output, if predictions and maps are measured, too.
            targets: class indices (B,), or rows (B, C), which count as their largest class.
        """
        self.losses += torch.stack([torch.full_like(loss, images), loss.detach() * images]).to(self.losses)
        if output is None or targets is None:
            return
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        log_probs = output.log_probs
        right = (log_probs.argmax(dim=1) == labels).float()
        columns = [torch.ones_like(right), right, -log_probs.gather(1, labels[:, None]).squeeze(1)]
        if isinstance(output, CalmOutput):
            log_prior = output.log_prior.flatten(1)
            posterior = output.target_log_joint(labels).flatten(1).softmax(dim=1)
            self.locations = log_prior.shape[1]
            columns += [torch.special.entr(prob).sum(dim=1) for prob in (log_prior.exp(), posterior)]
            columns.append(output.dead.float())
        self.probes[: len(columns)] += torch.stack(columns).sum(dim=1).to(self.probes)

    def compute(self) -> dict[str, float]:
        """Return the means since the last `reset`.

        Returns:
            ``train_loss``, ``train_accuracy`` (0 to 1), ``train_nll`` (nats; the EM loss is this plus the entropy of q,
            so only ``train_nll`` compares over methods). For CALM also ``prior_entropy`` and ``posterior_entropy`` of
            the target (nats, from 0: one location, to log N: uniform), both divided by log N as ``..._relative``, and
            ``dead_prior``, the share of images whose location scores are all off.
        """
        images, loss = self.losses.tolist()
        probed, right, nll, prior, posterior, dead = self.probes.tolist()
        values = {"train_loss": loss / images, "train_accuracy": right / probed, "train_nll": nll / probed}
        if self.locations:
            uniform = math.log(self.locations) or 1.0
            for name, entropy in (("prior_entropy", prior / probed), ("posterior_entropy", posterior / probed)):
                values |= {name: entropy, f"{name}_relative": entropy / uniform}
            values["dead_prior"] = dead / probed
        return values


class TrainingStep(nn.Module):
    """Forward pass and loss of a batch: the module that Fabric wraps, so that processes share its gradients.

    Args:
        model: the model that is trained.
        averages: moving averages of it by name; ``teacher``, if there is one, gives the E-step's posterior. They are
            not part of this module.
        config: the run.
        run: its length.

    Attributes:
        measures: what was measured since the epoch began.
        guard: the first step whose loss was not finite.
        shown: ``loss`` and ``accuracy``, smoothed over the batches that are looked at, for progress and loggers.
        images: the latest batch, for a message about it.
    """

    def __init__(self, model: CalmModel, averages: Mapping[str, Average], config: TrainConfig, run: RunLength) -> None:
        super().__init__()
        self.model, self.averages, self.config = model, dict(averages), config
        self.temperature = temperature_schedule(config.loss.temperature, run.steps)
        self.mix = BatchMix(config.augment, model.config.num_classes) if config.augment.mixes else None
        self.measures = TrainingMeasures()
        self.guard = FiniteGuard()
        self.shown: dict[str, float] = {}
        self.images = torch.empty(0)
        self._probe_every = max(1, run.steps_per_epoch * config.optim.accumulate // PROBES_PER_EPOCH)

    def forward(self, images: Tensor, targets: Tensor, *, epoch: int, step: int, index: int, rank: int) -> Tensor:
        """Return the loss of a batch, mean over its images, in nats.

        Args:
            images: normalised (B, 3, H, W).
            targets: class indices (B,).
            epoch: from 0.
            step: optimiser steps before this one.
            index: of the batch in the epoch, from 0.
            rank: of the process.
        """
        if self.mix is not None:
            images, targets = self.mix(images, targets, seed=self.config.seed, epoch=epoch, step=index, rank=rank)
        output = self.model(images)
        teacher = None
        if "teacher" in self.averages:
            with torch.no_grad():
                teacher = self.averages["teacher"](images)
        loss = self.model.output_loss(output, targets, temperature=self.temperature(step), teacher=teacher)
        self.images = images
        self.guard.note(loss, step)
        if self.looks_at(step, index):
            self._show(loss, output, targets)
        probed = index % self._probe_every == 0
        self.measures.update(loss, len(images), output if probed else None, targets)
        return loss

    def looks_at(self, step: int, index: int) -> bool:
        """Return whether the values of a batch are shown, for which the program waits for the device."""
        return index == 0 or step % self.config.log.every_n_steps == 0

    @torch.no_grad()
    def _show(self, loss: Tensor, output: Output, targets: Tensor) -> None:
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        accuracy = (output.log_probs.argmax(dim=1) == labels).float().mean()
        now = {"loss": float(loss.detach()), "accuracy": float(accuracy)}
        self.shown = {name: 0.7 * self.shown.get(name, value) + 0.3 * value for name, value in now.items()}


@dataclass(frozen=True)
class Position:
    """Position in a run, for messages.

    Attributes:
        epoch: from 0.
        step: optimiser steps taken so far.
        lr: highest learning rate of all parameter groups at that step.
    """

    epoch: int
    step: int
    lr: float


class FiniteGuard:
    """Record on the device which step first had a loss that is NaN or infinite; only `first_bad` synchronises."""

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Record ``step`` if its ``loss`` is the first that is not finite."""
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        bad = ~torch.isfinite(loss.detach()) & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, step)

    def first_bad(self) -> int | None:
        """Return the first step whose loss was not finite, if there was one. This waits for the device."""
        step = -1 if self._first_bad is None else int(self._first_bad)
        return None if step < 0 else step


def check_weights(model: nn.Module, position: Position) -> None:
    """Refuse weights that are not finite, as before a checkpoint is written.

    Raises:
        CalmError: a parameter or buffer holds NaN or infinity. The message names it, the step and the likely cause.
    """
    if name := first_nonfinite_weight(model):
        cause = f"after this step the weights of {name} are not finite"
        raise _stopped(position.step, position, cause, diverged=True)


def first_nonfinite_weight(model: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer with a NaN or infinity; synchronises once if there is none."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    floats = {name: value for name, value in tensors if value.is_floating_point()}
    finite = torch.stack([torch.isfinite(value).all() for value in floats.values()])
    if bool(finite.all()):
        return None
    return list(floats)[int(finite.int().argmin())]


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor, step: int, position: Position) -> CalmError:
    """Return the error for a loss that was not finite at ``step``.

    Args:
        model: a `CalmModel`, as it is now.
        images: the current batch: that of ``step``, or of the next check after it.
        step: the first step whose loss was not finite.
        position: the current position in the run.
    """
    finite_images = torch.isfinite(images).flatten(1).all(dim=1)
    if not bool(finite_images.all()):
        bad = len(images) - int(finite_images.sum())
        cause = f"{bad} of {len(images)} images of the batch hold NaN or infinity"
        return _stopped(step, position, cause, diverged=False)
    if name := first_nonfinite_weight(model):
        return _stopped(step, position, f"the weights of {name} are not finite", diverged=True)
    output: Output = model(images)
    overflowing = {"class logits": output.logits}
    if isinstance(output, CalmOutput):
        overflowing["location scores"] = output.scores
    for name, values in overflowing.items():
        if not bool(torch.isfinite(values).all()):
            return _stopped(step, position, f"the weights are finite but the {name} overflow", diverged=True)
    dead = int(output.dead.sum()) if isinstance(output, CalmOutput) else 0
    if dead:
        cause = f"the prior is dead for {dead} of {len(images)} images (all location scores below 0)"
    else:
        cause = "images, weights and activations are finite now: the loss overflowed"
    return _stopped(step, position, cause, diverged=False)


def _stopped(step: int, position: Position, cause: str, *, diverged: bool) -> CalmError:
    advice = (
        "lower lr or optim.head_ratio, add optim.warmup_epochs or optim.clip_norm, or use precision 32-true"
        if diverged
        else "look at the images of the data set with `calm data check`, or lower lr"
    )
    return CalmError(
        f"training stopped: the loss is not finite at step {step} (epoch {position.epoch + 1}, learning rate"
        f" {position.lr:.3g}): {cause}. Likely remedy: {advice}. The last checkpoint is from before this."
    )
