"""Insertion and deletion over a split: how fast the class comes and goes with the pixels a map calls evidence."""

from __future__ import annotations

import torch
from torch import Tensor

from calm.choices import Explain
from calm.data.records import Split
from calm.evaluate.processes import gathered
from calm.evaluate.ranked_pixels import check_names, ranked
from calm.evaluate.reading import Progress, by_id, looks
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import Subject
from calm.metrics.bootstrap import REPLICATES
from calm.metrics.erasing import Fill, filling
from calm.metrics.insertion_deletion import InsertionDeletion, insertion_deletion_curves

__all__ = ["insertion_deletion"]


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
    the way, a batch at a time. Maps and ties are dealt with as in `calm.evaluate.remove_and_classify`.

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
