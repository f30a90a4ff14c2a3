"""The configuration of a model, and the literal types of string options. Nothing here imports PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from calm.errors import CalmError, shown, unknown

Method: TypeAlias = Literal["calm-em", "calm-ml", "cam"]
PriorActivation: TypeAlias = Literal["softplus", "relu", "exp"]
PriorDenominator: TypeAlias = Literal["differentiated", "constant"]

Fill: TypeAlias = Literal["zero", "mean", "noise", "blur"]
"""How erased pixels are filled: see `calm.metrics.erasing`."""

Explain: TypeAlias = Literal["label", "prediction"]
"""Whose map ranks the pixels: see `calm.evaluate.erasing`."""

Order: TypeAlias = Literal["cascading", "all"]
"""In which order weights are randomised: see `calm.evaluate.randomisation`."""

Precision: TypeAlias = Literal["32-true", "bf16-mixed"]
"""Of predictions and a model's own maps: float32, or bfloat16 for convolutions and matrix products."""

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The paper's shares of erased pixels in remove-and-classify."""

DRAWS = 3
"""Random erasures of each image that R_k is relative to: see `calm.metrics.erasing`."""

REPLICATES = 1000
"""The default number of bootstrap samples: 25 of them lie beyond each end of a 95 percent interval."""


def class_index(names: Sequence[str], text: str) -> int:
    """Return the index of the class that ``text`` names, among the names of a model's classes.

    Case does not matter, a space may stand for an underscore, and CUB's number may be left out: "painted bunting" is
    "016.Painted_Bunting". A number is an index, unless all names are numbers.

    Raises:
        CalmError: If there is no such class; the message has the closest names.

    >>> class_index(["015.Lazuli_Bunting", "016.Painted_Bunting"], "painted bunting")
    1
    """
    wanted, *full = (name.strip().casefold().replace(" ", "_") for name in (text, *names))
    short = [name.partition(".")[2] if name.split(".")[0].isdecimal() else name for name in full]
    for spelling in (full, short):
        if spelling.count(wanted) == 1:
            return spelling.index(wanted)
    numbers = "" if all(map(str.isdecimal, full)) else f" or 0 to {len(names) - 1}"  # an index is no name's number
    if wanted.isdecimal() and int(wanted) < len(names) and numbers:
        return int(wanted)
    close = [names[short.index(name)] for name in get_close_matches(wanted, short, n=3, cutoff=0.4)]
    hint = f"; close are {', '.join(map(repr, close))}" if close else ""
    raise CalmError(f"no class {text!r}: give one of the model's {len(names)} names{numbers}{hint}")


def check_options(options: Any, group: str, **ranges: tuple[float, float]) -> None:
    """Check the choices and the ranges (both ends allowed) of a group of options; a `CalmError` names the flag."""
    for name, kind in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise unknown(group + name, value, get_args(kind))
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise CalmError(f"{group}{name} is {shown(value)}: allowed are {low:g} to {high:g}")


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of: with the weights, all that loading needs.

    Attributes:
        backbone: A released architecture (``resnet50``, ``vgg16``, ``inception_v3``), ``small_resnet``, a timm
            model's name, or ``custom`` for the user's own module.
        num_classes: C, the number of classes.
        method: ``calm-em`` and ``calm-ml`` are one model with two training losses; ``cam`` is the baseline.
        large_feature_map: For released architectures: a 28x28 grid for 224x224 input instead of 14x14.
        use_bn: For vgg16 and inception_v3: BatchNorm where the released code makes it optional.
        output_stride: For timm models that support it: image size over grid size.
        in_channels: The channels of the images: 3 for RGB.
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
    in_channels: int = 3

    def __post_init__(self) -> None:
        check_options(self, "")
        if min(self.num_classes, self.in_channels) < 1:
            given = f"num_classes is {self.num_classes}, in_channels {self.in_channels}"
            raise CalmError(f"{given}: a classifier needs at least 1 of each")
