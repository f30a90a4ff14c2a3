"""Losses and their gradients against the oracle; the EM = ML identity."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import ACTIVATIONS, activations_of, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from calm.errors import CalmError
from calm.latent import e_step, em_loss
from calm.output import CalmOutput, CamOutput


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    seed=st.integers(0, 10_000),
    activation=st.sampled_from(ACTIVATIONS),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_losses_equal_the_oracle(shape, seed, activation, temperature):
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
def test_em_and_ml_have_the_same_gradient(activation, denominator, shape, seed):
    logits, scores = (t.requires_grad_() for t in activations_of(shape, seed, 2.0))
    targets = torch.zeros(shape[0], dtype=torch.int64)
    grads = {}
    for method in ("calm-em", "calm-ml"):
        loss = CalmOutput(logits, scores, activation, denominator).loss(targets, method=method)
        grads[method] = torch.autograd.grad(loss, (logits, scores))
    for em, ml in zip(grads["calm-em"], grads["calm-ml"], strict=True):
        assert_close(em, ml, rtol=1e-9, atol=1e-12)


def test_a_temperature_or_a_teacher_breaks_the_identity():
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
def test_a_teachers_posterior_is_used(shape, seed, activation):
    logits, scores = activations_of(shape, seed, 2.0)
    scores = scores.abs() + 0.1  # the student has mass everywhere, so that the formula is finite
    other = activations_of(shape, seed + 1, 2.0)
    teacher = CalmOutput(*other, activation)
    targets = torch.zeros(shape[0], dtype=torch.int64)
    got = CalmOutput(logits, scores, activation).loss(targets, teacher=teacher).item()
    joint, believed = oracle.joint(logits, scores, activation), oracle.joint(*other, activation)
    assert got == pytest.approx(oracle.em_loss(joint, [0] * shape[0], believed=believed), rel=1e-6, abs=1e-9)


def test_a_relu_student_survives_a_teacher_with_mass_elsewhere():
    logits = torch.randn(2, 3, 1, 2, requires_grad=True)
    scores = torch.tensor([[[[1.0, -1.0]]], [[[2.0, -2.0]]]], requires_grad=True)
    teacher = CalmOutput(torch.randn(2, 3, 1, 2), torch.tensor([[[[-1.0, 1.0]]], [[[1.0, 1.0]]]]), "relu")
    loss = CalmOutput(logits, scores, "relu").loss(torch.tensor([0, 1]), teacher=teacher)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    assert scores.grad.isfinite().all()


def test_locations_without_posterior_add_nothing():
    log_joint = torch.tensor([[[-1.0, -torch.inf], [-2.0, -0.5]]], requires_grad=True)
    q = e_step(log_joint)
    assert q[0, 0, 1] == 0
    loss = em_loss(q, log_joint)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert_close(log_joint.grad, -q)


def test_gradcheck_of_the_m_step():
    logits, scores = (t.requires_grad_() for t in activations_of((2, 3, 2, 2), 2, 1.0))
    q = e_step(CalmOutput(*activations_of((2, 3, 2, 2), 9, 1.0)).target_rows(torch.tensor([0, 2])))

    def loss(f, s):
        return em_loss(q, CalmOutput(f, s).target_rows(torch.tensor([0, 2])))

    assert torch.autograd.gradcheck(loss, (logits, scores))


@pytest.mark.parametrize("method", ["calm-em", "calm-ml"])
def test_soft_targets_are_an_expectation_over_classes(method):
    logits, scores = activations_of((2, 3, 2, 2), 4, 1.0)
    soft = torch.tensor([[0.2, 0.8, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    joint = oracle.joint(logits, scores, "softplus")
    rule = oracle.em_loss if method == "calm-em" else oracle.ml_loss
    per_class = [[rule(joint[b : b + 1], [c]) for c in range(3)] for b in range(2)]
    want = sum(float(soft[b, c]) * per_class[b][c] for b in range(2) for c in range(3)) / 2
    got = CalmOutput(logits, scores).loss(soft, method=method).item()
    assert got == pytest.approx(want, rel=1e-9)


def test_a_one_hot_soft_target_is_the_hard_target():
    logits, scores = (t.requires_grad_() for t in activations_of((3, 4, 2, 2), 7, 1.0))
    hard = torch.tensor([0, 2, 3])
    for method in ("calm-em", "calm-ml"):
        grads = [
            torch.autograd.grad(CalmOutput(logits, scores).loss(t, method=method), (logits, scores))
            for t in (hard, torch.eye(4, dtype=torch.float64)[hard])
        ]
        for one, other in zip(*grads, strict=True):
            assert_close(one, other)


def test_options_of_the_e_step_are_refused_where_there_is_none():
    out = CalmOutput(torch.zeros(1, 2, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(CalmError, match="E-step"):
        out.loss(torch.tensor([0]), method="calm-ml", temperature=0.5)


def test_likelihoods_below_the_smallest_float_have_finite_losses_and_gradients():
    logits = torch.tensor([0.0, 500.0]).view(1, 2, 1, 1).expand(1, 2, 2, 2).clone().requires_grad_()
    out = CalmOutput(logits, torch.zeros(1, 1, 2, 2))
    assert out.probs[0, 0] == 0  # it underflows as a probability, not as a loss
    for method in ("calm-em", "calm-ml"):
        loss = out.loss(torch.tensor([0]), method=method)
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert 499 < loss.item() < 510
        assert grad.isfinite().all()
        assert grad.abs().sum() > 1


def test_cam_loss_is_cross_entropy_of_the_averaged_maps():
    features = torch.randn(3, 5, 2, 4, dtype=torch.float64)
    weight, bias = torch.randn(6, 5, 1, 1, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    out = CamOutput(features, weight, bias)
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
    assert_close(out.logits_of(targets[:, None])[:, 0], out.logits[torch.arange(3), targets])
