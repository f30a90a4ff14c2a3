"""Quantities, losses and gradients of `calm.latent`, read through outputs, against the float64 oracle."""

from __future__ import annotations

import inspect
import math
import re

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, activations_of, shapes
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.testing import assert_close

from calm import latent
from calm.errors import CalmError
from calm.latent import e_step, em_loss
from calm.output import CalmOutput, CamOutput


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
def test_output_quantities_equal_the_oracle(activation, shape, seed, spread):
    logits, scores = activations_of(shape, seed, spread)
    want = expected(logits, scores, activation)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        low = logits.to(dtype), scores.to(dtype)
        want_low = want if dtype == torch.float64 else expected(low[0].double(), low[1].double(), activation)
        got = quantities(CalmOutput(*low, activation))
        for name, value in got.items():
            assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), name
            if name == "posterior":  # 0 / 0 where p(y | x) underflows float64: compare only what the oracle can say
                known = want_low[name].isfinite()
                assert_close(value.double()[known], want_low[name][known], rtol=2e-5, atol=1e-10)
            else:
                assert_close(value.double(), want_low[name], rtol=2e-5, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10_000), activation=st.sampled_from(ACTIVATIONS))
def test_output_quantities_sum_to_what_the_table_says(shape, seed, activation):
    logits, scores = activations_of(shape, seed, 3.0)
    out = CalmOutput(logits, scores, activation)
    ones = torch.ones(shape[0], dtype=torch.float64)
    assert_close(out.prior.sum((1, 2)), ones)
    assert_close(out.conditional.sum(1), torch.ones_like(out.conditional[:, 0]))
    assert_close(out.joint.sum((2, 3)), out.probs)
    assert_close(out.probs.sum(1), ones)
    assert_close(out.posterior.sum((2, 3)), torch.ones_like(out.probs))


def test_log_prior_without_mass_is_uniform_and_passes_no_gradient():
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
def test_loss_of_extreme_scores_is_finite(activation):
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
def test_log_joint_passes_gradcheck(activation):
    logits, scores = activations_of((2, 3, 2, 2), 1, 1.0)
    scores = scores.abs() if activation == "relu" else scores  # away from the kink
    logits.requires_grad_()
    scores.requires_grad_()

    def joint(f: Tensor, s: Tensor) -> Tensor:
        return CalmOutput(f, s, activation).joint

    assert torch.autograd.gradcheck(joint, (logits, scores))


def test_log_prior_with_constant_denominator_changes_the_gradient_only():
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


def test_loss_has_a_gradient_after_a_quantity_was_read_without_one():
    logits, scores = (t.requires_grad_() for t in activations_of((2, 3, 2, 2), 1, 1.0))
    out = CalmOutput(logits, scores)
    with torch.no_grad():
        out.probs.sum()
    out.loss(torch.tensor([0, 1])).backward()
    assert scores.grad.abs().sum() > 0


def test_loss_and_log_prior_refuse_unknown_names():
    output = CalmOutput(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3))
    with pytest.raises(CalmError, match="did you mean 'calm-ml'"):
        output.loss(torch.tensor([0]), method="calm-mll")
    log_prior = inspect.unwrap(latent.log_prior)  # without the check of types that tests add
    with pytest.raises(CalmError, match="did you mean 'softplus'"):
        log_prior(torch.zeros(1, 1, 3, 3), "softplu")
    with pytest.raises(CalmError, match="did you mean 'constant'"):
        log_prior(torch.zeros(1, 1, 3, 3), denominator="const")


@pytest.mark.parametrize("shape", [(1,), (3,), (), (3, 2), (2, 2, 1)])
def test_check_targets_needs_one_target_per_image(shape):
    output = CalmOutput(torch.zeros(2, 2, 3, 3), torch.zeros(2, 1, 3, 3))
    with pytest.raises(CalmError, match=re.escape(f"targets of shape {shape} for 2 images")):
        output.loss(torch.zeros(shape, dtype=torch.int64))


# Losses


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 10_000),
    activation=st.sampled_from(ACTIVATIONS),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_loss_equals_the_oracle(shape, seed, activation, temperature):
    logits, scores = activations_of(shape, seed, 2.0)
    targets = torch.randint(shape[1], (shape[0],), generator=torch.Generator().manual_seed(seed))
    joint = oracle.joint(logits, scores, activation)
    out = CalmOutput(logits.float(), scores.float(), activation)
    ml = out.loss(targets, method="calm-ml").item()
    assert ml == pytest.approx(oracle.ml_loss(joint, targets.tolist()), rel=1e-5, abs=1e-6)
    em = out.loss(targets, temperature=temperature).item()
    assert em == pytest.approx(oracle.em_loss(joint, targets.tolist(), temperature), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("denominator", ["differentiated", "constant"])
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10_000))
def test_em_loss_and_ml_loss_have_the_same_gradient(activation, denominator, shape, seed):
    logits, scores = (t.requires_grad_() for t in activations_of(shape, seed, 2.0))
    targets = torch.zeros(shape[0], dtype=torch.int64)
    grads = {}
    for method in ("calm-em", "calm-ml"):
        loss = CalmOutput(logits, scores, activation, denominator).loss(targets, method=method)
        grads[method] = torch.autograd.grad(loss, (logits, scores))
    for em, ml in zip(grads["calm-em"], grads["calm-ml"], strict=True):
        assert_close(em, ml, rtol=1e-9, atol=1e-12)


def test_e_step_with_temperature_or_teacher_changes_the_gradient():
    logits, scores = (t.requires_grad_() for t in activations_of((2, 4, 3, 3), 5, 2.0))
    teacher = CalmOutput(*activations_of((2, 4, 3, 3), 6, 2.0))
    targets = torch.tensor([1, 3])
    out = CalmOutput(logits, scores)
    (ml,) = torch.autograd.grad(out.loss(targets, method="calm-ml"), logits, retain_graph=True)
    for options in ({"temperature": 0.5}, {"teacher": teacher}):
        (em,) = torch.autograd.grad(out.loss(targets, **options), logits, retain_graph=True)
        assert (em - ml).norm() > 0.05 * ml.norm()


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10_000), activation=st.sampled_from(ACTIVATIONS))
def test_e_step_uses_the_teachers_posterior(shape, seed, activation):
    logits, scores = activations_of(shape, seed, 2.0)
    scores = scores.abs() + 0.1  # the student has mass everywhere, so that the formula is finite
    other = activations_of(shape, seed + 1, 2.0)
    teacher = CalmOutput(*other, activation)
    targets = torch.zeros(shape[0], dtype=torch.int64)
    got = CalmOutput(logits, scores, activation).loss(targets, teacher=teacher).item()
    joint, teacher_joint = oracle.joint(logits, scores, activation), oracle.joint(*other, activation)
    assert got == pytest.approx(oracle.em_loss(joint, [0] * shape[0], teacher=teacher_joint), rel=1e-6, abs=1e-9)


def test_e_step_ignores_teacher_mass_where_the_student_has_none():
    logits = torch.randn(2, 3, 1, 2, requires_grad=True)
    scores = torch.tensor([[[[1.0, -1.0]]], [[[2.0, -2.0]]]], requires_grad=True)
    teacher = CalmOutput(torch.randn(2, 3, 1, 2), torch.tensor([[[[-1.0, 1.0]]], [[[1.0, 1.0]]]]), "relu")
    loss = CalmOutput(logits, scores, "relu").loss(torch.tensor([0, 1]), teacher=teacher)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert scores.grad.isfinite().all()


def test_em_loss_ignores_locations_without_posterior():
    log_joint = torch.tensor([[[-1.0, -torch.inf], [-2.0, -0.5]]], requires_grad=True)
    q = e_step(log_joint)
    assert q[0, 0, 1] == 0
    loss = em_loss(q, log_joint)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert_close(log_joint.grad, -q)


def test_em_loss_passes_gradcheck():
    logits, scores = (t.requires_grad_() for t in activations_of((2, 3, 2, 2), 2, 1.0))
    q = e_step(CalmOutput(*activations_of((2, 3, 2, 2), 9, 1.0)).target_log_joint(torch.tensor([0, 2])))

    def loss(f, s):
        return em_loss(q, CalmOutput(f, s).target_log_joint(torch.tensor([0, 2])))

    assert torch.autograd.gradcheck(loss, (logits, scores))


@pytest.mark.parametrize("method", ["calm-em", "calm-ml"])
def test_loss_of_soft_targets_is_an_expectation_over_classes(method):
    logits, scores = activations_of((2, 3, 2, 2), 4, 1.0)
    soft = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    joint = oracle.joint(logits, scores, "softplus")
    rule = oracle.em_loss if method == "calm-em" else oracle.ml_loss
    per_class = [[rule(joint[b : b + 1], [c]) for c in range(3)] for b in range(2)]
    want = sum(float(soft[b, c]) * per_class[b][c] for b in range(2) for c in range(3)) / 2
    got = CalmOutput(logits, scores).loss(soft, method=method).item()
    assert got == pytest.approx(want, rel=1e-9)


def test_loss_of_a_one_hot_row_is_that_of_its_class():
    logits, scores = (t.requires_grad_() for t in activations_of((3, 4, 2, 2), 7, 1.0))
    hard = torch.tensor([0, 2, 3])
    for method in ("calm-em", "calm-ml"):
        grads = [
            torch.autograd.grad(CalmOutput(logits, scores).loss(t, method=method), (logits, scores))
            for t in (hard, torch.eye(4, dtype=torch.float64)[hard])
        ]
        for one, other in zip(*grads, strict=True):
            assert_close(one, other)


def test_loss_refuses_e_step_options_for_ml():
    out = CalmOutput(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(CalmError, match="E-step"):
        out.loss(torch.tensor([0]), method="calm-ml", temperature=0.5)


@settings(max_examples=30, deadline=None)
@given(
    shape=shapes, seed=st.integers(0, 10_000), weight=st.floats(0, 10), method=st.sampled_from(["calm-em", "calm-ml"])
)
def test_loss_with_prior_weight_adds_the_mean_of_minus_log_prior(shape, seed, weight, method):
    logits, scores = activations_of(shape, seed, 2.0)
    targets = torch.zeros(shape[0], dtype=torch.int64)
    out = CalmOutput(logits, scores)
    priors = oracle.prior(scores, "softplus").flatten().tolist()
    want = out.loss(targets, method=method).item() - weight * sum(map(math.log, priors)) / len(priors)
    got = out.loss(targets, method=method, prior_weight=weight).item()
    assert got == pytest.approx(want, rel=1e-9, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10_000), weight=st.floats(0, 10), soft=st.booleans())
def test_loss_with_cam_weight_adds_the_cross_entropy_of_the_mean_logits(shape, seed, weight, soft):
    logits, scores = activations_of(shape, seed, 2.0)
    b, c = shape[:2]
    targets = torch.arange(b) % c
    rows = F.one_hot(targets, c).double() * 0.7 + 0.3 / c if soft else F.one_hot(targets, c).double()
    want = 0.0
    for image, row in zip(logits.flatten(2).tolist(), rows.tolist(), strict=True):
        means = [sum(values) / len(values) for values in image]
        log_sum = math.log(sum(math.exp(mean) for mean in means))
        want += sum(share * (log_sum - mean) for share, mean in zip(row, means, strict=True)) / b
    out, given_targets = CalmOutput(logits, scores), rows if soft else targets
    got = out.loss(given_targets, cam_weight=weight).item() - out.loss(given_targets).item()
    assert got == pytest.approx(weight * want, rel=1e-9, abs=1e-9)


def test_loss_with_prior_weight_refuses_a_prior_of_zeros():
    out = CalmOutput(torch.zeros(1, 2, 2, 2), torch.ones(1, 1, 2, 2), "relu")
    with pytest.raises(CalmError, match="ReLU prior"):
        out.loss(torch.tensor([0]), prior_weight=0.1)


def test_prior_weight_spreads_the_prior_that_a_large_one_makes_uniform():
    entropies = []
    for weight in (0.0, 0.3, 30.0):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(1, 3, 2, 2, generator=generator, dtype=torch.float64)
        scores = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([scores], lr=0.2)
        for _ in range(60):
            optimizer.zero_grad()
            CalmOutput(logits, scores, "exp").loss(torch.tensor([1]), prior_weight=weight).backward()
            optimizer.step()
        prior = CalmOutput(logits, scores.detach(), "exp").prior
        entropies.append(float(torch.special.entr(prior).sum()) / math.log(4))
    assert entropies[0] < entropies[1] - 0.1 < entropies[2] - 0.2
    assert entropies[2] > 0.99


def test_loss_is_finite_where_the_likelihood_underflows():
    logits = torch.tensor([0.0, 500.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2).clone().requires_grad_()
    out = CalmOutput(logits, torch.zeros(1, 1, 2, 2))
    assert out.probs[0, 0] == 0  # it underflows as a probability, not as a loss
    for method in ("calm-em", "calm-ml"):
        loss = out.loss(torch.tensor([0]), method=method)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert 499 < loss.item() < 510
        assert grad.isfinite().all()
        assert grad.abs().sum() > 1


def test_cam_output_loss_is_cross_entropy_of_the_averaged_maps():
    features = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    weight, bias = torch.randn(6, 5, 1, 1, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    out = CamOutput.of(features, weight, bias)
    targets = torch.tensor([1, 5, 0])
    mean = torch.zeros(3, 6, dtype=torch.float64)
    for b in range(3):
        for c in range(6):
            for i in range(2):
                for j in range(4):
                    mean[b, c] += (features[b, :, i, j] @ weight[c, :, 0, 0] + bias[c]) / 8
    want = -torch.stack([(mean[b].exp() / mean[b].exp().sum()).log()[targets[b]] for b in range(3)]).mean()
    assert_close(out.loss(targets), want)
    assert_close(out.logits.mean((2, 3)), mean)
    assert_close(out.class_logits(targets[:, None])[:, 0], out.logits[torch.arange(3), targets])


@pytest.mark.parametrize("activation", ["softplus", "relu", "exp"])
@pytest.mark.parametrize("method", ["calm-em", "calm-ml"])
def test_loss_can_be_differentiated_twice(activation, method):
    logits, scores = activations_of((2, 3, 2, 2), 1, 1.0)
    scores = scores.abs() + 0.1 if activation == "relu" else scores  # away from the kink

    def loss(f: Tensor, s: Tensor) -> Tensor:
        if method == "calm-ml":
            return CalmOutput(f, s, activation).loss(torch.tensor([0, 2]), method=method)
        log_joint = CalmOutput(f, s, activation).target_log_joint(torch.tensor([0, 2]))
        return em_loss(torch.full((2, 2, 2), 0.25, dtype=torch.float64), log_joint)  # q is held constant

    assert torch.autograd.gradgradcheck(loss, (logits.requires_grad_(), scores.requires_grad_()))


@pytest.mark.parametrize("target", [-100, -1, 3])
def test_target_log_conditional_refuses_a_class_that_there_is_not(target):
    with pytest.raises(IndexError, match="out of bounds"):
        latent.target_log_conditional(torch.zeros(1, 3, 2, 2), torch.tensor([target]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_target_log_conditional_is_the_targets_row_in_float32_or_wider(dtype):
    logits, _ = activations_of((2, 3, 2, 4), 1, 1.0)
    logits, targets = logits.to(dtype), torch.tensor([0, 2])
    got = latent.target_log_conditional(logits, targets)
    assert got.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert_close(got, latent.log_conditional(logits)[torch.arange(2), targets])
    assert_close(latent.target_log_conditional(logits.flatten(2), targets), got.flatten(1))
