"""What a benchmark found about one subject, as a JSON file that tables and reports read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calm.errors import CalmError
from calm.files import read_json, write_json
from calm.metrics.bootstrap import Estimate

__all__ = ["FIGURES", "Curve", "FigureSpec", "Result", "figure_order", "figure_spec"]

FORMAT = 1
"""Of the JSON file."""


@dataclass(frozen=True)
class FigureSpec:
    """How to read a figure.

    Attributes:
        title: head of its column.
        unit: what a value is; "percent" is stored as a fraction, and shown times 100.
        better: which way is good; "" for neither, such as a chance level.
        meaning: one sentence.
        main: shown in the terminal's table; the others are in its files only.
    """

    title: str
    unit: Literal["percent", "nats", "ratio"] = "percent"
    better: Literal["higher", "lower", ""] = "higher"
    meaning: str = ""
    main: bool = True


_COUNTED = {
    "": "",
    "_released": "; pixels below the smallest threshold dropped, as the released code does",
    "_cumulative": "; each pair with the pixels of all pairs before it, as the released code does",
    "_published": "; pixels dropped and pairs accumulated as the released code does, as for the published figures",
}


def _pxap(parts: int | None, way: str) -> FigureSpec:
    which = f" that differ in {parts} part{'s' * (parts > 1)}" if parts else ""
    title = f"{parts} part{'s' * (parts > 1)}" if parts else "mPxAP"
    meaning = f"area under the pixel precision-recall curve, mean over class pairs{which}{_COUNTED[way]}"
    return FigureSpec(
        f"{title}{way.replace('_', ' ')}",
        meaning=meaning,
        main=way == "" or (parts is None and way == "_published"),
    )


def _ratio(percent: str) -> FigureSpec:
    what = f"right after the {percent} percent highest-scored pixels are erased, over right after as many random ones"
    return FigureSpec(f"R_{percent}", "ratio", "lower", what)


FIGURES: dict[str, FigureSpec] = {
    **{
        f"mpxap{way}" + (f"_{parts}" if parts else ""): _pxap(parts, way)
        for way in _COUNTED
        for parts in (1, 2, 3, None)
    },
    "peak_in_part": FigureSpec(
        "peak in part", meaning="the map's highest pixel lies in the one part that differs"
    ),
    "mass_in_part": FigureSpec(
        "mass in part", meaning="share of the map that lies in the one part that differs"
    ),
    "part_of_image": FigureSpec(
        "part of image",
        better="",
        meaning="share of the image that is the one part that differs: peak and mass of a random pixel",
        main=False,
    ),
    "part_of_object": FigureSpec(
        "part of object",
        better="",
        meaning="share of the object that is the one part that differs: peak and mass of a random pixel of it",
        main=False,
    ),
    "chance": FigureSpec(
        "chance",
        better="",
        meaning="share of pixels that belong to the differing parts: precision of pixels drawn at random",
    ),
    **{f"r{percent}": _ratio(str(percent)) for percent in (10, 30, 50, 70, 90)},
    "r_area": FigureSpec(
        "R area",
        "ratio",
        "lower",
        "mean height of R_k up to the largest share erased: compare only with the same shares and the same fill",
    ),
    "insertion": FigureSpec(
        "insertion", meaning="area under the class's probability as pixels appear, best first"
    ),
    "deletion": FigureSpec(
        "deletion", better="lower", meaning="area under the class's probability as pixels vanish, best first"
    ),
    "randomisation": FigureSpec(
        "randomisation",
        "ratio",
        "lower",
        "rank correlation of maps before and after all weights are drawn anew; 1: the map ignores the model",
    ),
    "maxboxacc": FigureSpec(
        "MaxBoxAcc", meaning="box of the largest contour at IoU 0.5, best threshold: GT-known"
    ),
    "maxboxacc_v2": FigureSpec("MaxBoxAccV2", meaning="best contour, mean of IoU 0.3, 0.5 and 0.7"),
    **{
        f"maxboxacc_{iou}": FigureSpec(
            f"box IoU {iou}", meaning=f"best contour at IoU 0.{iou // 10}, best threshold", main=False
        )
        for iou in (30, 50, 70)
    },
    "top1_localization": FigureSpec("top-1 loc", meaning="class right and box right"),
    "top5_localization": FigureSpec("top-5 loc", meaning="class among the five most probable and box right"),
    "pxap": FigureSpec(
        "PxAP", meaning="area under the pixel precision-recall curve, every labelled pixel counted"
    ),
    "pxap_released": FigureSpec(
        "PxAP released",
        meaning="the same without pixels below the smallest threshold, as the released code counts",
    ),
    "pointing": FigureSpec("pointing", meaning="the map's highest pixel lies in the object"),
    "energy_inside": FigureSpec("energy inside", meaning="share of the map that lies in the object"),
    "top1": FigureSpec("top-1", meaning="the most probable class is the right one"),
    "top5": FigureSpec("top-5", meaning="the right class is among the five most probable"),
    "nll": FigureSpec("NLL", "nats", "lower", "negative log-likelihood of the right class"),
    "ece": FigureSpec("ECE", "percent", "lower", "expected calibration error of the top class"),
}
"""Every known figure, but for R_k of other k. A benchmark may add its own names; others are shown as they are."""


_R_K = re.compile(r"r(\d+(?:\.\d+)?)")


def figure_spec(name: str) -> FigureSpec:
    """The entry of ``FIGURES``, R_k of any k, or a plain one of that title."""
    if name not in FIGURES and (percent := _R_K.fullmatch(name)):
        return _ratio(percent[1])
    return FIGURES.get(name) or FigureSpec(name.replace("_", " "))


def figure_order(names: Iterable[str]) -> list[str]:
    """Names of figures as tables show them: those of ``FIGURES`` in its order, R_k by k, then the others; each once."""
    known = list(FIGURES)

    def place(name: str) -> tuple[int, float]:
        if percent := _R_K.fullmatch(name):
            return known.index("r10"), float(percent[1])
        return (known.index(name) if name in FIGURES else len(known)), 0.0

    return sorted(dict.fromkeys(names), key=place)


@dataclass(frozen=True)
class Curve:
    """A curve, perhaps with a 95 percent band.

    Attributes:
        x: places, in the order of drawing.
        y: values there.
        low: lower end of the band, or None.
        high: upper end, or None.
        x_name: what x is.
        y_name: what y is.
    """

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    x_name: str = ""
    y_name: str = ""

    @staticmethod
    def of(x: Sequence[float], points: Sequence[Estimate], x_name: str, y_name: str) -> Curve:
        """A curve through estimates, with their intervals as its band."""
        values, low, high = (list(column) for column in zip(*points, strict=True))
        return Curve([float(place) for place in x], values, low, high, x_name, y_name)


@dataclass(frozen=True)
class Result:
    """One subject on one benchmark.

    Attributes:
        benchmark: "cue-localization", "remove-and-classify", ...
        label: the subject's.
        figures: by name (`FIGURES`), fractions or nats, with intervals.
        curves: by title.
        scores: per image, by image id, higher is better: what the report's gallery sorts by.
        details: anything else that is worth keeping, ready for JSON.
        provenance: subject, data, options, versions, time.
    """

    benchmark: str
    label: str
    figures: dict[str, Estimate]
    curves: dict[str, Curve] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all. Numbers that are not finite become null."""
        write_json(
            path,
            _plain(
                {
                    "format": FORMAT,
                    "benchmark": self.benchmark,
                    "label": self.label,
                    "figures": {name: list(estimate) for name, estimate in self.figures.items()},
                    "curves": {name: vars(curve) for name, curve in self.curves.items()},
                    "scores": self.scores,
                    "details": self.details,
                    "provenance": self.provenance,
                }
            ),
        )

    @staticmethod
    def load(path: Path) -> Result:
        """Read what `save` wrote.

        Raises:
            CalmError: no such file, or no result of this format.
        """
        try:
            read = read_json(path, "result")
            if read["format"] != FORMAT:
                raise CalmError(f"{path} is a result of format {read['format']}, this release reads {FORMAT}")
            return Result(
                read["benchmark"],
                read["label"],
                {name: Estimate(*map(_number, values)) for name, values in read["figures"].items()},
                {name: _curve(entry) for name, entry in read["curves"].items()},
                {name: _number(value) for name, value in read["scores"].items()},
                read["details"],
                read["provenance"],
            )
        except CalmError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalmError(f"{path} is no result of calm evaluate: {error!r}") from error


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _curve(entry: dict[str, Any]) -> Curve:
    lists = {key: None if entry[key] is None else list(map(_number, entry[key])) for key in ("low", "high")}
    x, y = (list(map(_number, entry[key])) for key in ("x", "y"))
    return Curve(x, y, **lists, x_name=str(entry["x_name"]), y_name=str(entry["y_name"]))


def _plain(value: Any) -> Any:
    """``value`` with None for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value
