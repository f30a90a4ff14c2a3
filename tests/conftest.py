"""Test setting: shapes in the core's signatures are enforced, and every test starts from the same random state."""

from __future__ import annotations

import os

import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the suite runs in parallel processes

install_import_hook(["calm.latent", "calm.heatmaps", "calm.output"], "beartype.beartype")


@pytest.fixture(autouse=True)
def _fixed_random_state() -> None:
    torch.manual_seed(0)
