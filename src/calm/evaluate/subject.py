"""What is benchmarked: a model with one way to explain it, behind one call.

A benchmark asks a `Subject` to look at a batch once, and takes from what it saw the class probabilities and the
maps of as many classes as it needs. The model's own maps all come from that one forward pass; a baseline explains
each class asked anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm import baselines
from calm.errors import CalmError, unknown
from calm.maps import MAP_KINDS
from calm.metrics.thresholds import Thresholds
from calm.model import CalmModel
from calm.normalization import Normalization
from calm.output import CalmOutput, CamOutput
from calm.preprocess import Preprocessing

__all__ = ["Looked", "Subject", "model_subject", "weights_digest"]

_NAMES = {"calm-em": "CALM-EM", "calm-ml": "CALM-ML", "cam": "CAM"}


class Looked(Protocol):
    """One look at a batch of images."""

    @property
    def probs(self) -> Float[Tensor, "b c"]:
        """p(y | x)."""

    def maps(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Score maps of the classes asked, at the method's own resolution, not normalised."""


@dataclass(frozen=True)
class Subject:
    """A row of a benchmark's table.

    Attributes:
        label: its name in the table, "CALM-EM jointll".
        look: normalised images (b, 3, H, W) on ``device`` to what was seen in them.
        preprocessing: how image files become its input.
        device: where images must be.
        normalization: of its maps before a protocol.
        thresholds: of its protocol, "even" or "log".
        box_normalization: the same before boxes are fitted, whose protocol cuts a map to 256 values: of probabilities
            of single cells most would be below the first.
        box_thresholds: of boxes.
        about: the model and its weights, the method and its options, ready for JSON: what a stored result is known by.
        model: what looks, if it is a model.
        look_with: the same method's look with other weights: (model, images) to what was seen.
    """

    label: str
    look: Callable[[Tensor], Looked]
    preprocessing: Preprocessing
    device: torch.device
    normalization: Normalization = "minmax"
    thresholds: Thresholds = "even"
    box_normalization: Normalization = "minmax"
    box_thresholds: Thresholds = "even"
    about: Mapping[str, Any] = field(default_factory=dict)
    model: CalmModel | None = None
    look_with: Callable[[CalmModel, Tensor], Looked] | None = None


@dataclass(frozen=True)
class _OwnMaps:
    """The model's own maps: from one output."""

    output: CalmOutput | CamOutput
    kind: str

    @property
    def probs(self) -> Tensor:
        return self.output.probs

    def maps(self, classes: Tensor) -> Tensor:
        with torch.no_grad():
            return self.output.attribute(classes, self.kind)


@dataclass(frozen=True)
class _BaselineMaps:
    """A baseline's maps: asked of the model for one column of classes after another."""

    model: CalmModel
    images: Tensor
    probs: Tensor
    method: str
    options: Mapping[str, Any]

    def maps(self, classes: Tensor) -> Tensor:
        columns = [
            baselines.attribute(self.model, self.images, column, self.method, **self.options)
            for column in classes.unbind(dim=1)
        ]
        return torch.stack(columns, dim=1)


def model_subject(
    model: CalmModel,
    *,
    method: str | None = None,
    label: str | None = None,
    about: Mapping[str, Any] | None = None,
    normalization: Normalization | None = None,
    thresholds: Thresholds | None = None,
    **options: Any,
) -> Subject:
    """A model and one of its explanations.

    Args:
        model: is put in evaluation mode.
        method: a map kind of the model or a baseline (`calm.baselines.METHODS`); None: the model's main kind.
        label: the row's name; None: the training method and the explanation, "CAM gradcam".
        about: more to know the result by, such as the path of the model.
        normalization: None: ``clipping`` for CALM's own maps, which are probabilities, else ``minmax``; and ``minmax``
            for boxes.
        thresholds: None: ``log`` for CALM's own maps, else ``even``; and ``even`` for boxes.
        options: of the baseline: steps, samples, noise, seed, target_layer, batch_size.

    Raises:
        CalmError: an unknown method, one that the model does not have, or an option that it does not read.
    """
    name = model.map_kind() if method is None else baselines.canonical_method(method)
    own = name in MAP_KINDS
    if own:
        name = model.map_kind(name)
        if MAP_KINDS[name].over == "superclass":
            raise CalmError(f"map kind {name!r} needs a superclass, and benchmarks ask about single classes")
    allowed = frozenset() if own else baselines.BASELINES[name].options | {"batch_size"}
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {name!r}", option, sorted(allowed))
    model.eval()

    def look_with(model: CalmModel, images: Tensor) -> Looked:
        with torch.no_grad():
            output: CalmOutput | CamOutput = model(images)
            if own:
                return _OwnMaps(output, name)
            return _BaselineMaps(model, images, output.probs, name, options)

    calm_maps = own and MAP_KINDS[name].family == "calm"
    return Subject(
        label or f"{_NAMES[model.config.method]} {name}",
        partial(look_with, model),
        model.preprocessing,
        model.device,
        normalization or ("clipping" if calm_maps else "minmax"),
        thresholds or ("log" if calm_maps else "even"),
        normalization or "minmax",
        thresholds or "even",
        {
            "model_config": {**asdict(model.config), "preprocessing": asdict(model.preprocessing)},
            "weights": weights_digest(model),
            "method": name,
            "options": {key: value for key, value in options.items() if key != "batch_size"},
            **(about or {}),
        },
        model,
        look_with,
    )


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()
