"""Training and explaining at the ends of the number formats: every loss, gradient and map is finite, and the loss is
that of the formulas in float64."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from fuzzing import cases
from hypothesis import given, strategies as st
from torch import Tensor, nn

import calm
from calm.model import CalmModel
from calm.output import MAP_KINDS, CalmOutput

pytestmark = pytest.mark.stress

SCALE = 256.0
"""Head weights: features stay small where activations are extreme, so that no true gradient is beyond float16."""

FORMATS = ("float64", "float32", "bfloat16", "float16", "autocast bfloat16", "autocast float16")
LEVELS = (0.0, 1.0, -1.0, 30.0, 1e4, -1e4, 6e4, -6e4, 1e6, -1e6)
"""What activations are drawn from: all that a float16 holds, more than that, and ties."""


class Channels(nn.Module):
    """Features of as many channels as asked, by averaging over cells of 4 x 4 pixels."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> Tensor:
        cells = nn.functional.avg_pool2d(images, 4)
        return cells.repeat(1, -(-self.out_channels // 3), 1, 1)[:, : self.out_channels]


def exact_model(classes: int, method: str, activation: str, denominator: str) -> CalmModel:
    """A model whose activations are SCALE times its C + 1 feature channels: class scores, then location score."""
    model = calm.create_model(
        Channels(classes + 1), classes, method, prior_activation=activation, prior_denominator=denominator
    )
    with torch.no_grad():
        eye = SCALE * torch.eye(classes + 1)[:, :, None, None]
        model.head.conv_last.weight.copy_(eye[:classes])
        model.head.conv_last.bias.zero_()
        if method != "cam":
            model.head.attention.weight.copy_(eye[classes:])
            model.head.attention.bias.zero_()
    return model


def formatted(model: CalmModel, features: Tensor, name: str) -> tuple[CalmModel, Tensor, AbstractContextManager]:
    """Model and features in a number format, and the context to compute in."""
    kind, _, automatic = name.rpartition(" ")
    dtype = getattr(torch, automatic)
    if kind:
        return model.float(), features.float(), torch.autocast("cpu", dtype)
    return model.to(dtype), features.to(dtype), nullcontext()


@st.composite
def activations(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Class scores (B, C, h, w) and location scores (B, 1, h, w), extreme in one way or another."""
    batch, classes = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5]))
    height, width = draw(st.sampled_from([(1, 1), (1, 3), (3, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    levels = torch.tensor(draw(st.lists(st.sampled_from(LEVELS), min_size=1, max_size=3, unique=True)))

    def grid(channels: int) -> Tensor:
        return levels[torch.randint(len(levels), (batch, channels, height, width), generator=generator)]

    logits, scores = grid(classes), grid(1)
    match draw(st.sampled_from(["drawn", "no mass", "one location", "constant"])):
        case "no mass":
            scores = torch.full_like(scores, -6e4)
        case "one location":
            scores = torch.full_like(scores, -6e4)
            scores[..., 0, 0] = 6e4
        case "constant":
            logits = torch.full_like(logits, float(levels[0]))
    return logits, scores


@st.composite
def targets_for(draw: st.DrawFn, batch: int, classes: int) -> Tensor:
    """Class indices, or soft targets with zeros; often all the same, so that the other classes are in no image."""
    same = draw(st.booleans())
    first = draw(st.integers(0, classes - 1))
    hard = torch.tensor([first if same else draw(st.integers(0, classes - 1)) for _ in range(batch)])
    if draw(st.booleans()):
        return hard
    soft = nn.functional.one_hot(hard, classes).double()
    share = draw(st.sampled_from([0.0, 0.1, 0.5]))
    return (1 - share) * soft + share * soft.flip(0).roll(1, 1)


def log_joint(logits: Tensor, scores: Tensor, activation: str) -> Tensor:
    """log p(y, z | x) in float64, in log space: probabilities such as e^-60000 are no float64."""
    logits, scores = logits.double(), scores.double()[:, 0]
    if activation == "exp":
        mass = scores
    elif activation == "relu":
        mass = scores.clamp(min=0).log()
        mass = torch.where(mass.isneginf().flatten(1).all(1)[:, None, None], 0.0, mass)
    else:
        mass = torch.where(scores < -30, scores, nn.functional.softplus(scores).log())
    prior = mass - mass.flatten(1).logsumexp(1)[:, None, None]
    return logits - logits.logsumexp(1, keepdim=True) + prior[:, None]


def expected_loss(
    logits: Tensor, scores: Tensor, targets: Tensor, method: str, activation: str, temperature: float, largest: float
) -> float:
    """The formulas of the losses, in float64, for soft targets; hard ones as their one-hot rows. ``largest`` is the
    largest activation that the format holds: more is cut to it."""
    classes = logits.shape[1]
    soft = targets if targets.ndim == 2 else nn.functional.one_hot(targets, classes).double()
    if method == "cam":
        means = logits.double().mean((2, 3)).clamp(-largest, largest)
        return float(-(soft * means.log_softmax(1)).sum(1).mean())
    logits, scores = logits.clamp(-largest, largest), scores.clamp(-largest, largest)
    joint = log_joint(logits, scores, activation).flatten(2)
    if method == "calm-ml":
        losses = -joint.logsumexp(2)
    else:
        tempered = torch.where(joint.isneginf(), joint, temperature * joint)
        q = tempered.softmax(2)
        losses = -torch.where(q > 0, q * joint, 0.0).sum(2)
    return float(torch.where(soft > 0, soft * losses, 0.0).sum(1).mean())


def assert_finite(loss: Tensor, model: CalmModel, *inputs: Tensor) -> None:
    assert torch.isfinite(loss)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    for tensor in inputs:
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()


METHODS = st.sampled_from(["cam", "calm-em", "calm-ml"])
PRIORS = st.sampled_from(["softplus", "relu", "exp"])
DENOMINATORS = st.sampled_from(["differentiated", "constant"])


@cases(250, 5000)
@given(
    st.data(),
    activations(),
    METHODS,
    PRIORS,
    DENOMINATORS,
    st.sampled_from(FORMATS),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_loss_of_extreme_activations_is_that_of_the_formulas(
    data: st.DataObject,
    grids: tuple[Tensor, Tensor],
    method: str,
    activation: str,
    denominator: str,
    name: str,
    beta: float,
) -> None:
    logits, scores = grids
    targets = data.draw(targets_for(len(logits), logits.shape[1]))
    temperature = beta if method == "calm-em" else 1.0
    model = exact_model(logits.shape[1], method, activation, denominator)
    model, features, computing = formatted(model, torch.cat([logits, scores], 1) / SCALE, name)
    features.requires_grad_()
    with computing:
        output = model.head(features)
        loss = model.output_loss(output, targets, temperature=temperature)
    reached = features.detach().double() * SCALE
    largest = 65504 if name in ("float16", "autocast float16") else math.inf
    expected = expected_loss(reached[:, :-1], reached[:, -1:], targets, method, activation, temperature, largest)
    rounding = 3e-2 if "bfloat16" in name else 4e-3 if "float16" in name else 1e-5
    # Of equal scores that round apart one wins: the formulas are compared where the format tells them apart.
    assert float(loss.detach()) == pytest.approx(
        expected, rel=rounding, abs=rounding * float(reached.abs().max()) + 1e-4
    )
    assert_finite(loss, model, features)


@cases(60, 1000)
@given(
    st.data(),
    activations(),
    activations(),
    PRIORS,
    DENOMINATORS,
    st.sampled_from(FORMATS),
    st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_loss_with_an_extreme_teacher_is_finite(
    data: st.DataObject,
    grids: tuple[Tensor, Tensor],
    others: tuple[Tensor, Tensor],
    activation: str,
    denominator: str,
    name: str,
    beta: float,
) -> None:
    logits, scores = grids
    targets = data.draw(targets_for(len(logits), logits.shape[1]))
    model = exact_model(logits.shape[1], "calm-em", activation, denominator)
    model, features, computing = formatted(model, torch.cat([logits, scores], 1) / SCALE, name)
    picked = [others[0].flatten()[torch.arange(logits.numel()) % others[0].numel()].view_as(logits)]
    picked += [others[1].flatten()[torch.arange(scores.numel()) % others[1].numel()].view_as(scores)]
    theirs = (torch.cat(picked, 1) / SCALE).to(features.dtype)
    features.requires_grad_()
    with computing:
        with torch.no_grad():
            teacher = model.head(theirs)
        loss = model.output_loss(model.head(features), targets, temperature=beta, teacher=teacher)
    assert_finite(loss, model, features)


@cases(80, 1000)
@given(activations(), PRIORS, st.sampled_from(FORMATS), st.booleans())
def test_attribute_of_extreme_activations_is_finite_and_sums_right(
    grids: tuple[Tensor, Tensor], activation: str, name: str, is_cam: bool
) -> None:
    logits, scores = grids
    classes = logits.shape[1]
    model = exact_model(classes, "cam" if is_cam else "calm-em", activation, "differentiated")
    model, features, computing = formatted(model, torch.cat([logits, scores], 1) / SCALE, name)
    targets = torch.arange(classes).expand(len(logits), -1)
    rounding = 1e-4 + float(logits.abs().max()) * 2**-22  # a float32 near the logits is no finer
    with torch.no_grad(), computing:
        output = model.head(features)
        assert torch.isfinite(output.log_probs).all()
        torch.testing.assert_close(
            output.probs.sum(1), torch.ones(len(logits), dtype=output.probs.dtype), rtol=0, atol=rounding
        )
        for kind, spec in MAP_KINDS.items():
            if output.family not in spec.families:
                continue
            superclass = {c: range(classes) for c in range(classes)} if spec.over == "superclass" else None
            for size in (None, (8, 8)):
                maps = output.attribute(targets, kind, superclass=superclass, size=size)
                assert torch.isfinite(maps).all(), kind
            if kind in ("posterior", "prior"):
                sums = output.attribute(targets, kind).sum((2, 3))
                torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=rounding)
            if kind == "joint":
                sums = output.attribute(targets, kind).sum((2, 3))
                torch.testing.assert_close(sums, output.probs, rtol=0, atol=rounding)


@pytest.mark.parametrize("activation", ["softplus", "relu", "exp"])
@pytest.mark.parametrize("name", FORMATS[1:])
@pytest.mark.parametrize("method", ["calm-em", "calm-ml", "cam"])
def test_model_loss_is_finite_for_extreme_heads(method: str, name: str, activation: str) -> None:
    """The whole way, `CalmModel.loss`: one image, one class, or a class that no image has; scores far off."""
    for batch, classes, push in ((1, 1, 0.0), (1, 3, 1e3), (2, 3, -1e3), (2, 3, 0.0)):
        model = calm.create_model("tiny_resnet", classes, method, prior_activation=activation)
        with torch.no_grad():
            model.head.conv_last.bias.copy_(push * torch.arange(classes))
            if method != "cam":
                model.head.attention.bias.fill_(push)
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        model, images, computing = formatted(model, images, name)
        with computing:
            loss = model.train().loss(images, torch.zeros(batch, dtype=torch.int64))
        assert_finite(loss, model)


@pytest.mark.parametrize("activation", ["softplus", "exp"])
def test_log_prior_of_tiny_activations_sums_to_one(activation: str) -> None:
    scores = torch.full((1, 1, 2, 3), -6e4)
    scores[..., 0, 0] += 1
    prior = CalmOutput(torch.zeros(1, 2, 2, 3), scores, activation).prior
    assert float(prior.sum()) == pytest.approx(1, abs=1e-6)
    assert float(prior[0, 0, 0] / prior[0, 0, 1]) == pytest.approx(math.e, rel=1e-5)


def test_loss_of_an_impossible_image_is_large_but_finite() -> None:
    """By hand: two locations, the target's logit 1e4 below the other's at both: -log p = 1e4."""
    for method in ("calm-em", "calm-ml"):
        model = exact_model(2, method, "exp", "differentiated")
        features = torch.zeros(1, 3, 1, 2)
        features[0, 1] = 1e4 / SCALE
        loss = model.loss_from_features(features, torch.tensor([0])).detach()
        # calm-em's loss also has the entropy of q: -sum q log(q p) = 1e4 + log 2
        assert float(loss) == pytest.approx(1e4 + (math.log(2) if method == "calm-em" else 0), rel=1e-6)
