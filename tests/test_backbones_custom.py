"""The user's own module: checked once, left as it was."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import calm
from calm.backbones import adapt_backbone
from calm.cli import main
from calm.config import parse_code, trust
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
    ("module", "found"),
    [
        (
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            r"for one image of 224 x 224 .* returned shape \(1, 3\)",
        ),
        (Pair(), "a tuple of 2 features: let it return one of them"),
        (network, r"not a function: call it, network\(\)"),
        (Pair, r"not a type: call it, Pair\(\)"),
        (3, "a name or an nn.Module, not a int$"),
    ],
)
def test_adapt_backbone_refuses_anything_but_a_feature_map(module, found):
    with pytest.raises(CalmError, match=found):
        adapt_backbone(module)


class Features(nn.Module):
    """Returns what ``make`` makes of two feature maps, as other packages' extractors do."""

    def __init__(self, make):
        super().__init__()
        self.first, self.second, self.make = nn.Conv2d(3, 4, 4, stride=4), nn.Conv2d(4, 6, 2, stride=2), make

    def forward(self, images):
        one = self.first(images)
        return self.make(one, self.second(one))


@pytest.mark.parametrize(
    "make", [lambda one, two: [one, two], lambda one, two: {"layer4": two}, lambda one, two: (two,)]
)
def test_adapt_backbone_takes_the_last_of_a_list_and_the_only_one_of_a_dict_or_tuple(make):
    module = Features(make)
    adapted = adapt_backbone(module, (16, 16))
    images = torch.randn(2, 3, 16, 16)
    assert adapted.out_channels == 6
    assert torch.equal(adapted(images), module.second(module.first(images)))
    assert calm.create_model(module, 3)(torch.zeros(1, 3, 32, 32)).probs.shape == (1, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda one, two: {"a": one, "b": two}, r"a dict of 2 features \(a, b\): let it return one"),
        (lambda one, two: two.flatten(2).mT, r"returned shape \(1, 4, 6\): tokens. Of a timm model give its name"),
        (lambda one, two: two.mean((2, 3)), r"shape \(1, 6\): take its pooling .* num_classes=0, global_pool=''"),
        (lambda one, two: two.permute(0, 2, 3, 1), r"returned \(1, 2, 2, 6\), channels last: permute\(0, 3, 1, 2\)"),
    ],
)
def test_adapt_backbone_hints_at_what_makes_features_of_other_outputs(make, message):
    with pytest.raises(CalmError, match=message):
        adapt_backbone(Features(make), (16, 16))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("nets:small", ("nets", "small", {})),
        (
            "my.nets:small(width=32, sizes=[1, 2], name='a:b')",
            ("my.nets", "small", {"width": 32, "sizes": [1, 2], "name": "a:b"}),
        ),
        ("resnet50", None),
        ("timm/resnet18.a1_in1k", None),
        ("hf-hub:timm/resnet18", None),
        ("hf_hub:timm/resnet18", None),
        ("nets:small.method()", None),
        ("nets:small(", None),
        ("nets:1", None),
        ("../nets:small", None),
        ("nets:small(a='\x1b[2J')", None),
        ("nets:" + "(" * 400, None),
    ],
)
def test_parse_code_reads_names_of_code_alone(name, code):
    assert parse_code(name) == code


@pytest.mark.parametrize("name", ["nets:small(32)", "nets:small(**{'a': 1})", "nets:small(a=open('x'))", "nets:f(a=b)"])
def test_parse_code_refuses_arguments_that_are_not_named_or_no_plain_values(name):
    with pytest.raises(CalmError, match=r"as in nets:small|must be plain values: numbers, 'text' in quotes"):
        parse_code(name)


NETS = """
import torch

print("imported")

def small(width=5):
    return torch.nn.Sequential(torch.nn.Conv2d(3, width, 8, stride=8), torch.nn.ReLU())

def nothing():
    return None
"""


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with the user's own code, which is the current one; nobody trusts the code yet."""
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CALM_TRUST", "")
    yield name
    sys.modules.pop(name, None)


def test_code_in_a_card_is_imported_only_if_named_or_trusted(nets, capsys, monkeypatch):
    name = f"{nets}:small(width=7)"
    path = list(sys.path)
    model = calm.create_model(name, 3)
    assert model.config.backbone == name
    assert model.backbone.out_channels == 7
    model.save_pretrained("model")
    sys.modules.pop(nets)
    capsys.readouterr()
    with pytest.raises(CalmError, match=r"names code to import .* calm --trust 'nets_.*:small\(width=7\)' COMMAND"):
        calm.load("model")
    trust(f"{nets}:small(width=8)")  # other arguments are other code
    trust(f"{nets}:small")
    with pytest.raises(CalmError, match=f"you trust it with other arguments, {nets}:small, and these count"):
        calm.load("model")
    assert "imported" not in capsys.readouterr().out
    images = torch.randn(2, 3, 224, 224)
    assert torch.equal(calm.load("model", backbone=name)(images).probs, model.eval()(images).probs)
    given = calm.load("model", backbone=calm.create_model(name, 3).backbone)
    assert given.config == model.config
    trust(f"{nets}:small( width = 7 )")
    assert calm.load("model").config.backbone == name
    with pytest.raises(CalmError, match=r"has the backbone .*, not 'resnet50'"):
        calm.load("model", backbone="resnet50")
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{}:nothing", "must return an nn.Module, it returned a NoneType"),
        ("{}:absent", "cannot build the backbone .* AttributeError"),
        ("{}:small(depth=3)", "TypeError: small.. got an unexpected keyword argument 'depth'"),
        ("no_such_nets:small", "ModuleNotFoundError.* if no_such_nets.py is in another folder, .* PYTHONPATH"),
        ("{}.py:small", "ModuleNotFoundError.*; leave out .py"),
    ],
)
def test_create_model_says_what_is_wrong_with_code(nets, name, message):
    with pytest.raises(CalmError, match=message):
        calm.create_model(name.format(nets), 3)


def test_commands_train_and_use_own_code(nets, capsys):
    """From ``calm train`` to ``calm attribute``, as a user would."""
    for label, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        for number in range(6):
            path = Path("pictures", "train" if number < 4 else "test", label, f"{number}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (24, 24), colour).save(path)
    name = f"{nets}:small(width=4)"
    words = ["train", "--preset", "small", "--data", "pictures", "--epochs", "1", "--reading.image_size", "16"]
    Path("own.yaml").write_text(f"backbone: {name}\n")
    assert main([*words, "--config", "own.yaml", "--run_dir", "run"]) == 2
    assert "the configuration names code to import" in capsys.readouterr().err
    sweep = ["sweep", "--trials", "1", "--out", "sweep", "--search", "lr=0.01,0.02", *words[1:], "--batch_size", "4"]
    assert main([*sweep, "--config", "own.yaml"]) == 2
    said = capsys.readouterr()
    assert "the configuration names code to import" in said.err
    assert "imported" not in said.out
    assert main([*sweep, "--backbone", name]) == 0
    os.environ["CALM_TRUST"] = ""
    assert main([*words, "--backbone", name, "--run_dir", "run", "--batch_size", "4"]) == 0
    assert f"next: calm --trust '{name}' attribute --model run IMAGE.jpg" in capsys.readouterr().out
    os.environ["CALM_TRUST"] = ""
    attribute = ["attribute", "--model", "run", "pictures/test/red/4.png", "--out", "maps"]
    capsys.readouterr()
    assert main(attribute) == 2
    assert f"calm --trust '{name}' COMMAND" in capsys.readouterr().err
    for wrong in (["--trust"], ["--trust", "small", *attribute], [*attribute, "--trust="]):
        assert main(wrong) == 2
        assert "--trust takes code in quotes" in capsys.readouterr().err
    assert main([*attribute, "--trust", name]) == 0  # also after the command
    os.environ["CALM_TRUST"] = ""
    assert main(["--trust", name, *attribute]) == 0
    assert list(Path("maps").rglob("*.npy"))
