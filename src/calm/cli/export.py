"""``calm export``: write a model as one file for another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from calm.config import ExportFormat

if TYPE_CHECKING:
    from calm.exporting import Exported


def export_model(
    *,
    model: str,
    out: Path,
    to: ExportFormat = "onnx",
    kind: str | None = None,
    preprocess: bool = False,
    dynamic_size: bool | None = None,
) -> Exported:
    """Write a model as one file that returns probabilities and the maps of chosen classes in the same pass.

    The file takes `image` and `classes` (int64, a row of class indices for each image), and returns `probs`, `maps`
    of these classes on the model's grid and, for CALM, `prior`. Names of classes, preprocessing and the kind of maps
    are in its metadata. Its results are compared with PyTorch's, on other batches and sizes of images than it was
    traced with, before it gets its name; docs/export.md shows how to use it, and examples/onnx_map.py is a program.

    Args:
        model: a run folder of calm train, a saved model, or a hub id.
        out: the file to write: .onnx, .pt2 (torch-export) or .pte (executorch).
        to: for which runtime: onnx (the extra `export`), torch-export, or executorch (the extra of that name).
        kind: which maps it returns: joint, posterior, prior or evidence for CALM; cam or evidence for CAM.
            Default: joint or cam.
        preprocess: let it take uint8 pictures (batch, height, width, channels) of any size, which it resizes and
            normalises itself. Otherwise images are float32 (batch, channels, height, width), normalised.
        dynamic_size: whether images may have another size than the model's. Default: where the network allows it.

    Returns:
        What was written, and how far it is from PyTorch.

    Raises:
        CalmError: a wrong option, a network that cannot be exported, or results that differ; no file is left.
    """
    from calm.exporting import export
    from calm.model import load

    return export(load(model), out, to, kind=kind, preprocess=preprocess, dynamic_size=dynamic_size)
