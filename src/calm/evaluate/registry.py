"""The table of benchmarks. What a row names is imported when it is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from calm.errors import unknown

if TYPE_CHECKING:
    from calm.evaluate.result import Result

__all__ = ["BENCHMARKS", "Benchmark", "benchmark"]


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
        reads: what of a subject's reading of maps it depends on: ``norm``, ``thresholds`` (flags of the command, too),
            and with ``boxes`` those of boxes.
        masks: compares maps with the masks of the data set.
        options: what else can be chosen, flags of the command too.
    """

    function: str
    line: str
    needs_root: bool = False
    per_model: bool = False
    in_all: bool = True
    reads: tuple[str, ...] = ()
    masks: bool = False
    options: tuple[str, ...] = ()

    def load(self) -> Callable[..., Result]:
        """The function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Result] = getattr(import_module(module), name)
        return function

    def default(self, option: str) -> Any:
        """What an option is if it is not chosen."""
        return inspect.signature(self.load()).parameters[option].default

    def chosen(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of ``options`` that are this benchmark's own and chosen otherwise than by default."""
        given = {name: options[name] for name in self.options if name in options}
        own = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return {name: value for name, value in own.items() if value != self.default(name)}


BENCHMARKS: dict[str, Benchmark] = {
    "cue-localization": Benchmark(
        "calm.evaluate.cue_localization:cue_localization",
        "does the difference of two classes' maps lie on the parts that tell them apart",
        needs_root=True,
        reads=("norm", "thresholds"),
        masks=True,
    ),
    "remove-and-classify": Benchmark(
        "calm.evaluate.erasing:remove_and_classify",
        "is the class lost when the highest-scored pixels are erased",
        reads=("norm",),
        options=("fill", "fractions", "explain"),
    ),
    "localization": Benchmark(
        "calm.evaluate.localization:localization",
        "do maps find the object, by its masks or boxes",
        reads=("norm", "thresholds", "boxes"),
        masks=True,
    ),
    "classification": Benchmark(
        "calm.evaluate.classification:classification",
        "accuracy, likelihood and calibration of the classifier",
        per_model=True,
    ),
    "insertion-deletion": Benchmark(
        "calm.evaluate.erasing:insertion_deletion",
        "how fast the class comes and goes with the highest-scored pixels",
        in_all=False,
        reads=("norm",),
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
