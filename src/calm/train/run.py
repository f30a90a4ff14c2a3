"""`train`: from a configuration to a run folder. The training loop, in reading order.

What result.json says of a run::

    {"last": {"epoch": 30, "val": {"accuracy": 0.731, "nll": 1.02, "ece": 0.05}, "test": {...}}, "best": {...},
     "train": {"loss": ..., "accuracy": ...}, "images_per_second": 181.5, "seconds": 1490.2}
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.utils.data import DataLoader

from calm.checkpoint import WEIGHTS
from calm.data.check import load_checked
from calm.data.dataset import EpochSampler, ImageDataset
from calm.data.loading import fingerprint as split_fingerprint, summary
from calm.errors import CalmError
from calm.files import atomic_path, write_json
from calm.inference import automatic_precision, evaluation_mode, keep_slow_gradients_in_float32, mix_seed
from calm.metrics.classification import Classification
from calm.model import CalmModel
from calm.train import checkpoints, folder, journal
from calm.train.checkpoints import CHECKPOINT, Row, TrainingState
from calm.train.config import Hardware, RunLength, TrainConfig
from calm.train.data import build_datasets, build_guidance, build_loader, build_model
from calm.train.features import HeadModel, cache_features, remove_features
from calm.train.optim import freeze_norm, freeze_until
from calm.train.step import TrainingStep, check_weights, diagnose
from calm.train.wsol import SelfProducedGuidance


def train(
    config: TrainConfig, *, backbone: nn.Module | None = None, loggers: Iterable[Logger] = (), quiet: bool = False
) -> Path:
    """Train a model and write everything about it to a run folder.

    Called again with the same configuration it continues an unfinished run after its last whole epoch, with the same
    final weights as if it had never stopped, and returns at once if the run is finished.

    Args:
        config: the run.
        backbone: your own module instead of the named backbone: images (B, 3, H, W) to features (B, D, h, w).
            ``config.backbone`` is then only its name. Its start weights are yours to seed.
        loggers: loggers of Fabric or Lightning that get curves and pictures, beside those that ``config.log.loggers``
            names. They are finalized at the end.
        quiet: print nothing; log.txt is written in any case.

    Returns:
        The run folder. ``calm.load(folder)`` gives the best model; `calm.train.folder` lists the files.

    Raises:
        CalmError: a configuration, data set or run folder that cannot work, found before training starts; or a loss
            that became NaN or infinite, with step and likely cause.
        KeyboardInterrupt: after Ctrl-C; log.txt says after which epoch the same command continues.
        SystemExit: the same after SIGTERM, with code 143.
    """
    config, precision_line = _with_precision(config)
    run_dir = config.run_dir or folder.default_run_dir(config)
    first = folder.is_first_process()
    log = journal.RunLog(quiet=quiet or not first)
    new = first and folder.check_folder(run_dir, config)
    if folder.is_finished(run_dir, config):
        log(f"{run_dir} is finished; delete it or choose another --run_dir to train again")
        return run_dir
    if not new and not config.data.exists():
        raise CalmError(f"the data of {run_dir} are no longer in {config.data}: say with --data where they are")
    for name in config.log.loggers:
        journal.logger_class(name)
    # What is carved into val and test does not depend on the run's seed.
    names = ("layout", "metadata_root", "val_fraction", "present_classes_only", "skip_bad", "channels", "bits")
    reading = {name: getattr(config.reading, name) for name in names}
    splits, report = load_checked(config.data, progress=log.interactive, **reading)
    images = len(splits["train"].records)
    if images < config.batch_size:
        raise CalmError(f"batch_size is {config.batch_size}, but there are only {images} training images: lower it")
    # Only full batches are trained on. The images left over differ in each epoch.
    run = RunLength(config.epochs, images // config.batch_size)
    with torch.random.fork_rng(), _process_settings(config.hardware), folder.held(run_dir, first):
        torch.manual_seed(mix_seed(config.seed) >> 1)
        model, origin = build_model(config, splits["train"], backbone)
        guidance = build_guidance(config, model)
        described = {
            name: summary(split) | {"file_sizes": split_fingerprint(split, file_sizes=True)}
            for name, split in splits.items()
        }
        fingerprint = described["train"]["fingerprint"]
        model.training_summary = {"data": config.data.name, "fingerprint": fingerprint, "seed": config.seed}
        datasets = build_datasets(config, splits, model.preprocessing)
        fabric = _fabric(config.hardware)
        narrow = fabric.device.type == "cpu" and config.hardware.precision == "bf16-mixed" and not config.model.caches
        if narrow and (slow := keep_slow_gradients_in_float32(model.backbone)):
            precision_line += f"\n{slow} depthwise convolutions are trained in float32, which is faster on a CPU"
        if first:
            data = {"fingerprint": fingerprint, "splits": described, "check": report.summary}
            folder.open_folder(run_dir, config, data)
            if report_of_weights := getattr(model.backbone, "weights_report", None):
                write_json(run_dir / "weights.json", asdict(report_of_weights))
            log.path = run_dir / "log.txt"
            counts = ", ".join(f"{len(split.records):,} {name}" for name, split in splits.items())
            size = f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} million weights"
            log(f"{config.method} with {config.backbone} ({size}) on {counts} images; run folder {run_dir}")
            imbalance = journal.imbalance_line(splits["train"], config.reading.balance)
            log(
                "\n".join(
                    filter(None, (report.text(most=3), imbalance, origin, journal.grid_line(model), precision_line))
                )
            )
            if any(split.origin != "own files" for split in splits.values()):
                folder.write_splits(splits, run_dir)
        trainer = None
        try:
            with _launched(fabric):
                trainer = Trainer(fabric, model, config, run, datasets, run_dir, log, guidance)
                trainer.fit(loggers)
                if first and config.model.feature_dir is None:
                    remove_features(run_dir)
        except Exception:
            if new and (trainer is None or trainer.state.step == 0):  # the corrected command finds no other run there
                shutil.rmtree(run_dir, ignore_errors=True)
            raise
    return run_dir


class Trainer:
    """One process of a training run, on its device. ``fabric`` is launched and ``model`` is at its start; the first
    process also writes to ``run_dir``. ``guidance`` are the branches of SPG."""

    def __init__(
        self,
        fabric: Fabric,
        model: CalmModel,
        config: TrainConfig,
        run: RunLength,
        datasets: Mapping[str, ImageDataset],
        run_dir: Path,
        log: journal.RunLog,
        guidance: SelfProducedGuidance | None = None,
    ) -> None:
        self.fabric, self.config, self.run = fabric, config, run
        self.datasets, self.run_dir, self.log = datasets, run_dir, log
        self.whole = trained = model.to(fabric.device)  # and what is trained of it
        read = datasets
        if config.model.caches:
            read, trained = self._cached_features(), HeadModel(model, config.model.feature_dropout)
        if config.model.unfreeze_after and fabric.world_size > 1:
            raise CalmError("model.unfreeze_after works in one process: set hardware.devices 1, or leave it at 0")
        if not config.model.unfreeze_after:  # the frozen parts are none of the optimiser's
            self.freeze()
        guidance = None if guidance is None else guidance.to(fabric.device)
        self.state = TrainingState.start(trained, config, run, fabric.strategy.precision, guidance)
        if config.hardware.compile:
            trained.backbone.compile()
        self.step = TrainingStep(trained, self.state.averages, config, run, guidance)
        self.module, self.optimizer = fabric.setup(self.step, self.state.optimizer)
        workers = 0 if config.model.caches else config.reading.processes  # features only have to be copied
        self.loaders = {
            name: build_loader(dataset, config, fabric, shuffle=name == "train", workers=workers)
            for name, dataset in read.items()
        }
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        values = TextColumn("{task.fields[values]}")
        self.bar = Progress(*columns, values, console=log.console, transient=True, disable=not log.interactive)
        self.task = self.bar.add_task("", total=None, values="")

    def _cached_features(self) -> Mapping[str, ImageDataset]:
        if self.fabric.world_size > 1:
            raise CalmError("model.freeze trains the head in one process: set hardware.devices 1")
        columns = TextColumn("features of all images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        started = time.monotonic()
        bar = Progress(*columns, console=self.log.console, transient=True, disable=not self.log.interactive)
        task = bar.add_task("", total=None)
        try:
            with bar:
                features = cache_features(
                    self.whole,
                    self.datasets,
                    self.config,
                    self.run_dir,
                    autocast=self.fabric.autocast,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                    log=self.log,
                )
        except (KeyboardInterrupt, SystemExit):
            self.log("interrupted: the same command goes on with the features, and keeps those of the splits it has")
            raise
        height, width, channels = features["train"].features.shape[2:]
        grid, seconds = f"{channels} on a {height}x{width} grid", time.monotonic() - started
        self.log(f"features of the frozen backbone, {grid}, in {seconds:.0f} s")
        return features

    def freeze(self, epoch: int = 0, *, changes: bool = False) -> None:
        """Freeze, for an epoch, the parts of the backbone and the statistics that are to stay as they are; with
        ``changes``, log which parts are, where that begins or ends."""
        options = self.config.model
        if options.freeze and not options.caches:
            frozen = not options.unfreeze_after or epoch < options.unfreeze_after
            count = freeze_until(self.whole, options.freeze, frozen)
            if changes and epoch in (0, options.unfreeze_after) and self.fabric.is_global_zero:
                what = "the backbone" if options.freeze is True else f"the backbone up to {options.freeze}"
                self.log(f"{what} ({count:,} weights) is {'frozen' if frozen else 'trained from now on'}")
        if options.freeze_norm:
            freeze_norm(self.whole)

    def evaluated(self) -> CalmModel:
        """Return the whole model as it is evaluated and saved; of a frozen backbone, with the head that is trained."""
        model = self.state.evaluated
        if not self.config.model.caches:
            return model
        if model.head is not self.whole.head:  # an average of the weights
            self.whole.head.load_state_dict(model.head.state_dict())
        return self.whole

    def fit(self, loggers: Iterable[Logger] = ()) -> None:
        """Train from the start, or from the checkpoint in the run folder, and test; see `train` for what it raises."""
        state, first = self.state, self.fabric.is_global_zero
        path = self.run_dir / CHECKPOINT
        if path.exists():
            checkpoints.restore(state, path)
            self.log(f"continuing after epoch {state.epoch} of {self.config.epochs}")
            if first:  # a kill may have come between the checkpoint and the saved models
                checkpoints.export(state, self.run_dir, self.evaluated())
        saved = begun = state.epoch
        names, more = (self.config.log.loggers, loggers) if first else ((), ())
        try:
            with journal.open_loggers(names, self.run_dir, state.step, more) as opened, self.bar:
                self.fabric.loggers.extend(opened)
                for logger in opened:
                    with suppress(NotImplementedError):  # Fabric's CSVLogger
                        logger.log_hyperparams(folder.flattened(folder.config_dict(self.config)))
                while state.epoch < self.config.epochs:
                    started = time.monotonic()
                    seconds = self.train_epoch()
                    self.check_epoch()
                    validation = evaluate(self.fabric, state.evaluated, self.loaders["val"])
                    state.finish_epoch(self.row(seconds, validation), validation, len(self.datasets["val"]))
                    if first:
                        self.report_epoch()
                        checkpoints.save_checkpoint(state.state_dict(), path)
                        saved = state.epoch
                        checkpoints.export(state, self.run_dir, self.evaluated())
                        if state.epoch == begun + 1 < self.config.epochs:
                            rest = journal.duration((self.config.epochs - state.epoch) * (time.monotonic() - started))
                            self.log(f"about {rest} to go, until epoch {self.config.epochs}")
            result = self.result()
        except (KeyboardInterrupt, SystemExit):
            ahead = f"continues after epoch {saved}" if saved else "starts again: no epoch was finished"
            self.log(f"interrupted: the same command {ahead}")
            raise
        if first:
            write_json(self.run_dir / "result.json", result)
            config = replace(self.config, backbone=self.whole.config.backbone)  # as the saved model names it
            seconds, trained = time.monotonic() - self.log.started, sum(row["seconds"] for row in state.history[begun:])
            validated = len(self.datasets["val"])
            self.log(journal.closing_lines(result, self.run_dir, config, validated, seconds, trained))
            if line := journal.caution_line(self.evaluated(), self.config):
                self.log(line)
        self.fabric.barrier()

    def train_epoch(self) -> float:
        """Take the optimiser steps of an epoch, and return its duration in seconds."""
        config, fabric, state, loader = self.config, self.fabric, self.state, self.loaders["train"]
        assert isinstance(loader.sampler, EpochSampler)
        loader.sampler.set_epoch(state.epoch)
        self.freeze(state.epoch, changes=True)
        # What is random inside the network (dropout) is a function of seed, epoch and process.
        torch.manual_seed(mix_seed(config.seed, state.epoch, fabric.global_rank) >> 1)
        title = f"epoch {state.epoch + 1}/{config.epochs}"
        self.bar.reset(self.task, total=len(loader), description=title, values="")
        rank, start = fabric.global_rank, time.monotonic()
        for index, batch in enumerate(loader):
            images, targets, _ = fabric.to_device(batch)
            if config.hardware.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            whole = (index + 1) % config.optim.accumulate == 0
            with fabric.no_backward_sync(self.module, enabled=not whole):
                loss = self.module(images, targets, epoch=state.epoch, step=state.step, index=index, rank=rank)
                # On the CPU there is nothing to wait for: every loss is checked.
                if fabric.device.type == "cpu" or self.step.is_reported(state.step, index):
                    self.check_losses()
                fabric.backward(loss / config.optim.accumulate)
            if whole:
                self.take_step()
            speed = (index + 1) * len(images) * fabric.world_size / max(1e-9, time.monotonic() - start)
            values = f"loss {self.step.smoothed['loss']:.3f}  accuracy {100 * self.step.smoothed['accuracy']:.1f} %"
            self.bar.update(self.task, advance=1, values=f"{values}  {speed:.0f} images/s")
        if fabric.device.type == "cuda":
            torch.cuda.synchronize(fabric.device)
        self.bar.update(self.task, values="validation")
        return time.monotonic() - start

    def take_step(self) -> None:
        """Clip the gradients, take an optimiser step, and let schedule, averages and loggers follow."""
        state, optim = self.state, self.config.optim
        if optim.clip_norm:
            self.fabric.clip_gradients(self.module, self.optimizer, max_norm=optim.clip_norm, error_if_nonfinite=False)
        state.rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
        self.optimizer.step()
        state.optimizer.zero_grad()
        state.scheduler.step()
        for average in state.averages.values():
            average.update_parameters(state.model)
        if state.step % self.config.log.every_n_steps == 0:
            rates = {f"lr/{name}": rate for name, rate in state.rates.items()}
            self.fabric.log_dict({"step/loss": self.step.smoothed["loss"], **rates}, state.step)
        state.step += 1

    def check_losses(self) -> None:
        """Raise the `CalmError` of `diagnose` if a loss was not finite; this waits for the device."""
        bad = self.step.measures.first_bad_step()
        if bad is not None:
            raise diagnose(self.state.model, self.step.images, bad, self._where())

    def check_epoch(self) -> None:
        """Check losses and weights of an epoch before anything of it is measured or saved."""
        self.check_losses()
        check_weights(self.state.model, self.state.step, self._where())
        if self.fabric.world_size > 1:  # BatchNorm's statistics: those of the first process, whose model is saved
            averaged = [average.module for average in self.state.averages.values()]
            for buffer in (buffer for model in (self.state.model, *averaged) for buffer in model.buffers()):
                torch.distributed.broadcast(buffer, 0)

    def _where(self) -> str:
        rate = max(group["lr"] for group in self.state.optimizer.param_groups)
        return f"epoch {self.state.epoch + 1}, learning rate {rate:.3g}"

    def row(self, seconds: float, validation: Row) -> Row:
        """Return the epoch's row of metrics.csv; all processes must call this, as they add up what they measured."""
        rates = self.state.rates
        row: Row = {
            "epoch": self.state.epoch + 1,
            "step": self.state.step,
            "seconds": round(seconds, 3),
            "images_per_second": round(self.run.steps_per_epoch * self.config.batch_size / seconds, 1),
            "lr": max([rate for name, rate in rates.items() if name.startswith("backbone")] or rates.values()),
        }
        if self.config.method == "calm-em":
            row["temperature"] = self.step.temperature(self.state.step - 1)
        row |= self.step.measures.compute()
        self.step.measures.reset()
        return row | {f"val_{name}": value for name, value in validation.items()}

    def report_epoch(self) -> None:
        """Write the latest row to metrics.csv, log and loggers, and draw the panel."""
        state, row, step = self.state, self.state.history[-1], self.state.step - 1
        journal.write_table(self.run_dir / "metrics.csv", state.history)
        self.log(journal.epoch_line(row, self.config.epochs))
        numbers = {f"epoch/{name}": row[name] for name in row if name not in ("epoch", "step")}
        self.fabric.log_dict(numbers, step)
        if self.config.log.panel_images:
            images = journal.choose_images(self.datasets["val"].split, self.config.log.panel_images)
            picture = journal.draw_maps(self.evaluated(), self.datasets["val"], images, title=f"epoch {state.epoch}")
            with atomic_path(self.run_dir / "panels" / f"epoch_{state.epoch:03d}.png") as temporary:
                Image.fromarray(picture).save(temporary)
            for logger in self.fabric.loggers:
                if log_image := getattr(logger, "log_image", None):
                    log_image("panel", [picture], step=step)
        for logger in self.fabric.loggers:
            logger.save()

    def result(self) -> dict[str, Any]:
        """Test the last and the best weights as they were saved; all processes must call this."""
        self.fabric.barrier()  # the first process may still be writing what the others are about to read
        state = self.state
        result: dict[str, Any] = {}
        for name, measures in {"last": state.last, "best": state.best}.items():
            if name == "best" and measures["epoch"] == state.last["epoch"]:
                result["best"] = result["last"]
                continue
            weights = safetensors.torch.load_file(self.run_dir / name / WEIGHTS)
            if self.config.model.caches:
                weights = {key: value for key, value in weights.items() if key.startswith("head.")}
            state.evaluated.load_state_dict(weights)
            test = evaluate(self.fabric, state.evaluated, self.loaders["test"])
            validation = {key: value for key, value in measures.items() if key != "epoch"}
            result[name] = {"epoch": int(measures["epoch"]), "val": validation, "test": test}
        final = state.history[-1]
        result["train"] = {"loss": final["train_loss"], "accuracy": final["train_accuracy"]}
        result["images_per_second"] = statistics.median(row["images_per_second"] for row in state.history)
        result["seconds"] = round(sum(row["seconds"] for row in state.history), 1)
        return result


def evaluate(fabric: Fabric, model: CalmModel, loader: DataLoader[Any]) -> Row:
    """Measure the classification of a split, over all processes, in float32.

    The ``loader`` has this process's share of the images.

    Returns:
        ``accuracy`` and, with more than five classes, ``top5`` (both 0 to 1), ``nll`` (nats) and ``ece``.
    """
    # The sums of the metric are float64, which Apple's GPUs do not have.
    measures = Classification(replicates=0).to("cpu" if fabric.device.type == "mps" else fabric.device)
    with evaluation_mode(model), torch.no_grad():
        for batch in loader:
            images, labels, indices = fabric.to_device(batch)
            probs = model(images).probs
            measures.update(*(value.to(measures.device) for value in (probs, labels, indices)))
    found = measures.compute()
    top5 = {"top5": found.top5.value} if model.config.num_classes > 5 else {}
    return {"accuracy": found.top1.value, **top5, "nll": found.nll.value, "ece": found.ece.value}


def _with_precision(config: TrainConfig) -> tuple[TrainConfig, str]:
    """Return the configuration with the precision that ``auto`` stands for here, and a line that says why."""
    hardware = config.hardware
    if hardware.precision != "auto":
        return config, ""
    precision, why = automatic_precision(_fabric(replace(hardware, precision="32-true")).device)
    return replace(config, hardware=replace(hardware, precision=precision)), f"precision {precision}: {why}"


def _fabric(hardware: Hardware) -> Fabric:
    options = {name: getattr(hardware, name) for name in ("accelerator", "devices", "strategy", "precision")}
    try:
        return Fabric(num_nodes=hardware.nodes, **options)
    except (ValueError, RuntimeError, TypeError) as error:
        raise CalmError(f"these settings do not work here: {hardware}\n{error}\nThe defaults (auto) do") from error


@contextmanager
def _launched(fabric: Fabric) -> Iterator[None]:
    """Run the block in all processes of a run; SIGTERM raises SystemExit in it, with the code of a terminated process.

    The other processes, if this one started them, do not outlive an error in this one.
    """

    def terminate(*_: object) -> NoReturn:
        raise SystemExit(128 + signal.SIGTERM)

    main_thread = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, terminate) if main_thread else None
    try:
        fabric.launch()
        yield
    except BaseException:
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.kill()
        raise
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, former or signal.SIG_DFL)


@contextmanager
def _process_settings(hardware: Hardware) -> Iterator[None]:
    """Silence Fabric's messages and choose deterministic algorithms, if asked for, while the block runs."""
    # Importing Fabric imports Lightning's Trainer, whose logger then says what Fabric has to say.
    loggers = [logging.getLogger(name) for name in ("lightning.fabric", "lightning.pytorch")]
    levels, deterministic = [logger.level for logger in loggers], torch.are_deterministic_algorithms_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    if hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
