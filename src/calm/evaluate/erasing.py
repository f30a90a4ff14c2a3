"""Remove-and-classify, and insertion and deletion, over a split: erase pixels by their scores, and classify again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Unpack, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.config import DRAWS, FRACTIONS, Explain, Fill
from calm.data.records import Split
from calm.errors import CalmError, unknown
from calm.evaluate.distributed import all_gather
from calm.evaluate.reading import Batch, Reading, predictions, scores_by_id
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import Subject
from calm.heatmaps import resize_and_normalize
from calm.inference import mix_seed
from calm.metrics.bootstrap import REPLICATES, Estimate
from calm.metrics.erasing import (
    InsertionDeletion,
    RemoveAndClassify,
    check_fractions,
    erase,
    erasing_order,
    filling,
    first_pixels,
    insertion_deletion_curves,
    random_order,
)


class RankedBatch(NamedTuple):
    """A batch with the order in which its pixels are erased."""

    batch: Batch
    explained: Int[Tensor, " b"]  # the classes whose maps rank the pixels
    order: Int[Tensor, "b n"]  # of the pixels by the map; those with larger numbers are erased first
    random: Int[Tensor, "b n"]  # the same at random
    filler: Float[Tensor, "b channels H W"]  # what erased pixels become
    constant: Bool[Tensor, " b"]  # whether each map is constant, so that its order is the random one


def ranked_batches(
    subject: Subject, split: Split, explain: Explain, fill: Fill, seed: int, **reading: Unpack[Reading]
) -> Iterator[RankedBatch]:
    """Rank the pixels of each batch by the maps of its labels (as the paper does) or of its most probable classes.

    Maps are resized to the model's input, then normalised as the subject says. The random order of an image depends
    only on ``seed`` and its position in the split; it also decides between pixels of equal score.

    Raises:
        CalmError: an unknown name; see `predictions`.
    """
    if explain not in get_args(Explain):
        raise unknown("class to explain", explain, get_args(Explain))
    if fill not in get_args(Fill):
        raise unknown("fill", fill, get_args(Fill))
    for batch in predictions(subject, split, **reading):
        images, labels, keys, prediction = batch
        explained = labels if explain == "label" else prediction.probs.argmax(dim=1)
        size = (images.shape[-2], images.shape[-1])
        maps = resize_and_normalize(prediction.maps(explained[:, None])[:, 0], size, subject.normalization)
        random = random_order(keys, size[0] * size[1], seed)
        order = erasing_order(maps, random)
        filler = filling(images, fill, keys=keys, seed=seed)
        yield RankedBatch(batch, explained, order, random, filler, ~maps.flatten(1).any(dim=1))


@torch.no_grad()
def remove_and_classify(
    subject: Subject,
    split: Split,
    *,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = DRAWS,
    fill: Fill = "zero",
    explain: Explain = "label",
    seed: int = 0,
    replicates: int = REPLICATES,
    **reading: Unpack[Reading],
) -> Result:
    """Erase the highest-scored pixels, classify again, and compare with erasing as many random ones.

    The map and the prediction of the whole image come from one forward pass; each fraction takes one more without the
    highest-scored pixels, and one for every draw of random pixels. The random pixels of an image depend only on
    ``seed``, the draw and its position in the split, and those of a small fraction are among those of a larger one.

    Args:
        subject: classifier and map.
        split: the images; right means that the prediction is the label.
        fractions: shares of pixels erased.
        draws: random erasures of each image, averaged; 1 + K (1 + draws) forward passes for K fractions, and 1 + K for
            the model's other maps where the subject has a cache.
        fill: what erased pixels become, see `calm.metrics.erasing.FILLS`.
        explain: map of the ``label`` (as the paper does) or of the ``prediction``.
        seed: of random pixels, noise and bootstrap.
        replicates: bootstrap samples of images with their draws.
        reading: see `calm.evaluate.reading.Reading`.

    Returns:
        Figures ``r10``, ... (R_k by percent), ``r_area`` and ``top1``; curves of R_k and of both accuracies. An
        image's score is how much lower the label's probability is without the highest-scored pixels than without
        random ones, mean over fractions and draws.

    Raises:
        CalmError: an impossible option; a label that the classifier has no class for; unreadable images.
    """
    shares = check_fractions(fractions)
    if draws < 1:
        raise CalmError(f"draws is {draws}: give 1 or more")
    metric = RemoveAndClassify(shares, replicates=replicates, seed=seed).to(subject.device)
    scores: dict[int, float] = {}
    constant = 0
    cache = {} if subject.cache is None else subject.cache

    def classify(images: Tensor) -> Tensor:
        return subject.predict(images).probs

    for ranked in ranked_batches(subject, split, explain, fill, seed, **reading):
        images, labels, keys, prediction = ranked.batch
        constant += int(ranked.constant.sum())
        right_topk, probs_topk = after_erasing(classify, images, ranked.order, ranked.filler, labels, shares)
        batch = (tuple(keys.tolist()), shares, draws, fill, seed)  # on which the random erasures depend
        if batch not in cache:
            right, probs = torch.zeros(2, *right_topk.shape, dtype=torch.float64, device=images.device)
            for draw in range(draws):
                order = random_order(keys, ranked.random.shape[1], draw_seed(seed, draw)) if draw else ranked.random
                of_draw = after_erasing(classify, images, order, ranked.filler, labels, shares)
                right, probs = right + of_draw[0], probs + of_draw[1]
            cache[batch] = right / draws, probs / draws
        right_random, probs_random = cache[batch]
        # A constant map erases random pixels: its figures are those of all draws, not of the first alone.
        right_topk = right_topk.double().where(~ranked.constant[:, None], right_random)
        probs_topk = probs_topk.double().where(~ranked.constant[:, None], probs_random)
        metric.update(right_topk, right_random, prediction.probs.argmax(dim=1) == labels, keys)
        lost = (probs_random - probs_topk).mean(dim=1)
        scores |= dict(zip(keys.tolist(), lost.tolist(), strict=True))
    scores_of_all, constant = scores_by_id(split, scores), sum(all_gather(constant))
    result = metric.cpu().compute()
    at = (0.0, *shares)
    figures = {f"r{100 * share:g}": ratio for share, ratio in zip(shares, result.ratio, strict=True)}
    return Result(
        "remove-and-classify",
        subject.label,
        figures={**figures, "r_area": result.ratio_area, "top1": result.accuracy},
        curves={
            "ratio": Curve.of(at, (Estimate(1.0, 1.0, 1.0), *result.ratio), "share of pixels", "R_k"),
            "topk": Curve.of(at, (result.accuracy, *result.topk), "share of pixels", "accuracy"),
            "random": Curve.of(at, (result.accuracy, *result.random), "share of pixels", "accuracy"),
        },
        scores=scores_of_all,
        details={
            "topk_area": list(result.topk_area),
            "random_area": list(result.random_area),
            "constant_maps": constant,
            "images": len(scores_of_all),
        },
    )


def draw_seed(seed: int, draw: int) -> int:
    """Return the seed of a draw of random pixels. That of the first draw also decides between equal scores."""
    return mix_seed(seed, draw) if draw else seed


def after_erasing(
    classify: Callable[[Tensor], Tensor],
    images: Float[Tensor, "b channels H W"],
    order: Int[Tensor, "b n"],
    filler: Float[Tensor, "b channels H W"],
    labels: Int[Tensor, " b"],
    fractions: Sequence[float],
) -> tuple[Bool[Tensor, "b k"], Float[Tensor, "b k"]]:
    """Classify images without the first pixels of an order: one forward pass of the batch per fraction.

    A fraction of n pixels is rounded to whole ones, half to even.

    Returns:
        Whether the prediction is the label; the label's probability.
    """
    counts = [round(fraction * order.shape[1]) for fraction in fractions]
    right, of_label = [], []
    for mask in first_pixels(order, counts):
        probs = classify(erase(images, mask, filler))
        right.append(probs.argmax(dim=1) == labels)
        of_label.append(probs.gather(1, labels[:, None]).squeeze(1))
    return torch.stack(right, dim=1), torch.stack(of_label, dim=1)


@torch.no_grad()
def insertion_deletion(
    subject: Subject,
    split: Split,
    *,
    points: int = 20,
    fill: Fill = "zero",
    explain: Explain = "label",
    seed: int = 0,
    replicates: int = REPLICATES,
    **reading: Unpack[Reading],
) -> Result:
    """Insert pixels into the blurred image, and delete them from the whole one, highest score first.

    The map and the prediction of the whole image come from one forward pass; 2 ``points`` more classify the
    intermediate images. Maps and equal scores are treated as in `remove_and_classify`.

    Args:
        subject: classifier and map.
        split: the images.
        points: steps from no pixel to all.
        fill: what deleted pixels become, see `calm.metrics.erasing.FILLS`.
        explain: map and probability of the ``label`` or of the ``prediction``.
        seed: of the order of equal scores, of noise and of the bootstrap.
        replicates: bootstrap samples of images.
        reading: see `calm.evaluate.reading.Reading`.

    Returns:
        Figures ``insertion`` and ``deletion``, the areas under the curves of the same names: the probability of the
        explained class, mean over images, by the share of pixels. An image's score is its own area of insertion less
        that of deletion.

    Raises:
        CalmError: an impossible option; a label that the classifier has no class for; unreadable images.

    Source: Petsiuk, Das, Saenko, RISE, 2018, section 4.2.
    """
    metric = InsertionDeletion(points, replicates=replicates, seed=seed).to(subject.device)
    scores: dict[int, float] = {}
    constant = 0
    for ranked in ranked_batches(subject, split, explain, fill, seed, **reading):
        images, _, keys, prediction = ranked.batch
        constant += int(ranked.constant.sum())
        inserted, deleted = insertion_deletion_curves(
            lambda erased: subject.predict(erased).probs,
            images,
            ranked.order,
            ranked.explained,
            inserted_into=filling(images, "blur", keys=keys),
            deleted_to=ranked.filler,
            whole=prediction.probs,
            steps=points,
        )
        metric.update(inserted, deleted, keys)
        gained = torch.trapezoid(inserted.double() - deleted.double(), dx=1 / points, dim=1)
        scores |= dict(zip(keys.tolist(), gained.tolist(), strict=True))
    scores_of_all, constant = scores_by_id(split, scores), sum(all_gather(constant))
    result = metric.cpu().compute()
    return Result(
        "insertion-deletion",
        subject.label,
        figures={"insertion": result.insertion_area, "deletion": result.deletion_area},
        curves={
            name: Curve.of(result.fractions, curve, "share of pixels", f"p(y | x) after {name}")
            for name, curve in (("insertion", result.insertion), ("deletion", result.deletion))
        },
        scores=scores_of_all,
        details={"constant_maps": constant, "images": len(scores_of_all)},
    )
