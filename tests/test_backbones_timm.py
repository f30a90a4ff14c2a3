"""timm models as backbones: grids of every layout, in the right order; strides, sizes and errors."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.testing import assert_close

from calm.backbones import build_backbone, check_size
from calm.backbones.timm_models import TimmBackbone, run_on_meta
from calm.errors import CalmError
from calm.images import Preprocessing
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


@pytest.mark.parametrize(("name", "cell"), [("vit_tiny_patch16_224", 16), ("mambaout_femto", 32)])
def test_timm_backbone_keeps_the_place_of_a_change(name, cell):
    backbone = build_backbone(name).eval()
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


def test_timm_backbone_keeps_frozen_what_timm_froze(monkeypatch):
    whole = timm.create_model("test_vit", num_classes=0)
    whole.pos_embed.requires_grad_(False)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: whole)
    assert not build_backbone("test_vit").model.pos_embed.requires_grad
    assert whole.patch_embed.proj.weight.requires_grad


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


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("gmixer_12_224", (64, 96), "timm model 'gmixer_12_224' takes no images of 64 x 96 pixels: take 224 x 224, or"),
        ("test_vit", (250, 230), "no images of 250 x 230 pixels: take 240 x 224 or 256 x 240, or choose"),
        ("mvitv2_tiny", (250, 250), "take 224 x 224, or choose"),  # beyond, its tables of positions end
        ("dla34", (250, 224), "take 224 x 224 or 256 x 224"),
        ("inception_v3", (3, 3), "InceptionV3 takes no images of 3 x 3 pixels: take 14 x 14"),
    ],
)
def test_check_size_names_the_nearest_sizes_that_fit(name, size, message):
    backbone = build_backbone(name)
    with pytest.raises(CalmError, match=message):
        check_size(backbone, size)


def test_create_model_takes_the_size_that_a_timm_model_needs():
    assert create_model("botnet26t_256", 3).preprocessing.size == (256, 256)
    with pytest.raises(CalmError, match="'botnet26t_256' takes no images of 224 x 224 pixels: take 256 x 256"):
        create_model("botnet26t_256", 3, preprocessing=Preprocessing((224, 224)))
    assert create_model("convnext_atto", 3).preprocessing.size == (224, 224)


def test_model_given_a_size_that_it_does_not_take_names_those_that_it_takes():
    model = create_model("test_vit", 3)
    with pytest.raises(CalmError, match="takes no images of 250 x 230 pixels: take 240 x 224 or 256 x 240"):
        model(torch.zeros(1, 3, 250, 230))


def test_model_of_one_cell_and_one_image_says_that_batchnorm_needs_more():
    model = create_model("resnet18", 3).train()
    with pytest.raises(CalmError, match=r"BatchNorm cannot normalise a batch of one image of 32 x 32 .* one cell"):
        model(torch.zeros(1, 3, 32, 32))


def test_model_passes_other_errors_of_its_backbone_on():
    class Broken(torch.nn.Conv2d):
        def forward(self, images):
            if len(images) == 3:
                raise RuntimeError("out of memory")
            return super().forward(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        create_model(Broken(3, 4, 3), 2)(torch.zeros(3, 3, 8, 8))


def test_create_model_warns_of_a_coarse_grid():
    with pytest.warns(UserWarning, match="'levit_128s' gives a grid of 4 x 4 cells for images of 224 x 224 .* larger"):
        create_model("levit_128s", 3)


def test_check_size_returns_the_grid_or_none_for_a_module_that_never_runs():
    assert check_size(build_backbone("test_vit"), (64, 96)) == (4, 6)
    assert check_size(torch.nn.Linear(2, 3), (64, 96)) is None


@pytest.mark.parametrize(
    ("name", "side", "channels"), [("volo_d1_224", 14, 384), ("pit_ti_224", 7, 256), ("coat_mini", 7, 216)]
)
def test_timm_backbone_takes_intermediate_features_where_the_last_are_no_grid(name, side, channels):
    if not hasattr(timm.create_model(name), "forward_intermediates"):
        pytest.skip(f"timm {timm.__version__} gives no intermediate features of this family")
    backbone = build_backbone(
        name
    ).eval()  # coat's blocks share modules: their weights must not stay on the meta device
    assert backbone.out_channels == channels
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 224, 224)).shape == (1, channels, side, side)


@pytest.mark.parametrize(("size", "grid"), [((250, 230), (8, 8)), ((256, 224), (8, 7))])
def test_timm_backbone_lays_out_tokens_of_padded_images(size, grid):
    assert run_on_meta(build_backbone("mvitv2_tiny"), (3, *size))[0].shape[-2:] == grid


def test_timm_backbone_refuses_a_model_without_a_grid(monkeypatch):
    class Pooled(torch.nn.Conv2d):
        num_features, pretrained_cfg = 5, {"mean": (0,), "std": (1,), "input_size": (3, 8, 8)}

        def forward_features(self, images):
            return self(images).mean(dim=(2, 3))

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Pooled(3, 5, 1))
    with pytest.raises(CalmError, match=r"'resnet18' gives no grid of locations.*8 x 8 pixels are of shape \(1, 5\)"):
        build_backbone("resnet18")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {"output_stride": 8}, "does not take output_stride=8"),
        ("dla34", {"output_stride": 8}, "'dla34' does not take output_stride=8: leave it out"),
        ("vgg11", {"output_stride": 16}, "'vgg11' does not take output_stride=16: leave it out"),
        ("resnet18", {"output_stride": 7}, "output_stride=7 is not possible: allowed are 8, 16, 32"),
        ("resnet18.a9_in1k", {}, "unknown pretrained tag.*'a9_in1k'.*a1_in1k"),
        ("gmixer_12_224", {"pretrained": True}, "no weights for 'gmixer_12_224'"),
    ],
)
def test_timm_backbone_refuses_impossible_options(name, options, message):
    with pytest.raises(CalmError, match=message):
        build_backbone(name, **options)


def test_timm_backbone_takes_its_own_output_stride():
    # Its grid for its own 299 pixels is 10 x 10: not 299 / 32, but that rounded up.
    assert check_size(build_backbone("xception41", output_stride=32), (320, 320)) == (10, 10)


def test_timm_backbone_pretrained_without_a_network_names_the_remedy(monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("calm.checkpoint.no_answer", lambda url: "")
    monkeypatch.setattr("timm.models._builder.load_pretrained", no_network)
    with pytest.raises(
        CalmError, match=r"pretrained weights of timm model 'resnet18\.a1_in1k': no network.*pretrained=False"
    ):
        build_backbone("timm/resnet18.a1_in1k", pretrained=True)


def test_timm_backbone_pretrained_does_not_wait_for_a_silent_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("calm.checkpoint.no_answer", lambda url: "the hub does not answer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CalmError, match=r"'resnet18': the hub does not answer\. .*hub's cache.*pretrained=False"):
        build_backbone("resnet18", pretrained=True)


def test_timm_backbone_vision_transformer_learns():
    model = create_model("test_vit", 3)
    model.loss(torch.randn(2, 3, 64, 64), torch.tensor([0, 2])).backward()
    assert isinstance(model.backbone, TimmBackbone)
    assert model.backbone.model.patch_embed.proj.weight.grad.abs().sum() > 0
