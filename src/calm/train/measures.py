"""What is measured while training: classification, and the state of the explanation. All of it stays on the device
until an epoch ends, and is summed over processes then."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from calm.output import CalmOutput, CamOutput

__all__ = ["ClassificationMeasures", "ExplanationMeasures", "TrainingMeasures"]

CALIBRATION_BINS = 15


def _mean() -> MeanMetric:
    # The default looks for NaN in every update, which waits for the device; the guard does that in its own time.
    return MeanMetric(nan_strategy="disable")


def _accuracy(classes: int, top_k: int = 1) -> MulticlassAccuracy:
    return MulticlassAccuracy(classes, top_k=top_k, average="micro", validate_args=False)


def _nll(output: CalmOutput | CamOutput, targets: Tensor) -> Tensor:
    return -output.log_probs.gather(1, targets[:, None]).squeeze(1)


def _collect(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """Values over all batches and processes since the last call; the metrics start anew."""
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    for metric in metrics.values():
        metric.reset()
    return values


class ExplanationMeasures(nn.Module):
    """Where a CALM model looks: how spread its prior and the target's posterior are, and how many priors are dead.

    `compute` gives ``prior_entropy`` and ``posterior_entropy`` (nats, from 0: one location, to log N: uniform), the
    same divided by log N with ``_relative`` appended, and ``dead_prior``, the share of images whose location scores
    are all off. A CAM model has none of them: the result is empty.
    """

    def __init__(self) -> None:
        super().__init__()
        self.prior_entropy, self.posterior_entropy, self.dead_prior = _mean(), _mean(), _mean()
        self.locations = 0

    @torch.no_grad()
    def update(self, output: CalmOutput | CamOutput, targets: Tensor) -> None:
        """Add a batch; ``targets`` are indices (B,)."""
        if not isinstance(output, CalmOutput):
            return
        log_prior = output.log_prior.flatten(1)
        posterior = output.target_rows(targets).flatten(1).softmax(dim=1)
        self.locations = log_prior.shape[1]
        self.prior_entropy.update(torch.special.entr(log_prior.exp()).sum(dim=1))
        self.posterior_entropy.update(torch.special.entr(posterior).sum(dim=1))
        self.dead_prior.update(output.dead.float())

    def compute(self) -> dict[str, float]:
        """The means since the last call, and start anew."""
        if not self.locations:
            return {}
        uniform = math.log(self.locations) or 1.0
        values: dict[str, float] = {}
        for name, metric in (
            ("prior_entropy", self.prior_entropy),
            ("posterior_entropy", self.posterior_entropy),
        ):
            values |= _collect({name: metric})
            values[f"{name}_relative"] = values[name] / uniform
        return values | _collect({"dead_prior": self.dead_prior})


class TrainingMeasures(nn.Module):
    """Loss of every batch; accuracy and the explanation of some, on the augmented images as they are trained on.

    Args:
        classes: C.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.loss, self.nll = _mean(), _mean()
        self.accuracy = _accuracy(classes)
        self.explanation = ExplanationMeasures()

    def add_loss(self, loss: Tensor, images: int) -> None:
        """Add the mean loss of a batch."""
        # Not by the weight argument: torchmetrics 1.9 ignores it where it does not look for NaN.
        self.loss.update(loss.detach().expand(images))

    @torch.no_grad()
    def add_output(self, output: CalmOutput | CamOutput, targets: Tensor) -> None:
        """Add the predictions and the explanation of a batch; soft targets count as their largest class."""
        labels = targets if targets.ndim == 1 else targets.argmax(dim=1)
        self.accuracy.update(output.log_probs, labels)
        self.nll.update(_nll(output, labels))
        self.explanation.update(output, labels)

    def compute(self) -> dict[str, float]:
        """``train_loss``, ``train_accuracy`` (0 to 1), ``train_nll`` and the explanation; start anew.

        The EM loss is the negative log-likelihood plus the entropy of q: only ``train_nll`` compares over methods.
        """
        metrics = {"train_loss": self.loss, "train_accuracy": self.accuracy, "train_nll": self.nll}
        return {**_collect(metrics), **self.explanation.compute()}


class ClassificationMeasures(nn.Module):
    """Accuracy, top-5 accuracy, negative log-likelihood (nats) and expected calibration error (15 bins).

    Args:
        classes: C; top-5 is left out below 6.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.accuracy = _accuracy(classes)
        self.top5 = _accuracy(classes, top_k=5) if classes > 5 else None
        self.nll = _mean()
        self.ece = MulticlassCalibrationError(classes, n_bins=CALIBRATION_BINS, validate_args=False)

    @torch.no_grad()
    def update(self, output: CalmOutput | CamOutput, targets: Tensor) -> None:
        """Add a batch; ``targets`` are indices (B,)."""
        log_probs = output.log_probs
        self.accuracy.update(log_probs, targets)
        if self.top5 is not None:
            self.top5.update(log_probs, targets)
        self.nll.update(_nll(output, targets))
        # Rounding may leave a probability a hair above 1, which torchmetrics would take for a logit.
        self.ece.update(log_probs.exp().clamp(0, 1), targets)

    def compute(self) -> dict[str, float]:
        """``accuracy``, ``top5`` (both 0 to 1), ``nll``, ``ece``; start anew."""
        top5 = {} if self.top5 is None else {"top5": self.top5}
        return _collect({"accuracy": self.accuracy, **top5, "nll": self.nll, "ece": self.ece})
