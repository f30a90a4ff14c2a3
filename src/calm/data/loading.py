"""Find out how a data set is laid out, and read its splits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

from calm.data.carve import carve, keep_present_classes
from calm.data.cub import CUB_FILES, CubSource
from calm.data.folder import FolderSource, count_class_folders
from calm.data.metadata import MetadataSource
from calm.data.records import SPLITS, Record, Split
from calm.data.released_roots import IMAGE_ROOTS
from calm.data.report import Report
from calm.errors import CalmError, unknown

__all__ = ["LAYOUTS", "Layout", "SplitName", "detect_layout", "find_layout", "load_split", "load_splits"]

Layout = Literal["auto", "cub", "metadata", "folder"]
SplitName = Literal["train", "val", "test"]

LAYOUTS: dict[str, str] = {
    "cub": f"{', '.join(CUB_FILES)} and images/ in the folder (official CUB_200_2011)",
    "metadata": "metadata/train/image_ids.txt, or the same below metadata/CUB, .../ILSVRC, .../OpenImages",
    "folder": "train/CLASS/*.jpg (and val/, test/), or CLASS/*.jpg",
}
"""Every layout, and what is looked for; detection tries them in this order."""


class Source(Protocol):
    """A data set on disk whose layout is known."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have files of their own."""

    def listing(self, split: str, /) -> str:
        """The files or folder that say which images a split has, for messages."""

    def read(self, split: str, /) -> Split:
        """Read one of ``splits``."""


def load_split(
    root: str | Path,
    split: SplitName,
    *,
    layout: Layout = "auto",
    metadata_root: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    present_classes_only: bool = False,
    strict: bool = True,
) -> Split:
    """Read one split of a data set.

    See :func:`load_splits` for the arguments, the result, and the errors.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    return load_splits(
        root,
        (split,),
        layout=layout,
        metadata_root=metadata_root,
        val_fraction=val_fraction,
        seed=seed,
        present_classes_only=present_classes_only,
        strict=strict,
    )[split]


def load_splits(
    root: str | Path,
    names: Iterable[str] = SPLITS,
    *,
    layout: Layout = "auto",
    metadata_root: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    present_classes_only: bool = False,
    strict: bool = True,
) -> dict[str, Split]:
    """Read splits of a data set. Images are not opened (but for the size of CUB's).

    Args:
        root: the folder of the data set.
        names: which of train, val, test.
        layout: a key of :data:`LAYOUTS`, or "auto" to find out.
        metadata_root: the folder with train/, val/, test/ of the metadata format, if it is not
            ``root/metadata``. If its last part is CUB, ILSVRC or OpenImages, images are looked for where the
            released layout has them: below ``root``, CUB/images (val: CUBV2), ILSVRC (val: ImageNetV2),
            OpenImages.
        val_fraction: share of each class that becomes val, and test, where the data set has no such split; it
            leaves train. 0 carves nothing.
        seed: which images are carved.
        present_classes_only: number only the classes that have images, in any split. By default class
            indices and names stay those of the source, so that models and class attributes of the whole
            data set fit: of a CUB sample of 5 classes the other 195 remain as classes without images.
        strict: raise if any line is wrong. Otherwise what is wrong goes to ``Split.problems``, and lines
            that yield no record are left out: for checks which report everything at once.

    Returns:
        The splits by name.

    Raises:
        CalmError: no such folder; no known layout; an essential file missing; no image in a split; with
            ``strict``, wrong lines, all of them in one report.
    """
    wanted = tuple(names)
    for name in wanted:
        if name not in SPLITS:
            raise unknown("split", name, SPLITS)
    if not 0 <= val_fraction < 0.5:
        raise CalmError(f"val_fraction is {val_fraction}: give a share of train from 0 to below 0.5")
    source = open_source(Path(root), layout, None if metadata_root is None else Path(metadata_root))
    lacking = [name for name in ("test", "val") if name not in source.splits] if val_fraction else []
    needed = set(source.splits) if present_classes_only else set(wanted)
    if lacking and needed & {"train", *lacking}:
        needed.add("train")
    read = {name: source.read(name) for name in source.splits if name in needed}
    if strict:
        Report.of(read.values()).raise_if_bad()
    read |= _carved(read["train"], lacking, val_fraction, seed) if "train" in read else {}
    if present_classes_only:
        read = keep_present_classes(read)
    for name in wanted:
        if name not in read or not read[name].records:
            Report.of(read.values()).raise_if_bad()
            own = ", ".join(source.splits) or "none"
            where = f" (listed by {source.listing(name)})" if name in source.splits else ""
            raise CalmError(
                f"{root} has no image for split {name!r}{where}; splits with files of their own: {own}"
            )
    return {name: read[name] for name in wanted}


def _carved(train: Split, lacking: list[str], fraction: float, seed: int) -> dict[str, Split]:
    """``train`` without the carved images, and each lacking split made of them."""
    parts: dict[str, Split] = {}
    rest: tuple[Record, ...] = train.records
    share = fraction
    for name in lacking:
        rest, part = carve(rest, share, seed, name)
        share = fraction / (1 - fraction)
        origin = f"{fraction:g} of train, by class, seed {seed}"
        parts[name] = replace(train, name=name, records=part, origin=origin, problems=())
    origin = f"{train.origin} without {' and '.join(parts)}" if parts else train.origin
    return {**parts, "train": replace(train, records=rest, origin=origin)}


def open_source(root: Path, layout: Layout = "auto", metadata_root: Path | None = None) -> Source:
    """The data set in ``root``, of the given layout or the one found."""
    return _OPEN[find_layout(root, layout, metadata_root)](root, metadata_root)


def find_layout(root: Path, layout: Layout = "auto", metadata_root: Path | None = None) -> Layout:
    """The layout that is meant: "auto" is looked up.

    Raises:
        CalmError: no such folder; no layout of that name, or that has no metadata folder; see `detect_layout`.
    """
    if not root.is_dir():
        raise CalmError(f"no data folder {root}" + (": it is a file" if root.exists() else ""))
    if layout == "auto":
        layout = detect_layout(root) if metadata_root is None else "metadata"
    if layout not in _OPEN:
        raise unknown("layout", layout, ["auto", *LAYOUTS])
    if metadata_root is not None and layout != "metadata":
        raise CalmError(
            f"metadata_root is given ({metadata_root}), but the layout {layout!r} has no such folder"
        )
    return layout


def detect_layout(root: Path) -> Layout:
    """The layout of the data set in ``root``.

    Raises:
        CalmError: none fits; the message lists what was looked for and what is there.
    """
    if all((root / file).is_file() for file in CUB_FILES):
        return "cub"
    if _lists_below(root / "metadata"):
        return "metadata"
    entries = sorted(root.iterdir())
    inner = [path for path in entries if (path / CUB_FILES[0]).is_file()]
    if not inner and (count_class_folders(root / "train") or count_class_folders(root) > 1):
        return "folder"
    looked = "\n".join(f"  {name}: {files}" for name, files in LAYOUTS.items())
    names = [path.name + "/" * path.is_dir() for path in entries]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    found = ", ".join(names[:12]) + more if names else "nothing"
    hint = f"\ndid you mean {inner[0]}?" if inner else ""
    raise CalmError(f"no known data layout in {root}\nlooked for\n{looked}\nfound: {found}{hint}")


def _lists_below(metadata: Path) -> list[Path]:
    """Folders with the four text files by split: ``metadata`` itself, or the released ones below it."""
    folders = (metadata, *(metadata / name for name in IMAGE_ROOTS))
    return [folder for folder in folders if MetadataSource(folder, folder).splits]


def _open_metadata(root: Path, metadata_root: Path | None) -> MetadataSource:
    place = root / "metadata" if metadata_root is None else metadata_root
    lists = _lists_below(place)
    if not lists:
        raise CalmError(
            f"no train/image_ids.txt (nor val/, test/) in {place}, nor below {', '.join(IMAGE_ROOTS)} in it"
        )
    if len(lists) > 1:
        several = ", ".join(map(str, lists))
        raise CalmError(f"metadata of several data sets: {several}; name one of them as metadata_root")
    name = lists[0].name
    return MetadataSource(root, lists[0], name if name in IMAGE_ROOTS else "")


_OPEN: dict[str, Callable[[Path, Path | None], Source]] = {
    "cub": lambda root, _: CubSource(root),
    "metadata": _open_metadata,
    "folder": lambda root, _: FolderSource(root),
}
