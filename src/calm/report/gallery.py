"""The same images for all methods: the best, the worst and some at random, with the truth drawn in.

What is true of the images of a gallery: boxes, regions, and which class or pair of classes the maps are about.

The maps behind a result, made again for a few images from what its provenance names.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from calm.data.cues import group_mask
from calm.data.loading import load_split
from calm.data.records import Record, Split
from calm.errors import CalmError
from calm.evaluate.cue_localization import read_cue_data
from calm.evaluate.result import Result
from calm.evaluate.runner import READING
from calm.evaluate.subject import model_subject, read_map
from calm.images import read_rgb
from calm.model import load
from calm.output import difference
from calm.render import Picture, draw_boxes, draw_contour, overlay, resize_picture
from calm.report.found import Group
from calm.report.page import Html, Section, Shot, colour_bar, join, listed, species_name, strip, tag

__all__ = ["Scene", "choose", "gallery_section", "maps_of", "scenes"]


@dataclass(frozen=True)
class Scene:
    """An image and what is true of it.

    Attributes:
        record: the image and its annotation.
        picture: uint8 RGB (H, W, 3), of its own size.
        boxes: in pixels of the picture.
        region: where it should be seen, (h, w) in [0, 1], of any size; None if nobody said.
        classes: what the maps are about: the class, or two for a difference map.
        label: the name of the image's class.
        question: what was asked, if not the class.
    """

    record: Record
    picture: Picture
    boxes: tuple[tuple[int, int, int, int], ...]
    region: Float[Tensor, "h w"] | None
    classes: tuple[int, ...]
    label: str
    question: str | None = None


def scenes(group: Group, ids: Sequence[str]) -> list[Scene]:
    """The images by id, read where the provenance says that the data are.

    Raises:
        CalmError: the data are gone, or no longer hold one of the images.
        OSError: a file cannot be read.
    """
    split = _split(group)
    places = {record.id: record for record in split.records}
    missing = [name for name in ids if name not in places]
    if missing:
        raise CalmError(f"split {split.name!r} of {split.root} has no image {missing[0]!r} now")
    records = [places[name] for name in ids]
    if group.benchmark == "cue-localization":
        return _cue_scenes(split, records, Path(group.data["root"]))
    return [
        Scene(
            record,
            _picture(split, record),
            record.boxes,
            _masks(record),
            (record.label,),
            species_name(split.class_names[record.label]),
        )
        for record in records
    ]


def _split(group: Group) -> Split:
    data = group.data
    if not data.get("root") or not Path(data["root"]).is_dir():
        raise CalmError(f"there is no folder {data.get('root', '(not recorded)')}")
    options: dict[str, Any] = {
        name: data[name] for name in ("layout", "metadata_root", *READING) if data.get(name) is not None
    }
    return load_split(data["root"], data.get("split", "test"), **options)


def _picture(split: Split, record: Record) -> Picture:
    return read_rgb(record.path, exif=split.exif)


def _masks(record: Record) -> Tensor | None:
    """The union of the masks of an image, (h, w)."""
    union: Any = None
    for path in record.masks:
        with Image.open(path) as image:
            inside = np.asarray(image.convert("L")) > 0
        union = inside if union is None else union | inside
    return None if union is None else torch.from_numpy(union).float()


def _cue_scenes(split: Split, records: Sequence[Record], root: Path) -> list[Scene]:
    """Each image with a pair of its class that differs in as few part groups as possible, one of them visible."""
    chosen = replace(split, records=tuple(records))
    data = read_cue_data(chosen, root)
    regions = data.regions(chosen.records, torch.arange(len(records)))
    found = []
    for place, record in enumerate(records):
        if place not in data.samples:
            raise CalmError(f"image {record.id!r} shows no part that tells its class from another")
        pair = min((data.pairs[number] for number in data.samples[place]), key=lambda pair: len(pair.groups))
        other = pair.second if record.label == pair.first else pair.first
        parts = listed([data.groups[number].name for number in pair.groups])
        found.append(
            Scene(
                record,
                _picture(split, record),
                (),
                group_mask(regions[place], pair.groups).float(),
                (pair.first, pair.second),
                species_name(split.class_names[record.label]),
                f"versus {species_name(split.class_names[other])}: {parts}",
            )
        )
    return found


def maps_of(result: Result, scenes: Sequence[Scene]) -> list[Tensor]:
    """One map (h, w) for each scene: of its class, or the difference of its two classes.

    Raises:
        CalmError: the model or the folder of maps is gone, or a map is missing.
    """
    about: Mapping[str, Any] = result.provenance.get("subject", {})
    if about.get("maps"):
        return [_stored(Path(about["maps"]), scene.record.id) for scene in scenes]
    source = about.get("model")
    if not source:
        raise CalmError("its provenance names no model")
    if not Path(source).is_absolute():
        raise CalmError(
            f"its model {source} is no folder: to see its maps, download it and evaluate the folder"
        )
    if not Path(source).exists():
        raise CalmError(f"its model is no longer at {source}")
    model = load(source)
    subject = model_subject(model, method=about.get("method"), **(about.get("options") or {}))
    if subject.about["weights"] != about.get("weights"):
        raise CalmError(f"the model at {source} has other weights now: evaluate it again")
    images = model.preprocess([scene.picture for scene in scenes])
    maps = subject.look(images).maps(torch.tensor([scene.classes for scene in scenes])).detach()
    return list(maps[:, 0] if maps.shape[1] == 1 else difference(maps[:, 0], maps[:, 1]))


def _stored(folder: Path, name: str) -> Tensor:
    for path in (folder / f"{name}.npy", (folder / name).with_suffix(".npy")):
        if path.is_file():
            return torch.from_numpy(read_map(path)).float()
    raise CalmError(f"{folder} has no map of {name} now")


# ruff: noqa: RUF001 -- typographic signs in prose


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
