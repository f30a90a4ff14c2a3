"""Learning rate and temperature as pure functions of the step: there is nothing to save or to restore."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from calm.errors import CalmError, unknown

if TYPE_CHECKING:
    from calm.train.config import OptimOptions

__all__ = ["Run", "learning_rate_factor", "temperature_schedule"]

Temperature: TypeAlias = Callable[[int], float]

ONE_CYCLE_RISE = 0.3
ONE_CYCLE_START, ONE_CYCLE_END = 1 / 25, 1e-4


@dataclass(frozen=True)
class Run:
    """How long a run is: ``epochs`` of ``steps_per_epoch`` optimiser steps."""

    epochs: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.epochs * self.steps_per_epoch


def learning_rate_factor(optim: OptimOptions, run: Run, step: int) -> float:
    """What the peak learning rate is multiplied by at a step.

    Args:
        optim: schedule, warm-up and their settings.
        run: the length of the run.
        step: optimiser steps already taken, from 0.

    Returns:
        A factor in (0, 1]. During warm-up it rises linearly, reaching 1 with the last warm-up step.

    >>> from calm.train.config import OptimOptions
    >>> [learning_rate_factor(OptimOptions(step_epochs=2), Run(epochs=5, steps_per_epoch=1), step)
    ...  for step in range(5)]
    [1.0, 1.0, 0.1, 0.1, 0.010000000000000002]
    """
    warmup = round(optim.warmup_epochs * run.steps_per_epoch)
    if optim.schedule == "one-cycle":
        return _one_cycle(step, run.steps, warmup or round(ONE_CYCLE_RISE * run.steps))
    if step < warmup:
        return (step + 1) / warmup
    epoch = step // run.steps_per_epoch
    if optim.schedule == "step":
        return optim.step_factor ** (epoch // optim.step_epochs)
    if optim.schedule == "released-step":
        return optim.step_factor ** ((epoch + 1) // optim.step_epochs)
    if optim.schedule == "cosine":
        return _half_cosine((step - warmup) / max(1, run.steps - warmup), 1.0, 0.0)
    return 1.0


def _one_cycle(step: int, steps: int, rise: int) -> float:
    """Half a cosine up to 1 at the last of ``rise`` steps, half a cosine down to almost 0 at the last step."""
    peak = max(rise, 1) - 1
    if step < peak:
        return _half_cosine(step / peak, ONE_CYCLE_START, 1.0)
    return _half_cosine((step - peak) / max(1, steps - 1 - peak), 1.0, ONE_CYCLE_START * ONE_CYCLE_END)


def _half_cosine(progress: float, start: float, end: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def temperature_schedule(temperature: float | str, steps: int) -> Temperature:
    """The temperature of the E-step as a function of the step.

    Args:
        temperature: a number, or ``START:END``, or ``START:END:linear`` or ``START:END:cosine``.
        steps: optimiser steps of the run; the end value is reached with the last one.

    Raises:
        CalmError: the text cannot be read, a value is negative or not finite, or the shape is unknown.

    >>> at = temperature_schedule("0.5:1.0", steps=11)
    >>> [at(0), at(5), at(10)]
    [0.5, 0.75, 1.0]
    """
    start_text, _, rest = str(temperature).partition(":")
    end_text, _, shape = rest.partition(":")
    try:
        start = float(start_text)
        end = float(end_text) if end_text else start
    except ValueError:
        raise CalmError(
            f"temperature {temperature!r} is neither a number nor START:END nor START:END:cosine"
        ) from None
    if not all(math.isfinite(value) and value >= 0 for value in (start, end)):
        raise CalmError(f"temperature {temperature!r}: values must be finite and 0 or more")
    if shape not in ("", "linear", "cosine"):
        raise unknown("shape of the temperature", shape, ["linear", "cosine"], where=f"{temperature!r}")
    last = max(1, steps - 1)
    if shape == "cosine":
        return lambda step: _half_cosine(step / last, start, end)
    return lambda step: start + (end - start) * min(step / last, 1.0)
