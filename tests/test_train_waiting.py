"""A training step does not wait for the device, but where it is to be looked at.

Only what the CPU does is seen here. There, and there alone, a ReLU prior makes the loss look which locations to skip.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_cases import SIZE, tiny_config, tiny_net

from calm.config import Method
from calm.model import create_model
from calm.train.config import LossOptions, RunLength
from calm.train.optim import Average
from calm.train.step import TrainingStep

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "is_nonzero"}
"""Operations whose result, or its shape, the program must see before it goes on: `.item()`, `bool()`, masks."""


class Waits(TorchDispatchMode):
    """Notes the operations that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or (
            name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        ):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def waits_of_a_step(method: Method, step: int, prior: str, loss: LossOptions) -> list[str]:
    """What forward, loss, measures and backward wait for, as they are on a GPU."""
    config = replace(tiny_config(Path("data"), Path("run"), method=method), loss=loss)
    model = create_model(tiny_net(), 3, method, prior_activation=prior)  # type: ignore[arg-type]
    averages = {"teacher": Average(model, 0.9)} if loss.posterior == "ema" else {}
    module = TrainingStep(model.train(), averages, config, RunLength(3, 4))
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 0])
    with Waits() as waits:
        module(images, labels, epoch=0, step=step, index=step, rank=0).backward()
    return waits.found


@pytest.mark.parametrize(
    ("method", "prior", "loss"),
    [
        ("cam", "softplus", LossOptions()),
        ("calm-ml", "softplus", LossOptions()),
        ("calm-em", "softplus", LossOptions()),
        ("calm-em", "softplus", LossOptions(posterior="ema")),
    ],
)
def test_a_step_between_two_looks_waits_for_nothing(method: Method, prior: str, loss: LossOptions) -> None:
    assert waits_of_a_step(method, 3, prior, loss) == []


def test_a_step_that_is_looked_at_waits() -> None:
    assert "_local_scalar_dense" in waits_of_a_step("calm-em", 0, "softplus", LossOptions())
