"""Tables of figures: the best of each column stands out."""

# ruff: noqa: RUF001 -- typographic signs in prose
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from calm.report.html import Html, Part, join, tag

__all__ = ["Column", "Row", "figures_table", "percent"]

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
