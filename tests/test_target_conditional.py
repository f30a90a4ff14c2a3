"""The training path from features to the target's row: values, gradients, and what it never makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from calm.errors import CalmError
from calm.fused import HELD_AT_ONCE, everywhere, some_at_a_time, target_conditional, where
from calm.latent import draw
from calm.model import CalmHead
from calm.output import CalmOutput

shapes = st.tuples(*(st.integers(1, high) for high in (3, 5, 7, 4)))  # images, channels, locations, classes


def made(shape, seed, *, location_row=True, bias=True, channels_last=False):
    """Features, weight, bias and targets, in float64."""
    images, channels, locations, classes = shape
    source = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=source, dtype=torch.float64)

    features = normal(images, channels, locations)
    if channels_last:
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    weight = normal(classes + location_row, channels)
    targets = torch.randint(classes, (images,), generator=source)
    return features, weight, normal(classes + location_row) if bias else None, targets


def straightforward(features, weight, bias, targets, classes):
    """The same from the formula, by autograd, with every logit kept."""
    activations = torch.einsum("rd,bdn->brn", weight, features)
    if bias is not None:
        activations = activations + bias[:, None]
    conditional = activations[:, :classes].log_softmax(1)
    row = torch.stack([one[target] for one, target in zip(conditional, targets.tolist(), strict=True)])
    return row, activations[:, classes] if len(weight) > classes else torch.zeros_like(row)


def pieces_of(kind, shape, seed):
    """Pieces, and the mask of the locations in them."""
    images, _, locations, _ = shape
    all_of_them = torch.ones(images, locations, dtype=torch.bool)
    if kind == "everywhere":
        return everywhere(images), all_of_them
    if kind == "halves":
        halves = [slice(0, (locations + 1) // 2), slice((locations + 1) // 2, locations)][: min(locations, 2)]
        return [(slice(i, i + 1), half) for i in range(images) for half in halves], all_of_them
    mask = torch.rand(images, locations, generator=torch.Generator().manual_seed(seed)) < 0.5
    return where(mask), mask


@pytest.mark.parametrize("kind", ["everywhere", "halves", "where"])
@pytest.mark.parametrize("keep", [True, False])
@settings(max_examples=30, deadline=None)
@given(shape=shapes, seed=st.integers(0, 10_000), row=st.booleans(), bias=st.booleans(), last=st.booleans())
def test_values_and_gradients_are_those_of_the_formula(kind, keep, shape, seed, row, bias, last):
    features, weight, offset, targets = made(shape, seed, location_row=row, bias=bias, channels_last=last)
    pieces, scored = pieces_of(kind, shape, seed)
    inputs = [t.requires_grad_() for t in (features, weight, offset) if t is not None]
    got = target_conditional(features, weight, offset, targets, shape[3], pieces, keep=keep)
    want = straightforward(features, weight, offset, targets, shape[3])
    for one, other in zip(got, want, strict=True):
        assert_close(one[scored], other[scored])
    assert got[0][~scored].isneginf().all()
    assert not got[1][~scored].any()
    factors = [torch.randn(w.shape, dtype=torch.float64) for w in want]

    def total(values):
        return sum((v[scored] * f[scored]).sum() for v, f in zip(values, factors, strict=True))

    mine = torch.autograd.grad(total(got), inputs)
    theirs = torch.autograd.grad(total(want), inputs)
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("kind", ["everywhere", "halves", "where"])
def test_gradcheck(kind, keep):
    shape = (2, 3, 5, 4)
    features, weight, bias, targets = made(shape, 3)
    pieces, scored = pieces_of(kind, shape, 3)

    def values(*inputs):
        row, scores = target_conditional(*inputs, targets, 4, pieces, keep=keep)
        return row[scored], scores

    assert torch.autograd.gradcheck(values, tuple(t.requires_grad_() for t in (features, weight, bias)))


def test_a_second_backward_pass_gives_the_same_gradient():
    features, weight, bias, targets = made((2, 3, 5, 4), 5)
    weight.requires_grad_()
    row, _ = target_conditional(features, weight, bias, targets, 4, everywhere(2))
    (first,) = torch.autograd.grad(row.sum(), weight, retain_graph=True)
    assert_close(torch.autograd.grad(row.sum(), weight)[0], first)


@pytest.mark.parametrize("options", [{}, {"method": "calm-ml"}, {"samples": 3}], ids=str)
@pytest.mark.parametrize("activation", ["softplus", "relu"])
def test_differentiating_twice_is_refused(options, activation):
    head = CalmHead(3, 4, activation).double()
    features = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 3])
    loss = head(features).loss(targets, **options)
    for once in torch.autograd.grad(loss, [features, head.conv_last.weight], create_graph=True):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated twice: read output\.logits"):
            torch.autograd.grad(once.square().sum(), features, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        torch.autograd.functional.hessian(lambda x: head(x).loss(targets, **options), features)


def test_a_gradient_of_a_constant_factor_is_no_less_a_gradient():
    features, weight, bias, targets = made((2, 3, 5, 4), 5)
    features.requires_grad_()
    row, _ = target_conditional(features, weight, bias, targets, 4, everywhere(2))
    (once,) = torch.autograd.grad(row.sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        (row.sum() + once.square().sum()).backward()


def test_reading_the_logits_first_allows_differentiating_twice():
    head = CalmHead(3, 4).double()
    features = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    targets = torch.tensor([1, 3])

    def loss(features):
        output = head(features)
        assert output.logits.requires_grad
        return output.loss(targets, method="calm-ml")

    assert torch.autograd.gradgradcheck(loss, features.requires_grad_())


@pytest.mark.parametrize("activation", ["softplus", "relu", "exp"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("method", ["calm-em", "calm-ml"])
@pytest.mark.parametrize("skipping", [True, False])
def test_losses_from_features_are_those_from_activations(
    activation, keep, channels_last, method, skipping, monkeypatch
):
    if skipping:
        monkeypatch.setattr("calm.fused.WORTH_SKIPPING", 0)
    torch.manual_seed(7)
    head = CalmHead(6, 5, activation, keep_logits=keep).double()
    features = torch.randn(4, 6, 3, 4, dtype=torch.float64)
    with torch.no_grad():  # one image whose ReLU prior is dead, one with a single location alive
        features[0] -= head.attention.weight[0] * 100
        features[1] -= head.attention.weight[0] * 100
        features[1, :, 1, 1] += head.attention.weight[0, :, 0, 0] * 200
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    targets = torch.tensor([0, 4, 2, 2])
    inputs = [features.requires_grad_(), *head.parameters()]
    losses = (
        head(features).loss(targets, method=method),
        CalmOutput(head.conv_last(features), head.attention(features), activation).loss(
            targets, method=method
        ),
    )
    assert_close(*losses)
    grads = [torch.autograd.grad(loss, inputs) for loss in losses]
    for one, other in zip(*grads, strict=True):
        assert_close(one, other)
    assert grads[0][0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_half_precision_is_as_close_to_the_truth_as_its_rounding(dtype, channels_last):
    features, weight, bias, targets = made((3, 8, 20, 6), 11, channels_last=channels_last)
    half = [t.to(dtype).requires_grad_() for t in (features, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in half]
    row, scores = target_conditional(*half, targets, 6, everywhere(3))
    assert row.dtype == scores.dtype == torch.float32
    want, wanted = straightforward(*exact, targets, 6)
    step = torch.finfo(dtype).eps
    assert_close(row.double(), want, rtol=4 * step, atol=20 * step)
    assert_close(scores.double(), wanted, rtol=4 * step, atol=20 * step)
    mine = torch.autograd.grad(row.sum() + scores.sum(), half)
    theirs = torch.autograd.grad(want.sum() + wanted.sum(), exact)
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < 8 * step * other.norm()


def test_autocast_scores_in_its_dtype_and_gives_float32_gradients():
    torch.manual_seed(0)
    head = CalmHead(8, 6)
    features = torch.randn(2, 8, 3, 3, requires_grad=True)
    targets = torch.tensor([5, 0])
    exact = head(features).loss(targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(features).loss(targets)
    assert loss.dtype == torch.float32
    assert loss != exact
    assert_close(loss, exact, rtol=0.02, atol=0.02)
    mine = torch.autograd.grad(loss, [features, *head.parameters()])
    theirs = torch.autograd.grad(exact, [features, *head.parameters()])
    for one, other in zip(mine, theirs, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.05 * other.norm() + 1e-3


def test_frozen_features_or_weights_get_no_gradient_and_change_none():
    features, weight, bias, targets = made((2, 3, 4, 5), 1)
    both = [features.clone().requires_grad_(), weight.clone().requires_grad_()]
    row, _ = target_conditional(*both, bias, targets, 5, everywhere(2))
    want = torch.autograd.grad(row.sum(), both)
    for number in (0, 1):
        inputs = [features, weight]
        inputs[number] = inputs[number].clone().requires_grad_()
        row, _ = target_conditional(*inputs, bias, targets, 5, everywhere(2))
        assert_close(torch.autograd.grad(row.sum(), inputs[number])[0], want[number])


class Made(TorchDispatchMode):
    """The number of elements of every new tensor."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.data_ptr() for t in args if isinstance(t, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.data_ptr() not in known:
            self.sizes.append(result.numel())
        return result


def step(head, features, targets, **options):
    with Made() as made_in:
        head(features).loss(targets, **options).backward()
    return made_in.sizes


def test_a_training_step_makes_one_grid_of_all_classes():
    head, features = CalmHead(4, 300), torch.randn(2, 4, 8, 8)
    sizes = step(head, features.requires_grad_(), torch.tensor([3, 4]))
    assert sum(size >= 300 * 2 * 64 for size in sizes) == 1


def test_without_keeping_logits_no_tensor_grows_with_the_classes_times_the_locations():
    classes = 20_000
    head, features = CalmHead(2, classes, keep_logits=False), torch.randn(2, 2, 24, 24)
    sizes = step(head, features.requires_grad_(), torch.tensor([3, 4]))
    assert max(sizes) <= HELD_AT_ONCE + 2**17 < 2 * classes * 24 * 24
    assert step(CalmHead(2, classes), features, torch.tensor([3, 4]))  # the same head can keep them, too


def test_dead_locations_are_skipped_where_classes_are_many_and_they_are_many():
    for classes, dead, skipped in ((20, 15, False), (400, 15, True), (400, 1, False)):
        head = CalmHead(2, classes, "relu")
        with torch.no_grad():
            head.attention.weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
            head.attention.bias.zero_()
        features = torch.ones(1, 2, 4, 4)
        features[0, 0].view(-1)[:dead] = -1
        row = head(features.requires_grad_()).target_rows(torch.tensor([3]))
        assert int(row.isneginf().sum()) == dead  # no mass, either way
        made = step(head, features, torch.tensor([3]))
        assert (max(made) < 16 * classes) == skipped


def test_pieces_cover_every_location_once():
    for classes in (1, 100, 50_000, 10**7):
        seen = torch.zeros(3, 100, dtype=torch.int64)
        for image, place in some_at_a_time(3, 100, classes):
            seen[image, place] += 1
        assert (seen == 1).all()


def test_a_layer_with_a_hook_is_called():
    head = CalmHead(3, 4)
    seen = []
    head.conv_last.register_forward_hook(lambda *_: seen.append(1))
    head(torch.randn(1, 3, 2, 2)).loss(torch.tensor([0])).backward()
    assert seen == [1]


@pytest.mark.parametrize("listen", ["backward", "before backward", "global"])
def test_whoever_listens_to_a_layer_is_told(listen):
    head, seen = CalmHead(3, 4), []
    match listen:
        case "backward":
            handle = head.conv_last.register_full_backward_hook(lambda *_: seen.append(1))
        case "before backward":
            handle = head.conv_last.register_full_backward_pre_hook(lambda *_: seen.append(1))
        case "global":
            handle = nn.modules.module.register_module_forward_hook(
                lambda layer, *_: seen.append(1) if layer is head.conv_last else None
            )
    with handle:
        head(torch.randn(1, 3, 2, 2, requires_grad=True)).loss(torch.tensor([0])).backward()
    assert seen == [1]


@pytest.mark.parametrize("without", ["conv_last", "attention", "both"])
def test_a_bias_may_be_missing(without):
    torch.manual_seed(1)
    head = CalmHead(3, 4).double()
    for name in ("conv_last", "attention"):
        nn.init.normal_(getattr(head, name).bias)
        if without in (name, "both"):
            getattr(head, name).register_parameter("bias", None)
    features, targets = torch.randn(2, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 3])
    losses = (
        head(features).loss(targets),
        CalmOutput(head.conv_last(features), head.attention(features)).loss(targets),
    )
    assert_close(*losses)
    for one, other in zip(
        *(torch.autograd.grad(loss, list(head.parameters())) for loss in losses), strict=True
    ):
        assert_close(one, other)


@pytest.mark.parametrize(
    "options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "stride": 2}], ids=str
)
def test_other_convolutions_in_the_heads_place_are_called(options):
    torch.manual_seed(1)
    head = CalmHead(3, 4)
    head.conv_last, head.attention = nn.Conv2d(3, 4, **options), nn.Conv2d(3, 1, **options)
    features, targets = torch.randn(2, 3, 4, 4), torch.tensor([0, 3])
    want = CalmOutput(head.conv_last(features), head.attention(features)).loss(targets)
    assert_close(head(features).loss(targets), want)


def test_a_parametrised_layer_trains_through_its_parametrisation():
    torch.manual_seed(0)
    head = CalmHead(3, 4)
    nn.utils.parametrizations.weight_norm(head.conv_last)
    head(torch.randn(2, 3, 2, 2)).loss(torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.conv_last.parameters())


@settings(max_examples=100, deadline=None)
@given(
    images=st.integers(1, 3),
    locations=st.integers(1, 9),
    samples=st.integers(1, 7),
    zeros=st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
def test_drawn_mass_is_the_posteriors_rounded_to_the_samples(images, locations, samples, zeros, seed):
    torch.manual_seed(seed)
    q = torch.rand(images, locations, 1, dtype=torch.float64)
    q = q * (torch.rand(q.shape) >= zeros)
    q[:, 0] += 1e-3
    q = q / q.sum((1, 2), keepdim=True)
    places = draw(q, samples)
    assert places.shape == (images, samples)
    times = torch.zeros(images, locations, dtype=torch.float64)
    times.scatter_add_(1, places, torch.ones(places.shape, dtype=torch.float64))
    times = times.view_as(q)
    assert_close(times.sum((1, 2)), torch.full((images,), float(samples), dtype=torch.float64))
    assert ((times - samples * q).abs() < 1 + 1e-9).all()
    assert not times[q == 0].any()


def test_the_expectation_of_what_is_drawn_is_the_posterior(monkeypatch):
    q = torch.tensor([[[0.5, 0.0, 0.03], [0.17, 0.2, 0.1]]], dtype=torch.float64)
    starts = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # all the random number can be
    monkeypatch.setattr(torch, "rand", lambda *size, **_: starts[:, None])
    drawn = draw(q.expand(4000, -1, -1), 3).flatten().bincount(minlength=6) / 12_000
    assert_close(drawn.double(), q.flatten(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("teacher", [False, True])
def test_a_sampled_e_step_has_the_gradient_of_the_whole_one_on_average(teacher, monkeypatch):
    torch.manual_seed(3)
    head, other = CalmHead(4, 5).double(), CalmHead(4, 5).double()
    features = torch.randn(1, 4, 2, 3, dtype=torch.float64)
    many = features.expand(2000, -1, -1, -1).contiguous()
    starts = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    monkeypatch.setattr(torch, "rand", lambda images, *_, **__: starts[:images, None])

    def loss(inputs, targets, **options):
        believed = other(inputs) if teacher else None
        return head(inputs).loss(targets, temperature=0.7, teacher=believed, **options)

    whole = loss(features, torch.tensor([2]))
    sampled = loss(many, torch.full((2000,), 2), samples=2)
    assert_close(sampled, whole, rtol=1e-3, atol=0)
    pairs = [torch.autograd.grad(value, list(head.parameters())) for value in (sampled, whole)]
    for one, exact in zip(*pairs, strict=True):
        assert_close(one, exact, rtol=0, atol=2e-3)
    single = torch.autograd.grad(loss(many[:1], torch.tensor([2]), samples=2), head.conv_last.weight)[0]
    assert (single - pairs[1][0]).norm() > 0.01  # one draw is not the expectation


def test_samples_need_class_indices_and_at_least_one():
    output = CalmHead(3, 4)(torch.randn(2, 3, 2, 2))
    with pytest.raises(CalmError, match="class indices"):
        output.loss(torch.full((2, 4), 0.25), samples=2)
    with pytest.raises(CalmError, match="samples is 0"):
        output.loss(torch.tensor([0, 1]), samples=0)
    with pytest.raises(CalmError, match="E-step"):
        output.loss(torch.tensor([0, 1]), samples=2, method="calm-ml")
