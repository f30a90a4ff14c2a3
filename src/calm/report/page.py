"""A report: a title, a summary, and a list of sections, written as one file that needs no other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from calm.atomic import write_text
from calm.report.html import Html, Part, join, tag

__all__ = ["Figure", "Page", "Section", "render", "write"]


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
