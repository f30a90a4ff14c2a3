"""A section for each benchmark: tables with intervals, curves, and the paper's figures on the same data set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from calm.evaluate.result import Curve, Result, figure_order, figure_spec, meanings
from calm.evaluate.tables import paired_differences
from calm.metrics.bootstrap import Estimate
from calm.report.charts import Line, chart, dot_chart
from calm.report.found import PUBLISHED, Group, Published, Style, own_maps
from calm.report.page import Column, Row, Section, Table, species_name

WIDEST = 8  # columns of one table
MOST_PAIRS = 60  # pairs in one drawing; more of them go into further ones
STEP = 0.004  # a point of a curve that is nearer to the last one drawn, as a share of the axes, is not drawn
CROWDED = 0.01  # if half of the x are below it, the x axis is logarithmic
NOTHING = Estimate(math.nan, math.nan, math.nan)  # of a figure that a result lacks
CURVE_TITLES = {
    "ratio": "R_k: the ratio of the next two",
    "topk": "Accuracy without the highest pixels",
    "random": "Accuracy without random pixels",
    "reliability": "Accuracy by stated confidence",
}
"""Headings of curves whose names say too little."""
MAIN = ("mpxap", "r_area", "maxboxacc_v2", "pxap")  # the figures that papers compare by, for all of a curve if there is
READ_AS = ("mpxap", "mpxap_raw", "mpxap_stretched", "mpxap_published")  # the readings of cue localization
_FORMS = {"percent": "%", "nats": ".3f", "ratio": ".3f"}


def benchmark_section(
    group: Group, style: Mapping[str, Style], gallery: Mapping[str, Any] | None = None, *, fold: bool = True
) -> Section:
    """Return all figures and curves of a benchmark on one data set; with ``fold``, its images are folded away."""
    paper = PUBLISHED.get((group.benchmark, group.published_data or ""))
    published = [name for figures in paper.rows.values() for name in figures] if paper else []
    names = _figure_names(group, published)
    main = [name for name in names if name in published or figure_spec(name).main]
    images = group.data.get("images")
    caption = f"{images:,} images; 95 percent intervals" if images else "95 percent intervals"
    lines, charts = _curves(group, style)
    values = {
        "benchmark": group.benchmark,
        "tables": _tables(group, main, paper, caption),
        "more": _tables(group, [name for name in names if name not in main], paper),
        "notes": _notes(names),
        "paper": paper,
        "charts": charts,
        "lines": lines,
        "bands": any(line.band is not None for line in lines),
        "cues": _cue_charts(group, style) if group.benchmark == "cue-localization" else None,
        "paired": _paired_table(group) if group.benchmark == "cue-localization" else None,
        "gallery": gallery,
        "fold": fold,
    }
    return Section(group.heading, "benchmark", values)


def main_figure(group: Group) -> tuple[str, str, str] | None:
    """Return a benchmark's main figure: its best value, what it is, and which methods have it or come next.

    Methods whose intervals overlap that of the best one are not told apart by the figure, and the text says so.
    """
    names = _figure_names(group)
    name = next((name for name in (*MAIN, *names) if name in names), "")
    spec = figure_spec(name)
    have = [r for r in group.results if name in r.figures and math.isfinite(r.figures[name].value)]
    if not have:
        return None
    order = sorted(have, key=lambda r: r.figures[name].value, reverse=spec.better != "lower")
    values = [_column(name).written(result.figures[name].value) for result in order]
    first = values.count(values[0])
    note = ", ".join(result.label for result in order[:first][:3])
    note += f" and {first - 3} more" if first > 3 else ""
    if first < len(order):
        low, high = (end for end in order[0].figures[name][1:])
        alike = [r for r in order[first:] if r.figures[name].low <= high and r.figures[name].high >= low]
        relation = "not told apart from" if order[first] in alike else "next"
        note += f"; {relation} {order[first].label}, {values[first]}"
        note += f", and {len(alike) - 1} more" if len(alike) > 1 else ""
    return values[0], f"{group.heading}: {spec.title}", note


def _figure_names(group: Group, published: Sequence[str] = ()) -> list[str]:
    """Return the figures that any result or the paper has, in the order of `calm.evaluate.result.FIGURES`."""
    return figure_order([*(name for result in group.results for name in result.figures), *published])


def _column(name: str) -> Column:
    spec = figure_spec(name)
    return Column(spec.title, _FORMS[spec.unit], spec.better)


def _tables(group: Group, names: Sequence[str], paper: Published | None, caption: str | None = None) -> list[Table]:
    """Return the figures in tables that fit the page, the first one with the caption."""
    tables: list[Table] = []
    for start in range(0, len(names), WIDEST):
        columns = names[start : start + WIDEST]
        rows = []
        rows += [Row(result.label, *_estimates(result, columns)) for result in group.results]
        for method, figures in paper.rows.items() if paper else ():
            if any(name in figures for name in columns):
                rows.append(Row(f"paper: {method}", [figures.get(name) for name in columns], competes=False))
        tables.append(Table(list(map(_column, columns)), rows, None if start else caption, "method"))
    return tables


def _notes(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return what the columns mean, and which way is good."""
    return [
        (spec.title, f"{spec.meaning.rstrip('.')}{f'; {spec.better} is better' if spec.better else ''}.")
        for spec in meanings(names)
    ]


def _paired_table(group: Group) -> Table | None:
    """Return each method's mPxAP minus that of CAM's maps, or else of the first method, over the same pairs."""
    rows = sorted(group.results, key=lambda result: own_maps(result) != "cam")
    differences = paired_differences(rows)
    names = _figure_names(replace(group, results=tuple(differences)))
    if not names:
        return None
    columns = [replace(_column(name), better="decided") for name in names]
    table = [Row(r.label.removesuffix(f" - {rows[0].label}"), *_estimates(r, names)) for r in differences]
    return Table(columns, table, f"Minus {rows[0].label}, over the same pairs; bold where 0 is excluded", "difference")


def _estimates(result: Result, names: Sequence[str]) -> tuple[list[float], list[tuple[float, float]]]:
    """Return the values of figures and their intervals."""
    found = [result.figures.get(name, NOTHING) for name in names]
    return [e.value for e in found], [(e.low, e.high) for e in found]


def _curves(group: Group, style: Mapping[str, Style]) -> tuple[list[Line], list[Markup]]:
    """Return one chart for each kind of curve, with the curves of all methods that have it; and all their lines."""
    drawn, charts = list[Line](), list[Markup]()
    for kind in dict.fromkeys(name for result in group.results for name in result.curves):
        curves = {r.label: r.curves[kind] for r in group.results if kind in r.curves}
        lines = [_line(label, curve, style[label]) for label, curve in curves.items()]
        charts.append(_chart(kind, list(curves.values()), lines))
        drawn += lines
    return drawn, charts


def _chart(kind: str, curves: Sequence[Curve], lines: Sequence[Line]) -> Markup:
    """Draw fractions in percent, and thresholds that crowd near 0 on a logarithmic axis."""
    x = [value for curve in curves for value in curve.x if math.isfinite(value)]
    y = [value for line in lines for value in line.y]
    crowded = any(sorted(curve.x)[len(curve.x) // 2] < CROWDED for curve in curves if curve.x)
    first = curves[0]
    return chart(
        lines,
        title=CURVE_TITLES.get(kind) or f"{kind[:1].upper()}{kind[1:]}".replace("-", " ").replace("_", " "),
        x_label=first.x_name,
        percent=_fractions(y) and not first.y_name.startswith("R"),
        x_log=crowded,
        x_percent=_fractions(x) and not crowded and "threshold" not in first.x_name,
        whole=False,
    )


def _fractions(values: Sequence[float]) -> bool:
    return bool(values) and min(values) >= 0 and max(values) <= 1


def _line(label: str, curve: Curve, style: Style) -> Line:
    """Return the curve with the points that can be told apart."""
    points = np.array([curve.x, curve.y, curve.low or curve.y, curve.high or curve.y], dtype=float)
    points = points[:, np.isfinite(points[:2]).all(axis=0)]
    spans = np.ptp(points[:2], axis=1, keepdims=True) if points.size else 1.0
    x, y, low, high = points[:, _kept(points[:2] / np.where(spans, spans, 1.0))].tolist()
    return Line(x, y, label, *style, None if curve.low is None else (low, high))


def _kept(points: NDArray[np.floating]) -> list[int]:
    """Return the points (2, n) that are at least `STEP` from the one kept before them, by position; and the last."""
    kept = [0] if points.size else []
    for i in range(1, points.shape[1]):
        if np.abs(points[:, i] - points[:, kept[-1]]).max() >= STEP or i == points.shape[1] - 1:
            kept.append(i)
    return kept


def _cue_charts(group: Group, style: Mapping[str, Style]) -> dict[str, Any]:
    """Return dots with intervals for each number of differing part groups, and one dot for each pair."""
    return {
        "charts": list(filter(None, (_by_groups(group, style, stem) for stem in READ_AS))),
        "lines": [Line([], [], r.label, *style[r.label]) for r in group.results],
        "by_pair": _by_pair(group, style),
    }


def _by_groups(group: Group, style: Mapping[str, Style], stem: str) -> Markup | None:
    """Chart the mPxAP of the pairs that differ in 1, 2, 3, ... part groups, and of all."""
    endings = {name.removeprefix(f"{stem}_") for r in group.results for name in r.figures}
    numbers = sorted((name for name in endings if name.isdecimal()), key=int)
    if not numbers:
        return None
    names = [*(f"{stem}_{number}" for number in numbers), stem]
    lines = []
    for result in group.results:
        values, low, high = zip(*(result.figures.get(name, NOTHING) for name in names), strict=True)
        lines.append(Line(range(len(names)), values, result.label, *style[result.label], band=(low, high)))
    title = f"{figure_spec(stem).title} by differing parts"
    return dot_chart(lines, [*numbers, "all"], title=title, x_label="part groups that differ")


def _by_pair(group: Group, style: Mapping[str, Style]) -> list[Markup]:
    """Chart the PxAP of each pair, by the number of parts that differ and then by the first method's figure."""
    figures = {r.label: _pairs(r) for r in group.results if r.details.get("pairs")}
    first = next(iter(figures.values()), {})
    names = sorted(set().union(*figures.values()), key=lambda name: (name[0], -first.get(name, -1.0), name))
    drawings = []
    for start in range(0, len(names), MOST_PAIRS):
        chunk = names[start : start + MOST_PAIRS]
        x, places = range(len(chunk)), [f"{name} ({number})" for number, name in chunk]
        values = {label: [pairs.get(name, math.nan) for name in chunk] for label, pairs in figures.items()}
        lines = [Line(x, y, label, *style[label]) for label, y in values.items()]
        title = f"PxAP of single pairs, {start + 1} to {start + len(chunk)} of {len(names)}"
        drawings.append(dot_chart(lines, places, title=title, x_label="pair (parts that differ)", wide=True))
    return drawings


def _pairs(result: Result) -> dict[tuple[int, str], float]:
    """Return PxAP by number of differing parts and names of the classes, without pairs that have no image."""
    figures = {}
    for pair in result.details["pairs"]:
        name = " / ".join(species_name(str(pair[end])) for end in ("first", "second"))
        if pair["pxap"] is not None and math.isfinite(pair["pxap"]):
            figures[len(pair["groups"]), name] = float(pair["pxap"])
    return figures
