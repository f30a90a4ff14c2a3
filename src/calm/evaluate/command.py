"""``calm evaluate``: from its flags to tables with intervals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from calm.baselines import BASELINES, canonical_method
from calm.data.records import SPLITS, Split
from calm.errors import CalmError
from calm.evaluate.cue_localization import read_cue_data
from calm.evaluate.reading import first, own_gpu, size, together
from calm.evaluate.registry import BENCHMARKS, benchmark
from calm.evaluate.result import Result
from calm.evaluate.runner import Data, place, run, run_split
from calm.evaluate.subject import MapFolder, Subject, model_subject, open_map_folder
from calm.evaluate.tables import print_tables, write_tables
from calm.files import working_folder
from calm.inference import resolve_device
from calm.metrics.erasing import check_fractions
from calm.metrics.pixels import Thresholds
from calm.model import CalmModel, load
from calm.output import MAP_KINDS

__all__ = ["evaluate"]


_COMMON = ("replicates", "seed")
"""Options that every benchmark reads."""


def evaluate(asked: argparse.Namespace) -> list[Result]:
    """Run ``calm evaluate`` as its flags ask (`calm.cli.evaluate`).

    In several processes (`calm.evaluate.reading`) each does its share, and the first writes and prints.

    Returns:
        The results, in the order of the table.

    Raises:
        CalmError: anything wrong with a flag, a model or the data: before work starts, where it can be known.
    """
    with together():
        return _evaluate(asked)


def _evaluate(asked: argparse.Namespace) -> list[Result]:
    everything = asked.benchmark == "all"
    names = [name for name, row in BENCHMARKS.items() if row.in_all] if everything else [asked.benchmark]
    for name in names:
        benchmark(name)
    _check(asked, names)
    options = _options(asked, names)
    split, reading = run_split(
        asked.data, asked.split, asked.model, layout=asked.layout, metadata_root=asked.metadata_root
    )
    names = _possible(names, split, asked.data, everything=everything)
    subjects = _told_apart([*_subjects(asked, split), *_folders(asked, split)])
    out = asked.out or _default_out(asked.model)
    if out.exists() and not out.is_dir():
        raise CalmError(f"--out {out} is a file: name a folder")
    if first():
        with working_folder(out / "table"):
            pass  # where nothing can be written, say so now and not after the work
    data = Data.of(split, asked.data, asked.layout, asked.metadata_root, reading)
    results = []
    with _bars(Console(stderr=True, quiet=not first())) as bars:
        for name in names:
            chosen = {
                key: value for key, value in options.items() if key in _COMMON + BENCHMARKS[name].options
            }
            for subject in _asked_of(name, subjects):
                stored = place(name, subject, data, out, chosen).is_file()
                task = bars.add_task(
                    f"{name}: {subject.label}{' (stored)' * stored}", total=len(split.records)
                )

                def advance(count: int, task: Any = task) -> None:
                    bars.advance(task, count)

                results.append(
                    run(
                        name,
                        subject,
                        data,
                        out,
                        batch_size=asked.batch_size,
                        workers=asked.workers,
                        progress=advance,
                        **chosen,
                    )
                )
                bars.update(task, completed=len(split.records))
    if first():
        write_tables(results, out)
        console = Console()
        print_tables(results, console)
        console.print(f"{out / 'table.md'} (and .csv, .json)", highlight=False, soft_wrap=True)
    return results


def _check(asked: argparse.Namespace, names: Sequence[str]) -> None:
    if not asked.model and not asked.maps:
        raise CalmError("nothing to evaluate: give --model or, for localization, --maps")
    if asked.maps and asked.benchmark != "localization":
        raise CalmError(f"--maps can be scored by localization only, not by {asked.benchmark}")
    for name in ("method", "norm"):
        if getattr(asked, name) is not None and not asked.model:
            raise CalmError(
                f"--{name} is about models, and maps are taken as they are: leave it out, or give --model"
            )
    if not asked.model and (asked.workers or asked.device != "auto"):
        raise CalmError("--workers and --device are about models: leave them out, or give --model")
    for flag in ("norm", "thresholds"):
        if getattr(asked, flag) is not None and not any(flag in BENCHMARKS[name].reads for name in names):
            raise CalmError(f"{asked.benchmark} does not read --{flag}: leave it out")
    if asked.method and all(BENCHMARKS[name].per_model for name in names):
        raise CalmError(f"{asked.benchmark} is about models, not about their maps: leave out --method")
    if asked.split not in SPLITS:
        raise CalmError(f"--split {asked.split}: choose one of {', '.join(SPLITS)}")
    least = {"batch_size": 1, "workers": 0, "replicates": 0, "seed": 0}
    least |= dict.fromkeys(("steps", "samples", "points", "images"), 1)
    for name, low in least.items():
        value = getattr(asked, name)
        if value is not None and value < low:
            raise CalmError(f"--{name} {value}: give at least {low}")


def _options(asked: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What is asked of the benchmarks; a flag that none of them reads is refused."""
    options = {name: getattr(asked, name) for name in _COMMON}
    for name in dict.fromkeys(option for row in BENCHMARKS.values() for option in row.options):
        value = getattr(asked, name)
        if value is None:
            continue
        if not any(name in BENCHMARKS[one].options for one in names):
            raise CalmError(f"{asked.benchmark} does not read --{name}: leave it out")
        options[name] = check_fractions(value) if name == "fractions" else value
    return options


def _possible(names: list[str], split: Split, root: Path, *, everything: bool) -> list[str]:
    """The benchmarks that the data set has annotation for; what is left out is told, and asked by name an error."""
    found = []
    for name in names:
        try:
            if name == "cue-localization":
                read_cue_data(split, root)
            if name == "localization" and not any(record.boxes or record.masks for record in split.records):
                raise CalmError(f"split {split.name!r} of {root} has neither boxes nor masks")
        except CalmError as error:
            if not everything:
                raise
            if first():
                print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        found.append(name)
    return found


def _subjects(asked: argparse.Namespace, split: Split) -> list[Subject]:
    """Every model with every method that it has."""
    methods = [canonical_method(method) for method in asked.method or ()]
    unread = _unread(asked, methods)
    if unread:
        raise CalmError(f"no --method reads --{unread}: leave it out")
    device = _device(asked.device)
    subjects: list[Subject] = []
    used: set[str] = set()
    for source in dict.fromkeys(asked.model):
        model = load(source, map_location="cpu").to(device).eval()
        if model.config.num_classes != split.num_classes:
            raise CalmError(
                f"{source} knows {model.config.num_classes} classes, {asked.data} has {split.num_classes}"
            )
        for method in methods or [model.map_kind()]:
            if _has(model, method):
                used.add(method)
                given = {name: getattr(asked, name) for name in ("steps", "samples") if _reads(method, name)}
                subjects.append(
                    model_subject(
                        model,
                        method=method,
                        about={"model": _full(source)},
                        normalization=asked.norm,
                        thresholds=asked.thresholds,
                        **{name: value for name, value in given.items() if value is not None},
                    )
                )
    for method in methods:
        if method not in used:
            family = MAP_KINDS[method].family.upper()
            raise CalmError(f"--method {method} needs a {family} model, and none of --model is one")
    return subjects


def _folders(asked: argparse.Namespace, split: Split) -> list[MapFolder]:
    thresholds: Thresholds = asked.thresholds or "even"
    return [open_map_folder(folder, split, thresholds=thresholds) for folder in dict.fromkeys(asked.maps)]


def _unread(asked: argparse.Namespace, methods: Iterable[str]) -> str | None:
    for name in ("steps", "samples"):
        if getattr(asked, name) is not None and not any(_reads(method, name) for method in methods):
            return name
    return None


def _reads(method: str, option: str) -> bool:
    return method in BASELINES and option in BASELINES[method].options


def _has(model: CalmModel, method: str) -> bool:
    return method in BASELINES or MAP_KINDS[method].family == (
        "cam" if model.config.method == "cam" else "calm"
    )


def _told_apart(subjects: list[Subject | MapFolder]) -> list[Subject | MapFolder]:
    """Equal labels get the name of the model's folder, or of the one that the maps' folder is in; or else a number."""
    labels = [subject.label for subject in subjects]
    folders = [s.about["model"] if isinstance(s, Subject) else Path(s.about["maps"]).parent for s in subjects]
    named = [
        f"{label} ({Path(folder).name})" if labels.count(label) > 1 else label
        for label, folder in zip(labels, folders, strict=True)
    ]
    return [
        replace(s, label=f"{name} {named[:i].count(name) + 1}" if named.count(name) > 1 else name)
        for i, (s, name) in enumerate(zip(subjects, named, strict=True))
    ]


def _asked_of(name: str, subjects: list[Subject | MapFolder]) -> list[Subject | MapFolder]:
    """All subjects, or the first of each model."""
    if not benchmark(name).per_model:
        return subjects
    return list({subject.about["model"]: subject for subject in reversed(subjects)}.values())[::-1]


def _default_out(models: list[str]) -> Path:
    one = len(set(models)) == 1 and Path(models[0]).is_dir()
    return Path(models[0]) / "evaluation" if one else Path("evaluation")


def _full(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _device(name: str) -> torch.device:
    if name == "auto" and size() > 1:
        name = "cuda" if torch.cuda.is_available() else "cpu"  # no other device can gather results
    return resolve_device(own_gpu() if name == "cuda" else name)


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
