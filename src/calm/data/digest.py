"""What a run keeps of the data it was trained on: counts, and a fingerprint."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from calm.data.records import Split
from calm.errors import CalmError

__all__ = ["fingerprint", "summary"]


def fingerprint(split: Split, *, file_sizes: bool = False) -> str:
    """SHA-256 (64 hexadecimal digits) of what a split says: class names, ids, labels, boxes, masks.

    The same wherever the data lies, and in whatever order it is listed.

    Args:
        split: the images.
        file_sizes: include the number of bytes of each image file, which finds most changed files without
            reading them, and the sizes that the annotation says the images have.

    Raises:
        CalmError: with ``file_sizes``, a missing file.
    """
    digest = sha256(json.dumps([split.name, split.class_names]).encode())
    for record in sorted(split.records, key=lambda record: record.id):
        masks = [_relative(mask, split.root) for mask in record.all_masks]
        line: list[Any] = [record.id, record.label, record.boxes, masks]
        if file_sizes:
            line += [_bytes(record.path), record.size]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _relative(path: Path, root: Path) -> str:
    """``path`` below the data folder, wherever that is."""
    for base in (root, root.parent):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return path.name


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CalmError(f"cannot look at image {path}: {error.strerror}") from error


def summary(split: Split, *, file_sizes: bool = False) -> dict[str, Any]:
    """Facts about a split, ready for JSON.

    Returns:
        ``split``, ``images``, ``classes``, ``class_counts`` (by name; only classes with images),
        ``with_boxes`` and ``with_masks`` (numbers of images), ``origin`` (own files, or carved), and
        ``fingerprint``.
    """
    counts = dict(zip(split.class_names, split.class_counts(), strict=True))
    return {
        "split": split.name,
        "images": len(split.records),
        "classes": split.num_classes,
        "class_counts": {name: count for name, count in counts.items() if count},
        "with_boxes": sum(bool(record.boxes) for record in split.records),
        "with_masks": sum(bool(record.masks) for record in split.records),
        "origin": split.origin,
        "fingerprint": fingerprint(split, file_sizes=file_sizes),
    }
