"""ResNet-50 with a fine grid: torchvision's network, its last strides taken out."""

from __future__ import annotations

from torch import Tensor
from torchvision.models import ResNet, ResNet50_Weights
from torchvision.models.resnet import Bottleneck

from calm.backbones.initial import imagenet_weights, load_pretrained

__all__ = ["ResNet50"]


class ResNet50(ResNet):  # type: ignore[misc]
    """ResNet-50 without classifier, in the released layout: D = 2048.

    ``layer4`` has stride 1; with ``large_feature_map`` so has ``layer3``. Nothing is dilated, so the weights
    are torchvision's, one for one. 224 x 224 pixels give a 28 x 28 grid (stride 8), or 14 x 14 (stride 16).

    Args:
        pretrained: start from torchvision's first ImageNet weights instead of random ones.
        large_feature_map: stride 8 instead of 16.
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
        """Features (B, 2048, h, w) of normalised images (B, 3, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features
