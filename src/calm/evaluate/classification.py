"""Classification over a split: accuracy, likelihood, calibration, and whether joint maps sum to the prediction."""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from calm.data.records import Split
from calm.evaluate.distributed import all_gather
from calm.evaluate.reading import Reading, predictions, scores_by_id
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import Prediction, Subject
from calm.metrics.bootstrap import REPLICATES
from calm.metrics.classification import Classification


@torch.no_grad()
def classification(
    subject: Subject, split: Split, *, seed: int = 0, replicates: int = REPLICATES, **reading: Unpack[Reading]
) -> Result:
    """Measure how often the prediction is right, and how well its probability is calibrated.

    Args:
        subject: the classifier. Its maps are used only if they are CALM's joint: then the largest difference between
            the sum of a map and the probability that it explains is measured too.
        split: the images.
        seed: of the bootstrap.
        replicates: bootstrap samples of images.
        reading: see `calm.evaluate.reading.Reading`.

    Returns:
        Figures ``top1``, ``top5`` (with more than five classes), ``nll``, ``ece``; the curve ``reliability``, accuracy
        over confidence in 15 bins without the empty ones; in ``details`` ``agreement`` (see `agreement`; None for other
        maps). An image's score is the label's probability.

    Raises:
        CalmError: a label that the classifier has no class for; unreadable images.
    """
    metric = Classification(replicates=replicates, seed=seed).to(subject.device)
    has_joint = subject.about.get("method") == "joint"
    worst = torch.zeros((), dtype=torch.float64, device=subject.device)
    scores: dict[int, float] = {}
    num_classes = 0
    for _, labels, keys, prediction in predictions(subject, split, **reading):
        probs = prediction.probs
        num_classes = probs.shape[1]
        metric.update(probs, labels, keys)
        if has_joint:
            classes = torch.cat([labels[:, None], probs.topk(min(5, probs.shape[1]), dim=1).indices], dim=1)
            worst = torch.maximum(worst, agreement(prediction, classes))
        of_label = probs.gather(1, labels[:, None]).squeeze(1)
        scores |= dict(zip(keys.tolist(), of_label.tolist(), strict=True))
    scores_of_all, worst_of_all = scores_by_id(split, scores), max(all_gather(float(worst)))
    num_classes = max(all_gather(num_classes))
    result = metric.cpu().compute()
    figures = {"top1": result.top1, "top5": result.top5, "nll": result.nll, "ece": result.ece}
    if num_classes <= 5:
        del figures["top5"]  # it is 1
    filled = result.bins[result.bins[:, 0] > 0]
    reliability = Curve(filled[:, 1].tolist(), filled[:, 2].tolist(), x_name="confidence", y_name="accuracy")
    return Result(
        "classification",
        subject.label,
        figures=figures,
        curves={"reliability": reliability},
        scores=scores_of_all,
        details={
            "agreement": worst_of_all if has_joint else None,
            "bin_shares": result.bins[:, 0].tolist(),
            "images": len(scores_of_all),
        },
    )


def agreement(prediction: Prediction, classes: Tensor) -> Tensor:
    """Return the largest difference between the sum of a map and p(y | x), over images and classes (B, K): (), float64.

    For CALM's joint this is rounding error: the map is the prediction, spread over the locations.
    """
    sums = prediction.maps(classes).double().sum(dim=(-2, -1))
    return (sums - prediction.probs.double().gather(1, classes)).abs().max()
