"""Measures against their definitions, computed by loops."""

from __future__ import annotations

import math

import pytest
import torch

from calm.output import CalmOutput, CamOutput
from calm.train.measures import ClassificationMeasures, ExplanationMeasures, TrainingMeasures


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
    measures = ExplanationMeasures()
    priors, posteriors = [], []
    for output, labels in zip((first, second), targets, strict=True):
        measures.update(output, labels)
        priors += [entropy(prior) for prior in output.prior]
        posteriors += [entropy(output.posterior[i, label]) for i, label in enumerate(labels.tolist())]
    values = measures.compute()
    assert values["prior_entropy"] == pytest.approx(sum(priors) / 8, rel=1e-5)
    assert values["posterior_entropy"] == pytest.approx(sum(posteriors) / 8, rel=1e-5)
    assert values["prior_entropy_relative"] == pytest.approx(values["prior_entropy"] / math.log(12))


def test_dead_priors_are_counted_and_uniform() -> None:
    scores = torch.tensor([-1.0, 1.0, -3.0, -2.0]).view(4, 1, 1, 1).expand(4, 1, 3, 4)
    measures = ExplanationMeasures()
    measures.update(CalmOutput(torch.zeros(4, 2, 3, 4), scores, "relu"), torch.zeros(4, dtype=torch.int64))
    values = measures.compute()
    assert values["dead_prior"] == 0.75
    assert values["prior_entropy_relative"] == pytest.approx(1.0)


def test_cam_has_no_state_of_the_explanation() -> None:
    measures = TrainingMeasures(3)
    output = CamOutput(torch.rand(2, 4, 3, 3), torch.rand(3, 4, 1, 1), torch.zeros(3))
    measures.add_loss(torch.tensor(1.0), 2)
    measures.add_output(output, torch.tensor([0, 2]))
    assert set(measures.compute()) == {"train_loss", "train_accuracy", "train_nll"}


def test_loss_is_the_mean_over_images_and_starts_anew() -> None:
    measures = TrainingMeasures(7)
    for loss, images in ((1.0, 6), (4.0, 2)):
        measures.add_loss(torch.tensor(loss), images)
        measures.add_output(output_of(), torch.randint(7, (5,)))
    assert measures.compute()["train_loss"] == 1.75
    measures.add_loss(torch.tensor(3.0), 1)
    measures.add_output(output_of(), torch.eye(7)[[0, 1, 2, 3, 4]])  # soft targets
    assert measures.compute()["train_loss"] == 3.0


def test_classification_measures_are_their_definitions() -> None:
    measures = ClassificationMeasures(7)
    rows = []
    for size in (5, 9):
        output, labels = output_of(size), torch.randint(7, (size,))
        measures.update(output, labels)
        rows += list(zip(output.probs.tolist(), labels.tolist(), strict=True))
    values = measures.compute()
    ranks = [sum(other > probs[label] for other in probs) for probs, label in rows]
    assert values["accuracy"] == pytest.approx(sum(rank == 0 for rank in ranks) / 14)
    assert values["top5"] == pytest.approx(sum(rank < 5 for rank in ranks) / 14)
    assert values["nll"] == pytest.approx(
        sum(-math.log(probs[label]) for probs, label in rows) / 14, rel=1e-5
    )
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probs, label in rows:
        bins.setdefault(math.ceil(max(probs) * 15), []).append((max(probs), probs[label] == max(probs)))
    gaps = [abs(sum(c for c, _ in members) - sum(right for _, right in members)) for members in bins.values()]
    assert values["ece"] == pytest.approx(sum(gaps) / 14, rel=1e-5)


def test_certainty_that_rounds_above_one_stays_a_probability() -> None:
    output = output_of(4, scale=0.0)
    output.logits[:, 0] = 100.0
    measures = ClassificationMeasures(7)
    measures.update(output, torch.zeros(4, dtype=torch.int64))
    assert measures.compute()["ece"] == pytest.approx(0.0, abs=1e-6)


def test_no_top5_of_five_classes() -> None:
    assert ClassificationMeasures(5).top5 is None
