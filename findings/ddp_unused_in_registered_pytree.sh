#!/bin/sh
# PyTorch 2.14.1: DistributedDataParallel(find_unused_parameters=True) and an output that is a registered pytree.
#
# A model may return an object of its own class. torch.utils._pytree.register_pytree_node is what torch.export, vmap
# and functorch ask for; but DDP looks for the output's tensors, from which it learns what is unused, by a search of
# its own: lists, tuples, dicts and dataclasses. It finds none in a registered pytree, takes every parameter for
# unused, and the backward pass fails with "marked a variable ready twice" (the message speaks of shared parameters
# and checkpointing). The same object as a dataclass works, registered or not.
#
# Seen: "registered pytree: RuntimeError, ready twice True", "dataclass: no error, gradient True".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "numpy==2.2.6"
cat > "$folder/try.py" <<'PYTHON'
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}
torch.distributed.init_process_group("gloo", rank=0, world_size=1)


class Registered:
    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


@dataclass
class Record:
    scores: Tensor


_pytree.register_pytree_node(Registered, lambda one: ([one.scores], None), lambda leaves, _: Registered(*leaves))


class Model(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 2), kind

    def forward(self, values: Tensor) -> object:
        return self.kind(self.layer(values))


def tried(kind: type) -> str:
    model = DistributedDataParallel(Model(kind), find_unused_parameters=True)
    try:
        model(torch.ones(4, 3)).scores.sum().backward()
    except RuntimeError as error:
        return f"RuntimeError, ready twice {'ready' in str(error)}"
    return f"no error, gradient {model.module.layer.weight.grad is not None}"


found = [tried(Registered), tried(Record)]
print(f"registered pytree: {found[0]}\ndataclass: {found[1]}")
torch.distributed.destroy_process_group()
sys.exit(found != ["RuntimeError, ready twice True", "no error, gradient True"])
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
