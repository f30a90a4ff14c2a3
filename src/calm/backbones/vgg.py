"""VGG-16 with a fine grid: torchvision's configuration D, its last poolings taken out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torchvision.models import VGG16_BN_Weights, VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from calm.backbones.initial import imagenet_weights, initialise, load_pretrained

__all__ = ["VGG16"]


class VGG16(nn.Module):
    """VGG-16 without classifier, in the released layout: D = 1024.

    torchvision's ``features`` without the last pooling (without the last two if ``large_feature_map``), its
    layers numbered without gaps; then a new 3 x 3 convolution ``conv6`` to 1024 channels, with BatchNorm
    ``bn6`` if ``use_bn``, and ReLU. 224 x 224 pixels give a 28 x 28 grid (stride 8), or 14 x 14 (stride 16).

    Args:
        pretrained: start ``features`` from torchvision's ImageNet weights; ``conv6`` and ``bn6`` are new.
        large_feature_map: stride 8 instead of 16.
        use_bn: BatchNorm after every convolution.
    """

    out_channels = 1024

    def __init__(
        self, *, pretrained: bool = False, large_feature_map: bool = True, use_bn: bool = True
    ) -> None:
        super().__init__()
        layout, dropped = _without_last_pools(2 if large_feature_map else 1)
        self.features = make_layers(layout, batch_norm=use_bn)
        self.conv6 = nn.Conv2d(512, self.out_channels, kernel_size=3, padding=1)
        self.bn6 = nn.BatchNorm2d(self.out_channels) if use_bn else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        initialise(self)
        if pretrained:
            weights = VGG16_BN_Weights if use_bn else VGG16_Weights
            state = imagenet_weights(weights.IMAGENET1K_V1)
            load_pretrained(self, _renumber(state, dropped, use_bn=use_bn), new_layers=("conv6.", "bn6."))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 1024, h, w) of normalised images (B, 3, H, W)."""
        features: Tensor = self.relu(self.bn6(self.conv6(self.features(images))))
        return features


def _without_last_pools(count: int) -> tuple[list[str | int], list[int]]:
    """Configuration D without its last ``count`` poolings, and the places in D that these had."""
    full = cfgs["D"]
    dropped = [place for place, item in enumerate(full) if item == "M"][-count:]
    return [item for place, item in enumerate(full) if place not in dropped], dropped


def _renumber(state: Mapping[str, Tensor], dropped: list[int], *, use_bn: bool) -> dict[str, Tensor]:
    """torchvision's ``features.N.name`` under the numbers that remain when some poolings are gone.

    A convolution of the configuration is 3 layers of ``features`` with BatchNorm, 2 without; a pooling is 1.
    """
    numbers: dict[int, int] = {}
    old = new = 0
    for place, item in enumerate(cfgs["D"]):
        for _ in range(1 if item == "M" else 3 if use_bn else 2):
            numbers[old] = new
            old += 1
            new += place not in dropped
    renamed = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        if part == "features":
            number, _, name = rest.partition(".")
            renamed[f"features.{numbers[int(number)]}.{name}"] = value
    return renamed
