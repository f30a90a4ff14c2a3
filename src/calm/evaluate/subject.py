"""What is evaluated: anything that predicts, and says where for any class, from one look at the images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm.baselines import BASELINES, attribute, canonical_method
from calm.model import CalmModel
from calm.normalize import Normalization
from calm.output import CalmOutput, CamOutput
from calm.preprocess import Preprocessing

__all__ = ["Look", "Looked", "Subject", "model_subject"]


class Looked(Protocol):
    """Images that were looked at once."""

    @property
    def probs(self) -> Float[Tensor, "b c"]:
        """p(y | x), (B, C) float32."""

    def maps(self, classes: Int[Tensor, "b k"], /) -> Float[Tensor, "b k h w"]:
        """Score maps of K classes per image, at the method's own resolution, not normalised."""


Look = Callable[[Tensor], Looked]
"""Normalised images (B, 3, H, W) to what they look like to the method."""


@dataclass(frozen=True)
class Subject:
    """A method under test.

    Attributes:
        label: its row in tables, "CALM-EM jointll".
        look: see :data:`Look`.
        preprocessing: from pictures to the images that ``look`` takes.
        device: where they must be.
        normalization: of its maps, before a protocol cuts or ranks them.
        thresholds: "even" or "log", at which they are cut.
        about: what it is, in words and numbers that JSON can hold: enters provenance and the key of saved parts.
    """

    label: str
    look: Look
    preprocessing: Preprocessing
    device: torch.device
    normalization: Normalization
    thresholds: str
    about: dict[str, Any]


def model_subject(
    model: CalmModel,
    *,
    method: str | None = None,
    label: str | None = None,
    about: dict[str, Any] | None = None,
    normalization: Normalization | None = None,
    thresholds: str | None = None,
    **options: Any,
) -> Subject:
    """A model with one way of explaining it.

    Args:
        model: is put into evaluation mode.
        method: a map kind of the model or a baseline (`calm.baselines.METHODS`); None: the model's default map.
        label: row in tables; by default the model's method and ``method``.
        about: where the model comes from.
        normalization: by default clipping for the maps of a CALM model, which are probabilities, and minmax for
            all others.
        thresholds: by default log for those, and even for all others.
        options: of the baseline, see `calm.attribute`.

    Raises:
        CalmError: an unknown method, or one that the model has no map for.
    """
    name = model.map_kind() if method is None else canonical_method(method)
    own = name not in BASELINES
    if own:
        name = model.map_kind(name)
    probabilities = own and model.config.method != "cam"
    model.eval()
    normalization = normalization or ("clipping" if probabilities else "minmax")
    thresholds = thresholds or ("log" if probabilities else "even")
    return Subject(
        label or f"{model.config.method.upper()} {name}",
        _OwnMaps(model, name) if own else _Baseline(model, name, options),
        model.preprocessing,
        model.device,
        normalization,
        thresholds,
        {
            **(about or {}),
            "model_method": model.config.method,
            "method": name,
            "options": options,
            "normalization": normalization,
            "thresholds": thresholds,
        },
    )


@dataclass(frozen=True)
class _OwnMaps:
    """The model's own maps: prediction and maps of any classes from one forward pass."""

    model: CalmModel
    kind: str

    def __call__(self, images: Tensor) -> Looked:
        with torch.no_grad():
            return _Output(self.model(images), self.kind)


@dataclass(frozen=True)
class _Output:
    output: CalmOutput | CamOutput
    kind: str

    @property
    def probs(self) -> Tensor:
        with torch.no_grad():
            return self.output.probs

    def maps(self, classes: Tensor) -> Tensor:
        with torch.no_grad():
            return self.output.attribute(classes, self.kind)


@dataclass(frozen=True)
class _Baseline:
    """A baseline: every class costs passes of its own."""

    model: CalmModel
    method: str
    options: dict[str, Any]

    def __call__(self, images: Tensor) -> Looked:
        return _Images(self, images)


@dataclass(frozen=True)
class _Images:
    baseline: _Baseline
    images: Tensor

    @property
    def probs(self) -> Tensor:
        with torch.no_grad():
            probs: Tensor = self.baseline.model(self.images).probs
            return probs

    def maps(self, classes: Tensor) -> Tensor:
        """One class after another."""
        own = self.baseline
        columns = [attribute(own.model, self.images, k, own.method, **own.options) for k in classes.unbind(1)]
        return torch.stack(columns, dim=1)
