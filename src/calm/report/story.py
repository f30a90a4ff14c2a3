"""The sections that show single images: classes, evidence, mistakes, and classes that differ in one part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.baselines import attribute
from calm.data.cues import MAX_GROUPS, PROTOCOL_SIZE, CuePair, group_mask
from calm.data.records import Split
from calm.errors import CalmError
from calm.evaluate.cue_localization import CueData, read_cue_data
from calm.evaluate.reading import predictions
from calm.evaluate.result import Result
from calm.evaluate.subject import model_subject
from calm.explain import LEAST_TOP
from calm.files import read_json
from calm.heatmaps import Normalization, resize_maps
from calm.model import CalmModel
from calm.render import Picture, draw_contour, draw_peak, draw_point, overlay, resize_picture
from calm.report.found import CALM, Group, own_maps
from calm.report.gallery import load_model
from calm.report.page import Section, Shot, listed, species_name
from calm_birds import Drawing, choose_species, draw_bird

MOST_IMAGES = 600  # most test images that are predicted for these sections, evenly spaced over the split
BATCH = 64
SIDE = 192  # width and height of the pictures in the file, in pixels
PLATE_SIDE, SKETCH_SIDE = 176, 48  # the same of the classes, and of trials for a drawn one
DIFFERENCES = ("joint", "evidence")  # kinds of CALM's maps whose differences are shown
POSES = 24  # poses that are tried for drawn birds
CLASSES_SHOWN, EVIDENCE_SHOWN, MISTAKES_SHOWN, PAIRS_SHOWN, IMAGES_SHOWN = 20, 10, 4, 4, 10
RING = 10  # radius of the ring around a difference map's peak, in pixels: wide enough to see the peak


@dataclass(frozen=True)
class Classifier:
    """A model, and p(y | x) of every test image."""

    name: str
    model: CalmModel
    probs: Float[Tensor, "n c"]  # of the data's classes, in their order
    indices: Int[Tensor, " c"]  # the model's index of each of the data's classes

    @classmethod
    def predicting(cls, name: str, model: CalmModel, split: Split) -> Classifier:
        """Return the model with its predictions for the images of a split."""
        subject = model_subject(model)
        indices = torch.as_tensor(subject.classes(split)).cpu()
        if len(indices) != model.config.num_classes:
            more = f"{model.config.num_classes} classes, of which the data have {len(indices)}"
            raise CalmError(f"the {name} model has {more}: what it says of the others cannot be shown")
        batches = predictions(subject, split, batch_size=BATCH)
        return cls(name, model, torch.cat([batch.prediction.probs.cpu() for batch in batches])[:, indices], indices)

    def says(self, image: int) -> int:
        """Return the most probable class of an image."""
        return int(self.probs[image].argmax())


@dataclass(frozen=True)
class Study:
    """A CALM model, perhaps beside a CAM model, on test images."""

    root: Path  # of the data set
    split: Split  # the test images
    total: int  # how many the whole split has
    calm: Classifier  # the first CALM model of the results
    cam: Classifier | None  # their first CAM model
    cues: CueData | None  # which images show a part that tells two classes apart, and where, if that is annotated

    @classmethod
    def of(cls, groups: Sequence[Group]) -> Study | None:
        """Return the study of the models on a data set; None without a CALM model; a `CalmError` if one is gone."""
        by_method = {own_maps(result): result for group in groups for result in reversed(group.results)}
        calm = next((by_method[method] for method in CALM if method in by_method), None)
        if calm is None:
            return None
        root, whole = groups[0].root, groups[0].read_split()
        total = len(whole.records)
        split = replace(whole, records=tuple(whole.records[place] for place in _evenly_spaced(total, MOST_IMAGES)))
        cues = None
        with suppress(CalmError, OSError):  # there may be no such annotation
            cues = read_cue_data(split, root, range(1, MAX_GROUPS + 1))
        classifier = Classifier.predicting("CALM", load_model(calm), split)
        cam = Classifier.predicting("CAM", load_model(by_method["cam"]), split) if "cam" in by_method else None
        return cls(root, split, total, classifier, cam, cues)

    @property
    def noun(self) -> str:
        """What a class is called."""
        return "species" if self.pairs else "class"

    @cached_property
    def pairs(self) -> dict[tuple[int, int], CuePair]:
        """The part groups in which two classes differ, by (first, second)."""
        return {(pair.first, pair.second): pair for pair in self.cues.pairs} if self.cues else {}

    @cached_property
    def labels(self) -> Int[Tensor, " n"]:
        """True classes of the test images."""
        return torch.tensor([record.label for record in self.split.records])

    @cached_property
    def names(self) -> list[str]:
        """Names of the classes, as people write them."""
        return [species_name(name) for name in self.split.class_names]

    def picture(self, image: int) -> Picture:
        """Return a test image, of its own size."""
        reading = self.calm.model.preprocessing
        return reading.picture(reading.read(self.split.records[image].path, exif=self.split.exif))

    def differing(self, one: int, other: int) -> list[str]:
        """Return the names of the part groups in which two classes differ; empty if nothing says so."""
        pair = self.pairs.get((min(one, other), max(one, other)))
        return [self.cues.groups[group].name for group in pair.groups] if pair and self.cues else []


def story_sections(study: Study, singles: Sequence[Mapping[str, Any]], *, seed: int = 0) -> list[Section]:
    """Return the sections in order, `single_pairs` in the last; ``seed`` is of the scene in which birds are drawn."""
    plate = _plate(study, seed)
    sections = [_classes(study, plate), _evidence(study), _mistakes(study)]
    return [*sections, _differences(study, study.cues, plate, singles)] if singles and study.cues else sections


def single_pairs(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the pairs of classes that differ in one part which some image shows, as cue localization found them.

    Each has ``first`` and ``second`` (names of the classes), ``part``, ``maps`` (number of difference maps), ``peaks``
    (by the results' labels, the share of maps that peak in the part), ``chance`` (of a random pixel of the object).
    """
    tables = {r.label: r.details["pairs"] for r in results if "peak_in_part" in r.figures}
    return [
        {
            **{name: species_name(str(rows[0][name])) for name in ("first", "second")},
            "part": rows[0]["groups"][0],
            "maps": rows[0]["shown"],
            "peaks": {label: row["peak_in_part"] for label, row in zip(tables, rows, strict=True)},
            "chance": rows[0]["part_of_object"],
        }
        for rows in zip(*tables.values(), strict=False)
        if len(rows[0]["groups"]) == 1 and rows[0]["shown"]
    ]


def birds_config(root: Path) -> dict[str, Any] | None:
    """Return what drawn birds (`calm_birds`) were made from; None for another data set."""
    with suppress(CalmError, OSError, LookupError, TypeError, AttributeError):
        config: dict[str, Any] = read_json(root / "birds.json")["config"]
        if {"species", "size", "seed"} <= config.keys():
            return config
    return None


def _evenly_spaced(total: int, count: int) -> list[int]:
    return list(map(int, np.linspace(0, total - 1, min(total, count)).round()))


def _plate(study: Study, seed: int) -> list[Picture]:
    """Draw each species in the same scene, one that shows the bird best; return nothing for other data."""
    kinds = choose_species(len(study.names)) if birds_config(study.root) else ()
    if [species_name(kind.name) for kind in kinds] != study.names:
        return []
    scenes = [np.random.SeedSequence([seed, number, 9]) for number in range(POSES)]
    best = max(scenes, key=lambda scene: _visible(draw_bird(kinds[0], scene, SKETCH_SIDE)))
    return [draw_bird(kind, best, PLATE_SIDE).image for kind in kinds]


def _visible(drawing: Drawing) -> tuple[int, int]:
    """Return how well a drawing shows its bird: visible parts, then pixels, if it keeps clear of the border."""
    cut = drawing.mask.sum() > drawing.mask[1:-1, 1:-1].sum()
    return 0 if cut else sum(point is not None for point in drawing.points), int(drawing.mask.sum())


def _classes(study: Study, plate: Sequence[Picture]) -> Section:
    """Show what is to be told apart: drawn, or the first test image of each class; and some test images."""
    portraits, what = [], "a drawn bird" if plate else "test image"
    for label, name in enumerate(study.names[:CLASSES_SHOWN]):
        images = (study.labels == label).nonzero().flatten().tolist()
        if plate or images:
            picture = plate[label] if plate else _enlarged(study.picture(images[0]), PLATE_SIDE)
            portraits.append(Shot(picture, f"{what}: {name}", name, _neighbours(study, label)))
    seen = [
        Shot(_enlarged(study.picture(image), 96), f"test image: {study.names[int(study.labels[image])]}")
        for image in _evenly_spaced(len(study.labels), IMAGES_SHOWN)
    ]
    values = {"study": study, "portraits": portraits, "seen": seen, "drawn": bool(plate)}
    return Section("The birds" if plate else "The classes", "classes", values)


def _neighbours(study: Study, label: int) -> str:
    """Return the classes that differ from this one in one part, and that part."""
    single = [key for key, pair in study.pairs.items() if label in key and len(pair.groups) == 1]
    near = [f"{study.names[sum(key) - label]} ({listed(study.differing(*key))})" for key in single]
    return "near: " + listed(near) if near else "no near relative" if study.pairs else ""


def _evidence(study: Study) -> Section:
    """Show of each class the first image that CALM gets right, with all maps of that class."""
    right, firsts = study.calm.probs.argmax(dim=1) == study.labels, dict[int, int]()
    for image in right.nonzero().flatten().tolist():
        firsts.setdefault(int(study.labels[image]), image)
    images = [firsts[label] for label in sorted(firsts)][:EVIDENCE_SHOWN]
    values = {"study": study, "cards": _evidence_cards(study, images) if images else []}
    return Section("Where is the evidence?", "evidence", values, "Evidence")


def _evidence_cards(study: Study, images: list[int]) -> list[dict[str, Any]]:
    targets, calm, cam = study.labels[images], study.calm, study.cam
    paths = [study.split.records[image].path for image in images]
    with torch.no_grad():
        output = calm.model(calm.model.preprocess(paths))
        own = calm.indices[targets]
        joint, prior, posterior = (output.attribute(own, kind) for kind in ("joint", "prior", "posterior"))
    peaks = torch.maximum(posterior, prior).amax(dim=(1, 2), keepdim=True)
    scale = peaks.clamp(min=LEAST_TOP / prior[0].numel())  # so that a flat map looks flat
    maps = {"CALM: joint": joint / scale, "CALM: prior": prior / scale, "CALM: posterior": posterior / scale}
    if cam:
        inputs, own = cam.model.preprocess(paths), cam.indices[targets]
        maps["CAM"] = cam.model.attribute(inputs, own, size=joint.shape[-2:])
        with suppress(CalmError):  # without the extra "baselines"
            maps["SmoothGrad of CAM"] = attribute(cam.model, inputs, own, "smoothgrad")
    ways: dict[str, Normalization] = {"CAM": "minmax", "SmoothGrad of CAM": "max"}
    cards = []
    for place, (image, target) in enumerate(zip(images, targets.tolist(), strict=True)):
        name, picture = study.names[target], study.picture(image)
        shots = [Shot(_enlarged(picture), f"test image of a {name}", "image")]
        shots += [_shot(picture, m[place], ways.get(label, "clipping"), label, name) for label, m in maps.items()]
        second = int(calm.probs[image].topk(2).indices[1])
        odds = _difference(study, calm, image, target, second, "evidence")
        against = f"{float(odds.sum()):+.1f} nats against {study.names[second]}"
        shots.insert(4, _signed_shot(picture, odds, f"evidence for {name}, {against}", "CALM: evidence", against))
        cards.append({"image": image, "target": target, "second": second, "joint": joint[place], "shots": shots})
    return cards


def _mistakes(study: Study) -> Section:
    """Show images that CALM gets wrong, surest first; if there are none, those it is least sure of."""
    labels, probs = study.labels, study.calm.probs
    sure, says = probs.max(dim=1)
    wrong = (says != labels).nonzero().flatten()
    surest = wrong[sure[wrong].argsort(descending=True)][:MISTAKES_SHOWN]
    chosen = surest if len(wrong) else sure.argsort()[:2]
    rivals = labels[chosen] if len(wrong) else probs[chosen].topk(2).indices[:, 1]
    cards = [
        {"image": image, "first": first, "second": second, "shots": _two_classes(study, image, first, second)}
        for image, first, second in zip(chosen.tolist(), says[chosen].tolist(), rivals.tolist(), strict=True)
    ]
    cam_wrong = study.cam.probs.argmax(dim=1) != labels if study.cam else None
    values = {
        "study": study,
        "wrong": len(wrong),
        "cam_wrong": None if cam_wrong is None else int(cam_wrong.sum()),
        "both_wrong": None if cam_wrong is None else int(cam_wrong[wrong].sum()),
        "near": sum(len(study.differing(int(says[i]), int(labels[i]))) == 1 for i in wrong),
        "cards": cards,
    }
    return Section("And when it is wrong?", "mistakes", values, "Mistakes")


def _two_classes(study: Study, image: int, first: int, second: int) -> list[Shot]:
    """Return the maps of two classes for one image."""
    picture, names = study.picture(image), (study.names[first], study.names[second])
    joint = _class_maps(study, study.calm, image, first, second)
    shots = [Shot(_enlarged(picture), f"test image {image}", "image")]
    uniform = float(joint.sum((1, 2)).max()) / joint[0].numel()
    scaled = joint / max(float(joint.max()), LEAST_TOP * uniform)
    shots += [_shot(picture, m, "clipping", f"CALM: {name}", name) for m, name in zip(scaled, names, strict=True)]
    for kind in DIFFERENCES:
        signed = _difference(study, study.calm, image, first, second, kind)
        alt = f"difference of CALM's {kind} maps of {' and '.join(names)}"
        shots.append(_signed_shot(picture, signed, alt, f"CALM: {kind} difference"))
    if study.cam:
        cam = _class_maps(study, study.cam, image, first, second)
        shots += [_shot(picture, m, "minmax", f"CAM: {name}", name) for m, name in zip(cam, names, strict=True)]
    return shots


@torch.no_grad()
def _class_maps(
    study: Study, classifier: Classifier, image: int, *classes: int, kind: str | None = None
) -> Float[Tensor, "k h w"]:
    """Return the model's maps of some classes for an image, on its grid; without a kind its main ones."""
    model = classifier.model
    output = model(model.preprocess([study.split.records[image].path]))
    maps: Tensor = output.attribute(classifier.indices[torch.tensor([classes])], kind)[0].float().cpu()
    return maps


def _difference(
    study: Study, classifier: Classifier, image: int, first: int, second: int, kind: str | None = None
) -> Float[Tensor, "h w"]:
    """Return the map of one class minus that of another, on the grid."""
    maps = _class_maps(study, classifier, image, first, second, kind=kind)
    return maps[0] - maps[1]


def _signed_shot(picture: Picture, signed: Tensor, alt: str, label: str, note: str = "") -> Shot:
    """Draw a difference over its picture, with a ring at its largest absolute value."""
    drawn = overlay(picture, signed, colormap="signed", size=(SIDE, SIDE))
    return Shot(draw_peak(drawn, signed.abs()), alt, label, note)


def _differences(
    study: Study, cues: CueData, plate: Sequence[Picture], singles: Sequence[Mapping[str, Any]]
) -> Section:
    """Show pairs with as many different parts as possible: of both classes an image, with the models' maps."""
    known = {(study.names[pair.first], study.names[pair.second]): n for n, pair in enumerate(cues.pairs)}
    parts = [single["part"] for single in singles]
    turns = [parts[:place].count(part) for place, part in enumerate(parts)]  # how many pairs of its part come before
    first = sorted(range(len(parts)), key=lambda place: (turns[place], parts[place]))[:PAIRS_SHOWN]
    cards = []
    for single in (singles[place] for place in sorted(first)):
        if (names := (single["first"], single["second"])) in known:
            cards.append({**single, "shots": _pair_shots(study, cues, plate, known[names])})
    values = {"study": study, "cards": cards, "drawn": bool(plate)}
    return Section("Why this species and not that one?", "differences", values, "Differences")


def _pair_shots(study: Study, cues: CueData, plate: Sequence[Picture], number: int) -> list[Shot]:
    pair, shots = cues.pairs[number], []
    for label in (pair.first, pair.second):
        image = _typical_image(study, cues, number, label)
        if plate:
            name = study.names[label]
            shots.append(Shot(plate[label], f"{name}, drawn", name, "drawn in the same pose"))
        if image is not None:
            shots += _difference_maps(study, cues, image, pair)
    return shots


def _typical_image(study: Study, cues: CueData, number: int, label: int) -> int | None:
    """Return the first image of the class whose part is at least as large as in half of the class's images."""
    images = [i for i, numbers in cues.samples.items() if number in numbers and int(study.labels[i]) == label]
    areas = _truth(study, cues, images, cues.pairs[number]).flatten(1).sum(dim=1) if images else torch.zeros(0)
    if not areas.any():
        return None
    return images[int((areas >= areas[areas > 0].median()).nonzero()[0])]


def _truth(study: Study, cues: CueData, images: Sequence[int], pair: CuePair) -> Bool[Tensor, "b H W"]:
    """Return the pixels of the part that differs, in some images, at the size of the protocol."""
    return group_mask(cues.regions(study.split.records, torch.tensor(images)), pair.groups)


def _difference_maps(study: Study, cues: CueData, image: int, pair: CuePair) -> list[Shot]:
    """Draw the image with the part outlined, and each model's difference map with a ring at its peak."""
    picture, (truth,) = study.picture(image), _truth(study, cues, [image], pair)
    names = f"{study.names[pair.first]} and {study.names[pair.second]}"
    outlined = draw_contour(_enlarged(picture), truth.float(), 0.5)
    alt = f"test image with the part outlined in which {names} differ"
    shots = [Shot(outlined, alt, "test image", f"a {study.names[int(study.labels[image])]}")]
    models = [(study.calm, kind) for kind in DIFFERENCES] + ([(study.cam, "cam")] if study.cam else [])
    for classifier, kind in models:
        signed = _difference(study, classifier, image, pair.first, pair.second, kind)
        y, x = divmod(int(resize_maps(signed.abs(), PROTOCOL_SIZE).argmax()), PROTOCOL_SIZE[1])
        hit, scale = bool(truth[y, x]), SIDE / PROTOCOL_SIZE[0]
        drawn = draw_contour(overlay(picture, signed, colormap="signed", size=(SIDE, SIDE)), truth.float(), 0.5)
        drawn = draw_point(drawn, (x + 0.5) * scale, (y + 0.5) * scale, radius=RING)
        says, name = classifier.says(image), f"{classifier.name} {kind}:" if kind != "cam" else "CAM:"
        note = f"says {study.names[says]}, {classifier.probs[image, says]:.2f}"
        verdict = "in the part" if hit else "elsewhere"
        shots.append(Shot(drawn, f"{name} difference of the maps of {names}", name, note, verdict, good=hit))
    return shots


def _enlarged(picture: Picture, side: int = SIDE) -> Picture:
    return resize_picture(picture, (side, side))


def _shot(picture: Picture, values: Tensor, how: Normalization, label: str, name: str) -> Shot:
    """Draw a map over its picture, with a ring at its highest value."""
    drawn = overlay(picture, values, how=how, size=(SIDE, SIDE))
    return Shot(draw_peak(drawn, values), f"{label} map for {name}", label)
