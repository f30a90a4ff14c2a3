"""Which layers are new: what a pretrained backbone lacks, and what the released code counts among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calm.errors import CalmError

if TYPE_CHECKING:
    from calm.train.config import Grouping

__all__ = ["is_new"]

# Substrings of the parameter names that the released code trains at the low rate (main.py of the released code).
RELEASED_BACKBONE_NAMES = {
    "vgg16": ("features.",),
    "resnet50": ("conv1", "layer1", "layer2", "layer3"),
    "inception_v3": ("Mixed", "Conv2d_1", "Conv2d_2", "Conv2d_3", "Conv2d_4"),
}


def is_new(name: str, backbone: str, grouping: Grouping) -> bool:
    """Whether the parameter ``name`` of a `CalmModel` belongs to the new layers, with the higher rate.

    Raises:
        CalmError: ``released`` grouping asked for a backbone that the released code does not have.

    >>> is_new("head.conv_last.weight", "resnet50", "head")
    True
    >>> [is_new(f"backbone.layer4.0.{layer}.weight", "resnet50", "released") for layer in ("conv1", "conv2")]
    [False, True]
    """
    if grouping == "head":
        return name.startswith("head.")
    if backbone not in RELEASED_BACKBONE_NAMES:
        known = ", ".join(RELEASED_BACKBONE_NAMES)
        raise CalmError(f"optim.grouping 'released' is defined for {known}, not for {backbone!r}: use 'head'")
    return not any(part in name for part in RELEASED_BACKBONE_NAMES[backbone])
