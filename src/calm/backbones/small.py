"""A small residual network for small images and CPUs: the layout of ResNet-18 at a fraction of its width."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

from calm.backbones.released import initialise


class SmallResNet(nn.Module):
    """Residual stages without the classifier, for images of about 32 to 128 pixels.

    Args:
        widths: The channels of the stages; the last is D. The default is half of ResNet-18's.
        strides: The stride of each stage; the grid is the image divided by their product and the stem's stride.
        depth: The number of residual blocks per stage.
        stem_stride: The stride of the 3x3 stem convolution (there is no pooling).

    The default makes an 8x8 grid of a 64x64 image with 2.8 million parameters.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[int] = (1, 2, 2, 1),
        depth: int = 2,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        if len(widths) != len(strides):
            raise ValueError(f"{len(widths)} widths but {len(strides)} strides: give one each per stage")
        self.out_channels = widths[-1]
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        self.stages = nn.Sequential()
        channels = widths[0]
        for width, stride in zip(widths, strides, strict=True):
            blocks = [_block(channels, width, stride), *(_block(width, width, 1) for _ in range(depth - 1))]
            self.stages.append(nn.Sequential(*blocks))
            channels = width
        initialise(self)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """Return the features of the last stage, after its ReLU."""
        features: Tensor = self.stages(self.stem(images))
        return features


def narrow_resnet() -> SmallResNet:
    """Return a `SmallResNet` at half its default width: 0.7 million parameters, about a quarter of its time."""
    return SmallResNet(widths=(16, 32, 64, 128))


def tiny_resnet() -> SmallResNet:
    """Return a network for demonstrations: 0.08 million parameters, stride 4.

    Each location sees 23 pixels, about one part of a rendered bird.
    """
    return SmallResNet(widths=(32, 64), strides=(1, 2), depth=1)


def _block(inputs: int, width: int, stride: int) -> BasicBlock:
    shortcut = None
    if stride != 1 or inputs != width:
        shortcut = nn.Sequential(conv1x1(inputs, width, stride), nn.BatchNorm2d(width))
    return BasicBlock(inputs, width, stride, shortcut)
