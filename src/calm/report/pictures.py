"""Pictures in a page: inside the file, with a label and a text for those who do not see them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from calm.colormaps import Colormap, table
from calm.render import Picture
from calm.report.html import Html, Part, tag

__all__ = ["Shot", "colour_bar", "data_uri", "image", "strip"]

JPEG_QUALITY = 88


@dataclass(frozen=True)
class Shot:
    """A picture and its label.

    Attributes:
        picture: uint8 RGB (H, W, 3).
        alt: what is to be seen.
        label: below it.
        note: below the label, in small type.
    """

    picture: Picture
    alt: str
    label: Part = None
    note: Part = None


def data_uri(picture: Picture, *, lossless: bool = False) -> str:
    """The picture itself as an address: JPEG, or PNG if ``lossless``."""
    buffer = io.BytesIO()
    if lossless:
        Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    else:
        Image.fromarray(picture).save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def image(picture: Picture, alt: str, *, lossless: bool = False) -> Html:
    """An ``img`` element. It takes the width of what it is in."""
    height, width = picture.shape[:2]
    return tag(
        "img", src=data_uri(picture, lossless=lossless), alt=alt, width=width, height=height, decoding="async"
    )


def strip(shots: Sequence[Shot], *, columns: int, narrow: int = 2) -> Html:
    """Labelled pictures side by side.

    Args:
        shots: the pictures.
        columns: how many in a row where there is room.
        narrow: how many in a row on a phone.
    """
    cells = [
        tag(
            "figure",
            image(shot.picture, shot.alt),
            tag("figcaption", shot.label, tag("small", shot.note) if shot.note else None)
            if shot.label or shot.note
            else None,
        )
        for shot in shots
    ]
    return tag("div", *cells, class_="strip", style=f"--columns:{columns};--narrow:{narrow}")


def colour_bar(low: str, high: str, colormap: Colormap = "heat", middle: str = "") -> Html:
    """What the colours of a map mean: a bar from ``low`` to ``high``."""
    colours = np.repeat(table(colormap)[None], 8, axis=0)
    ends = [tag("span", low), tag("span", middle) if middle else None, tag("span", high)]
    return tag(
        "div",
        image(colours, f"colours from {low} to {high}", lossless=True),
        tag("div", *ends),
        class_="colours",
    )
