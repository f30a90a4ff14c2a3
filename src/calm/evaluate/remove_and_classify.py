"""Remove-and-classify over a split, and on request the insertion and deletion curves of the same maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm.data.records import Split
from calm.errors import CalmError, unknown
from calm.evaluate.reading import Progress, batches
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import Subject
from calm.metrics.bootstrap import REPLICATES, Estimate
from calm.metrics.erasing import Fill, erase, erasing_order, filling, first_pixels, random_order
from calm.metrics.insertion_deletion import InsertionDeletion, insertion_deletion_curves
from calm.metrics.remove_and_classify import (
    FRACTIONS,
    RemoveAndClassify,
    RemoveAndClassifyResult,
    check_fractions,
)
from calm.normalize import Normalization, normalize
from calm.resample import resize_maps

__all__ = ["Explain", "after_erasing", "maps_to_rank", "remove_and_classify"]

Explain: TypeAlias = Literal["label", "prediction"]
_Classify: TypeAlias = Callable[[Tensor], Tensor]


@torch.no_grad()
def remove_and_classify(
    subject: Subject,
    split: Split,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    fractions: Sequence[float] = FRACTIONS,
    fill: Fill = "zero",
    explain: Explain = "label",
    insertion_deletion_steps: int = 0,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Result:
    """Erase the highest-scored pixels, classify again, and compare with erasing as many random ones.

    The map and the prediction on the whole image come from one forward pass; two more per fraction classify the
    erased images, a batch at a time. Maps are resized to the model's input, then normalised as the subject says.
    The random pixels of an image depend on ``seed`` and its place in the split alone, and those of a small fraction
    are among those of a larger one. Pixels of equal score go in the same random order (`calm.metrics.erasing`).

    Args:
        subject: classifier and map.
        split: the images; right means that the prediction is the label.
        batch_size: images in a forward pass.
        workers: processes that read images.
        progress: see `calm.evaluate.reading`.
        fractions: shares of pixels erased.
        fill: what erased pixels become, see `calm.metrics.erasing.FILLS`.
        explain: map of the ``label`` (the paper's) or of the ``prediction``.
        insertion_deletion_steps: S > 0 also measures the curves of `calm.metrics.insertion_deletion` for the
            explained class, insertion into the blurred image and deletion to ``fill``, at 2 S passes more.
        seed: of random pixels, noise and bootstrap.
        replicates: bootstrap samples of images.

    Returns:
        Figures ``r10``, ... (R_k), ``r_area``, ``top1``, and on request ``insertion`` and ``deletion`` (areas);
        curves of R_k and of both accuracies. An image's score is how much lower the label's probability is without
        the highest-scored pixels than without random ones, averaged over the fractions.

    Raises:
        CalmError: an impossible option; a label that the classifier has no class for; unreadable images.
    """
    shares = check_fractions(fractions)
    if explain not in get_args(Explain):
        raise unknown("class to explain", explain, get_args(Explain))
    if insertion_deletion_steps < 0:
        raise CalmError(
            f"insertion_deletion_steps is {insertion_deletion_steps}: give 0 (not measured) or more"
        )
    filling(
        torch.zeros(1, 3, 1, 1), fill, keys=torch.zeros(1, dtype=torch.int64)
    )  # refuse its name before work
    metric = RemoveAndClassify(shares, replicates=replicates, seed=seed).to(subject.device)
    curves = InsertionDeletion(max(1, insertion_deletion_steps), replicates=replicates, seed=seed)
    curves = curves.to(subject.device)
    scores: dict[str, float] = {}
    silent = torch.zeros((), dtype=torch.int64, device=subject.device)

    def classify(images: Tensor) -> Tensor:
        return subject.look(images).probs

    for images, labels, indices in batches(
        split,
        subject.preprocessing,
        subject.device,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
    ):
        keys, labels = indices.to(subject.device), labels.to(subject.device)
        looked = subject.look(images)
        probs = looked.probs
        if int(labels.max()) >= probs.shape[1]:
            raise CalmError(
                f"a label is {int(labels.max())}, {subject.label} has classes 0 to {probs.shape[1] - 1}: the data set"
                " is not the one it was trained for"
            )
        predicted = probs.argmax(dim=1)
        explained = labels if explain == "label" else predicted
        grid = looked.maps(explained[:, None])[:, 0]
        maps = maps_to_rank(grid, (images.shape[-2], images.shape[-1]), subject.normalization)
        silent += (~maps.flatten(1).any(dim=1)).sum()
        random = random_order(keys, images.shape[-2] * images.shape[-1], seed)
        order = erasing_order(maps, random)
        filler = filling(images, fill, keys=keys, seed=seed)
        right_topk, chance_topk = after_erasing(classify, images, order, filler, labels, shares)
        right_random, chance_random = after_erasing(classify, images, random, filler, labels, shares)
        metric.update(right_topk, right_random, predicted == labels, keys)
        gained = (chance_random - chance_topk).mean(dim=1).tolist()
        scores |= {split.records[i].id: score for i, score in zip(indices.tolist(), gained, strict=True)}
        if insertion_deletion_steps:
            inserted, deleted = insertion_deletion_curves(
                classify,
                images,
                order,
                explained,
                inserted_into=filling(images, "blur", keys=keys),
                deleted_to=filler,
                whole=probs,
                steps=insertion_deletion_steps,
            )
            curves.update(inserted, deleted, keys)
    found = metric.compute()
    options = {
        "fractions": list(shares),
        "fill": fill,
        "explain": explain,
        "insertion_deletion_steps": insertion_deletion_steps,
        "seed": seed,
        "replicates": replicates,
    }
    result = Result(
        "remove-and-classify",
        subject.label,
        figures={
            **{f"r{round(100 * share)}": ratio for share, ratio in zip(shares, found.ratio, strict=True)},
            "r_area": found.ratio_area,
            "top1": found.accuracy,
        },
        curves=_curves(found),
        scores=scores,
        details={
            "topk_area": list(_three(found.topk_area)),
            "random_area": list(_three(found.random_area)),
            "constant_maps": int(silent),
            "images": len(scores),
            "options": options,
        },
    )
    if insertion_deletion_steps:
        areas = curves.compute()
        result.figures.update(insertion=areas.insertion_area, deletion=areas.deletion_area)
        for name, points in (("insertion", areas.insertion), ("deletion", areas.deletion)):
            result.curves[name] = _curve(areas.fractions, points, f"p(y | x) after {name}")
    return result


def maps_to_rank(
    maps: Float[Tensor, "b h w"], size: tuple[int, int], how: Normalization
) -> Float[Tensor, "b H W"]:
    """Maps at the size of the images, normalised.

    A map that is constant on its own grid becomes zeros, as a constant map does in `calm.normalize`: interpolation
    would give it differences in the last bit, and an order that means nothing.
    """
    constant = (maps == maps[:, :1, :1]).flatten(1).all(dim=1)
    return normalize(resize_maps(maps, size), how).masked_fill(constant[:, None, None], 0.0)


def after_erasing(
    classify: _Classify,
    images: Float[Tensor, "b 3 H W"],
    order: Int[Tensor, "b n"],
    filler: Float[Tensor, "b 3 H W"],
    labels: Int[Tensor, " b"],
    fractions: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Classify images without the first pixels of an order: one forward pass of the batch per fraction.

    A fraction of n pixels is rounded to whole ones, half to even.

    Returns:
        Whether the prediction is the label, (B, K) bool; the label's probability, (B, K).
    """
    counts = [round(fraction * order.shape[1]) for fraction in fractions]
    right, chance = [], []
    for mask in first_pixels(order, counts):
        probs = classify(erase(images, mask, filler))
        right.append(probs.argmax(dim=1) == labels)
        chance.append(probs.gather(1, labels[:, None]).squeeze(1))
    return torch.stack(right, dim=1), torch.stack(chance, dim=1)


def _curves(found: RemoveAndClassifyResult) -> dict[str, Curve]:
    one = Estimate(1.0, 1.0, 1.0)
    at = (0.0, *found.fractions)
    return {
        "ratio": _curve(at, (one, *found.ratio), "R_k"),
        "topk": _curve(at, (found.accuracy, *found.topk), "accuracy"),
        "random": _curve(at, (found.accuracy, *found.random), "accuracy"),
    }


def _curve(x: Sequence[float], points: Sequence[Estimate], name: str) -> Curve:
    y, low, high = (list(column) for column in zip(*map(_three, points), strict=True))
    return Curve(list(x), y, low, high, x_name="share of pixels", y_name=name)


def _three(figure: Estimate) -> tuple[float, float, float]:
    return figure.value, figure.low, figure.high
