"""The HTML of the explorer's results: pictures that can be touched, colour scales, bars, and links that save files.

Every picture is sent inside the page, as a PNG in a data URI, and what a visitor saves likewise. All text that comes
from a model or a visitor is escaped.
"""

from __future__ import annotations

import io
import json
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TypeAlias

import numpy as np

from calm.app.session import DECADES, Reading, Rectangle, numbers
from calm.render import Colormap, Picture, encode_png, table

MEANING = {
    "joint": "p(y, z | x): the class is in the picture and its cue is here; the map sums to p(y | x)",
    "posterior": "p(z | x, y): where the cue is, if the picture shows the class; the map sums to 1",
    "prior": "p(z | x): where the model looks, whatever the class; the map sums to 1",
    "cam": "the class score of each cell; no probability",
    "evidence": "what speaks for one class (red) against another (blue); the map sums to their log-odds in nats"
    " (of CALM, the expected ones)",
}

Place: TypeAlias = tuple[float, float]
"""x and y, as shares of the picture's width and height."""


def uri(picture: Picture) -> str:
    """Return a picture as a PNG in a data URI."""
    return "data:image/png;base64," + b64encode(encode_png(picture)).decode()


def view(
    picture: Picture,
    alt: str,
    grid: Sequence[int],
    *,
    region: Rectangle | None = None,
    place: Place | None = None,
    brush: float = 0.0,
) -> str:
    """Return a picture that takes clicks, rectangles and keys (viewer.js), or paint of a ``brush`` of that percent."""
    rows, columns = grid
    x, y = place or (0.5, 0.5)
    box = ""
    if region is not None:
        left, top, right, bottom = (100 * v for v in region)
        box = f"display:block;left:{left}%;top:{top}%;width:{right - left}%;height:{bottom - top}%"
    point = ""
    if place is not None:
        column, row = min(columns - 1, int(x * columns)), min(rows - 1, int(y * rows))
        sides = f"width:{100 / columns}%;height:{100 / rows}%"
        point = f'<div class="calm-point" style="left:{100 * column / columns}%;top:{100 * row / rows}%;{sides}"></div>'
    line = ""
    if brush:
        line = (
            '<svg viewBox="0 0 100 100" preserveAspectRatio="none"><polyline fill="none" stroke="#fff"'
            f' stroke-opacity="0.7" stroke-width="{brush}" stroke-linecap="round" stroke-linejoin="round"/></svg>'
        )
    paint = ' data-brush="true"' if brush else ""
    return (
        f'<div class="calm-view" tabindex="0" role="application" aria-label="{escape(alt)}" data-x="{x}" data-y="{y}"'
        f' data-rows="{rows}" data-columns="{columns}"{paint}><img alt="{escape(alt)}" src="{uri(picture)}"'
        f' draggable="false">{point}<div class="calm-rect" style="{box}"></div>{line}</div>'
    )


def scale(reading: Reading, names: Sequence[str], log: bool = False) -> str:
    """Return the colour scale of a map, what the map is, and how sharp it is."""
    colormap: Colormap = "heat" if reading.versus is None else "signed"
    colours = ", ".join("rgb({},{},{})".format(*colour) for colour in table(colormap)[::32])
    peak = float(reading.grid.abs().max())
    low, high, notes = "0", f"{reading.top:.2g} in a cell", [escape(MEANING[reading.kind])]
    if reading.versus is not None:
        low, high = f"◀ {escape(names[reading.versus])}", f"{escape(names[reading.target])} ▶"
        differs = "red where the map of the one class is higher, blue where that of the other is"
        notes = [MEANING["evidence"] if reading.kind == "evidence" else differs]
        notes.append(f"colours grow with the square root of the difference, up to {peak:.2g}")
    elif reading.uniform is None:
        low, high = f"{float(reading.grid.min()):.3g}", f"{float(reading.grid.max()):.3g}"
    else:
        high += f" ({reading.top / reading.uniform:.3g} times uniform)"
        low = f"{reading.top / 10**DECADES:.1g}" if log else low
    if reading.flat:
        notes.append("<b>this map is nearly flat</b>: it says little about the place")
    bar = f'<i style="background:linear-gradient(90deg,{colours})"></i>'
    return f'<div class="calm-scale">{bar}<span>{low}</span><span>{high}</span></div><p>{"; ".join(notes)}.</p>'


def sentence(reading: Reading, names: Sequence[str], region: Rectangle | None) -> str:
    """Return what a map holds in a rectangle; without one, in all."""
    name, total = escape(names[reading.target]), reading.total
    where = "the cue is in here" if region else "the cue is anywhere"
    inside = reading.mass(region or (0, 0, 1, 1))
    if reading.versus is not None:
        against = f"{name} against {escape(names[reading.versus])}"
        text = f"{against}: <b>{inside:+.3f}</b>" + (f" in here, of {total:+.3f} in all" if region else " in all")
        return f'<p role="status">{text}.</p>'
    words = {
        "joint": f"p({name} and {where} | x)",
        "posterior": f"p({where} | x, {name})",
        "prior": f"p({where} | x)",
    }.get(reading.kind, "sum of the map" + " in here" * bool(region))
    text = f"{words} = <b>{inside:.3f}</b>"
    if region:
        area = (region[2] - region[0]) * (region[3] - region[1])
        text += f", of {total:.3f} in all; a uniform map would have {area * total:.3f} in here"
    return f'<p role="status">{text}.</p>'


def bars(values: Sequence[tuple[str, float, bool]], shown: Sequence[float] | None = None) -> str:
    """Return a bar for each (name, length from 0 to 1, whether it stands out), with a number beside it."""
    rows = []
    for (name, length, chosen), number in zip(values, shown or [length for _, length, _ in values], strict=True):
        bar = f'<i style="width:{100 * min(1.0, length):.1f}%"></i>'
        kind = " class=chosen" if chosen else ""
        rows.append(f"<tr{kind}><td>{escape(name)}</td><td>{bar}</td><td>{number:.3f}</td></tr>")
    return f'<table class="calm-bars">{"".join(rows)}</table>'


def figure(caption: str, picture: Picture) -> str:
    """Return a captioned picture."""
    text = escape(caption)
    return f'<figure><img alt="{text}" src="{uri(picture)}"><figcaption>{text}</figcaption></figure>'


def download(text: str, name: str, content: bytes, kind: str) -> str:
    """Return a link that saves a file."""
    data = f"data:{kind};base64,{b64encode(content).decode()}"
    return f'<a download="{escape(name)}" href="{data}">{escape(text)}</a>'


def downloads(drawn: Picture, reading: Reading, names: Sequence[str], region: Rectangle | None) -> str:
    """Return links that save the overlay, the map on the grid, and the numbers."""
    stem, array = f"{Path(reading.seen.name).stem}.{reading.kind}", io.BytesIO()
    np.save(array, reading.grid.float().numpy())
    content = json.dumps(numbers(reading, names, region), indent=1).encode()
    return (
        '<p class="calm-downloads">Download: '
        + download("overlay (.png)", f"{stem}.png", encode_png(drawn), "image/png")
        + download("map on the grid (.npy)", f"{stem}.npy", array.getvalue(), "application/octet-stream")
        + download("numbers (.json)", f"{stem}.json", content, "application/json")
        + "</p>"
    )
