"""An exponential moving average of a model: the teacher of the E-step, or the weights that are evaluated and saved."""

from __future__ import annotations

import copy
from typing import Any

import torch

from calm.model import CalmModel

__all__ = ["Average"]


class Average:
    """A copy of a model whose weights and statistics trail the model's: average = decay * average + (1 - decay) * new.

    Early on the decay is smaller, (1 + t) / (10 + t) at the t-th update, so that the random start is forgotten.
    Deliberately not a module: it must not be trained, wrapped or saved as a part of the model.

    Args:
        model: what is averaged; copied, and put into evaluation mode.
        decay: in [0, 1).

    Attributes:
        model: the averaged copy.
        updates: how often `update` was called.
    """

    def __init__(self, model: CalmModel, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: CalmModel) -> None:
        """Move the average towards ``model``. Integer buffers (BatchNorm's counters) are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = self.model.state_dict(), model.state_dict()
        floats = [name for name, value in mine.items() if value.is_floating_point()]
        torch._foreach_lerp_([mine[name] for name in floats], [theirs[name] for name in floats], 1 - decay)
        for name in mine.keys() - set(floats):
            mine[name].copy_(theirs[name])
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly from here."""
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])
