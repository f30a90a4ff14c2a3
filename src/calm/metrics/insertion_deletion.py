"""Insertion and deletion: how fast the target's probability comes and goes with the pixels a map calls evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from calm.errors import CalmError
from calm.metrics.bootstrap import REPLICATES, Estimate, estimate, weights
from calm.metrics.erasing import erase, first_pixels

__all__ = ["InsertionDeletion", "InsertionDeletionResult", "insertion_deletion_curves"]


def insertion_deletion_curves(
    classify: Callable[[Float[Tensor, "b 3 H W"]], Float[Tensor, "b c"]],
    images: Float[Tensor, "b 3 H W"],
    order: Int[Tensor, "b n"],
    targets: Int[Tensor, " b"],
    *,
    inserted_into: Float[Tensor, "b 3 H W"],
    deleted_to: Float[Tensor, "b 3 H W"],
    whole: Float[Tensor, "b c"],
    steps: int = 20,
) -> tuple[Float[Tensor, "b s1"], Float[Tensor, "b s1"]]:
    """The target's probability after 0, 1/S, ..., 1 of the pixels, highest score first.

    Args:
        classify: p(y | x) of a batch.
        images: normalised input of the model.
        order: `calm.metrics.erasing.erasing_order` of the maps.
        targets: the class that each map explains.
        inserted_into: where insertion starts (`calm.metrics.erasing.filling`, by custom the blurred image).
        deleted_to: where deletion ends (by custom zeros).
        whole: p(y | x) of ``images``, the last point of insertion and the first of deletion.
        steps: S; 2 S forward passes of the batch.

    Returns:
        Insertion and deletion, (B, S + 1) each.

    Raises:
        CalmError: fewer than one step.
    """
    if steps < 1:
        raise CalmError(f"steps is {steps}: give 1 or more")
    pixels = order.shape[1]
    masks = first_pixels(order, [round(pixels * step / steps) for step in range(steps + 1)])

    def probability(probs: Tensor) -> Tensor:
        return probs.gather(1, targets[:, None]).squeeze(1)

    full = probability(whole)
    inserted = [probability(classify(erase(inserted_into, mask, images))) for mask in masks[:-1]]
    deleted = [probability(classify(erase(images, mask, deleted_to))) for mask in masks[1:]]
    return torch.stack([*inserted, full], dim=1), torch.stack([full, *deleted], dim=1)


class InsertionDeletionResult(NamedTuple):
    """Mean curves, and the mean height (area) of each; probabilities in [0, 1].

    Attributes:
        fractions: shares of the pixels inserted or deleted, 0 to 1, (S + 1,).
        insertion: mean probability by fraction.
        deletion: mean probability by fraction.
        insertion_area: higher is better.
        deletion_area: lower is better.
    """

    fractions: tuple[float, ...]
    insertion: tuple[Estimate, ...]
    deletion: tuple[Estimate, ...]
    insertion_area: Estimate
    deletion_area: Estimate


class InsertionDeletion(Metric):
    """Area under the insertion and the deletion curve, averaged over images.

    Both depend on the classifier's confidence as well as on the map: compare maps of one classifier. As in
    remove-and-classify, the images on the way are unlike any that the classifier learnt from.

    Args:
        steps: S of the curves.
        replicates: bootstrap samples of images, for the intervals.
        seed: of the bootstrap.

    Source: Petsiuk, Das, Saenko, RISE, 2018, section 4.2.
    """

    full_state_update = False
    curves: Tensor
    images: Tensor

    def __init__(self, steps: int = 20, *, replicates: int = REPLICATES, seed: int = 0) -> None:
        super().__init__()
        if steps < 1:
            raise CalmError(f"steps is {steps}: give 1 or more")
        self.steps, self.replicates, self.seed = steps, replicates, seed
        curves = torch.zeros(replicates + 1, 2, steps + 1, dtype=torch.float64)
        self.add_state("curves", curves, dist_reduce_fx="sum")
        self.add_state("images", torch.zeros(replicates + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, inserted: Float[Tensor, "b s1"], deleted: Float[Tensor, "b s1"], keys: Int[Tensor, " b"]
    ) -> None:
        """Add the curves of a batch (`insertion_deletion_curves`).

        Raises:
            CalmError: another number of steps; NaN or values outside [0, 1].
        """
        both = torch.stack([inserted, deleted], dim=1).double()
        if both.shape[2] != self.steps + 1:
            raise CalmError(f"curves have {both.shape[2]} points, {self.steps} steps have {self.steps + 1}")
        if not bool(((both >= 0) & (both <= 1 + 1e-4)).all()):
            raise CalmError("curves must be probabilities, in [0, 1]")
        drawn = weights(keys.to(both.device), self.replicates, self.seed)
        self.curves += (drawn @ both.flatten(1)).view_as(self.curves)
        self.images += drawn.sum(dim=1)

    def compute(self) -> InsertionDeletionResult:
        """The mean curves and their areas.

        Raises:
            CalmError: no image.
        """
        if not self.images[0]:
            raise CalmError("no image was classified: the split is empty")
        mean = self.curves / self.images[:, None, None]
        areas = torch.trapezoid(mean, dx=1 / self.steps, dim=2)
        insertion, deletion = (
            tuple(estimate(point) for point in curve.unbind(1)) for curve in mean.unbind(1)
        )
        return InsertionDeletionResult(
            fractions=tuple(step / self.steps for step in range(self.steps + 1)),
            insertion=insertion,
            deletion=deletion,
            insertion_area=estimate(areas[:, 0]),
            deletion_area=estimate(areas[:, 1]),
        )
