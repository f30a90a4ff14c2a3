"""``calm attribute``: explain image files, write what came out, and say it on the terminal.

The images that a command line names: files, folders and patterns, each with a name for its results.

An explanation in numbers: as a record for results.json, and as a table on the terminal.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from calm.data.loading import SUFFIXES
from calm.data.records import is_text
from calm.errors import CalmError
from calm.files import atomic_path, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from calm.explain import Explanation, Question
    from calm.model import CalmModel
    from calm.render import Picture

__all__ = ["UNITS", "ImageInput", "attribute_files", "find_images", "print_summary", "summary"]


@dataclass(frozen=True)
class ImageInput:
    """An image file, and the name (a relative path without suffix) that its results go under: no two share
    one."""

    path: Path
    name: str


def find_images(wanted: Sequence[str], out: Path) -> tuple[list[ImageInput], list[str]]:
    """The images that ``wanted`` names, each once, and the entries that name none.

    Args:
        wanted: image files; folders, searched at all depths for files with an image's suffix; patterns with
            ``*``, ``?``, ``[...]`` or ``**``.
        out: where results go: images in there are passed over, unless named one by one.

    Returns:
        The images in the order named (folders and patterns sorted), and the entries without image.

    Raises:
        CalmError: no image at all, a name that is not UTF-8 text, ``out`` is a loop of links.
    """
    try:
        written = out.resolve()
    except (OSError, RuntimeError) as error:
        raise CalmError(f"cannot write to {out}: {error}") from error
    found: dict[Path, ImageInput] = {}
    missing: list[str] = []
    names: set[str] = set()
    for entry in wanted:
        matches = list(_matches(entry, written))
        if not matches:
            missing.append(entry)
        for path, name in matches:
            if not is_text(str(path)):
                raise CalmError(f"the name of {str(path)!r} is not UTF-8 text: rename it")
            if path.resolve() not in found:
                found[path.resolve()] = ImageInput(path, _free(name, names))
    if not found:
        raise CalmError(f"no image found in {', '.join(map(repr, wanted)) or 'an empty list'}")
    return list(found.values()), missing


def _matches(entry: str, out: Path) -> Iterator[tuple[Path, str]]:
    path = Path(entry)
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError:  # a name that no file can have
        return
    if is_file:
        yield path, path.stem
    elif is_folder:
        for file in sorted(path.rglob("*")):
            if _is_image(file, out):
                yield file, file.relative_to(path).with_suffix("").as_posix()
    else:
        for match in sorted(glob.glob(entry, recursive=True)):  # noqa: PTH207 (Path.glob takes no absolute pattern)
            if _is_image(Path(match), out):
                yield Path(match), Path(match).stem


def _is_image(file: Path, out: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and file.is_file() and not file.resolve().is_relative_to(out)


def _free(name: str, taken: set[str]) -> str:
    """``name``, or name-2, name-3, ... if it is taken (also in another case: not every file system tells them
    apart)."""
    candidate, number = name, 1
    while candidate.casefold() in taken:
        number += 1
        candidate = f"{name}-{number}"
    taken.add(candidate.casefold())
    return candidate


UNITS = {
    "joint": "p(y|x)",
    "joint-superclass": "p(superclass|x)",
    "posterior": "p(z|x,y)",
    "prior": "p(z|x)",
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


HELD = 3 * 2**26
"""Bytes of pictures that a batch holds before it is explained; the last one may be larger."""


def attribute_files(
    images: list[str],
    *,
    model: str,
    target: str | None = None,
    kind: str | None = None,
    method: str | None = None,
    superclass: str | None = None,
    versus: str | None = None,
    out: Path = Path("attributions"),
    grid: bool = False,
    batch_size: int = 16,
    device: str = "auto",
) -> Path:
    """Show where a model saw the evidence: overlay pictures, raw maps, and the classes it considered.

    For each image NAME it writes NAME.KIND.png (the overlay, with a ring at the map's peak; of the size of the
    picture, enlarged if that is small, shrunk to 4 megapixels if it is larger) and NAME.KIND.npy (the map:
    float32, at the size of the image, in its own unit and not normalised), and at the end results.json. A value
    of a joint map is p(y, z | x), the probability of one cell of the model's grid; resized to the image it
    keeps that unit, so it is the map of --grid, not the resized one, that sums to p(y | x).

    Pictures are turned upright as their EXIF data says.

    Args:
        images: image files, folders (searched at all depths) and patterns such as 'photos/*.jpg'.
        model: a run folder of calm train, a saved model, or a hub id.
        target: the class to explain, by name or index. Default: the most probable one in each image.
        kind: which of the model's own maps: joint, posterior, prior, ... for CALM; cam, ... for CAM.
            Default: joint or cam.
        method: instead of a kind, any attribution method: integrated-gradients, smoothgrad, gradcam, ...
        superclass: names or indices of classes with commas between them, to ask for their sum.
        versus: a second class: the map becomes the absolute difference, why the target and not this class; in
            the overlay red speaks for the target, blue for the other.
        out: folder for the results. Inputs are never overwritten.
        grid: also write the map on the model's own grid, NAME.KIND.grid.npy.
        batch_size: images in one pass through the model; fewer if they are very large.
        device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.

    Returns:
        The file results.json.

    Raises:
        CalmError: a wrong option, before anything is written; or, after all others were done, images that
            could not be read, named.
    """
    # Here, so that the help page need not wait for PyTorch.
    from calm.baselines import BASELINES
    from calm.explain import ask, explain

    if batch_size < 1:
        raise CalmError(f"batch size must be at least 1, got {batch_size}")
    inputs, missing = find_images(images, out)
    loaded = _load(model, device)
    question = ask(loaded, target=target, kind=kind, method=method, superclass=superclass, versus=versus)
    if grid and question.method in BASELINES:
        raise CalmError(
            f"method {question.method!r} has no grid: leave out --grid, or choose a kind of the model"
        )
    suffixes = _suffixes(question, grid)
    _refuse_overwriting(inputs, out, suffixes)
    console = Console()
    failed = [{"file": name, "error": f"no image in {name!r}"} for name in missing]
    done: list[dict[str, Any]] = []
    for readable in _batches(inputs, batch_size, failed):
        answers = explain(loaded, [picture for _, picture in readable], question)
        for (entry, picture), answer in zip(readable, answers, strict=True):
            files = _write(out, entry.name, picture, answer, question, suffixes)
            done.append(summary(entry.path, answer, question, loaded.class_names) | {"files": files})
            print_summary(console, entry.path, answer, question, loaded.class_names)
    results = out / "results.json"
    write_json(
        results,
        {
            "format": 1,
            "model": model,
            "method": question.method,
            "images": done,
            "failed": failed,
        },
    )
    console.print(f"{len(done)} explained, written to {out}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        listed = "\n".join(f"  {failure['error']}" for failure in failed)
        raise CalmError(
            f"{len(failed)} of {len(failed) + len(done)} images could not be explained:\n{listed}"
        )
    return results


def _batches(
    inputs: Sequence[ImageInput], batch_size: int, failed: list[dict[str, str]]
) -> Iterator[list[tuple[ImageInput, Picture]]]:
    """The pictures, read; some at a time, fewer if they are large. Those that cannot be read go to ``failed``."""
    from calm.images import read_rgb

    batch: list[tuple[ImageInput, Picture]] = []
    for entry in inputs:
        try:
            batch.append((entry, read_rgb(entry.path, exif=True)))
        except CalmError as error:
            failed.append({"file": str(entry.path), "error": str(error)})
        if len(batch) == batch_size or sum(picture.size for _, picture in batch) > HELD:
            yield batch
            batch = []
    if batch:
        yield batch


def _load(source: str, device: str) -> CalmModel:
    from calm.inference import resolve_device
    from calm.model import load

    place = resolve_device(device)  # before the model is read, which may take a while
    return load(source, map_location="cpu").to(place).eval()


def _suffixes(question: Question, grid: bool) -> dict[str, str]:
    label = question.method + ("" if question.versus is None else "-difference")
    return {"overlay": f".{label}.png", "map": f".{label}.npy"} | (
        {"grid": f".{label}.grid.npy"} if grid else {}
    )


def _refuse_overwriting(inputs: Sequence[ImageInput], out: Path, suffixes: dict[str, str]) -> None:
    if out.exists() and not out.is_dir():
        raise CalmError(f"--out {out} is a file: name a folder")
    sources = {entry.path.resolve() for entry in inputs}
    for entry in inputs:
        for suffix in suffixes.values():
            written = (out / (entry.name + suffix)).resolve()
            if written in sources:
                raise CalmError(
                    f"the result for {entry.path} would overwrite the input {written}: choose another --out"
                )


def _write(
    out: Path, name: str, picture: Picture, answer: Explanation, question: Question, suffixes: dict[str, str]
) -> dict[str, str]:
    """Write the files of one image; what each is, and its path in ``out``."""
    from PIL import Image

    from calm.explain import draw

    for what, suffix in suffixes.items():
        with atomic_path(out / (name + suffix)) as temporary:
            if what == "overlay":
                Image.fromarray(draw(picture, answer, question)).save(temporary)
            else:
                _write_array(temporary, answer.values if what == "map" else answer.grid)
    return {what: name + suffix for what, suffix in suffixes.items()}


def _write_array(path: Path, values: Tensor) -> None:
    """As ``numpy.save``, but without a copy of the values, and if the disk is full the error says so."""
    import numpy as np

    array = np.ascontiguousarray(values.numpy(), dtype=np.float32)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
