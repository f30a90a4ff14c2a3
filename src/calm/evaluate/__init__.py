"""Benchmarks: a data set, any explainer, and the metrics.

Names are loaded when first used; importing this package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calm.evaluate.registry import BENCHMARKS
    from calm.evaluate.result import FIGURES, Curve, FigureSpec, Result
    from calm.evaluate.runner import Data, run
    from calm.evaluate.subject import Looked, Subject, model_subject

__all__ = [
    "BENCHMARKS",
    "FIGURES",
    "Curve",
    "Data",
    "FigureSpec",
    "Looked",
    "Result",
    "Subject",
    "model_subject",
    "run",
]

_HOMES = {
    "registry": ("BENCHMARKS",),
    "result": (
        "Curve",
        "FIGURES",
        "FigureSpec",
        "Result",
    ),
    "runner": (
        "Data",
        "run",
    ),
    "subject": (
        "Looked",
        "Subject",
        "model_subject",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
