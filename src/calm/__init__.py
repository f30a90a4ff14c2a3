"""CALM: image classifiers that say where they saw the evidence, as a probability.

Every public name is listed here once and imported when first used, so that ``import calm`` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.baselines import attribute as attribute
    from calm.cli.convert import convert as convert
    from calm.config import ModelConfig as ModelConfig
    from calm.errors import CalmError as CalmError
    from calm.heatmaps import normalize as normalize
    from calm.heatmaps import resize_maps as resize_maps
    from calm.images import Preprocessing as Preprocessing
    from calm.model import CalmModel as CalmModel
    from calm.model import create_model as create_model
    from calm.model import load as load
    from calm.output import MAP_KINDS as MAP_KINDS
    from calm.output import CalmOutput as CalmOutput
    from calm.output import CamOutput as CamOutput
    from calm.released import load_released as load_released

_HOMES = {
    "CalmError": "calm.errors",
    "CalmModel": "calm.model",
    "CalmOutput": "calm.output",
    "CamOutput": "calm.output",
    "MAP_KINDS": "calm.output",
    "ModelConfig": "calm.config",
    "Preprocessing": "calm.images",
    "attribute": "calm.baselines",
    "convert": "calm.cli.convert",
    "create_model": "calm.model",
    "load": "calm.model",
    "load_released": "calm.released",
    "normalize": "calm.heatmaps",
    "resize_maps": "calm.heatmaps",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import (
            version,  # here, as its import takes longer than all the rest of this file
        )

        return version("calm")
    if name not in _HOMES:
        raise AttributeError(f"module 'calm' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])
