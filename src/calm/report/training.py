"""Training curves of several runs."""

# ruff: noqa: RUF001 -- typographic signs in prose
from __future__ import annotations

import math
from collections.abc import Sequence

from calm.report.charts import Line, chart, legend
from calm.report.html import Html, join, tag
from calm.report.page import Section
from calm.report.runs import Run

__all__ = ["training_section"]

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
