"""The configuration of a model, and the literal types of string options. Nothing here imports PyTorch."""

from __future__ import annotations

import ast
import os
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeAlias, get_args, get_origin, get_type_hints

from calm.errors import CalmError, shown, unknown

Method: TypeAlias = Literal["calm-em", "calm-ml", "cam"]
PriorActivation: TypeAlias = Literal["softplus", "relu", "exp"]
Interpolation: TypeAlias = Literal["bilinear", "bicubic"]
PriorDenominator: TypeAlias = Literal["differentiated", "constant"]

Localizer: TypeAlias = Literal["has", "adl", "acol", "spg", "cutmix"]
"""Training methods of weakly-supervised localization: see `WsolOptions`."""

Fill: TypeAlias = Literal["zero", "mean", "noise", "blur"]
"""How erased pixels are filled: see `calm.metrics.erasing`."""

Explain: TypeAlias = Literal["label", "prediction"]
"""Whose map ranks the pixels: see `calm.evaluate.erasing`."""

Order: TypeAlias = Literal["cascading", "all"]
"""In which order weights are randomised: see `calm.evaluate.randomisation`."""

Precision: TypeAlias = Literal["32-true", "bf16-mixed"]
"""Of predictions and a model's own maps: float32, or bfloat16 for convolutions and matrix products."""

ExportFormat: TypeAlias = Literal["onnx", "torch-export", "executorch"]
"""Runtimes that a model is exported to: see `calm.exporting`."""

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
        if same := [str(index) for index, name in enumerate(spelling) if name == wanted]:
            raise CalmError(f"{len(same)} classes are called {text!r}: give an index, {' or '.join(same)}")
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
        if get_origin(kind) is tuple and not isinstance(value, (tuple, list)):
            raise CalmError(f"{group}{name} is {shown(value)}: give several values, as in ({shown(value)}, ...)")
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise CalmError(f"{group}{name} is {shown(value)}: allowed are {low:g} to {high:g}")


def check_pooling(exponent: float, denominator: PriorDenominator, method: Method = "calm-em") -> None:
    """Raise a `CalmError` unless a model of this method, with this denominator of the prior, can have the exponent."""
    given = f"pooling_exponent is {exponent:g}"
    if exponent != 0 and not 1e-6 <= exponent <= 1:  # losses divide by it
        raise CalmError(f"{given}: give 1 (CALM), 0 (CAM weighted by the prior), or from 1e-6 to 1")
    if exponent != 1 and method == "cam":
        raise CalmError(f"{given}, but CAM has no prior to weight by: leave it out, or take method calm-ml")
    if exponent != 1 and denominator == "constant":
        fix = "take prior_denominator differentiated"
        raise CalmError(f"{given}, but the released code, whose denominator is constant, has none: {fix}")


class Code(NamedTuple):
    """The user's own code that builds a backbone, as a name says it: see `parse_code`."""

    module: str
    function: str
    arguments: dict[str, Any]


def parse_code(name: str) -> Code | None:
    """Return what ``package.module:function`` or ``package.module:function(width=32)`` means; None for other names.

    Raises:
        CalmError: If the arguments are not names with plain values (numbers, strings, lists, ...).
    """
    module, colon, call = name.partition(":")
    if not colon or len(name) > 500 or not name.isprintable() or not all(map(str.isidentifier, module.split("."))):
        return None
    try:
        tree = ast.parse(call.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    function = tree.func if isinstance(tree, ast.Call) else tree
    if not isinstance(function, ast.Name):
        return None
    if not isinstance(tree, ast.Call):
        return Code(module, function.id, {})
    try:
        arguments = {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords if word.arg is not None}
    except (ValueError, TypeError, MemoryError, RecursionError) as error:
        kinds = "numbers, 'text' in quotes, True, None, and lists of these"
        raise CalmError(f"backbone {name!r}: its arguments must be plain values: {kinds}") from error
    if tree.args or len(arguments) < len(tree.keywords):
        raise CalmError(f"backbone {name!r}: give its arguments by name, as in nets:small(width=32)")
    return Code(module, function.id, arguments)


TRUST = "CALM_TRUST"
"""The environment variable with the names of the code that models may import, one a line."""


def trust(name: str) -> None:
    """Let models that are loaded in this process, and those it starts, import the code ``name``, with its arguments."""
    os.environ[TRUST] = "\n".join([os.environ.get(TRUST, ""), name]).strip()


def check_trusted(name: str, where: str) -> None:
    """Raise a CalmError if ``name`` is code that nobody has said to trust: whoever wrote a file may name any function.

    Args:
        name: A backbone's name.
        where: The file that has it, for the message.
    """
    code, trusted = parse_code(name), os.environ.get(TRUST, "").splitlines()
    if code is not None and code not in map(parse_code, trusted):
        alike = [other for other in trusted if (known := parse_code(other)) and known[:2] == code[:2]]
        but = f" (you trust it with other arguments, {alike[-1]}, and these count, too)" if alike else ""
        raise CalmError(
            f"{where} names code to import for its backbone: {name}{but}. If you know that code, trust it: "
            f"calm --trust {shlex.quote(name)} COMMAND ..., or calm.load(..., backbone={name!r})"
        )


@dataclass(frozen=True)
class ModelConfig:
    """What a model is made of: with the weights, all that loading needs.

    Attributes:
        backbone: A released architecture (``resnet50``, ``vgg16``, ``inception_v3``), ``small_resnet``, a timm
            model's name, code that builds the user's own module (`parse_code`), or ``custom`` for such a module itself.
        num_classes: C, the number of classes.
        method: ``calm-em`` and ``calm-ml`` are one model with two training losses; ``cam`` is the baseline.
        large_feature_map: For released architectures: a 28x28 grid for 224x224 input instead of 14x14.
        use_bn: For vgg16 and inception_v3: BatchNorm where the released code makes it optional.
        output_stride: For timm models that support it: image size over grid size.
        in_channels: The channels of the images: 3 for RGB.
        prior_activation: ``softplus`` (paper), ``relu`` (released code and weights) or ``exp`` (spatial softmax).
        prior_denominator: ``differentiated`` (exact) or ``constant`` (released code).
        pooling_exponent: The exponent a of the power mean over the locations that predicts (`calm.latent.pooled`): 1 is
            CALM, 0 is CAM weighted by the prior.
        acol_threshold: For ACoL, which has a second head: where the first head's map, min-max normalised, is as high,
            features are erased for the second (`calm.acol`); None is one head.
        acol_channels: For ACoL: the channels of the convolutions before each head; None is 1024, or fewer features.
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
    acol_threshold: float | None = None
    acol_channels: int | None = None
    pooling_exponent: float = 1.0

    def __post_init__(self) -> None:
        check_options(self, "", acol_threshold=(1e-6, 1), acol_channels=(1, 1e6))
        check_pooling(self.pooling_exponent, self.prior_denominator, self.method)
        if self.acol_channels is not None and self.acol_threshold is None:
            raise CalmError(f"acol_channels is {self.acol_channels}, but acol_threshold is None: give it, or neither")
        if min(self.num_classes, self.in_channels) < 1:
            given = f"num_classes is {self.num_classes}, in_channels {self.in_channels}"
            raise CalmError(f"{given}: a classifier needs at least 1 of each")

    @property
    def title(self) -> str:
        """The method as tables name it, "CALM-EM", with a pooling exponent that is not the published one."""
        return self.method.upper() + (f" exponent {self.pooling_exponent:g}" if self.pooling_exponent != 1 else "")


@dataclass(frozen=True)
class WsolOptions:
    """Training methods of weakly-supervised localization, for either head; several are combined.

    They make the network look at more of the object than its most telling part. The defaults are those of Choe et al.,
    "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020; docs/localization.md has the papers'.

    Attributes:
        methods: of ``has`` (Hide-and-Seek: random patches of the images are hidden), ``adl`` (attention-based dropout
            of features), ``acol`` (a second head on what the first head's map leaves), ``spg`` (masks of fore- and
            background, made from the map, teach earlier stages) and ``cutmix`` (a window of each image comes from
            another; alpha is augment.cutmix, 1 if that is 0).
        has_patches: sides in pixels of the square patches; each image gets one of them at random.
        has_rate: probability that a patch is hidden.
        adl_rate: probability that the most attended locations are dropped, instead of all weighted by attention.
        adl_threshold: share of the attention's maximum from which on a location is dropped.
        adl_layers: names of the backbone's parts whose outputs are dropped from; by default the published ones of the
            released backbones, and of others the last two stages.
        acol_threshold: height of the first head's map, min-max normalised, from which on features are erased.
        acol_channels: channels of the two convolutions before each head; by default 1024, or the features' if fewer.
        spg_foreground_b2, spg_background_b2: the label's map, min-max normalised, above which a pixel is foreground for
            the branch B2, and below which it is background; the pixels between do not count.
        spg_foreground_b1, spg_background_b1: the same for the branch B1, of what B2 says.
        spg_foreground_c, spg_background_c: the same for the branch C, of the mean of what B1 and B2 say.
        spg_layers: names of the two parts of the backbone that the branches B1 and B2 read; by default the published
            ones of the released backbones, and of others the two stages before the last.
        spg_channels: channels of the branches' convolutions; by default 512, or those of B2's part if fewer.
    """

    methods: list[Localizer] = field(default_factory=list)
    has_patches: list[int] = field(default_factory=lambda: [4])
    has_rate: float = 0.5
    adl_rate: float = 0.75
    adl_threshold: float = 0.9
    adl_layers: list[str] = field(default_factory=list)
    acol_threshold: float = 0.7
    acol_channels: int | None = None
    spg_foreground_b2: float = 0.7
    spg_background_b2: float = 0.01
    spg_foreground_b1: float = 0.5
    spg_background_b1: float = 0.05
    spg_foreground_c: float = 0.7
    spg_background_c: float = 0.1
    spg_layers: list[str] = field(default_factory=list)
    spg_channels: int | None = None

    def __post_init__(self) -> None:
        cuts = [(f"spg_background_{branch}", f"spg_foreground_{branch}") for branch in ("b2", "b1", "c")]
        rates = dict.fromkeys(("has_rate", "adl_rate", "adl_threshold", *chain(*cuts)), (0, 1))
        channels = dict.fromkeys(("acol_channels", "spg_channels"), (1, 1e6))
        check_options(self, "wsol.", acol_threshold=(1e-6, 1), **channels, **rates)
        for low, high in cuts:
            if not getattr(self, low) <= getattr(self, high):
                values = f"{getattr(self, low):g} is above wsol.{high} {getattr(self, high):g}"
                raise CalmError(f"wsol.{low} {values}: what is foreground would be background")
        if len(self.spg_layers) not in (0, 2):
            raise CalmError(f"wsol.spg_layers are {shown(self.spg_layers)}: name two, for the branches B1 and B2")
        for given in self.methods:
            if given not in get_args(Localizer):
                raise unknown("training method of wsol.methods", given, get_args(Localizer))
        if not self.has_patches or min(self.has_patches) < 1:
            raise CalmError(
                f"wsol.has_patches are {shown(self.has_patches)}: give sides of 1 pixel or more, as [16,32]"
            )
        default = {
            one.name: one.default if one.default_factory is MISSING else one.default_factory() for one in fields(self)
        }
        for name, value in default.items():
            method = name.partition("_")[0]
            if getattr(self, name) != value and method in get_args(Localizer) and method not in self.methods:
                raise CalmError(f"wsol.{name} belongs to the method {method}: add it to wsol.methods, as [{method}]")
