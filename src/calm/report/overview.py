"""The whole page: its summary, the order of its sections, and the sections on numbers, training and provenance."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from calm.errors import CalmError
from calm.evaluate.result import Result
from calm.images import read_image
from calm.report.benchmarks import benchmark_section, main_figure
from calm.report.charts import PALETTE, Line, chart
from calm.report.found import CALM, Group, Run, find_groups, find_runs, is_number, own_maps, styles
from calm.report.gallery import gallery as images_of
from calm.report.page import Column, Page, Row, Section, Shot, Table
from calm.report.story import Study, birds_config, single_pairs, story_sections

PAPER = "CALM: Kim, Choe, Akata, Oh, “Keep CALM and Improve Visual Feature Attribution”, ICCV 2021."


@dataclass(frozen=True)
class DataSet:
    """The results on one data set, by benchmark, if there are any, and the runs on it whose models they are about."""

    groups: Sequence[Group]
    runs: Sequence[Run]

    @cached_property
    def name(self) -> str:
        """What its sections are called by where the page has other data sets too."""
        if not self.groups:
            return self.root.name
        return " ".join(filter(None, [self.groups[0].data_name, self.groups[0].mark]))

    @cached_property
    def about(self) -> Mapping[str, Any]:
        """What is recorded about its test images."""
        return self.groups[0].data if self.groups else self.runs[0].data

    @cached_property
    def root(self) -> Path:
        """Where it was."""
        return self.groups[0].root if self.groups else Path(str(self.runs[0].config.get("data", "")))

    @cached_property
    def noun(self) -> str:
        """What a class is called."""
        return "species" if any(group.benchmark == "cue-localization" for group in self.groups) else "class"

    @cached_property
    def classes(self) -> int:
        """How many there are."""
        return int(self.about.get("classes", 0))

    @cached_property
    def cues(self) -> list[Result]:
        """Results of cue localization that say where maps peak."""
        return [result for group in self.groups for result in group.results if "peak_in_part" in result.figures]

    @cached_property
    def singles(self) -> list[dict[str, Any]]:
        """Pairs of classes that differ in one part."""
        return single_pairs(self.cues)

    @cached_property
    def agreement(self) -> float | None:
        """The largest distance of a joint map's sum from the probability it explains, if it was measured."""
        measured = [r.details.get("agreement") for group in self.groups for r in group.results]
        return max((value for value in measured if value is not None), default=None)

    def figure(self, name: str) -> dict[str, Any]:
        """Return a figure of the first model of CALM and of CAM, by their main maps, and its interval as written; the
        accuracy where no benchmark measured it, from the training."""
        results = [r for group in reversed(self.groups) for r in reversed(group.results) if name in r.figures]
        found = {own_maps(r): r.figures[name] for r in results}
        named = {"calm": next((found[method] for method in CALM if method in found), None), "cam": found.get("cam")}
        spans = {f"{who}_span": e and Column("", "%").interval(e[1:]) for who, e in named.items()}
        values = {who: e and e.value for who, e in named.items()} | spans
        if name == "top1" and not self.groups:
            for who, run in (("calm", self.main_run), ("cam", self.cam_run)):
                accuracy = run.test.get("accuracy") if run else None
                values[who] = accuracy if is_number(accuracy) else None
        return values

    @property
    def main_run(self) -> Run | None:
        """The first run of CALM; if only CAM was trained, that of CAM."""
        return self.run(CALM) or (None if self.groups else self.run(["cam"]))

    @property
    def cam_run(self) -> Run | None:
        """The first run of CAM, if it is not the main one."""
        found = self.run(["cam"])
        return None if found is self.main_run else found

    def run(self, methods: Sequence[str]) -> Run | None:
        """Return the first run of one of the methods."""
        return next((run for method in methods for run in self.runs if run.method == method), None)


def report_page(sources: Sequence[Path], *, base: Path, gallery: bool = True, seed: int = 0) -> Page:
    """Make the page of `write_report`. Paths below ``base`` become relative to it; others keep their last part."""
    groups = find_groups(sources)
    runs, problems = find_runs(groups, sources)
    if not groups and not runs:
        raise CalmError("\n".join(problems))
    style = styles(groups)
    data_sets = _data_sets(groups, runs)
    sections: list[Section] = []
    for data in data_sets:
        story: list[Section] = []
        if gallery:
            try:
                study = Study.of(data.groups) if data.groups else None
                story = story_sections(study, data.singles, seed=seed) if study else []
            except (CalmError, OSError) as error:
                problems.append(f"The sections on single images are left out: {error}.")
        measured = [*story, *_numbers(data), *([_training(data.runs)] if data.runs else [])]
        if gallery and not data.groups:
            measured[:0] = _panels(data.runs)
        sections += [_named(section, data.name) if len(data_sets) > 1 else section for section in measured]
        for group in data.groups:
            scored = gallery and any(result.scores for result in group.results)
            images = images_of(group, seed=seed) if scored else None
            section = benchmark_section(group, style, images, fold=bool(story))
            sections.append(replace(section, short=group.title) if len(data_sets) == 1 else section)
    sections.append(_making(data_sets, runs, problems, sources, base))
    footer = f"{PAPER} Made {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC."
    for data in data_sets:
        values: dict[str, Any] = {name: data.figure(name) for name in ("top1", "peak_in_part", "part_of_object")}
        if data.classes and values["top1"]["calm"] is not None:
            values |= {"data": data, "run": data.main_run, "cam_run": data.cam_run}
            name = "procedural birds" if birds_config(data.root) else data.name
            title = "A classifier that says where it saw the evidence"
            method = "CALM" if data.groups or data.run(CALM) else "CAM"
            return Page(title, f"{method} on {name}", Section("", "summary_calm", values), sections, footer)
    figures = list(filter(None, map(main_figure, groups)))
    counts = {"methods": len(style), "benchmarks": len(groups), "figures": figures}
    summary = Section("", "summary_benchmarks", counts)
    return Page("Attribution maps, measured", "CALM benchmarks", summary, sections, footer)


def _data_sets(groups: Sequence[Group], runs: Sequence[Run]) -> list[DataSet]:
    by_data: dict[str, list[Group]] = {}
    for group in groups:
        by_data.setdefault(str(group.data.get("fingerprint")), []).append(group)
    owned = [[run for run in runs if any(run.folder in g.run_folders for g in own)] for own in by_data.values()]
    alone = [run for run in runs if not any(run in own for own in owned)]
    by_root: dict[str, list[Run]] = {}
    for run in alone:
        by_root.setdefault(str(run.data.get("fingerprint") or run.config.get("data")), []).append(run)
    return [*map(DataSet, by_data.values(), owned), *(DataSet((), own) for own in by_root.values())]


def _named(section: Section, name: str) -> Section:
    return replace(section, title=f"{section.title} ({name})", short=f"{section.short or section.title} ({name})")


def _numbers(data: DataSet) -> list[Section]:
    """Show how well the models classify, and how often their maps point at the part that tells classes apart."""
    if not (data.runs or data.cues or data.agreement is not None):
        return []
    options = data.cues[0].provenance.get("options", {}) if data.cues else {}
    values = {
        "data": data,
        "runs": _classification_table(data.runs) if data.runs else None,
        "guessing": math.log(max(1, data.classes)),
        "pointing": _pointing_table(data.cues) if data.cues else None,
        "replicates": options.get("replicates", 1000),
        "by_pair": _pairs_table(data.singles) if data.singles else None,
    }
    return [Section("In numbers", "numbers", values, "Numbers")]


def _classification_table(runs: Sequence[Run]) -> Table:
    """Tabulate the test figures of the best weights of the runs, as their result.json has them."""
    columns = {
        "accuracy": Column("accuracy", "%", "higher"),
        "nll": Column("nll", ".3f", "lower"),
        "ece": Column("calibration error", ".3f", "lower"),
        "images_per_second": Column("images/s in training", ".0f", "higher"),
        "seconds": Column("seconds of training", ".0f", "lower"),
    }
    values = {run.label: [(run.result | run.test).get(name) for name in columns] for run in runs}
    rows = [Row(label, [value if is_number(value) else None for value in own]) for label, own in values.items()]
    return Table(list(columns.values()), rows, "Classification of the test images", "model")


def _pointing_table(results: Sequence[Result]) -> Table:
    rows = []
    for result in results:
        figures = [result.figures[name] for name in ("peak_in_part", "mass_in_part")]
        rows.append(Row(result.label, [figure.value for figure in figures], [figure[1:] for figure in figures]))
    for place, figure in (("object", "part_of_object"), ("picture", "part_of_image")):
        rows.append(Row(f"by chance, in the {place}", [results[0].figures[figure].value] * 2, competes=False))
    columns = [Column(f"{what} in the part", "%", "higher") for what in ("peak", "map")]
    return Table(columns, rows, "Difference maps of species that differ in one part", "method")


def _pairs_table(singles: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate, pair by pair, how often maps peak in the differing part."""
    shares = [*singles[0]["peaks"], "chance"]
    names = [f"{single['first']} / {single['second']}" for single in singles]
    cells = [[s["part"], str(s["maps"]), *s["peaks"].values(), s["chance"]] for s in singles]
    columns = [Column("part"), Column("maps"), *[Column(label, "%") for label in shares]]
    return Table(columns, list(map(Row, names, cells)), "Peak in the part, pair by pair", "pair")


def _panels(runs: Sequence[Run]) -> list[Section]:
    """Show the maps of validation images that each run drew after its last epoch, if it drew any."""
    cards = []
    for run in runs:
        for path in sorted((run.folder / "panels").glob("epoch_*.png"))[-1:]:
            alt = f"validation images and the maps of {run.label} after the last epoch"
            cards.append((run.label, Shot(read_image(path), alt)))
    return [Section("Maps of validation images", "panels", {"cards": cards}, "Maps")] if cards else []


_TRAINING_CHARTS = (
    ("Loss (nats)", {"val_nll": "validation", "train_nll": "training"}, False),
    ("Accuracy", {"val_accuracy": "validation", "train_accuracy": "training"}, True),
    ("Spread of CALM's maps", {"prior_entropy_relative": "prior", "posterior_entropy_relative": "posterior"}, True),
)
"""Headings; columns of metrics.csv and what they are called (the second is dashed); whether in percent."""


def _training(runs: Sequence[Run]) -> Section:
    """Chart loss, accuracy, and for CALM how spread out its maps are, epoch by epoch."""
    colours: dict[str, str] = {}
    for run in runs:
        own = {"calm-em": "calm", "calm-ml": "other", "cam": "cam"}[run.method]
        colours[run.label] = next((c for c in (own, *PALETTE) if c not in colours.values()), own)
    charts = []
    for title, columns, percent in _TRAINING_CHARTS:
        lines = [
            Line(run.history["epoch"], run.history[column], f"{run.label}: {name}", colours[run.label], dashed)
            for (column, name), dashed in zip(columns.items(), (False, True), strict=True)
            for run in runs
            if column in run.history
        ]
        if lines:
            charts.append((chart(lines, title=title, x_label="epoch", percent=percent), lines))
    same = ("backbone", "data", "epochs", "batch_size", "seed")
    values = {
        "alike": len(runs) > 1 and len({str([run.config.get(name) for name in same]) for run in runs}) == 1,
        "charts": charts,
        "cells": {r.label: math.exp(r.history["prior_entropy"][-1]) for r in runs if r.history.get("prior_entropy")},
    }
    return Section("Training", "training", values)


def _making(
    data_sets: Sequence[DataSet], runs: Sequence[Run], problems: Sequence[str], sources: Sequence[Path], base: Path
) -> Section:
    """List commands, data, versions and options of every run and result: enough to make the page again."""
    results = [result for data in data_sets for group in data.groups for result in group.results]
    values = {
        "data_sets": data_sets,
        "runs": runs,
        "sources": [str(source.absolute()) for source in sources],
        "seconds": sum(r.provenance["seconds"] for r in results if is_number(r.provenance.get("seconds"))),
        "problems": [problem.replace(f"{base.resolve()}/", "") for problem in problems],
        "relative": partial(_relative, base=base.resolve()),
        "birds_config": birds_config,
    }
    return Section("How it was made", "making", values, "Making")


def _relative(value: Any, base: Path) -> Any:
    """Replace the paths in a value of any shape by ones that say nothing about the machine."""
    if isinstance(value, Mapping):
        return {name: _relative(member, base) for name, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_relative(member, base) for member in value]
    if isinstance(value, (str, Path)) and (path := Path(value)).is_absolute():
        return str(path.relative_to(base)) if path.is_relative_to(base) else path.name
    return value
