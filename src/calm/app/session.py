"""What the explorer computes: pictures as a model sees them, their maps, regions, erasures and comparisons.

An `Explorer` holds what all visitors share, the model and the samples; a `Seen` is one visitor's picture, and nothing
of it is kept here. Nothing in this file knows a browser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils._pytree import tree_map

from calm.baselines import BASELINES, attribute
from calm.errors import CalmError, unknown
from calm.explain import FLAT, LEAST_TOP, drawn_size
from calm.heatmaps import NINTHS, cell_coverage, normalize, resize_maps
from calm.model import CalmModel
from calm.output import MAP_KINDS, CalmOutput, CamOutput
from calm.render import Picture, overlay, resize_picture

LONGEST_SHOWN = 1024  # most pixels of the longer side of a picture on the page
SMALL = 192  # the same, in the table of a batch
MOST_PICTURES = 200  # of a batch
DECADES = 3  # that a logarithmic colour scale shows below the highest value

Rectangle: TypeAlias = tuple[float, float, float, float]
"""Left, top, right and bottom, as shares of the picture's width and height."""

Order: TypeAlias = Literal["confidence", "doubt", "error"]
"""Of a batch: surest first; least sure first (entropy); wrong ones first, and among them the surest."""


@dataclass(frozen=True)
class Sample:
    """A picture of a data set, with the index of its class among the model's classes, where that is known."""

    path: Path
    name: str
    label: int | None = None
    exif: bool = True


@dataclass(frozen=True)
class Seen:
    """A picture and what a model computed of it, on the CPU.

    Attributes:
        name: The name of its file.
        picture: What people see of it, shrunk to `LONGEST_SHOWN`.
        size: (height, width) of the file in pixels.
        image: The model's input, (1, C, H, W).
        output: The output of the forward pass.
        label: The index of its true class, where that is known.
    """

    name: str
    picture: Picture
    size: tuple[int, int]
    image: Tensor
    output: CalmOutput | CamOutput
    label: int | None = None
    probs: Float[Tensor, " c"] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "probs", self.output.probs[0])

    def top(self, count: int = 5) -> list[int]:
        """Return the most probable classes, best first."""
        classes: list[int] = self.probs.topk(min(count, len(self.probs))).indices.tolist()
        return classes

    def rival(self, target: int) -> int:
        """Return the most probable class other than ``target``."""
        return next((c for c in self.top(2) if c != target), target)

    @property
    def doubt(self) -> float:
        """The entropy of p(y | x), 0 for a sure prediction and 1 for a uniform one."""
        entropy = float(torch.special.entr(self.probs.double()).sum())
        return entropy / math.log(len(self.probs)) if len(self.probs) > 1 else 0.0


@dataclass(frozen=True)
class Reading:
    """A map of a picture on the model's grid: of one class, or the signed difference ``target`` minus ``versus``."""

    seen: Seen
    kind: str
    target: int
    versus: int | None
    grid: Float[Tensor, "h w"]

    @property
    def total(self) -> float:
        """The sum of the grid."""
        return float(self.grid.double().sum())

    def mass(self, region: Rectangle) -> float:
        """Return the sum of the grid inside a rectangle; of a cell that is cut, the share of its area inside."""
        rows, columns = self.grid.shape
        share = cell_coverage(torch.tensor(region, dtype=torch.float64), (rows, columns))
        return float((self.grid.double() * share).sum())

    @property
    def uniform(self) -> float | None:
        """What each cell of a uniform map of the same sum would hold; None where the sum has no meaning."""
        adds_up = self.versus is None and MAP_KINDS[self.kind].families != ("cam",)
        return self.total / self.grid.numel() if adds_up and self.total > 0 else None

    @property
    def top(self) -> float:
        """The value of the last colour: the highest, or `LEAST_TOP` times uniform, so that a flat map looks flat."""
        return max(float(self.grid.abs().max()), LEAST_TOP * (self.uniform or 0.0))

    @property
    def flat(self) -> bool:
        """Whether the map says hardly anything about the place: its highest cell is below `FLAT` times uniform."""
        return self.uniform is not None and float(self.grid.max()) < FLAT * self.uniform

    def ninths(self, sign: Literal[1, -1] = 1) -> list[tuple[str, float]]:
        """Return the sum of the cells above 0 (with ``sign`` -1 below, negated) in each ninth, the highest first."""
        part = replace(self, grid=(sign * self.grid).clamp(min=0))
        thirds = [(row, column) for row in range(3) for column in range(3)]
        sums = [(NINTHS[r][c], part.mass((c / 3, r / 3, (c + 1) / 3, (r + 1) / 3))) for r, c in thirds]
        return sorted(sums, key=lambda entry: -entry[1])

    def draw(
        self, *, opacity: float = 0.85, threshold: float = 0.0, log: bool = False, size: tuple[int, int] | None = None
    ) -> Picture:
        """Draw the map over the picture; the colours of a difference grow with its square root.

        Args:
            opacity: Of the highest value, 0 to 1.
            threshold: Share of the highest value below which nothing is drawn, 0 to 1.
            log: Whether colours are proportional to the logarithm, over `DECADES` powers of ten below the highest.
            size: (height, width) of the result; None is `drawn_size`.
        """
        size = size or drawn_size(*self.seen.picture.shape[:2])
        values = resize_maps(self.grid, size)
        if self.versus is not None:
            strength = normalize(values.abs(), "max").sqrt() * values.sign()
        elif self.uniform is None:
            strength = normalize(values, "minmax")
        else:
            strength = (values / self.top).clamp(0, 1)
        if log:
            strength = (1 + strength.abs().clamp(min=1e-30).log10() / DECADES).clamp(min=0) * strength.sign()
        colormap: Literal["heat", "signed"] = "heat" if self.versus is None else "signed"
        shown = strength.where(values.abs() >= threshold * values.abs().max(), 0.0)
        return overlay(self.seen.picture, shown, top=1.0, colormap=colormap, alpha=opacity, size=size)


@dataclass(frozen=True)
class Row:
    """A picture of a batch: its `numbers`, with its doubt, label and whether it is wrong, and a small overlay."""

    record: dict[str, Any]
    picture: Picture
    sample: int | None = None  # its index among the explorer's samples, if it is one


class Explorer:
    """What all visitors share: the models, the samples, and the computations.

    A model computes for one visitor at a time, since gradient methods change its mode while they run.

    Attributes:
        model: The model to explore, in eval mode.
        others: Models by name to show beside it.
        samples: Pictures to begin with.
        names: The names of the model's classes.
        kinds: The map kinds of the model, its main one first.
        methods: The methods that can be shown side by side: kinds of one class, installed baselines, and `others`.
    """

    def __init__(
        self, model: CalmModel, others: Mapping[str, CalmModel] | None = None, samples: Sequence[Sample] = ()
    ) -> None:
        self.model, self.others, self.samples = model.eval(), dict(others or {}), tuple(samples)
        self.names = model.class_names
        family = "cam" if model.config.method == "cam" else "calm"
        self.kinds = tuple(k for k, spec in MAP_KINDS.items() if family in spec.families and spec.over == "target")
        alone = [kind for kind in self.kinds if not MAP_KINDS[kind].compares]
        self.methods = (*alone, *_installed_baselines(), *self.others)
        self._lock = Lock()

    def see(self, sample: Sample) -> Seen:
        """Read a picture and compute the model's output.

        Raises:
            CalmError: If the file cannot be read; the message has the sample's name and no folder of this machine.
        """
        try:
            pixels = self.model.preprocessing.read(sample.path, exif=sample.exif)
        except CalmError as error:
            text = str(error).replace(str(sample.path), sample.name).partition("; `calm data check`")[0]
            raise CalmError(text) from error
        image = self.model.preprocessing.one(pixels)[None]
        picture = self.model.preprocessing.picture(pixels)
        size = picture.shape[0], picture.shape[1]
        return Seen(sample.name, _shrunk(picture), size, image, self._output(image), sample.label)

    def thumbnail(self, sample: Sample) -> Picture:
        """Return a small picture of a sample."""
        pixels = self.model.preprocessing.read(sample.path, exif=sample.exif)
        return _shrunk(self.model.preprocessing.picture(pixels), SMALL)

    def _output(self, image: Tensor) -> CalmOutput | CamOutput:
        with self._lock, torch.no_grad():
            output: CalmOutput | CamOutput = tree_map(Tensor.cpu, self.model(image.to(self.model.device)))
        return output

    def read(self, seen: Seen, kind: str, target: int, versus: int | None = None) -> Reading:
        """Return a map of a picture; a kind that only compares takes the most probable other class by default.

        Raises:
            CalmError: If the model has no such kind or class, or the two classes are the same.
        """
        if kind not in self.kinds:
            raise unknown("map kind", kind, self.kinds)
        if versus is None and MAP_KINDS[kind].compares:
            versus = seen.rival(target)
        if versus == target:
            raise CalmError(f"both classes are {self.names[target]!r}: choose two")
        maps = seen.output.attribute(torch.tensor([[target] if versus is None else [target, versus]]), kind)[0]
        return Reading(seen, kind, target, versus, maps[0] if versus is None else maps[0] - maps[1])

    def classes_at(self, seen: Seen, x: float, y: float) -> tuple[tuple[int, int], Float[Tensor, " c"]]:
        """Return the cell (row, column) of a place, in shares of the picture, and p(y | x, z) there.

        A CAM model defines no such probability: it is the softmax of its class scores in that cell.
        """
        scores = seen.output.logits[0]
        rows, columns = scores.shape[1:]
        row, column = (min(cells - 1, max(0, math.floor(at * cells))) for at, cells in ((y, rows), (x, columns)))
        return (row, column), scores[:, row, column].double().softmax(dim=0)

    def erase(self, seen: Seen, mask: Bool[Tensor, "H W"]) -> Seen:
        """Return the picture without the pixels of a mask at the model's input, which become the data set's mean."""
        image = seen.image.masked_fill(mask, 0.0)
        shown = self.model.preprocessing.denormalize(image)[0].permute(1, 2, 0).mul(255).round().byte().numpy()
        picture = self.model.preprocessing.picture(shown)
        picture = resize_picture(np.ascontiguousarray(picture), (seen.picture.shape[0], seen.picture.shape[1]))
        return Seen(seen.name, picture, seen.size, image, self._output(image), seen.label)

    def compare(self, seen: Seen, target: int, methods: Sequence[str]) -> list[tuple[str, Picture]]:
        """Return a caption and an overlay of each method, for one class.

        Raises:
            CalmError: If a method is unknown, or another model does not have the class.
        """
        drawn = []
        for method in methods:
            if method not in self.methods:
                raise unknown("method", method, self.methods)
            if method in self.kinds:
                drawn.append((method, self.read(seen, method, target).draw()))
                continue
            with self._lock:
                if method in self.others:
                    drawn.append(self._other(seen, target, method))
                else:
                    grid = attribute(self.model, seen.image.to(self.model.device), target, method)[0].cpu()
                    drawn.append((method, overlay(seen.picture, grid, size=drawn_size(*seen.picture.shape[:2]))))
        return drawn

    def _other(self, seen: Seen, target: int, name: str) -> tuple[str, Picture]:
        other = self.others[name]
        if self.names[target] not in other.class_names:
            raise CalmError(f"model {name} has no class {self.names[target]!r}: it cannot be shown beside")
        index = other.class_names.index(self.names[target])
        with torch.no_grad():
            output = tree_map(Tensor.cpu, other(other.preprocess(seen.picture)))
        kind = other.map_kind()
        reading = Reading(seen, kind, index, None, output.attribute([index], kind)[0])
        return f"{name}: {kind}, p = {float(output.probs[0, index]):.3f}", reading.draw()

    def batch(self, samples: Sequence[Sample]) -> tuple[list[Row], list[str]]:
        """See several pictures; return a row of each with the map of its prediction, and the errors of the others.

        Raises:
            CalmError: If there are more than `MOST_PICTURES`.
        """
        if len(samples) > MOST_PICTURES:
            raise CalmError(f"{len(samples)} pictures at once: give at most {MOST_PICTURES}; calm attribute takes any")
        rows, errors = [], []
        for sample in samples:
            try:
                seen = self.see(sample)
            except CalmError as error:
                errors.append(str(error))
                continue
            best = seen.top(1)[0]
            known = seen.label is not None
            record = numbers(self.read(seen, self.kinds[0], best), self.names) | {
                "doubt": seen.doubt,
                "label": self.names[seen.label] if seen.label is not None else None,
                "wrong": seen.label != best if known else None,
            }
            small = replace(seen, picture=_shrunk(seen.picture, SMALL))
            drawn = self.read(small, self.kinds[0], best).draw(size=small.picture.shape[:2])
            rows.append(Row(record, drawn, self.samples.index(sample) if sample in self.samples else None))
        return rows, errors


def in_order(rows: Sequence[Row], order: Order) -> list[Row]:
    """Return the rows of a batch in an order."""
    if order not in get_args(Order):
        raise unknown("order", order, get_args(Order))

    def key(row: Row) -> tuple[float, ...]:
        if order == "doubt":
            return (-row.record["doubt"],)
        confidence = -row.record["target"]["probability"]
        return (not row.record["wrong"], confidence) if order == "error" else (confidence,)

    return sorted(rows, key=key)


def numbers(reading: Reading, names: Sequence[str], region: Rectangle | None = None) -> dict[str, Any]:
    """Return the numbers of a map, for a JSON file: classes, probabilities, the grid and its sums."""
    seen = reading.seen

    def of_class(c: int) -> dict[str, Any]:
        return {"index": c, "name": names[c], "probability": float(seen.probs[c])}

    inside = {"rectangle": list(region), "mass": reading.mass(region)} if region else None
    return {
        "file": seen.name,
        "height": seen.size[0],
        "width": seen.size[1],
        "kind": reading.kind,
        "target": of_class(reading.target),
        "versus": None if reading.versus is None else of_class(reading.versus),
        "top": [of_class(c) for c in seen.top()],
        "grid": reading.grid.double().tolist(),
        "grid_sum": reading.total,
        "region": inside,
    }


def top_pixels(reading: Reading, share: float) -> Bool[Tensor, "H W"]:
    """Return a mask, at the model's input, of the share of pixels where the map is highest."""
    size = (reading.seen.image.shape[-2], reading.seen.image.shape[-1])
    values = resize_maps(reading.grid, size).flatten()
    mask = torch.zeros_like(values, dtype=torch.bool)
    mask[values.topk(round(share * values.numel())).indices] = True
    return mask.view(size)


def painted(strokes: Sequence[Sequence[tuple[float, float]]], width: float, size: tuple[int, int]) -> Tensor:
    """Return a mask (H, W) of brush strokes: points in shares of the picture; width is a share of its width."""
    canvas = Image.new("1", size[::-1])
    pen, radius = ImageDraw.Draw(canvas), width * size[1] / 2
    for stroke in strokes:
        points = [(x * size[1], y * size[0]) for x, y in stroke]
        pen.line(points, fill=1, width=max(1, round(2 * radius)))
        for x, y in points:  # round ends and joints
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)
    return torch.from_numpy(np.array(canvas))


def _shrunk(picture: Picture, longest: int = LONGEST_SHOWN) -> Picture:
    height, width = picture.shape[:2]
    scale = longest / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return picture if scale >= 1 else resize_picture(picture, size)


def _installed_baselines() -> list[str]:
    """Return the baselines that can run here: the extra ``baselines`` may be missing."""
    return list(BASELINES) if find_spec("captum") and find_spec("pytorch_grad_cam") else []
