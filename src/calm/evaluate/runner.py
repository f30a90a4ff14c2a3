"""Run benchmarks, and keep what is done: a result is stored when it is complete, and not computed again.

The images that models are judged by: where a data set lacks the split, what their runs kept out of training.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from calm.data.loading import Layout, SplitName, fingerprint, load_split, summary
from calm.data.records import Split
from calm.errors import CalmError, shown
from calm.evaluate.reading import Progress, first, gathered, size
from calm.evaluate.registry import Benchmark, benchmark
from calm.evaluate.result import Result
from calm.evaluate.subject import MapFolder, Subject
from calm.files import read_yaml

__all__ = ["READING", "Data", "place", "run", "run_split"]

READING: Mapping[str, tuple[type, ...]] = {"val_fraction": (int, float), "present_classes_only": (bool,)}
"""What of a run's configuration decides which images a carved split has, and how classes are numbered."""


def run_split(
    root: Path,
    name: SplitName,
    models: Sequence[str],
    *,
    layout: Layout = "auto",
    metadata_root: Path | None = None,
) -> tuple[Split, dict[str, Any]]:
    """A split, carved from training images (`calm.data.loading`) as the runs of the models did it.

    Args:
        root: of the data set.
        name: of the split.
        models: run folders, the models in them, or others, which say nothing about splits.
        layout: as for ``load_split``.
        metadata_root: as for ``load_split``.

    Returns:
        The split, and by which of `READING` it was read.

    Raises:
        CalmError: as ``load_split``; a run's configuration is damaged; two runs read the split differently.
    """
    readings = {model: reading for model in models if (reading := _reading(Path(model)))}
    ways = {str(reading): (model, reading) for model, reading in readings.items()} or {"": ("", {})}
    found: list[tuple[str, Split, dict[str, Any]]] = [
        (model, load_split(root, name, layout=layout, metadata_root=metadata_root, **reading), reading)
        for model, reading in ways.values()
    ]
    first, split, reading = found[0]
    for model, other, another in found[1:]:
        if fingerprint(other) != fingerprint(split):
            raise CalmError(
                f"{name} of {root} has other images or classes for {first} ({_told(reading)}) than for {model}"
                f" ({_told(another)}): evaluate them apart"
            )
    return split, reading


def _reading(model: Path) -> dict[str, Any]:
    """What the config.yaml of a model's run says; nothing of a model that is in no run."""
    path = next(
        (path for path in (model / "config.yaml", model.parent / "config.yaml") if path.is_file()), None
    )
    if path is None:
        return {}
    config = read_yaml(path, "configuration")
    reading = config.get("reading", {}) if isinstance(config, dict) else None
    if not isinstance(reading, dict):
        raise CalmError(f"configuration {path} has no list 'reading' of 'setting: value'")
    for name, types in READING.items():
        if name in reading and type(reading[name]) not in types:
            raise CalmError(f"configuration {path}: reading.{name} is {shown(reading[name])}")
    return {name: reading[name] for name in READING if name in reading}


def _told(reading: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in reading.items())


@dataclass(frozen=True)
class Data:
    """A data set to benchmark on.

    Attributes:
        split: its images.
        root: its folder.
        facts: counts, fingerprint, and how it was read; goes into the provenance.
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
        """The data of a split that was read from ``root`` (``reading``: see `run_split`); image files are looked at for
        their sizes."""
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
        digest = hashlib.sha256()
        paths = [
            path for folder in ("attributes", "parts") for path in sorted((self.root / folder).glob("*.*"))
        ]
        paths += [
            self.root / "images.txt",
            *(place / "attributes.txt" for place in (self.root, self.root.parent)),
        ]
        for path in paths:
            if path.is_file():
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    @cached_property
    def masks(self) -> str:
        """SHA-256 of the mask files of all images."""
        digest = hashlib.sha256()
        for record in self.split.records:
            for path in record.all_masks:
                digest.update(hashlib.sha256(path.read_bytes()).digest() if path.is_file() else b"none")
        return digest.hexdigest()


def place(name: str, subject: Subject | MapFolder, data: Data, out: Path, options: Mapping[str, Any]) -> Path:
    """Where a result is stored: its name has a digest of all that the figures depend on.

    An option that is chosen as it would be anyway makes no other name. Once a result is stored, it does not matter what
    the row is called beside others.
    """
    row = benchmark(name)
    common = {key: value for key, value in options.items() if key not in row.options}
    about = {
        key: value for key, value in subject.about.items() if key != "model"
    }  # moved, it is the same model
    known: list[Any] = [
        name,
        about,
        _protocol(row, subject),
        data.facts["fingerprint"],
        data.annotation if row.needs_root else None,
        data.masks if row.masks else None,
        sorted((common | row.chosen(options)).items()),
        version("calm"),
    ]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    slug = re.sub(r"[^a-z0-9]+", "-", subject.label.lower()).strip("-") or "subject"
    stored = sorted((out / name).glob(f"*-{digest[:8]}.json"))
    return stored[0] if stored else out / name / f"{slug}-{digest[:8]}.json"


def run(
    name: str,
    subject: Subject | MapFolder,
    data: Data,
    out: Path,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """The result of a benchmark: the stored one, or a new one that is then stored.

    Args:
        name: a key of ``BENCHMARKS``.
        subject: what to benchmark.
        data: on what.
        out: results are stored in ``out/NAME/LABEL-DIGEST.json``.
        batch_size: images of one forward pass.
        workers: processes that read images.
        progress: told the number of images after each batch.
        options: of the benchmark, such as ``replicates`` and ``seed``.

    Returns:
        Its label is the subject's, and after it the options that are chosen otherwise than by default.

    Raises:
        CalmError: an unknown benchmark, or what the benchmark refuses.
    """
    row = benchmark(name)
    label = ", ".join(
        [subject.label, *(f"{key} {_words(value)}" for key, value in row.chosen(options).items())]
    )
    path = place(name, subject, data, out, options)
    # The first process decides, and reads: another may not see the file, or see it appear in between.
    stored = gathered(Result.load(path) if first() and path.is_file() else None)[0]
    if stored is not None:
        places = {"subject": dict(subject.about), "data": dict(data.facts)}  # where they are now
        return replace(stored, label=label, provenance={**stored.provenance, **places})
    began = time.perf_counter()
    result = row.load()(
        subject,
        data.split,
        *([data.root] if row.needs_root else []),
        batch_size=batch_size,
        workers=workers,
        progress=progress,
        **options,
    )
    provenance = {
        **result.provenance,
        "subject": dict(subject.about),
        **_protocol(row, subject),
        "data": dict(data.facts),
        "options": {**{key: row.default(key) for key in row.options}, **options},
        "device": str(subject.device) if isinstance(subject, Subject) else None,
        "processes": size(),
        "seconds": round(time.perf_counter() - began, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    result = replace(result, label=label, provenance=provenance)
    if first():
        result.save(path)
    return result


def _protocol(row: Benchmark, subject: Subject | MapFolder) -> dict[str, str | None]:
    """How the benchmark reads maps. Stored maps are normalised already."""
    found: dict[str, str | None] = {}
    if "norm" in row.reads:
        found |= {"normalization": getattr(subject, "normalization", None)}
    if "thresholds" in row.reads:
        found |= {"thresholds": subject.thresholds}
    if "boxes" in row.reads and isinstance(subject, Subject):
        found |= {"box_normalization": subject.box_normalization, "box_thresholds": subject.box_thresholds}
    return found


def _versions() -> dict[str, str]:
    """Of what figures depend on: contours are OpenCV's, regions of parts Pillow's."""
    import cv2

    of_modules = {"torch": torch, "numpy": np, "opencv": cv2, "pillow": PIL}
    return {
        "calm": version("calm"),
        "python": platform.python_version(),
        **{name: str(module.__version__) for name, module in of_modules.items()},
    }


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
