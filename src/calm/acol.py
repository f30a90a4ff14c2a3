"""Adversarial complementary learning (ACoL): a second head learns from what the first head's map does not cover.

The first head's map of a class, min-max normalised, is cut at a threshold delta; the features at the locations above
are set to 0, and the second head classifies what is left. Both are trained on the label: L = L_first + L_second. Each
head begins with two 3x3 convolutions of its own. Erasing goes by the label in training, and by the first head's
prediction otherwise, so that one forward pass gives the maps of all classes.

Source: Zhang, Wei, Feng, Yang, Huang, "Adversarial Complementary Learning for Weakly Supervised Object Localization",
CVPR 2018, section 3 (delta 0.6); delta 0.7 and the convolutions are those of Choe et al., "Evaluating Weakly Supervised
Object Localization Methods Right", CVPR 2020. CALM's heads in this role are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils import _pytree

from calm.errors import CalmError
from calm.heads import CalmHead, CamHead
from calm.heatmaps import normalize
from calm.output import MAP_KINDS, CalmOutput, CamOutput


class AcolCamOutput(CamOutput):
    """The outputs of two CAM heads. The first one predicts; a class's map is the larger of both, each min-max
    normalised. ``logits`` and the kind ``evidence`` are the first one's, as they explain the prediction."""

    def __init__(self, first: CamOutput, second: CamOutput) -> None:
        super().__init__(first.class_scores, first.features, first.weight, first.bias)
        self.first, self.second = first, second

    def class_maps(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Return max(A, B) of both heads' normalised maps, in [0, 1] (paper, section 3.3)."""
        first, second = (normalize(output.class_logits(classes), "minmax") for output in (self.first, self.second))
        return torch.maximum(first, second)

    def loss(self, targets: Tensor) -> Float[Tensor, ""]:
        """Return the sum of both heads' losses; see `CamOutput.loss`."""
        return self.first.loss(targets) + self.second.loss(targets)


class AcolCalmOutput(CalmOutput):
    """The outputs of two CALM heads, read as their mixture with equal weights: which head reads the cue is latent, too.

    p(y, z | x) = (p_first(y, z | x) + p_second(y, z | x)) / 2, so that the joint map sums to the prediction as ever,
    and all the other quantities follow from it.
    """

    def __init__(self, first: CalmOutput, second: CalmOutput) -> None:
        self.first, self.second = first, second
        self.activation, self.denominator, self.pooling_exponent = "exp", "differentiated", first.pooling_exponent

    @property
    def _scores_of_classes(self) -> Tensor:
        return self.first.logits

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the locations."""
        return self.first.grid

    @property
    def logits(self) -> Float[Tensor, "b c h w"]:  # type: ignore[override]
        """log p(y | x, z), normalised over the classes."""
        return self.log_conditional

    @property
    def scores(self) -> Float[Tensor, "b 1 h w"]:  # type: ignore[override]
        """log p(z | x), normalised over the locations; -inf where both priors are 0."""
        return self.log_prior.unsqueeze(1)

    @property
    def log_prior(self) -> Float[Tensor, "b h w"]:
        """log p(z | x)."""
        return torch.logaddexp(self.first.log_prior, self.second.log_prior) - math.log(2)

    @property
    def log_conditional(self) -> Float[Tensor, "b c h w"]:
        """log p(y | x, z): both heads' conditionals, weighted by their priors at z (alike where both are 0)."""
        priors = torch.stack([self.first.log_prior, self.second.log_prior])
        nowhere = priors.isneginf().all(dim=0)
        first, second = priors.masked_fill(nowhere, 0.0).log_softmax(dim=0).unsqueeze(2)
        return torch.logaddexp(self.first.log_conditional + first, self.second.log_conditional + second)

    @property
    def dead(self) -> Bool[Tensor, " b"]:
        """Which images have no prior in either head."""
        return self.first.dead & self.second.dead

    @property
    def log_probs(self) -> Float[Tensor, "b c"]:
        """log p(y | x): the mean of both heads' probabilities."""
        return torch.logaddexp(self.first.log_probs, self.second.log_probs) - math.log(2)

    def _tempered(self, exponent: float) -> CalmOutput:
        if self.pooling_exponent == 1:
            return super()._tempered(exponent)
        return AcolCalmOutput(self.first._tempered(exponent), self.second._tempered(exponent))

    def class_log_joint(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Return log p(y, z | x) of K classes per image."""
        if self.pooling_exponent == 1:
            return super().class_log_joint(classes)
        rows = (output.class_log_joint(classes) for output in (self.first, self.second))
        return torch.logaddexp(*rows) - math.log(2)

    def target_log_joint(self, targets: Int[Tensor, " b"]) -> Float[Tensor, "b h w"]:
        """Return log p(y, z | x) of each image's target."""
        rows = (output.target_log_joint(targets) for output in (self.first, self.second))
        return torch.logaddexp(*rows) - math.log(2)

    def loss(self, targets: Tensor, *, teacher: CalmOutput | None = None, **options: Any) -> Float[Tensor, ""]:
        """Return the sum of both heads' losses, each taught by its own like in ``teacher``; see `CalmOutput.loss`."""
        if teacher is not None and not isinstance(teacher, AcolCalmOutput):
            raise CalmError("the teacher of a model with two heads (ACoL) must have two, too")
        teachers = (None, None) if teacher is None else (teacher.first, teacher.second)
        first = self.first.loss(targets, teacher=teachers[0], **options)
        return first + self.second.loss(targets, teacher=teachers[1], **options)


class _AcolHead(nn.Module):
    """The parts of a head of ACoL beside those of the first head, which comes next in the order of bases.

    Args:
        in_channels: D, the channels of the features.
        num_classes: C.
        prior: The prior's activation and denominator, and the pooling exponent, for CALM.
        threshold: delta, in (0, 1].
        channels: The channels of the two 3x3 convolutions; None is 1024, as published, or D where that is less.
    """

    kind: type[CalmHead | CamHead]
    output: type[AcolCalmOutput | AcolCamOutput]

    def __init__(
        self, in_channels: int, num_classes: int, *prior: Any, threshold: float = 0.7, channels: int | None = None
    ) -> None:
        width = channels or min(1024, in_channels)
        super().__init__(width, num_classes, *prior)
        self.threshold = threshold
        self.hidden, self.second_hidden = _convolutions(in_channels, width), _convolutions(in_channels, width)
        self.second = self.kind(width, num_classes, *prior)

    def forward(self, features: Float[Tensor, "b d h w"], targets: Tensor | None = None) -> Any:
        """Read the features with both heads.

        Args:
            features: The backbone's.
            targets: The classes by whose maps features are erased, (B,) or (B, C) rows of probabilities, of which the
                largest counts; None are the classes that the first head predicts.
        """
        first = super().forward(self.hidden(features))
        with torch.no_grad():
            classes = first.log_probs.argmax(dim=1) if targets is None else targets
            classes = classes if classes.ndim == 1 else classes.argmax(dim=1)
            maps = MAP_KINDS[first.default_kind].read(first, classes[:, None]).squeeze(1)
            kept = (normalize(maps, "minmax") < self.threshold).to(features.dtype).unsqueeze(1)
        return self.output(first, self.second(self.second_hidden(features * kept)))


class AcolCamHead(_AcolHead, CamHead):
    """ACoL as published: two heads of CAM."""

    kind, output = CamHead, AcolCamOutput


class AcolCalmHead(_AcolHead, CalmHead):
    """ACoL with two heads of CALM."""

    kind, output = CalmHead, AcolCalmOutput


def _convolutions(in_channels: int, width: int) -> nn.Sequential:
    from calm.backbones.released import initialise  # imports torchvision

    first, second = (nn.Conv2d(channels, width, 3, padding=1) for channels in (in_channels, width))
    hidden = nn.Sequential(first, nn.ReLU(), second, nn.ReLU())
    initialise(hidden)
    return hidden


def _from_parts(kind: Any, parts: Iterable[Any], _: Any) -> Any:
    return kind(*parts)


for _kind in (AcolCamOutput, AcolCalmOutput):  # trees of tensors, as all outputs are
    _pytree.register_pytree_node(
        _kind,
        lambda output: ([output.first, output.second], None),
        partial(_from_parts, _kind),
        serialized_type_name=f"calm.acol.{_kind.__name__}",
    )
