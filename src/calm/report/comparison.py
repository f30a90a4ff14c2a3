"""The page that compares a CALM and a CAM model on birds: which sections, in which order."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path

from calm.report.benchmarked import benchmark_sections
from calm.report.differences import differences_section
from calm.report.evidence import evidence_section, mistakes_section
from calm.report.html import Part, join
from calm.report.names import listed
from calm.report.page import Figure, Page
from calm.report.provenance import provenance_section
from calm.report.results import headline, results_section
from calm.report.species import draw_plate, species_section
from calm.report.study import Study
from calm.report.tables import percent
from calm.report.training import training_section

__all__ = ["comparison_page"]


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
