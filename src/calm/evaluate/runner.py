"""Run benchmarks of a configuration; a complete result is stored and not computed again."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import PIL
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress as ProgressBars, TextColumn, TimeRemainingColumn

from calm.baselines import BASELINES, canonical_method
from calm.checkpoint import CARD, Card
from calm.data.loading import FolderSource, Layout, SplitName, fingerprint, load_split, open_source, summary
from calm.data.records import Split
from calm.errors import CalmError, shown
from calm.evaluate.cue_localization import read_cue_data
from calm.evaluate.distributed import all_gather, device_of_process, is_first, process_group, world_size
from calm.evaluate.localization import truth_kinds
from calm.evaluate.reading import Progress
from calm.evaluate.registry import BENCHMARKS, Benchmark, EvaluateConfig, benchmark, chosen_benchmarks
from calm.evaluate.result import Result
from calm.evaluate.subject import MapFolder, Subject, model_subject, open_map_folder
from calm.evaluate.tables import print_tables, write_tables
from calm.files import check_writable, read_yaml
from calm.metrics.erasing import check_fractions
from calm.model import load
from calm.output import MAP_KINDS

_MODULES: Mapping[str, Any] = {"torch": torch, "numpy": np, "opencv": cv2, "pillow": PIL}
"""Packages whose versions change figures: OpenCV finds contours, and Pillow resizes the masks of parts."""

READING: Mapping[str, tuple[type, ...]] = {"val_fraction": (int, float), "present_classes_only": (bool,)}
"""Fields of a run's configuration that decide which images a carved split has, and how classes are numbered."""


@process_group()
def evaluate(config: EvaluateConfig) -> list[Result]:
    """Run benchmarks, print their tables, and write them and each result to a folder.

    Of several processes (`calm.evaluate.distributed`) each does its share, and the first writes and prints.

    Returns:
        The results, in the order of the table.

    Raises:
        CalmError: anything wrong with an option, a model or the data: before work starts, where it can be known.
    """
    check_fractions(config.fractions)
    split, reading = run_split(
        config.data, config.split, config.model, layout=config.layout, metadata_root=config.metadata_root
    )
    rows = _annotated(config, split)
    thresholds = config.thresholds or "even"
    folders = [open_map_folder(folder, split, thresholds=thresholds) for folder in dict.fromkeys(config.maps)]
    subjects = _distinct_labels([*_model_subjects(config, split), *folders])
    for name, row in rows.items():
        kinds = {str(s.about["method"]) for s in subjects} - {str(s.about["method"]) for s in _read_by(row, subjects)}
        if kinds and not row.per_model:
            left = f"{name} reads the maps of single classes, and {', '.join(kinds)} only compares two"
            if config.benchmark != "all":
                raise CalmError(f"{left}: choose another --method, or cue-localization")
            if is_first():
                print(f"{left}: left out", file=sys.stderr)
    single = len(set(config.model)) == 1 and Path(config.model[0]).is_dir()
    out = config.out or (Path(config.model[0]) / "evaluation" if single else Path("evaluation"))
    if out.exists() and not out.is_dir():
        raise CalmError(f"--out {out} is a file: name a folder")
    if is_first():
        check_writable(out)
    data = Data.of(split, config.data, config.layout, config.metadata_root, reading)
    results = []
    with _progress_bars() as bars:
        for name, row in rows.items():
            options = {option: getattr(config, option) for option in ("replicates", "seed", *row.options)}
            for subject in _classifiers(subjects) if row.per_model else _read_by(row, subjects):
                stored = " (stored)" * result_path(name, subject, data, out, options).is_file()
                task = bars.add_task(f"{name}: {subject.label}{stored}", total=len(split.records))

                how: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.workers}
                results.append(run(name, subject, data, out, progress=partial(bars.advance, task), **how, **options))
                bars.update(task, completed=len(split.records))
    if is_first():
        write_tables(results, out)
        console = Console()
        print_tables(results, console)
        if config.benchmark == "all":
            apart = " and ".join(name for name, row in BENCHMARKS.items() if not row.in_all)
            console.print(f"not part of all, for they take many passes: {apart}; run them by name", style="dim")
        console.print(f"{out / 'table.md'} (and .csv, .json)", highlight=False, soft_wrap=True)
    return results


def _annotated(config: EvaluateConfig, split: Split) -> dict[str, Benchmark]:
    """Return the chosen benchmarks that the data set has annotation for; print which are left out of "all"."""
    rows = chosen_benchmarks(config.benchmark)
    for name in list(rows):
        try:
            if name == "cue-localization":
                read_cue_data(split, config.data, both_shown=True)
            if name == "localization":
                truth_kinds(split)
        except CalmError as error:
            if config.benchmark != "all":
                raise
            if is_first():
                print(f"{name} is left out: {error}", file=sys.stderr)
            del rows[name]
    return rows


def _model_subjects(config: EvaluateConfig, split: Split) -> list[Subject]:
    """Return every model with every method that it has."""
    methods = [canonical_method(method) for method in config.method]
    for name in ("steps", "samples"):
        if getattr(config, name) is not None and not any(_reads(method, name) for method in methods):
            raise CalmError(f"no --method reads --{name}: leave it out")
    device = device_of_process(config.device)
    subjects: list[Subject] = []
    unused = set(methods)
    for source in dict.fromkeys(config.model):
        model = load(source, map_location="cpu").to(device).eval()
        predictor = model.optimized_for_inference()
        family = "cam" if model.config.method == "cam" else "calm"
        cache: dict[Any, Any] = {}
        for method in methods or [model.map_kind()]:
            if method not in BASELINES and family not in MAP_KINDS[method].families:
                continue
            unused.discard(method)
            options = {name: getattr(config, name) for name in ("steps", "samples") if _reads(method, name)}
            if method in MAP_KINDS and family == "calm" and config.prior_exponent != 1:
                options["prior_exponent"] = config.prior_exponent
            subject = model_subject(
                model,
                method=method,
                about={"model": str(Path(source).resolve()) if Path(source).is_dir() else source},
                normalization=config.norm,
                thresholds=config.thresholds,
                predictor=predictor,
                precision=config.precision,
                **{name: value for name, value in options.items() if value is not None},
            )
            numbers = subject.classes(split).tolist()
            if numbers != list(range(split.num_classes)):  # results of a matching by number are others
                subject = replace(subject, about={**subject.about, "classes": numbers})
            subjects.append(replace(subject, cache=cache))
    if config.prior_exponent is not None and not any(
        subject.model and subject.model.config.method != "cam" and subject.about["method"] in MAP_KINDS
        for subject in subjects
    ):
        raise CalmError("no --method of a CALM model reads --prior_exponent: leave it out")
    for method in methods:
        if method in unused and config.model:
            needed = MAP_KINDS[method].families[0].upper()
            raise CalmError(f"--method {method} needs a {needed} model, and none of --model is one")
    return subjects


def _read_by(row: Benchmark, subjects: list[Subject | MapFolder]) -> list[Subject | MapFolder]:
    """Return the subjects without those whose maps only compare two classes, unless the benchmark compares."""
    return [s for s in subjects if row.pairs or not ((kind := MAP_KINDS.get(s.about["method"])) and kind.compares)]


def _reads(method: str, option: str) -> bool:
    return method in BASELINES and option in BASELINES[method].options


def _distinct_labels(subjects: list[Subject | MapFolder]) -> list[Subject | MapFolder]:
    """Add the name of the model's folder, or of the parent of the maps' folder, to equal labels; or else a number."""
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


def _classifiers(subjects: list[Subject | MapFolder]) -> list[Subject | MapFolder]:
    """Return a subject of each model, with its main maps if they are there, under the model's name."""
    mine = [s for s in subjects if isinstance(s, Subject) and s.model]
    mine.sort(key=lambda s: s.model is not None and s.about["method"] == s.model.map_kind())  # the last one counts
    first = {s.about["model"]: s for s in mine}
    named = [
        replace(s, label=s.model.config.title + ", bf16" * ("precision" in s.about))
        for s in (first[model] for model in dict.fromkeys(s.about["model"] for s in subjects))
        if s.model
    ]
    return _distinct_labels([*named])


def _progress_bars() -> ProgressBars:
    console = Console(stderr=True, quiet=not is_first())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return ProgressBars(*columns, console=console, disable=not console.is_terminal)


def run_split(
    root: Path,
    name: SplitName | None,
    models: Sequence[str],
    *,
    layout: Layout = "auto",
    metadata_root: Path | None = None,
) -> tuple[Split, dict[str, Any]]:
    """Read a split as ``load_split`` does; where the data set lacks it, carve it as the models' runs did.

    Models that are in no run folder have no configuration of a split. ``None`` is all of a folder without splits that
    no model was trained on, and else test.

    Returns:
        The split, and the settings of `READING` that it was read with.

    Raises:
        CalmError: as ``load_split``; a run's configuration is damaged; two runs read the split differently.
    """
    readings = {model: reading for model in models if (reading := _reading(Path(model)))}
    settings = {model: ", ".join(f"{k} {v}" for k, v in reading.items()) for model, reading in readings.items()}
    distinct = {settings[model]: (model, reading) for model, reading in readings.items()} or {"": ("", {})}
    if name is None:
        source = open_source(root, layout, metadata_root)
        undivided = isinstance(source, FolderSource) and not source.folders
        name = "all" if undivided and not any(_trained_on(Path(model), root) for model in models) else "test"
    splits = [
        (model, load_split(root, name, layout=layout, metadata_root=metadata_root, **reading), reading)
        for model, reading in distinct.values()
    ]
    first, split, reading = splits[0]
    for model, other, _ in splits[1:]:
        if fingerprint(other) != fingerprint(split):
            raise CalmError(
                f"{name} of {root} has other images or classes for {first} ({settings[first]}) than for {model}"
                f" ({settings[model]}): evaluate them apart"
            )
    return split, reading


def _trained_on(model: Path, root: Path) -> bool:
    """Return whether a model's run or card names the data, by the path or the fingerprint of its training images."""
    run = _run_folder(model)
    if run and Path(str(read_yaml(run / "config.yaml").get("data"))).resolve() == root.resolve():
        return True
    cards = [path for path in (model / CARD, model / "best" / CARD, model / "last" / CARD) if path.is_file()]
    marks = {Card.read(path).training.get("fingerprint") for path in cards} - {None}
    return bool(marks) and fingerprint(load_split(root, "train", **_reading(model))) in marks


def _run_folder(model: Path) -> Path | None:
    return next((path for path in (model, model.parent) if (path / "config.yaml").is_file()), None)


def _reading(model: Path) -> dict[str, Any]:
    """Return the settings of `READING` in the config.yaml of a model's run; none for a model that is in no run."""
    if not (run := _run_folder(model)):
        return {}
    path = run / "config.yaml"
    config = read_yaml(path, "configuration")
    reading = config.get("reading", {}) if isinstance(config, dict) else None
    if not isinstance(reading, dict):
        raise CalmError(f"configuration {path} has no list 'reading' of 'setting: value'")
    found = {name: reading[name] for name in READING if name in reading}
    for name, value in found.items():
        if type(value) not in READING[name]:
            raise CalmError(f"configuration {path}: reading.{name} is {shown(value)}")
    return found


@dataclass(frozen=True)
class Data:
    """A data set to benchmark on.

    Attributes:
        split: its images.
        root: its folder.
        facts: counts, fingerprint, and how it was read; part of the provenance.
    """

    split: Split
    root: Path
    facts: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        split: Split,
        root: Path,
        layout: str = "auto",
        metadata_root: Path | None = None,
        reading: Mapping[str, Any] | None = None,
    ) -> Data:
        """Return the data of a split that was read from ``root`` (``reading``: see `run_split`)."""
        facts = {
            "root": str(Path(root).resolve()),
            "layout": layout,
            "metadata_root": None if metadata_root is None else str(metadata_root.resolve()),
            "origin": split.origin,
            **(reading or {}),
            **summary(split, file_sizes=True),
        }
        return cls(split, Path(root), facts)

    @cached_property
    def annotation(self) -> str:
        """SHA-256 of the files that `calm.data.cues` reads, wherever they may be."""
        paths = [path for folder in ("attributes", "parts") for path in sorted((self.root / folder).glob("*.*"))]
        paths += [self.root / "images.txt", self.root / "attributes.txt", self.root.parent / "attributes.txt"]
        return _digest(path for path in paths if path.is_file())

    @cached_property
    def masks(self) -> str:
        """SHA-256 of the mask files of all images."""
        return _digest(path for record in self.split.records for path in record.all_masks)


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"none"
        digest.update(path.name.encode() + content)
    return digest.hexdigest()


def result_path(name: str, subject: Subject | MapFolder, data: Data, out: Path, options: Mapping[str, Any]) -> Path:
    """Return where a result is stored: the file's name ends in a digest of everything that the figures depend on.

    An option that is given as its default makes no difference, nor does the row's label once a result is stored.
    """
    row = benchmark(name)
    about = {key: value for key, value in subject.about.items() if key != "model"}  # its path may change
    identity: list[Any] = [
        name,
        about,
        _protocol(row, subject),
        data.facts["fingerprint"],
        data.annotation if row.needs_root else None,
        data.masks if row.masks else None,
        sorted(row.values(options).items()),
        version("calm"),
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    slug = re.sub(r"[^a-z0-9]+", "-", subject.label.lower()).strip("-") or "subject"
    stored = sorted((out / name).glob(f"*-{digest[:8]}.json"))
    return stored[0] if stored else out / name / f"{slug}-{digest[:8]}.json"


def run(
    name: str,
    subject: Subject | MapFolder,
    data: Data,
    out: Path | str,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Return the stored result of a benchmark, or run it and store the result.

    Args:
        name: a key of ``BENCHMARKS``.
        subject: what to benchmark.
        data: on what.
        out: results are stored in ``out/NAME/LABEL-DIGEST.json``.
        batch_size: see `calm.evaluate.reading.Reading`, as for workers and progress.
        workers: see there.
        progress: see there.
        options: of the benchmark, such as ``replicates`` and ``seed``.

    Returns:
        The result; its label is the subject's and the options that are not the default.

    Raises:
        CalmError: an unknown benchmark, or what the benchmark refuses.
    """
    row = benchmark(name)
    label = subject.label + row.label(options)
    path = result_path(name, subject, data, Path(out), options)
    # The first process decides, and reads: another may not see the file, or see it appear in between.
    stored = all_gather(Result.load(path) if is_first() and path.is_file() else None)[0]
    current: dict[str, Any] = {"subject": dict(subject.about), "data": dict(data.facts)}  # with paths as they are now
    if isinstance(subject, Subject) and subject.model is not None and not row.per_model:
        current["caution"] = subject.model.caution
    if stored is not None:
        return replace(stored, label=label, provenance={**stored.provenance, **current})
    began = time.perf_counter()
    roots = [data.root] if row.needs_root else []
    reading = {"batch_size": batch_size, "workers": workers, "progress": progress}
    result: Result = row.load()(subject, data.split, *roots, **reading, **options)
    provenance = {
        **result.provenance,
        **current,
        **_protocol(row, subject),
        "options": row.values(options),
        "device": str(subject.device) if isinstance(subject, Subject) else None,
        "processes": world_size(),
        "seconds": round(time.perf_counter() - began, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "calm": version("calm"),
            "python": platform.python_version(),
            **{name: str(module.__version__) for name, module in _MODULES.items()},
        },
    }
    result = replace(result, label=label, provenance=provenance)
    if is_first():
        result.save(path)
    return result


def _protocol(row: Benchmark, subject: Subject | MapFolder) -> dict[str, str | None]:
    """Return how the benchmark reads the subject's maps. Those of a folder are normalised already."""
    protocol: dict[str, str | None] = {}
    if "norm" in row.reads:
        protocol["normalization"] = getattr(subject, "normalization", None)
    if "thresholds" in row.reads:
        protocol["thresholds"] = subject.thresholds
    if row.boxes and isinstance(subject, Subject):
        protocol |= {"box_normalization": subject.box_normalization, "box_thresholds": subject.box_thresholds}
    return protocol
