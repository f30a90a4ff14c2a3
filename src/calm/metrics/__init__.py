"""Metrics of attribution maps and classifiers, as torchmetrics: tensors in, sums kept, estimates with intervals out.

Names are imported when first used: importing this package does not import OpenCV or torchmetrics.
"""

# ruff: noqa: F403 -- for type checkers; ``_MODULES`` below says what is public

from typing import TYPE_CHECKING

from calm.errors import lazy_names

if TYPE_CHECKING:
    from calm.metrics.bootstrap import *
    from calm.metrics.boxes import *
    from calm.metrics.classification import *
    from calm.metrics.cue_localization import *
    from calm.metrics.erasing import *
    from calm.metrics.pixels import *
    from calm.metrics.pointing import *

_MODULES = {
    "bootstrap": "REPLICATES Estimate bootstrap_mean estimate weights",
    "boxes": "BoxCurve MaxBoxAcc MaxBoxAccResult box_ious",
    "classification": "BINS Classification ClassificationResult",
    "cue_localization": "ACCUMULATIONS Accumulation CueLocalization CueLocalizationResult",
    "erasing": "DRAWS FILLS FRACTIONS Fill InsertionDeletion InsertionDeletionResult RemoveAndClassify"
    " RemoveAndClassifyResult erase erasing_order filling first_pixels insertion_deletion_curves random_order",
    "pixels": "COUNTINGS Counting PixelAP PixelAPResult Thresholds",
    "pointing": "EnergyInside PointingGame PointingResult energy_inside peak_hits",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
