"""The same images for all methods: the best, the worst and some at random, with the truth drawn in."""

# ruff: noqa: RUF001 -- typographic signs in prose
from __future__ import annotations

import math
import random
from collections.abc import Sequence

from calm.errors import CalmError
from calm.render import Picture, draw_boxes, draw_contour, overlay, resize_picture
from calm.report.drawn_maps import maps_of
from calm.report.found import Group
from calm.report.html import Html, join, tag
from calm.report.page import Section
from calm.report.pictures import Shot, colour_bar, strip
from calm.report.truth import Scene, scenes

__all__ = ["choose", "gallery_section"]

BEST, WORST, RANDOM = 3, 3, 4
SIDE = 176
"""Width and height of the pictures in the file, in pixels."""


def gallery_section(group: Group, *, seed: int = 0) -> Section:
    """Images of a benchmark with the maps of all its methods; sentences for what cannot be drawn any more.

    Args:
        group: its results; scores of single images choose what is shown.
        seed: of the images at random.
    """
    title = f"Images: {group.heading[0].lower()}{group.heading[1:]}"
    chosen = choose(group, seed=seed)
    if not chosen:
        return Section(title, tag("p", "No images are shown: the methods have no scored images in common."))
    try:
        views = scenes(group, [name for _, name in chosen])
    except (CalmError, OSError) as error:
        return Section(
            title, tag("p", f"No images are shown, for the data cannot be read any more: {error}.")
        )
    columns, gone = {}, []
    for result in group.results:
        try:
            columns[result.label] = maps_of(result, views)
        except (CalmError, OSError) as error:
            gone.append(tag("p", f"The maps of {result.label} are not shown: {error}.", class_="note"))
    normalizations = {result.label: result.provenance.get("normalization") for result in group.results}
    shown: dict[str, list[Html]] = {}
    for place, ((why, name), view) in enumerate(zip(chosen, views, strict=True)):
        cards = shown.setdefault(why, [])
        shots = [
            Shot(
                _with_truth(_enlarged(view.picture), view),
                f"{name} with what is true",
                view.label,
                view.question,
            )
        ]
        for result in group.results:
            if result.label in columns:
                how = "minmax" if normalizations[result.label] == "minmax" else "max"
                drawn = overlay(view.picture, columns[result.label][place], how=how, size=(SIDE, SIDE))  # type: ignore[arg-type]
                score = f"score {result.scores[name]:.2f}"
                shots.append(
                    Shot(_with_truth(drawn, view), f"map of {result.label} for {name}", result.label, score)
                )
        cards.append(
            tag(
                "article",
                strip(shots, columns=min(6, len(shots)), narrow=3 if len(shots) == 3 else 2),
                tag("p", name, class_="note"),
                class_="card",
            )
        )
    intro = (
        "The images are ordered by the mean of the methods’ scores for them, so that every method is shown on the same"
        f" ones: the {BEST} best, the {WORST} worst, and {RANDOM} drawn at random from the others. Yellow boxes and"
        " white lines are what is true. The maps are stretched to the range of colours, each on its own."
    )
    style = f"--shots:{min(6, 1 + len(columns))}"
    body = [
        join(tag("h3", _HEADINGS[why]), tag("div", *cards, class_="cards", style=style))
        for why, cards in shown.items()
    ]
    return Section(
        title, join(tag("p", intro), colour_bar("lowest", "highest value of the map"), *gone, *body)
    )


_HEADINGS = {"best": "Best", "worst": "Worst", "random": "At random"}


def choose(group: Group, *, seed: int = 0) -> list[tuple[str, str]]:
    """(best | worst | random, image id) of the images that all methods have scored, no image twice."""
    scored = [result.scores for result in group.results if result.scores]
    common = set.intersection(*(set(scores) for scores in scored)) if scored else set()
    means = {
        name: mean
        for name in common
        if math.isfinite(mean := sum(scores[name] for scores in scored) / len(scored))
    }
    order = sorted(means, key=lambda name: (-means[name], name))
    top = order[:BEST]
    bottom = order[len(top) :][-WORST:][::-1]
    rest = sorted(set(order) - {*top, *bottom})
    drawn = random.Random(seed).sample(rest, min(RANDOM, len(rest)))
    return [
        (why, name) for why, names in (("best", top), ("worst", bottom), ("random", drawn)) for name in names
    ]


def _enlarged(picture: Picture) -> Picture:
    return resize_picture(picture, (SIDE, SIDE))


def _with_truth(drawn: Picture, view: Scene) -> Picture:
    """The picture with the boxes and the outline of the region."""
    if view.region is not None:
        drawn = draw_contour(drawn, view.region, 0.5)
    return draw_boxes(drawn, _scaled(view.boxes, view.picture))


def _scaled(
    boxes: Sequence[tuple[int, int, int, int]], picture: Picture
) -> list[tuple[float, float, float, float]]:
    """Boxes in pixels of the picture as boxes in pixels of the drawing."""
    height, width = picture.shape[:2]
    across, down = SIDE / width, SIDE / height
    return [
        (x0 * across, y0 * down, min(SIDE - 1, (x1 + 1) * across - 1), min(SIDE - 1, (y1 + 1) * down - 1))
        for x0, y0, x1, y1 in boxes
    ]
