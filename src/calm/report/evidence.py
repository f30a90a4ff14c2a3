"""Test images with their maps side by side."""

# ruff: noqa: RUF001 -- typographic signs in prose
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calm.baselines import attribute
from calm.data.cues import CUB_GROUPS
from calm.output import CalmOutput
from calm.render import Picture, overlay, resize_picture
from calm.report.html import Html, join, tag
from calm.report.names import P_Y, P_YZ, P_Z, P_Z_GIVEN_Y, listed
from calm.report.page import Section
from calm.report.pictures import Shot, colour_bar, strip
from calm.report.study import Study

__all__ = ["SIDE", "evidence_section", "mistakes_section"]

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
            _card(
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
        joint, posterior = output.attribute(targets, "jointll"), output.attribute(targets, "gtcond")
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
        cards.append(_card(name, verdict, shots, note, good=True))
    return cards


def _comparison(study: Study, index: int, first: int, second: int) -> list[Shot]:
    """The maps of two classes for one image."""
    images, picture = study.images(torch.tensor([index])), study.picture(index)
    classes = torch.tensor([[first, second]])
    with torch.no_grad():
        joint = study.calm(images).attribute(classes, "jointll")[0]
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


def _card(title: str, verdict: str, shots: Sequence[Shot], note: str, *, good: bool) -> Html:
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
