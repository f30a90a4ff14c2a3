"""The images that a command line names: files, folders and patterns, each with a name for its results."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from calm.data.folder import SUFFIXES
from calm.data.lines import is_text
from calm.errors import CalmError

__all__ = ["ImageInput", "find_images"]


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
