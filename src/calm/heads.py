"""The heads of CALM and CAM, which turn the features of any backbone into an output, and the network of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from calm.config import ModelConfig, PriorActivation, PriorDenominator, check_pooling, class_index
from calm.errors import CalmError, unknown
from calm.heatmaps import resize_maps
from calm.images import check_images
from calm.latent import NamedTargets, Targets, check_classes, class_indices
from calm.output import CalmOutput, CamOutput, Superclass, canonical_kind


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


def check_features(features: Tensor, channels: int) -> None:
    """Raise a CalmError unless ``features`` are (B, channels, h, w)."""
    if features.ndim != 4 or features.shape[1] != channels:
        fix = "give what the network has before its pooling, channels first, and the head their number"
        raise CalmError(f"the head takes features (B, {channels}, h, w), got {tuple(features.shape)}: {fix}")


class CalmHead(nn.Module):
    """CALM's head: two 1x1 convolutions, of which ``conv_last`` scores classes and ``attention`` scores locations.

    ``conv_last`` is initialised Xavier-uniform with zero bias, as in the released code. ``attention`` keeps PyTorch's
    default, which is small against the features: the prior begins close to uniform.

    Args:
        in_channels: D, the channels of the features.
        num_classes: C.
        activation: The prior's activation, see `calm.latent.log_prior`.
        denominator: The prior's denominator, see `calm.latent.log_prior`.
        pooling_exponent: How the locations predict together, see `calm.latent.pooled`: 1 is CALM.

    Raises:
        CalmError: If a word is unknown, or the exponent is not from 0 to 1, or below 1 with a constant denominator; in
            a forward pass, if the features have another shape.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        activation: PriorActivation = "softplus",
        denominator: PriorDenominator = "differentiated",
        pooling_exponent: float = 1.0,
    ) -> None:
        super().__init__()
        for name, word, kind in (
            ("activation", activation, PriorActivation),
            ("denominator", denominator, PriorDenominator),
        ):
            if word not in get_args(kind):
                raise unknown(name, word, get_args(kind))
        check_pooling(pooling_exponent, denominator)
        self.conv_last = _class_scorer(in_channels, num_classes)
        self.attention = PointwiseConv2d(in_channels, 1, kernel_size=1)
        self.activation, self.denominator, self.pooling_exponent = activation, denominator, pooling_exponent

    def forward(self, features: Float[Tensor, "b d h w"]) -> CalmOutput:
        """Score the classes at each location, and the locations."""
        check_features(features, self.conv_last.in_channels)
        activations = self.conv_last(features), self.attention(features)
        return CalmOutput(*activations, self.activation, self.denominator, self.pooling_exponent)


class CamHead(nn.Module):
    """CAM's head: one 1x1 convolution averaged over the locations, p(y | x) = softmax(mean of f). It has no prior."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv_last = _class_scorer(in_channels, num_classes)

    def forward(self, features: Float[Tensor, "b d h w"]) -> CamOutput:
        """Score the classes on the averaged features."""
        check_features(features, self.conv_last.in_channels)
        assert self.conv_last.bias is not None
        return CamOutput.of(features, self.conv_last.weight, self.conv_last.bias)


def _class_scorer(in_channels: int, num_classes: int) -> PointwiseConv2d:
    conv = PointwiseConv2d(in_channels, num_classes, kernel_size=1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


class Network(nn.Module):
    """A backbone and a head: tensors in; outputs, losses and maps out. A `CalmModel` adds pictures and files.

    Attributes:
        config: What the model is made of.
        backbone: Maps images (B, 3, H, W) to features (B, D, h, w).
        head: Maps features to a `CalmOutput` or `CamOutput`.
        class_names: The C names of the classes.
    """

    def __init__(
        self,
        config: ModelConfig,
        backbone: nn.Module,
        head: CalmHead | CamHead,
        *,
        class_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.backbone, self.head = config, backbone, head
        names = range(config.num_classes) if class_names is None else class_names
        self.class_names = tuple(map(str, names))
        if len(self.class_names) != config.num_classes:
            raise CalmError(f"{len(self.class_names)} class names for {config.num_classes} classes")

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.head.conv_last.weight.device

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """Return the backbone's features of images, as for `forward`."""
        check_images(images, self.config.in_channels)
        try:
            features: Tensor = self.backbone(images.to(self.head.conv_last.weight.dtype))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._explain(error, images)
            raise
        return features

    def _explain(self, error: Exception, images: Tensor) -> None:
        """Raise a CalmError in place of an error of the backbone, if it is for the size or the number of the images."""
        from calm.backbones import check_size

        check_size(self.backbone, (images.shape[-2], images.shape[-1]), self.config.in_channels)
        if "more than 1 value per channel" in str(error):
            size = f"one image of {images.shape[-2]} x {images.shape[-1]} pixels"
            fix = "train on larger images or batches, or take a smaller output_stride"
            raise CalmError(f"BatchNorm cannot normalise a batch of {size}, whose grid is one cell: {fix}") from error

    def forward(self, images: Float[Tensor, "b 3 H W"], targets: Tensor | None = None) -> CalmOutput | CamOutput:
        """Classify images and localise the evidence.

        Args:
            images: RGB, normalised as `preprocess` does: (value in [0, 1] - mean) / std. They are cast to the dtype of
                the weights, so that a model in half precision takes what `preprocess` returns.
            targets: For the training of ACoL alone: the labels, by whose maps it erases (`calm.acol`).

        Returns:
            An output with ``log_probs`` and ``probs`` (B, C), losses and maps.

        Raises:
            CalmError: If the images are not floats of shape (B, 3, H, W).
        """
        return self._read(self.encode(images), targets)

    def _read(self, features: Tensor, targets: Tensor | None) -> CalmOutput | CamOutput:
        output: CalmOutput | CamOutput
        output = self.head(features) if self.config.acol_threshold is None else self.head(features, targets)
        if not torch.compiler.is_compiling():  # names are no part of a graph
            output.class_names = self.class_names
        return output

    def loss(
        self,
        images: Float[Tensor, "b 3 H W"],
        targets: Tensor,
        *,
        temperature: float = 1.0,
        teacher: Network | None = None,
        prior_weight: float = 0.0,
        cam_weight: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return `CalmOutput.loss` of images, as for `forward`, by the model's method.

        The teacher is here the model whose posterior is used (an average of past weights); None is this model.
        """
        with torch.no_grad():
            teacher_output = None if teacher is None else teacher(images, targets)
        return self.output_loss(
            self(images, targets),
            targets,
            temperature=temperature,
            teacher=teacher_output,
            prior_weight=prior_weight,
            cam_weight=cam_weight,
        )

    def loss_from_features(
        self,
        features: Float[Tensor, "b d h w"],
        targets: Tensor,
        *,
        temperature: float = 1.0,
        prior_weight: float = 0.0,
        cam_weight: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Return `loss` for features that `encode` returned."""
        output = self._read(features, targets)
        return self.output_loss(
            output, targets, temperature=temperature, prior_weight=prior_weight, cam_weight=cam_weight
        )

    def output_loss(
        self,
        output: CalmOutput | CamOutput,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        teacher: CalmOutput | CamOutput | None = None,
        prior_weight: float = 0.0,
        cam_weight: float = 0.0,
        regions: Bool[Tensor, "k H W"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return `loss` from an output, so that one forward pass serves the loss, the prediction and the maps.

        Raises:
            CalmError: If a temperature or teacher is given but the method has no E-step, or a weight or regions but no
                prior.
        """
        if isinstance(output, CalmOutput) and not isinstance(teacher, CamOutput):
            return output.loss(
                targets,
                method=self.config.method,
                temperature=temperature,
                teacher=teacher,
                prior_weight=prior_weight,
                cam_weight=cam_weight,
                regions=regions,
            )
        if not isinstance(output, CamOutput) or temperature != 1.0 or teacher is not None:
            raise CalmError("temperature and teacher belong to the E-step: they need CALM models, method 'calm-em'")
        if prior_weight or cam_weight or regions is not None:
            raise CalmError(
                "prior_weight, cam_weight and regions belong to CALM's losses, not to CAM's: leave them out"
            )
        return output.loss(targets)

    @torch.no_grad()
    def attribute(
        self,
        images: Float[Tensor, "b 3 H W"],
        targets: NamedTargets | None = None,
        kind: str | None = None,
        *,
        superclass: Superclass | None = None,
        size: tuple[int, int] | None = None,
        prior_exponent: float = 1.0,
    ) -> Tensor:
        """Return `CalmOutput.attribute` of images, as for `forward`: on the grid, if no ``size`` is given.

        The targets may be names of classes; None is the most probable class of each image.
        """
        kind = self.map_kind(kind)
        indices = None if targets is None else self.class_indices(targets)
        options = {"superclass": superclass, "size": size, "prior_exponent": prior_exponent}
        maps: Tensor = self(images).attribute(indices, kind, **options)
        return maps

    @torch.no_grad()
    def difference(
        self,
        images: Float[Tensor, "b 3 H W"],
        first: NamedTargets,
        second: NamedTargets,
        kind: str | None = None,
        *,
        size: tuple[int, int] | None = None,
        signed: bool = False,
        prior_exponent: float = 1.0,
    ) -> Float[Tensor, "b H W"]:
        """Return why class ``first`` and not ``second``: the difference of their maps, from one forward pass.

        It is the absolute difference, as published; or ``signed``: above 0 for ``first``, below 0 for ``second``. The
        difference is taken on the grid, and resized if a ``size`` is given. The classes, by index or name, are (B,), or
        one for all images.
        """
        kind = self.map_kind(kind)
        output = self(images)
        pair = [
            check_classes(self.class_indices(one), output.batch_size, output.num_classes) for one in (first, second)
        ]
        maps: Tensor = output.attribute(torch.stack(pair, dim=1), kind, prior_exponent=prior_exponent)
        difference = maps[:, 0] - maps[:, 1]
        difference = difference if signed else difference.abs()
        return difference if size is None else resize_maps(difference, size)

    def map_kind(self, kind: str | None = None) -> str:
        """Return the canonical name of a map kind of this model; None is its default kind."""
        output = CamOutput if self.config.method == "cam" else CalmOutput
        return canonical_kind(output.default_kind if kind is None else kind, output.family)

    def class_index(self, text: str) -> int:
        """Return the index of a class that is given by name or index: `calm.config.class_index`."""
        return class_index(self.class_names, text)

    def class_indices(self, targets: NamedTargets) -> Targets:
        """Return targets, in which names of classes may stand for their indices, with indices alone."""
        indices: Targets = class_indices(targets, self.class_names)
        return indices
