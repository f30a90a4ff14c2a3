"""The five quantities agree with the oracle, over shapes, activations, dtypes and edge cases."""

from __future__ import annotations

import inspect
import math
import re

import oracle
import pytest
import torch
from cases import ACTIVATIONS, activations_of, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from calm import latent
from calm.errors import CalmError
from calm.output import CalmOutput


def quantities(output: CalmOutput) -> dict[str, Tensor]:
    return {name: getattr(output, name) for name in ("conditional", "prior", "joint", "probs", "posterior")}


def expected(logits: Tensor, scores: Tensor, activation: str) -> dict[str, Tensor]:
    joint = oracle.joint(logits, scores, activation)
    return {
        "conditional": oracle.conditional(logits),
        "prior": oracle.prior(scores, activation),
        "joint": joint,
        "probs": oracle.likelihood(joint),
        "posterior": oracle.posterior(joint),
    }


@pytest.mark.parametrize("activation", ACTIVATIONS)
@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 5.0]))
def test_the_five_quantities_equal_the_oracle(activation, shape, seed, spread):
    logits, scores = activations_of(shape, seed, spread)
    want = expected(logits, scores, activation)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        low = logits.to(dtype), scores.to(dtype)
        want_low = want if dtype == torch.float64 else expected(low[0].double(), low[1].double(), activation)
        got = quantities(CalmOutput(*low, activation))
        for name, value in got.items():
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
            if (
                name == "posterior"
            ):  # 0 / 0 where p(y | x) underflows float64: compare only what the oracle can say
                known = want_low[name].isfinite()
                assert_close(value.double()[known], want_low[name][known], rtol=2e-5, atol=1e-10)
            else:
                assert_close(value.double(), want_low[name], rtol=2e-5, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10_000), activation=st.sampled_from(ACTIVATIONS))
def test_each_quantity_sums_to_what_the_table_says(shape, seed, activation):
    logits, scores = activations_of(shape, seed, 3.0)
    out = CalmOutput(logits, scores, activation)
    ones = torch.ones(shape[0], dtype=torch.float64)
    assert_close(out.prior.sum((1, 2)), ones)
    assert_close(out.conditional.sum(1), torch.ones_like(out.conditional[:, 0]))
    assert_close(out.joint.sum((2, 3)), out.probs)
    assert_close(out.probs.sum(1), ones)
    assert_close(out.posterior.sum((2, 3)), torch.ones_like(out.probs))


def test_a_dead_relu_prior_is_uniform_and_passes_no_gradient():
    scores = torch.tensor([[[[-1.0, 0.0], [-3.0, -0.5]]], [[[-1.0, 2.0], [1.0, 0.0]]]], requires_grad=True)
    log_prior = latent.log_prior(scores, "relu")
    assert_close(log_prior[0], torch.full((2, 2), -math.log(4)))
    assert_close(log_prior[1].exp(), torch.tensor([[0.0, 2 / 3], [1 / 3, 0.0]]))
    log_prior.exp().square().sum().backward()
    assert torch.equal(scores.grad[0], torch.zeros(1, 2, 2))
    assert scores.grad[1].isfinite().all()
    assert scores.grad[1].abs().sum() > 0
    assert CalmOutput(torch.zeros(2, 3, 2, 2), scores.detach(), "relu").dead.tolist() == [True, False]


@pytest.mark.parametrize("value", [-200.0, -100.0, -15.001, -14.999, 0.0, 30.0, 50.0, 80.0])
def test_log_softplus_is_exact_far_out(value):
    got = latent._log_softplus(torch.tensor(value, dtype=torch.float64))
    want = value if value < -40 else math.log(oracle.softplus(value))
    assert abs(float(got) - want) <= 1e-12 * max(1.0, abs(want))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_scores_stay_finite(activation):
    scores = torch.tensor([[[[-300.0, -310.0], [-305.0, -301.0]]]], requires_grad=True)
    logits = torch.tensor([1e4, -1e4, 3e4]).view(1, 3, 1, 1).expand(1, 3, 2, 2).clone().requires_grad_()
    out = CalmOutput(logits, scores, activation)
    assert_close(out.probs.sum(), torch.tensor(1.0))
    loss = out.loss(torch.tensor([1]))
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_prior_and_joint_pass_gradcheck(activation):
    logits, scores = activations_of((2, 3, 2, 2), 1, 1.0)
    scores = scores.abs() if activation == "relu" else scores  # away from the kink
    logits.requires_grad_()
    scores.requires_grad_()

    def joint(f: Tensor, s: Tensor) -> Tensor:
        return CalmOutput(f, s, activation).joint

    assert torch.autograd.gradcheck(joint, (logits, scores))


def test_a_constant_denominator_changes_the_gradient_only():
    _, scores = activations_of((2, 1, 3, 3), 3, 1.0)
    scores.requires_grad_()
    exact = latent.log_prior(scores, "softplus", "differentiated")
    held = latent.log_prior(scores, "softplus", "constant")
    assert_close(exact, held)
    (grad,) = torch.autograd.grad(held[0, 1, 1], scores, retain_graph=True)
    want = torch.zeros_like(scores)
    s = scores.detach()[0, 0, 1, 1]
    want[0, 0, 1, 1] = torch.sigmoid(s) / math.log1p(math.exp(s))  # a'(s) / a(s), and nothing anywhere else
    assert_close(grad, want)
    # For any loss that rewards log-prior mass, no score is ever pushed down.
    (grad,) = torch.autograd.grad((held * torch.rand_like(held)).sum(), scores)
    assert (grad >= 0).all()


def test_quantities_first_read_without_gradients_still_carry_them_into_a_loss():
    logits, scores = (t.requires_grad_() for t in activations_of((2, 3, 2, 2), 1, 1.0))
    out = CalmOutput(logits, scores)
    with torch.no_grad():
        out.probs.sum()
    out.loss(torch.tensor([0, 1])).backward()
    assert scores.grad.abs().sum() > 0


def test_nothing_is_computed_before_it_is_asked():
    logits, scores = activations_of((2, 3, 2, 2), 1, 1.0)
    out = CalmOutput(logits, scores)
    given = set(out._values)
    assert {name for name, _ in given} == {"logits", "scores"}
    out.loss(torch.tensor([0, 1]))
    assert {name for name, _ in set(out._values) - given} == {"log_normalizer", "log_prior"}


def test_a_name_that_is_none_is_refused_and_not_taken_for_another():
    output = CalmOutput(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3))
    with pytest.raises(CalmError, match="did you mean 'calm-ml'"):
        output.loss(torch.tensor([0]), method="calm-mll")
    log_prior = inspect.unwrap(latent.log_prior)  # without the check of types that tests add
    with pytest.raises(CalmError, match="did you mean 'softplus'"):
        log_prior(torch.zeros(1, 1, 3, 3), "softplu")
    with pytest.raises(CalmError, match="did you mean 'constant'"):
        log_prior(torch.zeros(1, 1, 3, 3), denominator="const")


@pytest.mark.parametrize("shape", [(1,), (3,), (), (3, 2), (2, 2, 1)])
def test_a_loss_needs_a_target_for_each_image(shape):
    output = CalmOutput(torch.zeros(2, 2, 3, 3), torch.zeros(2, 1, 3, 3))
    with pytest.raises(CalmError, match=re.escape(f"targets of shape {shape} for 2 images")):
        output.loss(torch.zeros(shape, dtype=torch.int64))
