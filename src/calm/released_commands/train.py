"""main.py: train as the released code does, and leave the files that it leaves."""

from __future__ import annotations

from pathlib import Path

from calm.data.loading import load_split
from calm.errors import CalmError
from calm.files import read_torch
from calm.model import load
from calm.released import FILE_NAME, save_released
from calm.released_commands.experiment import Performance, check_place, clear, finished
from calm.released_commands.flags import RULE, Flags, Log
from calm.released_commands.weights import check_pretrained, load_model, proxy_lists, test_split, transplant
from calm.train import TrainConfig, preset, train
from calm.train.optim import build_optimizer


def main(flags: Flags) -> None:
    """Train, unless ``--is_train=False``; test the last epoch's weights; write everything to the experiment's folder.

    An interrupted experiment continues after its last complete epoch.

    Raises:
        CalmError: data, weights or a folder that cannot work; before training starts.
    """
    check_place(flags)
    log = Log(flags.folder / "log.log")
    if flags.is_train:
        _train(flags, log)
    else:
        _only_test(flags, log)


def train_config(flags: Flags, *, lists: Path, start: Path | None = None) -> TrainConfig:
    """Return the flags as this package's training configuration, on the preset ``released``, with the metadata lists in
    ``lists``; ``start`` is a saved model to start from in place of ImageNet's weights."""
    settings = {
        "data": flags.images,
        "method": flags.method,
        "backbone": flags.architecture,
        "epochs": flags.epochs,
        "batch_size": flags.batch_size,
        "lr": flags.lr,
        "seed": flags.seed or 0,
        "run_dir": flags.folder / "run",
        "reading.layout": "metadata",
        "reading.metadata_root": lists,
        "reading.image_size": flags.crop_size,
        "reading.workers": flags.workers,
        "augment.resize_ratio": flags.resize_size / flags.crop_size,
        "model.pretrained": flags.pretrained and start is None,
        "model.large_feature_map": flags.large_feature_map,
        "model.use_bn": flags.batch_norm,
        "optim.momentum": flags.momentum,
        "optim.weight_decay": flags.weight_decay,
        "optim.head_ratio": flags.lr_classifier_ratio,
        "optim.step_epochs": flags.lr_decay_frequency,
        "optim.grouping": "head" if flags.is_different_checkpoint else "released",
    }
    if start is not None:
        settings["model.init_from"] = start
    return preset("released", *(f"--{name}={value}" for name, value in settings.items()))


def _train(flags: Flags, log: Log) -> None:
    if finished(flags) and not flags.override_cache:
        raise CalmError(
            f"experiment with the same name exists: {flags.folder} holds a finished training. Choose another "
            "--experiment_name, or --override_cache=True to delete it and train anew"
        )
    train_config(flags, lists=flags.lists)  # refuses wrong values before anything is read or written
    split = load_split(flags.images, "train", layout="metadata", metadata_root=flags.lists)
    if flags.pretrained and not flags.use_load_checkpoint:
        check_pretrained(flags)
    source = load_model(flags) if flags.use_load_checkpoint else None
    if flags.override_cache:
        clear(flags)
    lists = proxy_lists(flags) if flags.proxy_training_set else flags.lists
    start = None
    if source is not None:
        if flags.is_different_checkpoint:
            source = transplant(source, split.num_classes, seed=flags.seed or 0)
        start = source.save_pretrained(flags.folder / "start")
    config = train_config(flags, lists=lists, start=start)
    log(f"{flags}\nLoading model {flags.architecture}")
    run_dir = train(config)
    _export(config, run_dir, flags.folder / FILE_NAME)
    performance = Performance.of_run(run_dir)
    for line in performance.epoch_lines():
        log(line)
    log(f"{RULE}\nFinal epoch evaluation on test set ...")
    performance.save(flags.folder)
    log(performance.last_lines())


def _only_test(flags: Flags, log: Log) -> None:
    from calm.evaluate.classification import classification
    from calm.evaluate.subject import model_subject

    model = load_model(flags)
    split = test_split(flags, model)
    flags.folder.mkdir(parents=True, exist_ok=True)
    log(f"{flags}\n{RULE}\nFinal epoch evaluation on test set ...")
    result = classification(
        model_subject(model), split, batch_size=flags.batch_size, workers=flags.workers, progress=None
    )
    performance = Performance.read(flags.folder)
    performance.values["test"]["cls"] = [100 * result.figures["top1"].value]
    performance.save(flags.folder)
    log(performance.last_lines())


def _export(config: TrainConfig, run_dir: Path, path: Path) -> None:
    """Write the last epoch's weights and the optimiser's state in the released format."""
    model = load(run_dir / "last")
    state = read_torch(run_dir / "checkpoints" / "last.ckpt", "checkpoint")
    optimizer = build_optimizer(model, config.backbone, config.lr, config.optim)
    optimizer.load_state_dict(state["optimizer"])
    save_released(model, path, epoch=config.epochs, optimizer=optimizer)
