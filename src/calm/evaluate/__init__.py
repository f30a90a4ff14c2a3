"""Benchmarks: a data set, a model or a folder of maps, and the metrics.

Names are imported when first used: importing this package does not import PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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

_NAMES = {
    "registry": "BENCHMARKS",
    "result": "FIGURES Curve FigureSpec Result",
    "runner": "Data run",
    "subject": "Prediction Subject model_subject",
}
_MODULE = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value
