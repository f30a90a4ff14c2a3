"""The `calm train` command: the fields of `TrainConfig` as flags, YAML files and presets."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from calm.cli import parsing
from calm.errors import CalmError, unknown
from calm.files import read_yaml
from calm.train.config import LossOptions, TrainConfig

__all__ = ["build_parser", "load_config", "main", "parse", "preset", "preset_names"]

EXAMPLES = """\
examples:
  calm train --preset birds --data birds                            small network from scratch, minutes on a CPU
  calm train --preset small --data DIR --method cam                 any small images; CAM, to compare
  calm train --data CUB_200_2011                                    the released recipe: pretrained resnet50, 40 epochs
  calm train --preset small --data DIR --loss.temperature 0.5:1.0   soft E-step, annealed
  calm train --preset small --data DIR --print_config               show every setting; a file for --config
  calm train --resume runs/birds-tiny_resnet-calm-em                continue a run; so does the same command again
"""


SKIP_BAD = ("--skip-bad", "--skip_bad")
"""Short for ``--reading.skip_bad true``: the report of a failed check asks for it."""


def preset_names() -> list[str]:
    """Names for ``--preset``: the YAML files of ``calm/presets``."""
    names = (path.name for path in files("calm").joinpath("presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def build_parser() -> parsing.Parser:
    """The parser: one flag per field, fields of a group with a dot. ``--preset`` and ``--resume`` are only described
    here: `parse` takes them out before."""
    parser = parsing.Parser(
        prog="calm train",
        usage="calm train [--preset NAME] --data DIR [--FLAG VALUE ...]",
        description="Train CALM or CAM on images in any layout that `calm data check` reads.",
        epilog=EXAMPLES,
    )
    presets = ", ".join(preset_names())
    hidden = argparse.SUPPRESS  # not in the configuration
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with settings; later flags win")
    parser.add_argument("--preset", metavar="NAME", help=f"settings to start from: {presets}", default=hidden)
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder", default=hidden)
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="go on without images that the check complains about",
        default=hidden,
    )
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(arguments: Sequence[str]) -> TrainConfig:
    """The configuration that flags describe.

    Precedence, from low to high: defaults, ``--preset``, ``--config`` files and flags in their order.

    Raises:
        CalmError: an unknown flag, preset or value; a value out of range.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    spelled_out = ["--reading.skip_bad=true" if flag in SKIP_BAD else flag for flag in arguments]
    chosen, rest = _take_out("--preset", spelled_out)
    resume, rest = _take_out("--resume", rest)
    if resume is not None:
        if chosen is not None or rest:
            given = " ".join(rest or ["--preset"])
            raise CalmError(f"--resume takes all settings from the run; it was given with {given}")
        return load_config(Path(resume) / "config.yaml")
    return _config(rest) if chosen is None else preset(chosen, *rest)


def load_config(path: Path | str, *overrides: str) -> TrainConfig:
    """The configuration in a YAML file, such as a run's config.yaml, with flags (``--epochs=3``) that win.

    Raises:
        CalmError: no such file, an unknown field, a value that does not fit.
    """
    return _config(["--config", str(path), *overrides])


def preset(name: str, *overrides: str) -> TrainConfig:
    """The configuration of a preset, with flags that win: ``preset("small", "--data=DIR")``.

    What a preset says of the E-step is for calm-em alone, so that one preset trains all three methods.
    """
    path = _preset_path(name)
    e_step = LossOptions(**yaml.safe_load(path.read_text(encoding="utf-8")).get("loss", {}))
    with _files_named(overrides):
        values = _values(["--config", str(path), *overrides])
        if values["method"] != "calm-em" and values["loss"] == e_step:
            values["loss"] = LossOptions()
        return TrainConfig(**values)


def main(arguments: Sequence[str]) -> Path:
    """Run `calm train`; returns the run folder."""
    config = parse(arguments)  # before Lightning, whose import takes seconds
    from calm.train.run import train

    return train(config)


def _config(arguments: Sequence[str]) -> TrainConfig:
    with _files_named(arguments):
        return TrainConfig(**_values(arguments))


def _values(arguments: Sequence[str]) -> dict[str, Any]:
    values = parsing.parse(build_parser(), arguments)
    return {field.name: values[field.name] for field in fields(TrainConfig)}


@contextmanager
def _files_named(arguments: Sequence[str]) -> Iterator[None]:
    """Read the files after ``--config`` carefully before the parser does, and let errors say which were read."""
    read = _config_files(arguments)
    for file in read:
        if not isinstance(read_yaml(file, "configuration"), dict):
            raise CalmError(f"configuration {file} is no list of 'setting: value'")
    try:
        yield
    except Exception as error:
        if not read or (isinstance(error, CalmError) and all(file in str(error) for file in read)):
            raise
        # On values that it never expected the parser fails in any way.
        raise CalmError(f"{error} (read: {', '.join(read)})") from error


def _config_files(arguments: Sequence[str]) -> list[str]:
    """The files after ``--config``."""
    after = [value for flag, value in pairwise(arguments) if flag == "--config"]
    return after + [word.partition("=")[2] for word in arguments if word.startswith("--config=")]


def _take_out(flag: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of a flag, as ``--flag VALUE`` or ``--flag=VALUE``, and the other arguments."""
    rest: list[str] = []
    value: str | None = None
    remaining = iter(arguments)
    for argument in remaining:
        if argument == flag:
            value = next(remaining, None)
            if value is None:
                raise CalmError(f"{flag} needs a value")
        elif argument.startswith(flag + "="):
            value = argument.partition("=")[2]
        else:
            rest.append(argument)
    return value, rest


def _preset_path(name: str) -> Path:
    if name not in preset_names():
        raise unknown("preset", name, preset_names(), where="--preset")
    return Path(str(files("calm").joinpath("presets", f"{name}.yaml")))
