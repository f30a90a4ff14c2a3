"""Where the images of the three released data sets are, by split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from calm.errors import CalmError

__all__ = ["IMAGE_ROOTS", "images_root"]

IMAGE_ROOTS: dict[str, dict[str, tuple[str, ...]]] = {
    "CUB": {"train": ("CUB/images", "CUB"), "val": ("CUBV2", "CUB/CUBV2"), "test": ("CUB/images", "CUB")},
    "ILSVRC": {"train": ("ILSVRC",), "val": ("ImageNetV2", "ILSVRC"), "test": ("ILSVRC",)},
    "OpenImages": {"train": ("OpenImages",), "val": ("OpenImages",), "test": ("OpenImages",)},
}
"""Folders below the data root that ids of the released metadata are relative to: first where the released
configuration looks, then where its own download scripts put the files."""


def images_root(root: Path, name: str, split: str, ids: Sequence[str]) -> Path:
    """The folder the ids of one split are relative to.

    Args:
        root: the data root: the folder that holds ``CUB/``, ``ILSVRC/`` or ``OpenImages/``; or that folder
            itself; or directly the folder the ids are relative to.
        name: key of :data:`IMAGE_ROOTS`; empty: ``root`` itself, unconditionally.
        split: "train", "val" or "test".
        ids: the ids of the split; up to 20 of them are looked for, and the folder that has most of them wins.

    Raises:
        CalmError: none of the folders has any of those images.
    """
    if not name:
        return root
    below = IMAGE_ROOTS[name][split]
    candidates = [base / folder for base in (root, root.parent) for folder in below] + [root / "images", root]
    sample = ids[:: max(1, len(ids) // 20)][:20]
    found = [sum(_is_file(folder / image) for image in sample) for folder in candidates]
    if sample and not any(found):
        tried = "\n  ".join(map(str, dict.fromkeys(candidates)))
        raise CalmError(
            f"none of the {name} {split} images (such as {sample[0]}) was found below any of\n  {tried}"
        )
    return candidates[found.index(max(found))]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False
