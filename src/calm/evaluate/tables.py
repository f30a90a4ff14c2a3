"""Results as tables: for the terminal and Markdown, and rows of figures for JSON and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from calm.evaluate.result import FigureSpec, Result, figure_order, figure_spec
from calm.files import write_json, write_text
from calm.metrics.bootstrap import Estimate, bootstrap_mean

_WIDTH = 16
"""Width of a column on the terminal, with its border."""


class _Table(NamedTuple):
    """The results of a benchmark: label and cells of each, cells being a text and whether it is its column's best."""

    title: str
    heads: list[str]
    rows: list[tuple[str, list[tuple[str, bool]]]]
    meanings: list[str]


def _tables(results: Sequence[Result], *, main_only: bool = False) -> list[_Table]:
    """Return a table for each benchmark, with all figures or the main ones."""
    made = []
    for of_benchmark in _by_benchmark(results).values():
        names = figure_order(name for result in of_benchmark for name in result.figures)
        specs = {name: figure_spec(name) for name in names if figure_spec(name).main or not main_only}
        best = {name: _best(name, of_benchmark) for name in specs}
        rows = []
        for result in of_benchmark:
            found = {name: result.figures.get(name) for name in specs}
            cells = [
                (format_estimate(e, specs[name]), e is not None and e.value == best[name]) for name, e in found.items()
            ]
            rows.append((result.label, cells))
        meanings = [f"{spec.title}: {spec.meaning}" for spec in specs.values() if spec.meaning]
        made.append(_Table(_title(of_benchmark[0]), [_head(spec) for spec in specs.values()], rows, meanings))
    return made


def paired_differences(results: Sequence[Result]) -> list[Result]:
    """Return mPxAP of each row of cue localization minus that of the first: means over the same pairs, with intervals.

    Pairs differ far more than methods do, so that this interval is much narrower than those of the two figures.
    """
    rows = [result for result in results if result.benchmark == "cue-localization" and result.details.get("pairs")]
    made = []
    for result in rows[1:]:
        figures = {}
        for name in ("pxap", "pxap_raw", "pxap_stretched"):
            own, other = (
                torch.tensor([float("nan") if (v := pair.get(name)) is None else v for pair in one.details["pairs"]])
                for one in (result, rows[0])
            )
            if len(own) == len(other) and (shown := (own - other).isfinite()).any():
                figures[f"m{name}"] = bootstrap_mean((own - other)[shown].double())
        label, data = f"{result.label} - {rows[0].label}", {"data": result.provenance.get("data")}
        made.append(Result("cue-localization, paired differences", label, figures, provenance=data))
    return made


def figure_rows(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each figure: benchmark, data, split, label, figure, value, low, high (None: undefined), unit."""
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


def format_estimate(estimate: Estimate | None, spec: FigureSpec) -> str:
    """Return a figure with its interval, in the unit that it is shown in: "34.3 (33.0-35.5)"; "-" if undefined."""
    if estimate is None or math.isnan(estimate.value):
        return "-"
    scale, digits = (100, 1) if spec.unit == "percent" else (1, 3)
    value, low, high = (f"{scale * number:.{digits}f}" for number in estimate)
    to = " to " if estimate.low < 0 else "-"
    return value if math.isnan(estimate.low + estimate.high) else f"{value} ({low}{to}{high})"


def markdown(results: Sequence[Result]) -> str:
    """Return a table for each benchmark with all figures and what they mean; the best value of a column is bold."""
    parts = []
    for table in _tables(results):
        rows = [
            [label.replace("|", "\\|"), *(f"**{text}**" if best else text for text, best in cells)]
            for label, cells in table.rows
        ]
        lines = [["method", *table.heads], ["---"] + ["---:"] * len(table.heads), *rows]
        parts.append(f"## {table.title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
        if table.meanings:
            parts.append("".join(f"- {meaning}\n" for meaning in table.meanings))
    return "\n".join([*parts, *(f"{line[0].upper()}{line[1:]}.\n" for line in remarks(results))])


def write_tables(results: Sequence[Result], out: Path) -> None:
    """Write ``table.json``, ``table.csv`` and ``table.md`` in ``out``."""
    results = [*results, *paired_differences(results)]
    rows = figure_rows(results)
    write_json(out / "table.json", rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "table.csv", text.getvalue())
    write_text(out / "table.md", markdown(results))


def print_tables(results: Sequence[Result], console: Console) -> None:
    """Print the main figures, each benchmark in as many tables below each other as the terminal's width needs."""
    results = [*results, *paired_differences(results)]
    for table in _tables(results, main_only=True):
        longest = max(len(label) for label, _ in table.rows)
        columns = max(1, (console.width - longest - 4) // _WIDTH)
        for start in range(0, len(table.heads), columns):
            shown = slice(start, start + columns)
            printed = RichTable(title=escape(table.title), title_justify="left", show_lines=True)
            printed.add_column("method", min_width=min(longest, 24), overflow="fold")
            for head in table.heads[shown]:
                printed.add_column(escape(head), justify="right", max_width=_WIDTH - 3)
            for label, cells in table.rows:
                texts = (f"[bold]{text}[/bold]" if best else text for text, best in cells[shown])
                printed.add_row(escape(label), *(text.replace(" (", "\n(") for text in texts))
            console.print(printed)
    for line in remarks(results):
        console.print(line, style="dim", highlight=False)


def remarks(results: Sequence[Result]) -> list[str]:
    """Return what to know when reading the figures, one sentence each, without capital and full stop."""
    lines = []
    if any(math.isfinite(e.low + e.high) for result in results for e in result.figures.values()):
        lines.append("in brackets: 95 percent bootstrap interval")
    agreement = [r.details["agreement"] for r in results if r.details.get("agreement") is not None]
    if agreement:
        lines.append(f"joint maps sum to p(y | x): the largest difference is {max(agreement):.1g}")
    lines += sorted({f"{r.benchmark}: {r.details['partly']}" for r in results if r.details.get("partly")})
    data = [result.provenance.get("data") or {} for result in results]
    carved = {(d["split"], d["origin"]) for d in data if d.get("origin", "own files") != "own files"}
    lines += [f"split {split} is {origin}; the other images were not looked at" for split, origin in sorted(carved)]
    lines += _protocols(results)
    cautions = {
        (r.provenance["subject"].get("model"), r.provenance["caution"]) for r in results if r.provenance.get("caution")
    }
    lines += sorted(f"{model}: {caution}" for model, caution in cautions)
    details = [result.details for result in results if result.details.get("pairs_of_absent_classes")]
    for pairs, left in sorted({(len(d["pairs"]), d["pairs_of_absent_classes"]) for d in details}):
        lines.append(f"cue localization: {pairs} of {pairs + left} pairs of classes have images of both")
    if any(result.details.get("segmented") is False for result in results):
        lines.append(
            "cue localization: not every image has a segmentation; without one, parts reach to the picture's edge"
        )
    return lines


def _protocols(results: Sequence[Result]) -> list[str]:
    """Return, for each benchmark whose rows differ in normalisation or thresholds, which rows have which."""
    lines = []
    for benchmark, of_benchmark in _by_benchmark(results).items():
        labels: dict[str, list[str]] = {}
        for result in of_benchmark:
            options = {name: result.provenance.get(name) for name in ("normalization", "thresholds")}
            protocol = ", ".join(f"{name} {value}" for name, value in options.items() if value)
            labels.setdefault(protocol, []).append(result.label)
        if len(labels) > 1:
            ways = [f"{protocol} for {', '.join(names)}" for protocol, names in labels.items() if protocol]
            lines.append(f"{benchmark}: {'; '.join(ways)}")
    return lines


def _by_benchmark(results: Sequence[Result]) -> dict[str, list[Result]]:
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result.benchmark, []).append(result)
    return grouped


def _data(result: Result) -> dict[str, str | None]:
    """Return the name of the data set's folder and the split; None where the provenance does not say."""
    data = result.provenance.get("data") or {}
    return {"data": Path(data["root"]).name if "root" in data else None, "split": data.get("split")}


def _title(result: Result) -> str:
    data = _data(result)
    if not data["data"]:
        return result.benchmark
    images = result.details.get("images")
    count = f" ({images:,} images)" if isinstance(images, int) else ""
    return f"{result.benchmark} on {data['data']}, {data['split']}{count}"


def _head(spec: FigureSpec) -> str:
    unit = {"percent": " %", "nats": " nats", "ratio": ""}[spec.unit]
    return f"{spec.title}{unit}{' (lower is better)' if spec.better == 'lower' else ''}"


def _best(name: str, results: Sequence[Result]) -> float | None:
    """Return the best value of a figure among at least two; None if it has no direction."""
    values = [result.figures[name].value for result in results if name in result.figures]
    values = [value for value in values if math.isfinite(value)]
    better = figure_spec(name).better
    return None if len(values) < 2 or not better else max(values) if better == "higher" else min(values)
