"""Benchmarks: a data set, a model or a folder of maps, and the metrics.

Names are imported when first used: importing this package does not import PyTorch.
"""

from typing import TYPE_CHECKING

from calm.errors import lazy_names

if TYPE_CHECKING:
    from calm.evaluate.registry import BENCHMARKS as BENCHMARKS
    from calm.evaluate.result import FIGURES as FIGURES, Curve as Curve, FigureSpec as FigureSpec, Result as Result
    from calm.evaluate.runner import Data as Data, run as run
    from calm.evaluate.subject import Prediction as Prediction, Subject as Subject, model_subject as model_subject

_MODULES = {
    "registry": "BENCHMARKS",
    "result": "FIGURES Curve FigureSpec Result",
    "runner": "Data run",
    "subject": "Prediction Subject model_subject",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
