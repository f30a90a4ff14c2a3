"""Everything that is measured for a report on two models of the same data: once, before any page is made.

Test images with their maps side by side.

Why this species and not that one: difference maps of pairs that differ in one part.

The species of the procedural birds, on a plate: all in one pose, so that only their differences differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.baselines import attribute
from calm.data.cues import CUB_GROUPS, PROTOCOL_SIZE, CuePair, group_mask, read_pairs
from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.transforms import eval_transform
from calm.errors import CalmError
from calm.evaluate.cue_localization import CueData, read_cue_data
from calm.evaluate.result import Result
from calm.evaluate.runner import Data, run
from calm.evaluate.subject import Subject, model_subject
from calm.evaluate.tables import write_tables
from calm.heatmaps import resize_maps
from calm.metrics.bootstrap import REPLICATES
from calm.model import CalmModel, load
from calm.output import CalmOutput
from calm.render import Picture, draw_contour, draw_point, overlay, resize_picture
from calm.report.found import Run
from calm.report.page import (
    P_Y,
    P_YZ,
    P_Z,
    P_Z_GIVEN_Y,
    Html,
    Part,
    Section,
    Shot,
    colour_bar,
    facts,
    join,
    listed,
    percent,
    species_name,
    strip,
    tag,
)
from calm_birds import Drawing, choose_species, draw_bird

__all__ = [
    "GRADIENT",
    "SIDE",
    "Cue",
    "Study",
    "differences_section",
    "draw_plate",
    "evidence_section",
    "measure",
    "mistakes_section",
    "species_section",
]

# ruff: noqa: RUF001 -- typographic signs in prose


SIDE = 192
"""Width and height of the pictures in the file, in pixels."""
SHOWN, SHOWN_WRONG = 10, 4


def evidence_section(study: Study) -> Section:
    """For some test images that CALM gets right: all maps of the predicted species."""
    indices = _first_right(study, SHOWN)
    cards = _cards(study, indices)
    body = join(
        tag(
            "p",
            "Of each species the first test image that CALM gets right; nothing else was chosen. A CALM model says"
            " for every cell z of a grid how probable it is that the cue is there, and what the bird is if so. Hence"
            " its maps are probabilities: the ",
            tag("b", "prior"),
            f" {P_Z} is where it looks, whatever the species; the ",
            tag("b", "joint"),
            f" {P_YZ} is the evidence for species y, and its cells add up to the prediction {P_Y}; the ",
            tag("b", "posterior"),
            f" {P_Z_GIVEN_Y} is the same map scaled to add up to 1. The three share one colour scale for each image."
            " CAM’s map is a score without unit, and the gradient tells which pixels would change that score:"
            " both are scaled to their own range.",
        ),
        colour_bar("0", "highest value of the image"),
        *cards,
    )
    return Section("Where is the evidence?", body, "Evidence")


def mistakes_section(study: Study) -> Section:
    """Images that CALM gets wrong, surest first; if there are none, those it is least sure of."""
    labels, names = study.labels, study.names
    said = study.calm_probs.argmax(dim=1)
    sure = study.calm_probs.amax(dim=1)
    wrong = (said != labels).nonzero().flatten()
    near = sum(len(study.differing(int(said[i]), int(labels[i]))) == 1 for i in wrong)
    cam_wrong = study.cam_probs.argmax(dim=1) != labels
    text = (
        f"CALM is wrong about {len(wrong)} of {len(labels)} test images and CAM about {int(cam_wrong.sum())};"
        f" {int(cam_wrong[wrong].sum())} of them are the same."
    )
    if len(wrong):
        chosen = wrong[sure[wrong].argsort(descending=True)][:SHOWN_WRONG]
        text += f" {near} of CALM’s {len(wrong)} mistakes confuse species that differ in one part only."
        text += " Here are the ones it was surest of." if len(wrong) > len(chosen) else ""
        rivals = labels[chosen]
    else:
        chosen = sure.argsort()[:2]
        text += " So here are the images that CALM is least sure of, with its second choice."
        rivals = study.calm_probs[chosen].topk(2).indices[:, 1]
    cards = []
    for index, first, second in zip(chosen.tolist(), said[chosen].tolist(), rivals.tolist(), strict=True):
        parts = study.differing(first, second)
        where = "every part" if len(parts) == len(CUB_GROUPS) else listed(parts or ["no part"])
        told = f" The two differ in {where}."
        right = "" if len(wrong) else " (right)"
        note = (
            f"CALM: {P_Y} = {_p(study.calm_probs[index, first])} for {names[first]} and"
            f" {_p(study.calm_probs[index, second])} for {names[second]}.{told}"
        )
        cards.append(
            _evidence_card(
                f"CALM says {names[first]}{right}",
                f"it is: {names[second]}" if len(wrong) else f"second choice: {names[second]}",
                _comparison(study, index, first, second),
                note,
                good=not len(wrong),
            )
        )
    body = join(
        tag("p", text, " In the difference map red speaks for what CALM says, blue against it."), *cards
    )
    return Section("And when it is wrong?", body, "Mistakes")


def _first_right(study: Study, count: int) -> Tensor:
    right = study.calm_probs.argmax(dim=1) == study.labels
    firsts: dict[int, int] = {}
    for index in right.nonzero().flatten().tolist():
        firsts.setdefault(int(study.labels[index]), index)
    return torch.tensor([firsts[label] for label in sorted(firsts)][:count], dtype=torch.int64)


def _cards(study: Study, indices: Tensor) -> list[Html]:
    """One card an image, with the six pictures of its true species, which CALM predicts."""
    if not len(indices):
        return [tag("p", "CALM got no test image right: it was trained too little for this section.")]
    images, targets = study.images(indices), study.labels[indices]
    with torch.no_grad():
        output = study.calm(images)
        assert isinstance(output, CalmOutput)
        joint, posterior = output.attribute(targets, "joint"), output.attribute(targets, "posterior")
        prior, cam = output.prior, study.cam.attribute(images, targets, size=joint.shape[-2:])  # type: ignore[arg-type]
    gradient = attribute(study.cam, images, targets, "smoothgrad")
    cards = []
    for place, (index, target) in enumerate(zip(indices.tolist(), targets.tolist(), strict=True)):
        name, picture = study.names[target], study.picture(index)
        scale = max(float(posterior[place].max()), float(prior[place].max()))
        shots = [
            Shot(enlarged(picture), f"test image of a {name}", "image"),
            _shot(picture, joint[place] / scale, "clipping", "CALM: joint", name),
            _shot(picture, prior[place] / scale, "clipping", "CALM: prior", name),
            _shot(picture, posterior[place] / scale, "clipping", "CALM: posterior", name),
            _shot(picture, cam[place], "minmax", "CAM", name),
            _shot(picture, gradient[place], "max", "SmoothGrad of CAM", name),
        ]
        note = (
            f"CALM: {P_Y} = {_p(study.calm_probs[index, target])}, and the {joint[place].numel()} cells of the"
            f" joint map sum to {_p(joint[place].sum())}. {_rest(study, study.calm_probs[index])}"
            f" CAM: {P_Y} = {_p(study.cam_probs[index, target])}."
        )
        verdict = (
            "both models are right" if int(study.cam_probs[index].argmax()) == target else "CAM is wrong"
        )
        cards.append(_evidence_card(name, verdict, shots, note, good=True))
    return cards


def _comparison(study: Study, index: int, first: int, second: int) -> list[Shot]:
    """The maps of two classes for one image."""
    images, picture = study.images(torch.tensor([index])), study.picture(index)
    classes = torch.tensor([[first, second]])
    with torch.no_grad():
        joint = study.calm(images).attribute(classes, "joint")[0]
        cam = study.cam(images).attribute(classes, "cam")[0]
    scale = float(joint.max())
    one, other = study.names[first], study.names[second]
    return [
        Shot(enlarged(picture), f"test image {index}", "image"),
        _shot(picture, joint[0] / scale, "clipping", f"CALM: {one}", one),
        _shot(picture, joint[1] / scale, "clipping", f"CALM: {other}", other),
        Shot(
            overlay(picture, joint[0] - joint[1], colormap="signed", size=(SIDE, SIDE)),
            f"difference of CALM's maps of {one} and {other}",
            "CALM: difference",
        ),
        _shot(picture, cam[0], "minmax", f"CAM: {one}", one),
        _shot(picture, cam[1], "minmax", f"CAM: {other}", other),
    ]


def _evidence_card(title: str, verdict: str, shots: Sequence[Shot], note: str, *, good: bool) -> Html:
    mark = tag("span", verdict, class_="good" if good else "bad")
    return tag(
        "article",
        tag("h3", title, " ", mark),
        strip(shots, columns=6, narrow=3),
        tag("p", note, class_="note"),
        class_="card",
    )


def enlarged(picture: Picture) -> Picture:
    """A picture at the size of its overlays."""
    return resize_picture(picture, (SIDE, SIDE))


def _shot(picture: Picture, values: Tensor, how: str, label: str, name: str) -> Shot:
    drawn = overlay(picture, values, how=how, size=(SIDE, SIDE))  # type: ignore[arg-type]
    return Shot(drawn, f"{label} map for {name}", label)


def _rest(study: Study, probs: Tensor) -> str:
    value, label = probs.topk(2)
    return f"Second choice: {study.names[int(label[1])]}, {_p(value[1])}."


def _p(value: Tensor) -> str:
    return f"{float(value):.3f}"


PAIRS_SHOWN = 4
RING = 10
"""Radius of the ring around a map's peak, in pixels: wide enough to see the peak."""


def differences_section(study: Study, plate: list[Picture]) -> Section:
    """Some pairs, of as many different parts as possible; of both species a test image with both models' maps."""
    cards = [_difference_card(study, plate, cue) for cue in _chosen(study)]
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
        (cue for *_, cue in sorted(turns, key=lambda turn: turn[:2])[:PAIRS_SHOWN]),
        key=lambda cue: cue.number,
    )


def _difference_card(study: Study, plate: list[Picture], cue: Cue) -> Html:
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


# ruff: noqa: RUF001 -- typographic signs in prose


POSES = 24
"""Poses that are tried for the plate."""
SKETCH, SPECIES_SIDE = 48, 176
"""Sides, in pixels, of a trial and of a picture on the plate."""


def draw_plate(count: int, seed: int) -> list[Picture]:
    """The first ``count`` species, each in the same scene: of some, the one that shows the bird best."""
    kinds = choose_species(count)
    scenes = [np.random.SeedSequence([seed, number, 9]) for number in range(POSES)]
    best = max(scenes, key=lambda scene: _shown(draw_bird(kinds[0], scene, SKETCH)))
    return [draw_bird(kind, best, SPECIES_SIDE).image for kind in kinds]


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


Progress = Callable[[str], None]

CUES = "cue-localization"
BENCHMARKS = (CUES, "remove-and-classify", "localization", "classification")
"""Those on the page, in its order."""
GRADIENT = "Plain gradient of CAM"
"""A row of cue localization beside the two models' own maps."""
BATCH = 64


@dataclass(frozen=True)
class Cue:
    """A pair of species that differ in one part.

    Attributes:
        number: its place among the pairs of cue localization.
        pair: the two classes, and the part.
        maps: how many difference maps it asks for: test images of the two that show the part.
        figures: of each method its ``peak_in_part``, ``mass_in_part``, and their chance levels ``part_of_image`` and
            ``part_of_object``, means over these maps.
    """

    number: int
    pair: CuePair
    maps: int
    figures: Mapping[str, Mapping[str, float]]

    @property
    def part(self) -> str:
        """The name of the part."""
        return CUB_GROUPS[self.pair.groups[0]].name


@dataclass(frozen=True)
class Study:
    """Two models, their test images, and what came out.

    Attributes:
        root: of the data set.
        dataset: the test images, prepared for both models.
        calm: a CALM model, in evaluation mode.
        cam: a CAM model, in evaluation mode.
        calm_run: the training of ``calm``.
        cam_run: the training of ``cam``.
        calm_probs: p(y | x) of every test image, (n, C).
        cam_probs: the same of the CAM model.
        sum_error: the largest difference, over all images and classes, of the sum of a joint map to p(y | x).
        cues: pairs of species that differ in few parts, and where these are.
        benchmarks: by name, its results: of both runs' labels, and in cue localization of `GRADIENT`.
        data: what the results say about the data set.
        pairs: all pairs of species and the part groups in which they differ.
    """

    root: Path
    dataset: ImageDataset
    calm: CalmModel
    cam: CalmModel
    calm_run: Run
    cam_run: Run
    calm_probs: Float[Tensor, "n c"]
    cam_probs: Float[Tensor, "n c"]
    sum_error: float
    cues: CueData
    benchmarks: Mapping[str, tuple[Result, ...]]
    data: Mapping[str, Any]
    pairs: dict[tuple[int, int], CuePair]

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """True classes of the test images."""
        return torch.tensor([record.label for record in self.dataset.split.records])

    @property
    def names(self) -> list[str]:
        """Names of the classes, as people write them."""
        return [species_name(name) for name in self.dataset.split.class_names]

    @property
    def pointing(self) -> dict[str, Result]:
        """Cue localization by method."""
        return {result.label: result for result in self.benchmarks[CUES]}

    @property
    def single(self) -> list[Cue]:
        """The pairs that differ in one part, of which an image shows it."""
        details = {label: result.details["pairs"] for label, result in self.pointing.items()}
        first = next(iter(details.values()))
        return [
            Cue(number, pair, first[number]["shown"], {name: rows[number] for name, rows in details.items()})
            for number, pair in enumerate(self.cues.pairs)
            if len(pair.groups) == 1 and first[number]["shown"]
        ]

    def images(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b 3 H W"]:
        """Test images as the models see them."""
        return _images(self.dataset, indices)

    def picture(self, index: int) -> Picture:
        """A test image as people see it."""
        return np.asarray(self.dataset.picture(index))

    def truth(self, cue: Cue, images: Sequence[int]) -> Bool[Tensor, "b H W"]:
        """The pixels of the part that differs, in some images, at the size of the protocol."""
        regions = self.cues.regions(self.dataset.split.records, torch.tensor(images))
        return group_mask(regions, cue.pair.groups)

    def differing(self, one: int, other: int) -> list[str]:
        """Names of the part groups in which two classes differ."""
        pair = self.pairs.get((min(one, other), max(one, other)))
        return [CUB_GROUPS[group].name for group in pair.groups] if pair else []


def measure(root: Path, split: Split, calm_run: Run, cam_run: Run, out: Path, progress: Progress) -> Study:
    """Load the best weights of two runs and test them.

    Args:
        root: of a data set in the layout of CUB_200_2011, with segmentations.
        split: its test split.
        calm_run: a run of CALM-EM or CALM-ML.
        cam_run: a run of CAM on the same data.
        out: folder of the benchmarks' results; those that are there already are not computed again.
        progress: told what is being measured.

    Raises:
        CalmError: no two classes differ in one part, or no image shows it.
    """
    calm, cam = load(calm_run.folder), load(cam_run.folder)
    dataset = ImageDataset(split, eval_transform(calm.preprocessing), cache=True)
    progress("predictions")
    calm_probs, sum_error = _predict(calm, dataset)
    cam_probs, _ = _predict(cam, dataset)
    data = Data.of(split, root)
    found = _benchmarks(
        data,
        {calm_run.label: _subject(calm, calm_run), cam_run.label: _subject(cam, cam_run)},
        {GRADIENT: _subject(cam, cam_run, "gradient")},
        out,
        progress,
    )
    if any("peak_in_part" not in result.figures for result in found[CUES]):
        raise CalmError(f"no test image of {root} shows a part that tells two classes apart: try more images")
    cues = read_cue_data(split, root)
    pairs = {(pair.first, pair.second): pair for pair in read_pairs(root, range(1, len(CUB_GROUPS) + 1))}
    return Study(
        root,
        dataset,
        calm,
        cam,
        calm_run,
        cam_run,
        calm_probs,
        cam_probs,
        sum_error,
        cues,
        found,
        data.facts,
        pairs,
    )


def _subject(model: CalmModel, run: Run, method: str | None = None) -> Subject:
    return model_subject(model, method=method, about={"model": str(run.folder.resolve())})


def _benchmarks(
    data: Data, models: Mapping[str, Subject], others: Mapping[str, Subject], out: Path, progress: Progress
) -> dict[str, tuple[Result, ...]]:
    """All results, with the options of ``calm evaluate``, stored as it does, and called as the page calls them."""
    asked = [
        (name, label, subject)
        for name in BENCHMARKS
        for label, subject in ({**models, **others} if name == CUES else models).items()
    ]
    results: list[Result] = []
    for name, label, subject in asked:
        progress(f"{name.replace('-', ' ')} of {label} ({len(results) + 1} of {len(asked)})")
        results.append(run(name, subject, data, out, batch_size=BATCH, replicates=REPLICATES, seed=0))
    write_tables(results, out)
    found: dict[str, tuple[Result, ...]] = dict.fromkeys(BENCHMARKS, ())
    for (name, label, _), result in zip(asked, results, strict=True):
        found[name] += (replace(result, label=label),)
    return found


def _images(dataset: ImageDataset, indices: Tensor) -> Tensor:
    return torch.stack([dataset[index][0] for index in indices.tolist()])


@torch.no_grad()
def _predict(model: CalmModel, dataset: ImageDataset) -> tuple[Tensor, float]:
    """p(y | x) of all images; and for CALM, how far a joint map's sum is from it at most."""
    probs, error = [], 0.0
    for indices in torch.split(torch.arange(len(dataset)), BATCH):
        output = model(_images(dataset, indices))
        probs.append(output.probs)
        if isinstance(output, CalmOutput):
            error = max(error, float((output.joint.sum(dim=(-2, -1)) - output.probs).abs().max()))
    return torch.cat(probs), error
