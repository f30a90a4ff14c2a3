"""The classifier: preprocessing, backbone and head in one module, and the one place that puts them together.

The two heads: CALM's latent head (class logits and a location score) and CAM's averaging head.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm import checkpoint, output
from calm.config import Method, ModelConfig, PriorActivation, PriorDenominator
from calm.errors import CalmError
from calm.fused import Unscored
from calm.heatmaps import resize_maps
from calm.images import ImageLike, Preprocessing, check_images
from calm.output import CalmOutput, CamOutput

__all__ = ["CalmHead", "CalmModel", "CamHead", "Method", "ModelConfig", "create_model", "load"]


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


_IMAGENET = (Preprocessing().mean, Preprocessing().std)


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
        targets: output.Targets,
        kind: str | None = None,
        *,
        superclass: output.Superclass | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attribution maps, (B, H', W') or (B, K, H', W') for targets (B,) or (B, K), from one forward pass.

        Args:
            images: as for `forward`.
            targets: the classes to explain; one alone is asked of all images.
            kind: a name of `calm.output.MAP_KINDS`; None is ``joint`` for CALM, ``cam`` for CAM.
            superclass: for the superclass kinds: target to its classes.
            size: (height, width) of the maps; None is the size of the images.

        Raises:
            CalmError: see `calm.output.attribute`; checked before the forward pass where possible.
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
        first: output.Targets,
        second: output.Targets,
        kind: str | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> Float[Tensor, "b H W"]:
        """Why class ``first`` and not ``second``, (B,) each or one for all images: abs of the difference of their maps
        on the grid, resized as in `attribute`. One forward pass."""
        kind = self.map_kind(kind)
        pair = torch.stack([output.as_targets(one, len(images)) for one in (first, second)], dim=1)
        one, other = self(images).attribute(pair, kind).unbind(dim=1)
        return resize_maps(output.difference(one, other), size or _height_width(images))

    def map_kind(self, kind: str | None = None) -> str:
        """The canonical name of a map kind of this model; of its default one for None."""
        family = "cam" if self.config.method == "cam" else "calm"
        return output.canonical_kind(kind or {"cam": "cam", "calm": "joint"}[family], family)

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Float[Tensor, "b 3 H W"]:
        """Image files, PIL images or uint8 RGB arrays (H, W, 3), one or a list, as a batch on the model's device."""
        return self.preprocessing(images).to(self.device)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write weights (safetensors) and everything else (JSON) to ``folder``: see `calm.checkpoint.write`."""
        return checkpoint.write(
            folder,
            self.state_dict(),
            self.config,
            self.class_names,
            self.preprocessing,
            self.training_summary,
        )

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the model to the Hugging Face Hub, where `load` finds it under ``repo_id``.

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            private: whether a new repository is private.
            token: of the hub; None is the one that ``hf auth login`` stored.

        Returns:
            The address of the commit.

        Raises:
            CalmError: the hub cannot be reached, or refuses.
        """
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "model")
            return checkpoint.upload(folder, repo_id, private=private, token=token)

    @staticmethod
    def from_pretrained(source: str | Path, **options: Any) -> CalmModel:
        """Load from a folder or a hub id: `calm.load`."""
        return load(source, **options)

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


def load(
    source: str | os.PathLike[str],
    *,
    backbone: nn.Module | None = None,
    map_location: str | torch.device = "cpu",
) -> CalmModel:
    """Load a saved model, in eval mode.

    Args:
        source: a folder that `CalmModel.save_pretrained` wrote; or the folder of a training run, whose best model is
            taken, or its last if there is no best; or a model on the Hugging Face Hub, ``owner/name``.
        backbone: the module for a model whose backbone was the user's own, built as it was then.
        map_location: the device.

    The global random state is left as it was.

    Raises:
        CalmError: see `calm.checkpoint.read`; or weights that do not fit, a backbone missing or superfluous.
    """
    folder, card, state = checkpoint.read(source)
    config = card.model
    if (backbone is None) == (config.backbone == "custom"):
        raise CalmError(
            f"the model in {folder} was made with the user's own backbone: build that module as it was, and give "
            "it as backbone="
            if backbone is None
            else f"the model in {folder} has the backbone {config.backbone!r}: leave backbone= out"
        )
    options = {name: value for name, value in asdict(config).items() if name != "backbone"}
    try:
        with torch.random.fork_rng(devices=[]):
            model = create_model(
                backbone or config.backbone,
                class_names=card.class_names,
                preprocessing=card.preprocessing,
                **options,
            )
    except CalmError as error:
        raise CalmError(f"{folder / checkpoint.CARD}: {error}") from error
    model.training_summary = card.training
    try:
        checkpoint.fill(model, state)
    except CalmError as error:
        made, here = card.versions.get("timm"), version("timm")
        hint = f" (made with timm {made}, here is {here})" if made != here else ""
        raise CalmError(
            f"{folder / checkpoint.WEIGHTS} does not fit the model in {checkpoint.CARD}: {error}{hint}"
        ) from error
    return model.to(map_location).eval()
