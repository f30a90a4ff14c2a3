"""The classifier put together: any backbone, prediction, loss, maps, precision, compilation."""

from __future__ import annotations

import inspect
import io
import pickle
import warnings
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
import torchvision
from forks import Fork
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

import calm
from calm import latent
from calm.backbones.timm_models import TimmBackbone
from calm.config import ModelConfig
from calm.errors import CalmError
from calm.heads import CalmHead, CamHead, PointwiseConv2d
from calm.images import Preprocessing
from calm.model import create_model
from calm.output import CalmOutput

METHODS = ["calm-em", "calm-ml", "cam"]


class Tiny(nn.Module):
    """A user's own backbone: one strided convolution."""

    out_channels = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=4)

    def forward(self, images):
        return self.conv(images).relu()


def tiny(method: str = "calm-em", **options):
    return create_model(Tiny(), 5, method, **options)


IMAGES = torch.randn(3, 3, 16, 20, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 4, 2])


@pytest.mark.parametrize("activation", ["softplus", "relu", "exp"])
def test_model_is_the_formula_on_its_features(activation):
    model = tiny(prior_activation=activation).eval()
    features = model.encode(IMAGES).detach()
    weight, bias = model.head.conv_last.weight.detach(), model.head.conv_last.bias.detach()
    logits = torch.einsum("bdhw,cd->bchw", features, weight[..., 0, 0]) + bias.view(-1, 1, 1)
    scores = torch.einsum("bdhw,cd->bchw", features, model.head.attention.weight.detach()[..., 0, 0])
    scores = scores + model.head.attention.bias.detach().view(-1, 1, 1)
    joint = oracle.joint(logits, scores, activation)
    output = model(IMAGES)
    assert_close(output.joint.double(), joint, rtol=1e-5, atol=1e-8)
    assert_close(output.probs.double(), oracle.likelihood(joint), rtol=1e-5, atol=1e-8)
    assert model.loss(IMAGES, TARGETS).item() == pytest.approx(oracle.em_loss(joint, TARGETS.tolist()), rel=1e-5)
    assert model.loss_from_features(features, TARGETS).item() == pytest.approx(model.loss(IMAGES, TARGETS).item())


@pytest.mark.parametrize("method", METHODS)
def test_attribute_maps_are_on_the_grid_or_have_any_size(method):
    model = tiny(method).eval()
    assert_close(model.attribute(IMAGES, TARGETS), model(IMAGES).attribute(TARGETS).detach(), rtol=0, atol=0)
    assert model.attribute(IMAGES, TARGETS, size=(7, 9)).shape == (3, 7, 9)
    assert model.attribute(IMAGES, torch.stack([TARGETS, TARGETS], 1)).shape == (3, 2, 4, 5)
    assert model.difference(IMAGES, TARGETS, 4 - TARGETS).shape == (3, 4, 5)
    assert not model.attribute(IMAGES, TARGETS).requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_attribute_takes_one_target_for_all_images_or_a_list(method):
    model = tiny(method).eval()
    output = model(IMAGES)
    kind = model.map_kind()
    every = torch.tensor([4, 4, 4])
    for one in (4, torch.tensor(4), np.int64(4), [4, 4, 4]):
        assert_close(output.attribute(one, kind), output.attribute(every, kind), rtol=0, atol=0)
        assert_close(model.attribute(IMAGES, one), model.attribute(IMAGES, every), rtol=0, atol=0)
        assert_close(calm.attribute(model, IMAGES, one, "gradient"), calm.attribute(model, IMAGES, every, "gradient"))
    assert_close(model.attribute(IMAGES, [[0, 1], [2, 3], [4, 0]])[1, 1], model.attribute(IMAGES, 3)[1])
    assert_close(model.difference(IMAGES, [0, 1, 4], 2), model.difference(IMAGES, torch.tensor([0, 1, 4]), every - 2))


@pytest.mark.parametrize("method", METHODS)
def test_attribute_takes_names_of_classes_and_by_default_the_prediction(method):
    model = tiny(method, class_names=["crow", "raven", "jay", "house_wren", "gull"]).eval()
    best = model(IMAGES).probs.argmax(1)
    assert_close(model.attribute(IMAGES), model.attribute(IMAGES, best), rtol=0, atol=0)
    assert_close(model(IMAGES).attribute(), model(IMAGES).attribute(best), rtol=0, atol=0)
    pair = calm.attribute(model, IMAGES, steps=2), calm.attribute(model, IMAGES, best, steps=2, batch_size=2)
    assert_close(*pair)
    named = (["raven", "Gull", "house wren"], torch.tensor([1, 4, 3]))
    for attribute in (model.attribute, lambda *args: calm.attribute(model, *args, "gradient")):
        assert_close(*(attribute(IMAGES, targets) for targets in named), rtol=0, atol=0)
    assert_close(model.difference(IMAGES, "crow", 1), model.difference(IMAGES, 0, "raven"))
    assert model.attribute(IMAGES, [["jay", "gull"], ["crow", 0], [1, "raven"]]).shape == (3, 2, 4, 5)
    with pytest.raises(CalmError, match=r"no class 'gul': .* close are 'gull'"):
        model.attribute(IMAGES, "gul")


@pytest.mark.parametrize("wrong", ["albatross", True, 1.5, 5, -1, [0, 1], [[0], [1, 2], [3]]])
def test_attribute_refuses_wrong_targets(wrong):
    attribute = inspect.unwrap(CalmOutput.attribute)  # of the types that only our tests enforce
    with pytest.raises(CalmError, match=r"targets|no class 'albatross'"):
        attribute(tiny()(IMAGES), wrong)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 1]), r"shape \(2,\) for 3 images"),
        (torch.tensor([0.0, 1.0, 2.0]), r"shape \(3,\) for 3 images, torch.float32"),
        (torch.ones(3, 4) / 4, r"for 3 images, .* or a row of 5 probabilities"),
        (torch.tensor([0, 5, 1]), "target 5 of image 1: it must be a class index from 0 to 4"),
        (torch.tensor([-100, -100, -100]), "target -100 of image 0: it must be a class index"),
        (torch.tensor([[1.0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]]), "of image 0: it must be a row of prob"),
        (torch.eye(5)[:3] * torch.tensor([[1.0], [1.0], [0.0]]), r"\[0.0, 0.0, 0.0, 0.0, ...\] of image 2: it must be"),
        (torch.tensor([[1.5, -0.5, 0, 0, 0]]).repeat(3, 1), "at least 0, with sum 1"),
        (torch.full((3, 5), torch.nan), "at least 0, with sum 1"),
        (torch.tensor([True, False, True]), "give a tensor of class indices"),
        (torch.eye(5)[:3] * 1j, "give a tensor of class indices"),
    ],
)
def test_loss_refuses_wrong_targets(method, targets, message):
    with pytest.raises(CalmError, match=message):
        tiny(method).loss(IMAGES, targets)


def test_check_targets_refuses_a_list():
    with pytest.raises(CalmError, match=r"targets \[0, 1, 2\]: give a tensor of class indices"):
        inspect.unwrap(latent.check_targets)([0, 1, 2], 3, 5)  # without the tests' check of types


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_loss_takes_smoothed_rows_rounded_to_half_precision(method, dtype):
    rows = torch.full((3, 1000), 1e-4)
    rows[:, 7] += 0.9
    model = create_model(Tiny(), 1000, method)
    assert_close(model.loss(IMAGES, rows.to(dtype)), model.loss(IMAGES, rows), rtol=0.01, atol=0)


def test_loss_gives_gradients_per_image_by_vmap():
    for method in METHODS:
        model = tiny(method)
        parameters = {name: value.detach() for name, value in model.named_parameters()}

        def loss(parameters, image, target, model=model):
            output = torch.func.functional_call(model, parameters, (image[None],))
            return model.output_loss(output, target[None])

        got = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, IMAGES, TARGETS)
        want = torch.autograd.grad(model.loss(IMAGES[1:2], TARGETS[1:2]), tuple(model.parameters()))
        assert_close(tuple(value[1] for value in got.values()), want)


@pytest.mark.parametrize("method", METHODS)
def test_loss_takes_indices_of_any_integer_type(method):
    model = tiny(method)
    assert_close(model.loss(IMAGES, TARGETS.int()), model.loss(IMAGES, TARGETS), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[0], r"floats of shape \(B, 3, H, W\), got torch.float32 \(3, 16, 20\)"),
        (IMAGES[:, :1], r"got torch.float32 \(3, 1, 16, 20\)"),
        ((IMAGES * 9).byte(), r"got torch.uint8 \(3, 3, 16, 20\)"),
        (IMAGES.numpy(), "got a ndarray: model.preprocess makes one of files"),
        ("bird.jpg", "got a str: model.preprocess makes one of files"),
    ],
)
def test_encode_refuses_what_is_no_batch_of_images(images, message):
    for ask in (tiny(), lambda wrong: tiny().attribute(wrong, 0), lambda wrong: calm.attribute(tiny(), wrong, 0)):
        with pytest.raises(CalmError, match=message):
            ask(images)


@pytest.mark.parametrize("method", METHODS)
def test_difference_is_taken_on_the_grid(method):
    model = tiny(method)
    first, second = TARGETS, (TARGETS + 1) % 5
    grid = [model(IMAGES).attribute(t, model.map_kind()) for t in (first, second)]
    want = torch.stack([oracle.bilinear((grid[0] - grid[1]).abs()[b].detach(), (16, 20)) for b in range(3)])
    assert_close(model.difference(IMAGES, first, second, size=(16, 20)).double(), want, rtol=1e-5, atol=1e-7)
    signed = model.difference(IMAGES, first, second, signed=True, size=(4, 5))
    if grid[0].shape[1:] == (4, 5):
        assert_close(signed, (grid[0] - grid[1]).detach())
    assert_close(signed, -model.difference(IMAGES, second, first, signed=True, size=(4, 5)))
    assert signed.min() < 0 < signed.max()


def test_difference_of_evidence_is_the_log_odds_of_cam_and_reads_the_exponent_of_a_prior():
    model = tiny("cam")
    grid = model(IMAGES).logits.shape[-2:]
    first, second = TARGETS, (TARGETS + 1) % 5
    log_probs, rows = model(IMAGES).log_probs.detach(), torch.arange(3)
    odds = model.difference(IMAGES, first, second, "evidence", signed=True, size=grid).sum((1, 2))
    assert_close(odds, log_probs[rows, first] - log_probs[rows, second], rtol=1e-4, atol=1e-6)
    model = tiny()
    flat = model.difference(IMAGES, first, second, "evidence", signed=True, size=grid, prior_exponent=0.0)
    log_conditional = model(IMAGES).log_conditional.detach()
    assert_close(flat, (log_conditional[rows, first] - log_conditional[rows, second]) / flat[0].numel())
    tempered = model.attribute(IMAGES, first, "prior", prior_exponent=0.0)
    assert_close(tempered, torch.full_like(tempered, 1 / flat[0].numel()))


def test_cam_head_has_no_attention_and_maps_that_average_to_the_score():
    model = tiny("cam")
    assert not any("attention" in name for name in model.state_dict())
    output = model(IMAGES)
    assert_close(output.attribute(TARGETS).mean((1, 2)), output.class_scores[torch.arange(3), TARGETS])
    assert_close(output.probs, output.logits.mean((2, 3)).softmax(1))
    with pytest.raises(CalmError, match="CAM model"):
        model.attribute(IMAGES, TARGETS, "joint")
    with pytest.raises(CalmError, match="E-step"):
        model.loss(IMAGES, TARGETS, temperature=0.5)


def test_loss_with_teacher_uses_its_posterior_without_gradient():
    model, teacher = tiny(), tiny()
    loss = model.loss(IMAGES, TARGETS, teacher=teacher)
    want = oracle.em_loss(
        model(IMAGES).joint.detach().double(), TARGETS.tolist(), teacher=teacher(IMAGES).joint.detach().double()
    )
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_loss_reaches_every_parameter(method):
    model = tiny(method)
    model.loss(IMAGES, TARGETS).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_model_in_low_precision_gives_float32_probabilities(method, dtype):
    model = tiny(method).eval()
    want = model(IMAGES).probs
    output = model.to(dtype)(IMAGES.to(dtype))
    assert output.probs.dtype == torch.float32
    assert_close(output.probs.sum(1), torch.ones(3))
    assert_close(output.probs, want, rtol=0.05, atol=0.02)
    loss = model.loss(IMAGES.to(dtype), TARGETS)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())
    picture = np.full((9, 9, 3), 200, np.uint8)  # as `preprocess` returns it, in float32
    assert model.attribute(model.preprocess(picture), 0).dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
def test_model_works_with_autocast_and_channels_last(method):
    model = tiny(method)
    want = model(IMAGES).log_probs
    last = model.to(memory_format=torch.channels_last)(IMAGES.contiguous(memory_format=torch.channels_last))
    assert_close(last.log_probs, want)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(IMAGES, TARGETS)
        maps = model.attribute(IMAGES, TARGETS)
    assert loss.dtype == maps.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(IMAGES, TARGETS).item(), rel=0.05)
    loss.backward()


def patched() -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(3, 6, 4, stride=4), nn.ReLU())
    backbone.out_channels = 6
    return backbone


def compile_models() -> None:
    images, targets = torch.randn(3, 3, 16, 20), torch.tensor([0, 4, 2])
    for method in METHODS:
        model = create_model(patched(), 5, method)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(compiled(images).probs, model(images).probs)
        parameters = list(model.parameters())
        loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(loss(images, targets), parameters)
        assert_close(got, torch.autograd.grad(model.loss(images, targets), parameters))


@pytest.mark.slow
def test_compiled_model_is_the_same_without_a_graph_break(tmp_path):
    # In a process of its own: the shape checks of this suite cannot be traced.
    ended = Fork(tmp_path, compile_models).end()
    assert ended.returncode == 0, ended.stderr[-2000:]


class Plain(nn.Module):
    """Probabilities and maps as tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        output = self.model(images)
        return output.probs, output.attribute(output.probs.argmax(1)), self.model.attribute(images, 1)


def export_models(store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    images, targets = torch.randn(3, 3, 16, 20), torch.tensor([0, 4, 2])
    batch = ({0: torch.export.Dim("batch", min=1, max=64)},)
    for method in ("calm-em", "cam"):
        model = create_model(patched(), 5, method, prior_activation="exp")
        file = io.BytesIO()
        torch.export.save(torch.export.export(model, (images,), dynamic_shapes=batch), file)
        file.seek(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)  # of PyTorch 2.11 itself
            output = torch.export.load(file).module()(images[:1])
        assert_close(output.probs, model(images[:1]).probs)
        assert_close(output.attribute(3), model(images[:1]).attribute(3))
        plain = Plain(model)
        exported = torch.export.export(plain, (images,), dynamic_shapes=batch).module()
        assert_close(exported(images[:1]), plain(images[:1]))
        want = torch.autograd.grad(model.loss(images, targets), tuple(model.parameters()))
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            model.zero_grad()
            model.output_loss(wrapped(images), targets).backward()
        assert_close(tuple(parameter.grad for parameter in model.parameters()), want)


@pytest.mark.slow
def test_model_can_be_exported_with_a_dynamic_batch_and_distributed_with_unused_parameters(tmp_path):
    ended = Fork(tmp_path / "said", export_models, str(tmp_path / "store")).end()
    assert ended.returncode == 0, ended.stderr[-2000:]


def test_create_model_with_one_class_and_one_location():
    model = create_model(Tiny(), 1).eval()
    images = torch.randn(2, 3, 4, 4)
    assert_close(model(images).probs, torch.ones(2, 1))
    assert_close(model.attribute(images, torch.tensor([0, 0])), torch.ones(2, 1, 1))
    assert abs(model.loss(images, torch.tensor([0, 0])).item()) < 1e-6


def test_create_model_with_a_named_backbone_prints_its_configuration():
    model = create_model("small_resnet", num_classes=4, class_names=["a", "b", "c", "d"])
    assert isinstance(model(torch.zeros(1, 3, 64, 64)), CalmOutput)
    assert model(torch.zeros(1, 3, 64, 64)).joint.shape == (1, 4, 8, 8)
    assert "small_resnet" in repr(model)
    assert model.class_names == ("a", "b", "c", "d")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "clam-em"}, "did you mean 'calm-em'"),
        ({"num_classes": 0}, "at least 1"),
        ({"prior_activation": "sigmoid"}, "allowed are softplus, relu, exp"),
        ({"prior_denominator": "detached"}, "allowed are differentiated, constant"),
    ],
)
def test_model_config_refuses_wrong_values(options, message):
    with pytest.raises(CalmError, match=message):
        ModelConfig(**({"backbone": "small_resnet", "num_classes": 2} | options))


def test_create_model_refuses_a_wrong_number_of_class_names():
    with pytest.raises(CalmError, match="2 class names for 5 classes"):
        tiny(class_names=["a", "b"])


def test_create_model_pretrained_needs_a_named_backbone():
    with pytest.raises(CalmError, match="your own module"):
        tiny(pretrained=True)


def test_create_model_pretrained_takes_the_normalisation_of_timm(monkeypatch):
    def build(name, **options):
        return TimmBackbone(name)  # no weights: nothing can be downloaded here

    monkeypatch.setattr("calm.backbones.build_backbone", build)
    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    half = (0.5, 0.5, 0.5)
    expected = create_model(name, 2, pretrained=True).preprocessing
    assert (expected.mean, expected.std) == (half, half)
    own = Preprocessing(size=(96, 96), mean=(0.1, 0.2, 0.3))
    taken = create_model(name, 2, pretrained=True, preprocessing=own).preprocessing
    assert taken == replace(own, interpolation="bicubic")
    assert create_model(name, 2).preprocessing == Preprocessing()


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_output_made_without_gradients_has_none(quiet):
    model = create_model("small_resnet", 3).eval()
    images = torch.randn(1, 3, 32, 32)
    with quiet():
        output = model(images)
    for value in (output.joint, output.probs, output.scores, output.loss(torch.tensor([0]))):
        assert not value.requires_grad
    assert model(images).logits.requires_grad


# An output that is read later than it was made


@pytest.mark.parametrize("method", METHODS)
def test_output_belongs_to_its_forward_pass_after_a_change_of_weights(method):
    model = tiny(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    output, reference = model(IMAGES), model(IMAGES)
    kind = model.map_kind()
    want = [t.detach() for t in (reference.probs, reference.logits, reference.attribute(TARGETS, kind))]
    model.loss(IMAGES, TARGETS).backward()
    optimizer.step()
    model.double()
    for got, expected in zip((output.probs, output.logits, output.attribute(TARGETS, kind)), want, strict=True):
        assert_close(got.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_output_of_borrowed_weights_answers_with_these(method):
    model = tiny(method)
    others = {name: value + 1 for name, value in model.named_parameters()}
    output = torch.func.functional_call(model, others, (IMAGES,))
    model.load_state_dict(others)
    assert_close(output.probs, model(IMAGES).probs)
    assert_close(output.attribute(TARGETS), model(IMAGES).attribute(TARGETS))


@pytest.mark.parametrize("method", METHODS)
def test_output_is_read_in_the_precision_of_its_forward_pass(method):
    model = tiny(method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, outside = model(IMAGES), model(IMAGES)
        want = inside.logits, inside.probs, inside.loss(TARGETS)
    assert want[0].dtype == torch.bfloat16
    for one, other in zip((outside.logits, outside.probs, outside.loss(TARGETS)), want, strict=True):
        assert_close(one, other, rtol=0, atol=0)
    plain, reference = model(IMAGES), model(IMAGES).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(plain.logits, reference, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_model_on_the_meta_device_gives_shapes(method):
    model = tiny(method).to("meta")
    output = model(IMAGES.to("meta"))
    assert output.probs.shape == (3, 5)
    assert output.logits.shape == (3, 5, 4, 5)
    assert output.loss(TARGETS.to("meta")).shape == ()
    with torch.no_grad():
        assert model(IMAGES.to("meta")).log_probs.shape == (3, 5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_attribute_of_an_output_without_gradients_has_none(method, quiet):
    model = tiny(method).eval()
    with quiet():
        output = model(IMAGES)
    found = output.attribute(TARGETS, model.map_kind())
    assert not found.requires_grad
    assert not output.logits.requires_grad
    assert_close(found, model(IMAGES).attribute(TARGETS, model.map_kind()).detach())


# Heads


def test_loss_under_autocast_is_float32_and_has_float32_gradients():
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


@pytest.mark.parametrize("kind", [CalmHead, CamHead])
@pytest.mark.parametrize("shape", [(2, 5), (2, 16, 5), (2, 4, 4, 5), (2, 6, 4, 4)])
def test_head_refuses_what_are_no_features_of_its_channels(kind, shape):
    with pytest.raises(CalmError, match=r"takes features \(B, 5, h, w\), got"):
        kind(5, 3)(torch.zeros(shape))


@pytest.mark.parametrize("options", [{"activation": "softmax"}, {"denominator": "detached"}])
def test_calm_head_refuses_unknown_words(options):
    with pytest.raises(CalmError, match=f"unknown {next(iter(options))}"):
        CalmHead(5, 3, **options)


def test_head_calls_a_layer_with_a_hook():
    head = CalmHead(3, 4)
    seen = []
    head.conv_last.register_forward_hook(lambda *_: seen.append(1))
    head(torch.randn(1, 3, 2, 2)).loss(torch.tensor([0])).backward()
    assert seen == [1]


@pytest.mark.parametrize("hook", ["backward", "before backward", "global"])
def test_head_calls_the_hooks_of_a_layer(hook):
    head, seen = CalmHead(3, 4), []
    match hook:
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
def test_head_may_lack_a_bias(without):
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
    for one, other in zip(*(torch.autograd.grad(loss, list(head.parameters())) for loss in losses), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("options", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "stride": 2}], ids=str)
def test_head_calls_other_convolutions_in_the_place_of_its_own(options):
    torch.manual_seed(1)
    head = CalmHead(3, 4)
    head.conv_last, head.attention = nn.Conv2d(3, 4, **options), nn.Conv2d(3, 1, **options)
    features, targets = torch.randn(2, 3, 4, 4), torch.tensor([0, 3])
    want = CalmOutput(head.conv_last(features), head.attention(features)).loss(targets)
    assert_close(head(features).loss(targets), want)


def test_head_trains_through_a_parametrisation():
    torch.manual_seed(0)
    head = CalmHead(3, 4)
    nn.utils.parametrizations.weight_norm(head.conv_last)
    head(torch.randn(2, 3, 2, 2)).loss(torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.conv_last.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pointwise_conv_equals_the_convolution(bias, memory_format):
    layer = PointwiseConv2d(5, 4, kernel_size=1).double()
    if not bias:
        layer.register_parameter("bias", None)
    features = torch.randn(2, 5, 3, 4, dtype=torch.float64).contiguous(memory_format=memory_format)
    inputs = [features.requires_grad_(), *layer.parameters()]
    results = layer(features), nn.functional.conv2d(features, layer.weight, layer.bias)
    assert_close(*results)
    for one, other in zip(*(torch.autograd.grad(r.square().sum(), inputs) for r in results), strict=True):
        assert_close(one, other)
    assert layer(features[:0]).shape == (0, 4, 3, 4)


@pytest.mark.parametrize("method", ["calm-em", "cam"])
def test_optimized_for_inference_gives_the_same_maps_and_leaves_the_model(method):
    model = create_model("small_resnet", 3, method, preprocessing=Preprocessing(size=(64, 64)))
    model(torch.randn(4, 3, 64, 64))  # BatchNorm's statistics are no longer 0 and 1
    model.eval()
    fast = model.optimized_for_inference()
    assert fast.class_names == model.class_names
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(fast(images).probs, model(images).probs, rtol=0, atol=1e-5)
    assert_close(fast.attribute(images, [0, 2]), model.attribute(images, [0, 2]), rtol=0, atol=1e-5)
    assert any(isinstance(part, torch.nn.BatchNorm2d) for part in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_predict_takes_files_pictures_arrays_inputs_and_folders(method, tmp_path):
    names = ["crow", "raven", "jay", "house_wren", "gull"]
    model = tiny(method, class_names=names, preprocessing=Preprocessing(size=(16, 16))).train()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    (folder / "notes.txt").write_text("no image")
    files = [folder / "a.png", folder / "b.png", folder / "more" / "c.png"]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file)
    probs = model(model.preprocess(files)).probs.detach()
    best = probs.topk(5)
    for given in (files, [str(file) for file in files], list(pixels), pixels, model.preprocess(files), folder):
        found = model.predict(given, batch_size=2)
        for b, one in enumerate(found):
            assert one.names == tuple(names[c] for c in best.indices[b].tolist())
            assert one.probs == pytest.approx(best.values[b].tolist(), rel=1e-5)
    assert [one.source for one in found] == list(map(str, files))
    for given in (files[0], str(files[0]), Image.fromarray(pixels[0]), pixels[0], model.preprocess(files[0])[0]):
        one = model.predict(given, top=2)
        assert (one.name, len(one.probs)) == (names[int(probs[0].argmax())], 2)
        assert one.prob == pytest.approx(float(probs[0].max()), rel=1e-5)
    assert str(model.predict(files[:1], top=1)[0]) == f"{files[0]}: {one.name} {one.prob:.3f}"
    assert repr(one) == f"Prediction({one})"
    assert model.training


def test_predict_refuses_nothing_and_inputs_of_several_shapes(tmp_path):
    model = tiny()
    for nothing in ([], tmp_path, torch.zeros(0, 3, 8, 8)):
        with pytest.raises(CalmError, match="no images to predict"):
            model.predict(nothing)
    with pytest.raises(CalmError, match=r"shapes \[\(3, 8, 8\), \(3, 9, 8\)\]"):
        model.predict([torch.zeros(3, 8, 8), torch.zeros(3, 9, 8)])
    with pytest.raises(CalmError, match=r"no\.png"):
        model.predict(tmp_path / "no.png")
    with pytest.raises(CalmError, match="top is 0"):
        model.predict(torch.zeros(3, 8, 8), top=0)


def test_transform_feeds_a_data_loader(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (30, 20), "red" if name == "a" else "blue").save(tmp_path / name / "1.png")
    model = tiny(preprocessing=Preprocessing(size=(16, 16)))
    data = torchvision.datasets.ImageFolder(tmp_path, transform=pickle.loads(pickle.dumps(model.transform)))
    images, labels = next(iter(DataLoader(data, batch_size=2)))
    assert_close(images, model.preprocess([path for path, _ in data.samples]), rtol=0, atol=0)
    assert labels.tolist() == [0, 1]
