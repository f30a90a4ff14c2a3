"""A run's settings from presets, YAML files and flags, as a `TrainConfig`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calm.errors import CalmError, unknown
from calm.files import read_yaml
from calm.train.config import SHARED, LossOptions, TrainConfig

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

PRESETS = {path.stem: path for path in sorted(Path(__file__).parents[1].glob("presets/*.yaml"))}
"""The YAML file of each preset, by its name."""


def preset(name: str, *overrides: str, parser: ArgumentParser | None = None) -> TrainConfig:
    """Return the configuration of a preset, changed by flags: ``preset("small", "--data=DIR")``.

    What a preset says of the E-step is for calm-em alone, so that one preset trains all three methods.

    See `load_config` for the other arguments and for the errors.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS, where="--preset")
    e_step = LossOptions(**read_settings(PRESETS[name]).get("loss", {}))
    return parse_config(["--config", str(PRESETS[name]), *overrides], parser, e_step)


def load_config(path: Path | str, *overrides: str, parser: ArgumentParser | None = None) -> TrainConfig:
    """Return the configuration in a YAML file, such as a run's config.yaml, changed by flags (``--epochs=3``).

    Args:
        path: the file.
        overrides: flags as of ``calm train``, which win over the file.
        parser: has the flags of `add_arguments`; None makes one.

    Raises:
        CalmError: no such file, an unknown field, a value that does not fit.
    """
    return parse_config(["--config", str(path), *overrides], parser)


def read_settings(path: Path | str) -> dict[str, Any]:
    """Return what a YAML file of settings says, unchecked; a `CalmError` if it is none. See `calm.files.read_yaml`."""
    settings = read_yaml(path, "configuration")
    if not isinstance(settings, dict):
        raise CalmError(f"configuration {path} is no list of 'setting: value'")
    return settings


def add_arguments(parser: ArgumentParser) -> None:
    """Add ``--config`` and one flag for each field of `TrainConfig` to a parser; fields of a group with a dot."""
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with settings; later flags win")
    parser.add_class_arguments(TrainConfig)


def parse_config(
    arguments: Sequence[str], parser: ArgumentParser | None = None, e_step: LossOptions | None = None
) -> TrainConfig:
    """Return the configuration that flags and the files after ``--config`` describe, of which later ones win; see
    `load_config`. A SystemExit comes after ``--help`` or ``--print_config``.

    Options ``e_step`` are dropped, instead of refused, for a method that does not have them.
    """
    if parser is None:
        from jsonargparse import ArgumentParser

        parser = ArgumentParser(prog="calm train", exit_on_error=False, allow_abbrev=False)
        add_arguments(parser)
    paths = [value for flag, value in pairwise(arguments) if flag == "--config"]
    paths += [word.partition("=")[2] for word in arguments if word.startswith("--config=")]
    for path in paths:  # with limits on size and aliases, before the parser reads it
        read_settings(path)
    try:
        values = parser.instantiate(parser.parse_args(list(arguments))).as_dict()
        if values["method"] != "calm-em" and e_step:
            own, shared = values["loss"], SHARED if values["method"] == "calm-ml" else ()
            foreign = {field.name: field.default for field in fields(LossOptions) if field.name not in shared}
            presets = {name: value for name, value in foreign.items() if getattr(own, name) == getattr(e_step, name)}
            values["loss"] = replace(own, **presets)
        return TrainConfig(**{field.name: values[field.name] for field in fields(TrainConfig)})
    except Exception as error:  # on a value of an unexpected type the parser fails in any way
        if isinstance(error, CalmError) and all(path in str(error) for path in paths):
            raise
        raise CalmError(f"{error} (read: {', '.join(paths)})" if paths else str(error)) from error
