"""The page that compares a CALM and a CAM model on birds: which sections, in which order.

The figures: how well the models classify, and how often they point at the part that tells species apart.

Training curves of several runs.

How a report was made: enough to make it again.

The benchmarks of two models, for those who have read the story: what each asks, its figures, curves and images.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from calm.metrics.bootstrap import Estimate
from calm.report.benchmarks import benchmark_section
from calm.report.charts import Line, chart, legend
from calm.report.found import Group, Run, Style, styles
from calm.report.gallery import gallery_section
from calm.report.page import (
    P_Y,
    Column,
    Figure,
    Html,
    Page,
    Part,
    Row,
    Section,
    facts,
    figures_table,
    join,
    listed,
    percent,
    tag,
)
from calm.report.story import (
    Study,
    differences_section,
    draw_plate,
    evidence_section,
    mistakes_section,
    species_section,
)

__all__ = [
    "benchmark_sections",
    "classification_table",
    "comparison_page",
    "headline",
    "provenance_section",
    "results_section",
    "training_section",
]

# ruff: noqa: RUF001 -- typographic signs in prose


def classification_table(runs: Sequence[Run]) -> Html:
    """Test figures of the best weights of some runs, as their result.json has them."""
    columns = [
        Column("accuracy", "%", "higher"),
        Column("nll", ".3f", "lower"),
        Column("calibration error", ".3f", "lower"),
        Column("images/s in training", ".0f", "higher"),
        Column("seconds of training", ".0f", "lower"),
    ]
    rows = [
        Row(
            run.label,
            [
                run.test["accuracy"],
                run.test["nll"],
                run.test["ece"],
                run.result["images_per_second"],
                run.result["seconds"],
            ],
        )
        for run in runs
    ]
    return figures_table(columns, rows, corner="model", caption="Classification of the test images")


def results_section(study: Study) -> Section:
    """All tables, and what their figures mean."""
    body = join(
        tag(
            "div",
            classification_table([study.calm_run, study.cam_run]),
            _notes(
                ("Accuracy", "share of test images whose most probable species is the right one."),
                (
                    "nll",
                    "negative log-likelihood: −log p of the right species, averaged, in nats. It punishes confident"
                    " mistakes; 0 is perfect,"
                    f" guessing gives {math.log(len(study.names)):.2f}.",
                ),
                (
                    "Calibration error",
                    "how far stated probabilities are from how often they come true (15 bins, 0 is perfect). If a model"
                    " says 0.9 ten times, nine of these should be right.",
                ),
            ),
            class_="measure",
        ),
        tag(
            "div",
            _pointing_table(study),
            _notes(
                (
                    "Peak in the part",
                    f"share of the {_maps(study)} difference maps (a test image, and a pair of species that"
                    " differ in one part, one of which it shows) whose highest value lies in that part.",
                ),
                (
                    "Map in the part",
                    "how much of the map lies there. CALM’s maps are used as the probabilities they are; the others are"
                    " first scaled to their own range, as in the paper’s protocol.",
                ),
                (
                    "By chance",
                    "what a random pixel of the picture would score, and a random pixel of the bird: a map that finds"
                    " the bird, but not the part, scores like the latter.",
                ),
                (
                    "A peak elsewhere",
                    "need not be a wrong reason. A cell of the grid sees a neighbourhood, so that it may lie beside the"
                    f" part it judges by; and its species is told from {len(study.names) - 1} others at once.",
                ),
                (
                    "Intervals",
                    "95 percent, by drawing the images anew 1,000 times. They do not include what another seed of the"
                    " training would change.",
                ),
            ),
            class_="measure",
        ),
        _pairs_table(study),
        tag(
            "p",
            f"A check: over all test images and species, the sum of CALM’s joint map and its {P_Y} differ by at most"
            f" {study.sum_error:.1e}. The map is the prediction, taken apart by place.",
        ),
    )
    return Section("In numbers", body, "Numbers")


def _pointing_table(study: Study) -> Html:
    rows = []
    for label, result in study.pointing.items():
        figures = [result.figures[name] for name in ("peak_in_part", "mass_in_part")]
        rows.append(Row(label, [figure.value for figure in figures], [figure[1:] for figure in figures]))
    for name, figure in (("by chance, in the bird", "object"), ("by chance, in the picture", "image")):
        level = _figure(study, study.calm_run.label, f"part_of_{figure}").value
        rows.append(Row(name, [level, level], competes=False))
    columns = [Column("peak in the part", "%", "higher"), Column("map in the part", "%", "higher")]
    caption = "Difference maps of species that differ in one part"
    return figures_table(columns, rows, corner="method", caption=caption)


def _pairs_table(study: Study) -> Html:
    """Peak in the part by pair."""
    labels = list(study.pointing)
    columns = [
        Column("part"),
        Column("maps"),
        *[Column(label, "%") for label in labels],
        Column("chance, in the bird", "%"),
    ]
    rows = []
    for cue in study.single:
        name = f"{study.names[cue.pair.first]} / {study.names[cue.pair.second]}"
        hits = [cue.figures[label]["peak_in_part"] for label in labels]
        chance = cue.figures[labels[0]]["part_of_object"]
        rows.append(Row(name, [cue.part, str(cue.maps), *hits, chance]))
    table = figures_table(columns, rows, corner="pair", caption="Peak in the part, pair by pair")
    return tag("details", tag("summary", "Pair by pair"), table)


def _notes(*entries: tuple[str, str]) -> Html:
    return tag(
        "dl", *[tag("div", tag("dt", term), tag("dd", text)) for term, text in entries], class_="notes"
    )


def _maps(study: Study) -> int:
    return sum(cue.maps for cue in study.single)


def _figure(study: Study, label: str, name: str) -> Estimate:
    return study.pointing[label].figures[name]


def headline(study: Study) -> Html:
    """The result in a sentence."""
    ours, theirs = study.calm_run.label, study.cam_run.label
    calm, cam = (_figure(study, label, "peak_in_part").value for label in (ours, theirs))
    bird = _figure(study, ours, "part_of_object").value
    return join(
        f"{study.calm_run.label} tells {len(study.names)} species apart with ",
        tag("b", percent(study.calm_run.test["accuracy"])),
        f" accuracy (CAM {percent(study.cam_run.test['accuracy'])}). Asked why it is one species and not another that"
        " differs in a single part, its map peaks in that very part in ",
        tag("b", percent(calm)),
        f" of {_maps(study)} cases (CAM {percent(cam)}; a random pixel of the bird {percent(bird)}).",
    )


# ruff: noqa: RUF001 -- typographic signs in prose


COLOURS = {"calm-em": "calm", "calm-ml": "other", "cam": "cam"}


def training_section(runs: Sequence[Run]) -> Section:
    """Loss, accuracy, and for CALM how spread out its maps are, epoch by epoch."""
    nll = [*_lines(runs, "val_nll", "validation"), *_lines(runs, "train_nll", "training", dashed=True)]
    accuracy = [
        *_lines(runs, "val_accuracy", "validation"),
        *_lines(runs, "train_accuracy", "training", dashed=True),
    ]
    entropy = [
        Line(
            run.history["epoch"],
            run.history[column],
            f"{run.label}: {name}",
            COLOURS[run.config["method"]],
            dashed,
        )
        for run in runs
        for column, name, dashed in (
            ("prior_entropy_relative", "prior", False),
            ("posterior_entropy_relative", "posterior", True),
        )
        if column in run.history
    ]
    body = join(
        tag(
            "p",
            "Both models have the same network, the same pictures in the same order, and the same number of steps."
            " The loss shown is the negative log-likelihood, which compares across methods.",
        ),
        tag(
            "div",
            _panel(chart(nll, title="Loss (nats)", x_label="epoch"), nll),
            _panel(chart(accuracy, title="Accuracy", x_label="epoch", percent=True), accuracy),
            _panel(chart(entropy, title="Spread of CALM’s maps", x_label="epoch", percent=True), entropy),
            class_="charts",
        ),
        tag(
            "p",
            "Spread is the entropy of the map over that of a uniform one: at 100 percent the model looks everywhere,"
            " near 0 at a single cell. Training figures are on augmented images and on the way through the epoch,"
            f" validation figures at its end.{_cells(runs)}",
            class_="note",
        ),
    )
    return Section("Training", body)


def _cells(runs: Sequence[Run]) -> str:
    """The entropy of the last epoch as a number of cells."""
    texts = []
    for run in runs:
        if "prior_entropy" in run.history:
            cells = math.exp(run.history["prior_entropy"][-1])
            texts.append(
                f" In the end the prior of {run.label} is as spread out as a uniform one over {cells:.1f} cells."
            )
    return "".join(texts)


def _lines(runs: Sequence[Run], column: str, name: str, *, dashed: bool = False) -> list[Line]:
    return [
        Line(
            run.history["epoch"],
            run.history[column],
            f"{run.label}, {name}",
            COLOURS[run.config["method"]],
            dashed,
        )
        for run in runs
    ]


def _panel(drawing: Html, lines: Sequence[Line]) -> Html:
    return tag("div", drawing, legend(lines))


def provenance_section(command: str, known: Mapping[str, Part], runs: Sequence[Run], base: Path) -> Section:
    """The command, facts about data and time, versions, and the whole configuration of each run.

    Args:
        command: that makes the report again.
        known: facts by name.
        runs: what was trained.
        base: paths below it are written relative to it.
    """
    versions = runs[0].versions
    packages = ", ".join(f"{name} {number}" for name, number in versions["packages"].items() if number)
    machine = f"Python {versions['python']}, {versions['cpus']} cores, {versions['platform']}"
    configs = [
        tag(
            "details",
            tag("summary", f"All settings of {run.label}"),
            tag("pre", yaml.safe_dump(_relative(run.config, base), sort_keys=False, allow_unicode=True)),
        )
        for run in runs
    ]
    body = join(
        tag("pre", command, class_="command"),
        facts({**known, "Packages": packages, "Machine": machine}),
        *configs,
    )
    return Section("How it was made", body, "Making")


def _relative(value: Any, base: Path) -> Any:
    """A configuration whose paths do not tell whose machine it was."""
    if isinstance(value, dict):
        return {name: _relative(member, base) for name, member in value.items()}
    if isinstance(value, str) and value.startswith(f"{base.resolve()}/"):
        return str(Path(value).relative_to(base.resolve()))
    return value


# ruff: noqa: RUF001 -- typographic signs in prose


ASKED = {
    "cue-localization": (
        "The paper’s question to a map: of two species, does the difference of their maps lie on the parts that tell"
        " them apart? Above only pairs that differ in one part were asked, and only where the peak is. Here are all"
        " that differ in one, two or three parts, and every pixel counts: mPxAP is the area under the precision-recall"
        " curve of the pixels, and high only if the map covers the parts whole. A map that is a single spot in the"
        " right place is precise and covers little."
    ),
    "remove-and-classify": (
        "If a map is right about what the model looks at, the model is lost without it. The highest-scored pixels of"
        " its species’ map are erased, more and more of them, and as many random ones for comparison. R_k is how often"
        " the model is right without the highest k percent, over how often without k random percent; a low R_k is"
        " good. Once the model is right only by chance even without the random pixels, the ratio says nothing more:"
        " compare the curves of accuracy."
    ),
    "localization": (
        "How well does the map of its species cover the whole bird? Boxes ask for its outline, masks for its pixels."
        " It is not what a CALM is trained for: its map says where the cue is, and a cue can be smaller than the bird."
        " “Energy inside” asks the converse, how much of the map is on the bird."
    ),
    "classification": (
        "The same test images without maps: how often each model is right, and how far its stated probabilities can"
        " be trusted."
    ),
}
"""By benchmark: what it asks, in a reader's words."""

PICTURED = ("cue-localization", "localization")
"""Benchmarks that show images."""


def benchmark_sections(study: Study, *, seed: int = 0) -> list[Section]:
    """A section for each benchmark.

    Args:
        study: what was measured.
        seed: of the images that are drawn at random.
    """
    groups = [Group(name, results, study.data) for name, results in study.benchmarks.items()]
    style = styles(groups)
    return [_section(group, style, seed) for group in groups]


def _section(group: Group, style: Mapping[str, Style], seed: int) -> Section:
    images = None
    if group.benchmark in PICTURED:
        images = tag(
            "details",
            tag("summary", "Images: the best, the worst, and some at random"),
            gallery_section(group, seed=seed).body,
            class_="gallery",
        )
    body = join(tag("p", ASKED[group.benchmark]), benchmark_section(group, style).body, images)
    return Section(f"Benchmark: {group.title.lower()}", body, group.title)


def comparison_page(study: Study, *, command: str, known: Mapping[str, Part], base: Path, seed: int) -> Page:
    """Put the report together.

    Args:
        study: what was measured.
        command: that makes the report again.
        known: facts about data and time, for the last section.
        base: folder that holds data, runs and report.
        seed: of the scene on the plate of species, and of images drawn at random.
    """
    plate = draw_plate(len(study.names), seed)
    runs = [study.calm_run, study.cam_run]
    return Page(
        "A classifier that says where it saw the evidence",
        "CALM on procedural birds",
        headline(study),
        [
            species_section(study, plate),
            evidence_section(study),
            mistakes_section(study),
            differences_section(study, plate),
            results_section(study),
            training_section(runs),
            *benchmark_sections(study, seed=seed),
            provenance_section(command, known, runs, base),
        ],
        _figures(study),
        join(
            "CALM: Kim, Choe, Akata, Oh, “Keep CALM and Improve Visual Feature Attribution”, ICCV 2021. Made"
            f" {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC."
        ),
    )


def _figures(study: Study) -> list[Figure]:
    calm, cam = study.calm_run, study.cam_run
    hits = [study.pointing[run.label].figures["peak_in_part"].value for run in (calm, cam)]
    chance = study.pointing[calm.label].figures["part_of_object"].value
    parts = {cue.part for cue in study.single}
    return [
        Figure(percent(calm.test["accuracy"]), "test accuracy", f"CAM {percent(cam.test['accuracy'])}"),
        Figure(
            percent(hits[0]),
            "of difference maps peak in the part that differs",
            f"CAM {percent(hits[1])}, chance {percent(chance)}",
        ),
        Figure(
            str(len(study.names)),
            "species",
            f"{len(study.single)} pairs differ in only one part: {listed(sorted(parts), 'or')}",
        ),
        Figure(
            f"{calm.result['seconds'] / 60:.1f} min",
            "training of CALM",
            f"CAM {cam.result['seconds'] / 60:.1f} min; {_counted(calm.versions['threads'], 'thread')}",
        ),
    ]


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
