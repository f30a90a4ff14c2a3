"""What a benchmark found out about one method: figures with intervals, curves, and how they came about."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calm.atomic import write_json
from calm.errors import CalmError
from calm.metrics.bootstrap import Estimate

__all__ = ["FIGURES", "Curve", "FigureSpec", "Result", "figure_spec"]

FORMAT = 1


@dataclass(frozen=True)
class FigureSpec:
    """How a figure is shown and read.

    Attributes:
        title: heading of its column.
        unit: "percent": a share, shown times 100; "nats" and "ratio": shown as they are.
        better: which direction is good; "" where neither is.
        meaning: in a sentence.
    """

    title: str
    unit: Literal["percent", "nats", "ratio"]
    better: Literal["higher", "lower", ""]
    meaning: str = ""


FIGURES: dict[str, FigureSpec] = {
    "top1": FigureSpec("accuracy", "percent", "higher", "share of images whose most probable class is right"),
    "top5": FigureSpec("top-5", "percent", "higher", "share of images whose class is among the five most probable"),
    "nll": FigureSpec("nll", "nats", "lower", "mean of -log p(y | x)"),
    "ece": FigureSpec("ece", "percent", "lower", "mean gap of confidence and accuracy, 15 bins"),
    "mpxap": FigureSpec("mPxAP", "percent", "higher", "mean over class pairs of the pixel average precision"),
    "mpxap-released": FigureSpec(
        "mPxAP, released counting", "percent", "higher", "the same as the released code counts it: running over pairs,"
        " without the pixels below the smallest threshold"
    ),
    "peak-in-part": FigureSpec("peak in part", "percent", "higher", "share of maps whose highest value is in the part"),
    "mass-in-part": FigureSpec("mass in part", "percent", "higher", "share of the map's mass in the part"),
    "maxboxacc": FigureSpec("MaxBoxAcc", "percent", "higher", "box of the largest contour, IoU 0.5, best threshold"),
    "maxboxacc-v2": FigureSpec("MaxBoxAccV2", "percent", "higher", "best box, mean of IoU 0.3, 0.5 and 0.7"),
    "top1-loc": FigureSpec("Top-1 localization", "percent", "higher", "class and box right"),
    "top5-loc": FigureSpec("Top-5 localization", "percent", "higher", "class among five, and box right"),
    "pxap": FigureSpec("PxAP", "percent", "higher", "area under the pixel precision-recall curve"),
    "pxap-released": FigureSpec("PxAP, released counting", "percent", "higher", "without the pixels below the smallest"
                                " threshold"),
    "pointing": FigureSpec("pointing game", "percent", "higher", "share of maps whose highest value is in the object"),
    "energy": FigureSpec("energy inside", "percent", "higher", "share of the map's mass in the object"),
    **{f"r{k}": FigureSpec(f"R_{k}", "ratio", "lower", f"right after erasing the top {k} percent, over right after"
                           " erasing as many at random") for k in (10, 30, 50, 70, 90)},
}  # fmt: skip
"""Every figure that has a fixed name."""


def figure_spec(name: str) -> FigureSpec:
    """How to show a figure; those with a number in their name (``mpxap-2``) read like the one they derive from."""
    if name in FIGURES:
        return FIGURES[name]
    stem, _, rest = name.rpartition("-")
    if stem in FIGURES:
        base = FIGURES[stem]
        return FigureSpec(f"{base.title} {rest}", base.unit, base.better, base.meaning)
    return FigureSpec(name, "percent", "")


@dataclass(frozen=True)
class Curve:
    """y over x, with the 95 percent band where there is one."""

    x: list[float]
    y: list[float]
    x_name: str
    y_name: str
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Result:
    """One method on one benchmark.

    Attributes:
        benchmark: "cue-localization", "remove-and-classify", "localization" or "classification".
        label: the method, as it stands in tables.
        figures: by name (see ``FIGURES``); shares from 0 to 1, nats, ratios.
        curves: by name.
        scores: by image id, how well the method did there, higher is better: to find best and worst.
        details: what else came out, as JSON.
        provenance: model, data, options, versions: what makes the same result again.
    """

    benchmark: str
    label: str
    figures: dict[str, Estimate]
    curves: dict[str, Curve] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        """Write JSON, whole or not at all; what is undefined (NaN) becomes null."""
        value = {
            "format": FORMAT,
            "benchmark": self.benchmark,
            "label": self.label,
            "figures": {name: list(figure) for name, figure in self.figures.items()},
            "curves": {name: vars(curve) for name, curve in self.curves.items()},
            "scores": self.scores,
            "details": self.details,
            "provenance": self.provenance,
        }
        write_json(path, _without_nan(value))
        return path

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read what `save` wrote.

        Raises:
            CalmError: no such file, or one that is no result.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise CalmError(f"{path}: format {value['format']!r}, this version reads {FORMAT}")
            return cls(
                value["benchmark"],
                value["label"],
                {name: Estimate(*map(_number, figure)) for name, figure in value["figures"].items()},
                {name: _curve(curve) for name, curve in value["curves"].items()},
                {name: _number(score) for name, score in value["scores"].items()},
                value["details"],
                value["provenance"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CalmError):
                raise
            raise CalmError(
                f"{path} is no result of calm evaluate: {error!r}; delete it and evaluate again"
            ) from error


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _curve(value: Mapping[str, Any]) -> Curve:
    numbers = {
        name: None if value[name] is None else [_number(entry) for entry in value[name]]
        for name in ("x", "y", "low", "high")
    }
    return Curve(**numbers, x_name=value["x_name"], y_name=value["y_name"])  # type: ignore[arg-type]


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return value
