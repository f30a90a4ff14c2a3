"""The circumstances of a forward pass, for what its output computes later: the weights, autocast and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from calm.errors import CalmError

__all__ = ["Moment", "again"]


@dataclass(frozen=True)
class Moment:
    """What held when an output was made.

    Attributes:
        weights: of the layers that are yet to be asked, each with its version and dtype.
        device: type of the device; empty if it has no autocast.
        autocast: dtype that autocast asked for; None without.
        gradients: whether they were recorded.
    """

    weights: tuple[tuple[Tensor, int, torch.dtype], ...]
    device: str
    autocast: torch.dtype | None
    gradients: bool

    @classmethod
    def now(cls, device: torch.device, weights: Iterable[Tensor]) -> Moment | None:
        """This one; None under `torch.compile`, which sees the whole computation."""
        if torch.compiler.is_compiling():
            return None
        name = device.type if torch.amp.is_autocast_available(device.type) else ""
        dtype = torch.get_autocast_dtype(name) if name and torch.is_autocast_enabled(name) else None
        seen = tuple((weight, _version(weight), weight.dtype) for weight in weights)
        return cls(seen, name, dtype, torch.is_grad_enabled())


def again(then: Moment | None, weights: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Compute with the same weights as it was computed then. None: as it is computed now.

    Raises:
        CalmError: the weights are others by now: the features are not theirs.
    """
    return nullcontext() if then is None else _restored(then, weights)


@contextmanager
def _restored(then: Moment, weights: Iterable[Tensor]) -> Iterator[None]:
    if [(id(weight), _version(weight), weight.dtype) for weight in weights] != [
        (id(weight), version, dtype) for weight, version, dtype in then.weights
    ]:
        raise CalmError(
            "the weights have changed since this output's forward pass (an optimiser step, a move to another dtype?):"
            " read what you need of an output, such as probs, before that, or ask the model again"
        )
    quiet = nullcontext() if then.gradients else torch.no_grad()
    on = then.autocast is not None
    cast = torch.autocast(then.device, dtype=then.autocast, enabled=on) if then.device else nullcontext()
    with quiet, cast:
        yield


def _version(weight: Tensor) -> int:
    """Counts the changes in place; inference tensors have no such count."""
    return 0 if weight.is_inference() else weight._version
