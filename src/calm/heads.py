"""The heads of CALM and CAM: 1x1 convolutions that turn the features of any backbone into an output with maps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm.config import PriorActivation, PriorDenominator
from calm.output import CalmOutput, CamOutput


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution, computed as a matrix product of the weight and the features at all locations.

    With channels first on a CPU that takes 0.6 times PyTorch's convolution for 200 classes and a 28x28 grid; other
    memory formats are left to the convolution.
    """

    def forward(self, features: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c h w"]:
        """Score each location."""
        if not features.is_contiguous():
            return super().forward(features)
        weight, columns = self.weight.flatten(1).expand(features.shape[0], -1, -1), features.flatten(2)
        bias = features.new_zeros(1) if self.bias is None else self.bias[:, None]
        return torch.baddbmm(bias, weight, columns).view(features.shape[0], self.out_channels, *features.shape[2:])


class CalmHead(nn.Module):
    """CALM's head: two 1x1 convolutions, of which ``conv_last`` scores classes and ``attention`` scores locations.

    ``conv_last`` is initialised Xavier-uniform with zero bias, as in the released code. ``attention`` keeps PyTorch's
    default, which is small against the features: the prior begins close to uniform.

    Args:
        in_channels: D, the channels of the features.
        num_classes: C.
        activation: The prior's activation, see `calm.latent.log_prior`.
        denominator: The prior's denominator, see `calm.latent.log_prior`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        activation: PriorActivation = "softplus",
        denominator: PriorDenominator = "differentiated",
    ) -> None:
        super().__init__()
        self.conv_last = _class_scorer(in_channels, num_classes)
        self.attention = PointwiseConv2d(in_channels, 1, kernel_size=1)
        self.activation, self.denominator = activation, denominator

    def forward(self, features: Float[Tensor, "b d h w"]) -> CalmOutput:
        """Score the classes at each location, and the locations."""
        return CalmOutput(self.conv_last(features), self.attention(features), self.activation, self.denominator)


class CamHead(nn.Module):
    """CAM's head: one 1x1 convolution averaged over the locations, p(y | x) = softmax(mean of f). It has no prior."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_last = _class_scorer(in_channels, num_classes)

    def forward(self, features: Float[Tensor, "b d h w"]) -> CamOutput:
        """Score the classes on the averaged features."""
        assert self.conv_last.bias is not None
        return CamOutput.of(features, self.conv_last.weight, self.conv_last.bias)


def _class_scorer(in_channels: int, num_classes: int) -> PointwiseConv2d:
    conv = PointwiseConv2d(in_channels, num_classes, kernel_size=1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv
