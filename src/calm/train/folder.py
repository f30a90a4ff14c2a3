"""The run folder: new, to be continued, or finished; and what is written about the run beside its results.

::

    RUN/config.yaml  versions.json  data.json  log.txt  metrics.csv  result.json
        checkpoints/last.ckpt  checkpoints/best.ckpt  last/  best/  panels/epoch_001.png  tensorboard/
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from calm.errors import CalmError
from calm.files import read_yaml, remove_abandoned, write_text
from calm.train.config import TrainConfig

__all__ = ["RunState", "config_dict", "default_run_dir", "differences", "inspect", "versions", "write_config"]

RunState = Literal["new", "unfinished", "finished"]
FREE_FIELDS = {"run_dir", "reading.workers", "reading.cache", "log.every_n_steps"}
"""Fields that change nothing about the result: a run may be continued with other values."""


def default_run_dir(config: TrainConfig) -> Path:
    """``runs/DATA-BACKBONE-METHOD``, so that the same command finds its run again."""
    backbone = config.backbone.replace("/", "-")
    return Path("runs") / f"{config.data.resolve().name}-{backbone}-{config.method}"


def inspect(run_dir: Path, config: TrainConfig, *, flag: str = "--run_dir") -> RunState:
    """Find out what is to be done with a run folder.

    Args:
        run_dir: the folder.
        config: of the run that is to be in it.
        flag: the option that names another folder, for the messages.

    Raises:
        CalmError: the folder holds something else, or a run with another configuration: the message names the fields.
    """
    path = run_dir / "config.yaml"
    remove_abandoned(run_dir)
    if not path.exists():
        if run_dir.exists() and not run_dir.is_dir():
            raise CalmError(f"run_dir {run_dir} is a file")
        if run_dir.exists() and any(run_dir.iterdir()):
            raise CalmError(f"folder {run_dir} is not empty and holds no run: choose another with {flag}")
        return "new"
    former = read_yaml(path, "configuration")
    if not isinstance(former, dict):
        raise CalmError(f"configuration {path} is no list of 'setting: value'")
    changed = differences(former, config_dict(config))
    if changed:
        listed = "\n".join(
            f"  {name}: {old!r:.200} there, {new!r} now" for name, (old, new) in changed.items()
        )
        raise CalmError(
            f"folder {run_dir} holds a run with another configuration:\n{listed}\n"
            f"choose another folder with {flag}, or delete that one"
        )
    return "finished" if (run_dir / "result.json").exists() else "unfinished"


def differences(former: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields whose values differ, as (former, now), by dotted name; fields that change no result are left out.

    >>> differences({"lr": 0.1, "optim": {"name": "sgd"}}, {"lr": 0.1, "optim": {"name": "adamw"}})
    {'optim.name': ('sgd', 'adamw')}
    """
    old, new = dict(_leaves(former)), dict(_leaves(now))
    names = [name for name in {**old, **new} if name not in FREE_FIELDS]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def config_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as plain values for YAML; paths are absolute, so that it works from any folder."""
    plain: dict[str, Any] = _plain(config)
    return plain


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(member) for member in value]
    return str(value.resolve()) if isinstance(value, Path) else value


def write_config(config: TrainConfig, run_dir: Path) -> None:
    """Write config.yaml: every field, also those at their default."""
    write_text(
        run_dir / "config.yaml", yaml.safe_dump(config_dict(config), sort_keys=False, allow_unicode=True)
    )


def versions() -> dict[str, Any]:
    """What the run runs on: packages, Python, machine, devices."""
    packages: dict[str, str | None] = {}
    for name in ("calm", "torch", "torchvision", "lightning", "torchmetrics", "timm", "numpy", "pillow"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "packages": packages,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }
