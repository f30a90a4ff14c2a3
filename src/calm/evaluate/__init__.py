"""Benchmarks: a data set, any explainer, and the metrics."""

from calm.evaluate.result import FIGURES, Curve, FigureSpec, Result
from calm.evaluate.runner import BENCHMARKS, Data, run
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
