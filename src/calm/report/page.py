"""A report: a title, a summary, and a list of sections, written as one file that needs no other.

Build HTML from Python calls, so that nothing is escaped twice or not at all.

Names and formulas as people write them.

Tables of figures: the best of each column stands out.

Pictures in a page: inside the file, with a label and a text for those who do not see them.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from calm.files import write_text
from calm.render import Colormap, Picture, table

__all__ = [
    "P_Y",
    "P_YZ",
    "P_Z",
    "P_Z_GIVEN_Y",
    "Column",
    "Figure",
    "Html",
    "Page",
    "Part",
    "Row",
    "Section",
    "Shot",
    "colour_bar",
    "data_uri",
    "facts",
    "figures_table",
    "image",
    "join",
    "listed",
    "percent",
    "render",
    "species_name",
    "strip",
    "tag",
    "write",
]

_VOID = frozenset({"br", "col", "hr", "img", "meta"})


class Html(str):
    """Markup: text that `tag` takes as it is. Every other string is escaped."""

    __slots__ = ()


Part: TypeAlias = Html | str | None


def join(*parts: Part, between: str = "") -> Html:
    """The parts one after the other; None leaves nothing.

    >>> join("a < b", tag("br"), None)
    'a &lt; b<br>'
    """
    return Html(_text(between).join(_text(part) for part in parts if part is not None))


def tag(name: str, /, *children: Part, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        name: such as ``p``.
        children: its content, see `join`.
        attributes: an underscore at the end is dropped (``class_``), others become hyphens. None and False leave
            the attribute out, True gives one without a value.

    >>> tag("a", "x & y", href="#z", class_="far", hidden=True)
    '<a href="#z" class="far" hidden>x &amp; y</a>'
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(*children)}</{name}>")


def _text(part: Part) -> str:
    return "" if part is None else str(part) if isinstance(part, Html) else escape(part, quote=False)


P_Y, P_Z, P_YZ, P_Z_GIVEN_Y = (
    text.replace(" ", "\N{NO-BREAK SPACE}").replace("|", "|\N{WORD JOINER}")
    for text in ("p(y | x)", "p(z | x)", "p(y, z | x)", "p(z | x, y)")
)


def species_name(name: str) -> str:
    """A class of CUB as the name of a bird.

    >>> species_name("009.Brewer_Blackbird"), species_name("010.Red_winged_Blackbird"), species_name("dog")
    ('Brewer Blackbird', 'Red-winged Blackbird', 'dog')
    """
    return re.sub(r"_(?=[a-z])", "-", re.sub(r"^\d+\.", "", name)).replace("_", " ")


def listed(words: Sequence[str], last: str = "and") -> str:
    """Words in a sentence.

    >>> listed(["head"]), listed(["head", "leg", "wing"])
    ('head', 'head, leg and wing')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


# ruff: noqa: RUF001 -- typographic signs in prose


_PERCENT = "\N{NARROW NO-BREAK SPACE}%"
Better: TypeAlias = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
        title: its heading.
        form: how a figure is written, as in ``format(value, form)``; ``%`` is a percentage with one decimal.
        better: which figures are good; "" for none, and nothing stands out.
    """

    title: str
    form: str = ".3f"
    better: Better = ""


@dataclass(frozen=True)
class Row:
    """A row: its name, a figure or None for each column, an optional (low, high) interval for each, and whether
    it competes for the best (a chance level does not)."""

    name: Part
    values: Sequence[float | str | None]
    intervals: Sequence[tuple[float, float] | None] = ()
    competes: bool = True


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage.

    >>> percent(0.9876), percent(0.5, 0)
    ('98.8\\u202f%', '50\\u202f%')
    """
    return f"{100 * value:.{digits}f}{_PERCENT}"


def figures_table(
    columns: Sequence[Column], rows: Sequence[Row], *, caption: Part = None, corner: str = ""
) -> Html:
    """A table. A dash stands for what was not measured."""
    best = [
        _best(column, [row.values[place] for row in rows if row.competes])
        for place, column in enumerate(columns)
    ]
    head = tag(
        "tr", tag("th", corner, scope="col"), *[tag("th", column.title, scope="col") for column in columns]
    )
    body = []
    for row in rows:
        cells = []
        for place, (column, value) in enumerate(zip(columns, row.values, strict=True)):
            text = _written(value, column)
            interval = row.intervals[place] if row.intervals else None
            note = tag("small", _between(interval, column)) if interval else None
            stands_out = row.competes and best[place] is not None and text == best[place]
            cells.append(tag("td", tag("b", text) if stands_out else text, note))
        body.append(
            tag("tr", tag("th", row.name, scope="row"), *cells, class_=None if row.competes else "aside")
        )
    table = tag(
        "table", tag("caption", caption) if caption else None, tag("thead", head), tag("tbody", *body)
    )
    return join(tag("div", table, class_="scroll"))


def _written(value: float | str | None, column: Column) -> str:
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    return percent(value) if column.form == "%" else format(value, column.form)


def _between(interval: tuple[float, float], column: Column) -> str:
    """An interval, with a percent sign only at its end."""
    low, high = (_written(end, column) for end in interval)
    return f"{low.removesuffix(_PERCENT)}{' to ' if low.startswith(('-', '−')) else '–'}{high}"


def _best(column: Column, values: Sequence[float | str | None]) -> str | None:
    """How the best figure of a column is written, so that figures which look equal are equally good."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    if not column.better or len(numbers) < 2:
        return None
    return _written(max(numbers) if column.better == "higher" else min(numbers), column)


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


@dataclass(frozen=True)
class Section:
    """One subject.

    Attributes:
        title: its heading.
        body: what stands below it.
        short: what the table of contents calls it; the title if empty.
    """

    title: str
    body: Html
    short: str = ""

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return re.sub(r"[^a-z0-9]+", "-", (self.short or self.title).casefold()).strip("-")


@dataclass(frozen=True)
class Figure:
    """A number of the summary: in large type, with what it is and what to compare it with."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    """A whole report.

    Attributes:
        title: the heading and the window's title.
        kicker: a word or two above the heading.
        summary: the main result in a sentence or two.
        figures: its numbers.
        sections: the rest, in order.
        footer: the last line.
    """

    title: str
    kicker: str
    summary: Part
    sections: Sequence[Section]
    figures: Sequence[Figure] = field(default=())
    footer: Part = None


def render(page: Page) -> Html:
    """The page as HTML, with its style inside."""
    style = files("calm.report").joinpath("style.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", page.title),
        tag("style", Html(style)),
    )
    links = [tag("a", section.short or section.title, href=f"#{section.anchor}") for section in page.sections]
    figures = [
        tag(
            "div",
            tag("dt", figure.label),
            tag("dd", figure.value),
            tag("dd", figure.note, class_="aside") if figure.note else None,
        )
        for figure in page.figures
    ]
    header = tag(
        "header",
        tag("p", page.kicker, class_="kicker"),
        tag("h1", page.title),
        tag("p", page.summary, class_="summary"),
        tag("dl", *figures, class_="figures") if figures else None,
        tag("nav", *links, aria_label="Contents"),
    )
    sections = [
        tag("section", tag("h2", section.title), section.body, id=section.anchor) for section in page.sections
    ]
    footer = tag("footer", page.footer) if page.footer else None
    body = tag("body", header, tag("main", *sections), footer)
    return join(Html("<!doctype html>\n"), tag("html", head, body, lang="en"), "\n")


def write(page: Page, path: Path) -> Path:
    """Write the page to ``path``, whole or not at all."""
    write_text(path, render(page))
    return path


def facts(known: Mapping[str, Part]) -> Html:
    """Names and what is to be said about them."""
    return tag(
        "dl",
        *[tag("div", tag("dt", name), tag("dd", value)) for name, value in known.items()],
        class_="facts",
    )
