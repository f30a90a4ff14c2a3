"""The training step, as a Lightning module: forward, loss, average, measure. No file is written from here."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from calm.data.mixing import BatchMix
from calm.data.randomness import mix_seed
from calm.model import CalmModel
from calm.output import CalmOutput, CamOutput
from calm.train.config import TrainConfig
from calm.train.ema import Average
from calm.train.guard import FiniteGuard, Moment, check_weights, diagnose
from calm.train.measures import ClassificationMeasures, TrainingMeasures
from calm.train.optim import build_optimizer
from calm.train.schedule import Run, learning_rate_factor, temperature_schedule

__all__ = ["TrainingModule"]

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
