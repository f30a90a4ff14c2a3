"""The folder of an experiment, ``save_root/experiment_name``, which training makes and the evaluations share.

::

    log.log                   what the commands printed
    last_checkpoint.pth.tar   the weights after the last epoch, for the released code too
    performance_log.pickle    figures by split and epoch; performance_log.json is the same
    reports/                  the same by epoch, one JSON object a file
    measure_PROCESS.pickle    remove-and-classify; .json is the same
    run/                      the run folder of this package's training
"""

from __future__ import annotations

import math
import pickle
import shutil
from pathlib import Path
from typing import Any

from calm.atomic import write_bytes, write_json
from calm.errors import CalmError
from calm.released_commands.flags import Flags
from calm.released_file import FILE_NAME

__all__ = ["OWN_NAMES", "check_place", "clear", "finished", "save_measures"]

OWN_NAMES = (
    "log.log",
    FILE_NAME,
    "performance_log.*",
    "reports",
    "measure_*",
    "cue_*",
    "run",
    "start",
    "proxy",
)
"""What the commands write into an experiment's folder, as patterns; nothing else is ever deleted."""


def check_place(flags: Flags) -> None:
    """See that the experiment's folder is one folder below ``--save_root``.

    Raises:
        CalmError: it is not, or a file is in its place.
    """
    root, folder = Path(flags.save_root).resolve(), flags.folder.resolve()
    if root not in folder.parents:
        raise CalmError(
            f"--experiment_name={flags.experiment_name!r} is no folder below --save_root={flags.save_root!r}: "
            "give a plain name"
        )
    if folder.exists() and not folder.is_dir():
        raise CalmError(f"{flags.folder} is a file: choose another --experiment_name")


def finished(flags: Flags) -> bool:
    """Whether the folder holds a training that came to its end."""
    return (flags.folder / FILE_NAME).is_file()


def clear(flags: Flags) -> None:
    """Delete a former experiment for ``--override_cache=True``, if nothing but that is lost.

    Raises:
        CalmError: the folder holds the checkpoint that is to be loaded, or files that no command wrote. Nothing was
            deleted then.
    """
    folder = flags.folder
    if not folder.is_dir():
        return
    if flags.use_load_checkpoint:
        source = folder if flags.load_checkpoint is None else Path(flags.load_checkpoint)
        if folder.resolve() in (source.resolve(), *source.resolve().parents):
            raise CalmError(
                f"--override_cache=True would delete {folder} with the checkpoint in it that is to be loaded: "
                "choose another --experiment_name"
            )
    foreign = [path.name for path in folder.iterdir() if not any(map(path.match, OWN_NAMES))]
    if foreign or folder.is_symlink():
        what = "is a link" if folder.is_symlink() else f"holds {sorted(foreign)[0]!r}, which no command wrote"
        raise CalmError(f"--override_cache=True does not delete {folder}: it {what}. Move it away yourself")
    shutil.rmtree(folder)


def save_measures(path: Path, measures: Any) -> None:
    """Write plain values to ``path``.pickle, as the released code does, and to ``path``.json, where NaN is null."""
    write_bytes(path.with_name(f"{path.name}.pickle"), pickle.dumps(measures))
    write_json(path.with_name(f"{path.name}.json"), _without_nan(measures))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_without_nan(member) for member in value]
    return None if isinstance(value, float) and math.isnan(value) else value
