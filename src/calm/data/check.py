"""Check every image and annotation of a data set, and report everything that is wrong at once."""

from __future__ import annotations

import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeVar, Unpack

from PIL import Image

from calm.data.loading import LAYOUTS, FolderSource, ReadingOptions, Source, load_splits, open_source, read_splits
from calm.data.records import (
    ONE_CLASS,
    SPLITS,
    Layout,
    Problem,
    ProblemLog,
    Record,
    Report,
    Split,
    first_of,
    whole_number,
)
from calm.errors import CalmError
from calm.files import in_threads, open_regular
from calm.images import Probe, highest_value, mask_problem, probe

T = TypeVar("T")


def check(
    root: str | Path,
    *,
    layout: Layout = "auto",
    metadata_root: str | Path | None = None,
    present_classes_only: bool = False,
    decode: bool = True,
    channels: int = 3,
    bits: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Check all splits that a data set has files for, and its files for cue localization, if there are any.

    Args:
        root: folder of the data set.
        layout: how the folder is laid out: cub (official CUB_200_2011), metadata (lists of the released code), folder
            (a folder per class), or auto to look.
        metadata_root: folder of the metadata lists, where they are not beside the images.
        present_classes_only: number only the classes that have images.
        decode: decode every image; false reads headers only, and is faster.
        channels: channels of the images that a model is to see; other numbers than 1 and 3 are bands of TIFF files.
        bits: bits that the values of files of more than 8 bits use, where that is less than the files say.
        workers: number of threads; by default two per processor.
        progress: as for `check_splits`.

    Returns:
        The report; ``str()`` of it is for people, ``ok`` decides an exit code.

    Raises:
        CalmError: the data set cannot be read at all.
    """
    source = open_source(root, layout, metadata_root)
    splits = read_splits(source, source.splits, 0.0, 0, present_classes_only, strict=False)
    report = check_splits(splits, decode=decode, channels=channels, bits=bits, workers=workers, progress=progress)
    problems, cues = check_cue_files(Path(root), splits)
    description = (*_described(source, splits), *filter(None, [cues]))
    return replace(report, problems=(*report.problems, *problems), description=description)


def _described(source: Source, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Return lines about what a data set was taken for."""
    names = next(iter(splits.values())).class_names
    lines, classes = [f"layout {source.layout}: {LAYOUTS[source.layout]}"], f"classes: {first_of(names, 3)}"
    if isinstance(source, FolderSource):
        folders = ", ".join(f"{folder.name}/ is {split}" for split, folder in source.folders.items())
        lines.append(f"splits: {folders or 'no folders of splits, so all images are train'}")
        classes += ", in the order of their numbers" if None not in map(whole_number, names) else ""
    return (*lines, classes)


def load_checked(
    root: str | Path,
    names: Iterable[str] = SPLITS,
    *,
    skip_bad: bool = False,
    decode: bool = False,
    channels: int = 3,
    bits: int | None = None,
    progress: bool = False,
    **options: Unpack[ReadingOptions],
) -> tuple[dict[str, Split], Report]:
    """Read splits and check them, as a program does before it uses them.

    Args:
        root: as for `load_splits`; so are ``names`` and ``options``.
        skip_bad: leave out images that have an error. ``Report.left_out`` counts them.
        decode: as for `check_splits`; so are ``channels``, ``bits`` and ``progress``.

    Returns:
        The splits without problems, and the report.

    Raises:
        CalmError: without ``skip_bad``, any error, all in one report; no image is left; or many of a folder's images
            are in several classes.
    """
    splits = load_splits(root, names, strict=False, **options)
    report = check_splits(splits, decode=decode, channels=channels, bits=bits, progress=progress)
    source = open_source(root, options.get("layout", "auto"), options.get("metadata_root"))
    report = replace(report, description=_described(source, splits))
    if not skip_bad and not report.ok:
        raise CalmError(f"{report}\n`calm train --skip-bad` goes on without the images named in errors")
    for split in splits.values():
        _refuse_several_labels(split, report)
    return {name: drop_bad(split, report) for name, split in splits.items()}, report


def check_splits(
    splits: Mapping[str, Split] | Iterable[Split],
    *,
    decode: bool = False,
    channels: int = 3,
    bits: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Check images, masks, sizes, boxes and classes, and add what the readers noted. Nothing is changed.

    Args:
        splits: of one data set.
        decode: decode every image. Otherwise only headers are read, and the pixels of files that look truncated.
        channels: as for `calm.images.read_image`; so is ``bits``.
        workers: number of threads; None is twice the number of processors.
        progress: show a progress bar on standard error, if that is a terminal.

    Raises:
        CalmError: ``workers`` below 1.
    """
    from rich.console import Console  # here, so that a help page need not wait for it
    from rich.progress import Progress

    listed = list(splits.values() if isinstance(splits, Mapping) else splits)
    problems = _shared_files(listed, workers) if len(listed) > 1 else []
    problems += [problem for split in listed if split.exif for problem in _several_classes(split, workers)]
    look = partial(probe, decode=decode, channels=channels)
    total = sum(len(split.records) for split in listed)
    # Pillow's warning about large images is ignored: they are reported as problems.
    quiet = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar, quiet:
        task = bar.add_task("checking images", total=total)
        for split in listed:
            log = ProblemLog(split.name)
            classes = zip(split.class_names, split.class_counts(), strict=True)
            if empty := [name for name, count in classes if not count]:
                counts = f"{len(empty)} of {split.num_classes} classes have no image in {split.name}"
                log.add("empty-class", split.root, f"{counts}: {first_of(empty)}")
            probes = in_threads(look, [record.path for record in split.records], workers)
            found = dict[str, Probe]()
            for record, result in zip(split.records, probes, strict=True):
                _check_image(record, result, log)
                found[record.id] = result
                bar.advance(task)
            if bits is None:
                deep = {record.path: found[record.id].bits for record in split.records if found[record.id].bits > 8}
                _check_depth(deep, channels, log)
            masks = [(record.id, mask) for record in split.records for mask in record.all_masks]
            probes = in_threads(partial(probe, decode=decode, channels=None), [mask for _, mask in masks], workers)
            for (name, mask), result in zip(masks, probes, strict=True):
                wrong = result.message or mask_problem(result.size, found[name].size)
                if wrong:
                    log.add("missing-mask", mask, f"{wrong}; mask of {name}", record=name)
            problems += log.problems
    return Report.of(listed, problems)


def drop_bad(split: Split, report: Report) -> Split:
    """Return ``split`` without the images that have an error in ``report``, and without noted problems.

    Raises:
        CalmError: no image is left.
    """
    bad = report.bad_ids(split.name)
    records = tuple(record for record in split.records if record.id not in bad)
    if not records:
        raise CalmError(f"no image of split {split.name!r} is without an error\n{report}")
    return replace(split, records=records, problems=())


def _check_image(record: Record, result: Probe, log: ProblemLog) -> None:
    if result.kind:
        log.add(result.kind, record.path, result.message, record=record.id)
    if result.size is None:
        return
    if record.size is None:
        for box in record.boxes:
            log.check_box(box, result.size, record.path, None, record.id)
    elif record.size != result.size:
        stated, actual = ("{} x {}".format(*size) for size in (record.size, result.size))
        log.add("size-mismatch", record.path, f"is {actual} pixels, stated is {stated}", record=record.id)


DEEP_SAMPLES = 16
"""How many images of more than 8 bits are searched for their highest value, in each split."""


def _check_depth(depths: Mapping[Path, int], channels: int, log: ProblemLog) -> None:
    """Add a problem if the values of images use far fewer bits than their files have (by path), or more."""
    sample, highest = list(depths)[:: len(depths) // DEEP_SAMPLES + 1], 0
    for path in sample:
        with suppress(CalmError):  # reported already
            highest = max(highest, highest_value(path, channels))
    needed = max(8, highest.bit_length())
    if sample and not depths[sample[0]] - 2 < needed <= depths[sample[0]]:
        seen = f"{len(depths)} images of more than 8 bits; the highest value of {len(sample)} is {highest:,}"
        log.add("other-depth", sample[0], f"{seen}: read them by --reading.bits {needed}")


def _same_content(images: Iterable[tuple[T, Record]], workers: int | None) -> list[list[tuple[T, Record]]]:
    """Return the groups of images of the same content that come with two marks or more, such as the names of splits."""
    keyed: list[tuple[tuple[object, ...], T, Record]] = [((), mark, record) for mark, record in images]
    groups: dict[tuple[object, ...], list[tuple[T, Record]]] = {}
    for most in (0, 4096, 2**40):  # whole files are read only where two have the same length and end
        groups = defaultdict(list)
        look, paths = partial(_content, most=most), [record.path for *_, record in keyed]
        contents = in_threads(look, paths, workers) if most else map(look, paths)
        for (key, mark, record), content in zip(keyed, contents, strict=True):
            groups[*key, content].append((mark, record))
        groups = {key: members for key, members in groups.items() if len({mark for mark, _ in members}) > 1}
        keyed = [(key, mark, record) for key, members in groups.items() for mark, record in members]
    return list(groups.values())


def _shared_files(splits: Iterable[Split], workers: int | None) -> list[Problem]:
    """Return a problem for each image that is in two splits; it should leave train, not val or test."""
    problems = []
    for members in _same_content(((split.name, record) for split in splits for record in split.records), workers):
        members.sort(key=lambda member: SPLITS.index(member[0]), reverse=True)
        kept, copy = members[0]
        first: dict[str, tuple[str, Record]] = {}
        for name, record in members:
            other, same = first.setdefault(os.path.realpath(record.path), (name, record))
            if other != name:
                alias = "" if same.path == record.path else f" as {same.path}"
                message = f"is in {name} and in {other}{alias}"
                problems.append(Problem("two-splits", name, record.path, message, record=record.id))
            elif name != kept:
                message = f"is in {name}, and the same content in {kept} as {copy.path}"
                problems.append(Problem("copy", name, record.path, message, record=record.id))
    return sorted(problems, key=lambda problem: (problem.split, problem.record))


def _several_classes(split: Split, workers: int | None) -> list[Problem]:
    """Return a problem for each image of a folder that is in the folder of a second class, too."""
    problems = []
    for (_, first), *others in _same_content(((record.label, record) for record in split.records), workers):
        for _, record in others:
            message = f"the same content as {first.path}"
            problems.append(Problem("two-classes", split.name, record.path, message, record=record.id))
    return problems


MOST_SEVERAL = 20, 0.05
"""Images of a split that may lie in several classes, as a number and as a share; beyond both the data have several
labels."""


def _refuse_several_labels(split: Split, report: Report) -> None:
    found = [problem for problem in report.problems if (problem.kind, problem.split) == ("two-classes", split.name)]
    most, share = MOST_SEVERAL
    if len(found) > max(most, share * len(split.records)):
        raise CalmError(
            f"{len(found)} of {len(split.records)} images of {split.root} lie in the folders of several classes, such "
            f"as {found[0].file} ({found[0].message}). Pictures of several labels cannot be trained, as {ONE_CLASS}: "
            "keep each in the folder of its main class, or make a folder of each combination"
        )


def _content(path: Path, most: int) -> object:
    """Return a file's length, or a digest of at most its last bytes; its path if it is empty or cannot be read."""
    try:
        length = path.stat().st_size
        if not (length and most):
            return length or path
        with open_regular(path) as file:
            file.seek(max(0, length - most))
            return sha256(file.read()).digest()
    except (CalmError, OSError):
        return path


def check_cue_files(root: Path, splits: Mapping[str, Split]) -> tuple[list[Problem], str]:
    """Return the problems of a data set's attributes and parts, and a line about them, if it has any."""
    there = [name for name in ("attributes", "parts") if (root / name).is_dir()]
    if len(there) < 2:
        lacking = "parts" if "attributes" in there else "attributes"
        return [], f"no cue localization: there is {there[0]}/ but no {lacking}/" if there else ""
    from calm.data import cues

    log = ProblemLog("cues")

    def read(file: Path, reader: Callable[[Path], T]) -> T | None:
        try:
            return reader(root)
        except CalmError as error:
            log.add("cue-file", file, str(error))
            return None

    groups = read(root / "parts" / "groups.yaml", cues.read_part_groups)
    attributes = read(root / "attributes", cues.read_class_attributes)
    points = read(root / "parts" / "part_locs.txt", cues.read_part_points)
    if points is not None:
        ids = [record.id for split in splits.values() for record in split.records]
        read(root / "images.txt", lambda _: points.select(ids))
    classes = next(iter(splits.values())).num_classes
    if attributes is not None and len(attributes[1]) != classes:
        log.add("cue-file", root / "attributes", f"describes {len(attributes[1])} classes, the data set has {classes}")
    if log.problems or groups is None or attributes is None or points is None:
        return log.problems, ""
    every = cues.read_pairs(root, range(1, len(groups) + 1), groups)
    differing = Counter(len(pair.groups) for pair in every)
    pairs = ", ".join(f"{differing[count]} in {count}" for count in sorted(differing)) or "none"
    counted = f"{points.xy.shape[1]} parts in {len(groups)} groups, {len(attributes[0])} attributes"
    return [], f"cue localization: {counted}; pairs of classes by differing groups: {pairs}"
