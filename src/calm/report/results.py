"""The figures: how well the models classify, and how often they point at the part that tells species apart."""

# ruff: noqa: RUF001 -- typographic signs in prose
from __future__ import annotations

import math
from collections.abc import Sequence

from calm.metrics.bootstrap import Estimate
from calm.report.html import Html, join, tag
from calm.report.names import P_Y
from calm.report.page import Section
from calm.report.runs import Run
from calm.report.study import Study
from calm.report.tables import Column, Row, figures_table, percent

__all__ = ["classification_table", "headline", "results_section"]


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
