"""An explanation in numbers: as a record for results.json, and as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from calm.explanation import Explanation, Question

__all__ = ["UNITS", "print_summary", "summary"]

UNITS = {
    "jointll": "p(y|x)",
    "jointll-superclass": "p(superclass|x)",
    "gtcond": "p(z|x,y)",
    "saliency": "p(z|x)",
}
"""What the mass of a map's grid adds up to, where it is a probability; of other maps it has no name."""


def summary(source: Path, answer: Explanation, question: Question, names: Sequence[str]) -> dict[str, Any]:
    """The record of one image, ready for JSON. Places are in the picture's pixels."""
    height, width = answer.size
    return {
        "file": str(source),
        "width": width,
        "height": height,
        "target": _named(answer.target, answer, names),
        "versus": None if question.versus is None else _named(question.versus, answer, names),
        "superclass": [_named(c, answer, names) for c in question.superclass],
        "place": asdict(answer.places[answer.target]),
        "grid": list(answer.grid.shape),
        "grid_sum": float(answer.grid.double().sum()),
        "top": [_named(c, answer, names) | _place(c, answer) for c in answer.top],
    }


def print_summary(
    console: Console, source: Path, answer: Explanation, question: Question, names: Sequence[str]
) -> None:
    """The most probable classes and the target, with where the map of each points."""
    mass = f"share of {UNITS.get(question.method, 'the map')} there"
    console.print(str(source), style="bold", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    together = question.versus is not None or bool(question.superclass)  # one map for several classes
    for heading in ("", "class", "p(y|x)", *(() if together else ("where (x, y)", mass))):
        right = heading in ("p(y|x)", mass)
        table.add_column(heading, justify="right" if right else "left", header_style="dim")
    marks = {answer.target: "→"} if question.versus is None else {answer.target: "→", question.versus: "≠"}
    if question.superclass:
        marks = dict.fromkeys(question.superclass, "+")
    for c in dict.fromkeys([*answer.top, *marks]):
        place = None if together else answer.places.get(c)
        table.add_row(
            marks.get(c, ""),
            escape(names[c]),
            f"{float(answer.probs[c]):.3f}",
            *([str(place), f"{place.share:.0%}"] if place else []),
            style="bold" if c in marks and c != question.versus else None,
        )
    console.print(table)
    if question.superclass:
        place = answer.places[answer.target]
        text = f"{' + '.join(names[c] for c in question.superclass)}: {place}, {mass}: {place.share:.0%}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    if question.versus is not None:
        place = answer.places[answer.target]
        text = f"{names[answer.target]} against {names[question.versus]}: {place}, {place.share:.0%} of the difference"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print()


def _named(c: int, answer: Explanation, names: Sequence[str]) -> dict[str, Any]:
    return {"index": c, "name": names[c], "probability": min(1.0, float(answer.probs[c]))}


def _place(c: int, answer: Explanation) -> dict[str, Any]:
    place = answer.places.get(c)
    return {"place": asdict(place)} if place else {}
