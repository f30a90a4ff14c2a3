"""The training step, as a Lightning module: forward, loss, average, measure. No file is written from here.

An exponential moving average of a model: the teacher of the E-step, or the weights that are evaluated and saved.

Stop when the loss is no longer a number, and say when it happened and why.

Parameter groups and optimiser: a low rate for the (pretrained) backbone, a higher one for the new layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from calm.data.seeds import mix_seed
from calm.data.transforms import BatchMix
from calm.errors import CalmError
from calm.model import CalmModel
from calm.output import CalmOutput, CamOutput
from calm.train.config import Run, TrainConfig, is_new, learning_rate_factor, temperature_schedule
from calm.train.measures import ClassificationMeasures, TrainingMeasures

if TYPE_CHECKING:
    from calm.train.config import OptimOptions

__all__ = [
    "Average",
    "FiniteGuard",
    "Moment",
    "TrainingModule",
    "build_optimizer",
    "diagnose",
    "parameter_groups",
]


class Average:
    """A copy of a model whose weights and statistics trail the model's: average = decay * average + (1 - decay) * new.

    Early on the decay is smaller, (1 + t) / (10 + t) at the t-th update, so that the random start is forgotten.
    Deliberately not a module: it must not be trained, wrapped or saved as a part of the model.

    Args:
        model: what is averaged; copied, and put into evaluation mode.
        decay: in [0, 1).

    Attributes:
        model: the averaged copy.
        updates: how often `update` was called.
    """

    def __init__(self, model: CalmModel, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: CalmModel) -> None:
        """Move the average towards ``model``. Integer buffers (BatchNorm's counters) are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = self.model.state_dict(), model.state_dict()
        floats = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], 1 - decay)
        for name in mine.keys() - set(floats):
            mine[name].copy_(theirs[name])
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly from here."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])


@dataclass(frozen=True)
class Moment:
    """Where in the run something happened.

    Attributes:
        epoch: from 0.
        step: optimiser steps before it.
        lr: highest learning rate at that step.
    """

    epoch: int
    step: int
    lr: float


class FiniteGuard:
    """Remembers on the device which step first had a loss that is NaN or infinite. Only asking waits for the device."""

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Record ``step`` if its ``loss`` is the first that is not finite."""
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        bad = ~torch.isfinite(loss.detach()) & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, step)

    def first_bad(self) -> int | None:
        """The first step whose loss was not finite; waits for the device."""
        step = -1 if self._first_bad is None else int(self._first_bad)
        return None if step < 0 else step


def check_weights(model: nn.Module, moment: Moment) -> None:
    """Refuse weights that are not finite, as before a checkpoint is written.

    Raises:
        CalmError: naming the first such parameter, the step and the likely cause.
    """
    if name := first_nonfinite_weight(model):
        raise _stopped(
            moment.step, moment, f"after this step the weights of {name} are not finite", model, name
        )


def first_nonfinite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer with a NaN or infinity; one wait for the device if there is none."""
    named = {
        name: value
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if value.is_floating_point()
    }
    finite = torch.stack([torch.isfinite(value).all() for value in named.values()])
    if bool(finite.all()):
        return None
    return list(named)[int(finite.int().argmin())]


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor, step: int, moment: Moment) -> CalmError:
    """The error for a loss that was not finite at ``step``.

    Args:
        model: a `CalmModel`, as it is now.
        images: the batch at hand now: that of ``step``, or of the next check after it.
        step: the first step whose loss was not finite.
        moment: now.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        return _stopped(
            step, moment, f"{bad} of {len(images)} images of the batch hold NaN or infinity", model, None
        )
    if name := first_nonfinite_weight(model):
        return _stopped(step, moment, f"the weights of {name} are not finite", model, name)
    output: CalmOutput | CamOutput = model(images)
    if not bool(torch.isfinite(output.logits).all()):
        return _stopped(step, moment, "the weights are finite but the class logits overflow", model, "logits")
    if isinstance(output, CalmOutput):
        if not bool(torch.isfinite(output.scores).all()):
            return _stopped(
                step, moment, "the weights are finite but the location scores overflow", model, "scores"
            )
        dead = int(output.dead.sum())
        if dead:
            cause = f"the prior is dead for {dead} of {len(images)} images (all location scores below 0)"
            return _stopped(step, moment, cause, model, None)
    return _stopped(
        step, moment, "images, weights and activations are finite now: the loss overflowed", model, None
    )


def _stopped(step: int, moment: Moment, cause: str, model: nn.Module, diverged: str | None) -> CalmError:
    advice = (
        "lower lr or optim.head_ratio, add optim.warmup_epochs or optim.clip_norm, or use precision 32-true"
        if diverged
        else "look at the images of the data set with `calm data check`, or lower lr"
    )
    return CalmError(
        f"training stopped: the loss is not finite at step {step} (epoch {moment.epoch + 1}, learning rate"
        f" {moment.lr:.3g}): {cause}. Likely remedy: {advice}. The last checkpoint is from before this."
    )


def parameter_groups(model: nn.Module, backbone: str, lr: float, optim: OptimOptions) -> list[dict[str, Any]]:
    """The parameters by learning rate and weight decay, as ``torch.optim`` takes them.

    Args:
        model: a `CalmModel`; parameters that need no gradient are left out.
        backbone: its backbone's name, for the ``released`` grouping.
        lr: rate of the backbone; the new layers get ``lr * optim.head_ratio``.
        optim: grouping, ratio and decay.

    Returns:
        At most four groups with ``params``, ``lr``, ``peak_lr`` (the same; schedules multiply it), ``weight_decay``
        and ``name``. Parameters shared by two modules appear once.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        new = is_new(name, backbone, optim.grouping)
        decays = optim.decay == "all" or parameter.ndim > 1
        rate = lr * optim.head_ratio if new else lr
        group = groups.setdefault(
            (new, decays),
            {
                "params": [],
                "lr": rate,
                "peak_lr": rate,
                "weight_decay": optim.weight_decay if decays else 0.0,
                "name": ("new" if new else "backbone") + ("" if decays else ", no decay"),
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(model: nn.Module, backbone: str, lr: float, optim: OptimOptions) -> torch.optim.Optimizer:
    """SGD or AdamW over `parameter_groups`."""
    groups = parameter_groups(model, backbone, lr, optim)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, momentum=optim.momentum, nesterov=optim.nesterov)
    return torch.optim.AdamW(groups, betas=optim.betas)


PROBES_PER_EPOCH = 50


class TrainingModule(pl.LightningModule):
    """Trains a `CalmModel`.

    Args:
        model: the model; trained in place.
        config: the run.
        run: its length.

    Attributes:
        averages: the moving averages by name, ``teacher`` and ``ema``, as far as the config asks for them.
        validation: measures of the last validation pass.
        shown: current values for the progress bar, updated every ``log.every_n_steps`` steps.
    """

    def __init__(self, model: CalmModel, config: TrainConfig, run: Run) -> None:
        super().__init__()
        self.model, self.config, self.run = model, config, run
        self.temperature = temperature_schedule(config.loss.temperature, run.steps)
        self.averages: dict[str, Average] = {}
        if config.loss.posterior == "ema":
            self.averages["teacher"] = Average(model, config.loss.teacher_decay)
        if config.optim.ema_decay:
            self.averages["ema"] = Average(model, config.optim.ema_decay)
        classes = model.config.num_classes
        self.mix = BatchMix(config.augment, classes) if config.augment.mixes else None
        self.training_measures = TrainingMeasures(classes)
        self.evaluation_measures = ClassificationMeasures(classes)
        self.guard = FiniteGuard()
        self.validation: dict[str, float] = {}
        self.test: dict[str, float] = {}
        self.shown: dict[str, float] = {}
        self._images = torch.empty(0)
        self._probe_every = max(1, run.steps_per_epoch * config.optim.accumulate // PROBES_PER_EPOCH)

    @property
    def evaluated(self) -> CalmModel:
        """The model that is evaluated and saved: the average of the weights if there is one."""
        return self.averages["ema"].model if "ema" in self.averages else self.model

    @property
    def moment(self) -> Moment:
        """Where the run is."""
        return Moment(self.current_epoch, self.global_step, max(self.learning_rates().values()))

    def backbone_learning_rate(self) -> float:
        """Current rate of the low-rate group."""
        return min(self.learning_rates().values())

    def learning_rates(self) -> dict[str, float]:
        """Current learning rate of each parameter group, by the group's name."""
        return {group["name"]: group["lr"] for group in self._optimizer.param_groups}

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser; its rates are set before every step."""
        return build_optimizer(self.model, self.config.backbone, self.config.lr, self.config.optim)

    def on_fit_start(self) -> None:
        """Bring the averages to the device: Lightning does not know of them."""
        self._move_averages()

    def on_test_start(self) -> None:
        """The same."""
        self._move_averages()

    def _move_averages(self) -> None:
        for average in self.averages.values():
            average.model.to(self.device)

    def on_train_epoch_start(self) -> None:
        """Make what is random inside the network (dropout) a function of seed, epoch and process."""
        torch.manual_seed(mix_seed(self.config.seed, self.current_epoch, self.global_rank) >> 1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rates of this step."""
        factor = learning_rate_factor(self.config.optim, self.run, self.global_step)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch, mean over its images, in nats."""
        images, targets, _ = batch
        step = self.global_step
        if self.mix is not None:
            place = {"epoch": self.current_epoch, "step": batch_idx, "rank": self.global_rank}
            images, targets = self.mix(images, targets, seed=self.config.seed, **place)
        output = self.model(images)
        loss = self.model.output_loss(
            output,
            targets,
            temperature=self.temperature(step),
            teacher=self._teacher_output(images),
            samples=self.config.loss.samples,
        )
        self.guard.note(loss, step)
        self._images = images
        if self._may_wait(step, batch_idx):
            self._stop_if_bad()
        if batch_idx == 0 or step % self.config.log.every_n_steps == 0:
            self._show(loss, output, targets)
        self.training_measures.add_loss(loss, len(images))
        if batch_idx % self._probe_every == 0:
            self.training_measures.add_output(output, targets)
        return loss

    def _teacher_output(self, images: Tensor) -> Any:
        if "teacher" not in self.averages:
            return None
        with torch.no_grad():
            return self.averages["teacher"].model(images)

    def _may_wait(self, step: int, batch_idx: int) -> bool:
        """Whether this step may wait for the device. On the CPU there is nothing to wait for."""
        return self.device.type == "cpu" or batch_idx == 0 or step % self.config.log.every_n_steps == 0

    def _stop_if_bad(self) -> None:
        step = self.guard.first_bad()
        if step is not None:
            raise diagnose(self.model, self._images, step, self.moment)

    @torch.no_grad()
    def _show(self, loss: Tensor, output: CalmOutput | CamOutput, targets: Tensor) -> None:
        """Update what the progress bar shows: smoothed over the batches that are looked at."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        accuracy = (output.log_probs.argmax(dim=1) == labels).float().mean()
        now = {"loss": float(loss.detach()), "accuracy": float(accuracy)}
        self.shown = {name: 0.7 * self.shown.get(name, value) + 0.3 * value for name, value in now.items()}

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the averages follow."""
        super().optimizer_step(*args, **kwargs)
        for average in self.averages.values():
            average.update(self.model)

    def on_validation_start(self) -> None:
        """Look at the epoch that was just trained before anything is measured or saved."""
        self._stop_if_bad()
        check_weights(self.model, self.moment)
        if self.trainer.world_size > 1:
            self._agree_on_buffers()

    def _agree_on_buffers(self) -> None:
        """Give all processes the buffers (BatchNorm's statistics) of the first, whose model is the one saved."""
        for model in (self.model, *(average.model for average in self.averages.values())):
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Measure a batch."""
        images, targets, _ = batch
        self.evaluation_measures.update(self.evaluated(images), targets)

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Measure a batch."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Sum up over batches and processes."""
        self.validation = self.evaluation_measures.compute()

    def on_test_epoch_end(self) -> None:
        """Sum up over batches and processes."""
        self.test = self.evaluation_measures.compute()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the averages into the checkpoint."""
        checkpoint["averages"] = {name: average.state_dict() for name, average in self.averages.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averages from the checkpoint."""
        for name, average in self.averages.items():
            average.load_state_dict(checkpoint["averages"][name])
