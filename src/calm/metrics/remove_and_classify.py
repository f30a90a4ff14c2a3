"""Remove-and-classify: does the classifier lose what the map calls evidence?"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torchmetrics import Metric

from calm.errors import CalmError
from calm.metrics.bootstrap import REPLICATES, Estimate, estimate, weights

__all__ = ["FRACTIONS", "RemoveAndClassify", "RemoveAndClassifyResult", "check_fractions"]

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""The paper's shares of erased pixels."""


class RemoveAndClassifyResult(NamedTuple):
    """Figures by share of erased pixels, in the order of ``fractions``.

    Attributes:
        fractions: shares of the pixels, in (0, 1].
        ratio: R_k, images that are still right without their highest-scored pixels over images that are still
            right without as many random ones. NaN where no image is right without random ones.
        topk: accuracy without the highest-scored pixels, in [0, 1].
        random: accuracy without random pixels, in [0, 1].
        accuracy: with all pixels.
        ratio_area: mean height of the curve of R_k from 0 (where it is 1) to the largest fraction.
        topk_area: mean height of the curve ``topk`` from 0 (``accuracy``) to the largest fraction.
        random_area: the same for ``random``.
    """

    fractions: tuple[float, ...]
    ratio: tuple[Estimate, ...]
    topk: tuple[Estimate, ...]
    random: tuple[Estimate, ...]
    accuracy: Estimate
    ratio_area: Estimate
    topk_area: Estimate
    random_area: Estimate


class RemoveAndClassify(Metric):
    """R_k of the paper: accuracy without the k percent highest-scored pixels, over that without k percent random ones.

    Lower is better: 1 says that the map picks pixels no better than chance. Compare methods for one classifier, or
    classifiers of similar accuracy. Erased images are unlike any image the classifier learnt from, and the
    highest-scored pixels form blobs where random ones are salt and pepper: the ratio mixes relevance with that.

    Args:
        fractions: shares of pixels erased, ascending.
        replicates: bootstrap samples of images, for the intervals.
        seed: of the bootstrap.

    Source: paper, section 5.3 (remove-and-classify).
    """

    higher_is_better = False
    full_state_update = False
    right_topk: Tensor
    right_random: Tensor
    right: Tensor
    images: Tensor

    def __init__(
        self, fractions: Sequence[float] = FRACTIONS, *, replicates: int = REPLICATES, seed: int = 0
    ) -> None:
        super().__init__()
        self.fractions = check_fractions(fractions)
        self.replicates, self.seed = replicates, seed
        for name, shape in (
            ("right_topk", (replicates + 1, len(self.fractions))),
            ("right_random", (replicates + 1, len(self.fractions))),
            ("right", (replicates + 1,)),
            ("images", (replicates + 1,)),
        ):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        correct_topk: Bool[Tensor, "b k"],
        correct_random: Bool[Tensor, "b k"],
        correct: Bool[Tensor, " b"],
        keys: Int[Tensor, " b"],
    ) -> None:
        """Add a batch.

        Args:
            correct_topk: whether each image is classified right without its highest-scored pixels, by fraction.
            correct_random: the same without random pixels.
            correct: the same with all pixels.
            keys: the index of each image in its data set.

        Raises:
            CalmError: not one column per fraction.
        """
        wanted = (len(keys), len(self.fractions))
        for name, values in (("correct_topk", correct_topk), ("correct_random", correct_random)):
            if values.shape != wanted:
                raise CalmError(
                    f"{name} has shape {tuple(values.shape)}, needed is {wanted}: (images, fractions)"
                )
        drawn = weights(keys.to(correct.device), self.replicates, self.seed)
        self.right_topk += drawn @ correct_topk.double()
        self.right_random += drawn @ correct_random.double()
        self.right += drawn @ correct.double()
        self.images += drawn.sum(dim=1)

    def compute(self) -> RemoveAndClassifyResult:
        """The figures with their intervals.

        Raises:
            CalmError: no image.
        """
        if not self.images[0]:
            raise CalmError("no image was classified: the split is empty")
        undefined = torch.full_like(self.right_random, torch.nan)
        ratio = torch.where(self.right_random > 0, self.right_topk / self.right_random, undefined)
        whole = self.right / self.images
        topk, random = self.right_topk / self.images[:, None], self.right_random / self.images[:, None]
        ones = torch.ones_like(whole)

        def columns(values: Tensor) -> tuple[Estimate, ...]:
            return tuple(estimate(column) for column in values.unbind(1))

        return RemoveAndClassifyResult(
            fractions=self.fractions,
            ratio=columns(ratio),
            topk=columns(topk),
            random=columns(random),
            accuracy=estimate(whole),
            ratio_area=estimate(self._height(ones, ratio)),
            topk_area=estimate(self._height(whole, topk)),
            random_area=estimate(self._height(whole, random)),
        )

    def _height(self, start: Float[Tensor, " r"], curve: Float[Tensor, "r k"]) -> Float[Tensor, " r"]:
        """Mean height of a curve that starts at fraction 0 (trapezoids)."""
        at = torch.tensor((0.0, *self.fractions), dtype=torch.float64, device=curve.device)
        return torch.trapezoid(torch.cat([start[:, None], curve], dim=1), at, dim=1) / at[-1]


def check_fractions(fractions: Sequence[float]) -> tuple[float, ...]:
    """The fractions as a tuple.

    Raises:
        CalmError: none, one outside (0, 1], or not ascending.
    """
    given = tuple(float(fraction) for fraction in fractions)
    ascending = all(a < b for a, b in itertools.pairwise(given))
    if not given or not ascending or not (given[0] > 0 and given[-1] <= 1):
        raise CalmError(f"fractions are {given}: give ascending shares of the pixels, above 0 and at most 1")
    return given
