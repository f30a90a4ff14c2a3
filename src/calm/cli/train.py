"""The `calm train` command: the fields of `TrainConfig` as flags, YAML files and presets."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import get_args

from calm.cli import parsing
from calm.config import Localizer, check_trusted, trust
from calm.errors import CalmError, needs_extra, unknown
from calm.files import similar_folder
from calm.train.config import TrainConfig
from calm.train.settings import PRESETS, add_arguments, load_config, parse_config, preset

EXAMPLES = """\
examples:
  calm train --data my_folder --suggest                             which settings suit these pictures, and why
  calm train --preset birds --data birds                            small network from scratch, minutes on a CPU
  calm train --preset small --data DIR --method cam                 any small images; CAM, to compare
  calm train --data CUB_200_2011                                    the released recipe: pretrained resnet50, 40 epochs
  calm train --preset small --data DIR --loss.temperature 0.5:1.0   soft E-step, annealed
  calm train --preset small --data DIR --print_config               show every setting; a file for --config
  calm train --data CUB_200_2011 --method cam --wsol acol           ACoL, a method of weakly-supervised localization
  calm train --resume runs/birds-tiny_resnet-calm-em                continue a run; so does the same command again
  calm train --resume RUN --epochs 60 --data DIR                    more epochs, for data that have moved
"""


FIRST = {
    "preset": "settings to start from, as below",
    "suggest": "print a command that suits the data, and why, instead of training",
    "data": "folder of the pictures: a folder for each class, CUB_200_2011, or WSOL metadata",
    "out": "folder of the run; the same command continues it (runs/DATA-BACKBONE-METHOD)",
    "resume": "continue the run in this folder, with its settings",
    "method": "calm-em, calm-ml or cam",
    "backbone": "resnet50, vgg16, inception_v3, small_resnet or any name of timm",
    "epochs": "passes over the training images",
    "batch_size": "images in a step",
    "lr": "highest learning rate of the backbone",
    "seed": "of everything random",
    "reading.image_size": "pixels of a side that the model sees (224); more make a finer grid",
    "reading.balance": "draw all classes equally often",
    "model.freeze": "train the head alone (true), or the backbone from a part on (layer3)",
    "wsol": "methods of weakly-supervised localization: has, adl, acol, spg, cutmix; several as has,adl",
    "report": "write RUN/report.html at the end (true)",
    "hardware.devices": "how many GPUs or processes",
}
"""The settings on the first help page, and what they are."""


def build_parser() -> parsing.Parser:
    """Make the parser: one flag per field of `TrainConfig`, fields of a group with a dot.

    ``--preset``, ``--resume``, ``--suggest``, ``--skip-bad``, ``--report`` and ``--out`` are in it for the help page
    only: `parse` and `main` read them before.
    """
    parser = parsing.Parser(
        prog="calm train",
        usage="calm train [--preset NAME] --data DIR [--out RUN] [--FLAG VALUE ...]",
        description="Train CALM or CAM on images in any layout that `calm data check` reads.",
        epilog=EXAMPLES,
    )
    hidden = argparse.SUPPRESS  # not in the configuration
    settings = f"settings to start from: {', '.join(PRESETS)}"
    parser.add_argument("--preset", metavar="NAME", help=settings, default=hidden)
    suggest = "print a command that suits the data, and why, instead of training"
    parser.add_argument("--suggest", action="store_true", help=suggest, default=hidden)
    run = "continue the run in this folder, with its settings"
    parser.add_argument("--resume", metavar="RUN", help=run, default=hidden)
    parser.add_argument("--out", metavar="RUN", help="the same as --run_dir", default=hidden)
    skip_bad = "go on without images that the check complains about"
    parser.add_argument("--skip-bad", action="store_true", help=skip_bad, default=hidden)
    report = "write RUN/report.html at the end: figures, curves and maps (default: true)"
    parser.add_argument("--report", type=bool, metavar="BOOL", help=report, default=hidden)
    parser.add_argument("--help_all", action="store_true", help="show every setting", default=hidden)
    add_arguments(parser)
    return parser


def first_help() -> str:
    """Return the help page that fits on a screen: the settings of `FIRST`, the presets, and examples."""
    defaults = {action.dest: action.default for action in build_parser()._actions}
    silent = (None, False, argparse.SUPPRESS)
    settings = [
        f"  --{name:<19} {text}" + ("" if any(defaults[name] is none for none in silent) else f" ({defaults[name]})")
        for name, text in FIRST.items()
    ]
    wrapper = textwrap.TextWrapper(100, initial_indent="  ", subsequent_indent=" " * 12)
    presets = [wrapper.fill(f"{name:<9} {_about(path)}") for name, path in PRESETS.items()]
    return "\n".join(
        (
            "usage: calm train [--preset NAME] --data DIR [--out RUN] [--FLAG VALUE ...]",
            "       calm train --help-all   shows every setting; ... --print_config shows their values",
            *("", "settings (default):", *settings, "", "presets:", *presets, "", EXAMPLES.rstrip()),
        )
    )


def _about(path: Path) -> str:
    """Return the first sentence of the comment that a preset begins with."""
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return re.split(r"\.(?: |$)", " ".join(line.removeprefix("#").strip() for line in lines))[0]


def parse(arguments: Sequence[str]) -> TrainConfig:
    """Return the configuration that flags describe.

    Precedence, from low to high: defaults, ``--preset``, ``--config`` files and flags in their order.

    Raises:
        CalmError: an unknown flag, preset or value; a value out of range.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--preset")
    first.add_argument("--resume")
    first.add_argument("--wsol")
    first.add_argument("--skip-bad", "--skip_bad", action="store_true")
    words = [re.sub("^--out(?==|$)", "--run_dir", word) for word in arguments]  # the other commands' word
    try:
        chosen, rest = first.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise CalmError(f"{error.argument_name} needs a value") from error
    if chosen.wsol is not None:
        names = re.split(r"[+,]", chosen.wsol.replace(" ", ""))
        for name in names:
            if name not in get_args(Localizer):
                raise unknown("method of --wsol", name, get_args(Localizer))
        rest.append(f"--wsol.methods=[{','.join(names)}]")
    if chosen.skip_bad:
        rest.append("--reading.skip_bad=true")
    if chosen.resume is not None:
        if chosen.preset is not None:
            raise CalmError("--resume takes the settings from the run: leave out --preset")
        return _configuration_of_run(Path(chosen.resume), rest)
    if chosen.preset is not None:
        return preset(chosen.preset, *rest, parser=build_parser())
    return parse_config(rest, build_parser())


def _configuration_of_run(run_dir: Path, flags: Sequence[str]) -> TrainConfig:
    """Return the configuration of the run in a folder, which may have moved, changed by flags; an error names the
    settings that another version of calm wrote into it."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise CalmError(
            f"--resume {run_dir}: no run of calm train is there{similar_folder(run_dir)}, for it has no {path}"
        )
    try:
        return load_config(path, *flags, f"--run_dir={run_dir}", parser=build_parser())
    except CalmError as error:
        from calm.train.folder import unknown_settings  # imports PyTorch

        if unknown := unknown_settings(path):
            raise CalmError(
                f"{run_dir} was trained with settings that this version lacks: {', '.join(unknown)[:500]};"
                " it cannot be continued: train anew in another folder"
            ) from error
        raise


def main(arguments: Sequence[str]) -> Path | None:
    """Run `calm train`; returns the run folder, if it trained."""
    if {"-h", "--help"} & set(arguments):
        print(first_help())
        return None
    started = time.monotonic()
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--suggest", action="store_true")
    before.add_argument("--report", nargs="?", const="true", default="true")
    chosen, words = before.parse_known_args(arguments)
    if chosen.report.lower() not in ("true", "false"):
        raise CalmError(f"--report is {chosen.report!r}: give true or false")
    config = parse(["--help" if word == "--help_all" else word for word in words])  # before Lightning: it takes seconds
    if chosen.suggest:
        from calm.train.suggest import suggest

        print(suggest(config))
        return None
    check_code(config, arguments)
    from calm.train.folder import default_run_dir
    from calm.train.run import train

    result = (config.run_dir or default_run_dir(config)) / "result.json"
    ended = result.stat().st_mtime_ns if result.is_file() else None
    run_dir = train(config)
    if chosen.report.lower() == "true" and result.stat().st_mtime_ns != ended:  # it was not finished already
        _report(run_dir, started)
    return run_dir


def _report(run_dir: Path, given: float) -> None:
    """Write the report of a run that has just ended, which is done whatever becomes of the report; say how long it and
    the whole command took, which was ``given`` at that time: the imports before the training take seconds, too."""
    from calm.report import write_report
    from calm.train.folder import is_first_process
    from calm.train.journal import duration

    if is_first_process():
        started = time.monotonic()
        try:
            with needs_extra("report.html", "evaluate"):
                page = write_report([run_dir], out=run_dir / "report.html")
            now = time.monotonic()
            print(f"report: {page}, in {duration(now - started)}; the whole command took {duration(now - given)}")
        except (CalmError, OSError) as error:
            print(f"calm: warning: no report: {error}", file=sys.stderr)


def check_code(config: TrainConfig, words: Sequence[str]) -> None:
    """Trust the code of a backbone that the words of a command name, and not only a file, which may be anybody's.

    Raises:
        CalmError: a file names it, and it is not trusted.
    """
    if config.backbone in [*words, *(word.partition("=")[2] for word in words)]:
        trust(config.backbone)
    check_trusted(config.backbone, "the configuration")
