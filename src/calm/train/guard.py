"""Stop training when the loss or the weights are not finite, with the step and the likely cause."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calm.errors import CalmError
from calm.output import CalmOutput, CamOutput

__all__ = ["FiniteGuard", "Position", "check_weights", "diagnose"]


@dataclass(frozen=True)
class Position:
    """Position in a run, for messages.

    Attributes:
        epoch: from 0.
        step: optimiser steps taken so far.
        lr: highest learning rate of all parameter groups at that step.
    """

    epoch: int
    step: int
    lr: float


class FiniteGuard:
    """Record on the device which step first had a loss that is NaN or infinite; only `first_bad` synchronises."""

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Record ``step`` if its ``loss`` is the first that is not finite."""
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        bad = ~torch.isfinite(loss.detach()) & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, step)

    def first_bad(self) -> int | None:
        """Return the first step whose loss was not finite, if there was one. This waits for the device."""
        step = -1 if self._first_bad is None else int(self._first_bad)
        return None if step < 0 else step


def check_weights(model: nn.Module, position: Position) -> None:
    """Refuse weights that are not finite, as before a checkpoint is written.

    Raises:
        CalmError: a parameter or buffer holds NaN or infinity. The message names it, the step and the likely cause.
    """
    if name := first_nonfinite_weight(model):
        cause = f"after this step the weights of {name} are not finite"
        raise _stopped(position.step, position, cause, diverged=True)


def first_nonfinite_weight(model: nn.Module) -> str | None:
    """Return the name of the first parameter or buffer with a NaN or infinity; synchronises once if there is none."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    floats = {name: value for name, value in tensors if value.is_floating_point()}
    finite = torch.stack([torch.isfinite(value).all() for value in floats.values()])
    if bool(finite.all()):
        return None
    return list(floats)[int(finite.int().argmin())]


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor, step: int, position: Position) -> CalmError:
    """Return the error for a loss that was not finite at ``step``.

    Args:
        model: a `CalmModel`, as it is now.
        images: the current batch: that of ``step``, or of the next check after it.
        step: the first step whose loss was not finite.
        position: the current position in the run.
    """
    finite_images = torch.isfinite(images).flatten(1).all(dim=1)
    if not bool(finite_images.all()):
        bad = len(images) - int(finite_images.sum())
        cause = f"{bad} of {len(images)} images of the batch hold NaN or infinity"
        return _stopped(step, position, cause, diverged=False)
    if name := first_nonfinite_weight(model):
        return _stopped(step, position, f"the weights of {name} are not finite", diverged=True)
    output: CalmOutput | CamOutput = model(images)
    overflowing = {"class logits": output.logits}
    if isinstance(output, CalmOutput):
        overflowing["location scores"] = output.scores
    for name, values in overflowing.items():
        if not bool(torch.isfinite(values).all()):
            return _stopped(step, position, f"the weights are finite but the {name} overflow", diverged=True)
    dead = int(output.dead.sum()) if isinstance(output, CalmOutput) else 0
    if dead:
        cause = f"the prior is dead for {dead} of {len(images)} images (all location scores below 0)"
    else:
        cause = "images, weights and activations are finite now: the loss overflowed"
    return _stopped(step, position, cause, diverged=False)


def _stopped(step: int, position: Position, cause: str, *, diverged: bool) -> CalmError:
    advice = (
        "lower lr or optim.head_ratio, add optim.warmup_epochs or optim.clip_norm, or use precision 32-true"
        if diverged
        else "look at the images of the data set with `calm data check`, or lower lr"
    )
    return CalmError(
        f"training stopped: the loss is not finite at step {step} (epoch {position.epoch + 1}, learning rate"
        f" {position.lr:.3g}): {cause}. Likely remedy: {advice}. The last checkpoint is from before this."
    )
