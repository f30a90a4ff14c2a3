"""Networks that turn images (B, 3, H, W) into features (B, D, h, w): D is the attribute ``out_channels``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from torch import nn

from calm.backbones.custom import adapt_backbone
from calm.backbones.inception import InceptionV3
from calm.backbones.resnet import ResNet50
from calm.backbones.small import SmallResNet, narrow_resnet, tiny_resnet
from calm.backbones.timm_models import TimmBackbone, is_timm_name
from calm.backbones.vgg import VGG16
from calm.errors import CalmError

__all__ = ["BACKBONES", "adapt_backbone", "build_backbone"]

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet50": ResNet50,
    "vgg16": VGG16,
    "inception_v3": InceptionV3,
    "small_resnet": SmallResNet,
    "narrow_resnet": narrow_resnet,
    "tiny_resnet": tiny_resnet,
}
"""Our own backbones; every other name is a timm model's. Each has the options of its constructor."""


def build_backbone(
    name: str,
    *,
    pretrained: bool = False,
    large_feature_map: bool = True,
    use_bn: bool = True,
    output_stride: int | None = None,
) -> nn.Module:
    """Build a backbone by name; ``timm/NAME`` is timm's model even where we have our own of that name.

    Args:
        name: a key of `BACKBONES`, or a timm model's name, with or without ``timm/`` before it.
        pretrained: start from ImageNet weights, cached or downloaded (not for our small ones).
        large_feature_map: stride 8 instead of 16 (``resnet50``, ``vgg16``, ``inception_v3``).
        use_bn: BatchNorm where the layout makes it optional (``vgg16``, ``inception_v3``).
        output_stride: pixels per grid cell; None keeps the model's own (timm models).

    Raises:
        CalmError: an unknown name, an option that this backbone does not have, or pretrained weights that
            cannot be had.

    >>> build_backbone("small_resnet").out_channels
    256
    """
    if name in BACKBONES:
        build = BACKBONES[name]
    elif is_timm_name(name):
        build = partial(TimmBackbone, name)
    else:
        raise _unknown(name)
    options = {
        "pretrained": pretrained,
        "large_feature_map": large_feature_map,
        "use_bn": use_bn,
        "output_stride": output_stride,
    }
    own = inspect.signature(build).parameters
    defaults = inspect.signature(build_backbone).parameters
    for option, value in options.items():
        if option not in own and value != defaults[option].default:
            every = {**BACKBONES, "timm models": TimmBackbone}
            having = [other for other, them in every.items() if option in inspect.signature(them).parameters]
            raise CalmError(
                f"backbone {name!r} has no option {option}, given {option}={value}: leave it out, or choose "
                f"among {', '.join(having)}"
            )
    return build(**{option: value for option, value in options.items() if option in own})


def _unknown(name: str) -> CalmError:
    import timm

    known = dict.fromkeys([*BACKBONES, *timm.list_models()])
    close = get_close_matches(name.removeprefix("timm/"), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return CalmError(
        f"unknown backbone {name!r}: allowed are {', '.join(BACKBONES)}, any name of timm.list_models(), or "
        f"your own nn.Module that returns features (B, D, h, w){hint}"
    )
