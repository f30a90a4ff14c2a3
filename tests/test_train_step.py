"""Measures against their definitions, computed by loops."""

from __future__ import annotations

import math

import pytest
import torch

from calm.output import CalmOutput, CamOutput
from calm.train.step import TrainingMeasures


def output_of(
    batch: int = 5, classes: int = 7, *, activation: str = "softplus", scale: float = 2.0
) -> CalmOutput:
    logits = scale * torch.randn(batch, classes, 3, 4)
    return CalmOutput(logits, torch.randn(batch, 1, 3, 4), activation)  # type: ignore[arg-type]


def entropy(probabilities: torch.Tensor) -> float:
    return -sum(p * math.log(p) for p in probabilities.flatten().tolist() if p > 0)


@pytest.mark.parametrize("activation", ["softplus", "relu", "exp"])
def test_entropies_are_those_of_prior_and_posterior(activation: str) -> None:
    first, second = output_of(activation=activation), output_of(3, activation=activation)
    targets = [torch.randint(7, (size,)) for size in (5, 3)]
    measures = TrainingMeasures()
    priors, posteriors = [], []
    for output, labels in zip((first, second), targets, strict=True):
        measures.update(torch.tensor(1.0), len(labels), output, labels)
        priors += [entropy(prior) for prior in output.prior]
        posteriors += [entropy(output.posterior[i, label]) for i, label in enumerate(labels.tolist())]
    values = measures.compute()
    assert values["prior_entropy"] == pytest.approx(sum(priors) / 8, rel=1e-5)
    assert values["posterior_entropy"] == pytest.approx(sum(posteriors) / 8, rel=1e-5)
    assert values["prior_entropy_relative"] == pytest.approx(values["prior_entropy"] / math.log(12))


def test_dead_priors_are_counted_and_uniform() -> None:
    scores = torch.tensor([-1.0, 1.0, -3.0, -2.0]).view(4, 1, 1, 1).expand(4, 1, 3, 4)
    measures = TrainingMeasures()
    output = CalmOutput(torch.zeros(4, 2, 3, 4), scores, "relu")
    measures.update(torch.tensor(1.0), 4, output, torch.zeros(4, dtype=torch.int64))
    values = measures.compute()
    assert values["dead_prior"] == 0.75
    assert values["prior_entropy_relative"] == pytest.approx(1.0)


def test_cam_has_no_state_of_the_explanation() -> None:
    measures = TrainingMeasures()
    output = CamOutput(torch.rand(2, 4, 3, 3), torch.rand(3, 4, 1, 1), torch.zeros(3))
    measures.update(torch.tensor(1.0), 2, output, torch.tensor([0, 2]))
    assert set(measures.compute()) == {"train_loss", "train_accuracy", "train_nll"}


def test_loss_is_the_mean_over_images_and_starts_anew() -> None:
    measures = TrainingMeasures()
    for loss, images in ((1.0, 6), (4.0, 2)):
        measures.update(torch.tensor(loss), images, output_of(), torch.randint(7, (5,)))
    measures.update(torch.tensor(1.75), 8)  # not all batches are looked at
    assert measures.compute()["train_loss"] == 1.75
    measures.reset()
    measures.update(torch.tensor(3.0), 1, output_of(), torch.eye(7)[[0, 1, 2, 3, 4]])  # soft targets
    assert measures.compute()["train_loss"] == 3.0
