"""Pictures of maps: overlays, outlines, and labelled panels. Arrays in, arrays out; no plotting library.

A picture is uint8 RGB of shape (H, W, 3). Coordinates are pixels from the upper left corner, x to the right and y down.

The colour map ``heat`` goes from night blue over violet and orange to pale yellow: its lightness only rises, so that it
reads in grey and by colour-blind eyes. ``signed`` goes from blue over near-white to red: the two ends are equally dark.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import ceil, inf
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from calm.errors import CalmError, unknown
from calm.heatmaps import Normalization, normalize, resize_maps
from calm.images import resize_image
from calm.latent import widen

Colormap: TypeAlias = Literal["heat", "signed"]
Picture: TypeAlias = NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]

_ANCHORS: dict[str, tuple[str, tuple[float, ...]]] = {
    "heat": ("0d1233 3a2387 86279a cd3e78 f2743f fcb53f fdf6b0", (0, 0.181, 0.337, 0.51, 0.681, 0.835, 1)),
    "signed": ("103c80 2f7fc1 8fc1e3 f4f3f0 f2b08c d9583f 8a1322", (0, 0.171, 0.345, 0.5, 0.648, 0.819, 1)),
}
# Places are proportional to the colours' distances in OKLab (Ottosson, 2020), so that steps look equal.

PIXELS_AT_ONCE = 2**14  # of an overlay that are computed at a time: their floats fit into a processor's cache

INK: Colour = (38, 40, 52)
PAPER: Colour = (255, 255, 255)
FADED: Colour = (120, 124, 138)


@cache
def table(colormap: Colormap) -> NDArray[np.uint8]:
    """Return the 256 colours of a map, (256, 3) RGB, read-only; raise a `CalmError` for an unknown one."""
    if colormap not in _ANCHORS:
        raise unknown("colour map", colormap, get_args(Colormap))
    codes, places = _ANCHORS[colormap]
    anchors = np.array([list(bytes.fromhex(code)) for code in codes.split()])
    steps = np.linspace(0, 1, 256)
    colours = np.stack([np.interp(steps, places, channel) for channel in anchors.T], axis=1)
    result = _rounded(colours)
    result.flags.writeable = False
    return result


def colorize(values: NDArray[np.floating], colormap: Colormap = "heat") -> NDArray[np.uint8]:
    """Return the colours (..., 3), RGB, of values (...) in [0, 1], or of ``signed`` values in [-1, 1].

    Values outside take the colour of the nearest end, NaN that of 0. An unknown colour map is a `CalmError`.
    """
    return np.asarray(table(colormap)[_colour_index(values, colormap)])


def _colour_index(values: NDArray[np.floating], colormap: Colormap) -> NDArray[np.intp]:
    """Return the place of each value's colour in the `table`."""
    share = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0)
    share = (share + 1) / 2 if colormap == "signed" else share
    return np.asarray(np.rint(share.clip(0, 1) * 255).astype(np.intp))


def overlay(
    image: Picture,
    values: Tensor | ArrayLike,
    *,
    how: Normalization = "max",
    colormap: Colormap = "heat",
    alpha: float = 0.85,
    size: tuple[int, int] | None = None,
    top: float | None = None,
) -> Picture:
    """Draw a map in colours over its picture; where the map is low, the picture shows through, greyed.

    Args:
        image: the picture, (H, W, 3) uint8.
        values: the map, (h, w), of any size and range; a model's grid is best, since it is resized only once.
        how: makes its range [0, 1] (`calm.normalize`); a ``signed`` map is divided by its largest absolute value.
        colormap: ``heat``, or ``signed`` for differences.
        alpha: opacity of the highest value, 0 to 1.
        size: (height, width) of the result; None: that of the picture.
        top: the value of the last colour, above 0, in place of ``how``: so pictures can share a scale. Colours begin
            at 0, or for ``signed`` at -top.

    Returns:
        uint8 RGB of ``size``. A NaN map, and a constant one without ``top``, leave the greyed picture. Wrong arguments
        are a `CalmError`.
    """
    if not 0 <= alpha <= 1:
        raise CalmError(f"alpha is an opacity between 0 and 1, got {alpha}")
    height, width = size or image.shape[:2]
    grid = _grid(values)
    if top is not None:
        if not (0 < top < inf):
            raise CalmError(f"top is a finite value above 0, got {top}")
        scaled = (grid / top).clamp(-1.0 if colormap == "signed" else 0.0, 1)
        scaled = scaled if bool(scaled.isfinite().all()) else torch.zeros_like(scaled)
    else:
        scaled = _signed(grid) if colormap == "signed" else normalize(grid, how)
    scaled = resize_maps(scaled, (height, width))
    strength = scaled.reshape(-1).numpy()
    drawn = resize_picture(_checked(image), (height, width)).reshape(-1, 3).copy()
    for start in range(0, len(drawn), PIXELS_AT_ONCE):
        part = slice(start, start + PIXELS_AT_ONCE)
        drawn[part] = _overlaid(drawn[part], strength[part], colormap, alpha)
    return drawn.reshape(height, width, 3)


def _overlaid(pixels: Picture, scaled: NDArray[Any], colormap: Colormap, alpha: float) -> Picture:
    """Return pixels (n, 3) with the colours of their values (n,) laid over them."""
    # Heat takes its colour early: its weak end is dark. A signed map is white near zero, and stays clear there.
    strength = np.abs(scaled) if colormap == "signed" else np.sqrt(scaled)
    opacity = alpha * strength
    clear, index = 1 - opacity, _colour_index(scaled, colormap)
    # One channel after the other, since NumPy's loops over an axis of three values take three times as long.
    planes = pixels.T.astype(np.float64)
    grey = 0.55 * (np.array([0.299, 0.587, 0.114]) @ planes)
    for plane, colours in zip(planes, table(colormap).T, strict=True):
        plane *= 0.45
        plane += grey
        plane *= clear
        plane += opacity * colours[index]
    return _rounded(planes).T


def draw_contour(image: Picture, values: Tensor | ArrayLike, level: float, *, colour: Colour = PAPER) -> Picture:
    """Return a new picture with an outline, dark-edged, where a map (h, w), resized to it, reaches ``level``."""
    import cv2

    inside = resize_maps(_grid(values), image.shape[:2]).numpy() >= level
    outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_NONE)
    drawn: Any = np.ascontiguousarray(_checked(image)).copy()
    for tint, width in ((INK, 3), (colour, 1)):
        cv2.drawContours(drawn, outlines, -1, tint, width, cv2.LINE_AA)
    return np.asarray(drawn, dtype=np.uint8)


def draw_boxes(image: Picture, boxes: Iterable[tuple[float, ...]], *, colour: Colour = (255, 210, 64)) -> Picture:
    """Frame boxes x0, y0, x1, y1, corners inclusive: paint their outermost pixels. Returns a new picture."""
    canvas = Image.fromarray(_checked(image))
    pen = ImageDraw.Draw(canvas)
    for box in boxes:
        pen.rectangle(box, outline=colour)
    return np.array(canvas)


def draw_point(image: Picture, x: float, y: float, *, radius: int = 5, colour: Colour = PAPER) -> Picture:
    """Return a new picture with a dark-edged ring around a point."""
    canvas = Image.fromarray(_checked(image))
    pen = ImageDraw.Draw(canvas)
    for reach, tint, line in ((radius + 1, INK, 4), (radius, colour, 2)):
        pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=tint, width=line)
    return np.array(canvas)


def draw_peak(image: Picture, values: Tensor | ArrayLike, *, radius: int | None = None) -> Picture:
    """Draw a ring around the highest value of a map (h, w), resized to the picture, so that a small spot is seen.

    ``radius`` is in pixels; None: a sixteenth of the shorter side. Returns a new picture, without a ring if the map is
    constant or has NaN, for then no place is the highest.
    """
    height, width = image.shape[:2]
    grid = _grid(values)
    if not bool(grid.amax() > grid.amin()):
        return image.copy()
    y, x = divmod(int(resize_maps(grid, (height, width)).argmax()), width)
    return draw_point(image, x, y, radius=radius or max(4, min(height, width) // 16))


def add_legend(
    image: Picture,
    low: str,
    high: str,
    *,
    colormap: Colormap = "signed",
    mark: tuple[float, str] | None = None,
    notes: Sequence[str] = (),
) -> Picture:
    """Return a new picture with a bar of colours below it, and lines of text.

    Args:
        image: the picture, (H, W, 3) uint8.
        low: what stands below the left end of the bar; below the right end if the two are too long for a line.
        high: what stands below the right end.
        colormap: of the bar.
        mark: a tick on the bar at a share of its width, 0 to 1, and what stands below it where there is room.
        notes: further lines, the first in ink and the others faded. What is too long for the width is cut.
    """
    width = image.shape[1]
    size = min(24, max(11, width // 24))
    bar, line, gap, font = size // 2, round(size * 1.5), size // 3, _font(size)
    lines = 1 if font.getlength(low) + font.getlength(high) < width - 4 * gap else 2
    canvas = Image.new("RGB", (width, image.shape[0] + bar + (lines + len(notes)) * line), PAPER)
    canvas.paste(Image.fromarray(_checked(image)), (0, 0))
    scale = np.broadcast_to(colorize(np.linspace(-(colormap == "signed"), 1, width), colormap), (bar, width, 3))
    canvas.paste(Image.fromarray(np.ascontiguousarray(scale)), (0, image.shape[0]))
    pen, top = ImageDraw.Draw(canvas), image.shape[0] + bar

    def write(x: float, row: int, text: str, anchor: str, colour: Colour = INK) -> None:
        pen.text((x, top + row * line), _cut_to(text, font, width - 2 * gap), colour, font, anchor=anchor)

    write(gap, 0, low, "la")
    write(width - gap, lines - 1, high, "ra")
    if mark is not None:
        x, half = mark[0] * (width - 1), font.getlength(mark[1]) / 2
        pen.line((x, image.shape[0], x, top), PAPER, max(1, bar // 4))
        if x - half > font.getlength(low) + 2 * gap and x + half < width - font.getlength(high) - 2 * gap:
            write(x, 0, mark[1], "ma")
    for number, note in enumerate(notes):
        write(gap, lines + number, note, "la", FADED if number else INK)
    return np.array(canvas)


def resize_picture(image: Picture, size: tuple[int, int]) -> Picture:
    """Resize a picture (not a map) to ``size`` = (height, width): bicubic, and antialiased when it shrinks."""
    if image.shape[:2] == size:
        return image
    return np.array(resize_image(Image.fromarray(image), size, Image.Resampling.BICUBIC))


def encode_png(picture: Picture) -> bytes:
    """Return a picture as a PNG file, in a tenth of Pillow's time; that of a photograph is about 6 percent larger.

    Each pixel is stored as its difference from its left neighbour, compressed by runs and Huffman codes alone: in
    photographs there is nothing else to find. NumPy and zlib leave the interpreter to other threads meanwhile.

    Source: Portable Network Graphics specification, third edition, sections 5 and 9 (filter type 1).
    """
    height, width = _checked(picture).shape[:2]
    rows = np.ones((height, 1 + 3 * width), np.uint8)  # the type of the filter, then the bytes of the row
    pixels = picture.reshape(height, -1)
    rows[:, 1:4] = pixels[:, :3]
    np.subtract(pixels[:, 3:], pixels[:, :-3], out=rows[:, 4:])
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, RGB
    content = {b"IHDR": header, b"IDAT": packer.compress(rows.data) + packer.flush(), b"IEND": b""}
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))
        for kind, data in content.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@dataclass(frozen=True)
class Tile:
    """A cell of a panel."""

    image: Picture  # of any size; it is scaled to fit the cell
    caption: str = ""  # below it; lines end at a newline and are cut to the cell's width
    frame: Colour | None = None  # colour of a frame around the picture, for cells that stand out


def panel(
    rows: Sequence[Sequence[Tile | None]],
    *,
    title: str = "",
    columns: Sequence[str] = (),
    labels: Sequence[str] = (),
    cell: int = 160,
    gap: int = 10,
) -> Picture:
    """Return a grid of captioned pictures as one picture on white; raise a `CalmError` if there is none.

    Args:
        rows: the cells; None leaves one empty, and a short row ends early.
        title: a line above everything.
        columns: headings of the columns.
        labels: a text left of each row.
        cell: side of a cell, in pixels; pictures keep their proportions inside it.
        gap: pixels between cells and around them.

    >>> import numpy as np
    >>> panel([[Tile(np.zeros((8, 8, 3), np.uint8))] * 2], cell=20, gap=5).shape
    (30, 55, 3)
    """
    across = max((len(row) for row in rows), default=0)
    if not across:
        raise CalmError("a panel needs at least one row with one cell")
    size = max(11, cell // 14)
    line = round(size * 1.35)
    plain, bold, large = _font(size), _font(size, bold=True), _font(round(size * 1.3), bold=True)
    left = gap + (ceil(max(map(bold.getlength, labels))) + gap if labels else 0)
    top = gap + (round(line * 1.3) + gap if title else 0) + (line + gap // 2 if columns else 0)
    square = (cell, cell)
    checked = [[Image.fromarray(_checked(tile.image)) if tile else None for tile in row] for row in rows]
    pictures = [[ImageOps.contain(picture, square) if picture else None for picture in row] for row in checked]
    captions = [[tile.caption.splitlines() if tile else [] for tile in row] for row in rows]
    heights = [max((picture.height for picture in row if picture), default=0) for row in pictures]
    most = [max(map(len, row), default=0) for row in captions]
    notes = [count * line + gap // 2 if count else 0 for count in most]
    width = left + across * (cell + gap)
    canvas = Image.new("RGB", (width, top + sum(heights) + sum(notes) + gap * len(rows)), PAPER)
    pen = ImageDraw.Draw(canvas)
    if title:
        pen.text((gap, gap), _cut_to(title, large, width - 2 * gap), INK, large)
    middles = [left + column * (cell + gap) + cell // 2 for column in range(across)]
    for middle, heading in zip(middles, columns, strict=False):
        pen.text((middle, top - gap), _cut_to(heading, bold, cell), INK, bold, anchor="ms")
    y = top
    for index, row in enumerate(rows):
        if index < len(labels):
            pen.text((gap, y + heights[index] // 2), labels[index], INK, bold, anchor="lm")
        for tile, picture, caption, middle in zip(row, pictures[index], captions[index], middles, strict=False):
            if tile is None or picture is None:
                continue
            x, above = middle - picture.width // 2, y + (heights[index] - picture.height) // 2
            canvas.paste(picture, (x, above))
            if tile.frame is not None:
                box = (x - 3, above - 3, x + picture.width + 2, above + picture.height + 2)
                pen.rectangle(box, outline=tile.frame, width=3)
            for number, note in enumerate(caption):  # the first line in ink, the others faded
                place = (middle, y + heights[index] + gap // 2 + number * line)
                pen.text(place, _cut_to(note, plain, cell), FADED if number else INK, plain, anchor="mt")
        y += heights[index] + notes[index] + gap
    return np.array(canvas)


_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


@cache
def _font(size: int, *, bold: bool = False) -> _Font:
    """Return DejaVu Sans, which matplotlib brings along (found without importing it), or else Pillow's own font."""
    spec = find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        file = Path(spec.origin).parent / f"mpl-data/fonts/ttf/DejaVuSans{'-Bold' if bold else ''}.ttf"
        if file.is_file():
            return ImageFont.truetype(file, size)
    return ImageFont.load_default(size)


def _cut_to(text: str, font: _Font, width: int) -> str:
    """Return the text, cut with an ellipsis where it would be wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _grid(values: Tensor | ArrayLike) -> Tensor:
    """Return a map (h, w) on the CPU, in float32 or wider."""
    grid = widen(torch.as_tensor(values).detach().cpu())
    if grid.ndim != 2:
        raise CalmError(f"a map has the shape (h, w), got {tuple(grid.shape)}: give one of a batch, as in maps[0]")
    return grid


def _signed(values: Tensor) -> Tensor:
    """Divide by the largest absolute value, to [-1, 1]; a zero or non-finite map becomes zeros."""
    peak = values.abs().amax()
    return values / peak if bool(peak > 0) and bool(peak.isfinite()) else torch.zeros_like(values)


def _checked(image: Picture) -> Picture:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise CalmError(f"a picture is uint8 RGB of shape (H, W, 3), got {image.dtype} {image.shape}")
    return image


def _rounded(values: NDArray[np.float64]) -> Picture:
    rounded: Picture = np.rint(values.clip(0, 255)).astype(np.uint8)
    return rounded
