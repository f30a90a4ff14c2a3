"""The species of the procedural birds, on a plate: all in one pose, so that only their differences differ."""

# ruff: noqa: RUF001 -- typographic signs in prose
from __future__ import annotations

import numpy as np
import torch

from calm.data.birds import Drawing, choose_species, draw_bird
from calm.render import Picture
from calm.report.html import join, tag
from calm.report.names import listed
from calm.report.page import Section
from calm.report.pictures import Shot, strip
from calm.report.study import Study

__all__ = ["draw_plate", "species_section"]

POSES = 24
"""Poses that are tried for the plate."""
SKETCH, SIDE = 48, 176
"""Sides, in pixels, of a trial and of a picture on the plate."""


def draw_plate(count: int, seed: int) -> list[Picture]:
    """The first ``count`` species, each in the same scene: of some, the one that shows the bird best."""
    kinds = choose_species(count)
    scenes = [np.random.SeedSequence([seed, number, 9]) for number in range(POSES)]
    best = max(scenes, key=lambda scene: _shown(draw_bird(kinds[0], scene, SKETCH)))
    return [draw_bird(kind, best, SIDE).image for kind in kinds]


def _shown(drawing: Drawing) -> tuple[int, int]:
    """How well a drawing shows its bird: visible parts, then pixels, if it keeps clear of the border."""
    mask = drawing.mask
    cut = mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()
    return (0 if cut else sum(point is not None for point in drawing.points), int(mask.sum()))


def species_section(study: Study, plate: list[Picture]) -> Section:
    """What there is to be told apart."""
    names = study.names
    portraits = [
        Shot(picture, f"a drawn bird: {name}", name, _neighbours(study, label))
        for label, (picture, name) in enumerate(zip(plate, names, strict=True))
    ]
    some = torch.linspace(0, len(study.dataset) - 1, 10).round().long().tolist()
    seen = [Shot(study.picture(i), f"test image: {names[int(study.labels[i])]}") for i in some]
    side = study.calm.preprocessing.size[0]
    body = join(
        tag(
            "p",
            f"All {len(names)} species in one and the same pose and light, so that you see what tells them apart."
            " Below each: the species that differ from it in a single part.",
        ),
        strip(portraits, columns=5, narrow=2),
        tag(
            "p",
            f"The models never see them like this. They see pictures of {side}×{side} pixels with random pose, size,"
            " light, background and leaves in front, such as these test images:",
        ),
        strip(seen, columns=10, narrow=5),
    )
    return Section("The birds", body)


def _neighbours(study: Study, label: int) -> str:
    near = [
        f"{study.names[pair.second if pair.first == label else pair.first]} ({listed(study.differing(*key))})"
        for key, pair in study.pairs.items()
        if label in key and len(pair.groups) == 1
    ]
    return "near: " + listed(near) if near else "no near relative"
