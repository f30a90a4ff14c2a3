"""`train`: from a configuration to a run folder. The training loop, in reading order.

What result.json says of a run::

    {"last": {"epoch": 30, "val": {"accuracy": 0.731, "nll": 1.02, "ece": 0.05}, "test": {...}}, "best": {...},
     "train": {"loss": ..., "accuracy": ...}, "images_per_second": 181.5, "seconds": 1490.2}
"""

from __future__ import annotations

import logging
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.wrappers import _FabricModule
from torch import nn
from torch.utils.data import DataLoader

from calm.checkpoint import WEIGHTS
from calm.data.dataset import EpochSampler, ImageDataset
from calm.data.loading import summary
from calm.data.records import Report, Split
from calm.data.seeds import mix_seed
from calm.errors import CalmError
from calm.files import read_json, write_json
from calm.metrics.classification import Classification
from calm.model import CalmModel
from calm.train import checkpoints, folder
from calm.train.checkpoints import Row, TrainingState
from calm.train.config import Hardware, RunLength, TrainConfig
from calm.train.data import build_datasets, build_loader, build_model, read_splits, run_length
from calm.train.guard import Position, check_weights, diagnose
from calm.train.journal import Loggers, ProgressBar, RunLog, epoch_line, logger_class, write_table
from calm.train.optim import Average, build_optimizer, build_scheduler
from calm.train.panel import choose_images, draw_epoch
from calm.train.step import TrainingStep

__all__ = ["evaluate", "optimizer_step", "train"]


def train(
    config: TrainConfig,
    *,
    backbone: nn.Module | None = None,
    loggers: Iterable[Logger] = (),
    quiet: bool = False,
) -> Path:
    """Train a model and write everything about it to a run folder.

    Called again with the same configuration it continues an unfinished run after its last whole epoch, with the same
    final weights as if it had never stopped, and returns at once if the run is finished.

    Args:
        config: the run.
        backbone: your own module instead of the named backbone: images (B, 3, H, W) to features (B, D, h, w).
            ``config.backbone`` is then only its name. Its start weights are yours to seed.
        loggers: loggers of Lightning or Fabric that get curves and pictures, beside those that ``config.log.loggers``
            names. They are closed at the end.
        quiet: print nothing; log.txt is written in any case.

    Returns:
        The run folder. ``calm.load(folder)`` gives the best model; `calm.train.folder` lists the files.

    Raises:
        CalmError: a configuration, data set or run folder that cannot work, found before training starts; or a loss
            that became NaN or infinite, with step and likely cause.
        KeyboardInterrupt: after Ctrl-C, when log.txt says after which epoch the same command continues.
        SystemExit: the same after SIGTERM, with code 143.
    """
    run_dir = config.run_dir or folder.default_run_dir(config)
    first = folder.is_first_process()
    log = RunLog(quiet=quiet or not first)
    state = folder.inspect(run_dir, config) if first else "unfinished"
    if state == "finished" or (run_dir / "result.json").exists():
        log(f"{run_dir} is finished; delete it or choose another --run_dir to train again")
        return run_dir
    for name in config.log.loggers:
        logger_class(name)
    splits, report = read_splits(config, progress=log.interactive)
    data = _describe(splits, report)
    run = run_length(len(splits["train"].records), config)
    with torch.random.fork_rng(), _process_settings(config.hardware):
        torch.manual_seed(mix_seed(config.seed) >> 1)
        model = build_model(config, splits["train"], backbone)
        model.training_summary = {
            "data": config.data.name,
            "fingerprint": data["fingerprint"],
            "seed": config.seed,
        }
        datasets = build_datasets(config, splits, model.preprocessing)
        fabric = _fabric(config.hardware)
        if first:
            _open_folder(run_dir, config, data)
            log.path = run_dir / "log.txt"
            log(_opening_line(config, run_dir, splits, report, model))
        with _launched(fabric):
            _train(fabric, model, config, run, datasets, run_dir, log, loggers)
    return run_dir


def _train(
    fabric: Fabric,
    model: CalmModel,
    config: TrainConfig,
    run: RunLength,
    datasets: Mapping[str, ImageDataset],
    run_dir: Path,
    log: RunLog,
    more_loggers: Iterable[Logger],
) -> None:
    """Train on this process's device, from the start or from the checkpoint in the run folder, and test."""
    model.to(fabric.device)
    averages: dict[str, Average] = {}
    if config.loss.posterior == "ema":
        averages["teacher"] = Average(model, config.loss.teacher_decay)
    if config.optim.ema_decay:
        averages["ema"] = Average(model, config.optim.ema_decay)
    optimizer = build_optimizer(model, config.backbone, config.lr, config.optim)
    scheduler = build_scheduler(optimizer, config.optim, run)
    state = TrainingState(model, averages, optimizer, scheduler, fabric.strategy.precision)
    if config.hardware.compile:
        model.backbone.compile()
    path = checkpoints.checkpoint_path(run_dir)
    if path.exists():
        log("continuing after the last whole epoch")
        checkpoints.restore(state, path)
        if fabric.is_global_zero:  # a kill may have come between the checkpoint and the saved models
            checkpoints.export(state, run_dir)
    step = TrainingStep(model, averages, config, run)
    module, wrapped_optimizer = fabric.setup(step, optimizer)
    loaders = {
        name: build_loader(dataset, config, fabric, shuffle=name == "train")
        for name, dataset in datasets.items()
    }
    drawn = choose_images(datasets["val"].split, config.log.panel_images)
    names = config.log.loggers if fabric.is_global_zero else ()
    more = more_loggers if fabric.is_global_zero else ()
    saved = state.epoch
    try:
        with Loggers(names, run_dir, state.step, more) as loggers, ProgressBar(log) as bar:
            loggers.hyperparameters(folder.flattened(folder.config_dict(config)))
            for epoch in range(state.epoch, config.epochs):
                bar.start_epoch(f"epoch {epoch + 1}/{config.epochs}", len(loaders["train"]))
                seconds = _train_epoch(
                    fabric, module, wrapped_optimizer, state, loaders["train"], loggers, bar
                )
                bar.show("validation")
                _check_epoch(fabric, step, state)
                validation = evaluate(fabric, state.evaluated, loaders["val"])
                row = _row(step, state, run, seconds, validation)
                state.finish_epoch(row, validation)
                if fabric.is_global_zero:
                    write_table(run_dir / "metrics.csv", state.history)
                    log(epoch_line(row, config.epochs))
                    numbers = {f"epoch/{name}": row[name] for name in row if name not in ("epoch", "step")}
                    loggers.metrics(numbers, state.step - 1)
                    if drawn:
                        picture_path = run_dir / "panels" / f"epoch_{epoch + 1:03d}.png"
                        title = f"epoch {epoch + 1}"
                        picture = draw_epoch(
                            state.evaluated, datasets["val"], drawn, picture_path, title=title
                        )
                        loggers.image("panel", picture, state.step - 1)
                    loggers.save()
                    checkpoints.save_checkpoint(state.state_dict(), path)
                    saved = state.epoch
                    checkpoints.export(state, run_dir)
        result = _result(fabric, state, run_dir, loaders["test"])
    except (KeyboardInterrupt, SystemExit):
        ahead = f"continues after epoch {saved}" if saved else "starts again: no epoch was finished"
        log(f"interrupted: the same command {ahead}")
        raise
    if fabric.is_global_zero:
        write_json(run_dir / "result.json", result)
        log(_closing_lines(result, run_dir))
    fabric.barrier()


def _train_epoch(
    fabric: Fabric,
    module: _FabricModule,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    loader: DataLoader[Any],
    loggers: Loggers,
    bar: ProgressBar,
) -> float:
    """Take the optimiser steps of an epoch.

    Args:
        fabric: launched.
        module: the `TrainingStep`, as Fabric wrapped it.
        optimizer: that of ``state``, as Fabric wrapped it.
        state: of the run; changed.
        loader: of this process's share of the training images.
        loggers: get loss and learning rates.
        bar: shows progress.

    Returns:
        Its duration in seconds.

    Raises:
        CalmError: the loss of a batch was not finite.
    """
    step: TrainingStep = module.module  # type: ignore[assignment]
    config = step.config
    assert isinstance(loader.sampler, EpochSampler)
    loader.sampler.set_epoch(state.epoch)
    # What is random inside the network (dropout) is a function of seed, epoch and process.
    torch.manual_seed(mix_seed(config.seed, state.epoch, fabric.global_rank) >> 1)
    start = time.monotonic()
    for index, batch in enumerate(loader):
        images, targets, _ = fabric.to_device(batch)
        if config.hardware.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        whole = (index + 1) % config.optim.accumulate == 0
        place = {"epoch": state.epoch, "step": state.step, "index": index, "rank": fabric.global_rank}
        with fabric.no_backward_sync(module, enabled=not whole):
            loss = module(images, targets, **place)
            # On the CPU there is nothing to wait for: every loss is looked at.
            if fabric.device.type == "cpu" or step.looks_at(state.step, index):
                _stop_if_not_finite(step, state)
            fabric.backward(loss / config.optim.accumulate)
        if whole:
            optimizer_step(fabric, module, optimizer, state)
            done = state.step - 1
            if done % config.log.every_n_steps == 0:
                rates = {f"lr/{name}": rate for name, rate in state.rates.items()}
                loggers.metrics({"step/loss": step.shown["loss"], **rates}, done)
        bar.advance(len(images) * fabric.world_size, step.shown)
    if fabric.device.type == "cuda":
        torch.cuda.synchronize(fabric.device)
    return time.monotonic() - start


def optimizer_step(
    fabric: Fabric, module: _FabricModule, optimizer: torch.optim.Optimizer, state: TrainingState
) -> None:
    """Clip the gradients, take a step with them, and let schedule and averages follow."""
    step: TrainingStep = module.module  # type: ignore[assignment]
    if step.config.optim.clip_norm:
        clip_norm = step.config.optim.clip_norm
        fabric.clip_gradients(module, optimizer, max_norm=clip_norm, error_if_nonfinite=False)
    state.rates = {group["name"]: group["lr"] for group in state.optimizer.param_groups}
    optimizer.step()
    state.optimizer.zero_grad()
    state.scheduler.step()
    for average in state.averages.values():
        average.update_parameters(state.model)
    state.step += 1


def _position(state: TrainingState) -> Position:
    return Position(state.epoch, state.step, max(group["lr"] for group in state.optimizer.param_groups))


def _stop_if_not_finite(step: TrainingStep, state: TrainingState) -> None:
    bad = step.guard.first_bad()
    if bad is not None:
        raise diagnose(state.model, step.images, bad, _position(state))


def _check_epoch(fabric: Fabric, step: TrainingStep, state: TrainingState) -> None:
    """Look at the epoch that was just trained before anything of it is measured or saved.

    Raises:
        CalmError: a loss or a weight was not finite.
    """
    _stop_if_not_finite(step, state)
    check_weights(state.model, _position(state))
    if (
        fabric.world_size > 1
    ):  # BatchNorm's statistics: those of the first process, whose model is the one saved
        for model in (state.model, *(average.module for average in state.averages.values())):
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)


def _row(step: TrainingStep, state: TrainingState, run: RunLength, seconds: float, validation: Row) -> Row:
    """The row of metrics.csv; every process must come here."""
    row: Row = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "seconds": round(seconds, 3),
        "images_per_second": round(run.steps_per_epoch * step.config.batch_size / seconds, 1),
        "lr": min(state.rates.values()),
    }
    if step.config.method == "calm-em":
        row["temperature"] = step.temperature(state.step - 1)
    row |= step.measures.compute()
    step.measures.reset()
    return row | {f"val_{name}": value for name, value in validation.items()}


@torch.no_grad()
def evaluate(fabric: Fabric, model: CalmModel, loader: DataLoader[Any]) -> Row:
    """Measure the classification of a split, over all processes.

    Args:
        fabric: launched.
        model: in any mode; it is left in the mode it was in.
        loader: this process's share of the images.

    Returns:
        ``accuracy`` and, with more than five classes, ``top5`` (both 0 to 1), ``nll`` (nats) and ``ece``.
    """
    # Its sums are float64, which Apple's GPUs do not have.
    measures = Classification(replicates=0).to("cpu" if fabric.device.type == "mps" else fabric.device)
    training = model.training
    model.eval()
    for batch in loader:
        images, labels, indices = fabric.to_device(batch)
        with fabric.autocast():
            probs = model(images).probs
        measures.update(*(value.to(measures.device) for value in (probs, labels, indices)))
    model.train(training)
    found = measures.compute()
    top5 = {"top5": found.top5.value} if model.config.num_classes > 5 else {}
    return {"accuracy": found.top1.value, **top5, "nll": found.nll.value, "ece": found.ece.value}


def _result(fabric: Fabric, state: TrainingState, run_dir: Path, loader: DataLoader[Any]) -> dict[str, Any]:
    """Test the last and the best weights, as they were saved; every process takes part."""
    fabric.barrier()  # the first process may still be writing what the others are about to read
    result: dict[str, Any] = {}
    for name, measures in {"last": state.last, "best": state.best}.items():
        validation = {key: value for key, value in measures.items() if key != "epoch"}
        if name == "best" and measures["epoch"] == state.last["epoch"]:
            test = result["last"]["test"]
        else:
            state.evaluated.load_state_dict(safetensors.torch.load_file(run_dir / name / WEIGHTS))
            test = evaluate(fabric, state.evaluated, loader)
        result[name] = {"epoch": int(measures["epoch"]), "val": validation, "test": test}
    final = state.history[-1]
    result["train"] = {"loss": final["train_loss"], "accuracy": final["train_accuracy"]}
    result["images_per_second"] = statistics.median(row["images_per_second"] for row in state.history)
    result["seconds"] = round(sum(row["seconds"] for row in state.history), 1)
    return result


def _closing_lines(result: dict[str, Any], run_dir: Path) -> str:
    lines = []
    for name in ("best", "last"):
        val, test = result[name]["val"], result[name]["test"]
        lines.append(
            f"{name} (epoch {result[name]['epoch']}): validation accuracy {100 * val['accuracy']:.1f} %, test accuracy"
            f" {100 * test['accuracy']:.1f} %, nll {test['nll']:.3f}, calibration error {test['ece']:.3f}"
        )
    return "\n".join([*lines, f"done in {result['seconds']:.0f} s of training: {run_dir}"])


def _opening_line(
    config: TrainConfig, run_dir: Path, splits: Mapping[str, Split], report: Report, model: CalmModel
) -> str:
    counts = ", ".join(f"{len(split.records):,} {name}" for name, split in splits.items())
    left = sum(report.left_out(name) for name in splits)
    skipped = f" ({left:,} bad ones skipped)" if left else ""
    weights = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{config.method} with {config.backbone} ({weights / 1e6:.1f} million weights) on {config.data.name}:"
        f" {splits['train'].num_classes} classes, {counts} images{skipped}; run folder {run_dir}"
    )


def _describe(splits: Mapping[str, Split], report: Report) -> dict[str, Any]:
    described = {name: summary(split) for name, split in splits.items()}
    return {"fingerprint": described["train"]["fingerprint"], "splits": described, "check": report.summary}


def _open_folder(run_dir: Path, config: TrainConfig, data: dict[str, Any]) -> None:
    """Write what is known before training; a run that is continued must have the same data."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "data.json"
    if path.exists():
        former = read_json(path)
        if not isinstance(former, dict) or former.get("fingerprint") != data["fingerprint"]:
            raise CalmError(
                f"{run_dir} was trained on other data than {config.data} holds now: use another --run_dir"
            )
    folder.write_config(config, run_dir)
    write_json(run_dir / "versions.json", folder.versions())
    write_json(path, data)


def _fabric(hardware: Hardware) -> Fabric:
    """Set up devices, processes and precision; nothing is started yet."""
    try:
        return Fabric(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            num_nodes=hardware.nodes,
            strategy=hardware.strategy,
            precision=hardware.precision,
        )
    except (ValueError, RuntimeError, TypeError) as error:  # MisconfigurationException is none of Fabric's
        raise CalmError(f"these hardware settings do not work here: {hardware}\n{error}") from error


@contextmanager
def _launched(fabric: Fabric) -> Iterator[None]:
    """Run the block in all processes of a run. SIGTERM raises SystemExit in it, with the code of a terminated process.

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
    logger = logging.getLogger("lightning.fabric")
    level, deterministic = logger.level, torch.are_deterministic_algorithms_enabled()
    logger.setLevel(logging.ERROR)
    if hardware.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        logger.setLevel(level)
