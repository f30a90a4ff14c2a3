"""The maps behind a result, made again for a few images from what its provenance names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm.checkpoint import load
from calm.errors import CalmError
from calm.evaluate.map_folder import read_map
from calm.evaluate.result import Result
from calm.evaluate.subject import model_subject
from calm.maps import difference
from calm.report.truth import Scene

__all__ = ["maps_of"]


def maps_of(result: Result, scenes: Sequence[Scene]) -> list[Tensor]:
    """One map (h, w) for each scene: of its class, or the difference of its two classes.

    Raises:
        CalmError: the model or the folder of maps is gone, or a map is missing.
    """
    about: Mapping[str, Any] = result.provenance.get("subject", {})
    if about.get("maps"):
        return [_stored(Path(about["maps"]), scene.record.id) for scene in scenes]
    source = about.get("model")
    if not source:
        raise CalmError("its provenance names no model")
    if not Path(source).is_absolute():
        raise CalmError(
            f"its model {source} is no folder: to see its maps, download it and evaluate the folder"
        )
    if not Path(source).exists():
        raise CalmError(f"its model is no longer at {source}")
    model = load(source)
    subject = model_subject(model, method=about.get("method"), **(about.get("options") or {}))
    if subject.about["weights"] != about.get("weights"):
        raise CalmError(f"the model at {source} has other weights now: evaluate it again")
    images = model.preprocess([scene.picture for scene in scenes])
    maps = subject.look(images).maps(torch.tensor([scene.classes for scene in scenes])).detach()
    return list(maps[:, 0] if maps.shape[1] == 1 else difference(maps[:, 0], maps[:, 1]))


def _stored(folder: Path, name: str) -> Tensor:
    for path in (folder / f"{name}.npy", (folder / name).with_suffix(".npy")):
        if path.is_file():
            return torch.from_numpy(read_map(path)).float()
    raise CalmError(f"{folder} has no map of {name} now")
