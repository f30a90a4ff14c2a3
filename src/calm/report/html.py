"""Build HTML from Python calls, so that nothing is escaped twice or not at all."""

from __future__ import annotations

from html import escape
from typing import TypeAlias

__all__ = ["Html", "Part", "join", "tag"]

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
