"""Training: configuration, the loop on Lightning Fabric, the run folder. Names are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.train.config import TrainConfig, load_config, preset
    from calm.train.run import train

__all__ = ["TrainConfig", "load_config", "preset", "train"]

_HOME = {
    "TrainConfig": "calm.train.config",
    "load_config": "calm.train.config",
    "preset": "calm.train.config",
    "train": "calm.train.run",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
