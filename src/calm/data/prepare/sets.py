"""Some classes of Tiny ImageNet in the metadata format, with its boxes.

Of each class, the first 450 training images are train, the others (50) val; the official validation images,
50 a class, are test. Boxes of val and test are the archive's own: inclusive corners from 0 in 64 x 64 images.

CUB-200-2011 at ``dataset/CUB``: the official folder, its attribute names and segmentations inside.

ILSVRC with ImageNetV2, and OpenImages30k, where the released configuration looks for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from calm.data.cub import CUB_FILES
from calm.data.prepare.archives import PUBLISHED, Prepared, find, merge, staged, unpack
from calm.data.records import numbered
from calm.errors import CalmError, unknown

__all__ = [
    "name_as_listed",
    "prepare_cub",
    "prepare_ilsvrc",
    "prepare_openimages",
    "prepare_tiny_imagenet",
    "read_classes",
]

CUB_IMAGES, CUB_CLASSES, CUB_ATTRIBUTES = 11_788, 200, 312
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
        prepared.expect("segmentations", count, CUB_IMAGES)
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
    from calm.data.cues import read_class_attributes, read_pairs

    missing = [name for name in CUB_FILES if not (base / name).is_file()]
    if missing:
        raise CalmError(f"CUB: {', '.join(missing)} not in the archive: get it from {PUBLISHED['cub'].where}")
    listed = [text.partition(" ")[2].strip() for _, text in numbered(base / "images.txt")]
    absent = [name for name in listed if not (base / "images" / name).is_file()]
    if absent:
        raise CalmError(f"CUB: {len(absent):,} of the images of images.txt are missing, such as {absent[0]}")
    where = f"get the whole archive from {PUBLISHED['cub'].where}"
    prepared.expect("images", len(listed), CUB_IMAGES, where)
    prepared.expect("classes", sum(1 for _ in numbered(base / "classes.txt")), CUB_CLASSES, where)
    try:
        names, _ = read_class_attributes(base)
        counts = {count: len(read_pairs(base, (count,))) for count in PAIRS}
    except CalmError as error:
        prepared.complain(f"no cue localization: {error}")
        return
    prepared.expect("attributes", len(names), CUB_ATTRIBUTES, where)
    for count, expected in PAIRS.items():
        prepared.expect(f"class pairs with {count} differing group(s)", counts[count], expected, where)


ILSVRC = {"train": 1_281_167, "val": 50_000, "val2": 10_000}
OPENIMAGES = {"train": 29_819, "val": 2_500, "test": 5_000}
JPEG = {".jpg", ".jpeg"}
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
    return path.suffix.lower() in JPEG


def _images(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if _is_image(path))


TINY_CLASSES = 200
TRAIN, VAL, TEST = 450, 50, 50
"""Images a class."""


def read_classes(text: str) -> list[str]:
    """WordNet ids: ``n01443537,n01629819``, or a file with one a line (a ``classes.txt`` is one), in its order.

    Raises:
        CalmError: a line without an id, an id given twice.
    """
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not all(map(_is_id, found)) and os.path.isfile(text):  # noqa: PTH113 -- Path's raises for long names
        lines = [line.split() for _, line in numbered(Path(text))]
        found = [next((word for word in line[:2] if _is_id(word)), " ".join(line)) for line in lines]
    for word in found:
        if not _is_id(word):
            raise CalmError(f"--classes: {word!r} is no WordNet id such as n01443537, and no file of them")
    if len(set(found)) < len(found) or (text and not found):
        raise CalmError("--classes: an id is given twice, or none is given")
    return found


def _is_id(word: str) -> bool:
    return len(word) == 9 and word[0] == "n" and word[1:].isdigit()


def prepare_tiny_imagenet(archives: Sequence[Path], out: Path, prepared: Prepared, classes: str) -> None:
    """Write ``out`` with ``images/``, ``metadata/`` and ``classes.txt``; what is in place stays.

    Raises:
        CalmError: the archive is missing, damaged or another one; no such class; a count is wrong.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "classes.txt").is_file():
            raise CalmError(f"--out {out} is not empty: give a new folder")
        there = read_classes(str(out / "classes.txt"))
        if classes and there != read_classes(classes):
            raise CalmError(f"--out {out} has other classes already: give a new folder")
        prepared.expect("classes", len(there), len(there) if classes else TINY_CLASSES)
        return
    chosen = read_classes(classes)
    found = find("tiny-imagenet", archives, prepared)
    if not found:
        raise CalmError(f"no tiny-imagenet-200.zip in --from: get it from {PUBLISHED['tiny-imagenet'].where}")
    with staged(out) as (work, result):
        unpack(found[0], work / "archive", wanted=lambda name: _needed(name, chosen))
        base = next((path.parent for path in sorted((work / "archive").rglob("wnids.txt"))), None)
        if base is None:
            raise CalmError(f"{found[0]} has no wnids.txt: it is not Tiny ImageNet")
        known = [text.strip() for _, text in numbered(base / "wnids.txt")]
        for wnid in chosen:
            if wnid not in known:
                raise unknown("class", wnid, known[:200], where=f"{found[0].name}")
        _write(base, result, chosen or known, prepared)


def _needed(name: str, chosen: Sequence[str]) -> bool:
    parts = name.split("/")
    return "train" not in parts or not chosen or any(wnid in parts for wnid in chosen)


def _write(base: Path, result: Path, classes: Sequence[str], prepared: Prepared) -> None:
    words = dict(text.partition("\t")[::2] for _, text in numbered(base / "words.txt"))
    held = [text.split("\t") for _, text in numbered(base / "val" / "val_annotations.txt")]
    boxes = {row[0]: row[2:6] for row in held}
    rows: dict[str, list[tuple[str, int, tuple[int, int], list[str]]]] = {"train": [], "val": [], "test": []}
    for label, wnid in enumerate(classes):
        folder = base / "train" / wnid
        own = {
            row[0]: row[1:5]
            for row in (text.split("\t") for _, text in numbered(folder / f"{wnid}_boxes.txt"))
        }
        train = sorted((folder / "images").glob("*.JPEG"), key=_number)
        test = sorted((base / "val" / "images" / row[0] for row in held if row[1] == wnid), key=_number)
        for split, paths, at in (
            ("train", train[:TRAIN], {}),
            ("val", train[TRAIN:], own),
            ("test", test, boxes),
        ):
            for path in paths:
                name = f"images/{split}/{wnid}/{path.name}"
                with Image.open(path) as image:
                    size = image.size
                (result / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(result / name)
                rows[split].append((name, label, size, at.get(path.name, [])))
    prepared.counts["classes"] = len(classes)
    for split, each in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        prepared.expect(f"{split} images", len(rows[split]), each * len(classes))
        lists = result / "metadata" / split
        lists.mkdir(parents=True)
        (lists / "image_ids.txt").write_text("".join(f"{name}\n" for name, *_ in rows[split]))
        (lists / "class_labels.txt").write_text("".join(f"{row[0]},{row[1]}\n" for row in rows[split]))
        (lists / "image_sizes.txt").write_text(
            "".join(f"{row[0]},{row[2][0]},{row[2][1]}\n" for row in rows[split])
        )
        located = (f"{name},{','.join(box)}\n" for name, _, _, box in rows[split] if box)
        (lists / "localization.txt").write_text("".join(located) or "\n")
    names = (f"{label} {wnid} {words.get(wnid, wnid).strip()}\n" for label, wnid in enumerate(classes))
    (result / "classes.txt").write_text("".join(names))


def _number(path: Path) -> int:
    """The number at the end of a file's name."""
    return int(path.stem.rpartition("_")[2])
