"""Training: configuration, the loop on Lightning, the run folder. Names are loaded when first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.train.command import load_config, preset
    from calm.train.config import TrainConfig
    from calm.train.run import train

__all__ = ["TrainConfig", "load_config", "preset", "train"]

_HOME = {"TrainConfig": "config", "load_config": "command", "preset": "command", "train": "run"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
