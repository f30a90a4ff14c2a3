"""Baselines against formulas written out with autograd in float64, and the state they must leave behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.testing import assert_close

from calm.baselines import ALIASES, BASELINES, METHODS, attribute
from calm.errors import CalmError
from calm.heatmaps import normalize
from calm.model import CalmHead, CalmModel, CamHead, ModelConfig

CLASSES, CHANNELS = 5, 6
ATTENTION, BLIND = ["attention-rollout", "cls-attention"], ["center", "whole-image"]
GENERAL = [name for name in METHODS if name not in ATTENTION]
GRADIENTS = [n for n in GENERAL if n in BASELINES and n not in BLIND and "target_layer" not in BASELINES[n].options]


class Net(nn.Module):
    """Smooth, so that float64 formulas can be compared tightly; with dropout, which only training mode
    shows."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv2d(4, CHANNELS, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.tanh(self.second(self.drop(torch.tanh(self.first(images)))))


def make(method: str, dtype: torch.dtype = torch.float64) -> CalmModel:
    torch.manual_seed(3)
    config = ModelConfig("custom", CLASSES, method)  # type: ignore[arg-type]
    head = CamHead(CHANNELS, CLASSES) if method == "cam" else CalmHead(CHANNELS, CLASSES)
    return CalmModel(config, Net(), head).to(dtype)


@pytest.fixture(params=["cam", "calm-em"])
def model(request: pytest.FixtureRequest) -> CalmModel:
    return make(request.param).eval()


@pytest.fixture
def images() -> Tensor:
    scale = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64).view(3, 1, 1, 1)
    return scale * torch.randn(3, 3, 12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


TARGETS = torch.tensor([0, 4, 2])


def score(model: CalmModel, image: Tensor, target: int) -> Tensor:
    """The explained score of one image (3, H, W), from the formulas of the two models."""
    features = model.backbone(image[None])[0]
    weight, bias = model.head.conv_last.weight[:, :, 0, 0], model.head.conv_last.bias
    f = torch.einsum("cd,dhw->chw", weight, features) + bias[:, None, None]
    if model.config.method == "cam":
        return f[target].mean()
    attention = model.head.attention  # type: ignore[union-attr]
    s = torch.einsum("d,dhw->hw", attention.weight[0, :, 0, 0], features) + attention.bias
    prior = torch.log1p(s.exp()) / torch.log1p(s.exp()).sum()
    return (f.softmax(dim=0)[target] * prior).sum().log()


def slope(model: CalmModel, image: Tensor, target: int) -> Tensor:
    x = image.clone().requires_grad_()
    return torch.autograd.grad(score(model, x, target), x)[0]


def shown(attribution: Tensor) -> Tensor:
    return attribution.abs().max(dim=0).values


def oracle(name: str, model: CalmModel, image: Tensor, target: int, count: int, seed: int) -> Tensor:
    """A method as its paper writes it, one image and one sample at a time."""
    if name == "gradient":
        return shown(slope(model, image, target))
    if name == "input-x-gradient":
        return shown(image * slope(model, image, target))
    if name == "integrated-gradients":
        nodes, weights = np.polynomial.legendre.leggauss(count)
        path = zip((nodes + 1) / 2, weights / 2, strict=True)
        return shown(image * sum(w * slope(model, a * image, target) for a, w in path))
    noise = torch.Generator().manual_seed(seed)
    sigma = (image.max() - image.min()) / 4
    slopes = torch.stack(
        [
            slope(model, image + sigma * torch.randn(image.shape, generator=noise, dtype=image.dtype), target)
            for _ in range(count)
        ]
    )
    if name == "smoothgrad":
        return shown(slopes.mean(dim=0))
    if name == "smoothgrad-squared":
        return shown((slopes**2).mean(dim=0))
    return shown(slopes.var(dim=0, correction=0))


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_attribute_gradient_family_equals_its_formulas(
    name: str, batch_size: int, model: CalmModel, images: Tensor
) -> None:
    options: dict[str, int] = {}
    if name == "integrated-gradients":
        options = {"steps": 7}
    elif "grad" in name and name != "gradient" and "input" not in name:
        options = {"samples": 5, "seed": 11}
    maps = attribute(model, images, TARGETS, name, batch_size=batch_size, **options)
    expected = torch.stack(
        [
            oracle(name, model, image, int(target), options.get("steps", options.get("samples", 1)), 11)
            for image, target in zip(images, TARGETS, strict=True)
        ]
    )
    tolerance = 1e-6 if name == "integrated-gradients" else 1e-9  # Captum's nodes are rounded
    torch.testing.assert_close(maps, expected, rtol=tolerance, atol=tolerance * 1e-2)


def test_attribute_defaults_are_those_of_the_paper(model: CalmModel, images: Tensor) -> None:
    one, target = images[:1], TARGETS[:1]
    for name, options in {
        "integrated-gradients": {"steps": 50},
        "smoothgrad": {"samples": 50, "noise": 0.25, "seed": 0},
    }.items():
        assert torch.equal(attribute(model, one, target, name), attribute(model, one, target, name, **options))
    expected = oracle("integrated-gradients", model, images[0], 0, 50, 0)
    torch.testing.assert_close(attribute(model, one, target)[0], expected)


def test_integrated_gradients_sum_to_the_gain_in_score(model: CalmModel) -> None:
    """On an image with one colour and a score that grows with it, no sign or channel is lost: the map sums
    up."""
    image = torch.zeros(1, 3, 12, 16, dtype=torch.float64)
    image[:, 1] = torch.rand(12, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for parameter in model.backbone.parameters():
        parameter.data.abs_()
    model.head.conv_last.weight.data[2].abs_()
    if model.config.method == "calm-em":  # a flat prior and f that only target 2 has: all slopes are positive
        model.head.attention.weight.data.zero_()  # type: ignore[union-attr]
        model.head.conv_last.weight.data[[0, 1, 3, 4]] = 0
    gained = score(model, image[0], 2) - score(model, torch.zeros_like(image[0]), 2)
    total = attribute(model, image, torch.tensor([2])).sum()
    torch.testing.assert_close(total, gained.detach(), rtol=1e-6, atol=0)


def test_smoothgrad_of_one_image_equals_captum(model: CalmModel, images: Tensor) -> None:
    from captum.attr import NoiseTunnel, Saliency

    from calm.baselines import class_scores

    model, image = model.float(), images[:1].float()  # the tunnel's noise is always float32
    sigma = float(image.max() - image.min()) / 4
    names = {"smoothgrad": "smoothgrad", "smoothgrad-squared": "smoothgrad_sq", "vargrad": "vargrad"}
    for ours, theirs in names.items():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            tunnel = NoiseTunnel(Saliency(lambda x: class_scores(model(x))))
            expected = tunnel.attribute(image, theirs, 6, stdevs=sigma, target=TARGETS[:1], abs=False)
        maps = attribute(model, image, TARGETS[:1], ours, samples=6, seed=5)
        torch.testing.assert_close(maps[0], shown(expected[0]), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["smoothgrad", "vargrad"])
def test_attribute_noise_depends_on_the_seed_and_not_on_the_batch(name: str, images: Tensor) -> None:
    model = make("calm-em")
    first = attribute(model, images, TARGETS, name, samples=4, seed=1)
    assert torch.equal(first, attribute(model, images, TARGETS, name, samples=4, seed=1))
    assert not torch.allclose(first, attribute(model, images, TARGETS, name, samples=4, seed=2))
    alone = attribute(model, images[1:2], TARGETS[1:2], name, samples=4, seed=1)
    torch.testing.assert_close(first[1:2], alone)


# --- the Grad-CAM family ------------------------------------------------------------------------------------


def features_and_slopes(model: CalmModel, image: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """A (D, h, w) and d score / d A by differences: no autograd, hooks or graph in common with the code."""
    features = model.encode(image[None])[0].detach()

    def at(values: Tensor) -> float:
        output = model.head(values[None])
        scores = output.class_scores if model.config.method == "cam" else output.log_probs
        return scores[0, target].item()

    slopes = torch.zeros_like(features)
    for index in np.ndindex(*features.shape):
        step = torch.zeros_like(features)
        step[index] = 1e-5
        slopes[index] = (at(features + step) - at(features - step)) / 2e-5
    return features, slopes


FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradcam": lambda a, g: (g.mean(dim=(1, 2), keepdim=True) * a).sum(dim=0).relu(),
    "hirescam": lambda a, g: (g * a).sum(dim=0).relu(),
    "layercam": lambda a, g: (g.relu() * a).sum(dim=0).relu(),
    "xgradcam": lambda a, g: (
        ((g * a).sum(dim=(1, 2), keepdim=True) / (a.sum(dim=(1, 2), keepdim=True) + 1e-7) * a).sum(dim=0).relu()
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_attribute_gradcam_family_equals_its_formulas(name: str, model: CalmModel, images: Tensor) -> None:
    maps = attribute(model, images, TARGETS, name, size=(3, 4))
    for got, image, target in zip(maps, images, TARGETS, strict=True):
        expected = FORMULAS[name](*features_and_slopes(model, image, int(target)))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_gradcam_of_a_cam_model_is_its_cam_without_bias(images: Tensor) -> None:
    """Selvaraju et al. (2017): with average pooling, Grad-CAM's weights are the classifier's over N."""
    model = make("cam")
    model.head.conv_last.bias.data.zero_()
    cams = attribute(model, images, TARGETS, "cam", size=(3, 4))
    torch.testing.assert_close(attribute(model, images, TARGETS, "gradcam", size=(3, 4)), cams.relu() / 12)


def test_scorecam_weights_masks_by_the_score_they_keep(model: CalmModel, images: Tensor) -> None:
    maps = attribute(model, images, TARGETS, "scorecam", size=(3, 4), batch_size=4)
    for got, image, target in zip(maps, images, TARGETS, strict=True):
        features = model.encode(image[None])[0].detach()
        masks = nn.functional.interpolate(features[None], size=(12, 16), mode="bilinear", align_corners=True)[0]
        low, high = masks.amin(dim=(1, 2), keepdim=True), masks.amax(dim=(1, 2), keepdim=True)
        masked = image * ((masks - low) / (high - low + 1e-8))[:, None]
        weights = torch.stack([score(model, x, int(target)) for x in masked]).softmax(dim=0).detach()
        expected = (weights[:, None, None] * features).sum(dim=0).relu()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_gradcam_reads_an_earlier_layer(model: CalmModel, images: Tensor) -> None:
    by_name = attribute(model, images, TARGETS, "gradcam", target_layer="backbone.second", size=(3, 4))
    module = model.backbone.second
    by_module = attribute(model, images, TARGETS, "gradcam", target_layer=module, size=(3, 4))  # type: ignore[arg-type]
    assert torch.equal(by_name, by_module)
    assert not torch.allclose(by_name, attribute(model, images, TARGETS, "gradcam", size=(3, 4)))


def test_layercam_reads_a_layer_before_an_in_place_one(images: Tensor) -> None:
    maps = []
    for in_place in (False, True):
        model = make("calm-em")
        model.backbone.first = nn.Sequential(model.backbone.first, nn.Tanh(), nn.LeakyReLU(0.3, inplace=in_place))
        maps.append(attribute(model, images, TARGETS, "layercam", target_layer="backbone.first.1"))
    assert torch.equal(*maps)


class Tokens(nn.Module):
    """A transformer's shape: one extra token, then the grid's, which the last line puts back in place."""

    out_channels = CHANNELS

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.block = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, images: Tensor) -> Tensor:
        grid = self.net(images)
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = self.block(torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1))
        return tokens[:, 1:].transpose(1, 2).unflatten(2, grid.shape[2:])


def test_gradcam_reads_tokens_of_a_transformer_as_a_grid(images: Tensor) -> None:
    model = CalmModel(ModelConfig("custom", CLASSES, "cam"), Tokens(), CamHead(CHANNELS, CLASSES)).double()
    grid = attribute(model, images, TARGETS, "gradcam++", size=(3, 4))
    tokens = attribute(model, images, TARGETS, "gradcam++", target_layer="backbone.block", size=(3, 4))
    torch.testing.assert_close(tokens, grid)


# --- every method -------------------------------------------------------------------------------------------


def fits(name: str, model: CalmModel) -> bool:
    return name in BASELINES or name == "evidence" or (name.startswith("cam") == (model.config.method == "cam"))


def cheap(name: str) -> dict[str, object]:
    options = {"steps": 3, "samples": 2} if name in BASELINES else {}
    return {k: v for k, v in options.items() if k in BASELINES[name].options} | (
        {"superclass": {c: [c, 1] for c in range(CLASSES)}} if "superclass" in name else {}
    )


@pytest.mark.parametrize("name", GENERAL)
def test_attribute_gives_a_map_per_image_at_image_size(name: str, model: CalmModel, images: Tensor) -> None:
    if not fits(name, model):
        with pytest.raises(CalmError, match="cannot be read from"):
            attribute(model, images, TARGETS, name)
        return
    options = cheap(name) if name in BASELINES or "superclass" in name else {}
    maps = attribute(model, images, TARGETS, name, **options)  # type: ignore[arg-type]
    assert maps.shape == (3, 12, 16)
    assert maps.isfinite().all()
    assert not maps.requires_grad
    small = attribute(model, images, TARGETS, name, size=(5, 9), **options)  # type: ignore[arg-type]
    assert small.shape == (3, 5, 9)
    assert (maps.flatten(1).std(dim=1) > 0).all()


@pytest.mark.parametrize("name", ["gradient", "smoothgrad", "gradcam", "scorecam", "eigencam"])
def test_attribute_works_in_float32_and_inference_mode(name: str) -> None:
    model = make("calm-em", torch.float32)
    options = cheap(name)
    with torch.inference_mode():
        images = torch.randn(2, 3, 12, 16, generator=torch.Generator().manual_seed(1))
        inside = attribute(model, images, TARGETS[:2], name, **options)  # type: ignore[arg-type]
    outside = attribute(model, images.clone(), TARGETS[:2], name, **options)  # type: ignore[arg-type]
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in BASELINES if name in GENERAL])
def test_attribute_of_a_model_in_half_precision_sums_in_float32(name: str, dtype: torch.dtype, images: Tensor) -> None:
    noisy = "seed" in BASELINES[name].options
    options = {"samples": 20} if noisy else {}
    want = attribute(make("calm-em", torch.float32), images.float(), TARGETS, name, **options)
    maps = attribute(make("calm-em", dtype), images.to(dtype), TARGETS, name, **options)
    assert maps.dtype == torch.float32
    assert not noisy or maps.unique().numel() > 0.9 * maps.numel()
    if name != "xgradcam":  # it divides by a sum of activations that is close to 0
        assert (maps - want).abs().mean() < 0.2 * want.mean()


class Breaks(nn.Module):
    """Passes values on, until it is made to fail."""

    failing = False

    def forward(self, values: Tensor) -> Tensor:
        if self.failing:
            raise RuntimeError("broken layer")
        return values


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("name", [*GRADIENTS, *(name for name in BASELINES if "cam" in name), "joint"])
def test_attribute_restores_all_state(name: str, failing: bool, images: Tensor) -> None:
    model = make("calm-em")
    breaks = Breaks()
    model.backbone.drop = nn.Sequential(nn.Dropout(0.5), breaks)
    model.train()
    model.backbone.first.eval()  # type: ignore[union-attr]
    model.backbone.second.weight.requires_grad_(False)  # type: ignore[union-attr]
    kept = torch.full_like(model.head.conv_last.weight, 2.0)
    model.head.conv_last.weight.grad = kept
    images.requires_grad_()
    targets = TARGETS.clone()

    def state() -> list[object]:
        return [
            [m.training for m in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
            [value.tolist() for value in model.state_dict().values()],
            images.requires_grad,
            images.grad,
            images.tolist(),
            targets.tolist(),
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]  # noqa: NPY002
            torch.is_grad_enabled(),
            list(model.named_modules()),
        ]

    before = state()
    breaks.failing = failing
    if failing:
        with pytest.raises(RuntimeError, match="broken layer"):
            attribute(model, images, targets, name)
    else:
        attribute(model, images, targets, name, **(cheap(name) if name in BASELINES else {}))  # type: ignore[arg-type]
    assert state() == before
    assert model.head.conv_last.weight.grad is kept


# --- mistakes -----------------------------------------------------------------------------------------------


def test_attribute_of_given_classes_takes_the_passes_of_its_method_alone(model: CalmModel, images: Tensor) -> None:
    passes: list[int] = []
    hook = model.register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    attribute(model, images, [0] * len(images), method="gradient")
    hook.remove()
    assert passes == [len(images)]


def test_attribute_names_the_closest_method(model: CalmModel, images: Tensor) -> None:
    with pytest.raises(CalmError, match="did you mean 'integrated-gradients'"):
        attribute(model, images, TARGETS, "integrated-gradient")


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_name_methods(alias: str) -> None:
    assert ALIASES[alias] in METHODS


OPTIONS = {"steps": 3, "samples": 3, "noise": 0.1, "seed": 1, "target_layer": "backbone", "superclass": {0: [0]}}


@pytest.mark.parametrize("name", [*BASELINES, "joint"])
@pytest.mark.parametrize("option", OPTIONS)
def test_attribute_refuses_an_option_that_the_method_does_not_read(name: str, option: str, images: Tensor) -> None:
    read = BASELINES[name].options if name in BASELINES else {"superclass"}
    if option in read:
        return
    with pytest.raises(CalmError, match=f"does not read the option {option}"):
        attribute(make("calm-em"), images, TARGETS, name, **{option: OPTIONS[option]})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("integrated-gradients", {"steps": 0}, "steps must be"),
        ("smoothgrad", {"samples": -1}, "samples must be"),
        ("smoothgrad", {"noise": float("nan")}, "noise must be"),
        ("gradient", {"batch_size": 0}, "batch_size must be"),
        ("gradcam", {"target_layer": "backbone.third"}, "'backbone.third' is no module"),
        ("gradcam", {"target_layer": nn.Identity()}, "target_layer Identity is no module of the model"),
    ],
)
def test_attribute_refuses_wrong_values(name: str, wrong: dict[str, object], message: str, images: Tensor) -> None:
    with pytest.raises(CalmError, match=message):
        attribute(make("cam"), images, TARGETS, name, **wrong)  # type: ignore[arg-type]


def test_attribute_checks_images_and_targets(images: Tensor) -> None:
    model = make("cam")
    for wrong_images, wrong_targets, message in [
        (images[0], TARGETS, "images must be floats of shape"),
        (images.to(torch.uint8), TARGETS, "images must be floats"),
        (images[:0], TARGETS[:0], "empty"),
        (images.to("meta"), TARGETS, "images are on meta, the model on cpu"),
        (images, TARGETS[:2], "give one row per image"),
        (images, TARGETS[:, None], "one class per image"),
        (images, TARGETS.double(), "class indices"),
        (images, TARGETS + 1, "out of range: 5, allowed are 0 to 4"),
    ]:
        with pytest.raises(CalmError, match=message):
            attribute(model, wrong_images, wrong_targets, "gradient")


def test_attribute_without_pytorch_grad_cam_names_the_extra(monkeypatch: pytest.MonkeyPatch, images: Tensor) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(CalmError, match=r"pip install 'calm\[baselines\]'"):
        attribute(make("cam"), images, TARGETS, "gradcam")


class Foreign(nn.Module):
    """A classifier of another package: a network, and its logits inside an object, as transformers return them."""

    def __init__(self, wrapped: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.pool, self.head, self.wrapped = nn.AdaptiveAvgPool2d(1), nn.Linear(6, CLASSES), wrapped

    def forward(self, images: Tensor) -> Any:
        logits = self.head(self.pool(self.features(images)).flatten(1))
        return SimpleNamespace(logits=logits) if self.wrapped else logits


@pytest.mark.parametrize("wrapped", [False, True])
def test_attribute_explains_classifiers_of_other_packages(wrapped, images):
    torch.manual_seed(1)
    foreign = Foreign(wrapped).double()
    before = images.clone()
    got = attribute(foreign, images, TARGETS, "gradient")
    foreign.eval()
    inputs = images.clone().requires_grad_()
    features = foreign.features(inputs)
    logits = foreign.head(features.mean((2, 3)))
    chosen = logits.gather(1, TARGETS[:, None]).sum()
    (gradient,) = torch.autograd.grad(chosen, inputs, retain_graph=True)
    assert_close(got, gradient.abs().amax(1))
    (weights,) = torch.autograd.grad(chosen, features)
    want = (weights.mean((2, 3), keepdim=True) * features).sum(1).relu().detach()
    for layer in (None, "features", foreign.features):  # the last feature map is found
        grid = attribute(foreign, images, TARGETS, "gradcam", target_layer=layer, size=tuple(want.shape[1:]))
        assert_close(grid, want.to(grid), rtol=1e-5, atol=1e-8)
    best = logits.argmax(1)
    assert_close(attribute(foreign.train(), images, batch_size=2), attribute(foreign, images, best))
    assert foreign.training
    assert torch.equal(images, before)


SMALL = {
    "resnet18": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)},
    "vit_tiny_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 24},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "window_size": 2, "embed_dim": 12, "depths": (1, 1, 1, 1)},
}
LAYERS = {"vit_tiny_patch16_224": "blocks.1.norm1", "swin_tiny_patch4_window7_224": "norm"}


@pytest.mark.parametrize("name", SMALL)
def test_attribute_of_timm_models_equals_pytorch_grad_cam(name):
    torch.manual_seed(2)
    foreign = timm.create_model(name, num_classes=4, **SMALL[name]).eval()
    images, classes = torch.randn(2, 3, 64, 64), [1, 3]
    modules = dict(foreign.named_modules())
    chosen = {"resnet18": "layer4", "convnext_atto": "stages", **LAYERS}[name]
    transforms = {
        "vit_tiny_patch16_224": lambda x: x[:, 1:].mT.reshape(2, 24, 4, 4),
        "swin_tiny_patch4_window7_224": lambda x: x.permute(0, 3, 1, 2),
    }
    with GradCAM(foreign, [modules[chosen]], transforms.get(name)) as cam:
        want = torch.as_tensor(cam(images, [ClassifierOutputTarget(c) for c in classes]))
    got = attribute(foreign, images, classes, "gradcam", target_layer=LAYERS.get(name))
    assert_close(normalize(got, "minmax"), want.to(got), rtol=0, atol=1e-3)


def test_attribute_says_what_a_classifier_of_another_package_needs():
    images = torch.randn(1, 3, 64, 64)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, embed_dim=24, num_classes=3)
    with pytest.raises(CalmError, match=r"of 'norm', have the shape \(1, 17, 24\).* such as 'blocks"):
        attribute(vit, images, 0, "gradcam")
    with pytest.raises(CalmError, match="'joint' is a map of this package's models: of a VisionTransformer take grad"):
        attribute(vit, images, 0, "joint")
    with pytest.raises(CalmError, match="targets out of range: 3, allowed are 0 to 2"):
        attribute(vit, images, 3)
    with pytest.raises(CalmError, match="targets"):
        attribute(vit, images, "crow")
    with pytest.raises(CalmError, match=r"returns logits \(B, C\), this one returned shape \(1, 4, 62, 62\)"):
        attribute(nn.Conv2d(3, 4, 3), images, 0, "gradient")
    seen: list[torch.Size] = []
    vit.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    attribute(vit, images.expand(2, -1, -1, -1), [0, 2], "gradient")
    assert seen == [(2, 3, 64, 64)]  # no pass to count the classes
    with pytest.raises(CalmError, match=r"must be an nn\.Module, got a function"):
        attribute(lambda images: images.mean((2, 3)), images, 0, "gradient")
    with pytest.raises(CalmError, match="no layer that returns a feature map"):
        attribute(nn.Sequential(nn.Flatten(), nn.Linear(12288, 2)), images, 0, "gradcam")
