"""Any timm model as a backbone: the feature map of convolutional models, the tokens of transformers as a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from calm.errors import CalmError, unknown
from calm.inference import evaluation_mode

STRIDES = (8, 16, 32)

# Keywords with which a model accepts other image sizes than its own; they differ between timm's families.
# `strict_img_size` comes first: in older timm Swin takes the other one too, and ignores it.
_ANY_SIZE: tuple[dict[str, bool], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})


class TimmBackbone(nn.Module):
    """A timm model without classifier, whose last features are a grid (B, D, h, w).

    The features are those of timm's ``forward_features``: NHWC ones are permuted, tokens are laid out row by row
    after the prefix tokens (class, distillation, register) are dropped. Position embeddings are interpolated
    to the size of the images where the model allows it. Parameters that the features do not depend on are
    frozen: they get no gradient, so distributed training does not wait for one.

    Args:
        name: A timm model's name, with or without ``timm/`` before it, such as ``"convnext_atto"`` or
            ``"vit_tiny_patch16_224"``; a dot and the tag of pretrained weights may follow.
        pretrained: Whether to start from timm's weights of that name, cached or downloaded.
        output_stride: Pixels per grid cell, 8, 16 or 32, for families that timm can dilate; None keeps the
            model's own.

    Attributes:
        out_channels: D.
        fixed_size: (height, width) in pixels if the model takes images of one size only, else None.
        normalization: mean and std per channel that its pretrained weights expect, of RGB in [0, 1].

    Raises:
        CalmError: If the tag is unknown, the model cannot have the stride, its features are no grid, or the weights
            cannot be obtained.
    """

    def __init__(self, name: str, *, pretrained: bool = False, output_stride: int | None = None) -> None:
        super().__init__()
        if output_stride is not None and output_stride not in STRIDES:
            raise CalmError(f"output_stride={output_stride} is not possible: allowed are 8, 16, 32 and None")
        self.name = name.removeprefix("timm/")
        _check_tag(self.name, pretrained)
        self.model = _create(self.name, pretrained, output_stride)
        self.out_channels = int(self.model.num_features)  # type: ignore[arg-type]
        self.prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0))
        features = _Features(self.model)
        card: Mapping[str, Any] = self.model.pretrained_cfg  # type: ignore[assignment]
        self.normalization = tuple(card["mean"]), tuple(card["std"])
        height, width = (int(side) for side in card["input_size"][1:])
        shape = output_shape(features, height, width)
        self.layout, self.stride = self._layout(shape, height, width)
        if output_stride is not None and self.stride != output_stride:
            raise CalmError(
                f"timm model {self.name!r} does not take output_stride={output_stride}: its grid keeps one "
                f"cell per {self.stride} pixels. Leave output_stride out, or choose another model"
            )
        self.fixed_size = None if _runs(features, 2 * height, 2 * width) else (height, width)
        for name in unused_parameters(features, height, width):
            features.get_parameter(name).requires_grad_(False)

    def forward(self, images: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b d h w"]:
        """Return the features of normalised images.

        Raises:
            CalmError: If the model takes images of another size only.
        """
        height, width = images.shape[-2:]
        if self.fixed_size is not None and (height, width) != self.fixed_size:
            raise CalmError(
                f"timm model {self.name!r} takes images of {self.fixed_size[0]} x {self.fixed_size[1]} "
                f"pixels only, not {height} x {width}: resize to that, or choose another model"
            )
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        if self.layout == "NCHW":
            return features
        if self.layout == "NHWC":
            return features.permute(0, 3, 1, 2)
        grid = (height // self.stride, width // self.stride)
        tokens = features[:, self.prefix_tokens :].transpose(1, 2)
        return tokens.reshape(len(tokens), self.out_channels, *grid)

    def _layout(self, shape: tuple[int, ...] | None, height: int, width: int) -> tuple[str, int]:
        """Return the layout of features of ``shape`` for an image of height x width pixels, and the pixels per cell."""
        match shape:
            case (_, self.out_channels, rows, _):
                return "NCHW", round(height / rows)
            case (_, rows, _, self.out_channels):
                return "NHWC", round(height / rows)
            case (_, tokens, self.out_channels) if (cells := tokens - self.prefix_tokens) > 1:
                stride = math.isqrt(height * width // cells)
                if (height // stride) * (width // stride) == cells:
                    return "tokens", stride
        raise CalmError(
            f"timm model {self.name!r} gives no grid of locations: its features for an image of {height} x "
            f"{width} pixels are {f'of shape {shape}' if shape else 'several tensors'}. Choose a model with "
            "one, such as resnet50, convnext_tiny or vit_small_patch16_224"
        )


class _Features(nn.Module):
    """timm's ``forward_features`` as the forward pass of a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.forward_features(images)  # type: ignore[operator]


def is_timm_name(name: str) -> bool:
    """Whether timm has a model of this name, given with or without ``timm/`` before it and a tag after it."""
    import timm

    return bool(timm.is_model(name.removeprefix("timm/").partition(".")[0]))


def _check_tag(name: str, pretrained: bool) -> None:
    import timm

    model, _, tag = name.partition(".")
    tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model}.*")]
    if tag and tag not in tags:
        raise unknown(f"pretrained tag of timm model {model!r}", tag, tags)
    if pretrained and not tags:
        raise CalmError(f"timm has no weights for {model!r}: choose another model, or pretrained=False")


def _create(name: str, pretrained: bool, output_stride: int | None) -> nn.Module:
    import timm

    stride = {} if output_stride is None else {"output_stride": output_stride}
    for extra in _ANY_SIZE:
        arguments: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, **stride, **extra}
        try:
            model: nn.Module = timm.create_model(name, **arguments)
        except TypeError as error:  # no such keyword: timm has no way to ask beforehand
            if "output_stride" in str(error):
                raise CalmError(
                    f"timm model {name!r} does not take output_stride={output_stride}: leave it out, or "
                    "choose a family that timm can dilate, such as resnet, convnext or efficientnet"
                ) from error
            if not any(keyword in str(error) for keyword in extra):
                raise
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise CalmError(
                f"cannot get the pretrained weights of timm model {name!r}: {error} Connect to the network, "
                "or start from random weights with pretrained=False (calm train: --model.pretrained false)"
            ) from error
        else:
            return model
    raise AssertionError("the last attempt has no extra keyword that could be refused")


def _runs(features: nn.Module, height: int, width: int) -> bool:
    try:
        output_shape(features, height, width)
    except (AssertionError, RuntimeError, ValueError):  # how timm's families refuse an image size
        return False
    return True


def output_shape(module: nn.Module, height: int, width: int) -> tuple[int, ...] | None:
    """Return the shape of ``module``'s output for one image of height x width pixels; None if it is not one tensor.

    Nothing is computed: the module runs on the meta device. Whatever it raises for such an image is raised.
    """
    with torch.no_grad():
        output = _run(module, height, width, _on_meta(module))
    return tuple(output.shape) if isinstance(output, Tensor) else None


def unused_parameters(module: nn.Module, height: int, width: int) -> list[str]:
    """Return the names of the parameters that the output for an image of height x width pixels does not depend on."""
    state = _on_meta(module)
    trainable = {name: state[name].requires_grad_() for name, _ in module.named_parameters()}
    output = _run(module, height, width, state)
    assert isinstance(output, Tensor)
    gradients = torch.autograd.grad(output.sum(), list(trainable.values()), allow_unused=True)
    return [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]


def _on_meta(module: nn.Module) -> dict[str, Tensor]:
    named = (*module.named_parameters(), *module.named_buffers())
    return {name: tensor.detach().to("meta") for name, tensor in named}


def _run(module: nn.Module, height: int, width: int, state: dict[str, Tensor]) -> object:
    with evaluation_mode(module):
        return functional_call(module, state, (torch.empty(1, 3, height, width, device="meta"),))
