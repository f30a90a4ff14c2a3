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

from calm.evaluate.result import FigureSpec, Result, figure_order, figure_spec, meanings
from calm.files import write_json, write_text
from calm.metrics.bootstrap import Estimate, bootstrap_mean

_WIDE = 24
"""The most columns of the terminal that names of rows take, without borders."""

PAIRED = "cue-localization, paired differences"


class _Table(NamedTuple):
    """The results of a benchmark: label and cells of each row, a cell being a text and whether it is bold."""

    title: str
    corner: str
    heads: list[str]
    rows: list[tuple[str, list[tuple[str, bool]]]]
    meanings: list[str]

    def fitted(self, width: int) -> _Table:
        """Return the first that fits a width: the table, the one with rows for columns, or a row for each figure."""
        labels = [label for label, _ in self.rows]
        if self._needs() <= width:
            return self
        columns = zip(*(cells for _, cells in self.rows), strict=True)
        turned = [(head, list(cells)) for head, cells in zip(self.heads, columns, strict=True)]
        other = _Table(self.title, "figure", labels, turned, self.meanings)
        if other._needs() <= width:
            return other
        single = [
            (head if not row else "", [(label, False), cell])
            for head, cells in turned
            for row, (label, cell) in enumerate(zip(labels, cells, strict=True))
        ]
        return _Table(self.title, "figure", ["method", "value"], single, self.meanings)

    def _widths(self, *, whole: bool = False) -> list[int]:
        """Return the widths of the columns without borders in which no word of a heading is broken, nor a figure.

        Intervals stand below their figures; with ``whole``, headings stay on a line.
        """
        columns = zip(self.heads, *([text for text, _ in cells] for _, cells in self.rows), strict=True)
        names = min(_WIDE, max(len(self.corner), *(len(label) for label, _ in self.rows)))
        parts = [
            [*([head] if whole else head.split()), *(part for text in texts for part in _stacked(text).split("\n"))]
            for head, *texts in columns
        ]
        return [names, *(max(map(len, own)) for own in parts)]

    def _needs(self, *, whole: bool = False) -> int:
        widths = self._widths(whole=whole)
        return sum(widths) + 3 * len(widths) + 1

    def printed(self, width: int) -> RichTable:
        """Return the table for a terminal of some width."""
        listed = self.heads[1:] == ["value"]  # a row for each figure: all on a line
        printed = RichTable(show_lines=not listed)
        widths: list[int | None] = [*self._widths(whole=self._needs(whole=True) <= width)]
        for place, (head, wide) in enumerate(zip([self.corner, *self.heads], widths, strict=True)):
            left = place <= listed
            printed.add_column(escape(head), justify="left" if left else "right", width=None if listed else wide)
        for place, (label, cells) in enumerate(self.rows):
            texts = [escape(text if listed else _stacked(text)) for text, _ in cells]
            marked = (f"[bold]{text}[/bold]" if best else text for text, (_, best) in zip(texts, cells, strict=True))
            last = listed and (place + 1 == len(self.rows) or bool(self.rows[place + 1][0]))
            printed.add_row(escape(label), *marked, end_section=last)
        return printed


def _stacked(text: str) -> str:
    """Put an interval below its figure."""
    return text.replace(" (", "\n(")


def _tables(results: Sequence[Result], *, main_only: bool = False) -> list[_Table]:
    """Return a table for each benchmark, with all figures or the main ones."""
    made = []
    for of_benchmark in _by_benchmark(results).values():
        names = figure_order(name for result in of_benchmark for name in result.figures)
        specs = {name: figure_spec(name) for name in names if figure_spec(name).main or not main_only}
        best = {name: _best(name, of_benchmark) for name in specs}
        paired = of_benchmark[0].benchmark == PAIRED
        rows = []
        for result in of_benchmark:
            found = {name: result.figures.get(name) for name in specs}
            cells = [
                (
                    format_estimate(e, specs[name]),
                    e is not None and (e.low > 0 or e.high < 0 if paired else e.value == best[name]),
                )
                for name, e in found.items()
            ]
            rows.append((result.label, cells))
        said = [
            f"{spec.title}: {spec.meaning}" + "; lower is better" * (spec.better == "lower") for spec in meanings(specs)
        ]
        if paired:
            said = ["a row's figure minus the first method's, mean over the same pairs; bold where 0 is excluded"]
        heads = [_head(spec) for spec in specs.values()]
        made.append(_Table(_title(of_benchmark[0]), "method", heads, rows, said))
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
        made.append(Result(PAIRED, label, figures, provenance=data))
    return made


def _with_differences(results: Sequence[Result]) -> list[Result]:
    """Add the paired differences behind the results that they are of."""
    own = [result for result in results if result.benchmark == "cue-localization"]
    return [*own, *paired_differences(own), *(result for result in results if result.benchmark != "cue-localization")]


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
    results = _with_differences(results)
    rows = figure_rows(results)
    write_json(out / "table.json", rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(out / "table.csv", text.getvalue())
    write_text(out / "table.md", markdown(results))


def print_tables(results: Sequence[Result], console: Console) -> None:
    """Print the main figures of each benchmark in a table that fits the terminal, and below it what they mean."""
    results = _with_differences(results)
    for table in _tables(results, main_only=True):
        console.print(table.title, style="bold", markup=False, highlight=False)
        console.print(table.fitted(console.width).printed(console.width))
        for meaning in table.meanings:
            console.print(meaning, style="dim", markup=False, highlight=False)
        console.print()
    for line in remarks(results):
        console.print(line, style="dim", highlight=False)


def remarks(results: Sequence[Result]) -> list[str]:
    """Return what to know when reading the figures, one sentence each, without capital and full stop."""
    lines = []
    if any(math.isfinite(e.low + e.high) for result in results for e in result.figures.values()):
        alike = any(r.figures["top1"].value in (0, 1) for r in results if "top1" in r.figures)
        how = "bootstrap interval" + ", of a top-1 of 0 or 100 percent Wilson's" * alike
        lines.append(f"in brackets: 95 percent {how}; an arrow ↓ marks figures of which lower is better")
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
    return f"{spec.title}{unit}{' ↓' if spec.better == 'lower' else ''}"


def _best(name: str, results: Sequence[Result]) -> float | None:
    """Return the best value of a figure among at least two; None if it has no direction."""
    values = [result.figures[name].value for result in results if name in result.figures]
    values = [value for value in values if math.isfinite(value)]
    better = figure_spec(name).better
    return None if len(values) < 2 or not better else max(values) if better == "higher" else min(values)
