"""The three architectures of the released code, ResNet-50, VGG-16 and Inception-v3, without their classifiers.

They are torchvision's networks with fewer strides, so that 224 x 224 pixels give a grid of 28 x 28 (stride 8) or
14 x 14 (stride 16) locations. Their parameters have the names and shapes of the released checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import (
    Inception_V3_Weights,
    ResNet,
    ResNet50_Weights,
    VGG16_BN_Weights,
    VGG16_Weights,
    WeightsEnum,
)
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC
from torchvision.models.resnet import Bottleneck
from torchvision.models.vgg import cfgs, make_layers

from calm.errors import CalmError


class ResNet50(ResNet):  # type: ignore[misc]
    """ResNet-50 with D = 2048 channels.

    ``layer4`` has stride 1; with ``large_feature_map`` so has ``layer3``. Nothing is dilated, so the weights are
    torchvision's, one for one.

    Args:
        pretrained: Whether to start from torchvision's first ImageNet weights instead of random ones.
        large_feature_map: Whether the stride is 8 instead of 16.
    """

    out_channels = 2048

    def __init__(self, *, pretrained: bool = False, large_feature_map: bool = True) -> None:
        super().__init__(Bottleneck, [3, 4, 6, 3])
        del self.avgpool, self.fc
        for stage in (self.layer4, self.layer3) if large_feature_map else (self.layer4,):
            stage[0].conv2.stride = (1, 1)
            stage[0].downsample[0].stride = (1, 1)
        if pretrained:
            state = imagenet_weights(ResNet50_Weights.IMAGENET1K_V1)
            load_pretrained(self, {key: value for key, value in state.items() if not key.startswith("fc.")})

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 2048, h, w) of normalised images (B, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features


class VGG16(nn.Module):
    """VGG-16 with D = 1024 channels.

    It is torchvision's ``features`` without the last pooling (without the last two if ``large_feature_map``), layers
    numbered without gaps; then a new 3 x 3 convolution ``conv6`` to 1024 channels, with BatchNorm ``bn6`` if
    ``use_bn``, and ReLU.

    Args:
        pretrained: Whether ``features`` start from torchvision's ImageNet weights; ``conv6`` and ``bn6`` are new.
        large_feature_map: Whether the stride is 8 instead of 16.
        use_bn: Whether BatchNorm follows every convolution.
    """

    out_channels = 1024

    def __init__(self, *, pretrained: bool = False, large_feature_map: bool = True, use_bn: bool = True) -> None:
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
        """Return features (B, 1024, h, w) of normalised images (B, 3, H, W)."""
        features: Tensor = self.relu(self.bn6(self.conv6(self.features(images))))
        return features


def _without_last_pools(count: int) -> tuple[list[str | int], list[int]]:
    """Return configuration D without its last ``count`` poolings, and the places in D that these had."""
    full = cfgs["D"]
    dropped = [place for place, item in enumerate(full) if item == "M"][-count:]
    return [item for place, item in enumerate(full) if place not in dropped], dropped


def _renumber(state: Mapping[str, Tensor], dropped: list[int], *, use_bn: bool) -> dict[str, Tensor]:
    """Return torchvision's ``features.N.name`` under the numbers that remain without some poolings.

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


_NEW = ("A3_1b.", "A3_2b.")
_BEYOND = ("AuxLogits.", "Mixed_7", "fc.")


class InceptionV3(nn.Module):
    """Inception-v3 with D = 1024 channels.

    It is torchvision's network up to and including ``Mixed_6e``, with other paddings and with ``Mixed_6a`` at stride 1,
    then two new 3 x 3 convolutions ``A3_1b`` and ``A3_2b``. The small map has one more pooling before ``Mixed_6a``.
    torchvision's own rescaling of the input for its Inception weights is not applied, as in the released code.

    Args:
        pretrained: Whether torchvision's blocks start from its ImageNet weights; ``A3_1b`` and ``A3_2b`` are new.
        large_feature_map: Whether the stride is 8 instead of 16.
        use_bn: Whether ``A3_1b`` and ``A3_2b`` have BatchNorm; the blocks before always have it.
    """

    out_channels = 1024

    def __init__(self, *, pretrained: bool = False, large_feature_map: bool = True, use_bn: bool = True) -> None:
        super().__init__()
        self.large_feature_map = large_feature_map
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, kernel_size=3, stride=2, padding=1)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, kernel_size=3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, kernel_size=3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, kernel_size=1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, kernel_size=3)
        self.Mixed_5b = InceptionA(192, pool_features=32)
        self.Mixed_5c = InceptionA(256, pool_features=64)
        self.Mixed_5d = InceptionA(288, pool_features=64)
        self.Mixed_6a = _UnstridedInceptionB(288)
        self.Mixed_6b = InceptionC(768, channels_7x7=128)
        self.Mixed_6c = InceptionC(768, channels_7x7=160)
        self.Mixed_6d = InceptionC(768, channels_7x7=160)
        self.Mixed_6e = InceptionC(768, channels_7x7=192)
        self.A3_1b = _new_convolution(768, self.out_channels, use_bn)
        self.A3_2b = _new_convolution(self.out_channels, self.out_channels, use_bn)
        initialise(self)
        if pretrained:
            state = imagenet_weights(Inception_V3_Weights.IMAGENET1K_V1)
            kept = {key: value for key, value in state.items() if not key.startswith(_BEYOND)}
            load_pretrained(self, kept, new_layers=_NEW)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 1024, h, w) of normalised images (B, 3, H, W)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        if not self.large_feature_map:
            x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # The released code computes Mixed_6e, but goes on from Mixed_6d by mistake: no weights rely on it.
        features: Tensor = self.A3_2b(self.A3_1b(self.Mixed_6e(x)))
        return features


class _UnstridedInceptionB(InceptionB):  # type: ignore[misc]
    """torchvision's grid reduction with stride 1 and padding 1 in convolutions and pooling: it keeps the grid."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(in_channels)
        for reduction in (self.branch3x3.conv, self.branch3x3dbl_3.conv):
            reduction.stride, reduction.padding = (1, 1), (1, 1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, F.max_pool2d(x, 3, stride=1, padding=1)]


def _new_convolution(in_channels: int, out_channels: int, use_bn: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)]
    if use_bn:
        layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers, nn.ReLU(inplace=True))


def initialise(module: nn.Module) -> None:
    """Initialise every convolution by He's normal rule (fan out, ReLU) and its bias with zero; nothing else changes."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def imagenet_weights(weights: WeightsEnum) -> dict[str, Tensor]:
    """Return the tensors of a torchvision weight set, from torch's hub cache or downloaded into it.

    The file is read without executing anything in it, and a download must match its published hash.
    """
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CalmError(
            f"cannot get the pretrained weights {weights.url}: {error}. Connect to the network, or put the "
            f"file into {Path(torch.hub.get_dir()) / 'checkpoints'}, or start from random weights with "
            "pretrained=False (calm train: --model.pretrained false)"
        ) from error
    return state


def load_pretrained(backbone: nn.Module, state: Mapping[str, Tensor], new_layers: tuple[str, ...] = ()) -> None:
    """Copy ``state``, which must fit, into ``backbone``; only the layers named in ``new_layers`` may be missing."""
    try:
        missing, unexpected = backbone.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CalmError(f"the pretrained weights do not fit {type(backbone).__name__}: {error}") from error
    lost = [key for key in missing if not key.startswith(new_layers)]
    if lost or unexpected:
        raise CalmError(
            f"the pretrained weights do not fit {type(backbone).__name__}: missing {lost or 'nothing'}, "
            f"unexpected {unexpected or 'nothing'}"
        )
