"""Schedules against PyTorch's schedulers and against the numbers written down."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler as torchs

from calm.errors import CalmError
from calm.train.config import OptimOptions, RunLength, temperature_schedule
from calm.train.optim import build_scheduler

RUN = RunLength(epochs=6, steps_per_epoch=5)


def rates(options: OptimOptions, run: RunLength = RUN) -> list[float]:
    return torch_rates(lambda optimizer: build_scheduler(optimizer, options, run), run.steps)


def torch_rates(make: Callable[[torch.optim.Optimizer], torchs.LRScheduler], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_one_cycle_is_pytorchs() -> None:
    expected = torch_rates(lambda o: torchs.OneCycleLR(o, 1.0, total_steps=30, cycle_momentum=False), 30)
    assert rates(OptimOptions(schedule="one-cycle")) == pytest.approx(expected)


def test_cosine_is_pytorchs() -> None:
    expected = torch_rates(lambda o: torchs.CosineAnnealingLR(o, 30), 30)
    assert rates(OptimOptions(schedule="cosine")) == pytest.approx(expected)


def test_step_is_pytorchs_per_epoch() -> None:
    expected = torch_rates(lambda o: torchs.StepLR(o, step_size=2, gamma=0.3), 6)
    options = OptimOptions(schedule="step", step_epochs=2, step_factor=0.3)
    assert rates(options)[::5] == pytest.approx(expected)
    assert rates(options)[4::5] == pytest.approx(expected)


def test_released_step_trains_29_epochs_at_the_base_rate_and_step_30() -> None:
    run = RunLength(epochs=40, steps_per_epoch=1)
    assert rates(OptimOptions(schedule="released-step"), run).count(1.0) == 29
    assert rates(OptimOptions(schedule="step"), run).count(1.0) == 30


def test_warm_up_rises_linearly_to_the_full_rate() -> None:
    values = rates(OptimOptions(schedule="constant", warmup_epochs=0.8))
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 26)


def test_one_cycle_rises_for_the_warm_up_given() -> None:
    values = rates(OptimOptions(schedule="one-cycle", warmup_epochs=1))
    assert max(range(30), key=values.__getitem__) == 4


@pytest.mark.parametrize("schedule", ["step", "released-step", "cosine", "one-cycle", "constant"])
@pytest.mark.parametrize("run", [RunLength(1, 1), RunLength(1, 2), RunLength(3, 1)])
def test_shortest_runs_have_a_rate(schedule: str, run: RunLength) -> None:
    options = OptimOptions(schedule=schedule)  # type: ignore[arg-type]
    assert all(0 < value <= 1 for value in rates(options, run))


def test_temperature_reaches_its_end_with_the_last_step() -> None:
    for text in ("0.5:1.5", "0.5:1.5:linear", "0.5:1.5:cosine"):
        at = temperature_schedule(text, steps=9)
        assert [at(0), at(4), at(8)] == pytest.approx([0.5, 1.0, 1.5])
    assert temperature_schedule("0.5:1.5:cosine", 9)(1) < temperature_schedule("0.5:1.5", 9)(1)
    assert temperature_schedule(2, steps=9)(3) == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [("warm", "neither a number"), ("1:2:sine", "did you mean"), ("-1", "0 or more"), ("0:inf", "finite")],
)
def test_unreadable_temperature_is_told(text: str, message: str) -> None:
    with pytest.raises(CalmError, match=message):
        temperature_schedule(text, steps=1)
