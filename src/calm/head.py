"""The two heads: CALM's latent head (class logits and a location score) and CAM's averaging head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm.latent import PriorActivation, PriorDenominator
from calm.output import CalmOutput, CamOutput
from calm.unscored import Unscored

__all__ = ["CalmHead", "CamHead"]


class CalmHead(nn.Module):
    """Two 1x1 convolutions on the features: ``conv_last`` scores classes, ``attention`` scores locations.

    Args:
        in_channels: D, channels of the features.
        num_classes: C.
        activation: of the prior, see `calm.latent.log_prior`.
        denominator: of the prior, see `calm.latent.log_prior`.
        keep_logits: hold the class logits of a training step until its backward pass. False computes them a second time
            there, some locations at a time: memory does not grow with C, and a step of the head takes about a third
            longer. An attribute, to be changed at will.

    ``conv_last`` starts Xavier-uniform with zero bias, as the released code does. ``attention`` keeps
    PyTorch's default start, which is small against the features: the prior begins close to uniform.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        activation: PriorActivation = "softplus",
        denominator: PriorDenominator = "differentiated",
        keep_logits: bool = True,
    ) -> None:
        super().__init__()
        self.conv_last = _class_scores(in_channels, num_classes)
        self.attention = nn.Conv2d(in_channels, 1, kernel_size=1)
        self.activation, self.denominator, self.keep_logits = activation, denominator, keep_logits

    def forward(self, features: Float[Tensor, "b d h w"]) -> CalmOutput:
        """An output that scores classes and locations, and computes everything else, when asked."""
        unscored = Unscored(features, self.conv_last, self.attention, self.keep_logits)
        if not torch.is_grad_enabled():  # scored now, or reading it outside `no_grad` would have a gradient
            return CalmOutput(unscored.logits(), unscored.scores(), self.activation, self.denominator)
        return CalmOutput.of_features(unscored, self.activation, self.denominator)


class CamHead(nn.Module):
    """One 1x1 convolution, averaged over locations: p(y | x) = softmax(mean of f).

    Args:
        in_channels: D, channels of the features.
        num_classes: C.

    It has no attention layer: a CAM model has no prior to ask for.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_last = _class_scores(in_channels, num_classes)

    def forward(self, features: Float[Tensor, "b d h w"]) -> CamOutput:
        """Score the classes on the averaged features; maps are computed by the output when asked."""
        assert self.conv_last.bias is not None
        return CamOutput(features, self.conv_last.weight, self.conv_last.bias)


def _class_scores(in_channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, num_classes, kernel_size=1)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
