"""Pictures of maps: overlays, outlines, and labelled panels. Arrays in, arrays out; no figure machinery.

A picture is uint8 RGB of shape (H, W, 3). Coordinates are pixels, x to the right and y down, from the upper
left corner.

Two colour maps, made here so that drawing needs no plotting library.

``heat`` goes from night blue over violet and orange to pale yellow: lightness only rises, so it also reads in
grey and by colour-blind eyes. ``signed`` goes from blue over near-white to red: the two ends are equally
dark. Both have equal steps of perceived colour, measured as distance in OKLab (Ottosson, 2020).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from calm.errors import CalmError, unknown
from calm.heatmaps import Normalization, normalize, resize_maps

__all__ = [
    "Colormap",
    "Picture",
    "Tile",
    "colorize",
    "draw_boxes",
    "draw_contour",
    "draw_point",
    "overlay",
    "panel",
    "resize_picture",
    "table",
]

Colormap: TypeAlias = Literal["heat", "signed"]

_ANCHORS: dict[str, tuple[str, ...]] = {
    "heat": ("0d1233", "3a2387", "86279a", "cd3e78", "f2743f", "fcb53f", "fdf6b0"),
    "signed": ("103c80", "2f7fc1", "8fc1e3", "f4f3f0", "f2b08c", "d9583f", "8a1322"),
}

_TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def colorize(values: NDArray[np.floating], colormap: Colormap = "heat") -> NDArray[np.uint8]:
    """Colours for values of any shape, (..., 3) RGB.

    Args:
        values: ``heat``: in [0, 1]; ``signed``: in [-1, 1]. Values outside take the colour of the nearest
            end, NaN that of 0.
        colormap: the name of the map.

    Raises:
        CalmError: an unknown colour map.
    """
    colours = table(colormap)
    share = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0)
    share = (share + 1) / 2 if colormap == "signed" else share
    return np.asarray(colours[np.rint(share.clip(0, 1) * 255).astype(np.intp)])


@cache
def table(colormap: Colormap) -> NDArray[np.uint8]:
    """The 256 colours of a map, (256, 3) RGB, read-only."""
    if colormap not in _ANCHORS:
        raise unknown("colour map", colormap, get_args(Colormap))
    anchors = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in _ANCHORS[colormap]]) / 255
    path = _oklab(anchors)
    way = np.r_[0, np.linalg.norm(np.diff(path, axis=0), axis=1).cumsum()]
    if colormap == "signed":  # zero is the middle, whichever half is longer
        middle = len(way) // 2
        way = np.r_[
            way[: middle + 1] / way[middle], 1 + (way[middle:] - way[middle])[1:] / (way[-1] - way[middle])
        ]
    steps = np.linspace(0, way[-1], 256)
    colours = _rgb(np.stack([np.interp(steps, way, path[:, axis]) for axis in range(3)], axis=1))
    result: NDArray[np.uint8] = np.rint(colours.clip(0, 1) * 255).astype(np.uint8)
    result.flags.writeable = False
    return result


def _oklab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """sRGB in [0, 1] to OKLab, over the last axis."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return np.asarray(np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T)


def _rgb(oklab: NDArray[np.float64]) -> NDArray[np.float64]:
    """OKLab to sRGB; slightly outside [0, 1] for colours that no screen shows."""
    linear = (oklab @ np.linalg.inv(_TO_LAB).T) ** 3 @ np.linalg.inv(_TO_LMS).T
    positive = linear.clip(min=0)
    return np.asarray(np.where(linear <= 0.0031308, linear * 12.92, 1.055 * positive ** (1 / 2.4) - 0.055))


Picture: TypeAlias = NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]

AT_ONCE = 2**18
"""Pixels of an overlay that are computed at a time, so that floats of a large picture need no memory."""

INK: Colour = (38, 40, 52)
PAPER: Colour = (255, 255, 255)
FADED: Colour = (120, 124, 138)


def overlay(
    image: Picture,
    values: Tensor | ArrayLike,
    *,
    how: Normalization = "max",
    colormap: Colormap = "heat",
    alpha: float = 0.85,
    size: tuple[int, int] | None = None,
) -> Picture:
    """A map in colours over its picture: where the map is low the picture shows through, calmed to grey.

    Args:
        image: the picture, (H, W, 3) uint8.
        values: the map, (h, w), of any size and range; a model's grid is best, since it is resized only once.
        how: how its range becomes [0, 1] (`calm.normalize`). With the colour map ``signed`` the map is
            divided by its largest absolute value instead.
        colormap: ``heat``, or ``signed`` for differences.
        alpha: opacity of the highest value, 0 to 1.
        size: (height, width) of the result; None: that of the picture.

    Returns:
        uint8 RGB of ``size``. A constant or NaN map leaves the greyed picture.

    Raises:
        CalmError: a picture or map of another shape or dtype, alpha outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise CalmError(f"alpha is an opacity between 0 and 1, got {alpha}")
    height, width = size or image.shape[:2]
    grid = torch.as_tensor(values).detach().cpu()
    if grid.ndim != 2:
        raise CalmError(f"a map has the shape (h, w), got {tuple(grid.shape)}")
    scaled = resize_maps(_signed(grid) if colormap == "signed" else normalize(grid, how), (height, width))
    strength = scaled.reshape(-1).numpy()
    drawn = resize_picture(_checked(image), (height, width)).reshape(-1, 3).copy()
    for start in range(0, len(drawn), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        drawn[part] = _overlaid(drawn[part], strength[part], colormap, alpha)
    return drawn.reshape(height, width, 3)


def _overlaid(pixels: Picture, scaled: NDArray[Any], colormap: Colormap, alpha: float) -> Picture:
    """Pixels (n, 3) with the colours of their values (n,) over them."""
    picture = pixels.astype(np.float64)
    # Heat takes its colour early: its weak end is dark. A signed map is white near zero, and stays clear there.
    strength = np.abs(scaled) if colormap == "signed" else np.sqrt(scaled)
    opacity = alpha * strength[:, None]
    grey = picture @ np.array([0.299, 0.587, 0.114])
    calmed = 0.45 * picture + 0.55 * grey[:, None]
    return _rounded((1 - opacity) * calmed + opacity * colorize(scaled, colormap))


def draw_contour(
    image: Picture, values: Tensor | ArrayLike, level: float, *, colour: Colour = PAPER, width: int = 1
) -> Picture:
    """Outline where a map reaches ``level`` (a mask: 0.5). The map, (h, w), is resized to the picture first.

    Returns:
        A new picture; the line has a thin dark edge, to be seen on any background.
    """
    import cv2

    grid = torch.as_tensor(values).detach().cpu()
    inside = resize_maps(grid.to(torch.float64), (image.shape[0], image.shape[1])).numpy() >= level
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
    drawn: Any = np.ascontiguousarray(_checked(image)).copy()
    cv2.drawContours(drawn, outlines, -1, INK, width + 2, cv2.LINE_AA)
    cv2.drawContours(drawn, outlines, -1, colour, width, cv2.LINE_AA)
    return np.asarray(drawn, dtype=np.uint8)


def draw_boxes(
    image: Picture,
    boxes: Iterable[tuple[float, float, float, float]],
    *,
    colour: Colour = (255, 210, 64),
    width: int = 1,
) -> Picture:
    """Frame boxes x0, y0, x1, y1, whose corners are inside (inclusive): the outermost pixels of the box are
    painted.

    Returns:
        A new picture.
    """
    canvas = Image.fromarray(_checked(image))
    pen = ImageDraw.Draw(canvas)
    for box in boxes:
        pen.rectangle(box, outline=colour, width=width)
    return np.array(canvas)


def draw_point(image: Picture, x: float, y: float, *, radius: int = 5, colour: Colour = PAPER) -> Picture:
    """A ring around a point, with a dark edge. Returns a new picture."""
    canvas = Image.fromarray(_checked(image))
    pen = ImageDraw.Draw(canvas)
    for reach, tint, line in ((radius + 1, INK, 4), (radius, colour, 2)):
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=tint, width=line)
    return np.array(canvas)


def resize_picture(image: Picture, size: tuple[int, int]) -> Picture:
    """A picture (not a map) at ``size`` = (height, width): bicubic, and antialiased when it shrinks."""
    if image.shape[:2] == size:
        return image
    # Pillow's weights take 32 bytes for each pixel of a side: of a very long one, means of pixels come first.
    gap = 3.0 if max(image.shape) > 2**16 else None
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC, reducing_gap=gap)
    return np.array(resized)


@dataclass(frozen=True)
class Tile:
    """A cell of a panel.

    Attributes:
        image: its picture, of any size; it is scaled to fit the cell.
        caption: text below it; lines end at a newline and are cut to the cell's width.
        frame: colour of a frame around the picture, for cells that stand out.
    """

    image: Picture
    caption: str = ""
    frame: Colour | None = None

    @property
    def notes(self) -> list[str]:
        """The lines of the caption."""
        return self.caption.split("\n") if self.caption else []


def panel(
    rows: Sequence[Sequence[Tile | None]],
    *,
    title: str = "",
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    cell: int = 160,
    gap: int = 10,
) -> Picture:
    """A grid of captioned pictures, as one picture on white.

    Args:
        rows: the cells; None leaves one empty, and a short row ends early.
        title: a line above everything.
        columns: headings of the columns.
        labels: a text left of each row.
        cell: side of a cell, in pixels; pictures keep their proportions inside it.
        gap: pixels between cells and around them.

    Raises:
        CalmError: no cells.

    >>> import numpy as np
    >>> panel([[Tile(np.zeros((8, 8, 3), np.uint8))] * 2], cell=20, gap=5).shape
    (30, 55, 3)
    """
    across = max((len(row) for row in rows), default=0)
    if not across:
        raise CalmError("a panel needs at least one row with one cell")
    size = max(11, cell // 14)
    line = round(size * 1.35)
    bold, large = _font(size, bold=True), _font(round(size * 1.3), bold=True)
    left = gap + (max(_extent(label, bold) for label in labels) + gap if labels else 0)
    top = gap + (round(line * 1.3) + gap if title else 0) + (line + gap // 2 if columns else 0)
    fitted = [[_fitted(tile, cell) for tile in row] for row in rows]
    bodies = [max((tile.image.shape[0] for tile in row if tile), default=0) for row in fitted]
    notes = [max((len(tile.notes) for tile in row if tile), default=0) * line for row in rows]
    notes = [height + gap // 2 if height else 0 for height in notes]
    width = left + across * (cell + gap)
    canvas = Image.new("RGB", (width, top + sum(bodies) + sum(notes) + gap * len(rows)), PAPER)
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((gap, gap), _cut_to(title, large, width - 2 * gap), INK, large)
    for column, heading in enumerate(columns):
        middle = left + column * (cell + gap) + cell // 2
        pen.text((middle, top - gap), _cut_to(heading, bold, cell), INK, bold, anchor="ms")
    y = top
    for index, row in enumerate(fitted):
        if index < len(labels):
            pen.text((gap, y + bodies[index] // 2), labels[index], INK, bold, anchor="lm")
        for column, tile in enumerate(row):
            if tile is not None:
                middle = left + column * (cell + gap) + cell // 2
                _paste(canvas, tile, middle, y + (bodies[index] - tile.image.shape[0]) // 2)
                _write(canvas, tile, middle, y + bodies[index] + gap // 2, cell, size, line)
        y += bodies[index] + notes[index] + gap
    return np.array(canvas)


def _fitted(tile: Tile | None, cell: int) -> Tile | None:
    """The tile with its picture's longer side at ``cell`` pixels."""
    if tile is None:
        return None
    height, width = _checked(tile.image).shape[:2]
    scale = cell / max(height, width)
    size = max(1, round(height * scale)), max(1, round(width * scale))
    return replace(tile, image=resize_picture(tile.image, size))


def _paste(canvas: Image.Image, tile: Tile, middle: int, y: int) -> None:
    """The picture and its frame, centred on column ``middle``, top at ``y``."""
    height, width = tile.image.shape[:2]
    x = middle - width // 2
    canvas.paste(Image.fromarray(tile.image), (x, y))
    if tile.frame is not None:
        box = (x - 3, y - 3, x + width + 2, y + height + 2)
        ImageDraw.Draw(canvas).rectangle(box, outline=tile.frame, width=3)


def _write(canvas: Image.Image, tile: Tile, middle: int, y: int, width: int, size: int, line: int) -> None:
    """The caption, its first line in ink and the others faded."""
    font = _font(size)
    for number, note in enumerate(tile.notes):
        colour = FADED if number else INK
        place = (middle, y + number * line)
        ImageDraw.Draw(canvas).text(place, _cut_to(note, font, width), colour, font, anchor="mt")


_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def _font(size: int, *, bold: bool = False) -> _Font:
    """DejaVu Sans, which matplotlib brings along (found without importing it), else Pillow's own font."""
    spec = find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        fonts = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
        file = fonts / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
        if file.is_file():
            return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)


def _extent(text: str, font: _Font) -> int:
    return int(np.ceil(font.getlength(text)))


def _cut_to(text: str, font: _Font, width: int) -> str:
    """The text, cut with an ellipsis where it would be wider than ``width`` pixels."""
    if _extent(text, font) <= width:
        return text
    while text and _extent(text + "…", font) > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _signed(values: Tensor) -> Tensor:
    """Divided by the largest absolute value, in [-1, 1]; a zero or non-finite map becomes zeros."""
    values = values.to(torch.float64)
    peak = values.abs().amax()
    return values / peak if bool(peak > 0) and bool(peak.isfinite()) else torch.zeros_like(values)


def _checked(image: Picture) -> Picture:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise CalmError(f"a picture is uint8 RGB of shape (H, W, 3), got {image.dtype} {image.shape}")
    return image


def _rounded(values: NDArray[np.float64]) -> Picture:
    rounded: Picture = np.rint(values.clip(0, 255)).astype(np.uint8)
    return rounded
