"""Backbones: networks that map images (B, K, H, W) to features (B, D, h, w), with D in the attribute ``out_channels``.

They are built by name (`build_backbone`), or are the user's own module (`adapt_backbone`).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calm.backbones.released import VGG16, InceptionV3, ResNet50, initialise
from calm.backbones.small import SmallResNet, narrow_resnet, tiny_resnet
from calm.backbones.timm_models import TimmBackbone, is_timm_name, run_on_meta
from calm.backbones.weights import WeightReport as WeightReport, load_weights as load_weights
from calm.config import parse_code
from calm.errors import CalmError
from calm.heatmaps import channels_last
from calm.inference import evaluation_mode

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet50": ResNet50,
    "vgg16": VGG16,
    "inception_v3": InceptionV3,
    "small_resnet": SmallResNet,
    "narrow_resnet": narrow_resnet,
    "tiny_resnet": tiny_resnet,
}
"""This package's own backbones; every other name is a timm model's. The options are those of the constructors."""

STEPS = (2, 4, 8, 14, 16, 28, 32, 64)
"""Sides of patches and windows, in pixels; `check_size` tries the nearest multiples of each."""


def build_backbone(
    name: str,
    *,
    pretrained: bool | str | os.PathLike[str] = False,
    large_feature_map: bool = True,
    use_bn: bool = True,
    output_stride: int | None = None,
    in_channels: int = 3,
) -> nn.Module:
    """Build a backbone by name; ``timm/NAME`` is timm's model even where `BACKBONES` has one of that name.

    Args:
        name: A key of `BACKBONES`, or a timm model's name, with or without ``timm/`` before it, such as
            ``"vit_tiny_patch16_224"``; a dot and the tag of pretrained weights may follow.
        pretrained: Whether to start from published weights, cached or downloaded (not for the small networks), or from
            an installed package (the extra ``offline``); or a file of weights, for any backbone: see `load_weights`.
        large_feature_map: Whether the stride is 8 instead of 16 (``resnet50``, ``vgg16``, ``inception_v3``).
        use_bn: Whether there is BatchNorm where it is optional (``vgg16``, ``inception_v3``).
        output_stride: Pixels per grid cell, 8, 16 or 32, for timm models that can be dilated; None keeps their own.
        in_channels: The channels of the images. The pretrained weights of three are spread over any other number.

    Raises:
        CalmError: If the name is unknown, the backbone does not have an option, or the weights cannot be obtained.

    >>> build_backbone("small_resnet").out_channels
    256
    """
    is_timm = name not in BACKBONES and is_timm_name(name)
    if not is_timm and name not in BACKBONES:
        raise _unknown(name)
    build = partial(TimmBackbone, name, in_channels=in_channels) if is_timm else BACKBONES[name]
    options = {
        "pretrained": pretrained is True,
        "large_feature_map": large_feature_map,
        "use_bn": use_bn,
        "output_stride": output_stride,
    }
    defaults = signature(build_backbone).parameters
    chosen = {option: value for option, value in options.items() if value != defaults[option].default}
    for option in chosen.keys() - signature(build).parameters:
        builders = {**BACKBONES, "timm models": TimmBackbone}
        having = ", ".join(known for known in builders if option in signature(builders[known]).parameters)
        given = f"given {option}={chosen[option]}: leave it out, or choose among {having}"
        raise CalmError(f"backbone {name!r} has no option {option}, {given}")
    backbone = build(**chosen)
    if not is_timm and in_channels != 3:
        _set_channels(backbone, in_channels, pretrained=pretrained is True)
    if not isinstance(pretrained, bool):
        load_weights(backbone, pretrained)
    return backbone


def import_backbone(name: str) -> nn.Module:
    """Build a module by the user's own code, ``package.module:function(...)``: see `calm.config.parse_code`.

    The module is looked for in the current folder, then among the installed ones.

    Raises:
        CalmError: If there is no such code, it fails, or returns no module.
    """
    code = parse_code(name)
    assert code is not None
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        module = getattr(import_module(code.module), code.function)(**code.arguments)
    except Exception as error:  # the user's code may raise anything
        where = f"in {folder} or among the installed packages"
        kind = type(error).__name__
        fix = ""
        if isinstance(error, ModuleNotFoundError) and code.module.endswith(".py"):
            fix = "; leave out .py"
        elif isinstance(error, ModuleNotFoundError) and error.name == code.module.split(".")[0]:
            fix = f"; if {error.name}.py is in another folder, name that one in the variable PYTHONPATH"
        raise CalmError(f"cannot build the backbone {name!r} by code {where}: {kind}: {error}{fix}") from error
    finally:
        sys.path.remove(folder)
    if not isinstance(module, nn.Module):
        raise CalmError(
            f"{code.module}:{code.function} must return an nn.Module, it returned a {type(module).__name__}"
        )
    return module


def _unknown(name: str) -> CalmError:
    import timm

    known = dict.fromkeys([*BACKBONES, *timm.list_models()])
    close = get_close_matches(name.removeprefix("timm/"), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return CalmError(
        f"unknown backbone {name!r}: allowed are {', '.join(BACKBONES)}, any name of timm.list_models(), or "
        f"code of yours, as MODULE:FUNCTION, that returns an nn.Module of features (B, D, h, w){hint}"
    )


def adapt_backbone(module: nn.Module, size: tuple[int, int] = (224, 224), in_channels: int = 3) -> nn.Module:
    """Check that ``module`` returns a feature map, and set its attribute ``out_channels`` if it has none.

    The module is run once, in eval mode and without gradient, on an image of zeros; its modes and the random state stay
    as they were. If it does not run on an image of that size, its own ``out_channels`` or ``num_features`` is used.

    Args:
        module: Maps float images (B, in_channels, H, W) to features (B, D, h, w); it is also the result,
            unless it returns a list or a dict of features: see `FeatureOf`.
        size: (height, width) in pixels of the image.

    Raises:
        CalmError: If the module returns something else or another number of channels than its ``out_channels`` says, or
            does not run and has no such attribute.

    >>> adapt_backbone(nn.Conv2d(3, 5, kernel_size=3)).out_channels
    5
    """
    if not isinstance(module, nn.Module):
        raise CalmError(f"a backbone is a name or an nn.Module, not a {type(module).__name__}{_called(module)}")
    name, where = type(module).__name__, f"image of {size[0]} x {size[1]} pixels"
    stated = _int_attribute(module, "out_channels")
    try:
        output = _run_on_zeros(module, (in_channels, *size))
        if isinstance(output, (list, tuple, Mapping)):
            module, output = FeatureOf(module), _feature_of(output)
    except CalmError:
        raise
    except Exception as error:  # a user's module may raise anything
        channels = stated or _int_attribute(module, "num_features")
        if channels is None:
            fix = "Repair it, or if it needs images of another size, give it an int attribute out_channels"
            raise CalmError(f"the backbone {name} does not run on an {where}: {error}. {fix}") from error
    else:
        if not (isinstance(output, Tensor) and output.ndim == 4 and output.is_floating_point()):
            found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            got = f"for one {where} it returned {found}: {_hint(output)}"
            raise CalmError(f"the backbone {name} must return one float tensor of features (B, D, h, w), but {got}")
        if channels_last(tuple(output.shape), size):
            fix = "permute(0, 3, 1, 2) them, or name the timm model instead of giving the module"
            raise CalmError(f"the backbone {name} returned {tuple(output.shape)}, channels last: {fix}")
        channels = output.shape[1]
        if stated not in (None, channels):
            raise CalmError(f"the backbone {name} says out_channels={stated}, its features have {channels} channels")
    module.out_channels = channels  # type: ignore[assignment]
    return module


def _called(given: object) -> str:
    """Return the end of the message for a class or function that stands where its result belongs."""
    return f": call it, {given.__name__}()" if callable(given) and hasattr(given, "__name__") else ""


class FeatureOf(nn.Module):
    """A module that returns several features: the last of a list, or the only one of a dict or tuple, is taken.

    Such are timm's ``features_only`` models and torchvision's ``create_feature_extractor``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        """Return the features."""
        return _feature_of(self.module(images))


def _feature_of(output: Any) -> Tensor:
    if not isinstance(output, list) and len(output) != 1:
        names = f" ({', '.join(map(str, output))})" if isinstance(output, Mapping) else ""
        kind = "dict" if isinstance(output, Mapping) else "tuple"
        raise CalmError(f"the backbone returns a {kind} of {len(output)} features{names}: let it return one of them")
    features: Tensor = next(iter(output.values())) if isinstance(output, Mapping) else output[-1]
    return features


def _hint(output: object) -> str:
    """Say how a module that returned something else becomes one that returns features."""
    if isinstance(output, Tensor) and output.ndim == 3:
        return "tokens. Of a timm model give its name, which lays them out; else reshape those of the patches to a grid"
    if isinstance(output, Tensor) and output.ndim == 2:
        torchvision = "torchvision.models.feature_extraction.create_feature_extractor(MODEL, ['NODE'])"
        return f"take its pooling and classifier out; of timm by num_classes=0, global_pool='', or by {torchvision}"
    return "take its pooling and classifier out"


def _run_on_zeros(module: nn.Module, shape: tuple[int, ...]) -> object:
    like = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.empty(0))
    with evaluation_mode(module), torch.no_grad():
        return module(torch.zeros(1, *shape, dtype=like.dtype, device=like.device))


def _int_attribute(module: nn.Module, name: str) -> int | None:
    value = getattr(module, name, None)
    return value if isinstance(value, int) and value > 0 else None


def grid_size(backbone: nn.Module, size: tuple[int, int], channels: int = 3) -> tuple[int, int] | None:
    """Return (rows, columns) of the grid that ``backbone`` gives for images of ``size`` (height, width) in pixels.

    It runs on the meta device, where nothing is computed. None means that it does not take images of that size.
    """
    if size == getattr(backbone, "size", None):
        grid: tuple[int, int] = backbone.grid  # type: ignore[assignment]
        return grid
    try:
        rows, columns = run_on_meta(backbone, (channels, *size))[0].shape[-2:]
        if any("rel_pos" in name for name, _ in backbone.named_parameters()):
            _run_on_zeros(backbone, (channels, *size))  # the meta device does not see where a table of positions ends
    except Exception:  # timm's families refuse a size by AssertionError, IndexError, RuntimeError, ...
        return None
    return rows, columns


def check_size(backbone: nn.Module, size: tuple[int, int], channels: int = 3) -> tuple[int, int] | None:
    """Return `grid_size`, or None for a module that runs on the meta device with images of no size.

    Raises:
        CalmError: If the backbone does not take images of ``size``; the message names the nearest sizes that it takes.
    """
    if (grid := grid_size(backbone, size, channels)) is not None:
        return grid
    height, width = size
    own: tuple[int, int] = getattr(backbone, "size", (224, 224))
    steps = sorted({*STEPS, own[0]})
    below = {(height // step * step, width // step * step) for step in steps if step <= min(size)}
    above = {(-(-height // step) * step, -(-width // step) * step) for step in steps}
    tried = sorted(below, key=sum, reverse=True), sorted(above, key=sum)
    found = [next((other for other in others if grid_size(backbone, other, channels)), None) for others in tried]
    sizes = dict.fromkeys(other for other in found if other) or ([own] if grid_size(backbone, own, channels) else [])
    if not sizes:
        return None
    taken = " or ".join(f"{rows} x {columns}" for rows, columns in sizes)
    name = f"timm model {backbone.name!r}" if isinstance(backbone, TimmBackbone) else type(backbone).__name__
    raise CalmError(f"{name} takes no images of {height} x {width} pixels: take {taken}, or choose another model")


def image_size(backbone: nn.Module, wanted: tuple[int, int] | None, channels: int = 3) -> tuple[int, int]:
    """Return the size of images: ``wanted``; for None 224 x 224, or the size of a timm model that takes no other.

    A warning says if a timm model's grid has fewer than 5 rows or columns for such images.

    Raises:
        CalmError: If a timm model does not take images of the wanted size: see `check_size`.
    """
    size = wanted or (224, 224)
    if not isinstance(backbone, TimmBackbone):
        return size
    if wanted is None and grid_size(backbone, size, channels) is None:
        size = backbone.size
    grid = check_size(backbone, size, channels)
    if grid is not None and min(grid) < 5:
        warnings.warn(
            f"timm model {backbone.name!r} gives a grid of {grid[0]} x {grid[1]} cells for images of {size[0]} x "
            f"{size[1]} pixels, so its maps are coarse: take larger images, or output_stride=16 or 8 if it has that",
            stacklevel=3,
        )
    return size


def _set_channels(backbone: nn.Module, channels: int, *, pretrained: bool) -> None:
    """Let the first convolution take images of ``channels``; pretrained weights of three are spread over them."""
    from timm.models import adapt_input_conv

    first = next(layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d))
    first.weight = nn.Parameter(adapt_input_conv(channels, first.weight.detach()))
    first.in_channels = channels
    if not pretrained:
        initialise(first)


def list_backbones(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Return the names of backbones: this package's own, then timm's models.

    Args:
        pattern: Shell wildcards, such as ``"*vit*"``.
        pretrained: Whether to list only those with published weights; timm's then have the tags of their weights.

    >>> list_backbones("*nception_v3")
    ['inception_v3']
    """
    import timm

    own = (name for name, build in BACKBONES.items() if not pretrained or "pretrained" in signature(build).parameters)
    return list(
        dict.fromkeys([*(n for n in own if fnmatch(n, pattern)), *timm.list_models(pattern, pretrained=pretrained)])
    )
