"""The classifier: preprocessing, backbone and head in one module, and the one place that puts them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm import maps
from calm.choices import Method, PriorActivation, PriorDenominator
from calm.errors import CalmError, unknown
from calm.head import CalmHead, CamHead
from calm.output import CalmOutput, CamOutput
from calm.preprocess import ImageLike, Preprocessing, check_images
from calm.resample import resize_maps

__all__ = ["CalmModel", "Method", "ModelConfig", "create_model"]

_IMAGENET = (Preprocessing().mean, Preprocessing().std)


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of; with the weights, all that loading needs.

    Attributes:
        backbone: a released architecture (``resnet50``, ``vgg16``, ``inception_v3``), ``small_resnet``, a timm
            model's name, or ``custom`` for the user's own module.
        num_classes: C.
        method: ``calm-em`` and ``calm-ml`` are one model with two training losses; ``cam`` is the baseline.
        large_feature_map: released architectures: a 28x28 grid for 224x224 input instead of 14x14.
        use_bn: vgg16 and inception_v3: BatchNorm where the released code makes it optional.
        output_stride: timm models that support it: image size over grid size.
        prior_activation: ``softplus`` (paper), ``relu`` (released code and weights) or ``exp`` (spatial softmax).
        prior_denominator: ``differentiated`` (exact) or ``constant`` (released code).
    """

    backbone: str
    num_classes: int
    method: Method = "calm-em"
    large_feature_map: bool = True
    use_bn: bool = True
    output_stride: int | None = None
    prior_activation: PriorActivation = "softplus"
    prior_denominator: PriorDenominator = "differentiated"

    def __post_init__(self) -> None:
        for name, kind in (
            ("method", Method),
            ("prior_activation", PriorActivation),
            ("prior_denominator", PriorDenominator),
        ):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, getattr(self, name), get_args(kind))
        if self.num_classes < 1:
            raise CalmError(f"num_classes is {self.num_classes}: a classifier needs at least 1")


class CalmModel(nn.Module):
    """An image classifier whose output also says where.

    Build one with `create_model`, `calm.load` or `calm.load_released`.

    Attributes:
        config: what it is made of.
        backbone: images (B, 3, H, W) to features (B, D, h, w).
        head: features to a `CalmOutput` or `CamOutput`.
        preprocessing: how an image file becomes its input.
        class_names: C names.
        training_summary: what the training recorded about itself (data, seed, accuracy), if anything.
    """

    def __init__(
        self,
        config: ModelConfig,
        backbone: nn.Module,
        head: CalmHead | CamHead,
        *,
        class_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        training_summary: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.config, self.backbone, self.head = config, backbone, head
        self.preprocessing = preprocessing or Preprocessing()
        names = range(config.num_classes) if class_names is None else class_names
        self.class_names = tuple(map(str, names))
        if len(self.class_names) != config.num_classes:
            raise CalmError(f"{len(self.class_names)} class names for {config.num_classes} classes")
        self.training_summary = dict(training_summary or {})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.conv_last.weight.device

    def encode(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """Features of normalised images (see `preprocess`).

        Raises:
            CalmError: no floats of shape (B, 3, H, W).
        """
        check_images(images)
        features: Tensor = self.backbone(images)
        return features

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> CalmOutput | CamOutput:
        """Classify and localise.

        Args:
            images: RGB, normalised: (value in [0, 1] - mean) / std, as `preprocess` returns them.

        Returns:
            An output with ``log_probs`` and ``probs`` (B, C), and every other quantity when asked.

        Raises:
            CalmError: see `encode`.
        """
        output: CalmOutput | CamOutput = self.head(self.encode(images))
        return output

    def loss(
        self,
        images: Float[Tensor, "b 3 H W"],
        targets: Tensor,
        *,
        temperature: float = 1.0,
        teacher: CalmModel | None = None,
        samples: int | None = None,
    ) -> Float[Tensor, ""]:
        """The method's training loss for images, mean over the batch, in nats.

        Args:
            images: as for `forward`.
            targets: class indices (B,), or soft targets (B, C) whose rows sum to 1.
            temperature: calm-em: beta of the E-step.
            teacher: calm-em: the model whose posterior is used (an average of past weights); None is this model.
            samples: calm-em: locations of each image that teach the classes, drawn from the posterior; None: all.
        """
        believed = None
        if teacher is not None:
            with torch.no_grad():
                believed = teacher(images)
        return self.output_loss(
            self(images), targets, temperature=temperature, teacher=believed, samples=samples
        )

    def loss_from_features(
        self, features: Float[Tensor, "b d h w"], targets: Tensor, *, temperature: float = 1.0
    ) -> Float[Tensor, ""]:
        """`loss` for features that `encode` returned."""
        return self.output_loss(self.head(features), targets, temperature=temperature)

    def output_loss(
        self,
        output: CalmOutput | CamOutput,
        targets: Tensor,
        *,
        temperature: float = 1.0,
        teacher: CalmOutput | CamOutput | None = None,
        samples: int | None = None,
    ) -> Float[Tensor, ""]:
        """`loss` from an output, so that one forward pass serves loss, prediction and maps.

        Raises:
            CalmError: a temperature, teacher or samples where the method has no E-step.
        """
        if isinstance(output, CalmOutput) and (teacher is None or isinstance(teacher, CalmOutput)):
            return output.loss(
                targets,
                method=self.config.method,
                temperature=temperature,
                teacher=teacher,
                samples=samples,
            )
        if not isinstance(output, CamOutput) or temperature != 1.0 or teacher is not None or samples:
            raise CalmError(
                "temperature, teacher and samples belong to the E-step: they need CALM models, method 'calm-em'"
            )
        return output.loss(targets)

    @torch.no_grad()
    def attribute(
        self,
        images: Float[Tensor, "b 3 H W"],
        targets: maps.Targets,
        kind: str | None = None,
        *,
        superclass: maps.Superclass | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attribution maps, (B, H', W') or (B, K, H', W') for targets (B,) or (B, K), from one forward pass.

        Args:
            images: as for `forward`.
            targets: the classes to explain; one alone is asked of all images.
            kind: a name of `calm.maps.MAP_KINDS`; None is ``jointll`` for CALM, ``cam`` for CAM.
            superclass: for the superclass kinds: target to its classes.
            size: (height, width) of the maps; None is the size of the images.

        Raises:
            CalmError: see `calm.maps.attribute`; checked before the forward pass where possible.
        """
        kind = self.map_kind(kind)
        found: Tensor = self(images).attribute(
            targets, kind, superclass=superclass, size=size or _height_width(images)
        )
        return found

    @torch.no_grad()
    def difference(
        self,
        images: Float[Tensor, "b 3 H W"],
        first: maps.Targets,
        second: maps.Targets,
        kind: str | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b H W"]:
        """Why class ``first`` and not ``second``, (B,) each or one for all images: abs of the difference of their maps
        on the grid, resized as in `attribute`. One forward pass."""
        kind = self.map_kind(kind)
        pair = torch.stack([maps.as_targets(one, len(images)) for one in (first, second)], dim=1)
        one, other = self(images).attribute(pair, kind).unbind(dim=1)
        return resize_maps(maps.difference(one, other), size or _height_width(images))

    def map_kind(self, kind: str | None = None) -> str:
        """The canonical name of a map kind of this model; of its default one for None."""
        family = "cam" if self.config.method == "cam" else "calm"
        return maps.canonical_kind(kind or {"cam": "cam", "calm": "jointll"}[family], family)

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Float[Tensor, "b 3 H W"]:
        """Image files, PIL images or uint8 RGB arrays (H, W, 3), one or a list, as a batch on the model's device."""
        return self.preprocessing(images).to(self.device)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights (safetensors) and everything else (JSON) to ``folder``: see `calm.checkpoint`."""
        from calm import checkpoint

        return checkpoint.save_pretrained(self, folder)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload to a Hugging Face repository: see `calm.checkpoint.push_to_hub`."""
        from calm import checkpoint

        return checkpoint.push_to_hub(self, repo_id, **options)

    @staticmethod
    def from_pretrained(source: str | Path, **options: Any) -> CalmModel:
        """Load from a folder or a hub id: `calm.load`."""
        from calm import checkpoint

        return checkpoint.load(source, **options)

    def extra_repr(self) -> str:
        """The configuration, first in ``print(model)``."""
        return str(self.config)


def create_model(
    backbone: str | nn.Module,
    num_classes: int,
    method: Method = "calm-em",
    large_feature_map: bool = True,
    pretrained: bool = False,
    *,
    use_bn: bool = True,
    output_stride: int | None = None,
    prior_activation: PriorActivation = "softplus",
    prior_denominator: PriorDenominator = "differentiated",
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> CalmModel:
    """Put a classifier together.

    Args:
        backbone: a name (see `ModelConfig`), or your own module that returns features (B, D, h, w).
        pretrained: start the backbone from ImageNet weights (needs a network the first time).
        class_names: names of the classes, in the order of their indices.
        preprocessing: input size and normalisation; the default is 224x224 and ImageNet's mean and std. Where these
            are ImageNet's and a timm model's pretrained weights expect others, theirs are taken.

    The other arguments are those of `ModelConfig`.

    Raises:
        CalmError: an unknown name, an impossible value, a backbone that returns no feature map.

    >>> model = create_model("small_resnet", num_classes=3)
    >>> model(torch.zeros(2, 3, 64, 64)).probs.shape
    torch.Size([2, 3])
    """
    from calm.backbones import adapt_backbone, build_backbone

    prepared = preprocessing or Preprocessing()
    config = ModelConfig(
        backbone=backbone if isinstance(backbone, str) else "custom",
        num_classes=num_classes,
        method=method,
        large_feature_map=large_feature_map,
        use_bn=use_bn,
        output_stride=output_stride,
        prior_activation=prior_activation,
        prior_denominator=prior_denominator,
    )
    if isinstance(backbone, str):
        body = build_backbone(
            backbone,
            pretrained=pretrained,
            large_feature_map=large_feature_map,
            use_bn=use_bn,
            output_stride=output_stride,
        )
    elif pretrained or output_stride is not None:
        raise CalmError(
            "pretrained and output_stride choose among named backbones: your own module comes as it is"
        )
    else:
        body = adapt_backbone(backbone, prepared.size)
    normalization = getattr(body, "normalization", None)
    if pretrained and normalization is not None and (prepared.mean, prepared.std) == _IMAGENET:
        prepared = replace(prepared, mean=normalization[0], std=normalization[1])
    channels = int(body.out_channels)  # type: ignore[arg-type]
    head = (
        CamHead(channels, num_classes)
        if method == "cam"
        else CalmHead(channels, num_classes, prior_activation, prior_denominator)
    )
    return CalmModel(config, body, head, class_names=class_names, preprocessing=prepared)


def _height_width(images: Tensor) -> tuple[int, int]:
    return images.shape[-2], images.shape[-1]
