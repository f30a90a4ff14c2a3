"""The words that users choose among, as types. They need no other module, so that a help page need not wait for one."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["REPLICATES", "Explain", "Fill", "Method", "Order", "PriorActivation", "PriorDenominator"]

Method: TypeAlias = Literal["calm-em", "calm-ml", "cam"]
PriorActivation: TypeAlias = Literal["softplus", "relu", "exp"]
PriorDenominator: TypeAlias = Literal["differentiated", "constant"]

Fill: TypeAlias = Literal["zero", "mean", "noise", "blur"]
"""What erased pixels become: see `calm.metrics.erasing`."""

Explain: TypeAlias = Literal["label", "prediction"]
"""Whose map ranks the pixels: see `calm.evaluate.ranked_pixels`."""

Order: TypeAlias = Literal["cascading", "all"]
"""How weights are drawn anew: see `calm.evaluate.randomisation`."""

REPLICATES = 1000
"""Bootstrap samples: the ends of a 95 percent interval then rest on 25 of them each."""
