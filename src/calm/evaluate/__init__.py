"""Benchmarks: a data set, a model or a folder of maps, and the metrics.

Names are imported when first used: importing this package does not import PyTorch.
"""

from typing import TYPE_CHECKING

from calm.errors import lazy_names

if TYPE_CHECKING:
    from calm.evaluate.registry import BENCHMARKS as BENCHMARKS
    from calm.evaluate.result import FIGURES as FIGURES
    from calm.evaluate.result import Curve as Curve
    from calm.evaluate.result import FigureSpec as FigureSpec
    from calm.evaluate.result import Result as Result
    from calm.evaluate.runner import Data as Data
    from calm.evaluate.runner import run as run
    from calm.evaluate.subject import Prediction as Prediction
    from calm.evaluate.subject import Subject as Subject
    from calm.evaluate.subject import model_subject as model_subject

_MODULES = {
    "registry": "BENCHMARKS",
    "result": "FIGURES Curve FigureSpec Result",
    "runner": "Data run",
    "subject": "Prediction Subject model_subject",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
