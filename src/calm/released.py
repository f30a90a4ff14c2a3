"""``calm convert``: from a checkpoint of the released code to a folder of this package.

The checkpoint file of the released code, read without executing anything in it.

A dict as ``torch.save`` writes it::

    {"architecture": "resnet50", "epoch": 40, "state_dict": {"module.conv1.weight": ..., ...}, "optimizer": {...}}

Source: github.com/naver-ai/calm, ``main.py``.

Models of the released code: load its checkpoints, convert them, and write ones that it can read.

Every key of a released checkpoint has one place in our model, and the other way round:

=======================  ==========================
released                 ours
=======================  ==========================
``conv_last.*``          ``head.conv_last.*``
``attention.0.*``        ``head.attention.*``
any other                ``backbone.`` and the same
=======================  ==========================

What the file does not say, and a wrong answer would change the predictions without an error: the method
(a CALM checkpoint fits a CAM model too) and the size of the map (a stride, which no weight shows).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from calm.checkpoint import fill
from calm.config import Method
from calm.errors import CalmError, shown, unknown
from calm.files import atomic_path, read_torch
from calm.model import CalmModel, create_model

__all__ = [
    "ARCHITECTURES",
    "FILE_NAME",
    "ConversionReport",
    "ReleasedFile",
    "load_released",
    "load_with_report",
    "read_released",
    "released_state_dict",
    "save_released",
    "write_released",
]

ARCHITECTURES = ("resnet50", "vgg16", "inception_v3")
FILE_NAME = "last_checkpoint.pth.tar"
_PREFIX = "module."


@dataclass(frozen=True)
class ReleasedFile:
    """What a released checkpoint holds, its optimizer left out.

    Attributes:
        path: the file.
        architecture: one of `ARCHITECTURES`.
        epoch: epochs trained, if the file says so.
        state: released key to tensor, without ``module.``.
        prefixed: whether all keys had the prefix ``module.`` of a parallel model.
    """

    path: Path
    architecture: str
    epoch: int | None
    state: dict[str, Tensor]
    prefixed: bool


def read_released(path: str | os.PathLike[str]) -> ReleasedFile:
    """Read ``path``, a released checkpoint or the folder that holds ``last_checkpoint.pth.tar``.

    Raises:
        CalmError: no such file, no checkpoint, a damaged one, one that asks to run code, a field missing or
            wrong, weights that are NaN or infinite.
    """
    path = Path(path)
    if path.is_dir():
        path /= FILE_NAME
    content = read_torch(path, "the released checkpoint")
    if not isinstance(content, dict):
        raise CalmError(f"{path} holds a {type(content).__name__}, but a released checkpoint is a dict")
    for field in ("architecture", "state_dict"):
        if field not in content:
            there = ", ".join(shown(key).strip("'") for key in list(content)[:5]) or "nothing"
            raise CalmError(f"{path} is not a released checkpoint: it lacks {field!r}; it holds {there}")
    architecture = content["architecture"]
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise unknown("architecture", architecture, ARCHITECTURES, where=str(path))
    epoch = content.get("epoch")
    state, prefixed = _without_prefix(_checked(content["state_dict"], path))
    known = isinstance(epoch, int) and not isinstance(epoch, bool) and 0 <= epoch < 2**31
    return ReleasedFile(path, architecture, epoch if known else None, state, prefixed)


def write_released(
    path: str | os.PathLike[str],
    *,
    architecture: str,
    epoch: int,
    state: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
) -> None:
    """Write a checkpoint that the released code can read, atomically."""
    content = {
        "architecture": architecture,
        "epoch": epoch,
        "state_dict": dict(state),
        "optimizer": dict(optimizer),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        torch.save(content, file)


def _checked(state: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(state, dict) or not state:
        raise CalmError(f"{path}: 'state_dict' must be a dict of tensors, and not empty")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise CalmError(f"{path}: 'state_dict' must hold plain tensors by name; not so is {shown(key)}")
    broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise CalmError(
            f"{path}: {len(broken)} of {len(state)} tensors hold NaN or infinity, the first is {broken[0]:.200}: the "
            "training that wrote it had diverged"
        )
    return dict(state)


def _is_plain(tensor: Tensor) -> bool:
    """Dense, with every element in the file: not a view that makes a large tensor of a few bytes."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


def _without_prefix(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """``module.`` cut off if all keys have it: a layer of ours could be called so, a whole model is not."""
    prefixed = all(key.startswith(_PREFIX) for key in state)
    return (
        {key.removeprefix(_PREFIX): tensor for key, tensor in state.items()} if prefixed else state
    ), prefixed


_HEAD = {"conv_last.": "head.conv_last.", "attention.0.": "head.attention."}
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class ConversionReport:
    """What became of every key of a released checkpoint.

    Attributes:
        source: the file.
        architecture: of the backbone.
        epoch: epochs trained, if the file says so.
        num_classes: C.
        consumed: released key to our key.
        ignored: released key to the reason why it has no place.
        absent: our keys that the file lacks and that need no value from it.
        prefixed: whether all keys had the prefix ``module.``.
        out: the folder written, if any.
    """

    source: Path
    architecture: str
    epoch: int | None
    num_classes: int
    consumed: Mapping[str, str]
    ignored: Mapping[str, str]
    absent: tuple[str, ...]
    prefixed: bool
    out: Path | None = None

    def __str__(self) -> str:
        """A few lines for a person."""
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        lines = [
            f"{self.source}: {self.architecture}, {self.num_classes} classes{epoch}",
            f"  {len(self.consumed)} keys consumed{' (prefix module. removed)' if self.prefixed else ''}",
            *(f"  ignored {key}: {reason}" for key, reason in self.ignored.items()),
            *(f"  absent {key}: starts at 0" for key in self.absent),
            *([] if self.out is None else [f"  written to {self.out}"]),
        ]
        return "\n".join(lines)


def load_released(
    path: str | os.PathLike[str],
    *,
    method: Method | None = None,
    large_feature_map: bool | None = None,
    use_bn: bool = True,
    class_names: Sequence[str] | None = None,
) -> CalmModel:
    """Load a checkpoint of the released code, in eval mode, on the CPU.

    The model has the released prior: ReLU, constant denominator. Architecture and number of classes come from
    the file. The file is read without executing anything in it.

    Args:
        path: the file, or the folder that holds ``last_checkpoint.pth.tar``.
        method: how it was trained; must be given, the file does not say.
        large_feature_map: whether it was trained on the 28 x 28 map (else 14 x 14); must be given.
        use_bn: whether vgg16 or inception_v3 was built with its optional BatchNorm.
        class_names: names of the classes, in the order of their indices.

    Raises:
        CalmError: ``method`` or ``large_feature_map`` not given, a file that is no released checkpoint or not
            safe, keys that do not fit.
    """
    return load_with_report(path, method, large_feature_map, use_bn, class_names)[0]


def released_state_dict(model: CalmModel) -> dict[str, Tensor]:
    """The weights of ``model`` under the released names.

    A CAM model gets an attention layer of zeros: the released code always has one, and for CAM never uses it.

    Raises:
        CalmError: the released code has no such architecture, or its prior would not be this model's.
    """
    config = model.config
    if config.backbone not in ARCHITECTURES:
        raise unknown("architecture of the released code", config.backbone, ARCHITECTURES)
    if config.method != "cam" and config.prior_activation != "relu":
        raise CalmError(
            f"a released checkpoint means prior_activation='relu', but this model has {config.prior_activation!r}: "
            "the released code would read other probabilities from the same weights. Use save_pretrained"
        )
    state = {_released_key(key): tensor.detach() for key, tensor in model.state_dict().items()}
    if config.method == "cam":
        state["attention.0.weight"] = torch.zeros_like(state["conv_last.weight"][:1])
        state["attention.0.bias"] = torch.zeros_like(state["conv_last.bias"][:1])
    return state


def save_released(
    model: CalmModel,
    path: str | os.PathLike[str],
    *,
    epoch: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write ``model`` to the file ``path`` as a checkpoint that the released code can read.

    Args:
        model: of a released architecture.
        epoch: epochs trained.
        optimizer: whose state is stored beside the weights.

    Raises:
        CalmError: see `released_state_dict`.
    """
    state: Mapping[str, Any] = {} if optimizer is None else optimizer.state_dict()
    write_released(
        path,
        architecture=model.config.backbone,
        epoch=epoch,
        state=released_state_dict(model),
        optimizer=state,
    )


def load_with_report(
    path: str | os.PathLike[str],
    method: Method | None,
    large_feature_map: bool | None,
    use_bn: bool,
    class_names: Sequence[str] | None,
) -> tuple[CalmModel, ConversionReport]:
    """`load_released`, and what became of every key."""
    if method is None:
        raise CalmError(
            f"method is needed: 'calm-em', 'calm-ml' or 'cam'. {path} does not say how it was trained, and a "
            "CALM checkpoint loads as CAM too, but then predicts otherwise"
        )
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    if large_feature_map is None:
        raise CalmError(
            f"large_feature_map is needed: True for a 28 x 28 map, False for 14 x 14. {path} does not say how "
            "it was trained, and its weights run on either map, but predict well on one only"
        )
    file = read_released(path)
    classes = file.state.get("conv_last.weight")
    if classes is None or classes.ndim != 4 or not classes.numel():
        raise CalmError(f"{file.path} is not a released checkpoint: it lacks the classifier conv_last.weight")
    with torch.random.fork_rng(devices=[]):
        model = _build(file.architecture, len(classes), method, large_feature_map, use_bn, class_names)
    own = model.state_dict()
    ignored = {}
    if method == "cam":
        ignored = {key: "a CAM model has no prior" for key in file.state if key.startswith("attention.")}
    names = {key: _our_key(key) for key in file.state if key not in ignored}
    given = {ours: file.state[key] for key, ours in names.items()}
    absent = [key for key in own if key not in given and key.endswith(_COUNTER)]
    try:
        fill(model, given | {key: own[key] for key in absent})
    except CalmError as error:
        told = f"large_feature_map={large_feature_map}, use_bn={use_bn}"
        fitting = _fitting(file, given, method, large_feature_map)
        problem = f"its weights are those of {fitting}" if fitting else str(error)
        raise CalmError(f"{file.path} does not fit {file.architecture} with {told}: {problem}") from error
    report = ConversionReport(
        file.path, file.architecture, file.epoch, len(classes), names, ignored, tuple(absent), file.prefixed
    )
    return model.eval(), report


def _build(
    architecture: str,
    num_classes: int,
    method: Method,
    large_feature_map: bool,
    use_bn: bool,
    class_names: Sequence[str] | None = None,
) -> CalmModel:
    return create_model(
        architecture,
        num_classes,
        method,
        large_feature_map,
        use_bn=use_bn,
        prior_activation="relu",
        prior_denominator="constant",
        class_names=class_names,
    )


def _fitting(file: ReleasedFile, given: Mapping[str, Tensor], method: Method, large: bool) -> str:
    """The options with which keys and shapes would fit; empty if none do."""
    shapes = {key: tensor.shape for key, tensor in given.items() if not key.endswith(_COUNTER)}
    for large_feature_map in (large, not large):
        for use_bn in (True,) if file.architecture == "resnet50" else (True, False):
            with torch.device("meta"):
                classes = len(given["head.conv_last.weight"])
                model = _build(file.architecture, classes, method, large_feature_map, use_bn)
            own = {key: tensor.shape for key, tensor in model.state_dict().items()}
            if shapes == {key: shape for key, shape in own.items() if not key.endswith(_COUNTER)}:
                return f"large_feature_map={large_feature_map}, use_bn={use_bn}"
    return ""


def _our_key(released: str) -> str:
    for theirs, ours in _HEAD.items():
        if released.startswith(theirs):
            return ours + released.removeprefix(theirs)
    return f"backbone.{released}"


def _released_key(ours: str) -> str:
    for theirs, prefix in _HEAD.items():
        if ours.startswith(prefix):
            return theirs + ours.removeprefix(prefix)
    return ours.removeprefix("backbone.")
