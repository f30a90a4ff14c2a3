"""How many thresholds a score reaches: counted exactly, without a search.

A float32 in [0, 1] is, read as a whole number, in the same order as its value. Its upper bits name a cell so small
that it holds one threshold at most, and one look into a table of the cells tells how many thresholds lie below the
cell; a carry from the lower bits adds the threshold inside it. Comparing a float32 with a float64 threshold is
comparing it with the smallest float32 that is not below the threshold, so nothing is rounded.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

__all__ = ["Cuts"]

ONE = 0x3F800000
"""The bits of 1.0."""

COARSEST = 20
"""Cells are at most that many bits wide: the count of thresholds needs the bits above."""

LARGEST = 2**16
"""Cells of the largest table; thresholds that would need more are searched."""


class Cuts(nn.Module):
    """Ascending thresholds, ready to be counted.

    Args:
        thresholds: (t,) float64, ascending, in [0, 1].
    """

    thresholds: Tensor
    table: Tensor

    def __init__(self, thresholds: Float[Tensor, " t"]) -> None:
        super().__init__()
        self.register_buffer("thresholds", thresholds, persistent=False)
        self.shift, self.lowest, table = _table(thresholds.cpu())
        self.register_buffer("table", table.to(thresholds.device), persistent=False)

    def __len__(self) -> int:
        return len(self.thresholds)

    def forward(self, scores: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The number of thresholds t with score >= t, int32.

        Args:
            scores: in [0, 1], not checked; compared as they are, whatever their dtype.
        """
        if scores.dtype == torch.float64 or not len(self.table):
            return torch.bucketize(scores.double(), self.thresholds, right=True, out_int32=True)
        bits = scores.detach().float().contiguous().view(torch.int32).clamp(min=self.lowest << self.shift)
        below = self.table.index_select(0, ((bits >> self.shift) - self.lowest).flatten()).view_as(bits)
        return below.add_(bits.bitwise_and_((1 << self.shift) - 1)).bitwise_right_shift_(self.shift)


def _table(thresholds: Float[Tensor, " t"]) -> tuple[int, int, Int[Tensor, " c"]]:
    """Bits of a cell, the lowest cell, and the entries of the cells from there to that of 1.

    An entry is (thresholds below the cell) * 2^bits, and 2^bits - (lower bits of the threshold inside) where there
    is one: adding a score's lower bits to it carries if the score reaches that threshold. The lowest cell is below
    all thresholds but 0, and stands for what is lower still. Without cells if the thresholds lie too close.
    """
    nearest = thresholds.float()
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    bits = torch.where(nearest.double() < thresholds, above, nearest).view(torch.int32).long()
    positive = bits[bits > 0]
    zeros = len(bits) - len(positive)
    for shift in range(COARSEST, 0, -1):
        cells = positive >> shift
        lowest = int(cells[0]) - 1 if len(cells) else (ONE >> shift)
        count = (ONE >> shift) - lowest + 1
        if lowest < 0 or count > LARGEST or len(thresholds) >> (30 - shift):
            continue
        if bool((cells.diff() > 0).all()):
            inside = torch.zeros(count, dtype=torch.int64)
            inside[cells - lowest] = 1
            entries = (zeros + inside.cumsum(0) - inside) << shift
            entries[cells - lowest] += (1 << shift) - (positive & ((1 << shift) - 1))
            return shift, lowest, entries.to(torch.int32)
    return 0, 0, torch.zeros(0, dtype=torch.int32)
