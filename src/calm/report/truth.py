"""What is true of the images of a gallery: boxes, regions, and which class or pair of classes the maps are about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from calm.data.cues import group_mask
from calm.data.images import read_rgb
from calm.data.loading import load_split
from calm.data.records import Record, Split
from calm.errors import CalmError
from calm.evaluate.cue_data import read_cue_data
from calm.evaluate.run_split import READING
from calm.render import Picture
from calm.report.found import Group
from calm.report.names import listed, species_name

__all__ = ["Scene", "scenes"]


@dataclass(frozen=True)
class Scene:
    """An image and what is true of it.

    Attributes:
        record: the image and its annotation.
        picture: uint8 RGB (H, W, 3), of its own size.
        boxes: in pixels of the picture.
        region: where it should be seen, (h, w) in [0, 1], of any size; None if nobody said.
        classes: what the maps are about: the class, or two for a difference map.
        label: the name of the image's class.
        question: what was asked, if not the class.
    """

    record: Record
    picture: Picture
    boxes: tuple[tuple[int, int, int, int], ...]
    region: Float[Tensor, "h w"] | None
    classes: tuple[int, ...]
    label: str
    question: str | None = None


def scenes(group: Group, ids: Sequence[str]) -> list[Scene]:
    """The images by id, read where the provenance says that the data are.

    Raises:
        CalmError: the data are gone, or no longer hold one of the images.
        OSError: a file cannot be read.
    """
    split = _split(group)
    places = {record.id: record for record in split.records}
    missing = [name for name in ids if name not in places]
    if missing:
        raise CalmError(f"split {split.name!r} of {split.root} has no image {missing[0]!r} now")
    records = [places[name] for name in ids]
    if group.benchmark == "cue-localization":
        return _cue_scenes(split, records, Path(group.data["root"]))
    return [
        Scene(
            record,
            _picture(split, record),
            record.boxes,
            _masks(record),
            (record.label,),
            species_name(split.class_names[record.label]),
        )
        for record in records
    ]


def _split(group: Group) -> Split:
    data = group.data
    if not data.get("root") or not Path(data["root"]).is_dir():
        raise CalmError(f"there is no folder {data.get('root', '(not recorded)')}")
    options: dict[str, Any] = {
        name: data[name] for name in ("layout", "metadata_root", *READING) if data.get(name) is not None
    }
    return load_split(data["root"], data.get("split", "test"), **options)


def _picture(split: Split, record: Record) -> Picture:
    return read_rgb(record.path, exif=split.exif)


def _masks(record: Record) -> Tensor | None:
    """The union of the masks of an image, (h, w)."""
    union: Any = None
    for path in record.masks:
        with Image.open(path) as image:
            inside = np.asarray(image.convert("L")) > 0
        union = inside if union is None else union | inside
    return None if union is None else torch.from_numpy(union).float()


def _cue_scenes(split: Split, records: Sequence[Record], root: Path) -> list[Scene]:
    """Each image with a pair of its class that differs in as few part groups as possible, one of them visible."""
    chosen = replace(split, records=tuple(records))
    data = read_cue_data(chosen, root)
    regions = data.regions(chosen.records, torch.arange(len(records)))
    found = []
    for place, record in enumerate(records):
        if place not in data.samples:
            raise CalmError(f"image {record.id!r} shows no part that tells its class from another")
        pair = min((data.pairs[number] for number in data.samples[place]), key=lambda pair: len(pair.groups))
        other = pair.second if record.label == pair.first else pair.first
        parts = listed([data.groups[number].name for number in pair.groups])
        found.append(
            Scene(
                record,
                _picture(split, record),
                (),
                group_mask(regions[place], pair.groups).float(),
                (pair.first, pair.second),
                species_name(split.class_names[record.label]),
                f"versus {species_name(split.class_names[other])}: {parts}",
            )
        )
    return found
