"""Some classes of Tiny ImageNet in the metadata format, with its boxes.

Of each class, the first 450 training images are train, the others (50) val; the official validation images,
50 a class, are test. Boxes of val and test are the archive's own: inclusive corners from 0 in 64 x 64 images.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from calm.data.lines import numbered
from calm.data.prepare.archives import unpack
from calm.data.prepare.sources import PUBLISHED, find
from calm.data.prepare.staging import Prepared, staged
from calm.errors import CalmError, unknown

__all__ = ["prepare_tiny_imagenet", "read_classes"]

CLASSES = 200
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
        prepared.expect("classes", len(there), len(there) if classes else CLASSES)
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
