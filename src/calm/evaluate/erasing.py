"""Insertion and deletion over a split: how fast the class comes and goes with the pixels a map calls evidence.

The pixels of a batch in the order in which a map, or chance, erases them.

Remove-and-classify over a split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm.config import Explain
from calm.data.records import Split
from calm.errors import unknown
from calm.evaluate.reading import Progress, Seen, by_id, gathered, looks
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import Subject
from calm.heatmaps import Normalization, resize_and_normalize
from calm.metrics.bootstrap import REPLICATES, Estimate
from calm.metrics.erasing import (
    FRACTIONS,
    Fill,
    InsertionDeletion,
    RemoveAndClassify,
    RemoveAndClassifyResult,
    check_fractions,
    erase,
    erasing_order,
    filling,
    first_pixels,
    insertion_deletion_curves,
    random_order,
)

__all__ = ["Ranked", "after_erasing", "check_names", "insertion_deletion", "ranked", "remove_and_classify"]


class Ranked(NamedTuple):
    """A batch that is ready to be erased.

    Attributes:
        explained: the classes whose maps rank the pixels.
        order: places of the pixels by the map, larger numbers are erased first.
        random: the same by chance.
        filler: what erased pixels become.
        constant: number of maps that say nothing; their order is the random one.
    """

    explained: Int[Tensor, " b"]
    order: Int[Tensor, "b n"]
    random: Int[Tensor, "b n"]
    filler: Float[Tensor, "b 3 H W"]
    constant: int


def ranked(seen: Seen, how: Normalization, *, explain: Explain, fill: Fill, seed: int) -> Ranked:
    """Rank the pixels of a batch by the maps of its labels (the paper's) or of its most probable classes.

    The random order of an image depends on ``seed`` and its place in the split alone, and decides between pixels of
    equal score (`calm.metrics.erasing`).
    """
    explained = seen.labels if explain == "label" else seen.looked.probs.argmax(dim=1)
    size = (seen.images.shape[-2], seen.images.shape[-1])
    maps = resize_and_normalize(seen.looked.maps(explained[:, None])[:, 0], size, how)
    random = random_order(seen.keys, size[0] * size[1], seed)
    return Ranked(
        explained,
        erasing_order(maps, random),
        random,
        filling(seen.images, fill, keys=seen.keys, seed=seed),
        int((~maps.flatten(1).any(dim=1)).sum()),
    )


def check_names(explain: str, fill: str) -> None:
    """Refuse unknown names before any work.

    Raises:
        CalmError: neither label nor prediction; no such fill.
    """
    if explain not in get_args(Explain):
        raise unknown("class to explain", explain, get_args(Explain))
    if fill not in get_args(Fill):
        raise unknown("fill", fill, get_args(Fill))


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
        seed: of random pixels, noise and bootstrap.
        replicates: bootstrap samples of images.

    Returns:
        Figures ``r10``, ... (R_k by percent), ``r_area`` and ``top1``; curves of R_k and of both accuracies. An
        image's score is how much lower the label's probability is without the highest-scored pixels than without
        random ones, averaged over the fractions.

    Raises:
        CalmError: an impossible option; a label that the classifier has no class for; unreadable images.
    """
    shares = check_fractions(fractions)
    check_names(explain, fill)
    metric = RemoveAndClassify(shares, replicates=replicates, seed=seed).to(subject.device)
    scores: dict[int, float] = {}
    constant = 0

    def classify(images: Tensor) -> Tensor:
        return subject.look(images).probs

    for seen in looks(subject, split, batch_size=batch_size, workers=workers, progress=progress):
        images, labels, keys, looked = seen
        ranks = ranked(seen, subject.normalization, explain=explain, fill=fill, seed=seed)
        constant += ranks.constant
        right_topk, chance_topk = after_erasing(classify, images, ranks.order, ranks.filler, labels, shares)
        right_random, chance_random = after_erasing(
            classify, images, ranks.random, ranks.filler, labels, shares
        )
        metric.update(right_topk, right_random, looked.probs.argmax(dim=1) == labels, keys)
        gained = (chance_random - chance_topk).mean(dim=1)
        scores |= dict(zip(keys.tolist(), gained.tolist(), strict=True))
    named, constant = by_id(split, scores), sum(gathered(constant))
    found = metric.cpu().compute()
    return Result(
        "remove-and-classify",
        subject.label,
        figures={
            **{f"r{100 * share:g}": ratio for share, ratio in zip(shares, found.ratio, strict=True)},
            "r_area": found.ratio_area,
            "top1": found.accuracy,
        },
        curves=_curves(found),
        scores=named,
        details={
            "topk_area": list(found.topk_area),
            "random_area": list(found.random_area),
            "constant_maps": constant,
            "images": len(named),
            "options": {
                "fractions": list(shares),
                "fill": fill,
                "explain": explain,
                "seed": seed,
                "replicates": replicates,
            },
        },
    )


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
        "ratio": Curve.of(at, (one, *found.ratio), "share of pixels", "R_k"),
        "topk": Curve.of(at, (found.accuracy, *found.topk), "share of pixels", "accuracy"),
        "random": Curve.of(at, (found.accuracy, *found.random), "share of pixels", "accuracy"),
    }


@torch.no_grad()
def insertion_deletion(
    subject: Subject,
    split: Split,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    points: int = 20,
    fill: Fill = "zero",
    explain: Explain = "label",
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Result:
    """Put pixels into the blurred image, and take them out of the whole one, highest score first.

    The map and the prediction on the whole image come from one forward pass; 2 ``points`` more classify the images on
    the way, a batch at a time. Maps and ties are dealt with as in `calm.evaluate.erasing`.

    Args:
        subject: classifier and map.
        split: the images.
        batch_size: images in a forward pass.
        workers: processes that read images.
        progress: see `calm.evaluate.reading`.
        points: steps from no pixel to all.
        fill: what deleted pixels become, see `calm.metrics.erasing.FILLS`.
        explain: map and probability of the ``label`` or of the ``prediction``.
        seed: of the order of equal scores, of noise and of the bootstrap.
        replicates: bootstrap samples of images.

    Returns:
        Figures ``insertion`` and ``deletion``, the areas under the curves of the same names: the probability of the
        explained class, mean over images, by the share of pixels. An image's score is its own area of insertion less
        that of deletion.

    Raises:
        CalmError: an impossible option; a label that the classifier has no class for; unreadable images.

    Source: Petsiuk, Das, Saenko, RISE, 2018, section 4.2.
    """
    check_names(explain, fill)
    metric = InsertionDeletion(points, replicates=replicates, seed=seed).to(subject.device)
    scores: dict[int, float] = {}
    constant = 0

    def classify(images: Tensor) -> Tensor:
        return subject.look(images).probs

    for seen in looks(subject, split, batch_size=batch_size, workers=workers, progress=progress):
        ranks = ranked(seen, subject.normalization, explain=explain, fill=fill, seed=seed)
        constant += ranks.constant
        inserted, deleted = insertion_deletion_curves(
            classify,
            seen.images,
            ranks.order,
            ranks.explained,
            inserted_into=filling(seen.images, "blur", keys=seen.keys),
            deleted_to=ranks.filler,
            whole=seen.looked.probs,
            steps=points,
        )
        metric.update(inserted, deleted, seen.keys)
        gained = torch.trapezoid(inserted.double() - deleted.double(), dx=1 / points, dim=1)
        scores |= dict(zip(seen.keys.tolist(), gained.tolist(), strict=True))
    named, constant = by_id(split, scores), sum(gathered(constant))
    found = metric.cpu().compute()
    return Result(
        "insertion-deletion",
        subject.label,
        figures={"insertion": found.insertion_area, "deletion": found.deletion_area},
        curves={
            name: Curve.of(found.fractions, curve, "share of pixels", f"p(y | x) after {name}")
            for name, curve in (("insertion", found.insertion), ("deletion", found.deletion))
        },
        scores=named,
        details={
            "constant_maps": constant,
            "images": len(named),
            "options": {
                "points": points,
                "fill": fill,
                "explain": explain,
                "seed": seed,
                "replicates": replicates,
            },
        },
    )
