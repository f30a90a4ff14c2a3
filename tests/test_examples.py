"""The examples do what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import calm
from calm.cli.evaluate import main as evaluate
from calm_birds import write_birds

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def minimal():
    return load_example("minimal_calm")


def test_the_minimal_version_equals_the_library(minimal):
    backbone = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.ReLU()).double()
    backbone.out_channels = 8
    model = calm.create_model(backbone, 4).double()
    small = minimal.MinimalCalm(backbone, 8, 4).double()
    small.conv_last.load_state_dict(model.head.conv_last.state_dict())
    small.attention.load_state_dict(model.head.attention.state_dict())
    images, targets = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([0, 3, 1])
    output, joint = model(images), small(images)
    assert_close(joint, output.joint)
    assert_close(minimal.predict(joint), output.probs)
    assert_close(minimal.em_loss(joint, targets), model.loss(images, targets))
    parameters = list(small.parameters())
    mine = torch.autograd.grad(minimal.em_loss(joint, targets), parameters)
    names = [*(f"backbone.{n}" for n, _ in backbone.named_parameters())]
    ours = dict(model.named_parameters())
    names += [f"head.{n}" for n, _ in small.named_parameters() if not n.startswith("backbone.")]
    theirs = torch.autograd.grad(model.loss(images, targets), [ours[n] for n in names])
    for one, other in zip(mine, theirs, strict=True):
        assert_close(one, other)


@pytest.mark.slow
def test_it_learns_and_localises(minimal, capsys):
    minimal.main()
    lines = capsys.readouterr().out.splitlines()
    assert float(lines[3].split()[-1]) > 0.95
    assert float(lines[-1].split()[-1]) > 0.5


def test_written_maps_give_the_figures_of_their_model(tmp_path):
    write_birds(tmp_path / "birds", species=3, images_per_species=4, test_fraction=0.5, size=64)
    torch.manual_seed(0)
    names = calm.data.load_split(tmp_path / "birds", "test").class_names[::-1]
    model = calm.create_model("tiny_resnet", 3, class_names=names, preprocessing=calm.Preprocessing(size=(32, 32)))
    model.save_pretrained(tmp_path / "model")
    load_example("write_maps").write_maps(
        str(tmp_path / "model"), str(tmp_path / "birds"), tmp_path / "maps", "joint", batch_size=4
    )
    flags = ["--data", str(tmp_path / "birds"), "--out", str(tmp_path / "out")]
    flags += ["--model", str(tmp_path / "model"), "--maps", str(tmp_path / "maps")]
    own, theirs = evaluate(["localization", *flags, "--norm", "minmax", "--thresholds", "even"])
    assert len(list((tmp_path / "maps").rglob("*.npy"))) == 6
    assert own.label != theirs.label
    shared = own.figures.keys() & theirs.figures.keys()
    assert {"pxap", "maxboxacc_v2"} <= shared
    for name in shared:
        assert list(theirs.figures[name]) == pytest.approx(list(own.figures[name]), nan_ok=True, abs=1e-6), name


def test_the_plain_loop_learns(capsys):
    assert 0 < load_example("plain_loop").main(steps=5) < 1
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()[:2])
    assert last < first - 0.3
