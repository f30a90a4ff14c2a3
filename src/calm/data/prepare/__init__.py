"""Unpack the archives that data sets are published as into folders that this package reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from calm.data.prepare.archives import Prepared, list_archives, place_metadata
from calm.data.prepare.sets import (
    name_as_listed,
    prepare_cub,
    prepare_ilsvrc,
    prepare_openimages,
    prepare_tiny_imagenet,
)
from calm.errors import CalmError, unknown
from calm.files import remove_abandoned

DataSet: TypeAlias = Literal["cub", "ilsvrc", "openimages30k", "tiny-imagenet"]

DATA_SETS: dict[DataSet, str] = {"cub": "CUB", "ilsvrc": "ILSVRC", "openimages30k": "OpenImages", "tiny-imagenet": ""}
"""Names of the data sets for the command, and of their folders in the released layout."""


def prepare(
    name: DataSet,
    archives: Sequence[str | Path],
    out: str | Path,
    *,
    classes: str = "",
    metadata_url: str = "",
    metadata_sha256: str = "",
    partial: bool = False,
) -> Prepared:
    """Check and unpack archives; a run that was stopped is finished by the same call.

    Args:
        name: the data set.
        archives: archives, or folders of them.
        out: folder that gets ``dataset/`` and ``metadata/`` as the released code lays them out; for Tiny ImageNet,
            ``images/``, ``metadata/`` and ``classes.txt``.
        classes: of Tiny ImageNet: WordNet ids separated by commas, or a file of them; empty: all 200.
        metadata_url: https address of an archive of the released metadata, or ``published`` for that of the published
            evaluator. Nothing is fetched without it.
        metadata_sha256: SHA-256 of that archive.
        partial: whether wrong checksums and counts are notes instead of errors.

    Raises:
        CalmError: see `calm.data.prepare.sets`; the message says what to get where.
    """
    if name not in DATA_SETS:
        raise unknown("data set", name, DATA_SETS)
    if classes and name != "tiny-imagenet":
        raise CalmError(f"--classes is for tiny-imagenet, not {name}")
    if name == "tiny-imagenet" and metadata_url:
        raise CalmError("--metadata_url: tiny-imagenet has its lists in the archive")
    if metadata_sha256 and not metadata_url:
        raise CalmError("--metadata_sha256 needs --metadata_url")
    available, out = list_archives([Path(path) for path in archives]), Path(out)
    for folder in (out.parent, out / "metadata", out / "dataset", *(out / "dataset").glob("*/")):
        remove_abandoned(folder)
    if name == "tiny-imagenet":
        prepared = Prepared(name, out, partial=partial)
        prepare_tiny_imagenet(available, out, prepared, classes)
        return prepared
    released = DATA_SETS[name]
    prepared = Prepared(name, out / "dataset" / released, partial=partial)
    unpack = {"cub": prepare_cub, "ilsvrc": prepare_ilsvrc, "openimages30k": prepare_openimages}[name]
    unpack(available, out, prepared)
    place_metadata(released, out, available, prepared, metadata_url, metadata_sha256)
    if name == "ilsvrc":
        name_as_listed(out, prepared)
    return prepared
