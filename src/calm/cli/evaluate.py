"""``calm evaluate``: a parser for each benchmark, with the flags that the benchmark reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.cli.parsing import Parser, help_texts, parse
from calm.errors import CalmError
from calm.evaluate.registry import BENCHMARKS, EvaluateConfig, chosen_benchmarks, options_of

if TYPE_CHECKING:
    from calm.evaluate.result import Result

_LISTS: dict[str, Any] = {"model": str, "method": str, "maps": Path, "fractions": float}
"""Flags that take several values, and that may be repeated."""

_FIELDS = {field.name for field in fields(EvaluateConfig)}

_EXAMPLES = """examples:
  calm evaluate cue-localization --model runs/calm runs/cam --data birds
  calm evaluate cue-localization --model runs/calm --data birds --method joint posterior gradcam
  calm evaluate all --model runs/calm --data CUB_200_2011 --out tables
  calm evaluate remove-and-classify --model runs/calm --data birds --fill blur --fractions 0.05 0.1 0.2
  calm evaluate localization --maps my-maps --data birds
  torchrun --nproc_per_node 2 -m calm.cli evaluate all --model runs/calm --data birds   # two processes
"""


def build_parser(benchmark: str) -> Parser:
    """Return the parser of a benchmark's flags, or of those of ``all``; a `CalmError` if there is no such benchmark."""
    read, rows = options_of(benchmark), chosen_benchmarks(benchmark)
    parser = Parser(
        prog=f"calm evaluate {benchmark}",
        description="Benchmark models and their explanations: print a table, and write table.json, table.csv, table.md"
        " and a file for each result. A result that is there already is not computed again.\n\n"
        + "\n".join(f"  {name:<20} {row.line}" for name, row in rows.items()),
        epilog=_EXAMPLES,
    )
    texts = help_texts(EvaluateConfig)
    for name, kind in _LISTS.items():
        if name in read:
            flags = [f"--{name}", *(["--map_kind"] if name == "method" else [])]
            parser.add_argument(*flags, nargs="+", action="extend", type=kind, help=texts[name])
    parser.add_class_arguments(EvaluateConfig, as_group=False, skip={*_LISTS} | (_FIELDS - read))
    return parser


def read_config(words: Sequence[str]) -> EvaluateConfig:
    """Return the configuration that the words of a command line describe, the benchmark's name first.

    Raises:
        CalmError: no such benchmark; a flag that it does not have, or that it does not read; a wrong value.
        SystemExit: after ``--help``.
    """
    if not words or words[0].startswith("-"):
        if {"-h", "--help"} & set(words):
            print(_overview())
            raise SystemExit(0)
        raise CalmError("name a benchmark first, such as 'calm evaluate all --model RUN --data DIR'; see --help")
    benchmark, *rest = words
    parser = build_parser(benchmark)
    for word in rest:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in _FIELDS - options_of(benchmark):
            raise CalmError(_not_read(benchmark, name))
    values = parse(parser, rest)
    lists = {name: tuple(values[name]) for name in _LISTS if values.get(name)}
    return EvaluateConfig(benchmark, **{name: values[name] for name in values.keys() - _LISTS.keys()} | lists)


def _not_read(benchmark: str, flag: str) -> str:
    if flag == "maps":
        return f"--maps can be scored by localization only, not by {benchmark}"
    if flag == "method":
        return f"{benchmark} is about models, not about their maps: leave out --method"
    return f"{benchmark} does not read --{flag}: leave it out"


def _overview() -> str:
    apart = " and ".join(name for name, row in BENCHMARKS.items() if not row.in_all)
    lines = "\n".join(f"  {name:<20} {row.line}" for name, row in BENCHMARKS.items())
    return f"""usage: calm evaluate BENCHMARK --model RUN... --data DIR [--FLAG VALUE ...]
       calm evaluate BENCHMARK --help   shows the benchmark's flags

Benchmark models and their explanations: a table with intervals.

benchmarks:
{lines}
  {"all":<20} those that the data set has annotation for, without {apart},
{"":<23}which take many passes of each image

{_EXAMPLES}"""


def main(words: Sequence[str]) -> list[Result]:
    """Run `calm evaluate`; see `calm.evaluate.runner.evaluate`."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return _run(words)
    from calm.evaluate.distributed import process_group

    with process_group():  # so that one process alone tells a mistake in the words
        return _run(words)


def _run(words: Sequence[str]) -> list[Result]:
    config = read_config(words)
    from calm.evaluate.runner import evaluate  # PyTorch is imported here: a help page need not wait for it

    return evaluate(config)
