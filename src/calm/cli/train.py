"""The `calm train` command: the fields of `TrainConfig` as flags, YAML files and presets."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from calm.cli import parsing
from calm.config import check_trusted, trust
from calm.errors import CalmError
from calm.train.config import PRESETS, TrainConfig, add_arguments, load_config, parse_config, preset

EXAMPLES = """\
examples:
  calm train --preset birds --data birds                            small network from scratch, minutes on a CPU
  calm train --preset small --data DIR --method cam                 any small images; CAM, to compare
  calm train --data CUB_200_2011                                    the released recipe: pretrained resnet50, 40 epochs
  calm train --preset small --data DIR --loss.temperature 0.5:1.0   soft E-step, annealed
  calm train --preset small --data DIR --print_config               show every setting; a file for --config
  calm train --data CUB_200_2011 --method cam --wsol acol           ACoL, a method of weakly-supervised localization
  calm train --resume runs/birds-tiny_resnet-calm-em                continue a run; so does the same command again
  calm train --resume RUN --epochs 60 --data DIR                    more epochs, for data that have moved
"""


def build_parser() -> parsing.Parser:
    """Make the parser: one flag per field of `TrainConfig`, fields of a group with a dot.

    ``--preset``, ``--resume`` and ``--skip-bad`` are in it for the help page only: `parse` reads them before.
    """
    parser = parsing.Parser(
        prog="calm train",
        usage="calm train [--preset NAME] --data DIR [--FLAG VALUE ...]",
        description="Train CALM or CAM on images in any layout that `calm data check` reads.",
        epilog=EXAMPLES,
    )
    hidden = argparse.SUPPRESS  # not in the configuration
    settings = f"settings to start from: {', '.join(PRESETS)}"
    parser.add_argument("--preset", metavar="NAME", help=settings, default=hidden)
    run = "continue the run in this folder, with its settings"
    parser.add_argument("--resume", metavar="RUN", help=run, default=hidden)
    skip_bad = "go on without images that the check complains about"
    parser.add_argument("--skip-bad", action="store_true", help=skip_bad, default=hidden)
    add_arguments(parser)
    return parser


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
    try:
        chosen, rest = first.parse_known_args(list(arguments))
    except argparse.ArgumentError as error:
        raise CalmError(f"{error.argument_name} needs a value") from error
    if chosen.wsol is not None:
        rest.append(f"--wsol.methods=[{chosen.wsol.replace('+', ',')}]")
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


def main(arguments: Sequence[str]) -> Path:
    """Run `calm train`; returns the run folder."""
    config = parse(arguments)  # before Lightning, whose import takes seconds
    named = [*arguments, *(word.partition("=")[2] for word in arguments)]
    if config.backbone in named:  # and not only in a file, which may be anybody's
        trust(config.backbone)
    check_trusted(config.backbone, "the configuration")
    from calm.train.run import train

    return train(config)
