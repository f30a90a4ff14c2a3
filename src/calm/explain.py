"""Explain pictures of any size with a model: which classes it considered, and where the map of each points.

`resolve_query` turns names of classes, kinds and methods into a `Query`; `explain` answers it for a batch of pictures
from one forward pass (baselines need more), `answer` and `complete` in two steps, the second of which threads may take;
`draw` makes the overlay of an `Explanation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from calm import latent, render
from calm.baselines import BASELINES, attribute, canonical_method
from calm.config import Precision
from calm.errors import CalmError
from calm.heatmaps import Normalization, Place, locate, resize_maps
from calm.images import ImageLike, Preprocessing
from calm.inference import evaluation_mode
from calm.model import CalmModel
from calm.output import MAP_KINDS
from calm.render import Colormap, Picture, add_legend, draw_point

SMALLEST_PICTURE = 224  # pixels of a shorter side below which overlays are enlarged, by a whole number
LONGEST_ENLARGED = 2048  # most pixels of the longer side of an enlarged overlay
LARGEST_OVERLAY = 4_000_000  # overlays of larger pictures are shrunk to about this many pixels
LONGEST_OVERLAY = 65_535  # most pixels of the longer side of an overlay
NARROWEST_LEGEND = 64  # pixels of an overlay's width below which no text could be read under it
FLAT = 2.0  # a map whose highest cell has less than so many times a uniform map's value says little about the place
LEAST_TOP = 4.0  # the last colour stands for at least so many times uniform, so that flat maps look flat


@dataclass(frozen=True)
class Query:
    """What to explain: see `resolve_query`.

    Attributes:
        method: A map kind of the model or a baseline, under its canonical name.
        target: Index of the class to explain; None is in each picture the most probable one (other than ``versus``).
        versus: Index of a class to compare with: the map is the difference, target minus versus.
        superclass: Indices of the classes to sum over, for a ``-superclass`` kind.
        signed: Whether the difference keeps its sign: above 0 for the target, below 0 for ``versus``.
        prior_exponent: Of a map kind of CALM, see `CalmOutput.attribute`.
    """

    method: str
    target: int | None = None
    versus: int | None = None
    superclass: tuple[int, ...] = ()
    signed: bool = False
    prior_exponent: float = 1.0


def resolve_query(
    model: CalmModel,
    *,
    target: str | None = None,
    kind: str | None = None,
    method: str | None = None,
    superclass: str | None = None,
    versus: str | None = None,
    signed: bool | None = None,
    prior_exponent: float = 1.0,
) -> Query:
    """Check names of classes, kinds and methods against a model, and return the query that they mean.

    Classes are given as to `CalmModel.class_index`, those of ``superclass`` with commas between them. Without a kind or
    method, the kind is the model's main one, or its superclass kind if ``superclass`` is given. If ``signed`` is None,
    a difference of evidence is signed, and those of other methods are absolute.

    Raises:
        CalmError: If a class, kind or method is unknown or does not fit the model, or options exclude each other.
    """
    if kind is not None and method is not None:
        raise CalmError(f"kind {kind!r} and method {method!r} are both given: choose one")
    main = model.map_kind()
    members = tuple(model.class_index(name) for name in superclass.split(",")) if superclass else ()
    if kind is None:
        kind = f"{main}-superclass" if members else main
    name = model.map_kind(kind) if method is None else canonical_method(method, model)
    if ("superclass" in name) != bool(members):
        problem = f"takes no superclass: try {main}-superclass" if members else "needs superclass=NAME,NAME"
        raise CalmError(f"{name} {problem}")
    if versus is not None and members:
        raise CalmError("versus compares two classes: leave out superclass")
    if target is not None and members:
        raise CalmError("superclass explains all of its classes together: leave out target")
    first = None if target is None else model.class_index(target)
    second = None if versus is None else model.class_index(versus)
    if second is not None and first == second:
        raise CalmError(f"target and versus are the same class {model.class_names[second]!r}: choose two")
    compares = name in MAP_KINDS and MAP_KINDS[name].compares
    if second is None and compares:
        raise CalmError(f"{name} compares two classes: give the other one as versus")
    if second is None and signed is not None:
        raise CalmError("signed is about the difference of two classes: give the second as versus, or leave it out")
    if prior_exponent != 1:
        if name in BASELINES or model.config.method == "cam":
            raise CalmError(
                f"prior_exponent is {prior_exponent:g}, but {name} of this model reads no prior: leave it out"
            )
        latent.check_exponent(prior_exponent)
    return Query(name, first, second, members, compares if signed is None else signed, prior_exponent)


@dataclass(frozen=True)
class Explanation:
    """The explanation of one picture.

    Attributes:
        probs: p(y | x).
        target: Index of the class that was explained.
        top: Indices of the most probable classes, best first.
        places: Where the map of a class points, in the picture's pixels: for the target, and for the other classes of
            ``top`` where the method gives their maps at no cost.
        grid: The map as the method gives it: on the model's grid (h, w), or at its input pixels for gradients.
            A difference is absolute, unless the query says signed.
        signed: For a difference, target minus versus on the grid; else the same as ``grid``.
        size: (height, width) of the picture.
        uniform: The value that each cell would have if the map, or the two maps of a difference together, were spread
            evenly: what a map without knowledge of the place has. None if the values of the method do not add up.
    """

    probs: Float[Tensor, " c"]
    target: int
    top: tuple[int, ...]
    places: dict[int, Place]
    grid: Float[Tensor, "h w"]
    signed: Float[Tensor, "h w"]
    size: tuple[int, int]
    uniform: float | None = None

    @property
    def peak(self) -> float | None:
        """The highest value of the map, for a difference the largest absolute one, in multiples of ``uniform``."""
        return float(self.signed.abs().amax()) / self.uniform if self.uniform else None

    @property
    def flat(self) -> bool:
        """Whether the map says little about the place: its peak is below `FLAT`, or it is constant."""
        return bool(self.signed.amax() == self.signed.amin()) if self.peak is None else self.peak < FLAT

    @property
    def values(self) -> Float[Tensor, "H W"]:
        """The map at the size of the picture: bilinear, in the same unit, not normalised."""
        return resize_maps(self.grid, self.size)


@dataclass(frozen=True)
class Answer:
    """What a model says of one picture, before its maps are compared and resized (`complete`)."""

    probs: Float[Tensor, " c"]
    top: tuple[int, ...]
    classes: tuple[int, ...]  # of the maps: the target, then ``versus`` if there is one, then ``top`` at no cost
    maps: Float[Tensor, "k h w"]
    calm: bool  # whether the model is a CALM, whose maps add up to probabilities


def explain(model: CalmModel, pictures: Sequence[Picture], query: Query, *, top: int = 5) -> list[Explanation]:
    """Explain pictures, (H, W, channels) uint8 of any sizes, in one batch. The model's state is restored afterwards.

    Raises:
        CalmError: If the method does not fit the model.
    """
    answers = answer(model, model.preprocess(list(pictures)), query, top=top)
    sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
    return [complete(one, size, query) for one, size in zip(answers, sizes, strict=True)]


def answer(
    model: CalmModel,
    images: Float[Tensor, "b c H W"],
    query: Query,
    *,
    top: int = 5,
    predictor: CalmModel | None = None,
    precision: Precision = "32-true",
) -> list[Answer]:
    """Run a model on a batch of its input, and return what it says of each image, on the CPU.

    Args:
        model: Its state is restored afterwards.
        images: The model's input on its device.
        query: What to explain.
        top: How many of the most probable classes.
        predictor: Computes predictions and own maps in place of ``model``: its `CalmModel.optimized_for_inference`.
        precision: Of these; baselines are always computed in float32.
    """
    half = precision == "bf16-mixed"
    with evaluation_mode(model), torch.no_grad():
        with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
            output = (predictor or model)(images)
        probs = output.probs
        best = probs.topk(min(top, probs.shape[1])).indices
        target = best[:, 0] if query.target is None else torch.full_like(best[:, 0], query.target)
        if query.target is None and query.versus is not None:
            without = torch.arange(probs.shape[1], device=probs.device) == query.versus
            target = probs.masked_fill(without, -1).argmax(dim=1)
        versus = [] if query.versus is None else [torch.full_like(target, query.versus)]
        classes = torch.stack([target, *versus], dim=1)
        if query.method in BASELINES:
            columns = [attribute(model, images, column, query.method) for column in classes.unbind(1)]
            maps = torch.stack(columns, dim=1)
        elif query.superclass:
            members = {int(c): query.superclass for c in classes.flatten().tolist()}
            maps = output.attribute(classes, query.method, superclass=members, prior_exponent=query.prior_exponent)
        else:
            if not MAP_KINDS[query.method].compares:
                classes = torch.cat([classes, best], dim=1)  # the maps of the best classes cost no further pass
            maps = output.attribute(classes, query.method, prior_exponent=query.prior_exponent)
    rows = zip(probs.cpu(), best.tolist(), classes.tolist(), maps.cpu(), strict=True)
    calm = model.config.method != "cam"
    return [Answer(prob, tuple(most), tuple(own), values, calm) for prob, most, own, values in rows]


def complete(answer: Answer, size: tuple[int, int], query: Query) -> Explanation:
    """Compare the maps of an answer, and find their places in a picture of ``size`` = (height, width)."""
    values, target = answer.maps, answer.classes[0]
    signed = values[0] if query.versus is None else values[0] - values[1]
    grid = signed if query.versus is None or query.signed else signed.abs()
    alone = query.method in BASELINES or not MAP_KINDS[query.method].compares
    map_of = (dict(zip(answer.classes, values, strict=True)) if alone else {}) | {target: grid}
    places = {c: locate(resize_maps(one, size)) for c, one in map_of.items()}
    compared = values[: 1 if query.versus is None else 2]
    adds_up = query.method in MAP_KINDS and "calm" in MAP_KINDS[query.method].families and answer.calm
    uniform = float(compared.double().abs().sum()) / grid.numel() if adds_up else None
    return Explanation(answer.probs, target, answer.top, places, grid, signed, size, uniform)


def draw(
    picture: Picture, explanation: Explanation, query: Query, names: Sequence[str] = (), *, label: int | None = None
) -> Picture:
    """Draw the overlay, with a ring around the highest point; see `drawn_size` for its size.

    Where the values of a map add up, colours are multiples of a uniform map's value and end at `LEAST_TOP` of it or, if
    that is higher, at the peak: a flat map looks flat. Maps of other methods are stretched to their own range.

    Args:
        picture: The picture, (H, W, 3) uint8.
        explanation: Of the picture.
        query: What was asked.
        names: Of the model's classes: a legend with the colours, the class and its probability is added below. Without
            them there is none.
        label: The picture's true class if it is known; the legend names it where the model says another.
    """
    height, width = picture.shape[:2]
    size = drawn_size(height, width)
    is_cam = query.method in MAP_KINDS and MAP_KINDS[query.method].families == ("cam",)
    how: Normalization = "minmax" if is_cam else "max"
    colormap: Colormap = "heat" if query.versus is None else "signed"
    top = max(explanation.peak, LEAST_TOP) * explanation.uniform if explanation.peak and explanation.uniform else None
    drawn = render.overlay(picture, explanation.signed, how=how, colormap=colormap, size=size, top=top)
    place = explanation.places[explanation.target]
    x, y = (place.x + 0.5) * size[1] / width, (place.y + 0.5) * size[0] / height
    drawn = draw_point(drawn, x, y, radius=max(4, min(size) // 48))
    if not names or size[1] < NARROWEST_LEGEND:
        return drawn

    def stated(*classes: int) -> str:
        p = float(explanation.probs[list(classes)].sum())  # first, since what is too long is cut at the end
        return f"p = {p:.3f}  {' + '.join(names[c] for c in classes)}"

    best, grid, mark = explanation.top[0], explanation.signed, None
    classless = query.method in ("prior", "cam-saliency")
    low = f"{float(grid.amin()) if is_cam else 0:.3g}"
    high = f"{float(grid.amax()):.3g}"
    if top is not None and explanation.uniform is not None:
        ends = top / explanation.uniform
        low, high, mark = "0", f"{ends:.3g} x uniform", (1 / ends, "1 = uniform")
    shown = query.superclass or (explanation.target,)
    notes = [f"{query.method}: the same for all classes" if classless else f"{stated(*shown)}  ({query.method})"]
    if query.versus is not None:
        scale = f"{float(grid.abs().amax()):.3g}" if top is None else high
        low, high, mark = f"blue: {stated(query.versus)}", f"red: {stated(explanation.target)}", None
        notes = [f"{query.method} difference, ±{scale}"]
        shown = (explanation.target, query.versus)
    if classless or best not in shown:
        notes.append(f"{'neither is likely; ' * (query.versus is not None)}predicted: {stated(best)}")
    if label is not None and label != best:
        notes.append(f"true class: {stated(label)}")
    if explanation.flat:
        notes.append("nearly flat: the map says little about the place")
    return add_legend(drawn, low, high, colormap=colormap, mark=mark, notes=notes)


def drawn_size(height: int, width: int) -> tuple[int, int]:
    """Return the (height, width) of a picture's overlay: small pictures are enlarged, very large ones shrunk.

    >>> drawn_size(24, 40), drawn_size(500, 375), drawn_size(1, 60_000), drawn_size(8000, 8000)
    ((240, 400), (500, 375), (1, 60000), (2000, 2000))
    """
    factor = min(-(-SMALLEST_PICTURE // min(height, width)), LONGEST_ENLARGED // max(height, width))
    if factor > 1:
        return height * factor, width * factor
    scale = min(1.0, (LARGEST_OVERLAY / (height * width)) ** 0.5, LONGEST_OVERLAY / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def overlay(image: ImageLike, values: Tensor | ArrayLike, *, signed: bool = False, alpha: float = 0.85) -> Image.Image:
    """Return a picture with a map in colours over it, as a PIL image of the picture's size.

    Args:
        image: A file, a PIL image, uint8 (H, W, 3), or a float tensor (3, H, W) in [0, 1]: of a model's input,
            ``model.preprocessing.denormalize(images)[0]``.
        values: A map (h, w) of any size; it is resized, and its highest value gets the strongest colour.
        signed: For signed differences: red above 0, blue below.
        alpha: Opacity of the strongest colour, 0 to 1.

    Raises:
        CalmError: If the image cannot be read, or an argument is of another form.
    """
    if isinstance(image, Tensor) and image.is_floating_point():
        if image.ndim != 3 or image.shape[0] != 3 or not 0 <= image.amin() <= image.amax() <= 1:
            given = f"{tuple(image.shape)} with values from {image.amin():.3g} to {image.amax():.3g}"
            fix = "give one image of model.preprocessing.denormalize(images), or the file"
            raise CalmError(f"an image of floats is (3, H, W) in [0, 1], got {given}: {fix}")
        image = (image.detach().cpu() * 255).round().to(torch.uint8).permute(1, 2, 0)
    picture = np.array(Preprocessing().pixels(image))
    drawn = render.overlay(picture, values, colormap="signed" if signed else "heat", alpha=alpha)
    return Image.fromarray(drawn)
