"""The words that users choose among, as types. They need no other module, so that a help page need not wait for one."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = ["Method", "PriorActivation", "PriorDenominator"]

Method: TypeAlias = Literal["calm-em", "calm-ml", "cam"]
PriorActivation: TypeAlias = Literal["softplus", "relu", "exp"]
PriorDenominator: TypeAlias = Literal["differentiated", "constant"]
