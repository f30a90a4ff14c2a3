"""The released backbones: keys, grids and values against a second writing; the registry and its errors."""

from __future__ import annotations

import pytest
import released_layouts as oracle
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from calm.backbones import BACKBONES, build_backbone, grid_size
from calm.backbones.timm_models import run_on_meta
from calm.errors import CalmError
from calm.model import create_model

LAYOUTS = [*oracle.VARIANTS, ("vgg16", True, False), ("vgg16", False, True), ("inception_v3", True, False)]


def output_shape(backbone, height, width):
    return tuple(run_on_meta(backbone, (3, height, width))[0].shape)


def meta_backbone(architecture, large, use_bn=True):
    with torch.device("meta"):
        return build_backbone(architecture, large_feature_map=large, use_bn=use_bn)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_backbones_have_the_released_keys_and_shapes(layout):
    heads = ("conv_last.", "attention.")
    expected = {k: s for k, s in oracle.expected_shapes(*layout, classes=20).items() if not k.startswith(heads)}
    state = meta_backbone(*layout).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == expected


@pytest.mark.parametrize("layout", oracle.VARIANTS)
def test_expected_keys_are_those_of_released_checkpoints(layout):
    number, sha256 = oracle.VARIANTS[layout]
    expected = oracle.expected_shapes(*layout, classes=20)
    assert len(expected) == number
    assert oracle.fingerprint(expected) == sha256


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_backbones_give_28_or_14_locations(layout):
    architecture, large, _ = layout
    backbone = meta_backbone(*layout)
    side = 28 if large else 14
    assert output_shape(backbone, 224, 224) == (1, backbone.out_channels, side, side)
    assert backbone.out_channels == (2048 if architecture == "resnet50" else 1024)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("architecture", ["resnet50", "vgg16", "inception_v3"])
def test_released_backbones_take_any_image_size(architecture, large):
    backbone = meta_backbone(architecture, large)

    @settings(max_examples=8, deadline=None)
    @given(st.integers(32, 400), st.integers(32, 400))
    def check(height, width):
        rows, columns = (oracle.grid_side(architecture, side, large) for side in (height, width))
        assert output_shape(backbone, height, width) == (1, backbone.out_channels, rows, columns)

    check()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_released_backbones_equal_a_forward_pass_by_hand(layout):
    architecture, large, use_bn = layout
    backbone = build_backbone(architecture, large_feature_map=large, use_bn=use_bn).double().eval()
    weights = oracle.random_weights({key: tuple(t.shape) for key, t in backbone.state_dict().items()})
    backbone.load_state_dict(weights)
    images = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        features = backbone(images)
        assert_close(features, oracle.FORWARD[architecture](images, weights, large, use_bn))
    assert features.std() > 1e-3  # the comparison is not of zeros


def test_released_backbones_train_every_parameter():
    for name in ("resnet50", "vgg16", "inception_v3"):
        backbone = build_backbone(name)
        backbone(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_build_backbone_takes_timms_model_for_the_prefix_timm():
    ours, theirs = build_backbone("resnet50"), build_backbone("timm/resnet50")
    assert output_shape(ours, 64, 64)[-1] == 8
    assert output_shape(theirs, 64, 64)[-1] == 2


@pytest.mark.parametrize("name", BACKBONES)
def test_build_backbone_builds_every_registered_name(name):
    with torch.device("meta"):
        model = create_model(name, 3)
    assert output_shape(model.backbone, 64, 64)[1] == model.backbone.out_channels


@pytest.mark.parametrize(
    ("name", "close"),
    [("resnet5o", "resnet50"), ("vit_tiny_patch16_24", "vit_tiny_patch16_224"), ("timm/convnext_ato", "convnext_atto")],
)
def test_build_backbone_suggests_names_close_to_an_unknown_one(name, close):
    with pytest.raises(CalmError, match=f"unknown backbone '{name}'.*small_resnet.*did you mean.*'{close}'"):
        build_backbone(name)


@pytest.mark.parametrize(
    ("name", "option", "instead"),
    [
        ("resnet50", {"use_bn": False}, "vgg16, inception_v3"),
        ("vgg16", {"output_stride": 8}, "timm models"),
        ("small_resnet", {"pretrained": True}, "resnet50, vgg16, inception_v3, timm models"),
        ("resnet18", {"large_feature_map": False}, "resnet50, vgg16, inception_v3"),
    ],
)
def test_build_backbone_refuses_an_option_that_the_backbone_lacks(name, option, instead):
    with pytest.raises(CalmError, match=f"{name!r} has no option {next(iter(option))}.*among {instead}"):
        build_backbone(name, **option)


@pytest.mark.parametrize("name", [*BACKBONES, "timm/resnet18"])
@pytest.mark.parametrize("channels", [1, 13])
def test_build_backbone_takes_images_of_other_channels(name, channels):
    with torch.device("meta"):
        backbone = build_backbone(name, in_channels=channels)
    assert run_on_meta(backbone, (channels, 64, 64))[0].shape[1] == backbone.out_channels
    assert grid_size(backbone, (64, 64), 3) is None


def test_build_backbone_spreads_pretrained_weights_over_the_channels(monkeypatch):
    state = {key: torch.rand(tensor.shape) for key, tensor in meta_backbone("resnet50", True).state_dict().items()}
    monkeypatch.setattr("calm.backbones.released.no_answer", lambda url: "")
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda self, **_: state)
    grey = build_backbone("resnet50", pretrained=True, in_channels=1).conv1.weight
    assert_close(grey, state["conv1.weight"].sum(dim=1, keepdim=True))
    many = build_backbone("resnet50", pretrained=True, in_channels=6).conv1.weight
    assert_close(many, state["conv1.weight"].repeat(1, 2, 1, 1) / 2)
