"""Random activations that several tests draw their cases from."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

ACTIVATIONS = ["softplus", "relu", "exp"]

shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


def activations_of(shape: tuple[int, int, int, int], seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Float64 logits (B, C, h, w) and scores (B, 1, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    b, c, h, w = shape
    logits = torch.randn(b, c, h, w, generator=generator, dtype=torch.float64) * spread
    return logits, torch.randn(b, 1, h, w, generator=generator, dtype=torch.float64) * spread
