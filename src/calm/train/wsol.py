"""Training methods of weakly-supervised localization: Hide-and-Seek on images, attention-based dropout in the backbone.

CutMix is part of `calm.data.transforms.BatchMix`, and ACoL, which changes the model, is `calm.acol`. The options of all
are `calm.config.WsolOptions`. They act in training mode alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm.backbones.released import VGG16, InceptionV3, ResNet50
from calm.backbones.small import SmallResNet
from calm.backbones.timm_models import TimmBackbone
from calm.config import WsolOptions
from calm.data.records import first_of
from calm.errors import CalmError
from calm.inference import evaluation_mode, seeded


def hide_patches(
    images: Float[Tensor, "b c H W"], patches: Sequence[int], rate: float, *seed: int
) -> Float[Tensor, "b c H W"]:
    """Return images of which random square patches are filled with the batch's mean of each channel.

    Each image is divided into patches of one side, drawn from ``patches`` for it; the last row and column may be cut.
    Each patch is hidden with probability ``rate``. The random numbers depend on ``seed`` alone.

    Source: Singh and Lee, "Hide-and-Seek: Forcing a Network to be Meticulous for Weakly-supervised Object and Action
    Localization", ICCV 2017, section 3.1: sides of 16, 32, 44 and 56 pixels of 224, rate 0.5, and the mean over the
    training set. Choe et al. (2020) search side and rate; their defaults are 4 pixels, 0.5 and ImageNet's mean, 0.
    """
    count, _, height, width = images.shape
    hidden = torch.zeros(count, 1, height, width, dtype=torch.bool)
    with seeded(*seed):
        chosen = torch.randint(len(patches), (count, 1, 1, 1))
        for number, side in enumerate(patches):
            grid = torch.rand(count, 1, -(-height // side), -(-width // side)) < rate
            pixels = grid.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)[..., :height, :width]
            hidden |= pixels & (chosen == number)
    mean = images.mean(dim=(0, 2, 3), keepdim=True)
    return torch.where(hidden.to(images.device, non_blocking=True), mean, images)


def drop_by_attention(features: Float[Tensor, "b d h w"], rate: float, threshold: float) -> Float[Tensor, "b d h w"]:
    """Return features times their attention's drop mask, with probability ``rate``, or else times their importance.

    The attention A is the mean over the channels. The drop mask is 1 where A < threshold * max A, else 0, and hides the
    most telling part; the importance is sigmoid(A). One draw, by torch's global generator, is for the whole batch.

    Source: Choe and Shim, "Attention-based Dropout Layer for Weakly Supervised Object Localization", CVPR 2019, section
    3; its rate of 0.75 and threshold of 0.9 are the defaults of Choe et al. (2020), too, who search both.
    """
    attention = features.mean(dim=1, keepdim=True)
    drop = (attention < threshold * attention.amax(dim=(-2, -1), keepdim=True)).to(features.dtype)
    return features * torch.where(torch.rand((), device=features.device) < rate, drop, attention.sigmoid())


def add_attention_dropout(backbone: nn.Module, options: WsolOptions, shape: tuple[int, int, int]) -> list[str]:
    """Let parts of a backbone pass on `drop_by_attention` of their outputs in training mode, and return their names.

    Args:
        backbone: gets hooks; its state dict stays as it is.
        options: name the parts; without names they are those of `dropout_layers`.
        shape: (channels, height, width) of the images.

    Raises:
        CalmError: there is no such part, or its output is no grid (B, D, h, w).
    """
    parts = dict(backbone.named_modules())
    names = options.adl_layers or dropout_layers(backbone)
    for name in names:
        if name not in parts:
            close = get_close_matches(name, parts, n=3) or [child for child, _ in backbone.named_children()]
            raise CalmError(f"wsol.adl_layers: the backbone has no part {name!r}; there are {first_of(close)}, ...")
    last = getattr(getattr(backbone, "model", backbone), "output_fmt", "NCHW") != "NCHW"
    shapes: dict[str, Any] = {}
    hooks = [parts[name].register_forward_hook(partial(_record, shapes, name)) for name in names]
    try:
        with evaluation_mode(backbone), torch.no_grad():
            backbone(torch.zeros(1, *shape))
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        if last or len(shapes.get(name, ())) != 4:
            found = "channels last" if last else f"shape {shapes.get(name, 'none: it is not run')}"
            fix = "name parts that return (B, D, h, w) in wsol.adl_layers, or choose a convolutional backbone"
            raise CalmError(f"attention-based dropout (adl) is for grids of features; part {name!r} has {found}: {fix}")
        parts[name].register_forward_hook(partial(_drop, rate=options.adl_rate, threshold=options.adl_threshold))
    return list(names)


def dropout_layers(backbone: nn.Module) -> list[str]:
    """Return the names of the parts that attention-based dropout follows by default.

    Those of the released architectures are Choe et al.'s (2020); of others it is the last two stages.

    Raises:
        CalmError: the backbone is the user's own, or a timm model that does not say what its stages are.
    """
    match backbone:
        case ResNet50():
            return ["layer3.0", "layer4.0", "layer4.2"]
        case InceptionV3():
            return ["Mixed_5d", "Mixed_6e", "A3_2b"]
        case VGG16():  # the third pooling, and the ReLU of the last convolution of the blocks conv4 and conv5
            names = [name for name, part in backbone.features.named_children() if isinstance(part, nn.MaxPool2d)]
            relus = [name for name, part in backbone.features.named_children() if isinstance(part, nn.ReLU)]
            return [f"features.{name}" for name in (names[2], relus[9], relus[12])]
        case SmallResNet():
            return [f"stages.{number}" for number in range(len(backbone.stages))[-2:]]
        case TimmBackbone() if stages_of := getattr(backbone.model, "feature_info", None):
            stages = [info["module"] for info in stages_of]
            return [f"model.{name}" for name in stages[-2:]]
    raise CalmError(
        "attention-based dropout (adl) has no default place in this backbone: name parts in wsol.adl_layers"
    )


def _record(shapes: dict[str, Any], name: str, part: nn.Module, inputs: Any, output: Any) -> None:
    shapes[name] = tuple(getattr(output, "shape", ()))


def _drop(part: nn.Module, inputs: Any, output: Tensor, *, rate: float, threshold: float) -> Tensor:
    return drop_by_attention(output, rate, threshold) if part.training else output
