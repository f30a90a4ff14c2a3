"""One training step: forward pass, loss and what is measured of it, for any of the three methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from calm.data.transforms import BatchMix
from calm.model import CalmModel
from calm.output import CalmOutput, CamOutput
from calm.train.config import RunLength, TrainConfig, temperature_schedule
from calm.train.guard import FiniteGuard
from calm.train.optim import Average

__all__ = ["TrainingMeasures", "TrainingStep"]

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

    def update(
        self, loss: Tensor, images: int, output: Output | None = None, targets: Tensor | None = None
    ) -> None:
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
            for name, entropy in (
                ("prior_entropy", prior / probed),
                ("posterior_entropy", posterior / probed),
            ):
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

    def __init__(
        self, model: CalmModel, averages: Mapping[str, Average], config: TrainConfig, run: RunLength
    ) -> None:
        super().__init__()
        self.model, self.averages, self.config = model, dict(averages), config
        self.temperature = temperature_schedule(config.loss.temperature, run.steps)
        self.mix = BatchMix(config.augment, model.config.num_classes) if config.augment.mixes else None
        self.measures = TrainingMeasures()
        self.guard = FiniteGuard()
        self.shown: dict[str, float] = {}
        self.images = torch.empty(0)
        self._probe_every = max(1, run.steps_per_epoch * config.optim.accumulate // PROBES_PER_EPOCH)

    def forward(
        self, images: Tensor, targets: Tensor, *, epoch: int, step: int, index: int, rank: int
    ) -> Tensor:
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
            images, targets = self.mix(
                images, targets, seed=self.config.seed, epoch=epoch, step=index, rank=rank
            )
        output = self.model(images)
        teacher = None
        if "teacher" in self.averages:
            with torch.no_grad():
                teacher = self.averages["teacher"](images)
        loss = self.model.output_loss(
            output,
            targets,
            temperature=self.temperature(step),
            teacher=teacher,
        )
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
