"""Saved models: a folder with ``model.safetensors`` (weights) and ``calm.json`` (everything else).

Such a folder is self-describing: `load` needs nothing but the folder, and nothing in it is executed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from calm.atomic import working_folder
from calm.card import Card
from calm.documents import open_regular
from calm.errors import CalmError
from calm.model import CalmModel, create_model

__all__ = ["CARD", "WEIGHTS", "fill", "load", "push_to_hub", "save_pretrained"]

CARD = "calm.json"
WEIGHTS = "model.safetensors"
_RELEASED = "last_checkpoint.pth.tar"
_SHOWN = 5


def save_pretrained(model: CalmModel, folder: str | os.PathLike[str]) -> Path:
    """Write ``model`` to ``folder``, all or nothing.

    A new folder appears complete. In a folder that exists the two files are replaced, and other files stay; a
    kill between the two replacements leaves a mismatch that `load` detects.

    Args:
        model: on any device; its dtypes are kept.
        folder: made with its parents if missing.

    Returns:
        The folder.

    Raises:
        CalmError: ``folder`` is a file, or the training summary is not JSON.
    """
    from safetensors.torch import save_file

    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise CalmError(f"cannot save a model to {folder}: a file of that name exists; give a folder")
    with working_folder(folder) as temporary:
        staging = temporary / folder.name
        staging.mkdir()
        save_file(_unshared(model.state_dict()), staging / WEIGHTS, metadata={"format": "pt"})
        card = Card(
            model.config,
            model.class_names,
            model.preprocessing,
            model.training_summary,
            {package: version(package) for package in ("calm", "torch", "torchvision", "timm")},
            _sha256(staging / WEIGHTS),
        )
        card.write(staging / CARD)
        if folder.is_dir() and any(folder.iterdir()):
            for name in (WEIGHTS, CARD):
                (staging / name).replace(folder / name)
        else:
            staging.replace(folder)
    return folder


def load(
    source: str | os.PathLike[str],
    *,
    backbone: nn.Module | None = None,
    map_location: str | torch.device = "cpu",
) -> CalmModel:
    """Load a saved model, in eval mode.

    Args:
        source: a folder that `save_pretrained` wrote; or the folder of a training run, whose best model is
            taken, or its last if there is no best; or a model on the Hugging Face Hub, ``owner/name``.
        backbone: the module for a model whose backbone was the user's own, built as it was then.
        map_location: the device.

    The global random state is left as it was.

    Raises:
        CalmError: nothing there, not a saved model, a file that is damaged or made by a newer release, weights
            that do not fit, a backbone missing or superfluous, no way to reach the hub.
    """
    folder = _locate(source)
    card = Card.read(folder / CARD)
    state = _read_weights(folder, card)
    config = card.model
    if (backbone is None) == (config.backbone == "custom"):
        raise CalmError(
            f"the model in {folder} was made with the user's own backbone: build that module as it was, and give "
            "it as backbone="
            if backbone is None
            else f"the model in {folder} has the backbone {config.backbone!r}: leave backbone= out"
        )
    rows = state.get("head.conv_last.weight")
    if rows is None or rows.ndim != 4 or not rows.numel() or len(rows) != config.num_classes:
        found = "none" if rows is None else _kind(rows)
        raise CalmError(
            f"{folder / WEIGHTS} does not fit the model in {CARD}: head.conv_last.weight is {found} for"
            f" {config.num_classes} classes"
        )
    with torch.random.fork_rng(devices=[]), _named(folder / CARD):
        model = create_model(
            config.backbone if backbone is None else backbone,
            config.num_classes,
            config.method,
            config.large_feature_map,
            use_bn=config.use_bn,
            output_stride=config.output_stride,
            prior_activation=config.prior_activation,
            prior_denominator=config.prior_denominator,
            class_names=card.class_names,
            preprocessing=card.preprocessing,
        )
    model.training_summary = card.training
    try:
        fill(model, state)
    except CalmError as error:
        made, here = card.versions.get("timm"), version("timm")
        hint = f" (made with timm {made}, here is {here})" if made != here else ""
        raise CalmError(f"{folder / WEIGHTS} does not fit the model in {CARD}: {error}{hint}") from error
    return model.to(map_location).eval()


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors say which file they come from."""
    try:
        yield
    except CalmError as error:
        raise CalmError(f"{path}: {error}") from error


def push_to_hub(model: CalmModel, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload ``model`` to the Hugging Face Hub, where `load` finds it under ``repo_id``.

    Args:
        repo_id: ``owner/name``; made if it does not exist.
        private: of a new repository.
        token: of the hub; None is the one that ``hf auth login`` stored.

    Returns:
        The address of the commit.

    Raises:
        CalmError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_pretrained(model, Path(temporary) / "model")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message="Upload CALM model"
            )
        except (OSError, ValueError) as error:  # every error class of the hub's client is one of these
            raise CalmError(f"cannot upload to {repo_id!r} on the Hugging Face Hub: {error}") from error
    return str(commit.commit_url)


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy ``state`` into ``model``, which takes over its dtypes.

    Raises:
        CalmError: keys are missing or unexpected, or tensors have another shape: counted, and the first named.
    """
    own = model.state_dict(keep_vars=True)
    shared = [key for key in own if key in state]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another kind": [
            f"{key} ({_kind(state[key])}, should be {_kind(own[key])})"
            for key in shared
            if _kind(state[key]) != _kind(own[key])
        ],
    }
    if any(problems.values()):
        raise CalmError("; ".join(_some(what, keys) for what, keys in problems.items() if keys))
    for key in shared:
        own[key].data = own[key].data.to(state[key].dtype)
    model.load_state_dict(state)


def _some(what: str, keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{len(keys)} {what}: {', '.join(key[:200] for key in keys[:_SHOWN])}{more}"


def _kind(tensor: Tensor) -> str:
    return f"{_KINDS.get(tensor.dtype, str(tensor.dtype))} {tuple(tensor.shape)}"


_KINDS = dict.fromkeys((torch.float16, torch.bfloat16, torch.float32, torch.float64), "float")
_KINDS |= dict.fromkeys((torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), "whole numbers")


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` on the CPU, contiguous, tensors that share memory copied apart: what safetensors can write."""
    seen: set[int] = set()
    result = {}
    for key, tensor in state.items():
        plain = tensor.detach().cpu().contiguous()
        result[key] = plain.clone() if plain.untyped_storage().data_ptr() in seen else plain
        seen.add(plain.untyped_storage().data_ptr())
    return result


def _read_weights(folder: Path, card: Card) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS
    open_regular(path, "the weights").close()
    try:
        found = _sha256(path)
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CalmError(f"cannot read the weights {path}: {str(error)[:500]}") from error
    except Exception as error:  # a type of numbers that torch does not have
        raise CalmError(
            f"cannot read the weights {path}: {type(error).__name__} {str(error)[:500]}"
        ) from error
    if found != card.weights_sha256:
        raise CalmError(
            f"{path} is not the file that {CARD} describes (sha256 {found[:12]}..., should be "
            f"{card.weights_sha256[:12]}...): a damaged download or an interrupted save; get or save it anew"
        )
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _locate(source: str | os.PathLike[str]) -> Path:
    """The folder that holds the two files, downloaded if need be."""
    path = Path(source)
    if path.is_dir():
        return _model_folder(path)
    if path.exists():
        ours = path.name in (CARD, WEIGHTS)
        hint = f"load {path.parent}" if ours else "calm.load_released reads checkpoints of the released code"
        raise CalmError(f"{path} is a file, but a saved model is a folder with {CARD} and {WEIGHTS}: {hint}")
    name = os.fspath(source)
    if name.count("/") != 1 or Path(name.partition("/")[0]).exists() or name.startswith(("/", ".", "~")):
        raise CalmError(
            f"no saved model at {name}: no such folder{_beside(path)}, and no hub id either (owner/name)"
        )
    return _download(name)


def _beside(path: Path) -> str:
    """For a message about a folder that is not there: the one beside it that was perhaps meant."""
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.parent / close[0]}?)" if close else ""


def _model_folder(path: Path) -> Path:
    for folder in (path, path / "best", path / "last"):
        if (folder / CARD).is_file():
            return folder
    if (path / _RELEASED).is_file():
        raise CalmError(
            f"{path} holds a checkpoint of the released code: use calm.load_released or calm convert"
        )
    raise CalmError(f"{path} holds no saved model: there is no {CARD}, best/{CARD} or last/{CARD} in it")


def _download(repo_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        files = [Path(hf_hub_download(repo_id, name)) for name in (WEIGHTS, CARD)]
    except (OSError, ValueError) as error:  # every error class of the hub's client is one of these
        raise CalmError(
            f"no saved model at {repo_id}: there is no such folder, and the Hugging Face Hub gave none: {error}"
        ) from error
    return files[-1].parent
