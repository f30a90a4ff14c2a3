"""The same images for all methods of a benchmark: the best, the worst and some at random, with the truth drawn in."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from calm.data.cues import PROTOCOL_SIZE, group_mask
from calm.data.records import Record, Split
from calm.errors import CalmError
from calm.evaluate.cue_localization import read_cue_data
from calm.evaluate.localization import masks
from calm.evaluate.result import Result
from calm.evaluate.subject import model_subject, read_map, weights_digest
from calm.model import CalmModel, load
from calm.render import Picture, draw_boxes, draw_contour, draw_peak, overlay, resize_picture
from calm.report.found import Group, about
from calm.report.page import Shot, listed, species_name

BEST, WORST, RANDOM = 3, 3, 4
SIDE = 176  # width and height of the pictures in the file, in pixels


@dataclass(frozen=True)
class Scene:
    """An image and what is true of it."""

    record: Record
    picture: Picture  # uint8 RGB (H, W, 3), of its own size
    boxes: tuple[tuple[int, int, int, int], ...]  # in pixels of the picture
    region: Float[Tensor, "h w"] | None  # where it should be seen, in [0, 1], of any size; None if nothing says so
    classes: tuple[int, ...]  # what the maps are about: the class, or two for a difference map
    label: str  # the name of the image's class
    question: str = ""  # what is asked, if not the class
    exif: bool = False  # whether the picture is rotated as its EXIF orientation says


def gallery(group: Group, *, seed: int = 0) -> dict[str, Any]:
    """Return the values of ``templates/gallery.html``: cards with the maps of all methods, and what cannot be drawn."""
    values: dict[str, Any] = {"cards": {}, "counts": (BEST, WORST, RANDOM), "problems": [], "columns": 1}
    chosen = choose(group, seed=seed)
    if not chosen:
        return {**values, "problems": ["No images are shown: the methods have no scored images in common."]}
    try:
        views = scenes(group, [name for _, name in chosen])
    except (CalmError, OSError) as error:
        return {**values, "problems": [f"No images are shown, for the data cannot be read any more: {error}."]}
    maps = {}
    for result in group.results:
        try:
            maps[result.label] = maps_of(result, views)
        except (CalmError, OSError) as error:
            values["problems"].append(f"The maps of {result.label} are not shown: {error}.")
    drawn = [result for result in group.results if result.label in maps]
    for place, ((why, name), view) in enumerate(zip(chosen, views, strict=True)):
        picture = _with_truth(resize_picture(view.picture, (SIDE, SIDE)), view)
        shots = [Shot(picture, f"{name} with what is true", view.label, view.question)]
        shots += [_shot(result, view, maps[result.label][place]) for result in drawn]
        values["cards"].setdefault(why, []).append((name, shots))
    return {**values, "columns": min(6, 1 + len(drawn))}


def _shot(result: Result, view: Scene, values: Tensor) -> Shot:
    """Draw the map of a method with the truth and a ring at its highest value."""
    how = "minmax" if result.provenance.get("normalization") == "minmax" else "max"
    drawn = _with_truth(overlay(view.picture, values, how=how, size=(SIDE, SIDE)), view)  # type: ignore[arg-type]
    alt = f"map of {result.label} for {view.record.id}"
    return Shot(draw_peak(drawn, values), alt, result.label, f"score {result.scores[view.record.id]:.2f}")


def choose(group: Group, *, seed: int = 0) -> list[tuple[str, str]]:
    """Return (best | worst | random, image id) of the images that all methods have scored, no image twice."""
    scored = [result.scores for result in group.results if result.scores]
    common = set.intersection(*(set(scores) for scores in scored)) if scored else set()
    means = {name: sum(scores[name] for scores in scored) / len(scored) for name in common}
    means = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    order = sorted(means, key=lambda name: (-means[name], name))
    top = order[:BEST]
    bottom = order[len(top) :][-WORST:][::-1]
    rest = sorted(set(order) - {*top, *bottom})
    drawn = random.Random(seed).sample(rest, min(RANDOM, len(rest)))
    return [(why, name) for why, names in (("best", top), ("worst", bottom), ("random", drawn)) for name in names]


def scenes(group: Group, ids: Sequence[str]) -> list[Scene]:
    """Read images by id from where the provenance says that the data are; a `CalmError` if one is gone."""
    split = group.read_split()
    places = {record.id: record for record in split.records}
    missing = [name for name in ids if name not in places]
    if missing:
        raise CalmError(f"split {split.name!r} of {split.root} has no image {missing[0]!r} now")
    records = [places[name] for name in ids]
    reading = group.preprocessing
    pictures = [reading.picture(reading.read(record.path, exif=split.exif)) for record in records]
    if group.benchmark == "cue-localization":
        return _cue_scenes(split, records, pictures, Path(group.data["root"]))
    views = []
    for record, picture in zip(records, pictures, strict=True):
        region = masks(record, PROTOCOL_SIZE)[0].float() if record.masks else None
        label = species_name(split.class_names[record.label])
        views.append(Scene(record, picture, record.boxes, region, (record.label,), label, exif=split.exif))
    return views


def _cue_scenes(split: Split, records: Sequence[Record], pictures: Sequence[Picture], root: Path) -> list[Scene]:
    """Give each image a pair of its class that differs in as few part groups as possible, one of them visible."""
    data = read_cue_data(replace(split, records=tuple(records)), root)
    regions = data.regions(tuple(records), torch.arange(len(records)))
    views = []
    for place, record in enumerate(records):
        if place not in data.samples:
            raise CalmError(f"image {record.id!r} shows no part that tells its class from another")
        pair = min((data.pairs[number] for number in data.samples[place]), key=lambda pair: len(pair.groups))
        other = pair.second if record.label == pair.first else pair.first
        parts = listed([data.groups[number].name for number in pair.groups])
        picture, label = pictures[place], species_name(split.class_names[record.label])
        question = f"versus {species_name(split.class_names[other])}: {parts}"
        region = group_mask(regions[place], pair.groups).float()
        views.append(Scene(record, picture, (), region, (pair.first, pair.second), label, question, split.exif))
    return views


def maps_of(result: Result, scenes: Sequence[Scene]) -> list[Tensor]:
    """Return one map (h, w) for each scene, or the difference of two; a `CalmError` if any is gone."""
    known = about(result)
    if known.get("maps"):
        return [_stored(Path(known["maps"]), scene.record.id) for scene in scenes]
    model = load_model(result)
    subject = model_subject(model, method=known.get("method"), **(known.get("options") or {}))
    images = model.preprocess([model.preprocessing.read(s.record.path, exif=s.exif) for s in scenes])
    classes = torch.tensor([scene.classes for scene in scenes])
    if "classes" in known:  # the model numbers them in another order
        classes = torch.tensor(known["classes"])[classes]
    maps = subject.predict(images).maps(classes).detach()
    return list(maps[:, 0] if maps.shape[1] == 1 else (maps[:, 0] - maps[:, 1]).abs())


def load_model(result: Result) -> CalmModel:
    """Load the model of a result, in evaluation mode; a `CalmError` if it is gone or has other weights now."""
    source = about(result).get("model")
    if not source:
        raise CalmError("its provenance names no model")
    if not Path(source).is_absolute():
        raise CalmError(f"its model {source} is no folder: to see its maps, download it and evaluate the folder")
    if not Path(source).exists():
        raise CalmError(f"its model is no longer at {source}")
    model = load(source).eval()
    if weights_digest(model) != about(result).get("weights"):
        raise CalmError(f"the model at {source} has other weights now: evaluate it again")
    return model


def _stored(folder: Path, name: str) -> Tensor:
    for path in (folder / f"{name}.npy", (folder / name).with_suffix(".npy")):
        if path.is_file():
            return torch.from_numpy(read_map(path)).float()
    raise CalmError(f"{folder} has no map of {name} now")


def _with_truth(drawn: Picture, view: Scene) -> Picture:
    """Draw the boxes and the outline of the region."""
    if view.region is not None:
        drawn = draw_contour(drawn, view.region, 0.5)
    height, width = view.picture.shape[:2]
    across, down = SIDE / width, SIDE / height
    boxes = [
        (x0 * across, y0 * down, min(SIDE - 1, (x1 + 1) * across - 1), min(SIDE - 1, (y1 + 1) * down - 1))
        for x0, y0, x1, y1 in view.boxes
    ]
    return draw_boxes(drawn, boxes)
