"""Data sets: readers of several layouts, checks, augmentation, and the torch data set.

Names are loaded when first used; importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.data.augmentation import AUGMENTATIONS, Augmentation
    from calm.data.check import check_splits, drop_bad, load_checked
    from calm.data.dataset import EpochSampler, ImageDataset
    from calm.data.loading import LAYOUTS, detect_layout, fingerprint, load_split, load_splits, summary
    from calm.data.records import SPLITS, Box, Record, Report, Split
    from calm.data.transforms import BatchMix, eval_transform, train_transform

__all__ = [
    "AUGMENTATIONS",
    "LAYOUTS",
    "SPLITS",
    "Augmentation",
    "BatchMix",
    "Box",
    "EpochSampler",
    "ImageDataset",
    "Record",
    "Report",
    "Split",
    "check_splits",
    "detect_layout",
    "drop_bad",
    "eval_transform",
    "fingerprint",
    "load_checked",
    "load_split",
    "load_splits",
    "summary",
    "train_transform",
]

_HOMES = {
    "augmentation": ("AUGMENTATIONS", "Augmentation"),
    "check": (
        "check_splits",
        "drop_bad",
        "load_checked",
    ),
    "dataset": (
        "EpochSampler",
        "ImageDataset",
    ),
    "loading": (
        "LAYOUTS",
        "detect_layout",
        "fingerprint",
        "load_split",
        "load_splits",
        "summary",
    ),
    "records": (
        "Box",
        "Record",
        "Report",
        "SPLITS",
        "Split",
    ),
    "transforms": (
        "BatchMix",
        "eval_transform",
        "train_transform",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
