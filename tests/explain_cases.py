"""A small model and pictures, for the tests of explanations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from calm.images import Preprocessing
from calm.model import CalmHead, CalmModel, CamHead, ModelConfig

__all__ = ["NAMES", "make_model", "write_picture"]

NAMES = ("001.Red_Finch", "002.Blue_Bunting", "003.Green_Finch", "004.Owl", "005.Auk", "006.[bold]Wren")


class Net(nn.Module):
    """16x16 pixels to a 4x4 grid."""

    out_channels = 3

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images, 4)


def make_model(method: str) -> CalmModel:
    torch.manual_seed(0)
    head = CamHead(3, 6) if method == "cam" else CalmHead(3, 6)
    config = ModelConfig("custom", 6, method)  # type: ignore[arg-type]
    return CalmModel(config, Net(), head, class_names=NAMES, preprocessing=Preprocessing((16, 16))).eval()


def write_picture(path: Path, size: tuple[int, int] = (40, 24), seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path
