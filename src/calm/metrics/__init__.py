"""Figures of merit for attribution maps and classifiers, as torchmetrics: tensors in, sums kept, estimates out.

Names are loaded when first used; importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.metrics.bootstrap import REPLICATES, Estimate, bootstrap_mean, estimate, weights
    from calm.metrics.boxes import BoxCurve, MaxBoxAcc, MaxBoxAccResult, box_ious
    from calm.metrics.classification import BINS, Classification, ClassificationResult
    from calm.metrics.cue_localization import (
        ACCUMULATIONS,
        Accumulation,
        CueLocalization,
        CueLocalizationResult,
    )
    from calm.metrics.erasing import (
        FILLS,
        FRACTIONS,
        Fill,
        InsertionDeletion,
        InsertionDeletionResult,
        RemoveAndClassify,
        RemoveAndClassifyResult,
        erase,
        erasing_order,
        filling,
        first_pixels,
        insertion_deletion_curves,
        random_order,
    )
    from calm.metrics.pixels import COUNTINGS, Counting, PixelAP, PixelAPResult, Thresholds
    from calm.metrics.pointing import EnergyInside, PointingGame, PointingResult, energy_inside, peak_hits

__all__ = [
    "ACCUMULATIONS",
    "BINS",
    "COUNTINGS",
    "FILLS",
    "FRACTIONS",
    "REPLICATES",
    "Accumulation",
    "BoxCurve",
    "Classification",
    "ClassificationResult",
    "Counting",
    "CueLocalization",
    "CueLocalizationResult",
    "EnergyInside",
    "Estimate",
    "Fill",
    "InsertionDeletion",
    "InsertionDeletionResult",
    "MaxBoxAcc",
    "MaxBoxAccResult",
    "PixelAP",
    "PixelAPResult",
    "PointingGame",
    "PointingResult",
    "RemoveAndClassify",
    "RemoveAndClassifyResult",
    "Thresholds",
    "bootstrap_mean",
    "box_ious",
    "energy_inside",
    "erase",
    "erasing_order",
    "estimate",
    "filling",
    "first_pixels",
    "insertion_deletion_curves",
    "peak_hits",
    "random_order",
    "weights",
]

_HOMES = {
    "bootstrap": (
        "Estimate",
        "REPLICATES",
        "bootstrap_mean",
        "estimate",
        "weights",
    ),
    "boxes": (
        "BoxCurve",
        "MaxBoxAcc",
        "MaxBoxAccResult",
        "box_ious",
    ),
    "classification": (
        "BINS",
        "Classification",
        "ClassificationResult",
    ),
    "cue_localization": (
        "ACCUMULATIONS",
        "Accumulation",
        "CueLocalization",
        "CueLocalizationResult",
    ),
    "erasing": (
        "FILLS",
        "FRACTIONS",
        "Fill",
        "InsertionDeletion",
        "InsertionDeletionResult",
        "RemoveAndClassify",
        "RemoveAndClassifyResult",
        "erase",
        "erasing_order",
        "filling",
        "first_pixels",
        "insertion_deletion_curves",
        "random_order",
    ),
    "pixels": (
        "COUNTINGS",
        "Counting",
        "PixelAP",
        "PixelAPResult",
        "Thresholds",
    ),
    "pointing": (
        "EnergyInside",
        "PointingGame",
        "PointingResult",
        "energy_inside",
        "peak_hits",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
