"""Any timm model as a backbone: the feature map of convolutional models, the tokens of transformers as a grid."""

from __future__ import annotations

import math
from contextlib import nullcontext
from copy import deepcopy
from itertools import product
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm.backbones.weights import WITHOUT_NETWORK, load_weights, packaged_weights, weights_at_hand
from calm.checkpoint import hub_or_cache
from calm.config import Interpolation
from calm.errors import CalmError, unknown

# Keywords with which a model accepts other image sizes than its own; they differ between timm's families.
# `strict_img_size` comes first: in older timm Swin takes the other one too, and ignores it.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({"strict_img_size": False}, {"dynamic_img_size": True}, {})


class TimmBackbone(nn.Module):
    """A timm model without classifier, whose last features are a grid (B, D, h, w).

    The features are those of timm's ``forward_features``: NHWC ones are permuted, tokens are laid out row by row
    after the prefix tokens (class, distillation, register) are dropped. Where they are no grid (coat, crossvit,
    efficientvim, pit, volo), the last of ``forward_intermediates`` are taken. Position embeddings are interpolated
    to the size of the images where the model allows it. Parameters that the features do not depend on are
    frozen: they get no gradient, so distributed training does not wait for one.

    The arguments are those of `calm.backbones.build_backbone`.

    Attributes:
        out_channels: D.
        size: (height, width) in pixels of the images that the model is made for.
        grid: (rows, columns) of its features for an image of that size.
        normalization: mean and std per channel that its pretrained weights expect, of RGB in [0, 1].
        interpolation: the filter that resized the images which they were trained on, bilinear or bicubic.

    Raises:
        CalmError: If the tag is unknown, the model cannot have the stride, its features are no grid, or the weights
            cannot be obtained.
    """

    def __init__(
        self, name: str, *, pretrained: bool = False, output_stride: int | None = None, in_channels: int = 3
    ) -> None:
        super().__init__()
        if output_stride not in (None, 8, 16, 32):
            raise CalmError(f"output_stride={output_stride} is not possible: allowed are 8, 16, 32 and None")
        self.name = name.removeprefix("timm/")
        _check_tag(self.name, pretrained)
        options = {"in_chans": in_channels} | ({} if output_stride is None else {"output_stride": output_stride})
        with hub_or_cache() if pretrained else nullcontext("") as silent:
            packaged = packaged_weights(self.name) if pretrained else None
            try:
                self.model = _create(self.name, pretrained, silent, **options)
            except CalmError:
                if packaged is None:
                    raise
                self.model, pretrained = _create(self.name, False, "", **options), False
        self.out_channels = int(self.model.num_features)  # type: ignore[arg-type]
        card: dict[str, Any] = self.model.pretrained_cfg  # type: ignore[assignment]
        self.normalization = tuple(card["mean"]), tuple(card["std"])
        own_filter = card.get("interpolation")
        self.interpolation = own_filter if own_filter in get_args(Interpolation) else "bilinear"
        self.size: tuple[int, int] = tuple(card["input_size"][1:])
        self.intermediates = False
        try:
            features, parameters = run_on_meta(self, (in_channels, *self.size))
        except CalmError:
            if not hasattr(self.model, "forward_intermediates"):
                raise
            self.intermediates = True
            features, parameters = run_on_meta(self, (in_channels, *self.size))
            self.out_channels = features.shape[1]
        self.grid = rows, columns = tuple(features.shape[-2:])
        height, width = self.size
        if output_stride is not None and rows not in (height // output_stride, -(-height // output_stride)):
            kept = f"its grid keeps {rows} x {columns} cells for {height} x {width} pixels"
            fix = "Leave output_stride out, or choose another model"
            raise CalmError(f"timm model {self.name!r} does not take output_stride={output_stride}: {kept}. {fix}")
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters(), gradients, strict=True):
            parameter.requires_grad_(parameter.requires_grad and gradient is not None)
        if packaged is not None and not pretrained:
            load_weights(self, packaged)

    def forward(self, images: Float[Tensor, "b k H W"]) -> Float[Tensor, "b d h w"]:
        """Return the features of normalised images; for sizes that the model does not take, see `check_size`."""
        if self.intermediates:
            options = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
            last: Tensor = self.model.forward_intermediates(images, **options)[-1]  # type: ignore[operator]
            return last
        features: Tensor = self.model.forward_features(images)  # type: ignore[operator]
        prefix = int(getattr(self.model, "num_prefix_tokens", 0))
        height, width = images.shape[-2:]
        shape = tuple(getattr(features, "shape", ()))
        match shape:
            case (_, self.out_channels, _, _):
                return features
            case (_, _, _, self.out_channels):
                return features.permute(0, 3, 1, 2)
            case (batch, tokens, self.out_channels) if grid := grid_of_tokens(height, width, tokens - prefix):
                return features[:, prefix:].transpose(1, 2).reshape(batch, self.out_channels, *grid)
        raise CalmError(
            f"timm model {self.name!r} gives no grid of locations: its features for an image of {height} x {width} "
            f"pixels are {f'of shape {shape}' if shape else 'several tensors'}. Choose a model with one, such as "
            "resnet50, convnext_tiny or vit_small_patch16_224"
        )


def grid_of_tokens(height: int, width: int, cells: int) -> tuple[int, int] | None:
    """Return (rows, columns) of the square patches of an image; those at the border are cut off or padded."""
    if cells < 2:
        return None
    patch = math.isqrt(height * width // cells)
    rows, columns = ((side // patch, -(-side // patch)) for side in (height, width))
    return next((grid for grid in product(rows, columns) if grid[0] * grid[1] == cells), None)


def is_timm_name(name: str) -> bool:
    """Return whether timm has a model of this name, given with or without ``timm/`` before it and a tag after it."""
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


def _create(name: str, pretrained: bool, silent: str, **options: Any) -> nn.Module:
    import timm

    for extra in _ANY_SIZE:
        try:
            model: nn.Module = timm.create_model(name, pretrained, num_classes=0, **options, **extra)
        except (TypeError, AssertionError) as error:
            if any(keyword in str(error) for keyword in extra):
                continue  # no such keyword: timm has no way to ask beforehand
            if "output_stride" not in options:
                raise
            raise CalmError(
                f"timm model {name!r} does not take output_stride={options['output_stride']}: leave it out, or "
                "choose a family that timm can dilate, such as resnet, convnext or efficientnet"
            ) from error
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            fix = f"copy the hub's cache (HF_HOME) from a machine that has them, or {WITHOUT_NETWORK}, or begin"
            raise CalmError(
                f"cannot get the pretrained weights of timm model {name!r}: {silent or str(error).rstrip('.')}. "
                f"{weights_at_hand()}, or connect to the network, or {fix} at random with pretrained=False "
                "(calm train: --model.pretrained false)"
            ) from error
        return model
    raise AssertionError("the last attempt has no extra keyword that could be refused")


def run_on_meta(module: nn.Module, shape: tuple[int, ...]) -> tuple[Any, list[nn.Parameter]]:
    """Return the output of a copy of ``module`` in eval mode for one image of ``shape``, and the copy's parameters.

    Nothing is computed: the copy is on the meta device. Whatever the module raises for such an image is raised.
    """
    # Recurrent layers are an exception: on the meta device PyTorch unrolls them in Python, which takes longer.
    recurrent = any(isinstance(part, nn.RNNBase) for part in module.modules())
    like = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.empty(0))
    device = like.device if recurrent else torch.device("meta")
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        moved: dict[int, Any] = {id(tensor): tensor.detach().to(device) for tensor in module.buffers()}
        for tensor in module.parameters():
            moved[id(tensor)] = nn.Parameter(tensor.detach().to(device), tensor.is_floating_point())
        copy = deepcopy(module, moved).eval()  # it shares what the module shares, but no tensor with the module
        output = copy(torch.zeros(1, *shape, dtype=like.dtype, device=device))
    return output, list(copy.parameters())
