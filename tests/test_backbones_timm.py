"""timm models as backbones: grids of every layout, in the right order; strides, sizes and errors."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.testing import assert_close

from calm.backbones import build_backbone
from calm.backbones.timm_models import TimmBackbone
from calm.errors import CalmError
from calm.model import create_model

MODELS = {  # name: stride
    "timm/resnet18": 32,
    "convnext_atto": 32,
    "efficientnet_b0": 32,
    "mobilenetv3_small_050": 32,
    "swin_tiny_patch4_window7_224": 32,
    "vit_tiny_patch16_224": 16,
    "deit_tiny_distilled_patch16_224": 16,
    "test_vit3": 16,
}


@pytest.mark.parametrize("name", MODELS)
def test_timm_backbone_gives_a_grid_for_any_image_shape(name):
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        features = backbone(torch.randn(2, 3, 64, 96))
    assert features.shape == (2, backbone.out_channels, 64 // MODELS[name], 96 // MODELS[name])


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0"])
@pytest.mark.parametrize("stride", [8, 16])
def test_timm_backbone_has_the_output_stride(name, stride):
    backbone = build_backbone(name, output_stride=stride).eval()
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 64, 64)).shape[-2:] == (64 // stride, 64 // stride)


def test_timm_backbone_lays_tokens_out_row_by_row():
    backbone = build_backbone("deit_tiny_distilled_patch16_224").eval()
    images = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        tokens = backbone.model.forward_features(images)
        assert tokens.shape == (1, 2 + 2 * 3, 192)
        features = backbone(images)
    for row in range(2):
        for column in range(3):
            assert_close(features[0, :, row, column], tokens[0, 2 + 3 * row + column])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mambaout_femto"])
def test_timm_backbone_keeps_the_place_of_a_change(name):
    backbone = build_backbone(name).eval()
    cell = backbone.stride
    images = torch.randn(1, 3, 4 * cell, 6 * cell)
    changed = images.clone()
    changed[..., 2 * cell : 3 * cell, cell : 2 * cell] += 3 * torch.randn(3, cell, cell)
    with torch.no_grad():
        effect = (backbone(changed) - backbone(images)).norm(dim=1)[0]
    assert divmod(int(effect.argmax()), 6) == (2, 1)


def test_timm_backbone_permutes_channels_last_features():
    backbone = build_backbone("swin_tiny_patch4_window7_224").eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert_close(backbone(images), backbone.model.forward_features(images).movedim(-1, 1))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "test_vit3"])
def test_timm_backbone_freezes_unused_parameters_only(name):
    backbone = build_backbone(name)
    backbone(torch.randn(2, 3, 64, 64)).square().sum().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), key
    assert any(not parameter.requires_grad for parameter in backbone.parameters())


def test_timm_backbone_starts_in_training_mode_with_fresh_statistics():
    backbone = build_backbone("resnet18")
    assert all(part.training for part in backbone.modules())
    assert backbone.model.bn1.num_batches_tracked == 0
    assert all(not parameter.is_meta for parameter in backbone.parameters())


def test_timm_backbone_has_the_weights_of_timm():
    torch.manual_seed(3)
    ours = build_backbone("resnet18")
    torch.manual_seed(3)
    theirs = timm.create_model("resnet18", num_classes=0)
    assert_close(ours.model.state_dict(), theirs.state_dict())


def test_timm_backbone_of_one_image_size_says_so():
    backbone = build_backbone("gmixer_12_224")
    assert backbone.fixed_size == (224, 224)
    with pytest.raises(CalmError, match="'gmixer_12_224' takes images of 224 x 224 pixels only, not 64 x 96"):
        backbone(torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize(("name", "found"), [("pit_ti_224", r"\(1, 1, 256\)"), ("crossvit_9_240", "several")])
def test_timm_backbone_refuses_a_model_without_a_grid(name, found):
    with pytest.raises(CalmError, match=f"{name!r} gives no grid of locations.*{found}"):
        build_backbone(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {"output_stride": 8}, "does not take output_stride=8"),
        ("resnet18", {"output_stride": 7}, "output_stride=7 is not possible: allowed are 8, 16, 32"),
        ("resnet18.a9_in1k", {}, "unknown pretrained tag.*'a9_in1k'.*a1_in1k"),
        ("gmixer_12_224", {"pretrained": True}, "no weights for 'gmixer_12_224'"),
    ],
)
def test_timm_backbone_refuses_impossible_options(name, options, message):
    with pytest.raises(CalmError, match=message):
        build_backbone(name, **options)


def test_timm_backbone_pretrained_without_a_network_names_the_remedy(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    with pytest.raises(
        CalmError, match=r"pretrained weights of timm model 'resnet18\.a1_in1k': no network.*pretrained=False"
    ):
        build_backbone("timm/resnet18.a1_in1k", pretrained=True)


def test_timm_backbone_vision_transformer_learns():
    model = create_model("test_vit", 3)
    model.loss(torch.randn(2, 3, 64, 64), torch.tensor([0, 2])).backward()
    assert isinstance(model.backbone, TimmBackbone)
    assert model.backbone.model.patch_embed.proj.weight.grad.abs().sum() > 0
