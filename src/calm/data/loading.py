"""Detect how a data set is laid out, and read its splits; docs/reading.md describes the layouts."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, TypedDict, Unpack

from calm.data.cub import CUB_FILES, CubSource
from calm.data.metadata import IMAGE_ROOTS, MetadataSource
from calm.data.records import (
    ONE_CLASS,
    SPLITS,
    Layout as Layout,
    Problem,
    Record,
    Report,
    Split,
    first_of,
    is_text,
    whole_number,
)
from calm.errors import CalmError, unknown
from calm.files import similar_folder

SplitName = Literal["train", "val", "test", "all"]

LAYOUTS: dict[str, str] = {
    "cub": f"{', '.join(CUB_FILES)} and images/ in the folder (official CUB_200_2011)",
    "metadata": "metadata/train/image_ids.txt, or the same below metadata/CUB, .../ILSVRC, .../OpenImages",
    "folder": "train/CLASS/*.jpg (and val/, test/), or CLASS/*.jpg",
}
"""Every layout, and what is looked for; detection tries them in this order."""

_EXPECTED = "".join(f"\n  {name}: {files}" for name, files in LAYOUTS.items())

SPLIT_FOLDERS = {"train": "train training", "val": "val valid validation dev", "test": "test testing"}
"""The names, in lower case, of folders that are taken for a split."""

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
"""Suffixes, in lower case, of the files of a folder that are taken for images."""


class ReadingOptions(TypedDict, total=False):
    """Keyword arguments of `load_splits`."""

    layout: Layout
    metadata_root: str | Path | None
    val_fraction: float
    seed: int
    present_classes_only: bool


def load_split(root: str | Path, split: SplitName, *, strict: bool = True, **options: Unpack[ReadingOptions]) -> Split:
    """Read one split of a data set; see `load_splits` for the options and the errors."""
    return load_splits(root, (split,), strict=strict, **options)[split]


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
        names: which of train, val, test, and "all": the images of all splits that the data set has.
        layout: a key of `LAYOUTS`, or "auto" to detect it.
        metadata_root: the folder with train/, val/, test/ of the metadata format, if it is not ``root/metadata``. If it
            is called CUB, ILSVRC or OpenImages, images are looked for where the released layout has them: below
            ``root``, CUB/images (val: CUBV2), ILSVRC (val: ImageNetV2), OpenImages.
        val_fraction: share of each class that becomes val, and test, where the data set has no such split; it leaves
            train. 0 carves nothing.
        seed: which images are carved.
        present_classes_only: number only the classes that have images, in any split. By default class indices and names
            stay those of the source, so that models and class attributes of the whole data set fit: of a CUB sample of
            5 classes the other 195 remain as classes without images.
        strict: raise if any line is wrong. Otherwise what is wrong goes to ``Split.problems``, and lines that yield no
            record are left out: for checks which report everything at once.

    Returns:
        The splits by name.

    Raises:
        CalmError: no such folder; no known layout; an essential file missing; no image in a split; with ``strict``,
            wrong lines, all of them in one report.
    """
    source = open_source(root, layout, metadata_root)
    return read_splits(source, names, val_fraction, seed, present_classes_only, strict)


def read_splits(
    source: Source, names: Iterable[str], val_fraction: float, seed: int, present_classes_only: bool, strict: bool
) -> dict[str, Split]:
    """Read splits of an open data set; see `load_splits` for the arguments and the errors."""
    wanted = tuple(names)
    for name in wanted:
        if name not in (*SPLITS, "all"):
            raise unknown("split", name, [*SPLITS, "all"])
    if not 0 <= val_fraction < 0.5:
        raise CalmError(f"val_fraction is {val_fraction}: give a share of train from 0 to below 0.5")
    lacking = [name for name in ("test", "val") if name not in source.splits] if val_fraction else []
    needed = set(source.splits if present_classes_only or "all" in wanted else wanted)
    if lacking and needed & {"train", *lacking}:
        needed.add("train")
    splits = {name: source.read(name) for name in source.splits if name in needed}
    if strict:
        Report.of(splits.values()).raise_if_bad()
    if "all" in wanted:
        everything = {record.id: record for split in splits.values() for record in split.records}
        problems = tuple(problem for split in splits.values() for problem in split.problems)
        first = replace(next(iter(splits.values())), name="all", root=source.root)
        splits["all"] = replace(first, records=tuple(everything.values()), problems=problems)
    if "train" in splits:
        splits |= _with_carved(splits["train"], lacking, val_fraction, seed)
    if present_classes_only:
        splits = _present_classes(splits)
    for name in wanted:
        if name not in splits or not splits[name].records:
            Report.of(splits.values()).raise_if_bad()
            own = ", ".join(source.splits) or "none"
            where = f" (listed by {source.listing.replace('SPLIT', name)})" if name in source.splits else ""
            message = f"{source.root} has no image for split {name!r}{where}; splits with files of their own: {own}"
            raise CalmError(message)
    return {name: splits[name] for name in wanted}


def _with_carved(train: Split, lacking: list[str], fraction: float, seed: int) -> dict[str, Split]:
    """Return ``train`` without the carved images, and each lacking split made of them."""
    parts: dict[str, Split] = {}
    rest, share = train.records, fraction
    for name in lacking:
        rest, part = carve(rest, share, seed, name)
        share = fraction / (1 - fraction)
        origin = f"{fraction:g} of train, by class, seed {seed}"
        parts[name] = replace(train, name=name, records=part, origin=origin, problems=())
    origin = f"{train.origin} without {' and '.join(parts)}" if parts else train.origin
    return {**parts, "train": replace(train, records=rest, origin=origin)}


def carve(
    records: Sequence[Record], fraction: float, seed: int, salt: str
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Split ``records`` in two, class by class, by ids and seed alone.

    Of each class the images with the smallest hash of (seed, salt, id) are carved: round(fraction * n), but at least
    one where the class has two images or more, and never the last. The result is the same on every machine, in
    whatever order the records come: (the rest, the carved part), each in the order of ``records``.
    """
    by_class: dict[int, list[tuple[bytes, str]]] = defaultdict(list)
    for record in records:
        by_class[record.label].append((sha256(f"{seed}:{salt}:{record.id}".encode()).digest(), record.id))
    carved: set[str] = set()
    for members in by_class.values():
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        carved.update(name for _, name in sorted(members)[:count])
    rest = tuple(record for record in records if record.id not in carved)
    return rest, tuple(record for record in records if record.id in carved)


def _present_classes(splits: Mapping[str, Split]) -> dict[str, Split]:
    """Keep only the classes that occur in any of the splits, numbered anew in their order."""
    present = sorted({record.label for split in splits.values() for record in split.records})
    new = {old: index for index, old in enumerate(present)}
    return {
        name: replace(
            split,
            records=tuple(replace(record, label=new[record.label]) for record in split.records),
            class_names=tuple(split.class_names[old] for old in present),
        )
        for name, split in splits.items()
    }


def fingerprint(split: Split, *, file_sizes: bool = False) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of a split's class names, ids, labels, boxes and masks.

    It is the same wherever the data are, and in whatever order they are listed.

    Args:
        split: the images.
        file_sizes: include the number of bytes of each image file, which finds most changed files without reading them,
            and the sizes that the annotation says the images have.

    Raises:
        CalmError: with ``file_sizes``, a missing file.
    """
    digest = sha256(json.dumps([split.name, split.class_names]).encode())
    for record in sorted(split.records, key=lambda record: record.id):
        masks = [Path(os.path.relpath(mask, split.root)).as_posix() for mask in record.all_masks]
        line: list[Any] = [record.id, record.label, record.boxes, masks]
        if file_sizes:
            try:
                line += [record.path.stat().st_size, record.size]
            except OSError as error:
                raise CalmError(f"cannot look at image {record.path}: {error.strerror}") from error
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def match_classes(model_names: Sequence[str], data_names: Sequence[str], *, model: str, data: str) -> tuple[int, ...]:
    """Return the model's class index of each class of the data: classes are the same if their names are.

    Where one side's names are nothing but the numbers 0 .. C-1 (data without a file of names, a model that was made
    without names), and the other side has as many classes, they are matched by number, with a warning.

    Args:
        model_names: names of the model's classes.
        data_names: names of the data's classes, all of which the model must know; it may know more.
        model: what to call the model in messages.
        data: what to call the data in messages.

    Raises:
        CalmError: the model lacks a class of the data, or has two of its name; the message tells whose names are which.

    >>> match_classes(["a", "b", "c"], ["c", "a"], model="runs/abc", data="photos")
    (2, 0)
    """
    number_of = {name: number for number, name in enumerate(model_names)}
    times = Counter(model_names)
    wrong = [name for name in data_names if times[name] != 1]
    if not wrong:
        return tuple(number_of[name] for name in data_names)
    numbers = tuple(map(str, range(len(data_names))))
    if len(model_names) == len(data_names) and numbers in (tuple(model_names), tuple(data_names)):
        unnamed, named = (model, data) if numbers == tuple(model_names) else (data, model)
        warnings.warn(f"{unnamed} has no names for its classes: they are those of {named} by number", stacklevel=2)
        return tuple(range(len(numbers)))
    known = set(data_names)
    spare = [name for name in model_names if name not in known]
    hint = " in upper and lower case" if {*map(str.lower, wrong)} <= {*map(str.lower, spare)} else ""
    raise CalmError(
        f"{model} knows {len(model_names):,} classes, {data} has {len(data_names):,}, and their names differ{hint}\n"
        f"  only in {data}: {first_of(wrong)}\n  only in {model}: {first_of(spare)}\n"
        "give the classes the same names: in classes.txt, the names of class folders, or the model's calm.json"
    )


def summary(split: Split, *, file_sizes: bool = False) -> dict[str, Any]:
    """Return facts about a split, ready for JSON: its name, numbers of images (``class_counts``: of each class that has
    any), ``origin`` (own files, or carved) and `fingerprint`."""
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


@dataclass(frozen=True)
class FolderSource:
    """A folder for each class, with or without a folder for each split above."""

    root: Path
    layout: ClassVar[Layout] = "folder"
    listing: ClassVar[str] = "its folder"

    @cached_property
    def folders(self) -> dict[str, Path]:
        """The folder of each split; none if the class folders are directly below the root.

        Raises:
            CalmError: a split has two folders.
        """
        found: dict[str, Path] = {}
        for folder in _folders(self.root):
            for split, names in SPLIT_FOLDERS.items():
                if folder.name.lower() in names.split() and found.setdefault(split, folder) != folder:
                    raise CalmError(f"{found[split]} and {folder} are both the split {split!r}: rename or remove one")
        # A folder called train may also be a class: then it has images, and no folders of classes.
        divided = any(any(_with_images(folder)) for folder in found.values())
        return {split: found[split] for split in SPLITS if split in found} if divided else {}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that have a folder; just "train" if the class folders are directly below the root."""
        return tuple(self.folders) or ("train",)

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of train's class folders, two or more (of all splits' without a train), sorted; numbers by value."""
        base = self.folders.get("train", self.root)
        bases = [base] if "train" in self.splits else self.folders.values()
        names = sorted({folder.name for base in bases for folder in _folders(base)})
        if len(names) < 2 and "train" in self.splits:
            raise CalmError(f"{base}: a classifier needs two class folders or more, found {first_of(names)}")
        return tuple(sorted(names, key=int) if None not in map(whole_number, names) else names)

    def read(self, split: str) -> Split:
        """Read one of :attr:`splits`; it must have no class that train lacks, and all names must be UTF-8 text."""
        index = {name: label for label, name in enumerate(self.class_names)}
        base = self.folders.get(split, self.root)
        records: list[Record] = []
        others: Counter[str] = Counter()
        for folder in _folders(base):
            if folder.name not in index:
                raise unknown("class folder", folder.name, self.class_names, where=f"{base}; train has no such class")
            for path in sorted(files_below(folder)):
                if is_image(path, folder):
                    name = _as_text(path).relative_to(self.root).as_posix()
                    records.append(Record(name, path, index[folder.name]))
                elif path.name not in _IGNORED:
                    ending = path.suffix.lower()
                    others[f"hidden {ending}" if ending in SUFFIXES else ending or "without an ending"] += 1
        listed = first_of([f"{count:,} {ending}" for ending, count in others.most_common()], 8)
        problems = (Problem("not-read", split, base, listed),) if others else ()
        return Split(split, tuple(records), self.class_names, base, exif=True, problems=problems)


Source: TypeAlias = CubSource | MetadataSource | FolderSource
"""A data set on disk whose layout is known."""

_IGNORED = {".DS_Store", "Thumbs.db", "desktop.ini"}  # what file managers leave in folders


def _folders(base: Path) -> list[Path]:
    """Return the folders directly below ``base`` that may be those of a split or class, sorted."""
    folders = (path for path in base.iterdir() if path.is_dir() and not _is_hidden(path.name))
    return sorted(map(_as_text, folders))


def _as_text(path: Path) -> Path:
    """Return a path whose name is UTF-8 text, as it must be because every result holds it."""
    if not is_text(str(path)):
        raise CalmError(f"the name of {str(path)!r} is not UTF-8 text: rename it")
    return path


def files_below(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, those of linked folders too: each folder once, and none that contains it."""
    seen = set(folder.resolve().parents)
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        if (real := place.resolve()) in seen:
            continue
        seen.add(real)
        with os.scandir(place) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            path = Path(entry.path)
            if path.is_dir() if entry.is_symlink() else entry.is_dir():
                waiting.append(path)
            else:
                yield path


def _is_hidden(folder: str) -> bool:
    """Return whether programs make a folder of such a name for themselves: thumbnails, caches, what archives leave."""
    return folder.startswith((".", "__")) or folder == "@eaDir"


def is_image(path: Path, folder: Path) -> bool:
    """Return whether the name says that a file below ``folder`` is an image, or a broken link to one."""
    *above, name = path.relative_to(folder).parts
    named = path.suffix.lower() in SUFFIXES and not name.startswith(".") and not any(map(_is_hidden, above))
    return named and (path.is_file() or not path.exists())


def _with_images(base: Path) -> Iterator[bool]:
    """Yield True for each folder directly below ``base`` that has an image in it or below."""
    return (True for folder in _folders(base) if any(is_image(path, folder) for path in files_below(folder)))


def open_source(root: str | Path, layout: Layout = "auto", metadata_root: str | Path | None = None) -> Source:
    """Return the data set in ``root``, of the given layout or, for "auto", the one detected."""
    root = Path(root)
    if not root.is_dir():
        why = ": it is a file" if root.exists() else similar_folder(root)
        raise CalmError(f"no data folder {root}{why}; give one of a layout that calm reads{_EXPECTED}")
    if layout == "auto":
        layout = detect_layout(root) if metadata_root is None else "metadata"
    if layout not in LAYOUTS:
        raise unknown("layout", layout, ["auto", *LAYOUTS])
    if layout == "metadata":
        return _open_metadata(root, root / "metadata" if metadata_root is None else Path(metadata_root))
    if metadata_root is not None:
        raise CalmError(f"metadata_root is given ({metadata_root}), but the layout {layout!r} has no such folder")
    return CubSource(root) if layout == "cub" else FolderSource(root)


def has_splits(root: str | Path, layout: Layout = "auto", metadata_root: str | Path | None = None) -> bool:
    """Return whether a data set has splits: all do but a folder with nothing but class folders."""
    source = open_source(root, layout, metadata_root)
    return not isinstance(source, FolderSource) or bool(source.folders)


def detect_layout(root: Path) -> Layout:
    """Return the layout of the data set in ``root``.

    Raises:
        CalmError: none fits; the message lists what was looked for and what is there.
    """
    if all((root / file).is_file() for file in CUB_FILES):
        return "cub"
    if _lists_below(root / "metadata"):
        return "metadata"
    entries = sorted(root.iterdir())
    inner = [path for path in entries if (path / CUB_FILES[0]).is_file()]
    if not inner and (FolderSource(root).folders or len(list(islice(_with_images(root), 2))) > 1):
        return "folder"
    names = [path.name + "/" * path.is_dir() for path in entries]
    endings = Counter(path.suffix.lower() or "none" for path in islice(files_below(root), 1000)).most_common(5)
    below = f"\nendings of files: {', '.join(f'{ending} ({count:,})' for ending, count in endings)}" if endings else ""
    if endings and not SUFFIXES & dict(endings).keys():
        below += f"; read are {' '.join(sorted(SUFFIXES))}: turn other pictures into JPEG or PNG"
    hint = f"\ndid you mean {inner[0]}?" if inner else ""
    if not hint and (lists := [path.name for path in entries if _ANNOTATIONS.fullmatch(path.name)]):
        hint = f"\n{', '.join(lists)}: such annotations (COCO, Pascal VOC, tables) are not read, and where they give an"
        hint += f" image several labels, training is not for it: {ONE_CLASS}. Sort the images into class folders"
    raise CalmError(f"no known data layout in {root}\nlooked for{_EXPECTED}\nfound: {first_of(names, 12)}{below}{hint}")


_ANNOTATIONS = re.compile(r"(?i)annotations?|instances.*\.json|.*\.csv|.*coco.*\.json|labels?(\.txt)?")


def _lists_below(metadata: Path) -> list[Path]:
    """Return the folders with lists by split: ``metadata`` itself, or the released ones below it."""
    folders = (metadata / name for name in ("", *IMAGE_ROOTS))
    return [folder for folder in folders if MetadataSource(folder, folder).splits]


def _open_metadata(root: Path, metadata_root: Path) -> MetadataSource:
    lists = _lists_below(metadata_root)
    if not lists:
        below = ", ".join(IMAGE_ROOTS)
        raise CalmError(f"no train/image_ids.txt (nor val/, test/) in {metadata_root}, nor below {below} in it")
    if len(lists) > 1:
        several = ", ".join(map(str, lists))
        raise CalmError(f"metadata of several data sets: {several}; name one of them as metadata_root")
    return MetadataSource(root, lists[0], lists[0].name if lists[0].name in IMAGE_ROOTS else "")
