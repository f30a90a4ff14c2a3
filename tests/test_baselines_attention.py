"""Maps of attention against the attention that is computed by hand, and the boxes of maps that look at no image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from calm.baselines import attribute
from calm.errors import CalmError
from calm.heatmaps import normalize
from calm.metrics.boxes import MaxBoxAcc
from calm.model import CalmModel, create_model


@pytest.fixture(scope="module")
def model() -> CalmModel:
    torch.manual_seed(0)
    return create_model("test_vit", 3, "cam").double().eval()


def layers_by_hand(model: CalmModel, images: Tensor) -> list[Tensor]:
    vit = model.backbone.model
    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
    found = []
    for block in vit.blocks:
        normed = block.norm1(tokens)
        q, k, _ = block.attn.qkv(normed).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found.append((block.attn.q_norm(q) @ block.attn.k_norm(k).mT / q.shape[-1] ** 0.5).softmax(-1).mean(1))
        tokens = block(tokens)
    return found


def test_attention_maps_are_those_of_the_formulas(model: CalmModel) -> None:
    images = torch.randn(2, 3, 160, 160, dtype=torch.float64)
    fused = [block.attn.fused_attn for block in model.backbone.model.blocks]
    with torch.no_grad():
        layers = layers_by_hand(model, images)
    rollout = torch.eye(101, dtype=torch.float64)
    for layer in layers:
        rollout = 0.5 * (layer + torch.eye(101)) @ rollout
    maps = attribute(model, images, [0, 1], "attention-rollout", size=(10, 10))
    torch.testing.assert_close(maps.flatten(1), rollout[:, 0, 1:])
    maps = attribute(model, images, [0, 1], "cls-attention", size=(10, 10))
    torch.testing.assert_close(maps.flatten(1), layers[-1][:, 0, 1:])
    assert [block.attn.fused_attn for block in model.backbone.model.blocks] == fused
    assert not any(block.attn.attn_drop._forward_hooks for block in model.backbone.model.blocks)


def test_attention_maps_say_which_models_have_none() -> None:
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(CalmError, match="vision transformers with global attention"):
        attribute(create_model("tiny_resnet", 2), images, 0, "attention-rollout")
    swin = create_model("swin_tiny_patch4_window7_224", 2)
    with pytest.raises(CalmError, match=r"vision transformers|attend to all tokens"):
        attribute(swin, torch.randn(1, 3, 224, 224), 0, "cls-attention")


def test_center_and_whole_image_have_the_boxes_of_their_names() -> None:
    model = create_model("tiny_resnet", 2)
    images, keys = torch.randn(1, 3, 40, 60), torch.tensor([0])
    center = normalize(attribute(model, images, 0, "center"), "minmax")
    torch.testing.assert_close(center, center.flip(1, 2))
    for box, which, value in (
        ([18, 12, 41, 27], "center", 1.0),
        ([0, 0, 9, 9], "center", 0.0),
        ([0, 0, 59, 39], "whole-image", 1.0),
        ([0, 0, 59, 19], "whole-image", 1.0),
        ([0, 0, 29, 18], "whole-image", 0.0),
    ):
        metric = MaxBoxAcc(replicates=0)
        maps = normalize(attribute(model, images, 0, which), "minmax")
        metric.update(maps, [torch.tensor([box])], keys)
        assert metric.compute().v1.value == value, (box, which)
