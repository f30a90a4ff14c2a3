"""ILSVRC with ImageNetV2, and OpenImages30k, where the released configuration looks for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from calm.data.lines import numbered
from calm.data.prepare.archives import unpack
from calm.data.prepare.sources import PUBLISHED, find
from calm.data.prepare.staging import Prepared, merge, staged
from calm.errors import CalmError

__all__ = ["name_as_listed", "prepare_ilsvrc", "prepare_openimages"]

ILSVRC = {"train": 1_281_167, "val": 50_000, "val2": 10_000}
OPENIMAGES = {"train": 29_819, "val": 2_500, "test": 5_000}
IMAGES = {".jpg", ".jpeg"}
HASH = 40
"""Characters of a file's name by hash."""
LISTED_AND_HASHED = re.compile(r"(\d+/\d+\.jpeg),\s*(\d+/[0-9a-f]{40}\.jpeg)")


def prepare_ilsvrc(archives: Sequence[Path], out: Path, prepared: Prepared) -> None:
    """``dataset/ILSVRC/{train,val}`` and ``dataset/ImageNetV2/val2``; each appears whole, and stays.

    Raises:
        CalmError: an archive is damaged or another one; a part is missing or a count is wrong.
    """
    places = {
        "train": ("ilsvrc-train", out / "dataset" / "ILSVRC" / "train"),
        "val": ("ilsvrc-val", out / "dataset" / "ILSVRC" / "val"),
        "val2": ("imagenetv2", out / "dataset" / "ImageNetV2" / "val2"),
    }
    for part, (key, final) in places.items():
        found = [] if final.exists() else find(key, archives, prepared)
        if not final.exists() and not found:
            prepared.complain(f"no {part} images: get the archive from {PUBLISHED[key].where}")
            continue
        if found:
            with staged(final) as (work, result):
                unpack(found[0], work / "archive")
                for inner in sorted((work / "archive").rglob("n*.tar")):  # train: an archive a class
                    unpack(inner, work / "archive" / inner.stem)
                    inner.unlink()
                prepared.expect(f"{part} images", _images(work / "archive"), ILSVRC[part])
                _unwrapped(work / "archive", part).replace(result)
        else:
            prepared.expect(f"{part} images", _images(final), ILSVRC[part])


def name_as_listed(out: Path, prepared: Prepared) -> None:
    """Give ImageNetV2's images the names that the released lists have for them, ``0/0.jpeg`` to ``999/9.jpeg``.

    Its archives of today call them by hashes. The lists of the published evaluator come with ``val/mapping.txt``, a
    line of the name in the lists, a comma and the name by hash for each image. Without it this is only a note.

    Raises:
        CalmError: a line that is not so.
    """
    images = out / "dataset" / "ImageNetV2" / "val2"
    mapping = out / "metadata" / "ILSVRC" / "val" / "mapping.txt"
    if not _hashed(images):
        return
    if not mapping.is_file():
        prepared.notes.append(
            f"images of {images} are named by hashes, lists have 0/0.jpeg: {mapping.name} of"
            f" {PUBLISHED['metadata'].where} tells which is which, --metadata_url published fetches it"
        )
        return
    for line, text in numbered(mapping):
        names = LISTED_AND_HASHED.fullmatch(text)
        if names is None:
            raise CalmError(f"{mapping}:{line}: {text!r:.200} is not 'class/number.jpeg, class/hash.jpeg'")
        if (images / names[2]).is_file():
            (images / names[2]).rename(images / names[1])
    if left := _hashed(images):
        prepared.complain(f"{mapping} has no name for {len(left)} images, the first is {min(left)}")


def prepare_openimages(archives: Sequence[Path], out: Path, prepared: Prepared) -> None:
    """``dataset/OpenImages/{train,val,test}``, images and masks of all archives together.

    Raises:
        CalmError: an archive is missing or damaged; a count is wrong.
    """
    final = out / "dataset" / "OpenImages"
    if final.exists():
        for split, expected in OPENIMAGES.items():
            prepared.expect(f"{split} images", _images(final / split), expected)
        return
    found = find("openimages", archives, prepared)
    if not found:
        raise CalmError(
            f"no archive of OpenImages30k in --from: get them from {PUBLISHED['openimages'].where}"
        )
    with staged(final) as (work, result):
        for number, path in enumerate(found):
            unpack(path, work / str(number))
            _sort_splits(path, work / str(number), result)
        for split, expected in OPENIMAGES.items():
            prepared.expect(
                f"{split} images", _images(result / split), expected, PUBLISHED["openimages"].where
            )


def _sort_splits(archive: Path, folder: Path, result: Path) -> None:
    """Move an archive's folders train, val and test, wherever they begin, to ``result``."""
    some = False
    for split in OPENIMAGES:
        for place in (folder / split, *folder.glob(f"*/{split}"), *folder.glob(f"*/*/{split}")):
            if place.is_dir():
                merge(place, result / split)
                some = True
    named = archive.name.partition(".")[0].lower()
    if not some and named in OPENIMAGES:
        merge(folder, result / named)
    elif not some:
        raise CalmError(f"{archive} has no folder train, val or test")


def _hashed(images: Path) -> list[Path]:
    """Those that are named by hashes."""
    return [path for path in images.glob("*/*") if len(path.stem) == HASH]


def _unwrapped(folder: Path, name: str) -> Path:
    """The folder inside that has the name, or that all else is in (``imagenetv2-...-format-val``)."""
    inside = list(folder.iterdir())
    if (folder / name).is_dir():
        return folder / name
    wrapped = len(inside) == 1 and inside[0].is_dir() and not any(map(_is_image, inside[0].iterdir()))
    return inside[0] if wrapped else folder


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES


def _images(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if _is_image(path))
