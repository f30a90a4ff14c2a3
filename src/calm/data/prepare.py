"""Unpack the archives that data sets are published as, and arrange them so that every command reads them.

CUB-200-2011, ILSVRC with ImageNetV2 and OpenImages30k go below ``dataset/``, where the released configuration looks for
them. Tiny ImageNet gets the metadata format: of each class, the first 450 training images are train, the other 50 val;
the official validation images, 50 a class, are test. Boxes of val and test are the archive's own.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from PIL import Image

from calm.data.archives import (
    PUBLISHED,
    Prepared,
    find,
    folder_of,
    list_archives,
    merge,
    place_metadata,
    staged,
    unpack,
)
from calm.data.records import numbered_lines
from calm.errors import CalmError, unknown
from calm.files import remove_abandoned

DataSet: TypeAlias = Literal["cub", "ilsvrc", "openimages30k", "tiny-imagenet"]

DATA_SETS: dict[DataSet, str] = {"cub": "CUB", "ilsvrc": "ILSVRC", "openimages30k": "OpenImages", "tiny-imagenet": ""}
"""Names of the data sets for the command, and of their folders in the released layout."""

CUB_IMAGES, CUB_CLASSES, CUB_ATTRIBUTES = 11_788, 200, 312
CUB_PAIRS = {1: 31, 2: 64, 3: 96}  # class pairs by number of differing part groups
ILSVRC = {"train": 1_281_167, "val": 50_000, "val2": 10_000}
OPENIMAGES = {"train": 29_819, "val": 2_500, "test": 5_000}
TINY_CLASSES, TINY_TRAIN, TINY_VAL, TINY_TEST = 200, 450, 50, 50  # images are those of a class


def prepare(
    name: DataSet,
    archives: Sequence[str | Path],
    out: str | Path,
    *,
    classes: str = "",
    metadata_url: str = "",
    metadata_sha256: str = "",
    partial: bool = False,
) -> Prepared:
    """Check and unpack archives; a run that was stopped is finished by the same call.

    Args:
        name: the data set.
        archives: archives, or folders of them.
        out: folder that gets ``dataset/`` and ``metadata/`` as the released code lays them out; for Tiny ImageNet,
            ``images/``, ``metadata/`` and ``classes.txt``.
        classes: of Tiny ImageNet: WordNet ids separated by commas, or a file of them; empty: all 200.
        metadata_url: https address of an archive of the released metadata, or ``published`` for that of the published
            evaluator. Nothing is fetched without it.
        metadata_sha256: SHA-256 of that archive.
        partial: whether wrong checksums and counts are notes instead of errors.

    Raises:
        CalmError: an archive is missing, damaged or another one, or a count is wrong; what to get where.
    """
    if name not in DATA_SETS:
        raise unknown("data set", name, DATA_SETS)
    if classes and name != "tiny-imagenet":
        raise CalmError(f"--classes is for tiny-imagenet, not {name}")
    if name == "tiny-imagenet" and metadata_url:
        raise CalmError("--metadata_url: tiny-imagenet has its lists in the archive")
    if metadata_sha256 and not metadata_url:
        raise CalmError("--metadata_sha256 needs --metadata_url")
    available, out = list_archives([Path(path) for path in archives]), Path(out)
    for folder in (out.parent, out / "metadata", out / "dataset", *(out / "dataset").glob("*/")):
        remove_abandoned(folder)
    released = DATA_SETS[name]
    prepared = Prepared(name, out / "dataset" / released if released else out, partial=partial)
    if name == "tiny-imagenet":
        prepare_tiny_imagenet(available, out, prepared, classes)
        return prepared
    arrange = {"cub": prepare_cub, "ilsvrc": prepare_ilsvrc, "openimages30k": prepare_openimages}[name]
    arrange(available, out, prepared)
    place_metadata(released, out, available, prepared, metadata_url, metadata_sha256)
    if name == "ilsvrc":
        name_as_listed(out, prepared)
    return prepared


def _required(key: str, name: str, archives: Sequence[Path], prepared: Prepared) -> list[Path]:
    if matching := find(key, archives, prepared):
        return matching
    raise CalmError(f"no {name} in --from: get it from {PUBLISHED[key].where}")


def prepare_cub(archives: Sequence[Path], out: Path, prepared: Prepared) -> None:
    """Unpack CUB_200_2011, then segmentations and CUBV2 where they are at hand; what is in place stays."""
    final = out / "dataset" / "CUB"
    if final.exists():
        _verify_cub(final, prepared)
    else:
        archive = _required("cub", "CUB_200_2011.tgz", archives, prepared)[0]
        with staged(final) as (work, result):
            unpack(archive, work / "archive")
            base = folder_of("images.txt", work, archive, "CUB_200_2011")
            # The archive has attributes.txt beside the folder; it belongs to the table whose columns it names.
            names = base / "attributes" / "attributes.txt"
            for place in (work / "archive" / names.name, base.parent / names.name, base / names.name):
                if place.is_file() and not names.exists():
                    names.parent.mkdir(exist_ok=True)
                    place.replace(names)
            _verify_cub(base, prepared)
            base.replace(result)
    masks = final / "segmentations"
    _unpack_extra("cub-segmentations", "segmentations", masks, archives, prepared)
    if masks.is_dir():
        prepared.expect("segmentations", sum(1 for _ in masks.rglob("*.png")), CUB_IMAGES)
    _unpack_extra("cubv2", "CUBV2", out / "dataset" / "CUBV2", archives, prepared)


def _unpack_extra(key: str, folder: str, final: Path, archives: Sequence[Path], prepared: Prepared) -> None:
    """Unpack an archive that may be absent, so that its ``folder`` becomes ``final``."""
    if final.exists():
        return
    if not (matching := find(key, archives, prepared)):
        prepared.notes.append(f"no {folder}: get them from {PUBLISHED[key].where}")
        return
    with staged(final) as (work, result):
        unpack(matching[0], work / "archive")
        _unwrapped(work / "archive", folder).replace(result)


def _verify_cub(base: Path, prepared: Prepared) -> None:
    """Compare the counts with those of the official data set."""
    # Here, as they import NumPy and PyTorch, for which the help page would have to wait.
    from calm.data.cub import CUB_FILES
    from calm.data.cues import read_class_attributes, read_pairs

    where = PUBLISHED["cub"].where
    if missing := [name for name in CUB_FILES if not (base / name).is_file()]:
        raise CalmError(f"CUB: {', '.join(missing)} not in the archive: get it from {where}")
    listed = [text.partition(" ")[2].strip() for _, text in numbered_lines(base / "images.txt")]
    if absent := [name for name in listed if not (base / "images" / name).is_file()]:
        raise CalmError(f"CUB: {len(absent):,} of the images of images.txt are missing, such as {absent[0]}")
    where = f"get the whole archive from {where}"
    prepared.expect("images", len(listed), CUB_IMAGES, where)
    prepared.expect("classes", sum(1 for _ in numbered_lines(base / "classes.txt")), CUB_CLASSES, where)
    try:
        names, _ = read_class_attributes(base)
        counts = Counter(len(pair.groups) for pair in read_pairs(base, CUB_PAIRS))
    except CalmError as error:
        prepared.complain(f"no cue localization: {error}")
        return
    prepared.expect("attributes", len(names), CUB_ATTRIBUTES, where)
    for count, expected in CUB_PAIRS.items():
        prepared.expect(f"class pairs with {count} differing group(s)", counts[count], expected, where)


def prepare_ilsvrc(archives: Sequence[Path], out: Path, prepared: Prepared) -> None:
    """Make ``dataset/ILSVRC/{train,val}`` and ``dataset/ImageNetV2/val2``; each appears whole, and stays."""
    keys = {"train": "ilsvrc-train", "val": "ilsvrc-val", "val2": "imagenetv2"}
    for part, key in keys.items():
        final = out / "dataset" / ("ImageNetV2" if part == "val2" else "ILSVRC") / part
        if final.exists():
            prepared.expect(f"{part} images", _count_images(final), ILSVRC[part])
            continue
        matching = find(key, archives, prepared)
        if not matching:
            prepared.complain(f"no {part} images: get the archive from {PUBLISHED[key].where}")
            continue
        with staged(final) as (work, result):
            unpack(matching[0], work / "archive")
            for inner in sorted((work / "archive").rglob("n*.tar")):  # train: an archive a class
                unpack(inner, work / "archive" / inner.stem)
                inner.unlink()
            prepared.expect(f"{part} images", _count_images(work / "archive"), ILSVRC[part])
            _unwrapped(work / "archive", part).replace(result)


def _unwrapped(folder: Path, name: str) -> Path:
    """Return the folder inside that has the name, or that all else is in (``imagenetv2-...-format-val``)."""
    inside = list(folder.iterdir())
    if (folder / name).is_dir():
        return folder / name
    wrapped = len(inside) == 1 and inside[0].is_dir() and not any(map(_is_image, inside[0].iterdir()))
    return inside[0] if wrapped else folder


_LISTED_AND_HASHED = re.compile(r"(\d+/\d+\.jpeg),\s*(\d+/[0-9a-f]{40}\.jpeg)")


def name_as_listed(out: Path, prepared: Prepared) -> None:
    """Give ImageNetV2's images the names that the released lists have for them, ``0/0.jpeg`` to ``999/9.jpeg``.

    Today's archives call them by hashes. The published evaluator's lists come with ``val/mapping.txt``, lines of the
    name in the lists, a comma, and the name by hash. Without it this is only a note.
    """
    images = out / "dataset" / "ImageNetV2" / "val2"
    mapping = out / "metadata" / "ILSVRC" / "val" / "mapping.txt"
    hashed = f"*/{'?' * 40}.*"
    if not any(images.glob(hashed)):
        return
    if not mapping.is_file():
        fix = f"{mapping.name} of {PUBLISHED['metadata'].where} tells which is which, or --metadata_url published"
        prepared.notes.append(f"images of {images} are named by hashes, lists have 0/0.jpeg: {fix}")
        return
    for line, text in numbered_lines(mapping):
        names = _LISTED_AND_HASHED.fullmatch(text)
        if names is None:
            raise CalmError(f"{mapping}:{line}: {text!r:.200} is not 'class/number.jpeg, class/hash.jpeg'")
        if (images / names[2]).is_file():
            (images / names[2]).rename(images / names[1])
    if left := sorted(images.glob(hashed)):
        prepared.complain(f"{mapping} has no name for {len(left)} images, the first is {left[0]}")


def prepare_openimages(archives: Sequence[Path], out: Path, prepared: Prepared) -> None:
    """Make ``dataset/OpenImages/{train,val,test}``, images and masks of all archives together."""
    final, where = out / "dataset" / "OpenImages", PUBLISHED["openimages"].where
    if final.exists():
        for split, expected in OPENIMAGES.items():
            prepared.expect(f"{split} images", _count_images(final / split), expected)
        return
    matching = _required("openimages", "archive of OpenImages30k", archives, prepared)
    with staged(final) as (work, result):
        for number, path in enumerate(matching):
            unpack(path, work / str(number))
            _merge_splits(path, work / str(number), result)
        for split, expected in OPENIMAGES.items():
            prepared.expect(f"{split} images", _count_images(result / split), expected, where)


def _merge_splits(archive: Path, folder: Path, result: Path) -> None:
    """Move an archive's folders train, val and test, wherever they begin, to ``result``."""
    inside = [place for up in ("", "*/", "*/*/") for split in OPENIMAGES for place in folder.glob(up + split)]
    places = {place: place.name for place in inside if place.is_dir()}
    named = archive.name.partition(".")[0].lower()
    if not places and named in OPENIMAGES:
        places = {folder: named}
    if not places:
        raise CalmError(f"{archive} has no folder train, val or test")
    for place, split in places.items():
        merge(place, result / split)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg")


def _count_images(folder: Path) -> int:
    return sum(map(_is_image, folder.rglob("*")))


_WORDNET_ID = re.compile(r"n\d{8}")


def read_classes(text: str) -> list[str]:
    """Return WordNet ids: ``n01443537,n01629819``, or a file with one a line (such as ``classes.txt``), in order."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(map(_WORDNET_ID.fullmatch, words)) and os.path.isfile(text):  # noqa: PTH113 (Path's raises if long)
        lines = [line.split() for _, line in numbered_lines(Path(text))]
        words = [next(filter(_WORDNET_ID.fullmatch, line[:2]), " ".join(line)) for line in lines]
    for word in words:
        if not _WORDNET_ID.fullmatch(word):
            raise CalmError(f"--classes: {word!r} is no WordNet id such as n01443537, and no file of them")
    if len(set(words)) < len(words) or (text and not words):
        raise CalmError("--classes: an id is given twice, or none is given")
    return words


def prepare_tiny_imagenet(archives: Sequence[Path], out: Path, prepared: Prepared, classes: str) -> None:
    """Write ``out`` with ``images/``, ``metadata/`` and ``classes.txt``; what is in place stays."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / "classes.txt").is_file():
            raise CalmError(f"--out {out} is not empty: give a new folder")
        there = read_classes(str(out / "classes.txt"))
        if classes and there != read_classes(classes):
            raise CalmError(f"--out {out} has other classes already: give a new folder")
        prepared.expect("classes", len(there), len(there) if classes else TINY_CLASSES)
        return
    chosen = read_classes(classes)
    archive = _required("tiny-imagenet", "tiny-imagenet-200.zip", archives, prepared)[0]

    def wanted(name: str) -> bool:
        parts = name.split("/")
        return "train" not in parts or not chosen or any(wnid in parts for wnid in chosen)

    with staged(out) as (work, result):
        unpack(archive, work / "archive", wanted=wanted)
        base = folder_of("wnids.txt", work, archive, "Tiny ImageNet")
        known = [text.strip() for _, text in numbered_lines(base / "wnids.txt")]
        for wnid in chosen:
            if wnid not in known:
                raise unknown("class", wnid, known[:200], where=archive.name)
        _write_tiny_imagenet(base, result, chosen or known, prepared)


def _write_tiny_imagenet(base: Path, result: Path, classes: Sequence[str], prepared: Prepared) -> None:
    words = {row[0]: row[1] for row in _rows(base / "words.txt") if len(row) > 1}
    held_out = _rows(base / "val" / "val_annotations.txt")
    test_boxes = {row[0]: row[2:6] for row in held_out}
    rows: dict[str, list[tuple[str, int, tuple[int, int], list[str]]]] = {"train": [], "val": [], "test": []}
    for label, wnid in enumerate(classes):
        folder = base / "train" / wnid
        boxes = {row[0]: row[1:5] for row in _rows(folder / f"{wnid}_boxes.txt")}
        train = sorted((folder / "images").glob("*.JPEG"), key=_number)
        test = sorted((base / "val" / "images" / row[0] for row in held_out if row[1] == wnid), key=_number)
        parts: Any = ("train", train[:TINY_TRAIN], {}), ("val", train[TINY_TRAIN:], boxes), ("test", test, test_boxes)
        for split, paths, boxes_of in parts:
            for path in paths:
                name = f"images/{split}/{wnid}/{path.name}"
                with Image.open(path) as image:
                    size = image.size
                (result / name).parent.mkdir(parents=True, exist_ok=True)
                path.replace(result / name)
                rows[split].append((name, label, size, boxes_of.get(path.name, [])))
    prepared.counts["classes"] = len(classes)
    for split, each in (("train", TINY_TRAIN), ("val", TINY_VAL), ("test", TINY_TEST)):
        prepared.expect(f"{split} images", len(rows[split]), each * len(classes))
        lists = {
            "image_ids.txt": [name for name, *_ in rows[split]],
            "class_labels.txt": [f"{name},{label}" for name, label, *_ in rows[split]],
            "image_sizes.txt": [f"{name},{width},{height}" for name, _, (width, height), _ in rows[split]],
            "localization.txt": [f"{name},{','.join(box)}" for name, *_, box in rows[split] if box] or [""],
        }
        for file, lines in lists.items():
            (result / "metadata" / split).mkdir(parents=True, exist_ok=True)
            (result / "metadata" / split / file).write_text("".join(f"{line}\n" for line in lines))
    names = (f"{label} {wnid} {words.get(wnid, wnid).strip()}\n" for label, wnid in enumerate(classes))
    (result / "classes.txt").write_text("".join(names))


def _rows(path: Path) -> list[list[str]]:
    return [text.split("\t") for _, text in numbered_lines(path)]


def _number(path: Path) -> int:
    return int(path.stem.rpartition("_")[2])
