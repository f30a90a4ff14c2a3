"""Line charts as SVG inside the page, in the colours of its light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from calm.report.html import Html, tag

__all__ = ["Line", "chart", "legend"]

_COLOURS = {"ink": "#010203", "faded": "#020304", "rule": "#030405", "calm": "#040506", "cam": "#050607",
            "other": "#060708"}  # fmt: skip
"""Stand-ins that are replaced by the page's variables of these names once the drawing is done."""


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        x: ascending.
        y: as many.
        label: for the legend.
        colour: a colour variable of the page: ``calm``, ``cam``, ``other`` or ``ink``.
        dashed: how it is drawn.
        band: lower and upper values around it, such as an interval.
    """

    x: Sequence[float]
    y: Sequence[float]
    label: str
    colour: str = "ink"
    dashed: bool = False
    band: tuple[Sequence[float], Sequence[float]] | None = None


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    percent: bool = False,
    zero: bool = True,
    log: bool = False,
) -> Html:
    """A figure with curves; its heading says what is drawn, so that the y axis needs no label.

    Args:
        lines: the curves.
        title: above it.
        x_label: what x is.
        percent: y is a share, written in percent.
        zero: the y axis begins at 0.
        log: the y axis is logarithmic; ``zero`` is then ignored.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

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
        figure = Figure(figsize=(4.0, 2.7), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for line in lines:
            colour = _COLOURS[line.colour]
            style: Any = (0, (3, 2)) if line.dashed else "-"
            axes.plot(line.x, line.y, color=colour, linestyle=style, linewidth=1.2 if line.dashed else 1.9)
            if line.band is not None:
                axes.fill_between(line.x, *line.band, color=colour, alpha=0.15, linewidth=0)
        axes.grid(axis="y", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel(x_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if log:
            axes.set_yscale("log")
        elif zero:
            axes.set_ylim(bottom=0)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
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
