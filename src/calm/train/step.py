"""One training step: forward pass, loss and measures of a batch, and the guard against NaN and infinity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torchmetrics import Metric

from calm.data.transforms import BatchMix
from calm.errors import CalmError
from calm.inference import first_nonfinite_weight
from calm.model import CalmModel
from calm.output import CalmOutput, CamOutput
from calm.train.config import RunLength, TrainConfig, schedule_of
from calm.train.optim import Average
from calm.train.wsol import SelfProducedGuidance, hide_patches

Output: TypeAlias = CalmOutput | CamOutput

PROBES_PER_EPOCH = 50
"""Batches of an epoch whose predictions and maps are measured; the loss is measured in all of them."""

HIDING = 1
"""Part of the seed of Hide-and-Seek, whose random numbers are others than those of mixing."""


class TrainingMeasures(Metric):
    """Loss of every batch; accuracy and state of the explanation of some, on the augmented images.

    Sums stay on the device, without synchronisation, until `compute` adds them up over all processes.
    """

    full_state_update = False
    losses: Tensor
    probes: Tensor
    first_bad: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", torch.zeros(2), dist_reduce_fx="sum")  # images, loss
        # images, right, nll, prior entropy, posterior entropy, dead prior
        self.add_state("probes", torch.zeros(6), dist_reduce_fx="sum")
        self.add_state("first_bad", torch.tensor(-1), dist_reduce_fx="max")  # step whose loss was not finite
        self.locations = 0

    def update(
        self, loss: Tensor, images: int, step: int, output: Output | None = None, targets: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            loss: mean over the images of the batch.
            images: how many they are.
            step: optimiser steps before this one.
            output: the model's output, if predictions and maps are measured, too.
            targets: class indices (B,), or rows (B, C), which count as their largest class.
        """
        self.first_bad.masked_fill_(~loss.detach().isfinite() & (self.first_bad < 0), step)
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

    def first_bad_step(self) -> int | None:
        """Return the first step since `reset` whose loss was NaN or infinite, if any. This waits for the device."""
        step = int(self.first_bad)
        return None if step < 0 else step

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

    Of ``averages``, the model's moving averages, ``teacher`` gives the E-step's posterior. They are not part of it.
    The loss of ``guidance``, the branches of SPG, is added.

    Attributes:
        measures: what was measured since the epoch began.
        smoothed: ``loss`` and ``accuracy``, averaged over recent reported batches, for progress and loggers.
        images: the latest batch, for a message about it.
    """

    def __init__(
        self,
        model: CalmModel,
        averages: Mapping[str, Average],
        config: TrainConfig,
        run: RunLength,
        guidance: SelfProducedGuidance | None = None,
    ) -> None:
        super().__init__()
        self.model, self.averages, self.config, self.guidance = model, dict(averages), config, guidance
        self.temperature = schedule_of(config.loss.temperature, run.steps)
        self.prior_weight = schedule_of(config.loss.prior_weight, run.steps)
        self.cam_weight = schedule_of(config.loss.cam_weight, run.steps)
        self.mix = BatchMix(config.augment, model.config.num_classes) if config.augment.mixes else None
        self.measures = TrainingMeasures()
        self.smoothed: dict[str, float] = {}
        self.images = torch.empty(0)
        self._probe_every = max(1, run.steps_per_epoch * config.optim.accumulate // PROBES_PER_EPOCH)

    def forward(self, images: Tensor, targets: Tensor, *, epoch: int, step: int, index: int, rank: int) -> Tensor:
        """Return the loss of a batch, mean over its images, in nats.

        Args:
            images: normalised (B, C, H, W).
            targets: class indices (B,).
            epoch, step, index, rank: of the epoch, the optimiser step, the batch in the epoch and the process, from 0.
        """
        classes, regions = targets, None
        if self.mix is not None:
            mixed = self.mix(images, targets, seed=self.config.seed, epoch=epoch, step=index, rank=rank)
            images, targets, window = mixed
            if window is not None and self.config.loss.cutmix == "regions" and self.model.config.method != "cam":
                classes, regions = torch.stack([classes, classes.roll(1)], dim=1), _parts(images, window)
            else:
                classes = targets
        if "has" in self.config.wsol.methods:
            patches, rate = self.config.wsol.has_patches, self.config.wsol.has_rate
            images = hide_patches(images, patches, rate, self.config.seed, epoch, index, rank, HIDING)
        output = self.model(images, targets)
        teacher = None
        if "teacher" in self.averages:
            with torch.no_grad():
                teacher = self.averages["teacher"](images, targets)
        exponent, taught = self.config.loss.pooling_exponent, output
        if exponent is not None and isinstance(output, CalmOutput):
            taught = replace(output, pooling_exponent=exponent)
        loss = self.model.output_loss(
            taught,
            classes,
            temperature=self.temperature(step),
            teacher=teacher,
            prior_weight=self.prior_weight(step),
            cam_weight=self.cam_weight(step),
            regions=regions,
        )
        if self.guidance is not None:
            loss = loss + self.guidance(output, targets, (images.shape[-2], images.shape[-1]))
        self.images = images
        if self.is_reported(step, index):
            self._smooth(loss, output, targets)
        probed = index % self._probe_every == 0
        self.measures.update(loss, len(images), step, output if probed else None, targets)
        return loss

    def is_reported(self, step: int, index: int) -> bool:
        """Return whether the progress bar and loggers report a batch, for which the program waits for the device."""
        return index == 0 or step % self.config.log.every_n_steps == 0

    @torch.no_grad()
    def _smooth(self, loss: Tensor, output: Output, targets: Tensor) -> None:
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        accuracy = (output.log_probs.argmax(dim=1) == labels).float().mean()
        now = {"loss": float(loss.detach()), "accuracy": float(accuracy)}
        self.smoothed = {name: 0.7 * self.smoothed.get(name, value) + 0.3 * value for name, value in now.items()}


def _parts(images: Tensor, window: tuple[int, int, int, int]) -> Bool[Tensor, "2 H W"]:
    """Return the masks of what lies outside and inside CutMix's window."""
    x0, y0, x1, y1 = window
    inside = torch.zeros(images.shape[-2:], dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    return torch.stack([~inside, inside])


def check_weights(model: nn.Module, step: int, where: str) -> None:
    """Refuse weights that are not finite, as before a checkpoint is written.

    Args:
        model: a `CalmModel`.
        step: optimiser steps taken so far.
        where: the position in the run, for the message: "epoch 3, learning rate 0.01".

    Raises:
        CalmError: a parameter or buffer holds NaN or infinity. The message names it, the step and the likely cause.
    """
    if name := first_nonfinite_weight(model):
        raise _stopped(step, where, f"after this step the weights of {name} are not finite", DIVERGED)


def diagnose(model: nn.Module, images: Tensor, step: int, where: str) -> CalmError:
    """Return the error for a loss that was not finite at ``step``; ``images`` are the current batch, that of ``step``
    or of the next check after it. See `check_weights` for the other arguments."""
    return _stopped(step, where, *_cause(model, images))


@torch.no_grad()
def _cause(model: nn.Module, images: Tensor) -> tuple[str, str]:
    """Return why the loss of a batch is not finite, and the likely remedy."""
    if bad := int((~images.isfinite()).flatten(1).any(dim=1).sum()):
        return f"{bad} of {len(images)} images of the batch hold NaN or infinity", BAD_IMAGES
    if name := first_nonfinite_weight(model):
        return f"the weights of {name} are not finite", DIVERGED
    output: Output = model(images)
    if not output.logits.isfinite().all():
        return "the weights are finite but the class logits overflow", DIVERGED
    if isinstance(output, CalmOutput):
        if not output.scores.isfinite().all():
            return "the weights are finite but the location scores overflow", DIVERGED
        if dead := int(output.dead.sum()):
            return f"the prior is dead for {dead} of {len(images)} images (all location scores below 0)", BAD_IMAGES
    return "images, weights and activations are finite now: the loss overflowed", BAD_IMAGES


DIVERGED = "lower lr or optim.head_ratio, add optim.warmup_epochs or optim.clip_norm, or use precision 32-true"
BAD_IMAGES = "look at the images of the data set with `calm data check`, or lower lr"


def _stopped(step: int, where: str, cause: str, remedy: str) -> CalmError:
    return CalmError(
        f"training stopped: the loss is not finite at step {step} ({where}): {cause}. Likely remedy: {remedy}. The last"
        " checkpoint is from before this."
    )
