"""The benchmarks, and the options that each of them reads. Nothing here imports PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from calm.config import DRAWS, FRACTIONS, REPLICATES, Explain, Fill, Order, Precision
from calm.data.loading import Layout, SplitName
from calm.errors import CalmError, unknown


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of ``calm evaluate``, one flag each.

    Attributes:
        benchmark: the benchmark's name, or "all"
        data: folder of the data set
        model: run folders, saved models or hub ids
        method: map kinds of the models and other attribution methods; by default each model's main maps. A map kind
            is computed for those models that have it
        maps: folders of .npy maps of any method, 224x224, in [0, 1], named by image id
        split: train, val, test, or all; by default test, or all of a folder without splits that no model was trained on
        layout: cub, metadata, folder, or auto to look
        metadata_root: folder of the metadata lists, where they are not with the images
        norm: normalisation of the maps; by default clipping for CALM's own, minmax for others
        thresholds: by default log for CALM's own maps, even for others
        region: what bounds the parts of an object: its segmentation (without one, nothing), or its box
        steps: points of integrated-gradients, 50 by default
        prior_exponent: raise the prior of CALM's own maps to this power, normalised; by default 1
        samples: noisy copies of smoothgrad and its kin, 50 by default
        fill: what erased pixels become
        fractions: shares of erased pixels, ascending
        draws: random erasures of each image that R_k is relative to, averaged
        explain: the class whose map ranks the pixels
        points: steps from no pixel to all
        images: number of images, spread evenly over the split
        order: of drawing the weights anew: stage after stage from the head down, or all at once
        out: folder that keeps all results, which calm report shows, and the tables of the last call; by default
            RUN/evaluation for one model folder, else ./evaluation
        batch_size: images in a forward pass
        workers: processes that read images
        device: cpu, cuda, cuda:1, mps; auto takes a GPU if there is one
        precision: of predictions and the models' own maps: 32-true (float32) or bf16-mixed (bfloat16), which is faster
            on GPUs and on processors that compute it, and changes figures a little; other methods keep float32
        replicates: bootstrap samples
        seed: of the bootstrap and of random pixels
    """

    benchmark: str
    data: Path
    model: tuple[str, ...] = ()
    method: tuple[str, ...] = ()
    maps: tuple[Path, ...] = ()
    split: SplitName | None = None
    layout: Layout = "auto"
    metadata_root: Path | None = None
    norm: Literal["max", "minmax", "clipping"] | None = None
    thresholds: Literal["even", "log"] | None = None
    steps: int | None = None
    samples: int | None = None
    prior_exponent: float | None = None
    region: Literal["mask", "box"] = "mask"
    fill: Fill = "zero"
    fractions: tuple[float, ...] = FRACTIONS
    draws: int = DRAWS
    explain: Explain = "label"
    points: int = 20
    images: int = 200
    order: Order = "cascading"
    out: Path | None = None
    batch_size: int = 32
    workers: int = 0
    device: str = "auto"
    precision: Precision = "32-true"
    replicates: int = REPLICATES
    seed: int = 0

    def __post_init__(self) -> None:
        at_least = {"batch_size": 1, "workers": 0, "replicates": 0, "seed": 0}
        at_least |= dict.fromkeys(("steps", "samples", "points", "images", "draws"), 1)
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise CalmError(f"--{name} {value}: give at least {least}")
        if not self.model and not self.maps:
            raise CalmError("nothing to evaluate: give --model or, for localization, --maps")
        if not self.model:
            for name in ("method", "norm"):
                if getattr(self, name):
                    taken = "maps are taken as they are"
                    raise CalmError(f"--{name} is about models, and {taken}: leave it out, or give --model")
            if self.workers or self.device != "auto" or self.precision != "32-true":
                raise CalmError("--workers, --device and --precision are about models: leave them out, or give --model")


_COMMON = frozenset(
    {"data", "model", "split", "layout", "metadata_root", "out", "batch_size", "workers", "device", "precision"}
)
_EVERY = ("replicates", "seed")
"""Options of every benchmark's function."""

_OF_MAPS = ("method", "steps", "samples", "prior_exponent", "norm")


@dataclass(frozen=True)
class Benchmark:
    """A row of the table of benchmarks.

    Attributes:
        function: "module:function". It takes (subject, split), with ``needs_root`` also the data set's root, the
            keywords batch_size, workers, progress, replicates and seed, and ``options``; it returns a `Result`.
        line: what it measures, in one line.
        needs_root: it reads class attributes and part points below the data set's root.
        in_all: it is part of ``all``; the others are run by name.
        reads: how it chooses and reads maps: fields of `EvaluateConfig`. Without ``method`` it is about classifiers,
            not maps, and run once for each model; with ``maps`` it also scores folders of maps.
        boxes: it fits boxes to maps.
        masks: it compares maps with the masks of the data set.
        pairs: it compares the maps of two classes; the others leave out map kinds that only compare (evidence).
        options: its own options: fields of `EvaluateConfig`, and parameters of the function.
    """

    function: str
    line: str
    needs_root: bool = False
    in_all: bool = True
    reads: tuple[str, ...] = ()
    boxes: bool = False
    masks: bool = False
    pairs: bool = False
    options: tuple[str, ...] = ()

    def load(self) -> Callable[..., Any]:
        """Import the function, which returns a `calm.evaluate.result.Result`."""
        # Result is not named as a type: jsonargparse would import it, and PyTorch, for the help page of EvaluateConfig.
        function: Callable[..., Any] = resolve_name(self.function)
        return function

    @property
    def per_model(self) -> bool:
        """Whether it is run once for each model, whatever the methods."""
        return "method" not in self.reads

    def values(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return all options of the function: those given, lists as tuples, and the defaults of the others."""
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
        return {name: _DEFAULTS[name] for name in (*_EVERY, *self.options)} | given

    def label(self, options: Mapping[str, Any]) -> str:
        """Describe its own options that are not the default, such as ", fill mean, points 10", for a row's label."""
        values = self.values(options)
        changed = {name: values[name] for name in self.options if values[name] != _DEFAULTS[name]}
        return "".join(
            f", {name} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in changed.items()
        )


_DEFAULTS = {field.name: field.default for field in fields(EvaluateConfig)}

BENCHMARKS: dict[str, Benchmark] = {
    "cue-localization": Benchmark(
        "calm.evaluate.cue_localization:cue_localization",
        "does the difference of two classes' maps lie on the parts that tell them apart",
        needs_root=True,
        reads=(*_OF_MAPS, "thresholds"),
        masks=True,
        pairs=True,
        options=("region",),
    ),
    "remove-and-classify": Benchmark(
        "calm.evaluate.erasing:remove_and_classify",
        "is the class lost when the highest-scored pixels are erased",
        reads=_OF_MAPS,
        options=("fill", "fractions", "draws", "explain"),
    ),
    "localization": Benchmark(
        "calm.evaluate.localization:localization",
        "do maps find the object, by its masks or boxes",
        reads=(*_OF_MAPS, "thresholds", "maps"),
        boxes=True,
        masks=True,
    ),
    "classification": Benchmark(
        "calm.evaluate.classification:classification", "accuracy, likelihood and calibration of the classifier"
    ),
    "insertion-deletion": Benchmark(
        "calm.evaluate.erasing:insertion_deletion",
        "how fast the class comes and goes with the highest-scored pixels",
        in_all=False,
        reads=_OF_MAPS,
        options=("fill", "points", "explain"),
    ),
    "randomisation": Benchmark(
        "calm.evaluate.randomisation:randomisation",
        "do maps change when the model's weights are drawn anew (sanity check)",
        in_all=False,
        reads=("method", "steps", "samples", "prior_exponent"),
        options=("images", "order"),
    ),
}
"""Every benchmark. To add one: write its function, and add a row."""


def benchmark(name: str) -> Benchmark:
    """Return the row of ``BENCHMARKS``, or raise a CalmError."""
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, [*BENCHMARKS, "all"])
    return BENCHMARKS[name]


def chosen_benchmarks(name: str) -> dict[str, Benchmark]:
    """Return the benchmark of a name, or raise a CalmError; of "all", those that are part of it."""
    if name == "all":
        return {name: row for name, row in BENCHMARKS.items() if row.in_all}
    return {name: benchmark(name)}


def options_of(name: str) -> set[str]:
    """Return the fields of `EvaluateConfig` that a benchmark reads; of "all", those that any of its benchmarks does."""
    rows = chosen_benchmarks(name)
    read = {option for row in rows.values() for option in (*row.reads, *row.options)}
    if name == "all":
        read.discard("maps")  # other benchmarks need a model
    return {*_COMMON, *_EVERY, *read}
