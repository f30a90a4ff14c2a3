"""The run folder: whether it is new, unfinished or finished, and the files that describe the run.

::

    RUN/config.yaml  versions.json  data.json  weights.json  log.txt  metrics.csv  result.json
        report.html  (of `calm train`)  splits.csv  (where val or test were taken from train)
        checkpoints/last.ckpt  checkpoints/best.ckpt  last/  best/  panels/epoch_001.png  tensorboard/
        features/  (of a frozen backbone, until the run is finished)
        .lock  (while a process trains)
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from calm.data.records import Split
from calm.errors import CalmError
from calm.files import held_alone, read_json, remove_abandoned, write_json, write_text
from calm.train.config import TrainConfig
from calm.train.settings import read_settings

FREE_FIELDS = {"run_dir", "reading.workers", "reading.cache", "model.feature_dir", "log.every_n_steps", "log.loggers"}
FREE_FIELDS |= {"data", "reading.metadata_root"}  # the data may have moved: `open_folder` compares their fingerprint
"""Fields that change nothing about the result: a run may be continued with other values."""


def default_run_dir(config: TrainConfig) -> Path:
    """Return ``runs/DATA-BACKBONE-METHOD``, so that the same command finds its run again."""
    backbone = re.sub(r"[^\w.+-]+", "-", config.backbone).strip("-")
    return Path("runs") / f"{config.data.resolve().name}-{backbone}-{config.method}"


def is_first_process() -> bool:
    """Return whether this process writes files, from the launcher's environment: nothing needs to be set up yet."""
    ranks = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ]
    return ranks[:1] in ([], ["0"])


def check_folder(run_dir: Path, config: TrainConfig) -> bool:
    """Return whether a folder is new; else it holds this run, perhaps with fewer epochs.

    Raises:
        CalmError: the folder holds something else, or a run with another configuration: the message names the fields.
    """
    path = run_dir / "config.yaml"
    remove_abandoned(run_dir)
    if not path.exists():
        if run_dir.exists() and not run_dir.is_dir():
            raise CalmError(f"run_dir {run_dir} is a file")
        if any(path.name != LOCK for path in run_dir.glob("*")):
            raise CalmError(f"folder {run_dir} is not empty and holds no run: choose another with --run_dir")
        return True
    changed = differences(read_settings(path), config_dict(config))
    hint = ""
    if list(changed) == ["epochs"] and isinstance(former := changed["epochs"][0], int) and former < config.epochs:
        if not (whole := config.whole_run()):
            return False
        hint = f"\n{whole} goes over the whole run: more epochs would change its first step already; to go on from its"
        hint += f" weights give --model.init_from {run_dir}"
    if changed:
        known = flattened(config_dict(config))
        listed = "\n".join(
            f"  {name}: {old!r:.200} there, " + (f"{new!r} now" if name in known else "no setting of this version")
            for name, (old, new) in changed.items()
        )
        raise CalmError(
            f"folder {run_dir} holds a run with another configuration:\n{listed}\n"
            f"choose another folder with --run_dir, or delete that one{hint}"
        )
    return False


def is_finished(run_dir: Path, config: TrainConfig) -> bool:
    """Return whether a folder, which `check_folder` passes, holds this whole run, on data that have not moved."""
    if not (run_dir / "result.json").exists():
        return False
    former, now = read_settings(run_dir / "config.yaml"), config_dict(config)
    return all(former.get(name) == now[name] for name in ("epochs", "data"))


def differences(former: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields whose values differ, as (former, now), by dotted name, without those that change no result.

    >>> differences({"lr": 0.1, "optim": {"name": "sgd"}}, {"lr": 0.1, "optim": {"name": "adamw"}})
    {'optim.name': ('sgd', 'adamw')}
    """
    old, new = flattened(former), flattened(now)
    names = [name for name in {**old, **new} if name not in FREE_FIELDS]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def unknown_settings(path: Path) -> list[str]:
    """Return the settings of a configuration file, by dotted name, that `TrainConfig` lacks."""
    former = flattened(read_settings(path)) if path.is_file() else {}
    return sorted(former.keys() - flattened(config_dict(TrainConfig(data=Path()))).keys())


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """Return the configuration as plain values for YAML; paths are absolute, so that it works from any folder."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=lambda path: str(path.resolve())))
    return plain


LOCK = ".lock"


@contextmanager
def held(run_dir: Path, first: bool = True) -> Iterator[None]:
    """Keep other processes from training in a folder during the block; without effect in all but the first process.

    Raises:
        CalmError: another process trains there: the message names it.
    """
    if not first:
        yield
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    with held_alone(run_dir / LOCK, f"{run_dir} is being trained in by", "wait for it, or choose another --run_dir"):
        try:
            yield
        finally:
            (run_dir / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # something has begun
                run_dir.rmdir()


def open_folder(run_dir: Path, config: TrainConfig, data: dict[str, Any]) -> None:
    """Write what is known before training, config.yaml, versions.json and data.json, to a new or unfinished folder.

    Raises:
        CalmError: the folder holds a run on other data. A warning says if files of the same names have other sizes.
    """
    path = run_dir / "data.json"
    if path.exists():
        former = read_json(path)
        before, now = _fingerprints(former), _fingerprints(data)
        if changed := [name for name in now if before.get(name) != now[name]]:
            which = f"{config.data} holds now ({', '.join(changed)} changed)"
            raise CalmError(f"{run_dir} was trained on other data than {which}: use another --run_dir")
        sizes = _fingerprints(former, "file_sizes")
        if replaced := [
            name for name, mark in _fingerprints(data, "file_sizes").items() if sizes.get(name, mark) != mark
        ]:
            files = f"files of {' and '.join(replaced)} in {config.data}"
            warnings.warn(f"{files} have other sizes than when {run_dir} began: were pictures replaced?", stacklevel=3)
    (run_dir / "result.json").unlink(missing_ok=True)  # more epochs follow, or the data have moved
    write_config(config, run_dir)
    write_json(run_dir / "versions.json", versions())
    write_json(path, data)


def _fingerprints(data: Any, which: str = "fingerprint") -> dict[str, Any]:
    """Return a fingerprint of each split that a data.json describes; nothing of a damaged one."""
    splits = data.get("splits") if isinstance(data, dict) else None
    found = splits.items() if isinstance(splits, dict) else ()
    return {name: split.get(which) for name, split in found if isinstance(split, dict)}


def write_splits(splits: Mapping[str, Split], run_dir: Path) -> None:
    """Write splits.csv, which lists the split and the path of every image, for data whose splits were carved."""
    file = io.StringIO()
    rows = ((name, record.id) for name, split in splits.items() for record in split.records)
    csv.writer(file, lineterminator="\n").writerows([("split", "image"), *rows])
    write_text(run_dir / "splits.csv", file.getvalue())


def write_config(config: TrainConfig, run_dir: Path) -> None:
    """Write every field of the configuration to config.yaml, also those at their default."""
    write_text(run_dir / "config.yaml", yaml.safe_dump(config_dict(config), sort_keys=False, allow_unicode=True))


def versions() -> dict[str, Any]:
    """Return the versions of packages and Python, and the machine and devices that the run uses."""
    names = ("calm", "torch", "torchvision", "lightning", "torchmetrics", "timm", "numpy", "pillow")
    return {
        "packages": {name: _version(name) for name in names},
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def _version(package: str) -> str | None:
    """Return the version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
