"""Checkpoints of the released code: load them, convert them, and write ones that the released code can read.

A checkpoint is a dict as ``torch.save`` writes it; it is read without executing anything in it::

    {"architecture": "resnet50", "epoch": 40, "state_dict": {"module.conv1.weight": ..., ...}, "optimizer": {...}}

Every key of ``state_dict`` has one place in a model of this package, and the other way round:

=======================  ==========================
released                 this package
=======================  ==========================
``conv_last.*``          ``head.conv_last.*``
``attention.0.*``        ``head.attention.*``
any other                ``backbone.`` and the same
=======================  ==========================

The file does not say the method (a CALM checkpoint fits a CAM model, too) or the size of the map (a stride, which no
weight shows). A wrong answer changes the predictions without an error, so both must be given.
Source: github.com/naver-ai/calm, ``main.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from calm.backbones.weights import COUNTER, check_state
from calm.checkpoint import fill
from calm.config import Method
from calm.errors import CalmError, shown, unknown
from calm.files import atomic_path, read_torch
from calm.model import CalmModel, create_model

ARCHITECTURES = ("resnet50", "vgg16", "inception_v3")
FILE_NAME = "last_checkpoint.pth.tar"


_PLACES = {"conv_last.": "head.conv_last.", "attention.0.": "head.attention.", "": "backbone."}


@dataclass(frozen=True)
class ReleasedFile:
    """The content of a released checkpoint, without its optimizer.

    Attributes:
        source: The file.
        architecture: One of `ARCHITECTURES`.
        epoch: The number of epochs trained, if the file says so.
        state: The tensors by released key, without ``module.``.
        prefixed: Whether all keys had the prefix ``module.`` of a parallel model.
    """

    source: Path
    architecture: str
    epoch: int | None
    state: dict[str, Tensor] = field(repr=False)
    prefixed: bool

    @property
    def num_classes(self) -> int:
        """The number of classes, C."""
        return len(self.state["conv_last.weight"])


@dataclass(frozen=True)
class ConversionReport(ReleasedFile):
    """What became of every key of a released checkpoint; ``str`` makes a few lines of it.

    Attributes:
        consumed: From released keys to keys of this package.
        ignored: From released keys to the reasons why they have no place.
        absent: Keys of this package that the file lacks and that need no value from it.
        out: The folder written, if any.
    """

    consumed: Mapping[str, str]
    ignored: Mapping[str, str]
    absent: tuple[str, ...]
    out: Path | None = None

    def __str__(self) -> str:
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        lines = [
            f"{self.source}: {self.architecture}, {self.num_classes} classes{epoch}",
            f"  {len(self.consumed)} keys consumed{' (prefix module. removed)' if self.prefixed else ''}",
            *(f"  ignored {key}: {reason}" for key, reason in self.ignored.items()),
            *(f"  absent {key}: starts at 0" for key in self.absent),
            *([] if self.out is None else [f"  written to {self.out}"]),
        ]
        return "\n".join(lines)


def read_released(path: str | os.PathLike[str]) -> ReleasedFile:
    """Read a released checkpoint, the file or the folder that holds ``last_checkpoint.pth.tar``.

    Raises:
        CalmError: If the file is missing, damaged, not a checkpoint or would run code, a field is missing or wrong, or
            weights are NaN or infinite.
    """
    path = Path(path)
    if path.is_dir():
        path /= FILE_NAME
    content = read_torch(path, "the released checkpoint")
    if not isinstance(content, dict):
        raise CalmError(f"{path} holds a {type(content).__name__}, but a released checkpoint is a dict")
    for name in ("architecture", "state_dict"):
        if name not in content:
            keys = ", ".join(shown(key).strip("'") for key in list(content)[:5]) or "nothing"
            raise CalmError(f"{path} is not a released checkpoint: it lacks {name!r}; it holds {keys}")
    architecture, epoch = content["architecture"], content.get("epoch")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES, where=str(path))
    if type(epoch) is not int or not 0 <= epoch < 2**31:
        epoch = None
    state = check_state(content["state_dict"], path)
    # The prefix of a parallel model is on all keys; a layer of the user's own could be called "module" as well.
    prefixed = all(key.startswith("module.") for key in state)
    if prefixed:
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return ReleasedFile(path, architecture, epoch, state, prefixed)


def load_released(
    path: str | os.PathLike[str],
    *,
    method: Method | None = None,
    large_feature_map: bool | None = None,
    use_bn: bool = True,
    class_names: Sequence[str] | None = None,
) -> CalmModel:
    """Load a checkpoint of the released code, in eval mode, on the CPU.

    The model has the released prior: ReLU and constant denominator. Architecture and number of classes come from the
    file, which is read without executing anything in it.

    Args:
        path: The file, or the folder that holds ``last_checkpoint.pth.tar``.
        method: How the model was trained; must be given, since the file does not say it.
        large_feature_map: Whether it was trained on the 28 x 28 map (else 14 x 14); must be given.
        use_bn: Whether vgg16 or inception_v3 was built with its optional BatchNorm.
        class_names: The names of the classes, in the order of their indices.

    Raises:
        CalmError: If ``method`` or ``large_feature_map`` is not given, the file is no released checkpoint or not safe,
            or its keys do not fit.
    """
    return load_with_report(path, method, large_feature_map, use_bn, class_names)[0]


def released_state_dict(model: CalmModel) -> dict[str, Tensor]:
    """Return the weights of ``model`` under the released names.

    A CAM model gets an attention layer of zeros: the released code always has one, and never uses it for CAM.

    Raises:
        CalmError: If the released code does not have the architecture, or its prior or channels would not be this
            model's.
    """
    config = model.config
    if config.backbone not in ARCHITECTURES:
        raise unknown("architecture of the released code", config.backbone, ARCHITECTURES)
    if config.method != "cam" and config.prior_activation != "relu":
        raise CalmError(
            f"a released checkpoint means prior_activation='relu', but this model has {config.prior_activation!r}: "
            "the released code would read other probabilities from the same weights. Use save_pretrained"
        )
    if config.pooling_exponent != 1:
        raise CalmError(
            f"the released code has no pooling_exponent, which is {config.pooling_exponent:g} here: it would read other"
            " probabilities from the same weights. Use save_pretrained"
        )
    if config.acol_threshold is not None:
        raise CalmError("the released code has one head, and this model two (ACoL): use save_pretrained")
    if config.in_channels != 3:
        raise CalmError(f"the released code reads 3 channels, this model {config.in_channels}: use save_pretrained")
    back = {own: released for released, own in _PLACES.items()}
    state = {_moved(key, back): tensor.detach() for key, tensor in model.state_dict().items()}
    if config.method == "cam":
        for part in ("weight", "bias"):
            state[f"attention.0.{part}"] = torch.zeros_like(state[f"conv_last.{part}"][:1])
    return state


def save_released(
    model: CalmModel, path: str | os.PathLike[str], *, epoch: int, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write ``model`` to the file ``path``, atomically, as a checkpoint that the released code can read.

    ``epoch`` is the number of epochs trained; the state of ``optimizer`` is stored beside the weights. The errors are
    those of `released_state_dict`.
    """
    content = {
        "architecture": model.config.backbone,
        "epoch": epoch,
        "state_dict": released_state_dict(model),
        "optimizer": {} if optimizer is None else optimizer.state_dict(),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def load_with_report(
    path: str | os.PathLike[str],
    method: Method | None,
    large_feature_map: bool | None,
    use_bn: bool,
    class_names: Sequence[str] | None,
) -> tuple[CalmModel, ConversionReport]:
    """Do as `load_released`, and report what became of every key."""
    if method is None:
        raise CalmError(
            f"give the method (--method): calm-em, calm-ml or cam. {path} does not say how it was trained, and a "
            "CALM checkpoint loads as CAM too, but then predicts otherwise"
        )
    if large_feature_map is None:
        raise CalmError(
            f"give large_feature_map (--large_feature_map): true for a 28 x 28 map, false for 14 x 14. {path} does not "
            "say how it was trained, and its weights run on either map, but predict well on one only"
        )
    file = read_released(path)
    classes = file.state.get("conv_last.weight")
    if classes is None or classes.ndim != 4 or not classes.numel():
        raise CalmError(f"{file.source} is not a released checkpoint: it lacks the classifier conv_last.weight")
    build = partial(
        create_model, file.architecture, len(classes), method, prior_activation="relu", prior_denominator="constant"
    )
    with torch.random.fork_rng(devices=[]):
        model = build(large_feature_map, use_bn=use_bn, class_names=class_names)
    own = model.state_dict()
    prior = [key for key in file.state if key.startswith("attention.")] if method == "cam" else []
    ignored = dict.fromkeys(prior, "a CAM model has no prior")
    names = {key: _moved(key, _PLACES) for key in file.state if key not in ignored}
    given = {own_key: file.state[key] for key, own_key in names.items()}
    absent = tuple(key for key in own if key not in given and key.endswith(COUNTER))
    try:
        fill(model, given | {key: own[key] for key in absent})
    except CalmError as error:
        options = f"large_feature_map={large_feature_map}, use_bn={use_bn}"
        fitting = _fitting(file.architecture, given, build, large_feature_map)
        problem = f"its weights are those of {fitting}" if fitting else str(error)
        raise CalmError(f"{file.source} does not fit {file.architecture} with {options}: {problem}") from error
    return model.eval(), ConversionReport(**vars(file), consumed=names, ignored=ignored, absent=absent)


def _fitting(architecture: str, given: Mapping[str, Tensor], build: Callable[..., CalmModel], large: bool) -> str:
    """Return the options with which keys and shapes would fit; empty if none do."""
    for large_feature_map in (large, not large):
        for use_bn in (True,) if architecture == "resnet50" else (True, False):
            with torch.device("meta"):
                own = build(large_feature_map, use_bn=use_bn).state_dict()
            if _shapes(given) == _shapes(own):
                return f"large_feature_map={large_feature_map}, use_bn={use_bn}"
    return ""


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in state.items() if not key.endswith(COUNTER)}


def _moved(key: str, places: Mapping[str, str]) -> str:
    """Return ``key`` with the first of the prefixes that it has replaced."""
    old = next(prefix for prefix in places if key.startswith(prefix))
    return places[old] + key.removeprefix(old)
