"""Run benchmarks, and keep what is done: a result is stored when it is complete, and not computed again."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calm.data.digest import summary
from calm.data.records import Split
from calm.errors import unknown
from calm.evaluate.map_folder import MapFolder
from calm.evaluate.processes import first, gathered, size
from calm.evaluate.reading import Progress
from calm.evaluate.result import Result
from calm.evaluate.subject import Subject

__all__ = ["BENCHMARKS", "Benchmark", "Data", "benchmark", "place", "run"]


@dataclass(frozen=True)
class Benchmark:
    """A row of the table of benchmarks.

    Attributes:
        function: "module:function"; takes (subject, split), with ``needs_root`` also the root, and the keywords
            batch_size, workers, progress, replicates, seed and ``options``; returns a `Result`.
        line: what it asks, in one line.
        needs_root: reads class attributes and part points below the data set's root.
        per_model: about the classifier, not about its maps: run once for each model.
        in_all: part of ``all``; the others are asked for by name.
        options: what else can be chosen, flags of the command too.
    """

    function: str
    line: str
    needs_root: bool = False
    per_model: bool = False
    in_all: bool = True
    options: tuple[str, ...] = ()

    def load(self) -> Callable[..., Result]:
        """The function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Result] = getattr(import_module(module), name)
        return function

    def default(self, option: str) -> Any:
        """What an option is if it is not chosen."""
        return inspect.signature(self.load()).parameters[option].default


BENCHMARKS: dict[str, Benchmark] = {
    "cue-localization": Benchmark(
        "calm.evaluate.cue_localization:cue_localization",
        "does the difference of two classes' maps lie on the parts that tell them apart",
        needs_root=True,
    ),
    "remove-and-classify": Benchmark(
        "calm.evaluate.remove_and_classify:remove_and_classify",
        "is the class lost when the highest-scored pixels are erased",
        options=("fill", "fractions", "explain"),
    ),
    "localization": Benchmark(
        "calm.evaluate.localization:localization", "do maps find the object, by its masks or boxes"
    ),
    "classification": Benchmark(
        "calm.evaluate.classification:classification",
        "accuracy, likelihood and calibration of the classifier",
        per_model=True,
    ),
    "insertion-deletion": Benchmark(
        "calm.evaluate.insertion_deletion:insertion_deletion",
        "how fast the class comes and goes with the highest-scored pixels",
        in_all=False,
        options=("fill", "points", "explain"),
    ),
    "randomisation": Benchmark(
        "calm.evaluate.randomisation:randomisation",
        "do maps change when the model's weights are drawn anew (sanity check)",
        in_all=False,
        options=("images", "order"),
    ),
}
"""Every benchmark. To add one: write its function, and add a line."""


def benchmark(name: str) -> Benchmark:
    """The row of ``BENCHMARKS``.

    Raises:
        CalmError: no such benchmark.
    """
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, [*BENCHMARKS, "all"])
    return BENCHMARKS[name]


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
    def of(cls, split: Split, root: Path, layout: str = "auto", metadata_root: Path | None = None) -> Data:
        """The data of a split that was read from ``root``; image files are looked at for their sizes."""
        facts = {
            "root": str(Path(root).resolve()),
            "layout": layout,
            "metadata_root": None if metadata_root is None else str(metadata_root.resolve()),
            **summary(split, file_sizes=True),
        }
        return cls(split, Path(root), facts)

    def annotation(self) -> str:
        """SHA-256 of the files below ``attributes/`` and ``parts/`` of the root."""
        digest = hashlib.sha256()
        for folder in ("attributes", "parts"):
            for path in sorted((self.root / folder).glob("*.*")):
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


def place(name: str, subject: Subject | MapFolder, data: Data, out: Path, options: Mapping[str, Any]) -> Path:
    """Where a result is stored: its name has a digest of all that the figures depend on.

    An option that is chosen as it would be anyway makes no other name.
    """
    row = benchmark(name)
    chosen = [
        (key, value)
        for key, value in sorted(options.items())
        if key not in row.options or value != row.default(key)
    ]
    about = {
        key: value for key, value in subject.about.items() if key != "model"
    }  # moved, it is the same model
    known: list[Any] = [
        name,
        about,
        _protocol(subject),
        data.facts["fingerprint"],
        data.annotation() if row.needs_root else None,
        chosen,
        version("calm"),
    ]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
    slug = re.sub(r"[^a-z0-9]+", "-", subject.label.lower()).strip("-") or "subject"
    return out / name / f"{slug}-{digest[:8]}.json"


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

    Raises:
        CalmError: an unknown benchmark, or what the benchmark refuses.
    """
    row = benchmark(name)
    path = place(name, subject, data, out, options)
    # The first process decides, and reads: another may not see the file, or see it appear in between.
    stored = gathered(Result.load(path) if first() and path.is_file() else None)[0]
    if stored is not None:
        places = {"subject": dict(subject.about), "data": dict(data.facts)}  # where they are now
        return replace(stored, label=subject.label, provenance={**stored.provenance, **places})
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
        **_protocol(subject),
        "data": dict(data.facts),
        "options": {**{key: row.default(key) for key in row.options}, **options},
        "device": str(subject.device) if isinstance(subject, Subject) else None,
        "processes": size(),
        "seconds": round(time.perf_counter() - began, 2),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {package: version(package) for package in ("calm", "torch")},
    }
    result = replace(result, provenance=provenance)
    if first():
        result.save(path)
    return result


def _protocol(subject: Subject | MapFolder) -> dict[str, str | None]:
    """Stored maps are normalised already."""
    return {"normalization": getattr(subject, "normalization", None), "thresholds": subject.thresholds}
