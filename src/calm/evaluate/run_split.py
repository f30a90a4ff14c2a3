"""The images that models are judged by: where a data set lacks the split, what their runs kept out of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calm.data.digest import fingerprint
from calm.data.loading import Layout, SplitName, load_split
from calm.data.records import Split
from calm.documents import read_yaml
from calm.errors import CalmError, shown

__all__ = ["READING", "run_split"]

READING: Mapping[str, tuple[type, ...]] = {"val_fraction": (int, float), "present_classes_only": (bool,)}
"""What of a run's configuration decides which images a carved split has, and how classes are numbered."""


def run_split(
    root: Path,
    name: SplitName,
    models: Sequence[str],
    *,
    layout: Layout = "auto",
    metadata_root: Path | None = None,
) -> tuple[Split, dict[str, Any]]:
    """A split, carved from training images (`calm.data.loading`) as the runs of the models did it.

    Args:
        root: of the data set.
        name: of the split.
        models: run folders, the models in them, or others, which say nothing about splits.
        layout: as for ``load_split``.
        metadata_root: as for ``load_split``.

    Returns:
        The split, and by which of `READING` it was read.

    Raises:
        CalmError: as ``load_split``; a run's configuration is damaged; two runs read the split differently.
    """
    readings = {model: reading for model in models if (reading := _reading(Path(model)))}
    ways = {str(reading): (model, reading) for model, reading in readings.items()} or {"": ("", {})}
    found: list[tuple[str, Split, dict[str, Any]]] = [
        (model, load_split(root, name, layout=layout, metadata_root=metadata_root, **reading), reading)
        for model, reading in ways.values()
    ]
    first, split, reading = found[0]
    for model, other, another in found[1:]:
        if fingerprint(other) != fingerprint(split):
            raise CalmError(
                f"{name} of {root} has other images or classes for {first} ({_told(reading)}) than for {model}"
                f" ({_told(another)}): evaluate them apart"
            )
    return split, reading


def _reading(model: Path) -> dict[str, Any]:
    """What the config.yaml of a model's run says; nothing of a model that is in no run."""
    path = next(
        (path for path in (model / "config.yaml", model.parent / "config.yaml") if path.is_file()), None
    )
    if path is None:
        return {}
    config = read_yaml(path, "configuration")
    reading = config.get("reading", {}) if isinstance(config, dict) else None
    if not isinstance(reading, dict):
        raise CalmError(f"configuration {path} has no list 'reading' of 'setting: value'")
    for name, types in READING.items():
        if name in reading and type(reading[name]) not in types:
            raise CalmError(f"configuration {path}: reading.{name} is {shown(reading[name])}")
    return {name: reading[name] for name in READING if name in reading}


def _told(reading: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in reading.items())
