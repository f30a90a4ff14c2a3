"""The exponent between CALM (1) and CAM (0): predictions, maps and losses against the oracle, in float64."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, activations_of, shapes
from hypothesis import given, settings, strategies as st
from torch import Tensor
from torch.testing import assert_close
from train_cases import tiny_config, tiny_net, write_squares

import calm
from calm import latent
from calm.acol import AcolCalmOutput
from calm.errors import CalmError
from calm.evaluate import model_subject
from calm.heads import CalmHead
from calm.kinds import MAP_KINDS
from calm.output import CalmOutput, CamOutput
from calm.train.config import ModelOptions
from calm.train.run import train

exponents = st.sampled_from([0.0, 1e-6, 1e-4, 0.01, 0.0999, 0.1, 0.3, 0.7, 0.999]) | st.floats(1e-6, 1)
seeds = st.integers(0, 10_000)


def output_of(logits: Tensor, scores: Tensor, exponent: float, activation: str = "softplus") -> CalmOutput:
    return CalmOutput(logits, scores, activation, pooling_exponent=exponent)


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    seed=seeds,
    exponent=exponents,
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_predictions_and_maps_equal_the_oracle(shape, seed, exponent, activation, dtype):
    given_ = [tensor.to(dtype) for tensor in activations_of(shape, seed, 2.0)]
    output, wide = output_of(*given_, exponent, activation), [tensor.double() for tensor in given_]
    probs = oracle.pooled(*wide, activation, exponent)
    posterior = oracle.responsibilities(*wide, activation, exponent)
    bound = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    assert output.probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(output.probs.double(), probs, **bound)
    assert_close(output.posterior.double(), posterior, **bound)
    assert_close(output.joint.double(), probs[..., None, None] * posterior, **bound)
    assert_close(output.prior.double(), oracle.prior(wide[1], activation), **bound)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds, exponent=exponents, activation=st.sampled_from(ACTIVATIONS))
def test_maps_sum_to_what_docs_say(shape, seed, exponent, activation):
    output = output_of(*activations_of(shape, seed, 3.0), exponent, activation)
    assert_close(output.joint.sum(dim=(-2, -1)), output.probs)
    assert_close(output.probs.sum(dim=1), torch.ones(shape[0]).double())
    assert_close(output.posterior.sum(dim=(-2, -1)), torch.ones(shape[:2]).double())
    classes = torch.arange(shape[1]).expand(shape[0], -1)
    for kind in ("joint", "posterior"):
        assert_close(output.attribute(classes, kind), getattr(output, kind))
    targets = classes[:, 0]
    assert_close(output.target_log_joint(targets), output.log_joint[:, 0])
    assert_close(output.mass(targets, (0, 0, 1, 1)), output.probs[:, 0])


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, exponent=st.floats(0.01, 1), activation=st.sampled_from(["softplus", "exp"]))
def test_evidence_falls_short_of_the_log_odds_by_a_divergence(shape, seed, exponent, activation):
    """log M(y) is the sum of the evidence and KL(prior, posterior) / a: the difference of classes, too, as docs say."""
    output = output_of(*activations_of(shape, seed, 2.0), exponent, activation)
    classes = torch.arange(shape[1]).expand(shape[0], -1)
    evidence = output.attribute(classes, "evidence").sum(dim=(-2, -1))
    log_prior = output.log_prior[:, None]
    divergence = (log_prior.exp() * (log_prior - output.log_posterior)).sum(dim=(-2, -1))
    odds = output.log_probs - output.log_probs[:, :1]
    assert_close(odds, (evidence + divergence / exponent) - (evidence + divergence / exponent)[:, :1])


@settings(max_examples=40, deadline=None)
@given(shape=shapes, seed=seeds, activation=st.sampled_from(ACTIVATIONS))
def test_at_0_evidence_sums_to_the_log_odds_and_maps_are_the_prior(shape, seed, activation):
    output = output_of(*activations_of(shape, seed, 2.0), 0.0, activation)
    evidence = output.attribute(torch.arange(shape[1]).expand(shape[0], -1), "evidence").sum(dim=(-2, -1))
    assert_close(evidence - evidence[:, :1], output.log_probs - output.log_probs[:, :1])
    assert_close(output.posterior, output.prior[:, None].expand(-1, shape[1], -1, -1))


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds)
def test_at_0_with_a_uniform_prior_it_is_cam(shape, seed):
    logits, _ = activations_of(shape, seed, 2.0)
    channels = shape[1]
    cam = CamOutput.of(logits, torch.eye(channels).double()[..., None, None], torch.zeros(channels).double())
    output = output_of(logits, torch.zeros_like(logits[:, :1]), 0.0)
    targets = torch.zeros(shape[0], dtype=torch.int64)
    assert_close(output.log_probs, cam.log_probs)
    assert_close(output.loss(targets), cam.loss(targets))
    one, other = (o.attribute([[0, channels - 1]] * shape[0], "evidence") for o in (output, cam))
    assert_close(one[:, 0] - one[:, 1], other[:, 0] - other[:, 1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_at_1_everything_is_equal_to_the_bit(activation):
    logits, scores = (tensor.float() for tensor in activations_of((2, 4, 3, 3), 1, 2.0))
    plain, output = CalmOutput(logits, scores, activation), output_of(logits, scores, 1.0, activation)
    log_joint = logits.log_softmax(dim=1) + latent.log_prior(scores, activation)[:, None]
    assert torch.equal(output.log_probs, log_joint.logsumexp(dim=(-2, -1)))
    assert torch.equal(output.log_joint, log_joint)
    targets = torch.tensor([3, 0])
    for method in ("calm-em", "calm-ml"):
        assert torch.equal(output.loss(targets, method=method), plain.loss(targets, method=method))


@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=seeds, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_small_exponent_is_close_to_0(shape, seed, dtype):
    given_ = [tensor.to(dtype).requires_grad_() for tensor in activations_of(shape, seed, 2.0)]
    targets = torch.zeros(shape[0], dtype=torch.int64)
    near, limit = (output_of(*given_, exponent) for exponent in (1e-4, 0.0))
    assert_close(near.log_probs, limit.log_probs, rtol=1e-3, atol=1e-2)
    gradients = [torch.autograd.grad(o.loss(targets, method="calm-ml"), given_) for o in (near, limit)]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=1e-2, atol=5e-3)


@settings(max_examples=30, deadline=None)
@given(
    shape=shapes,
    seed=seeds,
    exponent=st.floats(0.05, 0.99),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    activation=st.sampled_from(ACTIVATIONS),
    soft=st.booleans(),
)
def test_losses_equal_the_formula(shape, seed, exponent, temperature, activation, soft):
    """EM: -sum q (log p(y | x, z) + log p(z | x) / a) + log Z, where q is a tempered posterior; ML: -log p(y | x)."""
    logits, scores = activations_of(shape, seed, 2.0)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(shape[:2], generator=generator, dtype=torch.float64)
    rows = rows / rows.sum(dim=1, keepdim=True) if soft else F.one_hot(rows.argmax(dim=1), shape[1]).double()
    where, what = oracle.prior(scores, activation)[:, None], oracle.conditional(logits)
    q = oracle.responsibilities(logits, scores, activation, exponent) ** temperature
    q = torch.where(where == 0, 0, q / q.sum(dim=(-2, -1), keepdim=True))
    terms = torch.where(q == 0, 0, q * (what.log() + where.log() / exponent))
    log_z = ((where * what**exponent).sum(dim=(-2, -1)) ** (1 / exponent)).sum(dim=1, keepdim=True).log()
    em = (rows * (log_z - terms.sum(dim=(-2, -1)))).sum(dim=1).mean()
    targets = rows if soft else rows.argmax(dim=1)
    output = output_of(logits, scores, exponent, activation)
    assert_close(output.loss(targets, temperature=temperature), em)
    ml = -(rows * oracle.pooled(logits, scores, activation, exponent).log()).sum(dim=1).mean()
    assert_close(output.loss(targets, method="calm-ml"), ml)


@settings(max_examples=20, deadline=None)
@given(shape=shapes, seed=seeds, exponent=exponents, activation=st.sampled_from(ACTIVATIONS))
def test_em_and_ml_have_the_same_gradient(shape, seed, exponent, activation):
    given_ = [tensor.requires_grad_() for tensor in activations_of(shape, seed, 2.0)]
    targets = torch.zeros(shape[0], dtype=torch.int64)
    output = output_of(*given_, exponent, activation)
    gradients = [torch.autograd.grad(output.loss(targets, method=m), given_) for m in ("calm-em", "calm-ml")]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("exponent", [0.0, 1e-4, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_losses_pass_gradcheck(exponent, activation):
    logits, scores = (tensor.requires_grad_() for tensor in activations_of((2, 3, 2, 2), 4, 1.5))
    targets = torch.tensor([0, 2])

    def ml(logits: Tensor, scores: Tensor) -> Tensor:
        output = output_of(logits, scores, exponent, activation)
        return output.loss(targets, method="calm-ml", prior_weight=0.1, cam_weight=0.5)

    assert torch.autograd.gradcheck(ml, (logits, scores), rtol=1e-4)


@pytest.mark.parametrize("exponent", [0.0, 1e-4, 0.09, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_activations_stay_finite(exponent, activation):
    """One location has all the prior, or each is sure of another class; in float32, with two thousand classes."""
    logits = torch.zeros(2, 2000, 2, 2)
    logits[0, :4] = 3000 * torch.eye(4).view(4, 2, 2)
    logits[1, 7], logits[1, 8, 0, 0] = -1e4, 1e4
    scores = torch.tensor([[[[-1e4, -1e4], [-1e4, 9e3]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    given_ = logits.requires_grad_(), scores.requires_grad_()
    output = output_of(*given_, exponent, activation)
    assert_close(output.probs.sum(dim=1), torch.ones(2))
    assert_close(output.joint.sum(dim=(-2, -1)), output.probs)
    assert output.probs[0, 3] > 0.999
    for method in ("calm-em", "calm-ml"):
        loss = output.loss(torch.tensor([3, 9]), method=method)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, given_))


@pytest.mark.parametrize("exponent", [0.0, 0.3])
def test_maps_with_another_prior_keep_the_exponent(exponent):
    output = output_of(*activations_of((2, 3, 2, 2), 5, 2.0), exponent)
    flat = output_of(output.logits, torch.zeros_like(output.scores), exponent)
    for kind in ("joint", "posterior", "prior", "evidence"):
        assert_close(output.attribute([0, 2], kind, prior_exponent=0.0), flat.attribute([0, 2], kind))


@pytest.mark.parametrize("exponent", [0.0, 0.3])
def test_acol_is_the_mixture_of_both_heads(exponent):
    first, second = (output_of(*activations_of((2, 3, 2, 2), seed, 2.0), exponent) for seed in (6, 7))
    output, targets = AcolCalmOutput(first, second), torch.tensor([0, 2])
    joint = (first.joint + second.joint) / 2
    assert_close(output.joint, joint)
    assert_close(output.probs, joint.sum(dim=(-2, -1)))
    assert_close(output.attribute(targets, "joint"), joint[range(2), targets])
    assert_close(output.target_log_joint(targets).exp(), joint[range(2), targets])
    assert_close(output.loss(targets), first.loss(targets) + second.loss(targets))
    flat = output.attribute(targets, "joint", prior_exponent=0.0)
    mean = sum(one.attribute(targets, "joint", prior_exponent=0.0) for one in (first, second)) / 2
    assert_close(flat, mean)


@pytest.mark.parametrize("exponent", [0.0, 0.3])
@pytest.mark.parametrize("acol_threshold", [None, 0.7])
def test_models_are_saved_loaded_and_read_with_their_exponent(exponent, acol_threshold, tmp_path):
    options = {"pooling_exponent": exponent, "prior_activation": "exp", "acol_threshold": acol_threshold}
    model = calm.create_model("tiny_resnet", 3, **options).eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded = calm.load(model.save_pretrained(tmp_path / "model"))
    with torch.no_grad():
        output, again = model(images), loaded(images)
    assert loaded.config.pooling_exponent == exponent
    assert model_subject(loaded, method="joint").label == f"CALM-EM exponent {exponent:g} joint"
    assert torch.equal(output.probs, again.probs)
    assert not torch.allclose(output.probs, CalmOutput(output.logits, output.scores, "exp").probs, atol=1e-6)
    targets = torch.tensor([2, 0])
    for kind in (name for name, spec in MAP_KINDS.items() if "calm" in spec.families and spec.over == "target"):
        assert torch.equal(model.attribute(images, targets, kind), again.attribute(targets, kind))
    assert ("joint and posterior maps show the prior" in model.caution) == (exponent == 0)


def test_cards_without_an_exponent_are_of_the_published_model(tmp_path):
    folder = calm.create_model("tiny_resnet", 3).save_pretrained(tmp_path / "model")
    card = folder / "calm.json"
    text = card.read_text()
    written = [line for line in text.splitlines() if "pooling_exponent" in line]
    assert len(written) == 1
    before, _, after = text.partition(written[0])
    card.write_text(before.rstrip().rstrip(",") + after)
    assert calm.load(folder).config.pooling_exponent == 1


@pytest.mark.parametrize("exponent", [0.0, 0.3])
def test_em_loss_of_a_head_trains_both_of_its_layers(exponent):
    torch.manual_seed(0)
    head, features, targets = CalmHead(8, 3, pooling_exponent=exponent), torch.rand(6, 8, 4, 4), torch.arange(6) % 3
    features[range(6), targets, :2, :2] += 2  # a channel that tells the class, in a corner
    optimizer = torch.optim.SGD(head.parameters(), lr=2)
    losses = []
    for _ in range(30):
        loss = head(features).loss(targets, method="calm-ml")
        losses.append(loss.item())
        optimizer.zero_grad()
        calm.em_loss(head(features), targets).backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert head(features).prior[:, :2, :2].sum(dim=(-2, -1)).min() > 0.35  # of a quarter of the grid
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters() if parameter.ndim > 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling_exponent": 1.5}, "pooling_exponent is 1.5: give 1"),
        ({"pooling_exponent": -0.1}, "pooling_exponent is -0.1: give 1"),
        ({"pooling_exponent": 1e-9}, "pooling_exponent is 1e-09: give 1"),
        ({"pooling_exponent": math.nan}, "pooling_exponent is nan: give 1"),
        ({"pooling_exponent": 0.5, "method": "cam"}, "CAM has no prior"),
        ({"pooling_exponent": 0.5, "prior_denominator": "constant"}, "take prior_denominator differentiated"),
    ],
)
def test_create_model_refuses_what_has_no_meaning(options, message):
    with pytest.raises(CalmError, match=message):
        calm.create_model("tiny_resnet", 3, **options)


def test_loss_at_0_refuses_an_e_step_that_has_no_limit():
    output = output_of(*activations_of((2, 3, 2, 2), 8, 1.0), 0.0)
    for options in ({"temperature": 0.5}, {"teacher": output}):
        with pytest.raises(CalmError, match="no limit at pooling_exponent 0"):
            output.loss(torch.tensor([0, 1]), **options)


@pytest.mark.parametrize(("exponent", "method"), [(0.0, "calm-em"), (0.3, "calm-ml")])
def test_a_run_keeps_its_exponent(exponent, method, tmp_path):
    """That of exponent 0 is on cached features of a frozen backbone."""
    options = ModelOptions(pretrained=False, pooling_exponent=exponent, freeze=exponent == 0)
    config = tiny_config(write_squares(tmp_path / "data"), tmp_path / "run", method=method, model=options, epochs=1)
    train(config, backbone=tiny_net(), quiet=True)
    model = calm.load(tmp_path / "run", backbone=tiny_net())
    assert model.config.pooling_exponent == exponent
    assert model.flat
    assert f"warning: {model.caution}" in (tmp_path / "run" / "log.txt").read_text()
    model.training_summary["posterior_entropy_relative"] = 0.5
    assert ("show the prior for every class" in model.caution) == (exponent == 0)


def test_an_exported_file_has_the_exponent(tmp_path):
    """The export itself compares probabilities and maps with PyTorch's; below 0.1 is the longest way."""
    pytest.importorskip("onnxruntime", reason="needs the extra `export`")
    body, size = torch.nn.Conv2d(3, 4, 5, stride=4, padding=2), calm.Preprocessing(size=(16, 20))
    model = calm.create_model(body, 5, pooling_exponent=0.05, preprocessing=size)
    torch.nn.init.normal_(model.head.attention.weight)
    found = calm.export(model, tmp_path / "a.onnx", dynamic_size=False)
    assert found.metadata["model"]["pooling_exponent"] == 0.05
    assert found.error < 1e-5
