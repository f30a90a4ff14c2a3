"""Metrics of attribution maps and classifiers, as torchmetrics: tensors in, sums kept, estimates with intervals out.

Names are imported when first used: importing this package does not import OpenCV or torchmetrics.
"""

# ruff: noqa: F403 -- for type checkers; ``_NAMES`` below says what is public

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.metrics.bootstrap import *
    from calm.metrics.boxes import *
    from calm.metrics.classification import *
    from calm.metrics.cue_localization import *
    from calm.metrics.erasing import *
    from calm.metrics.pixels import *
    from calm.metrics.pointing import *

_NAMES = {
    "bootstrap": "REPLICATES Estimate bootstrap_mean estimate weights",
    "boxes": "BoxCurve MaxBoxAcc MaxBoxAccResult box_ious",
    "classification": "BINS Classification ClassificationResult",
    "cue_localization": "ACCUMULATIONS Accumulation CueLocalization CueLocalizationResult",
    "erasing": "DRAWS FILLS FRACTIONS Fill InsertionDeletion InsertionDeletionResult RemoveAndClassify"
    " RemoveAndClassifyResult erase erasing_order filling first_pixels insertion_deletion_curves random_order",
    "pixels": "COUNTINGS Counting PixelAP PixelAPResult Thresholds",
    "pointing": "EnergyInside PointingGame PointingResult energy_inside peak_hits",
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
