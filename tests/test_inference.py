"""Device names, and evaluation mode for a while."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calm.errors import CalmError
from calm.inference import evaluation_mode, resolve_device


def test_resolve_device_takes_names_and_auto() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device().type in ("cpu", "cuda", "mps")
    with pytest.raises(CalmError, match="device 'gpu' cannot be used"):
        resolve_device("gpu")


@pytest.mark.parametrize("failing", [False, True])
def test_evaluation_mode_restores_everything(failing: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    module[2].eval()
    random = torch.get_rng_state()
    try:
        with torch.no_grad(), evaluation_mode(module):
            assert not any(part.training for part in module.modules())
            assert not any(parameter.requires_grad for parameter in module.parameters())
            assert torch.is_grad_enabled()
            torch.rand(3)
            if failing:
                raise KeyError
    except KeyError:
        pass
    assert [part.training for part in module] == [True, True, False]
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert torch.equal(torch.get_rng_state(), random)
