"""CUB-200-2011 at ``dataset/CUB``: the official folder, its attribute names and segmentations inside."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calm.data.cub import CUB_FILES
from calm.data.lines import numbered
from calm.data.prepare.archives import unpack
from calm.data.prepare.sources import PUBLISHED, find
from calm.data.prepare.staging import Prepared, staged
from calm.errors import CalmError

__all__ = ["prepare_cub"]

IMAGES, CLASSES, ATTRIBUTES = 11_788, 200, 312
PAIRS = {1: 31, 2: 64, 3: 96}
"""Class pairs by number of differing part groups."""


def prepare_cub(archives: Sequence[Path], out: Path, prepared: Prepared) -> None:
    """Unpack CUB_200_2011, then segmentations and CUBV2 where they are at hand; what is in place stays.

    Raises:
        CalmError: an archive is missing, damaged or another one; a count is wrong.
    """
    final = out / "dataset" / "CUB"
    if not final.exists():
        found = find("cub", archives, prepared)
        if not found:
            raise CalmError(f"no CUB_200_2011.tgz in --from: get it from {PUBLISHED['cub'].where}")
        with staged(final) as (work, result):
            unpack(found[0], work / "archive")
            base = next((path.parent for path in sorted((work / "archive").rglob(CUB_FILES[0]))), None)
            if base is None:
                raise CalmError(f"{found[0]} has no images.txt: it is not CUB_200_2011")
            _attribute_names(base, work / "archive")
            _verify(base, prepared)
            base.replace(result)
    else:
        _verify(final, prepared)
    _extra("cub-segmentations", "segmentations", final / "segmentations", archives, prepared)
    if (final / "segmentations").is_dir():
        count = sum(1 for _ in (final / "segmentations").rglob("*.png"))
        prepared.expect("segmentations", count, IMAGES)
    _extra("cubv2", "CUBV2", out / "dataset" / "CUBV2", archives, prepared)


def _attribute_names(base: Path, archive: Path) -> None:
    """Move attributes.txt, which the archive has beside the folder, to the table that it names."""
    inside = base / "attributes" / "attributes.txt"
    for place in (archive / "attributes.txt", base.parent / "attributes.txt", base / "attributes.txt"):
        if place.is_file() and not inside.exists():
            inside.parent.mkdir(exist_ok=True)
            place.replace(inside)


def _extra(key: str, folder: str, final: Path, archives: Sequence[Path], prepared: Prepared) -> None:
    """Unpack an archive that may be absent, so that its ``folder`` becomes ``final``."""
    if final.exists():
        return
    found = find(key, archives, prepared)
    if not found:
        prepared.notes.append(f"no {folder}: get them from {PUBLISHED[key].where}")
        return
    with staged(final) as (work, result):
        unpack(found[0], work / "archive")
        inner = work / "archive" / folder
        (inner if inner.is_dir() else work / "archive").replace(result)


def _verify(base: Path, prepared: Prepared) -> None:
    """Compare the counts of the official data set."""
    # Here, so that the help page need not wait for PyTorch.
    from calm.data.cue_files import read_class_attributes, read_pairs

    missing = [name for name in CUB_FILES if not (base / name).is_file()]
    if missing:
        raise CalmError(f"CUB: {', '.join(missing)} not in the archive: get it from {PUBLISHED['cub'].where}")
    listed = [text.partition(" ")[2].strip() for _, text in numbered(base / "images.txt")]
    absent = [name for name in listed if not (base / "images" / name).is_file()]
    if absent:
        raise CalmError(f"CUB: {len(absent):,} of the images of images.txt are missing, such as {absent[0]}")
    where = f"get the whole archive from {PUBLISHED['cub'].where}"
    prepared.expect("images", len(listed), IMAGES, where)
    prepared.expect("classes", sum(1 for _ in numbered(base / "classes.txt")), CLASSES, where)
    try:
        names, _ = read_class_attributes(base)
        counts = {count: len(read_pairs(base, (count,))) for count in PAIRS}
    except CalmError as error:
        prepared.complain(f"no cue localization: {error}")
        return
    prepared.expect("attributes", len(names), ATTRIBUTES, where)
    for count, expected in PAIRS.items():
        prepared.expect(f"class pairs with {count} differing group(s)", counts[count], expected, where)
