"""The three architectures of the released code, ResNet-50, VGG-16 and Inception-v3, without their classifiers.

They are torchvision's networks with fewer strides, so that 224 x 224 pixels give a grid of 28 x 28 (stride 8) or
14 x 14 (stride 16) locations. Their parameters have the names and shapes of the released checkpoints.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from torchvision.models import inception, resnet, vgg

from calm.backbones.weights import WITHOUT_NETWORK, load_state, weights_at_hand
from calm.checkpoint import no_answer
from calm.errors import CalmError


class ResNet50(resnet.ResNet):  # type: ignore[misc]
    """ResNet-50 with D = 2048 channels.

    ``layer4`` has stride 1; with ``large_feature_map`` so has ``layer3``. Nothing is dilated, so the weights are
    torchvision's, one for one. The arguments are those of `calm.backbones.build_backbone`.
    """

    out_channels = 2048

    def __init__(self, *, pretrained: bool = False, large_feature_map: bool = True) -> None:
        super().__init__(resnet.Bottleneck, [3, 4, 6, 3])
        del self.avgpool, self.fc
        for stage in (self.layer4, self.layer3) if large_feature_map else (self.layer4,):
            stage[0].conv2.stride = (1, 1)
            stage[0].downsample[0].stride = (1, 1)
        if pretrained:
            load_imagenet(self, models.ResNet50_Weights.IMAGENET1K_V1)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 2048, h, w) of normalised images (B, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features


class VGG16(nn.Module):
    """VGG-16 with D = 1024 channels.

    It is torchvision's ``features`` without the last pooling (without the last two if ``large_feature_map``), layers
    numbered without gaps; then a new 3 x 3 convolution ``conv6`` to 1024 channels, with BatchNorm ``bn6`` if
    ``use_bn``, and ReLU. The arguments are those of `calm.backbones.build_backbone`.
    """

    out_channels = 1024
    new_layers = ("conv6.", "bn6.")

    def __init__(self, *, pretrained: bool = False, large_feature_map: bool = True, use_bn: bool = True) -> None:
        super().__init__()
        layout = vgg.cfgs["D"][:-1]
        if large_feature_map:
            del layout[-4]  # the pooling before the last three convolutions
        self.features = vgg.make_layers(layout, batch_norm=use_bn)
        self.conv6 = nn.Conv2d(512, self.out_channels, kernel_size=3, padding=1)
        self.bn6 = nn.BatchNorm2d(self.out_channels) if use_bn else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        initialise(self)
        if pretrained:
            weights = models.VGG16_BN_Weights if use_bn else models.VGG16_Weights
            load_imagenet(self, weights.IMAGENET1K_V1)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 1024, h, w) of normalised images (B, 3, H, W)."""
        features: Tensor = self.relu(self.bn6(self.conv6(self.features(images))))
        return features


class InceptionV3(inception.Inception3):  # type: ignore[misc]
    """Inception-v3 with D = 1024 channels.

    It is torchvision's network up to and including ``Mixed_6e``, with other paddings and with ``Mixed_6a`` at stride 1,
    then two new 3 x 3 convolutions ``A3_1b`` and ``A3_2b``, with BatchNorm if ``use_bn``. The small map has one more
    pooling before ``Mixed_6a``. torchvision's own rescaling of the input for its Inception weights is not applied, as
    in the released code. The arguments are those of `calm.backbones.build_backbone`.
    """

    out_channels = 1024
    new_layers = ("A3_1b.", "A3_2b.")

    def __init__(self, *, pretrained: bool = False, large_feature_map: bool = True, use_bn: bool = True) -> None:
        blocks = [inception.BasicConv2d, inception.InceptionA, _UnstridedInceptionB, inception.InceptionC]
        blocks += [inception.InceptionD, inception.InceptionE, inception.InceptionAux]
        super().__init__(aux_logits=False, init_weights=False, inception_blocks=blocks)
        del self.Mixed_7a, self.Mixed_7b, self.Mixed_7c, self.avgpool, self.dropout, self.fc
        self.Conv2d_1a_3x3.conv.padding = (1, 1)
        self.maxpool1 = self.maxpool2 = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
        self.maxpool3 = nn.Identity() if large_feature_map else nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.A3_1b = _new_convolution(768, self.out_channels, use_bn)
        self.A3_2b = _new_convolution(self.out_channels, self.out_channels, use_bn)
        initialise(self)
        if pretrained:
            load_imagenet(self, models.Inception_V3_Weights.IMAGENET1K_V1)

    def forward(self, images: Tensor) -> Tensor:
        """Return features (B, 1024, h, w) of normalised images (B, 3, H, W)."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(images)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(self.maxpool2(x))))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(self.maxpool3(x)))))
        # The released code computes Mixed_6e, but goes on from Mixed_6d by mistake: no weights rely on it.
        features: Tensor = self.A3_2b(self.A3_1b(self.Mixed_6e(x)))
        return features


class _UnstridedInceptionB(inception.InceptionB):  # type: ignore[misc]
    """torchvision's grid reduction with stride 1 and padding 1 in convolutions and pooling: it keeps the grid."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        for reduction in (self.branch3x3.conv, self.branch3x3dbl_3.conv):
            reduction.stride, reduction.padding = (1, 1), (1, 1)

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch3x3(x), double, F.max_pool2d(x, 3, stride=1, padding=1)]


def _new_convolution(in_channels: int, out_channels: int, use_bn: bool) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)
    norm = [nn.BatchNorm2d(out_channels)] if use_bn else []
    return nn.Sequential(convolution, *norm, nn.ReLU(inplace=True))


def initialise(module: nn.Module) -> None:
    """Initialise every convolution by He's normal rule (fan out, ReLU) and its bias with zero; nothing else changes."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def load_imagenet(backbone: nn.Module, weights: models.WeightsEnum) -> None:
    """Load a torchvision weight set, from torch's hub cache or downloaded into it: see `calm.backbones.weights`.

    The file is read without executing anything in it, and a download must match its published hash.
    """
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        if not file.exists() and (silent := no_answer(weights.url)):
            raise OSError(silent)
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
        raise CalmError(
            f"cannot get the pretrained weights {weights.url}: {error}. {weights_at_hand()}, or connect to the "
            f"network, or put the file into {file.parent}, or {WITHOUT_NETWORK}, or begin at random with "
            "pretrained=False (calm train: --model.pretrained false)"
        ) from error
    load_state(backbone, state, weights.url)
