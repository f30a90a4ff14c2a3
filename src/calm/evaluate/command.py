"""``calm evaluate``: benchmarks of trained models, as tables with intervals."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from calm.atomic import working_folder
from calm.baselines import BASELINES, canonical_method
from calm.checkpoint import load
from calm.data.loading import LAYOUTS, load_split
from calm.data.records import SPLITS, Split
from calm.errors import CalmError
from calm.evaluate.cue_localization import read_cue_data
from calm.evaluate.map_folder import MapFolder, open_map_folder
from calm.evaluate.processes import first, own_gpu, size, together
from calm.evaluate.randomisation import Order
from calm.evaluate.ranked_pixels import Explain
from calm.evaluate.result import Result
from calm.evaluate.runner import BENCHMARKS, Data, benchmark, place, run
from calm.evaluate.subject import Subject, model_subject
from calm.evaluate.tables import print_tables, write_tables
from calm.maps import MAP_KINDS
from calm.metrics.bootstrap import REPLICATES
from calm.metrics.erasing import FILLS
from calm.metrics.remove_and_classify import check_fractions
from calm.metrics.thresholds import Thresholds
from calm.model import CalmModel

__all__ = ["evaluate", "flags"]

_COMMON = ("replicates", "seed")
"""Options that every benchmark reads."""

_EXAMPLES = """examples:
  calm evaluate cue-localization --model runs/calm runs/cam --data birds
  calm evaluate cue-localization --model runs/calm --data birds --method jointll gtcond gradcam
  calm evaluate all --model runs/calm --data CUB_200_2011 --out tables
  calm evaluate remove-and-classify --model runs/calm --data birds --fill blur --fractions 0.05 0.1 0.2
  calm evaluate localization --maps my-maps --data birds
  torchrun --nproc_per_node 2 -m calm.cli evaluate all --model runs/calm --data birds   # two processes
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CalmError(f"{message}; see {self.prog} --help")


def flags() -> argparse.ArgumentParser:
    """The command's parser."""
    listed = "\n".join(f"  {name:<20} {row.line}" for name, row in BENCHMARKS.items())
    apart = " and ".join(name for name, row in BENCHMARKS.items() if not row.in_all)
    parser = _Parser(
        prog="calm evaluate",
        description="Benchmark models and their explanations. Prints a table, and writes table.json, table.csv,"
        " table.md and a file for each result; a result that is there already is not computed again.\n\n"
        f"benchmarks:\n{listed}\n  {'all':<20} those that the data set has annotation for, without {apart},"
        f"\n{'':<23}which take many passes of each image",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("benchmark", help="one of the above")
    add("--model", nargs="+", action="extend", default=[], help="run folders, saved models or hub ids")
    add(
        "--maps",
        nargs="+",
        action="extend",
        type=Path,
        default=[],
        help="localization: folders of .npy maps of any method, 224x224, in [0, 1], named by image id",
    )
    add("--data", type=Path, required=True, help="folder of the data set")
    add(
        "--method",
        "--map_kind",
        nargs="+",
        action="extend",
        help="map kinds of the models and other attribution methods; by default each model's main maps. A map kind"
        " is asked of those models that have it",
    )
    add("--split", default="test", help="train, val or test (default: test)")
    add("--layout", default="auto", help=f"{', '.join(LAYOUTS)}, or auto to look (default: auto)")
    add("--metadata_root", type=Path, help="folder of the metadata lists, where they are not with the images")
    add(
        "--norm",
        choices=("max", "minmax", "clipping"),
        help="of the maps; by default clipping for CALM's own",
    )
    add("--thresholds", choices=("even", "log"), help="by default log for CALM's own maps, even for others")
    add("--steps", type=int, help="of integrated-gradients (default: 50)")
    add("--samples", type=int, help="of smoothgrad and its kin (default: 50)")
    add("--fill", choices=tuple(FILLS), help=f"what erased pixels become (default: zero){_of('fill')}")
    add(
        "--fractions",
        nargs="+",
        type=float,
        help=f"shares of erased pixels, ascending (default: 0.1 0.3 0.5 0.7 0.9){_of('fractions')}",
    )
    add(
        "--explain",
        choices=get_args(Explain),
        help=f"whose map ranks the pixels (default: label){_of('explain')}",
    )
    add("--points", type=int, help=f"steps from no pixel to all (default: 20){_of('points')}")
    add("--images", type=int, help=f"how many, spread over the split (default: 200){_of('images')}")
    add(
        "--order",
        choices=get_args(Order),
        help=f"one stage after another, from the head down, or all at once (default: cascading){_of('order')}",
    )
    add("--out", type=Path, help="default: RUN/evaluation for one model folder, else ./evaluation")
    add("--batch_size", type=int, default=32, help="images of one forward pass (default: 32)")
    add("--workers", type=int, default=0, help="processes that read images (default: 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")
    add("--replicates", type=int, default=REPLICATES, help=f"bootstrap samples (default: {REPLICATES})")
    add("--seed", type=int, default=0, help="of bootstrap and random masks (default: 0)")
    return parser


def _of(option: str) -> str:
    """For the end of a flag's help: which benchmarks read it."""
    return f"; {' and '.join(name for name, row in BENCHMARKS.items() if option in row.options)}"


def evaluate(words: Sequence[str]) -> list[Result]:
    """Run ``calm evaluate`` with the words of its command line.

    In several processes (`calm.evaluate.processes`) each does its share, and the first writes and prints.

    Returns:
        The results, in the order of the table.

    Raises:
        CalmError: anything wrong with a flag, a model or the data: before work starts, where it can be known.
    """
    with together():
        return _evaluate(flags().parse_args(list(words)))


def _evaluate(asked: argparse.Namespace) -> list[Result]:
    everything = asked.benchmark == "all"
    names = [name for name, row in BENCHMARKS.items() if row.in_all] if everything else [asked.benchmark]
    for name in names:
        benchmark(name)
    _check(asked)
    options = _options(asked, names)
    split = load_split(asked.data, asked.split, layout=asked.layout, metadata_root=asked.metadata_root)
    names = _possible(names, split, asked.data, everything=everything)
    subjects: list[Subject | MapFolder] = [*_subjects(asked, split), *_folders(asked, split)]
    out = asked.out or _default_out(asked.model)
    if out.exists() and not out.is_dir():
        raise CalmError(f"--out {out} is a file: name a folder")
    if first():
        with working_folder(out / "table"):
            pass  # where nothing can be written, say so now and not after the work
    data = Data.of(split, asked.data, asked.layout, asked.metadata_root)
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


def _check(asked: argparse.Namespace) -> None:
    if not asked.model and not asked.maps:
        raise CalmError("nothing to evaluate: give --model or, for localization, --maps")
    if asked.maps and asked.benchmark != "localization":
        raise CalmError(f"--maps can be scored by localization only, not by {asked.benchmark}")
    for name in ("method", "norm"):
        if getattr(asked, name) is not None and not asked.model:
            raise CalmError(f"--{name} is about models, and maps are taken as they are: leave it out, or give --model")
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
    return _told_apart(subjects)


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


def _told_apart(subjects: list[Subject]) -> list[Subject]:
    """Equal labels get the name of the model's folder, or else a number."""
    labels = [subject.label for subject in subjects]
    named = [
        f"{s.label} ({Path(s.about['model']).name})" if labels.count(s.label) > 1 else s.label
        for s in subjects
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
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = own_gpu()
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise CalmError(f"device {name!r} cannot be used: {error}") from error


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)
