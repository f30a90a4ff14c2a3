"""`train`: from a configuration to a run folder.

Lightning inside a library: no tips, no advice, and the process left as it was found.

The end of a run: the saved weights on the test images, and what result.json says.

::

    {"last": {"epoch": 30, "val": {"accuracy": 0.731, "nll": 1.02, "ece": 0.05}, "test": {...}}, "best": {...},
     "train": {"loss": ..., "accuracy": ...}, "images_per_second": 181.5, "seconds": 1490.2}
"""

from __future__ import annotations

import logging
import os
import signal
import statistics
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import safetensors.torch
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn

from calm.checkpoint import WEIGHTS
from calm.data.loading import summary
from calm.data.records import Report, Split
from calm.data.seeds import mix_seed
from calm.errors import CalmError
from calm.files import read_json, write_json
from calm.model import CalmModel
from calm.train import folder
from calm.train.checkpoints import AtomicCheckpointIO, Checkpoints
from calm.train.config import Run, TrainConfig
from calm.train.data import RunData, build_datasets, build_model, read_splits, steps_per_epoch
from calm.train.journal import History, ProgressBar, RunLog, TensorBoard
from calm.train.module import TrainingModule
from calm.train.panel import Panel

__all__ = ["closing_line", "measure_outcome", "train", "well_behaved_lightning"]

_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
_NOT_APPLICABLE = (
    ".*LeafSpec.* is deprecated.*",  # Lightning's own use of PyTorch
    ".*does not have many workers.*",  # a choice of the user's
    ".*GPU available but not used.*",  # the same
    ".*it is recommended to use .*single device.*",  # each test image is in exactly one process
    ".*number of training batches .* is smaller than the logging interval.*",  # nothing is logged through Lightning
)


@contextmanager
def well_behaved_lightning() -> Iterator[None]:
    """Silence messages that do not apply; afterwards restore the levels of Lightning's loggers, PyTorch's choice of
    deterministic algorithms, and Ctrl-C.

    Raises:
        KeyboardInterrupt: as it happened. (Lightning would end the process with code 1.)
        SystemExit: with 143 after SIGTERM, as a process that is ended by it. (Lightning would end with 0.)
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    interrupt = signal.getsignal(signal.SIGINT)
    deterministic = torch.are_deterministic_algorithms_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for pattern in _NOT_APPLICABLE:
                warnings.filterwarnings("ignore", message=pattern)
            yield
    except SIGTERMException as stop:
        raise SystemExit(128 + signal.SIGTERM) from stop
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from stop
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
    splits, report = read_splits(config, progress=log.console.is_terminal and not log.console.quiet)
    data = _describe(splits, report)
    run = Run(config.epochs, steps_per_epoch(len(splits["train"].records), config))
    with torch.random.fork_rng(), well_behaved_lightning():
        torch.manual_seed(mix_seed(config.seed) >> 1)
        model = build_model(config, splits["train"], backbone)
        model.training_summary = {
            "data": config.data.name,
            "fingerprint": data["fingerprint"],
            "seed": config.seed,
        }
        module = TrainingModule(model, config, run)
        if config.hardware.compile:
            model.backbone.compile()
        datasets = build_datasets(config, splits, model.preprocessing)
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


def _describe(splits: Mapping[str, Split], report: Report) -> dict[str, Any]:
    described = {name: summary(split) for name, split in splits.items()}
    return {"fingerprint": described["train"]["fingerprint"], "splits": described, "check": report.summary}


def _open_folder(run_dir: Path, config: TrainConfig, data: dict[str, Any]) -> None:
    """Write what is known before training, or see that a run to be continued has the same data."""
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
    checkpoints = Checkpoints(run_dir, log)
    callbacks: list[pl.Callback] = [board, ProgressBar(log.console), history, checkpoints]
    if config.log.panel_images:
        panel = Panel(run_dir / "panels", data.datasets["val"], config.log.panel_images, board)
        callbacks.insert(-1, panel)
    trainer = _trainer(config, run_dir, callbacks)
    resume = checkpoints.path if checkpoints.path.exists() else None
    if resume is not None:
        log("continuing after the last whole epoch")
    try:
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    except CalmError:
        raise
    except Exception as error:
        if resume is None or checkpoints.restored:
            raise
        # Lightning and torch check what they restore where they use it, each by an exception of its own.
        raise CalmError(
            f"cannot continue from {resume}: it does not fit this run ({type(error).__name__}: {str(error)[:500]});"
            " delete the run folder to train from the start"
        ) from error
    result = measure_outcome(trainer, module, data, history, checkpoints)
    if trainer.is_global_zero:
        write_json(run_dir / "result.json", result)
        log(closing_line(result, run_dir))
    trainer.strategy.barrier()


def _trainer(config: TrainConfig, run_dir: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
    hardware = config.hardware
    try:
        return pl.Trainer(
            accelerator=hardware.accelerator,
            devices=hardware.devices,
            num_nodes=hardware.nodes,
            strategy=hardware.strategy,
            precision=hardware.precision,
            deterministic=hardware.deterministic or None,
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
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise CalmError(f"these hardware settings do not work here: {hardware}\n{error}") from error
