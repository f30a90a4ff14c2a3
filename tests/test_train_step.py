"""The training step: its measures against their definitions, the guard against NaN, and what waits for the device."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_cases import SIZE, tiny_config, tiny_net

from calm.config import Method
from calm.data.augmentation import Augmentation
from calm.data.transforms import BatchMix
from calm.errors import CalmError
from calm.model import CalmModel, create_model
from calm.output import CalmOutput, CamOutput
from calm.train.config import LossOptions, ModelOptions, RunLength
from calm.train.optim import Average
from calm.train.step import TrainingMeasures, TrainingStep, check_weights, diagnose


def output_of(batch: int = 5, classes: int = 7, *, activation: str = "softplus", scale: float = 2.0) -> CalmOutput:
    logits = scale * torch.randn(batch, classes, 3, 4)
    return CalmOutput(logits, torch.randn(batch, 1, 3, 4), activation)  # type: ignore[arg-type]


def entropy(probabilities: torch.Tensor) -> float:
    return -sum(p * math.log(p) for p in probabilities.flatten().tolist() if p > 0)


@pytest.mark.parametrize("activation", ["softplus", "relu", "exp"])
def test_training_measures_entropies_are_those_of_prior_and_posterior(activation: str) -> None:
    first, second = output_of(activation=activation), output_of(3, activation=activation)
    targets = [torch.randint(7, (size,)) for size in (5, 3)]
    measures = TrainingMeasures()
    priors, posteriors = [], []
    for output, labels in zip((first, second), targets, strict=True):
        measures.update(torch.tensor(1.0), len(labels), 0, output, labels)
        priors += [entropy(prior) for prior in output.prior]
        posteriors += [entropy(output.posterior[i, label]) for i, label in enumerate(labels.tolist())]
    values = measures.compute()
    assert values["prior_entropy"] == pytest.approx(sum(priors) / 8, rel=1e-5)
    assert values["posterior_entropy"] == pytest.approx(sum(posteriors) / 8, rel=1e-5)
    assert values["prior_entropy_relative"] == pytest.approx(values["prior_entropy"] / math.log(12))


def test_training_measures_count_dead_priors_as_uniform() -> None:
    scores = torch.tensor([-1.0, 1.0, -3.0, -2.0]).view(4, 1, 1, 1).expand(4, 1, 3, 4)
    measures = TrainingMeasures()
    output = CalmOutput(torch.zeros(4, 2, 3, 4), scores, "relu")
    measures.update(torch.tensor(1.0), 4, 0, output, torch.zeros(4, dtype=torch.int64))
    values = measures.compute()
    assert values["dead_prior"] == 0.75
    assert values["prior_entropy_relative"] == pytest.approx(1.0)


def test_training_measures_of_cam_have_no_explanation() -> None:
    measures = TrainingMeasures()
    output = CamOutput.of(torch.rand(2, 4, 3, 3), torch.rand(3, 4, 1, 1), torch.zeros(3))
    measures.update(torch.tensor(1.0), 2, 0, output, torch.tensor([0, 2]))
    assert set(measures.compute()) == {"train_loss", "train_accuracy", "train_nll"}


def test_training_measures_loss_is_the_mean_over_images() -> None:
    measures = TrainingMeasures()
    for loss, images in ((1.0, 6), (4.0, 2)):
        measures.update(torch.tensor(loss), images, 0, output_of(), torch.randint(7, (5,)))
    measures.update(torch.tensor(1.75), 8, 1)  # not all batches are looked at
    assert measures.compute()["train_loss"] == 1.75
    measures.reset()
    measures.update(torch.tensor(3.0), 1, 2, output_of(), torch.eye(7)[[0, 1, 2, 3, 4]])  # soft targets
    assert measures.compute()["train_loss"] == 3.0


WHERE = "epoch 3, learning rate 0.05"


def model_of(activation: str = "softplus") -> CalmModel:
    return create_model(tiny_net(stateful=False), 3, prior_activation=activation)  # type: ignore[arg-type]


def test_training_measures_record_the_first_bad_step() -> None:
    measures = TrainingMeasures()
    for step, loss in enumerate((1.0, 2.0, float("inf"), 1.0, float("nan"))):
        measures.update(torch.tensor(loss), 1, step)
        assert measures.first_bad_step() == (None if step < 2 else 2)
    measures.reset()
    assert measures.first_bad_step() is None


def test_diagnose_names_bad_images() -> None:
    images = torch.rand(4, 3, 16, 16)
    images[1, 0, 3, 3] = torch.nan
    message = str(diagnose(model_of(), images, 38, WHERE))
    assert "step 38 (epoch 3, learning rate 0.05): 1 of 4 images" in message
    assert "calm data check" in message


def test_diagnose_names_bad_weights() -> None:
    model = model_of()
    model.backbone.layers[2].weight.data[0] = torch.inf  # type: ignore[union-attr, index, operator]
    message = str(diagnose(model, torch.rand(2, 3, 16, 16), 38, WHERE))
    assert "backbone.layers.2.weight are not finite" in message
    assert "lower lr" in message
    with pytest.raises(CalmError, match=r"backbone\.layers\.2\.weight"):
        check_weights(model, 40, WHERE)


@pytest.mark.parametrize(("part", "cause"), [("conv_last", "class logits"), ("attention", "location scores")])
def test_diagnose_names_overflowing_activations(part: str, cause: str) -> None:
    model = model_of()
    getattr(model.head, part).weight.data.fill_(3e38)
    assert cause in str(diagnose(model, 100 * torch.rand(2, 3, 16, 16), 38, WHERE))


def test_diagnose_names_dead_priors() -> None:
    model = model_of("relu")
    model.head.attention.weight.data.zero_()  # type: ignore[union-attr, operator]
    model.head.attention.bias.data.fill_(-1.0)  # type: ignore[union-attr, operator]
    assert "dead for 2 of 2 images" in str(diagnose(model, torch.rand(2, 3, 16, 16), 38, WHERE))


def test_check_weights_passes_finite_weights() -> None:
    check_weights(model_of(), 40, WHERE)


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "is_nonzero"}
"""Operations whose result, or its shape, the program must see before it goes on: `.item()`, `bool()`, masks."""


class Waits(TorchDispatchMode):
    """Notes the operations that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def waits_of_a_step(method: Method, step: int, prior: str, loss: LossOptions) -> list[str]:
    """What forward, loss, measures and backward wait for, as they are on a GPU."""
    config = replace(tiny_config(Path("data"), Path("run"), method=method), loss=loss)
    model = create_model(tiny_net(), 3, method, prior_activation=prior)  # type: ignore[arg-type]
    averages = {"teacher": Average(model, 0.9)} if loss.posterior == "ema" else {}
    module = TrainingStep(model.train(), averages, config, RunLength(3, 4))
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 0])
    with Waits() as waits:
        module(images, labels, epoch=0, step=step, index=step, rank=0).backward()
    return waits.found


@pytest.mark.parametrize(
    ("method", "prior", "loss"),
    [
        ("cam", "softplus", LossOptions()),
        ("calm-ml", "softplus", LossOptions()),
        ("calm-em", "softplus", LossOptions()),
        ("calm-em", "softplus", LossOptions(posterior="ema")),
    ],
)
def test_training_step_between_two_looks_waits_for_nothing(method: Method, prior: str, loss: LossOptions) -> None:
    assert waits_of_a_step(method, 3, prior, loss) == []


def test_training_step_that_is_looked_at_waits() -> None:
    assert "_local_scalar_dense" in waits_of_a_step("calm-em", 0, "softplus", LossOptions())


def test_a_loss_of_another_exponent_teaches_a_model_that_predicts_with_its_own() -> None:
    model = create_model(tiny_net(stateful=False), 3, prior_activation="exp", pooling_exponent=0.0).eval()
    torch.nn.init.normal_(model.head.attention.weight)
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 0])
    output = model(images)
    assert isinstance(output, CalmOutput)
    losses = {}
    for exponent in (None, 1.0):
        loss = LossOptions(pooling_exponent=exponent, temperature=1.0 if exponent is None else 0.5)
        config = replace(tiny_config(Path("data"), Path("run")), model=ModelOptions(pooling_exponent=0.0), loss=loss)
        step = TrainingStep(model, {}, config, RunLength(3, 4))
        losses[exponent] = step(images, labels, epoch=0, step=0, index=0, rank=0).item()
        nll = -output.log_probs.gather(1, labels[:, None]).mean()
        assert step.measures.compute()["train_nll"] == pytest.approx(nll.item())  # the model's own prediction
    assert losses[None] == pytest.approx(nll.item())
    joint = (output.logits.double().softmax(1) * output.scores.double().flatten(1).softmax(1).view(4, 1, 4, 4)).flatten(
        2
    )
    own = joint[torch.arange(4), labels].log()
    assert losses[1.0] == pytest.approx((-((0.5 * own).softmax(1) * own).sum(1).mean()).item(), rel=1e-5)


@pytest.mark.parametrize(("method", "way"), [("calm-em", "regions"), ("calm-ml", "shares"), ("cam", "regions")])
def test_cutmix_teaches_calm_the_class_of_each_region_and_cam_the_shares(method: Method, way: Any) -> None:
    model = create_model(tiny_net(stateful=False), 3, method).eval()
    images, labels = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 0])
    cutmix = Augmentation(cutmix=1.0)
    config = replace(
        tiny_config(Path("data"), Path("run"), method=method), augment=cutmix, loss=LossOptions(cutmix=way)
    )
    step = TrainingStep(model, {}, config, RunLength(3, 4))
    mixed, shares, window = BatchMix(cutmix, 3)(images, labels, seed=config.seed, epoch=0, step=1)
    assert window is not None
    x0, y0, x1, y1 = window
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[y0:y1, x0:x1] = True
    assert 0 < inside.sum() < SIZE**2
    taught: Any = {"targets": shares}
    if method == "calm-em":
        taught = {"targets": torch.stack([labels, labels.roll(1)], 1), "regions": torch.stack([~inside, inside])}
    want = model.output_loss(model(mixed), **taught)
    torch.testing.assert_close(step(images, labels, epoch=0, step=1, index=1, rank=0), want)
