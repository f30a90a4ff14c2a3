"""Stop when the loss is no longer a number, and say when it happened and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calm.errors import CalmError
from calm.output import CalmOutput, CamOutput

__all__ = ["FiniteGuard", "Moment", "diagnose"]


@dataclass(frozen=True)
class Moment:
    """Where in the run something happened.

    Attributes:
        epoch: from 0.
        step: optimiser steps before it.
        lr: highest learning rate at that step.
    """

    epoch: int
    step: int
    lr: float


class FiniteGuard:
    """Remembers on the device which step first had a loss that is NaN or infinite. Only asking waits for the device."""

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None

    def note(self, loss: Tensor, step: int) -> None:
        """Record ``step`` if its ``loss`` is the first that is not finite."""
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        bad = ~torch.isfinite(loss.detach()) & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, step)

    def first_bad(self) -> int | None:
        """The first step whose loss was not finite; waits for the device."""
        step = -1 if self._first_bad is None else int(self._first_bad)
        return None if step < 0 else step


def check_weights(model: nn.Module, moment: Moment) -> None:
    """Refuse weights that are not finite, as before a checkpoint is written.

    Raises:
        CalmError: naming the first such parameter, the step and the likely cause.
    """
    if name := first_nonfinite_weight(model):
        raise _stopped(
            moment.step, moment, f"after this step the weights of {name} are not finite", model, name
        )


def first_nonfinite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer with a NaN or infinity; one wait for the device if there is none."""
    named = {
        name: value
        for name, value in (*model.named_parameters(), *model.named_buffers())
        if value.is_floating_point()
    }
    finite = torch.stack([torch.isfinite(value).all() for value in named.values()])
    if bool(finite.all()):
        return None
    return list(named)[int(finite.int().argmin())]


@torch.no_grad()
def diagnose(model: nn.Module, images: Tensor, step: int, moment: Moment) -> CalmError:
    """The error for a loss that was not finite at ``step``.

    Args:
        model: a `CalmModel`, as it is now.
        images: the batch at hand now: that of ``step``, or of the next check after it.
        step: the first step whose loss was not finite.
        moment: now.
    """
    if not bool(torch.isfinite(images).all()):
        bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
        return _stopped(
            step, moment, f"{bad} of {len(images)} images of the batch hold NaN or infinity", model, None
        )
    if name := first_nonfinite_weight(model):
        return _stopped(step, moment, f"the weights of {name} are not finite", model, name)
    output: CalmOutput | CamOutput = model(images)
    if not bool(torch.isfinite(output.logits).all()):
        return _stopped(step, moment, "the weights are finite but the class logits overflow", model, "logits")
    if isinstance(output, CalmOutput):
        if not bool(torch.isfinite(output.scores).all()):
            return _stopped(
                step, moment, "the weights are finite but the location scores overflow", model, "scores"
            )
        dead = int(output.dead.sum())
        if dead:
            cause = f"the prior is dead for {dead} of {len(images)} images (all location scores below 0)"
            return _stopped(step, moment, cause, model, None)
    return _stopped(
        step, moment, "images, weights and activations are finite now: the loss overflowed", model, None
    )


def _stopped(step: int, moment: Moment, cause: str, model: nn.Module, diverged: str | None) -> CalmError:
    advice = (
        "lower lr or optim.head_ratio, add optim.warmup_epochs or optim.clip_norm, or use precision 32-true"
        if diverged
        else "look at the images of the data set with `calm data check`, or lower lr"
    )
    return CalmError(
        f"training stopped: the loss is not finite at step {step} (epoch {moment.epoch + 1}, learning rate"
        f" {moment.lr:.3g}): {cause}. Likely remedy: {advice}. The last checkpoint is from before this."
    )
