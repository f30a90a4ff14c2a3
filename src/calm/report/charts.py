"""Charts of curves and of estimates: SVG inside the page, in the colours of its light or dark theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

PALETTE = ("calm", "cam", "other", "method-4", "method-5", "method-6", "method-7", "method-8")
"""The page's colours for methods, most different first."""

_COLOURS = {
    name: f"#{number:02x}{number + 1:02x}{number + 2:02x}"
    for number, name in enumerate(("ink", "faded", "rule", *PALETTE), start=1)
}
"""Placeholder colours, which the page's variables of these names replace once the drawing is done."""


@dataclass(frozen=True)
class Line:
    """A method in a chart: a curve, or dots with intervals."""

    x: Sequence[float]  # ascending; of dots their places 0, 1, ...
    y: Sequence[float]  # as many; NaN leaves a gap
    label: str  # for the legend
    colour: str = "ink"  # a colour variable of the page: one of `PALETTE`, or ``ink``
    dashed: bool = False  # a dashed line, or hollow dots
    band: tuple[Sequence[float], Sequence[float]] | None = None  # lower and upper ends of intervals


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    percent: bool = False,
    x_percent: bool = False,
    x_log: bool = False,
    whole: bool = True,
) -> Markup:
    """Draw a figure with curves. Its heading says what is drawn, so that the y axis needs no label.

    With ``percent`` or ``x_percent``, y or x are fractions, written in percent; ``whole`` x are such as epochs.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def draw(axes: Any) -> None:
        for line in lines:
            colour = _COLOURS[line.colour]
            style: Any = (0, (3, 2)) if line.dashed else "-"
            axes.plot(line.x, line.y, color=colour, linestyle=style, linewidth=1.2 if line.dashed else 1.9)
            if line.band is not None:
                axes.fill_between(line.x, *line.band, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel(x_label)
        if x_log:
            axes.set_xscale("log")
        elif x_percent:
            axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
        _scale(axes, percent=percent)

    return _figure(draw, title, (4.0, 2.7))


def dot_chart(lines: Sequence[Line], places: Sequence[str], *, title: str, x_label: str, wide: bool = False) -> Markup:
    """Draw a dot and its interval for each method at each named place of the x axis, the methods side by side.

    y are fractions, written in percent. A ``wide`` figure is as wide as the page, with upright names.
    """

    def draw(axes: Any) -> None:
        for number, line in enumerate(lines):
            colour, shift = _COLOURS[line.colour], 0.7 * ((number + 0.5) / len(lines) - 0.5)
            x = [place + shift for place in line.x]
            for at, low, high in zip(x, *(line.band or ((), ())), strict=False):
                if math.isfinite(low + high):
                    axes.plot([at, at], [low, high], color=colour, linewidth=1.6, alpha=0.6)
            fill, size = "none" if line.dashed else colour, 3.2 if wide else 5
            axes.plot(x, line.y, "o", color=colour, markersize=size, markerfacecolor=fill)
        axes.set_xticks(range(len(places)), places, rotation=90 if wide else 0)
        axes.set_xlim(-0.5, len(places) - 0.5)
        for edge in range(1, len(places)):
            axes.axvline(edge - 0.5, color=_COLOURS["rule"], linewidth=0.6)
        axes.set_xlabel(x_label)
        _scale(axes, percent=True)

    return _figure(draw, title, (max(12.0, 0.16 * len(places)), 4.8) if wide else (4.0, 2.7))


def _scale(axes: Any, *, percent: bool) -> None:
    """Begin the y axis at 0, or below where values are negative."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _figure(draw: Callable[[Any], None], title: str, size: tuple[float, float]) -> Markup:
    """Return what ``draw`` puts on axes, as a drawing with a heading."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,  # ids that differ between the drawings of a page, and not between two calls
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _COLOURS["ink"],
        "text.parse_math": False,  # a class may be called "$"
        **dict.fromkeys(("axes.labelcolor", "xtick.color", "ytick.color"), _COLOURS["faded"]),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), _COLOURS["rule"]),
    }
    with mpl.rc_context(look):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    caption = Markup('<figure class="chart"><figcaption>{}</figcaption>{}</figure>')
    return caption.format(title, _inline(buffer.getvalue(), title))


def _inline(svg: str, title: str) -> Markup:
    """Make the drawing part of the page: no metadata, the page's fonts and colours, a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    for unwanted in (
        r"(?s)<metadata>.*?</metadata>",
        r"(?s)<style.*?</style>",
        r' id="[^"]*_\d+"',  # figure_1, line2d_3, ...: unlike the others, nothing refers to them
        r"font-family: [^;\"]*;",
    ):
        svg = re.sub(unwanted, "", svg)
    svg = re.sub(r' (?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))
