"""A question to a model about pictures of any sizes, and its answer from one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from jaxtyping import Float
from torch import Tensor

from calm.baselines import BASELINES, attribute, canonical_method
from calm.errors import CalmError
from calm.heatmaps import Place, locate, resize_maps
from calm.inference import evaluation_mode
from calm.model import CalmModel
from calm.output import MAP_KINDS
from calm.render import Picture, draw_point, overlay

__all__ = ["Explanation", "Question", "ask", "class_index", "draw", "drawn_size", "explain"]

SMALLEST_PICTURE = 224
"""Overlays of smaller pictures are enlarged by a whole number, so that their shorter side has this many pixels, if
their longer side then has no more than `LONGEST_ENLARGED`."""

LONGEST_ENLARGED = 2048
"""Pixels that the longer side is enlarged to, at most."""

LARGEST_OVERLAY = 4_000_000
"""Overlays of larger pictures are shrunk to about so many pixels."""

LONGEST_OVERLAY = 65_535
"""Pixels of the longer side of an overlay, at most."""


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        method: a map kind of the model or a baseline, under its canonical name.
        target: the class to explain; None: in each picture the most probable one (other than ``versus``).
        versus: the class it is told apart from, for a difference map.
        superclass: the classes to sum over, for a ``-superclass`` kind.
    """

    method: str
    target: int | None = None
    versus: int | None = None
    superclass: tuple[int, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """The answer for one picture.

    Attributes:
        probs: p(y | x), (C,).
        target: the class that was explained.
        top: the most probable classes, best first.
        places: where the map of a class points, in the picture's pixels: for the target, and for the other
            classes of ``top`` where the method gives their maps at no cost.
        grid: the map as the method gives it: the model's grid (h, w), or its input pixels for gradients.
        signed: for a difference, target minus versus on the grid; else the same as ``grid``.
        size: (height, width) of the picture.
    """

    probs: Float[Tensor, " c"]
    target: int
    top: tuple[int, ...]
    places: dict[int, Place]
    grid: Float[Tensor, "h w"]
    signed: Float[Tensor, "h w"]
    size: tuple[int, int]

    @property
    def values(self) -> Float[Tensor, "H W"]:
        """The map at the size of the picture: bilinear, same unit, not normalised."""
        return resize_maps(self.grid, self.size)


def ask(
    model: CalmModel,
    *,
    target: str | None = None,
    kind: str | None = None,
    method: str | None = None,
    superclass: str | None = None,
    versus: str | None = None,
) -> Question:
    """The question that names and words stand for.

    Raises:
        CalmError: an unknown class, kind or method, one that does not fit the model, or options that exclude
            each other.
    """
    if kind is not None and method is not None:
        raise CalmError(f"kind {kind!r} and method {method!r} are both given: choose one")
    members = tuple(class_index(model, name) for name in superclass.split(",")) if superclass else ()
    if kind is None and members:
        kind = model.map_kind() + "-superclass"
    name = model.map_kind(kind) if method is None else canonical_method(method)
    if name not in BASELINES:
        name = model.map_kind(name)
    if ("superclass" in name) != bool(members):
        need = (
            f"takes no superclass: try {model.map_kind()}-superclass"
            if members
            else "needs superclass=NAME,NAME"
        )
        raise CalmError(f"{name} {need}")
    if versus is not None and members:
        raise CalmError("versus compares two classes: leave out superclass")
    if target is not None and members:
        raise CalmError("superclass asks about all of its classes together: leave out target")
    first = None if target is None else class_index(model, target)
    second = None if versus is None else class_index(model, versus)
    if second is not None and first == second:
        raise CalmError(f"target and versus are the same class {model.class_names[second]!r}: choose two")
    return Question(name, first, second, members)


def class_index(model: CalmModel, text: str) -> int:
    """The class of a name or an index.

    Case does not matter, a space may stand for an underscore, and CUB's number may be left out: "painted
    bunting" is "016.Painted_Bunting".

    Raises:
        CalmError: no such class; the message has the closest names.
    """
    wanted = _plain(text)
    names = [_plain(name) for name in model.class_names]
    short = [name.partition(".")[2] if name.split(".")[0].isdecimal() else name for name in names]
    for spelled in (names, short):
        if spelled.count(wanted) == 1:
            return spelled.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    close = [model.class_names[short.index(n)] for n in get_close_matches(wanted, short, n=3, cutoff=0.4)]
    hint = f"; close are {', '.join(map(repr, close))}" if close else ""
    raise CalmError(
        f"no class {text!r}: give one of the model's {len(names)} names or 0 to {len(names) - 1}{hint}"
    )


def _plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")


def explain(
    model: CalmModel, pictures: Sequence[Picture], question: Question, *, top: int = 5
) -> list[Explanation]:
    """Answer a question about pictures, (H, W, 3) uint8 RGB of any sizes, in one batch.

    Raises:
        CalmError: the method does not fit the model (`calm.output`).
    """
    images = model.preprocess(list(pictures))
    with evaluation_mode(model), torch.no_grad():
        output = model(images)
        probs = output.probs
        best = probs.topk(min(top, probs.shape[1])).indices
        if question.target is not None:
            first = torch.full_like(best[:, :1], question.target)
        elif question.versus is not None:
            first = probs.index_fill(1, torch.tensor([question.versus]).to(best.device), -1).argmax(
                1, keepdim=True
            )
        else:
            first = best[:, :1]
        second = [] if question.versus is None else [torch.full_like(first, question.versus)]
        asked = torch.cat([first, *second], dim=1)
        if question.method in BASELINES:
            classes = asked
            columns = [attribute(model, images, column, question.method) for column in asked.unbind(1)]
            maps = torch.stack(columns, dim=1)
        elif question.superclass:
            classes = asked
            groups = {int(c): question.superclass for c in asked.flatten().tolist()}
            maps = output.attribute(asked, question.method, superclass=groups)
        else:
            classes = torch.cat([asked, best], dim=1)  # the places of the best classes cost no pass
            maps = output.attribute(classes, question.method)
    maps, classes, best, probs = maps.cpu(), classes.cpu(), best.cpu(), probs.cpu()
    return [
        _answer(picture, probs[i], best[i], classes[i], maps[i], question)
        for i, picture in enumerate(pictures)
    ]


def _answer(
    picture: Picture, probs: Tensor, best: Tensor, classes: Tensor, maps: Tensor, question: Question
) -> Explanation:
    size = picture.shape[0], picture.shape[1]
    signed = maps[0] if question.versus is None else maps[0] - maps[1]
    grid = maps[0] if question.versus is None else signed.abs()
    target = int(classes[0])
    of_class = {int(c): values for c, values in zip(classes, maps, strict=True)}
    places = {c: locate(resize_maps(values, size)) for c, values in of_class.items()}
    if question.versus is not None:
        places[target] = locate(resize_maps(grid, size))
    return Explanation(probs, target, tuple(best.tolist()), places, grid, signed, size)


def draw(picture: Picture, explanation: Explanation, question: Question) -> Picture:
    """The overlay, with a ring around the highest point; small pictures are enlarged, very large ones shrunk."""
    height, width = picture.shape[:2]
    size = drawn_size(height, width)
    of_cam = question.method in MAP_KINDS and MAP_KINDS[question.method].family == "cam"
    drawn = overlay(
        picture,
        explanation.signed,
        how="minmax" if of_cam else "max",
        colormap="heat" if question.versus is None else "signed",
        size=size,
    )
    place = explanation.places[explanation.target]
    x, y = (place.x + 0.5) * size[1] / width, (place.y + 0.5) * size[0] / height
    return draw_point(drawn, x, y, radius=max(4, min(size) // 48))


def drawn_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of the overlay of a picture.

    >>> drawn_size(24, 40), drawn_size(500, 375), drawn_size(1, 60_000), drawn_size(8000, 8000)
    ((240, 400), (500, 375), (1, 60000), (2000, 2000))
    """
    factor = min(-(-SMALLEST_PICTURE // min(height, width)), LONGEST_ENLARGED // max(height, width))
    if factor > 1:
        return height * factor, width * factor
    scale = min(1.0, (LARGEST_OVERLAY / (height * width)) ** 0.5, LONGEST_OVERLAY / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
