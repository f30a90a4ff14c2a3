"""Charts of curves and of estimates as SVG inside the page, in the colours of its light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from calm.report.page import Html, tag

__all__ = ["PALETTE", "Dots", "Line", "chart", "dot_chart", "legend"]

PALETTE = ("calm", "cam", "other", "method-4", "method-5", "method-6", "method-7", "method-8")
"""The page's colours for methods, most different first."""

_COLOURS = {
    name: f"#{number:02x}{number + 1:02x}{number + 2:02x}"
    for number, name in enumerate(("ink", "faded", "rule", *PALETTE), start=1)
}
"""Stand-ins that are replaced by the page's variables of these names once the drawing is done."""


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        x: ascending.
        y: as many.
        label: for the legend.
        colour: a colour variable of the page: one of `PALETTE`, or ``ink``.
        dashed: how it is drawn.
        band: lower and upper values around it, such as an interval.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str
    colour: str = "ink"
    dashed: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Dots:
    """A method's estimates, one for each place on the x axis.

    Attributes:
        values: estimates; NaN leaves its place empty.
        label: for the legend.
        colour: as for `Line`.
        dashed: drawn hollow, as the method's key in the legend is dashed.
        intervals: (low, high) of each; None for none.
    """

    values: Sequence[float]
    label: str
    colour: str = "ink"
    dashed: bool = False
    intervals: Sequence[tuple[float, float] | None] = ()


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    percent: bool = False,
    zero: bool = True,
    log: bool = False,
    x_percent: bool = False,
    x_log: bool = False,
    whole: bool = True,
) -> Html:
    """A figure with curves; its heading says what is drawn, so that the y axis needs no label.

    Args:
        lines: the curves.
        title: above it.
        x_label: what x is.
        percent: y is a share, written in percent.
        zero: the y axis begins at 0.
        log: the y axis is logarithmic; ``zero`` is then ignored.
        x_percent: x is a share, written in percent.
        x_log: the x axis is logarithmic.
        whole: x is a whole number, such as an epoch.
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
        _scale(axes, percent=percent, zero=zero, log=log)

    return _figure(draw, title, (4.0, 2.7))


def dot_chart(
    dots: Sequence[Dots],
    places: Sequence[str],
    *,
    title: str,
    x_label: str,
    percent: bool = False,
    wide: bool = False,
) -> Html:
    """A figure with a dot and its interval for each method at each place of the x axis, the methods side by side.

    Args:
        dots: the methods; each has as many values as there are places.
        places: names along the x axis.
        title: above it.
        x_label: what the places are.
        percent: the values are shares, written in percent.
        wide: as wide as the page, the names upright.
    """

    def draw(axes: Any) -> None:
        for number, row in enumerate(dots):
            colour = _COLOURS[row.colour]
            shift = 0.7 * ((number + 0.5) / len(dots) - 0.5)
            x = [place + shift for place in range(len(places))]
            for at, interval in zip(x, row.intervals, strict=False):
                if interval is not None:
                    axes.plot([at, at], interval, color=colour, linewidth=1.6, alpha=0.6)
            fill = "none" if row.dashed else colour
            size = 3.2 if wide else 5
            axes.plot(x, row.values, "o", color=colour, markersize=size, markerfacecolor=fill)
        axes.set_xticks(range(len(places)), places, rotation=90 if wide else 0)
        axes.set_xlim(-0.5, len(places) - 0.5)
        for edge in range(1, len(places)):
            axes.axvline(edge - 0.5, color=_COLOURS["rule"], linewidth=0.6)
        axes.set_xlabel(x_label)
        _scale(axes, percent=percent, zero=True, log=False)

    return _figure(draw, title, (max(12.0, 0.16 * len(places)), 4.8) if wide else (4.0, 2.7))


def _scale(axes: Any, *, percent: bool, zero: bool, log: bool) -> None:
    """The y axis."""
    from matplotlib.ticker import PercentFormatter

    if log:
        axes.set_yscale("log")
    elif zero:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0)
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _figure(draw: Callable[[Any], None], title: str, size: tuple[float, float]) -> Html:
    """What ``draw`` puts on axes, as a drawing with a heading."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    look: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": title,
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": _COLOURS["ink"],
        "axes.edgecolor": _COLOURS["rule"],
        "axes.labelcolor": _COLOURS["faded"],
        "xtick.color": _COLOURS["faded"],
        "ytick.color": _COLOURS["faded"],
        "grid.color": _COLOURS["rule"],
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
    return tag("figure", tag("figcaption", title), _inline(buffer.getvalue(), title), class_="chart")


def legend(lines: Sequence[Line]) -> Html:
    """What the curves of one or several charts are; equal labels once."""
    seen = {line.label: line for line in lines}
    keys = [
        tag(
            "li",
            tag("i", class_="dashed" if line.dashed else None, style=f"--key:var(--{line.colour})"),
            line.label,
        )
        for line in seen.values()
    ]
    return tag("ul", *keys, class_="legend")


def _inline(svg: str, title: str) -> Html:
    """The drawing as an element of the page: no metadata, fonts and colours of the page, a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg, count=5)
    svg = re.sub(r' id="(?:figure|axes|patch|matplotlib|xtick|ytick|line2d|text|FillBetween)[^"]*"', "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for name, colour in _COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Html(svg.replace("<svg", f'<svg role="img" aria-label="{tag("i", title)[3:-4]}"', 1))
