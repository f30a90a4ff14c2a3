"""The checkpoint file of the released code, read without executing anything in it.

A dict as ``torch.save`` writes it::

    {"architecture": "resnet50", "epoch": 40, "state_dict": {"module.conv1.weight": ..., ...}, "optimizer": {...}}

Source: github.com/naver-ai/calm, ``main.py``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calm.atomic import atomic_path
from calm.errors import CalmError, shown, unknown
from calm.torch_file import read_torch

__all__ = ["ARCHITECTURES", "FILE_NAME", "ReleasedFile", "read_released", "write_released"]

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
