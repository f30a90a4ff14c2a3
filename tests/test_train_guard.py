"""A loss that is no number: the message names step, epoch, rate and the likely cause."""

from __future__ import annotations

import pytest
import torch
from train_cases import tiny_net

from calm.errors import CalmError
from calm.model import CalmModel, create_model
from calm.train.guard import FiniteGuard, Position, check_weights, diagnose

POSITION = Position(epoch=2, step=40, lr=0.05)


def model_of(activation: str = "softplus") -> CalmModel:
    return create_model(tiny_net(stateful=False), 3, prior_activation=activation)  # type: ignore[arg-type]


def test_guard_remembers_the_first_bad_step() -> None:
    guard = FiniteGuard()
    for step, loss in enumerate((1.0, 2.0, float("inf"), 1.0, float("nan"))):
        guard.note(torch.tensor(loss), step)
    assert guard.first_bad() == 2


def test_guard_without_bad_losses_has_none() -> None:
    guard = FiniteGuard()
    assert guard.first_bad() is None
    guard.note(torch.tensor(3.0), 0)
    assert guard.first_bad() is None


def test_bad_images_are_the_cause() -> None:
    images = torch.rand(4, 3, 16, 16)
    images[1, 0, 3, 3] = torch.nan
    message = str(diagnose(model_of(), images, 38, POSITION))
    assert "step 38 (epoch 3, learning rate 0.05): 1 of 4 images" in message
    assert "calm data check" in message


def test_bad_weights_are_the_cause() -> None:
    model = model_of()
    model.backbone.layers[2].weight.data[0] = torch.inf  # type: ignore[union-attr, index, operator]
    message = str(diagnose(model, torch.rand(2, 3, 16, 16), 38, POSITION))
    assert "backbone.layers.2.weight are not finite" in message
    assert "lower lr" in message
    with pytest.raises(CalmError, match=r"backbone\.layers\.2\.weight"):
        check_weights(model, POSITION)


@pytest.mark.parametrize(("part", "cause"), [("conv_last", "class logits"), ("attention", "location scores")])
def test_overflowing_activations_are_the_cause(part: str, cause: str) -> None:
    model = model_of()
    getattr(model.head, part).weight.data.fill_(3e38)
    assert cause in str(diagnose(model, 100 * torch.rand(2, 3, 16, 16), 38, POSITION))


def test_dead_prior_is_told() -> None:
    model = model_of("relu")
    model.head.attention.weight.data.zero_()  # type: ignore[union-attr, operator]
    model.head.attention.bias.data.fill_(-1.0)  # type: ignore[union-attr, operator]
    assert "dead for 2 of 2 images" in str(diagnose(model, torch.rand(2, 3, 16, 16), 38, POSITION))


def test_finite_weights_pass() -> None:
    check_weights(model_of(), POSITION)
