#!/bin/sh
# PyTorch 2.14.1: torch.export of a model that returns a registered dataclass with a string field.
#
# torch.export.register_dataclass makes every field a leaf of the output, the string too. torch.export.export accepts
# it, the exported program runs and returns the dataclass, torch.export.save writes the file without a word; only
# torch.export.load, perhaps on another machine, refuses the file. Registered by torch.utils._pytree with the string
# as context, the same class is saved and loaded.
#
# Seen: "register_dataclass: exported, saved, load failed", "string as context: exported, saved, loaded".
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.14.1" "numpy==2.2.6"
cat > "$folder/try.py" <<'PYTHON'
import io
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree


@dataclass
class Leaf:
    scores: Tensor
    kind: str


@dataclass
class Context:
    scores: Tensor
    kind: str


torch.export.register_dataclass(Leaf, serialized_type_name="Leaf")
_pytree.register_pytree_node(
    Context,
    lambda one: ([one.scores], one.kind),
    lambda leaves, kind: Context(*leaves, kind),
    serialized_type_name="Context",
    to_dumpable_context=lambda kind: kind,
    from_dumpable_context=lambda kind: kind,
)


class Model(nn.Module):
    def __init__(self, kind: type) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(3, 2), kind

    def forward(self, values: Tensor) -> object:
        return self.kind(self.layer(values), "softplus")


def tried(kind: type) -> str:
    program, file = torch.export.export(Model(kind), (torch.ones(4, 3),)), io.BytesIO()
    assert program.module()(torch.ones(4, 3)).kind == "softplus"
    torch.export.save(program, file)
    file.seek(0)
    try:
        torch.export.load(file)
    except Exception as error:
        print(f"  {type(error).__name__}: {str(error)[:150]}")
        return "exported, saved, load failed"
    return "exported, saved, loaded"


found = [tried(Leaf), tried(Context)]
print(f"register_dataclass: {found[0]}\nstring as context: {found[1]}")
sys.exit(found != ["exported, saved, load failed", "exported, saved, loaded"])
PYTHON
"$folder/venv/bin/python" "$folder/try.py"
