"""Cue localization in pictures: by the number of differing parts, and pair by pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from calm.evaluate.result import Result, figure_spec
from calm.metrics.bootstrap import Estimate
from calm.report.charts import Dots, Line, dot_chart, legend
from calm.report.found import Group, Style
from calm.report.html import Html, join, tag
from calm.report.names import species_name

__all__ = ["cue_charts"]

MOST_PAIRS = 60
"""Pairs in one drawing; more of them go into further ones."""


def cue_charts(group: Group, style: Mapping[str, Style]) -> Html | None:
    """Dots with intervals for each number of differing part groups, and one dot for each pair; None for other
    benchmarks."""
    if group.benchmark != "cue-localization":
        return None
    keys = legend([Line([], [], r.label, *style[r.label]) for r in group.results])
    charts = [_by_groups(group, style, stem) for stem in ("mpxap", "mpxap_published")]
    return join(tag("div", *charts, class_="charts"), keys, _by_pair(group, style))


def _by_groups(group: Group, style: Mapping[str, Style], stem: str) -> Html | None:
    """mPxAP of the pairs that differ in 1, 2, 3, ... part groups, and of all."""
    found = {name.removeprefix(f"{stem}_") for r in group.results for name in r.figures}
    numbers = sorted((name for name in found if name.isdecimal()), key=int)
    if not numbers:
        return None
    names = [*(f"{stem}_{number}" for number in numbers), stem]
    dots = [_dots(r.label, [r.figures.get(name) for name in names], style[r.label]) for r in group.results]
    title = f"{figure_spec(stem).title} by differing parts"
    return dot_chart(dots, [*numbers, "all"], title=title, x_label="part groups that differ", percent=True)


def _dots(label: str, estimates: Sequence[Estimate | None], style: Style) -> Dots:
    values = [math.nan if e is None else e.value for e in estimates]
    intervals = [(e.low, e.high) if e and math.isfinite(e.low + e.high) else None for e in estimates]
    return Dots(values, label, *style, intervals)


def _by_pair(group: Group, style: Mapping[str, Style]) -> Html | None:
    """PxAP of each pair, the pairs by the number of parts that differ and then by the first method's figure."""
    figures = {r.label: _pairs(r) for r in group.results if r.details.get("pairs")}
    if not figures:
        return None
    first = next(iter(figures.values()))
    names = sorted(
        dict.fromkeys(name for pairs in figures.values() for name in pairs),
        key=lambda name: (name[0], -first.get(name, -1.0), name),
    )
    drawings = []
    for start in range(0, len(names), MOST_PAIRS):
        some = names[start : start + MOST_PAIRS]
        dots = [
            Dots([pairs.get(name, math.nan) for name in some], label, *style[label])
            for label, pairs in figures.items()
        ]
        last = start + len(some)
        title = f"PxAP of single pairs, {start + 1} to {last} of {len(names)}"
        places = [f"{name[1]} ({name[0]})" for name in some]
        drawings.append(
            dot_chart(dots, places, title=title, x_label="pair (parts that differ)", percent=True, wide=True)
        )
    return tag("details", tag("summary", "Pair by pair"), *drawings)


def _pairs(result: Result) -> dict[tuple[int, str], float]:
    """PxAP by number of differing parts and names of the classes, without pairs that have no image."""
    found = {}
    for pair in result.details["pairs"]:
        name = f"{species_name(str(pair['first']))} / {species_name(str(pair['second']))}"
        if pair["pxap"] is not None and math.isfinite(pair["pxap"]):
            found[len(pair["groups"]), name] = float(pair["pxap"])
    return found
