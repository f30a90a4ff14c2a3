"""Why this species and not that one: difference maps of pairs that differ in one part."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from calm.data.cues import PROTOCOL_SIZE, CuePair
from calm.model import CalmModel
from calm.render import Picture, draw_contour, draw_point, overlay
from calm.report.evidence import SIDE, enlarged
from calm.report.html import Html, Part, join, tag
from calm.report.page import Section
from calm.report.pictures import Shot, colour_bar, strip
from calm.report.provenance import facts
from calm.report.study import Cue, Study
from calm.report.tables import percent
from calm.resample import resize_maps

__all__ = ["differences_section"]

SHOWN = 4
RING = 10
"""Radius of the ring around a map's peak, in pixels: wide enough to see the peak."""


def differences_section(study: Study, plate: list[Picture]) -> Section:
    """Some pairs, of as many different parts as possible; of both species a test image with both models' maps."""
    cards = [_card(study, plate, cue) for cue in _chosen(study)]
    body = join(
        tag(
            "p",
            "Two species that differ in exactly one part, so that where a model should look is known. The white line"
            " is that part in the test image: the pixels of the bird that are nearest to its points. A map is the map"
            " of the first species minus the map of the second; red speaks for the first, blue for the second. The"
            " ring is at the largest difference. On the left both species in one pose. The images are the first of"
            " their species in which the part is about as large as usual; no map was looked at to choose them.",
        ),
        colour_bar("second species", "first species", "signed", "0"),
        *cards,
    )
    return Section("Why this species and not that one?", body, "Differences")


def _chosen(study: Study) -> list[Cue]:
    """Pairs to show: each part once, then again, in the order of the pairs."""
    by_part = sorted(study.single, key=lambda cue: cue.part)
    turns = [
        (turn, cue.number, cue)
        for _, cues in groupby(by_part, key=lambda cue: cue.part)
        for turn, cue in enumerate(cues)
    ]
    return sorted(
        (cue for *_, cue in sorted(turns, key=lambda turn: turn[:2])[:SHOWN]), key=lambda cue: cue.number
    )


def _card(study: Study, plate: list[Picture], cue: Cue) -> Html:
    pair = cue.pair
    one, other = study.names[pair.first], study.names[pair.second]
    rows: list[Shot] = []
    for label in (pair.first, pair.second):
        name = study.names[label]
        rows.append(Shot(plate[label], f"{name}, drawn", name, "drawn in the same pose"))
        image = _typical(study, cue, label)
        if image is not None:
            rows += _maps(study, image, cue)
    return tag(
        "article",
        tag("h3", f"{one} or {other}? ", tag("span", f"only the {cue.part} differs", class_="plain")),
        tag("div", strip(rows, columns=4, narrow=2), _rates(study, cue), class_="pair"),
        class_="card",
    )


def _rates(study: Study, cue: Cue) -> Html:
    """How often the maps of all the pair's images peak in the part."""
    labels = [run.label for run in (study.calm_run, study.cam_run)]
    rates = {label: cue.figures[label]["peak_in_part"] for label in labels}
    rates["a random pixel of the bird"] = cue.figures[labels[0]]["part_of_object"]
    return tag(
        "aside",
        tag("p", f"In all {cue.maps} test images of the two that show the {cue.part}, the map peaks in it:"),
        facts({name: percent(rate, 0) for name, rate in rates.items()}),
    )


def _typical(study: Study, cue: Cue, label: int) -> int | None:
    """The first image of the class whose part is at least as large as in half of the class's images."""
    records, asked = study.dataset.split.records, study.cues.samples.items()
    images = [i for i, numbers in asked if cue.number in numbers and records[i].label == label]
    if not images:
        return None
    areas = study.truth(cue, images).flatten(1).sum(dim=1)
    if not areas.any():
        return None
    first = int((areas >= areas[areas > 0].median()).nonzero()[0])
    return images[first]


def _maps(study: Study, image: int, cue: Cue) -> list[Shot]:
    picture, pair = study.picture(image), cue.pair
    (truth,) = study.truth(cue, [image])
    names = f"{study.names[pair.first]} and {study.names[pair.second]}"
    label = int(study.labels[image])
    shots = [Shot(_outlined(enlarged(picture), truth), f"test image with the {names} part outlined", "test image",
                  f"a {study.names[label]}")]  # fmt: skip
    for name, model, probs in (("CALM", study.calm, study.calm_probs), ("CAM", study.cam, study.cam_probs)):
        values = _signed(model, study.images(torch.tensor([image])), pair)
        peak = int(resize_maps(values.abs(), PROTOCOL_SIZE).argmax())
        y, x = divmod(peak, PROTOCOL_SIZE[1])
        hit = bool(truth[y, x])
        drawn = _outlined(overlay(picture, values, colormap="signed", size=(SIDE, SIDE)), truth)
        scale = SIDE / PROTOCOL_SIZE[0]
        drawn = draw_point(drawn, (x + 0.5) * scale, (y + 0.5) * scale, radius=RING)
        says: Part = f"says {study.names[int(probs[image].argmax())]}, {float(probs[image].max()):.2f}"
        verdict = tag("span", "in the part" if hit else "elsewhere", class_="good" if hit else "bad")
        shots.append(
            Shot(drawn, f"{name}: difference of the maps of {names}", join(f"{name}: ", verdict), says)
        )
    return shots


@torch.no_grad()
def _signed(model: CalmModel, images: Tensor, pair: CuePair) -> Tensor:
    """Map of the first class minus map of the second, on the grid, (h, w)."""
    maps = model(images).attribute(torch.tensor([[pair.first, pair.second]]), model.map_kind())[0]
    signed: Tensor = (maps[0] - maps[1]).float()
    return signed


def _outlined(picture: Picture, truth: Tensor) -> Picture:
    return draw_contour(picture, truth.float(), 0.5)
