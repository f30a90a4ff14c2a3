"""`train`: from a configuration to a run folder."""

from __future__ import annotations

import json
import logging
import os
import statistics
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import safetensors.torch
import torch
from torch import nn

from calm import checkpoint
from calm.atomic import write_json
from calm.data.check import load_checked
from calm.data.dataset import ImageDataset
from calm.data.digest import summary
from calm.data.randomness import mix_seed
from calm.data.records import Split
from calm.data.report import Report
from calm.data.transforms import eval_transform, train_transform
from calm.errors import CalmError
from calm.model import CalmModel, create_model
from calm.preprocess import Preprocessing
from calm.train import folder
from calm.train.checkpoints import AtomicCheckpointIO, Checkpoints, remove_leftovers
from calm.train.config import TrainConfig
from calm.train.data import RunData, steps_per_epoch
from calm.train.history import History
from calm.train.journal import ProgressBar, RunLog, TensorBoard
from calm.train.module import TrainingModule
from calm.train.panel import Panel
from calm.train.schedule import Run

__all__ = ["train"]


def train(config: TrainConfig, *, backbone: nn.Module | None = None, quiet: bool = False) -> Path:
    """Train a model and write everything about it to a run folder.

    Called again with the same configuration it continues an unfinished run after its last whole epoch, with the same
    final weights as if it had never stopped, and returns at once if the run is finished.

    Args:
        config: the run.
        backbone: your own module instead of the named backbone: images (B, 3, H, W) to features (B, D, h, w).
            ``config.backbone`` is then only its name. Its start weights are yours to seed.
        quiet: print nothing; log.txt is written in any case.

    Returns:
        The run folder. ``calm.load(folder)`` gives the best model; `calm.train.folder` lists the files.

    Raises:
        CalmError: a configuration, data set or run folder that cannot work, said before training starts; or a loss
            that became NaN or infinite, with step and likely cause.
    """
    run_dir = config.run_dir or folder.default_run_dir(config)
    first = _is_first_process()
    log = RunLog(None, quiet=quiet or not first)
    state = folder.inspect(run_dir, config) if first else "unfinished"
    if state == "finished" or (run_dir / "result.json").exists():
        log(f"{run_dir} is finished; delete it or choose another --run_dir to train again")
        return run_dir
    splits, report = _read(config, progress=log.console.is_terminal and not log.console.quiet)
    data = _describe(splits, report)
    run = Run(config.epochs, steps_per_epoch(len(splits["train"].records), config))
    with torch.random.fork_rng(), _quiet_lightning():
        torch.manual_seed(mix_seed(config.seed) >> 1)
        model = _build_model(config, splits["train"], backbone)
        model.training_summary = {
            "data": config.data.name,
            "fingerprint": data["fingerprint"],
            "seed": config.seed,
        }
        module = TrainingModule(model, config, run)
        datasets = _datasets(config, splits, model.preprocessing)
        if first:
            _open_folder(run_dir, config, data)
            log.path = run_dir / "log.txt"
            log(_opening(config, run_dir, splits, report, model))
        _run(module, RunData(datasets, config), run_dir, log)
    return run_dir


def _is_first_process() -> bool:
    """Whether this is the process that writes files, as launchers say before anything is set up."""
    ranks = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return next((rank for rank in ranks if rank is not None), "0") == "0"


def _read(config: TrainConfig, *, progress: bool) -> tuple[dict[str, Split], Report]:
    """The checked splits. What is carved into val and test does not depend on the run's seed."""
    reading = config.reading
    return load_checked(
        config.data,
        layout=reading.layout,
        metadata_root=reading.metadata_root,
        val_fraction=reading.val_fraction,
        present_classes_only=reading.present_classes_only,
        skip_bad=reading.skip_bad,
        progress=progress,
    )


def _describe(splits: Mapping[str, Split], report: Report) -> dict[str, Any]:
    described = {name: summary(split) for name, split in splits.items()}
    return {"fingerprint": described["train"]["fingerprint"], "splits": described, "check": report.summary}


def _build_model(config: TrainConfig, split: Split, backbone: nn.Module | None) -> CalmModel:
    options = config.model
    size = config.reading.image_size
    model = create_model(
        config.backbone if backbone is None else backbone,
        split.num_classes,
        config.method,
        options.large_feature_map,
        options.pretrained and backbone is None and options.init_from is None,
        use_bn=options.use_bn,
        output_stride=options.output_stride,
        prior_activation=options.prior_activation,
        prior_denominator=options.prior_denominator,
        class_names=split.class_names,
        preprocessing=Preprocessing(size=(size, size)),
    )
    if options.init_from is not None:
        _initialise(model, options.init_from, backbone)
    if config.hardware.channels_last:
        model.to(memory_format=torch.channels_last)
    if config.hardware.compile:
        model.backbone.compile()
    return model


def _initialise(model: CalmModel, source: str, backbone: nn.Module | None) -> None:
    """Start from the weights of a saved model: its backbone, and its head where the shapes are the same."""
    start = checkpoint.load(source, backbone=backbone)
    try:
        model.backbone.load_state_dict(start.backbone.state_dict())
    except RuntimeError as error:
        raise CalmError(
            f"model.init_from {source!r}: its backbone {start.config.backbone!r} is another one"
        ) from error
    own = model.head.state_dict()
    same = {name: value for name, value in start.head.state_dict().items() if own[name].shape == value.shape}
    if same.keys() == own.keys():
        model.head.load_state_dict(same)


def _datasets(
    config: TrainConfig, splits: Mapping[str, Split], preprocessing: Preprocessing
) -> dict[str, ImageDataset]:
    test = eval_transform(preprocessing)
    transforms = {"train": train_transform(config.augment, preprocessing), "val": test, "test": test}
    return {
        name: ImageDataset(split, transforms[name], seed=config.seed, cache=config.reading.cache)
        for name, split in splits.items()
    }


def _open_folder(run_dir: Path, config: TrainConfig, data: dict[str, Any]) -> None:
    """Write what is known before training, or see that a run to be continued has the same data."""
    run_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(run_dir)
    path = run_dir / "data.json"
    if path.exists():
        former = json.loads(path.read_text(encoding="utf-8"))
        if former["fingerprint"] != data["fingerprint"]:
            raise CalmError(
                f"{run_dir} was trained on other data than {config.data} holds now: use another --run_dir"
            )
    folder.write_config(config, run_dir)
    write_json(run_dir / "versions.json", folder.versions())
    write_json(path, data)


def _opening(
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


def _run(module: TrainingModule, data: RunData, run_dir: Path, log: RunLog) -> None:
    config = module.config
    board = TensorBoard(run_dir / "tensorboard")
    history = History(run_dir / "metrics.csv", log, board)
    checkpoints = Checkpoints(run_dir)
    callbacks: list[pl.Callback] = [board, ProgressBar(log.console), history, checkpoints]
    if config.log.panel_images:
        panel = Panel(run_dir / "panels", data.datasets["val"], config.log.panel_images, board)
        callbacks.insert(-1, panel)
    trainer = _trainer(config, run_dir, callbacks)
    resume = checkpoints.path if checkpoints.path.exists() else None
    if resume is not None:
        log("continuing after the last whole epoch")
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    result = _result(trainer, module, data, history, checkpoints)
    if trainer.is_global_zero:
        write_json(run_dir / "result.json", result)
        log(_closing(result, run_dir))
    trainer.strategy.barrier()


def _trainer(config: TrainConfig, run_dir: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
    hardware = config.hardware
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.nodes,
        strategy=hardware.strategy,
        precision=hardware.precision,
        max_epochs=config.epochs,
        accumulate_grad_batches=config.optim.accumulate,
        gradient_clip_val=config.optim.clip_norm or None,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        logger=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
    )


def _result(
    trainer: pl.Trainer, module: TrainingModule, data: RunData, history: History, checkpoints: Checkpoints
) -> dict[str, Any]:
    """Test the last and the best weights, as they were saved; every process takes part."""
    best, last = checkpoints.best, checkpoints.last
    result: dict[str, Any] = {}
    for name, measures in {"last": last, "best": best}.items():
        validation = {key: value for key, value in measures.items() if key != "epoch"}
        result[name] = {"epoch": int(measures["epoch"]), "val": validation}
        if name == "best" and best["epoch"] == last["epoch"]:
            result[name]["test"] = result["last"]["test"]
            continue
        weights = safetensors.torch.load_file(checkpoints.run_dir / name / "model.safetensors")
        module.evaluated.load_state_dict(weights)
        trainer.test(module, datamodule=data, verbose=False)
        result[name]["test"] = module.test
    final = history.rows[-1]
    result["train"] = {"loss": final["train_loss"], "accuracy": final["train_accuracy"]}
    result["images_per_second"] = statistics.median(row["images_per_second"] for row in history.rows)
    result["seconds"] = round(sum(row["seconds"] for row in history.rows), 1)
    return result


def _closing(result: dict[str, Any], run_dir: Path) -> str:
    lines = []
    for name in ("best", "last"):
        val, test = result[name]["val"], result[name]["test"]
        lines.append(
            f"{name} (epoch {result[name]['epoch']}): validation accuracy {100 * val['accuracy']:.1f} %, test accuracy"
            f" {100 * test['accuracy']:.1f} %, nll {test['nll']:.3f}, calibration error {test['ece']:.3f}"
        )
    return "\n".join([*lines, f"done in {result['seconds']:.0f} s of training: {run_dir}"])


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """No tips, no advice: Lightning's own messages and the warnings that do not apply to this loop are silenced."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for pattern in _NOT_APPLICABLE:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_NOT_APPLICABLE = (
    ".*LeafSpec.* is deprecated.*",  # Lightning's own use of PyTorch
    ".*does not have many workers.*",  # a choice of the user's
    ".*GPU available but not used.*",  # the same
    ".*it is recommended to use .*single device.*",  # each test image is in exactly one process
    ".*number of training batches .* is smaller than the logging interval.*",  # it does not log through Lightning
)
