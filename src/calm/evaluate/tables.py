"""Results as tables: for the terminal, and as JSON, CSV and Markdown files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from calm.evaluate.result import FigureSpec, Result, figure_order, figure_spec
from calm.files import write_json, write_text
from calm.metrics.bootstrap import Estimate

__all__ = ["markdown", "print_tables", "records", "write_tables", "written"]

_WIDTH = 16
"""Of a column on the terminal, with its border."""


def written(estimate: Estimate | None, spec: FigureSpec) -> str:
    """A figure with its interval, in the unit that it is shown in: "34.3 (33.0-35.5)"."""
    if estimate is None or math.isnan(estimate.value):
        return "-"
    scale, digits = (100, 1) if spec.unit == "percent" else (1, 3)
    value, low, high = (f"{scale * number:.{digits}f}" for number in estimate)
    to = " to " if estimate.low < 0 else "-"
    return value if math.isnan(estimate.low + estimate.high) else f"{value} ({low}{to}{high})"


def records(results: Sequence[Result]) -> list[dict[str, Any]]:
    """A row for each figure: benchmark, data, split, label, figure, value, low, high, unit; None where undefined."""
    return [
        {
            "benchmark": result.benchmark,
            **_data(result),
            "label": result.label,
            "figure": name,
            **{end: number if math.isfinite(number) else None for end, number in estimate._asdict().items()},
            "unit": "fraction" if figure_spec(name).unit == "percent" else figure_spec(name).unit,
        }
        for result in results
        for name, estimate in result.figures.items()
    ]


def markdown(results: Sequence[Result]) -> str:
    """A table for each benchmark, all figures, and what they mean; the best value of a column is bold."""
    parts = []
    for some in _by_benchmark(results).values():
        names = _names(some, every=True)
        head = ["method", *(_head(name) for name in names)]
        rows = [
            [result.label.replace("|", "\\|"), *(_cell(name, result, some, "**{}**") for name in names)]
            for result in some
        ]
        lines = [head, ["---"] + ["---:"] * len(names), *rows]
        parts.append(
            f"## {_title(some[0])}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        )
        meanings = [f"- {spec.title}: {spec.meaning}\n" for spec in map(figure_spec, names) if spec.meaning]
        parts += ["".join(meanings)] if meanings else []
    said = [f"{line[0].upper()}{line[1:]}.\n" for line in _remarks(results)]
    return "\n".join([*parts, *said])


def write_tables(results: Sequence[Result], out: Path) -> None:
    """Write ``table.json``, ``table.csv`` and ``table.md`` in ``out``."""
    rows = records(results)
    write_json(out / "table.json", rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "table.csv", text.getvalue())
    write_text(out / "table.md", markdown(results))


def print_tables(results: Sequence[Result], console: Console) -> None:
    """The main figures on the terminal, in as many tables below each other as its width needs."""
    for some in _by_benchmark(results).values():
        names = _names(some, every=False)
        first = max(len(result.label) for result in some)
        columns = max(1, (console.width - first - 4) // _WIDTH)
        for start in range(0, len(names), columns):
            table = Table(title=escape(_title(some[0])), title_justify="left", show_lines=True)
            table.add_column("method", min_width=min(first, 24), overflow="fold")
            for name in names[start : start + columns]:
                table.add_column(escape(_head(name)), justify="right", max_width=_WIDTH - 3)
            for result in some:
                cells = (
                    _cell(name, result, some, "[bold]{}[/bold]") for name in names[start : start + columns]
                )
                table.add_row(escape(result.label), *(cell.replace(" (", "\n(") for cell in cells))
            console.print(table)
    for line in _remarks(results):
        console.print(line, style="dim", highlight=False)


def _data(result: Result) -> dict[str, str | None]:
    """Name of the data set's folder, and the split; None where the provenance does not say."""
    data = result.provenance.get("data") or {}
    return {"data": Path(data["root"]).name if "root" in data else None, "split": data.get("split")}


def _title(result: Result) -> str:
    found = _data(result)
    if not found["data"]:
        return result.benchmark
    images = result.details.get("images")
    count = f" ({images:,} images)" if isinstance(images, int) else ""
    return f"{result.benchmark} on {found['data']}, {found['split']}{count}"


def _remarks(results: Sequence[Result]) -> list[str]:
    """What to know when reading the figures."""
    found = []
    if any(math.isfinite(e.low + e.high) for result in results for e in result.figures.values()):
        found.append("in brackets: 95 percent bootstrap interval")
    apart = [r.details["agreement"] for r in results if r.details.get("agreement") is not None]
    if apart:
        found.append(f"joint maps sum to p(y | x): the largest difference is {max(apart):.1g}")
    found += sorted({f"{r.benchmark}: {r.details['partly']}" for r in results if r.details.get("partly")})
    data = [result.provenance.get("data") or {} for result in results]
    carved = {(d["split"], d["origin"]) for d in data if d.get("origin", "own files") != "own files"}
    found += [
        f"split {split} is {origin}; the other images were not looked at" for split, origin in sorted(carved)
    ]
    found += _protocols(results)
    if any(result.details.get("segmented") is False for result in results):
        found.append(
            "cue localization: not every image has a segmentation; without one, parts reach to the picture's edge"
        )
    return found


def _protocols(results: Sequence[Result]) -> list[str]:
    """For each benchmark whose rows are not all normalised and cut alike, which are how."""
    found = []
    for benchmark, some in _by_benchmark(results).items():
        rows: dict[str, list[str]] = {}
        for result in some:
            told = {name: result.provenance.get(name) for name in ("normalization", "thresholds")}
            how = ", ".join(f"{name} {value}" for name, value in told.items() if value)
            rows.setdefault(how, []).append(result.label)
        if len(rows) > 1:
            ways = [f"{how} for {', '.join(names)}" for how, names in rows.items() if how]
            found.append(f"{benchmark}: {'; '.join(ways)}")
    return found


def _by_benchmark(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.benchmark, []).append(result)
    return found


def _names(results: Sequence[Result], *, every: bool) -> list[str]:
    """Figures that a result has, in the order of `figure_order`."""
    names = figure_order(name for result in results for name in result.figures)
    return [name for name in names if every or figure_spec(name).main]


def _head(name: str) -> str:
    spec = figure_spec(name)
    unit = {"percent": " %", "nats": " nats", "ratio": ""}[spec.unit]
    return f"{spec.title}{unit}{' (lower is better)' if spec.better == 'lower' else ''}"


def _cell(name: str, result: Result, beside: Sequence[Result], bold: str) -> str:
    spec, estimate = figure_spec(name), result.figures.get(name)
    values = [r.figures[name].value for r in beside if name in r.figures]
    values = [value for value in values if math.isfinite(value)]
    text = written(estimate, spec)
    if estimate is None or len(values) < 2 or not spec.better:
        return text
    best = max(values) if spec.better == "higher" else min(values)
    return bold.format(text) if estimate.value == best else text
