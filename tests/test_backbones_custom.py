"""The user's own module: checked once, left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calm.backbones import adapt_backbone
from calm.errors import CalmError


def network(channels=5):
    return nn.Sequential(nn.Conv2d(3, channels, 3, stride=8), nn.BatchNorm2d(channels), nn.Dropout(0.5))


def test_adapt_backbone_finds_the_number_of_channels():
    module = network(7)
    assert adapt_backbone(module) is module
    assert module.out_channels == 7


def test_adapt_backbone_keeps_modes_statistics_and_random_state():
    module = network().train()
    module[1].eval()
    random_state = torch.get_rng_state()
    adapt_backbone(module)
    assert [part.training for part in module] == [True, False, True]
    assert module[1].num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), random_state)


def test_adapt_backbone_restores_modes_after_an_error():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(1, 1)).train()
    with pytest.raises(CalmError):
        adapt_backbone(module)
    assert module[0].training


def test_adapt_backbone_runs_a_module_in_its_dtype():
    assert adapt_backbone(network(3).double()).out_channels == 3


@pytest.mark.parametrize("attribute", ["out_channels", "num_features"])
def test_adapt_backbone_trusts_a_module_that_needs_another_size(attribute):
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6 * 4), nn.Unflatten(1, (6, 2, 2)))
    setattr(module, attribute, 6)
    assert adapt_backbone(module).out_channels == 6
    del module.out_channels
    assert adapt_backbone(module, size=(8, 8)).out_channels == 6


def test_adapt_backbone_refuses_a_module_that_does_not_run():
    with pytest.raises(CalmError, match=r"Linear does not run on an image of 224 x 224 pixels: .*out_channels"):
        adapt_backbone(nn.Linear(3, 3))


def test_adapt_backbone_refuses_a_wrong_number_of_channels():
    module = network(5)
    module.out_channels = 6
    with pytest.raises(CalmError, match="says out_channels=6, its features have 5 channels"):
        adapt_backbone(module)


class Pair(nn.Module):
    def forward(self, images):
        return images, images


@pytest.mark.parametrize(
    ("module", "found"), [(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), r"shape \(1, 3\)"), (Pair(), "tuple")]
)
def test_adapt_backbone_refuses_anything_but_a_feature_map(module, found):
    with pytest.raises(CalmError, match=f"one image of 224 x 224 pixels it returned {found}"):
        adapt_backbone(module)
