"""Where a map points, in pixels and in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Place", "locate"]

_WORDS = (
    ("upper left", "top", "upper right"),
    ("left", "centre", "right"),
    ("lower left", "bottom", "lower right"),
)


@dataclass(frozen=True)
class Place:
    """The highest point of a map, and the ninth of the picture (three by three) that it lies in.

    Attributes:
        x: column of the pixel, from the left, 0 first.
        y: row of the pixel, from the top, 0 first.
        value: of the map there, in the map's unit.
        words: the ninth: "upper left", "centre", "bottom", ...
        share: of the map's positive mass, how much lies in that ninth, 0 to 1; 0 for a map without any.
    """

    x: int
    y: int
    value: float
    words: str
    share: float

    def __str__(self) -> str:
        return f"{self.words} ({self.x}, {self.y})"


def locate(values: Float[Tensor, "h w"]) -> Place:
    """The place of a map's highest value, the first in reading order if there are several.

    >>> import torch
    >>> values = torch.zeros(90, 90)
    >>> values[80, 10], values[45, 45] = 3, 1
    >>> str(locate(values)), locate(values).share
    ('lower left (10, 80)', 0.75)
    """
    height, width = values.shape
    y, x = divmod(int(values.argmax()), width)
    row, column = 3 * y // height, 3 * x // width
    rows, columns = _third(row, height), _third(column, width)
    total = _mass(values)
    share = _mass(values[rows, columns]) / total if total > 0 else 0.0
    return Place(x, y, float(values[y, x]), _WORDS[row][column], share)


def _third(index: int, length: int) -> slice:
    """The i with 3 i // length == index: the same floor as above decides, so that the ninths tile the picture."""
    return slice(-(-index * length // 3), -(-(index + 1) * length // 3))


def _mass(values: Tensor) -> float:
    """The sum of the positive values, in float64; a part at a time, since a map may have as many as an image pixels."""
    return sum(
        (float(part.double().clamp(min=0).sum()) for part in torch.split(values.reshape(-1), 2**22)), 0.0
    )
