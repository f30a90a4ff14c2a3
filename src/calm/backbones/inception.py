"""Inception-v3 with a fine grid: torchvision's blocks up to Mixed_6e, with other paddings and strides."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import Inception_V3_Weights
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC

from calm.backbones.initial import imagenet_weights, initialise, load_pretrained

__all__ = ["InceptionV3"]

_NEW = ("A3_1b.", "A3_2b.")
_BEYOND = ("AuxLogits.", "Mixed_7", "fc.")


class InceptionV3(nn.Module):
    """Inception-v3 without classifier, in the released layout: D = 1024.

    torchvision's blocks up to and including ``Mixed_6e``, with padded first convolutions and poolings and a
    ``Mixed_6a`` of stride 1; then two new 3 x 3 convolutions, ``A3_1b`` and ``A3_2b``. 224 x 224 pixels give
    a 28 x 28 grid, or 14 x 14 by one more pooling before ``Mixed_6a``. Images enter as they are:
    torchvision's own rescaling for its Inception weights is not applied, as in the released code.

    Args:
        pretrained: start the torchvision blocks from its ImageNet weights; ``A3_1b`` and ``A3_2b`` are new.
        large_feature_map: leave out the extra pooling.
        use_bn: BatchNorm in ``A3_1b`` and ``A3_2b``; the blocks before always have it.
    """

    out_channels = 1024

    def __init__(
        self, *, pretrained: bool = False, large_feature_map: bool = True, use_bn: bool = True
    ) -> None:
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
        """Features (B, 1024, h, w) of normalised images (B, 3, H, W)."""
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
    """torchvision's grid reduction that reduces nothing: stride 1, padding 1 in convolutions and pooling."""

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
