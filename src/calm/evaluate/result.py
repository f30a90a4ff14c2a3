"""The result of a benchmark for one subject, stored as JSON, and what each figure means."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from calm.errors import CalmError
from calm.files import read_json, write_json
from calm.metrics.bootstrap import Estimate

FORMAT = 1
"""Version of the JSON file."""


@dataclass(frozen=True)
class FigureSpec:
    """How to read a figure.

    Attributes:
        title: head of its column.
        unit: unit that it is shown in; "percent" is stored as a fraction.
        better: the direction of better values; "" for none, such as of a chance level.
        meaning: one sentence.
        main: shown in the terminal's table; the others are in the files only.
    """

    title: str
    unit: Literal["percent", "nats", "ratio"] = "percent"
    better: Literal["higher", "lower", ""] = "higher"
    meaning: str = ""
    main: bool = True


_AREA = "area under the pixel precision-recall curve, mean over class pairs"
_COUNTINGS = {
    "": f"{_AREA}; maps in each method's own normalisation and thresholds, as published",
    "_raw": "the same with maps as they are, at exact thresholds, whatever the method",
    "_stretched": "the same with each map stretched to its own range, at exact thresholds, whatever the method",
    "_released": "the same without the pixels below the smallest threshold, as the released code counts",
    "_cumulative": "the same, each pair with the pixels of all pairs before it, as the released code counts",
    "_published": "the same in both ways of the released code, pixels dropped and pairs accumulated, as in the paper",
}


def _pxap(parts: int | None, counting: str) -> FigureSpec:
    title = f"{parts} part{'s' * (parts > 1)}" if parts else "mPxAP"
    meaning = f"mPxAP of the pairs that differ in {title}" if parts else _COUNTINGS[counting]
    return FigureSpec(
        f"{title}{counting.replace('_', ' ')}",
        meaning=meaning,
        main=counting == "" or (parts is None and counting in ("_raw", "_stretched", "_published")),
    )


def _ratio(percent: str) -> FigureSpec:
    what = f"right after the {percent} percent highest-scored pixels are erased, over right after as many random ones"
    return FigureSpec(f"R_{percent}", "ratio", "lower", what)


_RANDOM = "that is the one part that differs: peak and mass of a random pixel"
_CHANCE = "share of pixels that belong to the differing parts: precision of pixels drawn at random"

FIGURES: dict[str, FigureSpec] = {
    **{
        f"mpxap{counting}" + (f"_{parts}" if parts else ""): _pxap(parts, counting)
        for counting in _COUNTINGS
        for parts in (1, 2, 3, None)
    },
    "peak_in_part": FigureSpec("peak in part", meaning="the map's highest pixel lies in the one part that differs"),
    "mass_in_part": FigureSpec("mass in part", meaning="share of the map that lies in the one part that differs"),
    "part_of_image": FigureSpec("part of image", "percent", "", f"share of the image {_RANDOM}", main=False),
    "part_of_object": FigureSpec("part of object", "percent", "", f"share of the object {_RANDOM} of it", main=False),
    "chance": FigureSpec("chance", "percent", "", _CHANCE),
    **{f"r{percent}": _ratio(str(percent)) for percent in (10, 30, 50, 70, 90)},
    "r_area": FigureSpec(
        "R area",
        "ratio",
        "lower",
        "mean height of R_k up to the largest share erased: compare only with the same shares and the same fill",
    ),
    "insertion": FigureSpec("insertion", meaning="area under the class's probability as pixels appear, best first"),
    "deletion": FigureSpec("deletion", "percent", "lower", "the same area as pixels vanish, best first"),
    "randomisation": FigureSpec(
        "randomisation",
        "ratio",
        "lower",
        "rank correlation of maps before and after all weights are drawn anew; 1 if the map ignores the model",
    ),
    "maxboxacc": FigureSpec("MaxBoxAcc", meaning="box of the largest contour at IoU 0.5, best threshold: GT-known"),
    "maxboxacc_v2": FigureSpec("MaxBoxAccV2", meaning="best contour, mean of IoU 0.3, 0.5 and 0.7"),
    **{
        f"maxboxacc_{iou}": FigureSpec(
            f"box IoU {iou}", meaning=f"best contour at IoU 0.{iou // 10}, best threshold", main=False
        )
        for iou in (30, 50, 70)
    },
    "top1_localization": FigureSpec("top-1 loc", meaning="class right and box right"),
    "top5_localization": FigureSpec("top-5 loc", meaning="class among the five most probable and box right"),
    "pxap": FigureSpec("PxAP", meaning="area under the pixel precision-recall curve, every labelled pixel counted"),
    "pxap_released": FigureSpec(
        "PxAP released", meaning="the same without pixels below the smallest threshold, as the released code counts"
    ),
    "pointing": FigureSpec("pointing", meaning="the map's highest pixel lies in the object"),
    "energy_inside": FigureSpec("energy inside", meaning="share of the map that lies in the object"),
    "top1": FigureSpec("top-1", meaning="the most probable class is the right one"),
    "top5": FigureSpec("top-5", meaning="the right class is among the five most probable"),
    "nll": FigureSpec("NLL", "nats", "lower", "negative log-likelihood of the right class"),
    "ece": FigureSpec("ECE", "percent", "lower", "expected calibration error of the top class"),
}
"""Every known figure but R_k of other k. A figure that is not here is shown under its own name."""

_R_K = re.compile(r"r(\d+(?:\.\d+)?)")


def figure_spec(name: str) -> FigureSpec:
    """Return the entry of ``FIGURES``, that of R_k for any k, or a plain one with the name as title."""
    if name not in FIGURES and (percent := _R_K.fullmatch(name)):
        return _ratio(percent[1])
    return FIGURES.get(name) or FigureSpec(name.replace("_", " "))


def meanings(names: Iterable[str]) -> list[FigureSpec]:
    """Return what to say of a table's figures, in their order: those of k percent and of k parts once for all k."""
    found = []
    for name in names:
        spec = figure_spec(name)
        if _R_K.fullmatch(name):
            spec = replace(_ratio("k"), main=spec.main)
        elif re.fullmatch(r"mpxap.*_\d+", name):
            spec = FigureSpec("1 part, 2 parts, ...", meaning="mPxAP of the pairs that differ in so many parts")
        if spec.meaning and spec not in found:
            found.append(spec)
    return found


def figure_order(names: Iterable[str]) -> list[str]:
    """Return names of figures in the order of tables: that of ``FIGURES``, R_k by k, then the others; each once."""
    known = list(FIGURES)

    def place(name: str) -> tuple[int, float]:
        if percent := _R_K.fullmatch(name):
            return known.index("r10"), float(percent[1])
        return (known.index(name) if name in FIGURES else len(known)), 0.0

    return sorted(dict.fromkeys(names), key=place)


@dataclass(frozen=True)
class Curve:
    """Points in the order of drawing, perhaps a 95 percent band (``low``, ``high``), and the titles of the axes."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    x_name: str = ""
    y_name: str = ""

    @staticmethod
    def of(x: Sequence[float], points: Sequence[Estimate], x_name: str, y_name: str) -> Curve:
        """Return the curve through estimates, with their intervals as its band."""
        values, low, high = (list(column) for column in zip(*points, strict=True))
        return Curve([float(place) for place in x], values, low, high, x_name, y_name)


@dataclass(frozen=True)
class Result:
    """The result of a benchmark for one subject.

    Attributes:
        benchmark: "cue-localization", "remove-and-classify", ...
        label: the subject's.
        figures: by name (`FIGURES`), as fractions, ratios or nats, with intervals.
        curves: by title.
        scores: of the images, by image id; higher is better. The report's gallery sorts by them.
        details: further numbers and names, ready for JSON.
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
        """Write the result atomically. Numbers that are not finite become null."""
        figures = {name: list(estimate) for name, estimate in self.figures.items()}
        curves = {name: vars(curve) for name, curve in self.curves.items()}
        write_json(path, {"format": FORMAT, **vars(self), "figures": figures, "curves": curves})

    @staticmethod
    def load(path: Path) -> Result:
        """Read a result that `save` wrote.

        Raises:
            CalmError: no such file, or no result of this format.
        """
        try:
            saved = read_json(path, "result")
            if saved["format"] != FORMAT:
                raise CalmError(f"{path} is a result of format {saved['format']}, this release reads {FORMAT}")
            return Result(
                saved["benchmark"],
                saved["label"],
                {name: Estimate(*map(_number, values)) for name, values in saved["figures"].items()},
                {name: _curve(entry) for name, entry in saved["curves"].items()},
                {name: _number(value) for name, value in saved["scores"].items()},
                saved["details"],
                saved["provenance"],
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
