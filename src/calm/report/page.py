"""HTML pages from the templates of this package: numbers as people write them, tables, pictures, sections.

Templates escape every value that is not marked as HTML; ``templates/macros.html`` has the parts that sections share.
"""

# ruff: noqa: RUF001 -- typographic signs in prose

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from calm.files import atomic_path, write_text
from calm.render import Picture, table

JPEG_QUALITY = 88
PERCENT = "\N{NARROW NO-BREAK SPACE}%"
FORMULAS = {"P_Y": "p(y | x)", "P_Z": "p(z | x)", "P_YZ": "p(y, z | x)", "P_Z_GIVEN_Y": "p(z | x, y)"}
FORMULAS = {name: s.replace(" ", "\N{NO-BREAK SPACE}").replace("|", "|\N{WORD JOINER}") for name, s in FORMULAS.items()}
"""Probabilities, with spaces at which no line breaks."""


def percent(value: float, digits: int = 1) -> str:
    """Write a fraction as a percentage.

    >>> percent(0.9876), percent(0.5, 0)
    ('98.8\\u202f%', '50\\u202f%')
    """
    return f"{100 * value:.{digits}f}{PERCENT}"


def counted(number: int, noun: str) -> str:
    """Write a number and its noun.

    >>> counted(1, "method"), counted(1200, "image"), counted(2, "class")
    ('1 method', '1,200 images', '2 classes')
    """
    plural = {"class": "classes", "species": "species"}.get(noun, f"{noun}s")
    return f"{number:,} {noun if number == 1 else plural}"


def species_name(name: str) -> str:
    """Write a class of CUB as the name of a bird; other names are kept.

    >>> species_name("009.Brewer_Blackbird"), species_name("010.Red_winged_Blackbird"), species_name("dog")
    ('Brewer Blackbird', 'Red-winged Blackbird', 'dog')
    """
    return re.sub(r"_(?=[a-z])", "-", re.sub(r"^\d+\.", "", name)).replace("_", " ")


def listed(words: Sequence[str], last: str = "and") -> str:
    """Join words as in a sentence.

    >>> listed(["head"]), listed(["head", "leg", "wing"])
    ('head', 'head, leg and wing')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


@dataclass(frozen=True)
class Column:
    """A column of numbers."""

    title: str  # its heading
    form: str = ".3f"  # how a number is written, as in ``format(value, form)``; ``%`` is a percentage with one decimal
    better: Literal["higher", "lower", "decided", ""] = ""  # which numbers are bold: the highest, the lowest, those
    # whose interval excludes 0, or none

    def written(self, value: float | str | None) -> str:
        """Write a number as it stands in the table; a dash for None and NaN, strings as they are."""
        if value is None or isinstance(value, str) or not math.isfinite(value):
            return value if isinstance(value, str) else "–"
        return percent(value) if self.form == "%" else format(value, self.form)

    def interval(self, ends: tuple[float, float]) -> str | None:
        """Write an interval, with a percent sign only at its end; None if it has no ends."""
        low, high = map(self.written, ends)
        to = " to " if low.startswith(("-", "−")) else "–"
        return None if "–" in (low, high) else f"{low.removesuffix(PERCENT)}{to}{high}"


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str
    values: Sequence[float | str | None]  # one for each column
    intervals: Sequence[tuple[float, float] | None] = ()  # (low, high) for each, if there are any
    competes: bool = True  # for the best value: a chance level does not


@dataclass(frozen=True)
class Table:
    """A table of numbers, in which those that `Column.better` says are bold."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    caption: str | None = None
    corner: str = ""

    def cells(self, row: Row) -> list[tuple[str, str | None, bool]]:
        """Return the value and interval of a row in each column, as written or None, and whether it is the best."""
        cells = []
        intervals = row.intervals or [None] * len(self.columns)
        for place, (column, value, ends) in enumerate(zip(self.columns, row.values, intervals, strict=True)):
            rivals = [row.values[place] for row in self.rows if row.competes]
            numbers = [rival for rival in rivals if isinstance(rival, (int, float)) and math.isfinite(rival)]
            text, best = column.written(value), False
            if column.better == "decided":
                best = ends is not None and (ends[0] > 0 or ends[1] < 0)
            elif column.better and row.competes and len(numbers) > 1:  # compared as written: what looks equal is
                best = text == column.written(max(numbers) if column.better == "higher" else min(numbers))
            cells.append((text, column.interval(ends) if ends else None, best))
        return cells


@dataclass(frozen=True)
class Shot:
    """A picture and its label."""

    picture: Picture  # uint8 RGB (H, W, 3)
    alt: str  # alternative text, for those who do not see the picture
    label: str = ""  # below it
    note: str = ""  # below the label, in small type
    verdict: str = ""  # after the label: a word or two, in green if ``good`` and in red if not
    good: bool = True  # colour of the verdict


def data_uri(picture: Picture, *, lossless: bool = False) -> str:
    """Return the picture as a ``data:`` address: JPEG, or PNG if ``lossless``."""
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    options: dict[str, Any] = {"optimize": True} if lossless else {"quality": JPEG_QUALITY, "subsampling": 0}
    Image.fromarray(picture).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@cache
def _environment() -> Environment:
    blocks: Any = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=PackageLoader("calm.report"), autoescape=True, undefined=StrictUndefined, **blocks)
    environment.filters |= {
        "counted": counted,
        "data_uri": data_uri,
        "json": partial(json.dumps, indent=2, ensure_ascii=False, default=str),
        "listed": listed,
        "percent": percent,
        "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
    }
    environment.globals |= {**FORMULAS, "colour_bar_picture": lambda name: np.repeat(table(name)[None], 8, axis=0)}
    return environment


@dataclass(frozen=True)
class Section:
    """One subject of a page."""

    title: str  # its heading
    template: str  # the template of what stands below the heading, without its ending
    values: Mapping[str, Any] = field(default_factory=dict)  # what the template reads
    short: str = ""  # what the table of contents calls it; the title if empty

    @property
    def anchor(self) -> str:
        """Its id on the page."""
        return re.sub(r"[^a-z0-9]+", "-", (self.short or self.title).casefold()).strip("-")

    @property
    def body(self) -> Markup:
        """What stands below the heading."""
        return Markup(_environment().get_template(f"{self.template}.html").render(self.values))


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str  # the heading and the window's title
    kicker: str  # a word or two above the heading
    summary: Section  # the main result and its numbers, without a heading
    sections: Sequence[Section]  # the rest, in order
    footer: str = ""  # the last line


def render(page: Page) -> str:
    """Return the page as one HTML document, which needs no other file."""
    return _environment().get_template("page.html").render(page=page)


def stream(template: str, values: Mapping[str, Any], path: Path) -> Path:
    """Write a template to ``path``, whole or not at all, piece by piece: values may be iterators of any length."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(_environment().get_template(f"{template}.html").generate(values))
    return path


def write(page: Page, path: Path) -> Path:
    """Write the page to ``path``, whole or not at all."""
    write_text(path, render(page))
    return path
