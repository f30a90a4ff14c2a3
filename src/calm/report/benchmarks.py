"""A section for each benchmark: its table, its curves, and the paper's figures where the data set is the same.

The page of the results of benchmarks.

Cue localization in pictures: by the number of differing parts, and pair by pair.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence

from calm.evaluate.result import Curve, Result, figure_order, figure_spec
from calm.metrics.bootstrap import Estimate
from calm.report.charts import Dots, Line, chart, dot_chart, legend
from calm.report.found import Group, Published, Style, published, styles
from calm.report.gallery import gallery_section
from calm.report.page import (
    Column,
    Figure,
    Html,
    Page,
    Row,
    Section,
    facts,
    figures_table,
    join,
    percent,
    species_name,
    tag,
)

__all__ = ["benchmark_section", "best", "cue_charts", "main_figure", "report_page", "written"]


def report_page(groups: Sequence[Group], *, gallery: bool = True, seed: int = 0) -> Page:
    """The page of some results."""
    style = styles(groups)
    sections = [benchmark_section(group, style) for group in groups]
    if gallery:
        sections += [
            gallery_section(group, seed=seed) for group in groups if any(r.scores for r in group.results)
        ]
    sections.append(_making(groups))
    labels = list(style)
    return Page(
        "Attribution maps, measured",
        "CALM benchmarks",
        join(
            f"{_counted(len(labels), 'method')} on {_counted(len(groups), 'benchmark')}. Every figure is given with its"
            " 95 percent bootstrap interval; the best of each column is bold, whether or not the intervals overlap."
        ),
        sections,
        [figure for group in groups if (figure := _figure(group)) is not None],
        join(
            "CALM: Kim, Choe, Akata, Oh, “Keep CALM and Improve Visual Feature Attribution”, ICCV 2021. Made"
            f" {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC."
        ),
    )


def _figure(group: Group) -> Figure | None:
    """The benchmark's main figure: the best method's, or of those that share it, and who comes next."""
    name = main_figure(group)
    order = best(group, name) if name else []
    if name is None or not order:
        return None
    spec = figure_spec(name)
    values = [written(name, result.figures[name].value) for result in order]
    first = values.count(values[0])
    note = ", ".join(result.label for result in order[:first][:3]) + (
        f" and {first - 3} more" if first > 3 else ""
    )
    if first < len(order):
        note += f"; next {order[first].label}, {values[first]}"
    return Figure(values[0], f"{group.heading}: {spec.title}", note)


def _making(groups: Sequence[Group]) -> Section:
    """Data, versions and options of every result."""
    blocks: list[Html] = []
    for group in groups:
        data = {name: str(value) for name, value in group.data.items() if isinstance(value, (str, int))}
        blocks.append(tag("h3", group.heading))
        blocks.append(facts(data) if data else tag("p", "Nothing is recorded about the data."))
        blocks += [
            tag(
                "details",
                tag("summary", f"Provenance of {result.label}"),
                tag("pre", json.dumps(result.provenance, indent=2, ensure_ascii=False, default=str)),
            )
            for result in group.results
        ]
    return Section("How it was made", join(*blocks), "Making")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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


STEP = 0.004
"""A point of a curve that is nearer to the last one drawn, as a share of the axes, is not drawn."""
CROWDED = 0.01
"""If half of the x are below it, the x axis is logarithmic."""
WIDEST = 8
"""Columns of one table."""
TITLES = {
    "ratio": "R_k: the ratio of the next two",
    "topk": "Accuracy without the highest pixels",
    "random": "Accuracy without random pixels",
    "reliability": "Accuracy by stated confidence",
}
"""Headings of curves whose names say too little."""
MAIN = ("mpxap", "r10", "maxboxacc_v2", "pxap")
"""The figures that papers compare by."""


def benchmark_section(group: Group, style: Mapping[str, Style]) -> Section:
    """All figures and curves of a benchmark on one data set."""
    paper = published(group.benchmark, group.published_data)
    names = _figure_names(group, paper)
    body = join(
        _tables(group, names, paper),
        _notes(names),
        tag("p", paper.note, class_="note") if paper else None,
        _curves(group, style),
        cue_charts(group, style),
    )
    return Section(group.heading, body)


def main_figure(group: Group) -> str | None:
    """The benchmark's figure that stands for it: the first one it has of `MAIN`, or else of all."""
    names = _figure_names(group)
    return next((name for name in (*MAIN, *names) if name in names), None)


def written(name: str, value: float) -> str:
    """A figure as people write it."""
    form = _FORMS[figure_spec(name).unit]
    return percent(value) if form == "%" else format(value, form)


def best(group: Group, name: str) -> list[Result]:
    """The results that have a figure, best first."""
    have = [r for r in group.results if name in r.figures and math.isfinite(r.figures[name].value)]
    sign = 1 if figure_spec(name).better == "lower" else -1
    return sorted(have, key=lambda result: sign * result.figures[name].value)


_FORMS = {"percent": "%", "nats": ".3f", "ratio": ".3f"}


def _figure_names(group: Group, paper: Published | None = None) -> list[str]:
    """The figures that any result or the paper has: those that are described in that order, then the others."""
    ours = (name for result in group.results for name in result.figures)
    theirs = (name for figures in (paper.rows.values() if paper else ()) for name in figures)
    return figure_order((*ours, *theirs))


def _tables(group: Group, names: Sequence[str], paper: Published | None) -> Html:
    """The figures in tables that fit the page: the main ones and the paper's, and below a fold the others."""
    images = group.data.get("images")
    caption = f"{images:,} images; 95 percent intervals" if images else "95 percent intervals"
    theirs = {name for figures in (paper.rows.values() if paper else ()) for name in figures}
    main = [name for name in names if name in theirs or figure_spec(name).main]
    others = [name for name in names if name not in main]
    tables = [_table(group, some, paper, caption if not n else None) for n, some in enumerate(_fitting(main))]
    more = [_table(group, some, paper, None) for some in _fitting(others)]
    fold = tag("details", tag("summary", "More figures"), *more) if more else None
    return tag("div", *tables, fold, class_="benchmark")


def _fitting(names: Sequence[str]) -> list[Sequence[str]]:
    return [names[start : start + WIDEST] for start in range(0, len(names), WIDEST)]


def _table(group: Group, names: Sequence[str], paper: Published | None, caption: str | None) -> Html:
    specs = [figure_spec(name) for name in names]
    columns = [Column(spec.title, _FORMS[spec.unit], spec.better) for spec in specs]
    rows = []
    for result in group.results:
        estimates = [result.figures.get(name) for name in names]
        rows.append(
            Row(
                result.label,
                [e.value if e and math.isfinite(e.value) else None for e in estimates],
                [(e.low, e.high) if e and math.isfinite(e.low + e.high) else None for e in estimates],
            )
        )
    for method, figures in paper.rows.items() if paper else ():
        values = [figures.get(name) for name in names]
        if any(value is not None for value in values):
            rows.append(Row(f"paper: {method}", values, competes=False))
    return figures_table(columns, rows, corner="method", caption=caption)


def _notes(names: Sequence[str]) -> Html | None:
    """What the columns mean, and which way is good; those for 1, 2, ... parts are told with their mean."""
    entries, by_parts = [], False
    for name in names:
        spec, (stem, _, parts) = figure_spec(name), name.rpartition("_")
        if parts.isdecimal() and stem in names and stem.startswith("mpxap"):
            by_parts = True
            continue
        if spec.meaning:
            way = f"; {spec.better} is better" if spec.better else ""
            entries.append(tag("div", tag("dt", spec.title), tag("dd", f"{spec.meaning.rstrip('.')}{way}.")))
    if by_parts:
        text = "mPxAP of the pairs that differ in so many parts."
        entries.append(tag("div", tag("dt", "1 part, 2 parts, 3 parts"), tag("dd", text)))
    if not entries:
        return None
    return tag("details", tag("summary", "What the columns mean"), tag("dl", *entries, class_="notes"))


def _curves(group: Group, style: Mapping[str, Style]) -> Html | None:
    """One chart for each kind of curve, with the curves of all methods that have it."""
    kinds = dict.fromkeys(name for result in group.results for name in result.curves)
    charts: list[Html] = []
    drawn: list[Line] = []
    for kind in kinds:
        curves = {r.label: r.curves[kind] for r in group.results if kind in r.curves}
        lines = [_line(label, curve, style[label]) for label, curve in curves.items()]
        charts.append(_chart(kind, list(curves.values()), lines))
        drawn += lines
    if not charts:
        return None
    bands = any(line.band is not None for line in drawn)
    return join(
        tag("div", *charts, class_="charts"),
        legend(drawn),
        tag("p", "The bands are 95 percent intervals.", class_="note") if bands else None,
    )


def _chart(kind: str, curves: Sequence[Curve], lines: Sequence[Line]) -> Html:
    """Shares in percent, and thresholds that crowd near 0 on a logarithmic axis."""
    x = [value for curve in curves for value in curve.x if math.isfinite(value)]
    y = [value for line in lines for value in line.y]
    crowded = any(sorted(curve.x)[len(curve.x) // 2] < CROWDED for curve in curves if curve.x)
    name = curves[0].y_name
    return chart(
        lines,
        title=TITLES.get(kind) or f"{kind[:1].upper()}{kind[1:]}".replace("-", " ").replace("_", " "),
        x_label=curves[0].x_name,
        percent=_shares(y) and not name.startswith("R"),
        x_log=crowded,
        x_percent=_shares(x) and not crowded and "threshold" not in curves[0].x_name,
        whole=False,
    )


def _shares(values: Sequence[float]) -> bool:
    return bool(values) and min(values) >= 0 and max(values) <= 1


def _line(label: str, curve: Curve, style: Style) -> Line:
    """The curve with the points that can be told apart."""
    keep = _kept(curve.x, curve.y)
    band = None
    if curve.low is not None and curve.high is not None:
        band = [curve.low[i] for i in keep], [curve.high[i] for i in keep]
    colour, dashed = style
    return Line([curve.x[i] for i in keep], [curve.y[i] for i in keep], label, colour, dashed, band)


def _kept(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Places of the points that are at least `STEP` from the one kept before them; and the last."""
    finite = [i for i in range(len(x)) if math.isfinite(x[i]) and math.isfinite(y[i])]
    spans = [max(v[i] for i in finite) - min(v[i] for i in finite) or 1.0 for v in (x, y)] if finite else []
    kept: list[int] = []
    for i in finite:
        if not kept or any(
            abs(v[i] - v[kept[-1]]) >= STEP * span for v, span in zip((x, y), spans, strict=True)
        ):
            kept.append(i)
    return kept if not finite or kept[-1] == finite[-1] else [*kept, finite[-1]]
