"""Look at every image and annotation before training, and say everything that is wrong at once.

Whether the files that cue localization needs are there, and right.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from PIL import Image

from calm.data.loading import LAYOUTS, Layout, find_layout, load_splits, open_source
from calm.data.records import SPLITS, Problem, Record, Report, Split, box_problem
from calm.data.seeds import in_threads
from calm.errors import CalmError
from calm.images import Probe, probe

__all__ = ["check", "check_cue_files", "check_splits", "drop_bad", "load_checked"]

_FOLDERS = ("attributes", "parts")

T = TypeVar("T")


def check_cue_files(root: Path, splits: Mapping[str, Split]) -> tuple[list[Problem], str]:
    """Read the class attributes, part groups and part points of a data set, if it has any.

    Args:
        root: of the data set.
        splits: all that it has.

    Returns:
        What is wrong, and a line about what is there; neither for a data set without such files.
    """
    there = [name for name in _FOLDERS if (root / name).is_dir()]
    if not there:
        return [], ""
    if len(there) < len(_FOLDERS):
        (lacking,) = set(_FOLDERS) - set(there)
        return [], f"no cue localization: there is {there[0]}/ but no {lacking}/"
    from calm.data.cues import (
        class_pairs,
        group_votes,
        read_class_attributes,
        read_part_groups,
        read_part_points,
    )

    problems: list[Problem] = []

    def read(what: Path, reader: Callable[[], T]) -> T | None:
        try:
            return reader()
        except CalmError as error:
            problems.append(Problem("cue-file", "cues", what, str(error)))
            return None

    groups = read(root / "parts" / "groups.yaml", lambda: read_part_groups(root))
    attributes = read(root / "attributes", lambda: read_class_attributes(root))
    points = read(root / "parts" / "part_locs.txt", lambda: read_part_points(root))
    if points is not None:
        ids = [record.id for split in splits.values() for record in split.records]
        read(root / "images.txt", lambda: points.select(ids))
    if attributes is not None:
        names, present = attributes
        classes = next(iter(splits.values())).num_classes
        if len(present) != classes:
            message = f"describes {len(present)} classes, the data set has {classes}"
            problems.append(Problem("cue-file", "cues", root / "attributes", message))
    if problems or groups is None or attributes is None or points is None:
        return problems, ""
    every = class_pairs(present, group_votes(names, groups), range(1, len(groups) + 1))
    differing = Counter(len(pair.groups) for pair in every)
    pairs = ", ".join(f"{differing[count]} in {count}" for count in sorted(differing)) or "none"
    counted = f"{points.xy.shape[1]} parts in {len(groups)} groups, {len(names)} attributes"
    return [], f"cue localization: {counted}; pairs of classes by differing groups: {pairs}"


def check(
    root: str | Path,
    *,
    layout: Layout = "auto",
    metadata_root: str | Path | None = None,
    present_classes_only: bool = False,
    decode: bool = True,
    workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Check all splits that a data set has files for, and the files for cue localization where there are some.

    Args:
        root: folder of the data set.
        layout: as for ``load_splits``.
        metadata_root: as for ``load_splits``.
        present_classes_only: as for ``load_splits``.
        decode: as for :func:`check_splits`.
        workers: as for :func:`check_splits`.
        progress: as for :func:`check_splits`.

    Returns:
        The report; ``str()`` of it is for people, ``ok`` decides an exit code.

    Raises:
        CalmError: what keeps a data set from being read at all.
    """
    folder, lists = Path(root), None if metadata_root is None else Path(metadata_root)
    layout = find_layout(folder, layout, lists)
    splits = load_splits(
        root,
        open_source(folder, layout, lists).splits,
        layout=layout,
        metadata_root=metadata_root,
        val_fraction=0.0,
        present_classes_only=present_classes_only,
        strict=False,
    )
    report = check_splits(splits, decode=decode, workers=workers, progress=progress)
    wrong, cues = check_cue_files(folder, splits)
    names = next(iter(splits.values())).class_names
    first = ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
    found = (f"layout {layout}: {LAYOUTS[layout]}", f"classes: {first}", *filter(None, [cues]))
    return replace(report, problems=(*report.problems, *wrong), found=found)


def load_checked(
    root: str | Path,
    names: Iterable[str] = SPLITS,
    *,
    layout: Layout = "auto",
    metadata_root: str | Path | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    present_classes_only: bool = False,
    skip_bad: bool = False,
    decode: bool = False,
    progress: bool = False,
) -> tuple[dict[str, Split], Report]:
    """Read splits and check them: what a program does before it uses them.

    Args:
        root: and all not named here: as for ``load_splits``.
        skip_bad: go on without images that have an error. ``Report.left_out`` counts them.
        decode: as for :func:`check_splits`.
        progress: as for :func:`check_splits`.

    Returns:
        The splits without problems, and the report.

    Raises:
        CalmError: without ``skip_bad``, any error, all in one report; or no image is left.
    """
    splits = load_splits(
        root,
        names,
        layout=layout,
        metadata_root=metadata_root,
        val_fraction=val_fraction,
        seed=seed,
        present_classes_only=present_classes_only,
        strict=False,
    )
    report = check_splits(splits, decode=decode, progress=progress)
    if not skip_bad and not report.ok:
        raise CalmError(f"{report}\n`calm train --skip-bad` goes on without the images named in errors")
    return {name: drop_bad(split, report) for name, split in splits.items()}, report


def check_splits(
    splits: Mapping[str, Split] | Iterable[Split],
    *,
    decode: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> Report:
    """Check images, masks, sizes, boxes and classes, and add what the readers noted.

    Nothing is changed.

    Args:
        splits: of one data set.
        decode: decode every image. Otherwise only headers are read, and the pixels of files that look cut
            off.
        workers: threads; None is twice the processors.
        progress: show a progress bar on standard error, if that is a terminal.

    Returns:
        The report.

    Raises:
        CalmError: ``workers`` below 1.
    """
    listed = list(splits.values() if isinstance(splits, Mapping) else splits)
    found: list[Problem] = list(_in_two_splits(listed))
    total = sum(len(split.records) for split in listed)
    shown = _progress_bar(total) if progress else nullcontext(_ignore)
    look = partial(probe, decode=decode)
    with shown as advance, _bombs_ignored():
        for split in listed:
            found += _empty_classes(split)
            probes = in_threads(look, [record.path for record in split.records], workers)
            for record, result in zip(split.records, probes, strict=True):
                found += _image_problems(split, record, result)
                advance()
            masks = [(record.id, mask) for record in split.records for mask in record.all_masks]
            probes = in_threads(look, [mask for _, mask in masks], workers)
            for (name, mask), result in zip(masks, probes, strict=True):
                if result.kind:
                    message = f"{result.message}; mask of {name}"
                    found.append(Problem("missing-mask", split.name, mask, message, None, name))
    return Report.of(listed, found)


def drop_bad(split: Split, report: Report) -> Split:
    """``split`` without the images that have an error in ``report``, and without noted problems.

    Raises:
        CalmError: no image is left.
    """
    bad = report.bad_ids(split.name)
    records = tuple(record for record in split.records if record.id not in bad)
    if not records:
        raise CalmError(f"no image of split {split.name!r} is without an error\n{report}")
    return replace(split, records=records, problems=())


def _image_problems(split: Split, record: Record, result: Probe) -> Iterator[Problem]:
    name = record.id
    if result.kind:
        yield Problem(result.kind, split.name, record.path, result.message, None, name)
    if result.size is None:
        return
    if record.size is not None and record.size != result.size:
        stated, real = ("{} x {}".format(*size) for size in (record.size, result.size))
        yield Problem(
            "size-mismatch", split.name, record.path, f"is {real} pixels, stated is {stated}", None, name
        )
    if record.size is None:
        for box in record.boxes:
            problem = box_problem(
                box, result.size, split=split.name, file=record.path, line=None, record=name
            )
            if problem:
                yield problem


def _empty_classes(split: Split) -> Iterator[Problem]:
    empty = [name for name, count in zip(split.class_names, split.class_counts(), strict=True) if not count]
    if empty:
        names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        message = f"{len(empty)} of {split.num_classes} classes have no image in {split.name}: {names}"
        yield Problem("empty-class", split.name, split.root, message)


def _in_two_splits(splits: list[Split]) -> Iterator[Problem]:
    """One problem for each file that two splits share; it is to leave train rather than val or test."""
    first: dict[Path, str] = {}
    for split in sorted(splits, key=lambda split: SPLITS.index(split.name), reverse=True):
        for record in split.records:
            other = first.setdefault(record.path, split.name)
            if other != split.name:
                message = f"is in {split.name} and in {other}"
                yield Problem("two-splits", split.name, record.path, message, None, record.id)


@contextmanager
def _bombs_ignored() -> Iterator[None]:
    """No warning of Pillow about large images: they are reported as problems."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _ignore() -> None:
    """No progress shown."""


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("checking images", total=total)
        yield lambda: bar.advance(task)
