"""Classification over a split: accuracy, likelihood, calibration, and whether the map agrees with the prediction."""

from __future__ import annotations

import torch
from torch import Tensor

from calm.data.records import Split
from calm.evaluate.reading import Progress, by_id, gathered, looks
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import Looked, Subject
from calm.metrics.bootstrap import REPLICATES
from calm.metrics.classification import BINS, Classification

__all__ = ["agreement", "classification"]


@torch.no_grad()
def classification(
    subject: Subject,
    split: Split,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Result:
    """Is the prediction right, and is its probability worth its name?

    Args:
        subject: the classifier. Its maps are read only if they are CALM's joint: then the largest
            distance of a map's sum from the probability it explains is measured too.
        split: the images.
        batch_size: images in a forward pass.
        workers: processes that read images.
        progress: see `calm.evaluate.reading`.
        seed: of the bootstrap.
        replicates: bootstrap samples of images.

    Returns:
        Figures ``top1``, ``top5``, ``nll``, ``ece``; the curve ``reliability``, accuracy over confidence in 15 bins
        without the empty ones; in ``details`` ``agreement`` (see `agreement`; None for other maps). An image's
        score is the label's probability.

    Raises:
        CalmError: a label that the classifier has no class for; unreadable images.
    """
    metric = Classification(replicates=replicates, seed=seed).to(subject.device)
    has_joint = subject.about.get("method") == "joint"
    worst = torch.zeros((), dtype=torch.float64, device=subject.device)
    scores: dict[int, float] = {}
    for _, labels, keys, looked in looks(
        subject, split, batch_size=batch_size, workers=workers, progress=progress
    ):
        probs = looked.probs
        metric.update(probs, labels, keys)
        if has_joint:
            asked = torch.cat([labels[:, None], probs.topk(min(5, probs.shape[1]), dim=1).indices], dim=1)
            worst = torch.maximum(worst, agreement(looked, probs, asked))
        chance = probs.gather(1, labels[:, None]).squeeze(1)
        scores |= dict(zip(keys.tolist(), chance.tolist(), strict=True))
    named, worst_of_all = by_id(split, scores), max(gathered(float(worst)))
    found = metric.cpu().compute()
    filled = found.bins[found.bins[:, 0] > 0]
    return Result(
        "classification",
        subject.label,
        figures={"top1": found.top1, "top5": found.top5, "nll": found.nll, "ece": found.ece},
        curves={
            "reliability": Curve(
                filled[:, 1].tolist(), filled[:, 2].tolist(), x_name="confidence", y_name="accuracy"
            )
        },
        scores=named,
        details={
            "agreement": worst_of_all if has_joint else None,
            "bins": BINS,
            "bin_shares": found.bins[:, 0].tolist(),
            "images": len(named),
            "options": {"seed": seed, "replicates": replicates},
        },
    )


def agreement(looked: Looked, probs: Tensor, classes: Tensor) -> Tensor:
    """The largest distance, over images and classes (B, K), between the sum of the map and p(y | x): (), float64.

    For CALM's joint this is rounding error: the map is the prediction, spread over the locations.
    """
    sums = looked.maps(classes).double().sum(dim=(-2, -1))
    return (sums - probs.double().gather(1, classes)).abs().max()
