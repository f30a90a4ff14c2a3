"""The page of the results of benchmarks."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence

from calm.evaluate.result import figure_spec
from calm.report.benchmarks import benchmark_section, best, main_figure, written
from calm.report.found import Group, styles
from calm.report.gallery import gallery_section
from calm.report.html import Html, join, tag
from calm.report.page import Figure, Page, Section
from calm.report.provenance import facts

__all__ = ["report_page"]


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
