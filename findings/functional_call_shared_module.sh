#!/bin/sh
# PyTorch 2.14.1: torch.func.functional_call on a module that is registered under two names.
#
# functional_call is to leave the module as it was: the given tensors stand in for parameters during the call only.
# Where a submodule is an attribute twice (self.a = self.b = layer, as in some models of timm), the call keeps the
# given tensors in the module afterwards, without an error or warning: the model has lost its weights. Two layers that
# share one weight tensor (layer.weight = other.weight) are restored.
#
# Seen: "one layer under two names: restored False", "two layers with one weight: restored True".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "numpy==2.2.6"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch import Tensor, nn


class OneLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = self.b = nn.Linear(2, 2)

    def forward(self, values: Tensor) -> Tensor:
        return self.a(values) + self.b(values)


class OneWeight(OneLayer):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(2, 2)
        self.b.weight = self.a.weight


def restored(model: nn.Module) -> bool:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    assert torch.func.functional_call(model, zeros, (torch.ones(1, 2),)).sum() == 0
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


found = [restored(OneLayer()), restored(OneWeight())]
print(f"one layer under two names: restored {found[0]}\ntwo layers with one weight: restored {found[1]}")
sys.exit(found != [False, True])
PYTHON
