"""What `calm attribute` says of pictures: lines on the terminal, records in results.json, and a page of them all."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from calm.files import atomic_path, json_text

# What a function needs of the rest is imported in it, so that `calm attribute --help` need not wait for PyTorch.
if TYPE_CHECKING:
    from rich.console import Console

    from calm.explain import Explanation, Query
    from calm.render import Picture

THUMBNAIL = 224  # pixels of the longer side of a picture on the page

UNITS = {"joint": "p(y|x)", "joint-superclass": "p(superclass|x)", "posterior": "p(z|x,y)", "prior": "p(z|x)"}
"""What the values of a map's grid sum to, where that is a probability; for other methods the sum has no name."""


class Records:
    """Records of pictures in a temporary file, so that the memory of a command does not grow with their number."""

    def __init__(self) -> None:
        self.count = 0
        self._file = TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 (closed by `collected`)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record, a value for JSON."""
        self._file.write(json_text(record) + "\n")
        self.count += 1

    def lines(self) -> Iterator[str]:
        """Yield the records in order, each as a line of JSON."""
        self._file.seek(0)
        for line in self._file:
            yield line.rstrip("\n")
        self._file.seek(0, io.SEEK_END)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self.lines())


@contextmanager
def collected() -> Iterator[Records]:
    """Yield empty `Records`, which are deleted at the end."""
    records = Records()
    with records._file:
        yield records


def write_results(path: Path, about: Mapping[str, Any], records: Records, failed: Sequence[Mapping[str, str]]) -> None:
    """Write results.json: what holds for all pictures, a record of each, one a line, and those that failed."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(f'{json_text({"format": 1, **about})[:-1]}, "images": [')
        for number, line in enumerate(records.lines()):
            file.write(",\n" * bool(number) + line)
        file.write(f'], "failed": {json_text(failed)}}}\n')


def thumbnail(picture: Picture, drawn: Picture) -> bytes:
    """Return the JPEG file of a picture and, right of it, its overlay without legend, both small."""
    import numpy as np
    from PIL import Image

    from calm.render import resize_picture

    scale = THUMBNAIL / max(picture.shape[:2])
    size = (max(1, round(picture.shape[0] * scale)), max(1, round(picture.shape[1] * scale)))
    both = np.concatenate([resize_picture(one, size) for one in (picture, drawn)], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(both).save(buffer, "jpeg", quality=80)
    return buffer.getvalue()


def write_gallery(path: Path, about: Mapping[str, Any], records: Records, names: Sequence[str]) -> Path:
    """Write a page of all pictures with their maps: filter by class, sort by confidence, keys, a picture at large.

    Files are named relative to ``path``, so that the folder can be moved. The page is written piece by piece, and shows
    a few pictures at a time: with 10,000 of them it is one file of 3 MB.
    """
    from calm.report.page import stream

    rows = (_row(record) for record in records)
    counts = {"count": records.count, "names": list(names), "about": about}
    return stream("attributions", {**counts, "rows": rows}, path)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page needs of a record, in short, since a page may have 10,000."""
    return {
        "file": record["file"],
        "small": record["files"]["thumbnail"],
        "large": record["files"]["overlay"],
        "ratio": round(record["width"] / record["height"], 3),
        "target": record["target"]["index"],
        "p": round(record["target"]["probability"], 4),
        "top": [[one["index"], round(one["probability"], 4)] for one in record["top"]],
        "label": None if record["label"] is None else record["label"]["index"],
        "peak": record["peak_over_uniform"] and round(record["peak_over_uniform"], 2),
        "flat": record["flat"],
    }


def record_of(
    source: Path, explanation: Explanation, query: Query, names: Sequence[str], label: int | None
) -> dict[str, Any]:
    """Return the record of one picture in results.json. Places are in the picture's pixels."""

    def of_class(c: int) -> dict[str, Any]:
        return {"index": c, "name": names[c], "probability": min(1.0, float(explanation.probs[c]))}

    def place_of(c: int) -> dict[str, Any]:
        return {"place": asdict(explanation.places[c])} if c in explanation.places else {}

    height, width = explanation.size
    return {
        "file": str(source),
        "width": width,
        "height": height,
        "label": None if label is None else of_class(label),
        "target": of_class(explanation.target),
        "versus": None if query.versus is None else of_class(query.versus),
        "superclass": [of_class(c) for c in query.superclass],
        **place_of(explanation.target),
        "grid": list(explanation.grid.shape),
        "grid_sum": float(explanation.grid.double().sum()),
        "peak_over_uniform": explanation.peak,
        "flat": explanation.flat,
        "top": [of_class(c) | place_of(c) for c in explanation.top],
    }


def print_explanation(
    console: Console, source: Path, explanation: Explanation, query: Query, names: Sequence[str], label: int | None
) -> None:
    """Print the most probable classes and the target, with where the map of each points."""
    from rich.markup import escape
    from rich.table import Table

    what = UNITS.get(query.method, "the map") if query.prior_exponent == 1 else "the map"
    share = f"{what} in that ninth"
    best = explanation.top[0]
    wrong = "" if label in (None, best) else f" (true class by its folder: {names[label or 0]})"
    console.print(f"{source}{wrong}", style="bold", markup=False, highlight=False)
    marks = dict.fromkeys(query.superclass, "+") or {explanation.target: "→"}
    if query.versus is not None:
        marks[query.versus] = "≠"
    one_map = query.versus is not None or bool(query.superclass)  # for several classes
    table = Table(box=None, pad_edge=False)
    for heading in ("", "class", "p(y|x)", *(() if one_map else ("where (x, y)", share))):
        right = heading in ("p(y|x)", share)
        table.add_column(heading, justify="right" if right else "left", header_style="dim")
    for c in dict.fromkeys([*explanation.top, *marks]):
        place = None if one_map else explanation.places.get(c)
        table.add_row(
            marks.get(c, ""),
            escape(names[c]),
            f"{float(explanation.probs[c]):.3f}",
            *([str(place), f"{place.share:.0%} (uniform: {place.area:.0%})"] if place else []),
            style="bold" if c in marks and c != query.versus else None,
        )
    console.print(table, soft_wrap=False)
    say: Callable[..., None] = lambda text: console.print(text, markup=False, highlight=False)  # noqa: E731
    if one_map:
        place = explanation.places[explanation.target]
        uniform = f"(uniform: {place.area:.0%})"
        if query.versus is None:
            say(f"{' + '.join(names[c] for c in query.superclass)}: {place}, {place.share:.0%} of {share} {uniform}")
        else:
            pair = f"{names[explanation.target]} against {names[query.versus]}"
            whole = f"what speaks for {names[explanation.target]}" if query.signed else "the difference"
            text = f"{pair}: {place}, {place.share:.0%} of {whole} in that ninth {uniform}"
            if query.method == "evidence" and query.signed:
                text += f"; expected log-odds {float(explanation.grid.double().sum()):+.2f} nats"
            say(text)
            if best not in (explanation.target, query.versus):
                say(f"neither is likely: the prediction is {names[best]}, {float(explanation.probs[best]):.3f}")
    if explanation.flat:
        peak = "" if explanation.peak is None else f": its peak is {explanation.peak:.1f} times a uniform map's value"
        say(f"the map is nearly flat and says little about the place{peak}")
    console.print()
