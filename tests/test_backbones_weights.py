"""Weights from local files: wrappers, prefixes, order, timm's conversion; refusals; the packaged ImageNet weights."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close
from train_cases import TinyNet, tiny_config, tiny_net, write_squares

from calm.backbones import build_backbone, load_weights
from calm.backbones.weights import packaged_weights
from calm.errors import CalmError
from calm.model import create_model
from calm.train.config import ModelOptions
from calm.train.run import train


def start(seed: int = 1) -> dict[str, torch.Tensor]:
    """The tensors of a `TinyNet`, none of which has its start value."""
    generator = torch.Generator().manual_seed(seed)
    state = TinyNet().state_dict()
    return {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(7)
        for key, value in state.items()
    }


def loaded(content, folder, network=None):
    file = folder / "weights.pth"
    torch.save(content, file)
    network = TinyNet() if network is None else network
    return network, load_weights(network, file)


def assert_holds(network, state):
    for key, value in network.state_dict().items():
        assert_close(value, state[key])


WORDS = st.sampled_from(["model", "state_dict", "module", "net", "backbone", "encoder", "0"])


@settings(max_examples=30)
@given(st.lists(WORDS, max_size=3), st.lists(WORDS, max_size=3), st.booleans())
def test_load_weights_looks_through_wrappers_and_prefixes(tmp_path_factory, wrappers, prefixes, classifier):
    state, prefix = start(), "".join(f"{word}." for word in prefixes)
    content = {prefix + key: value for key, value in state.items()}
    if classifier:
        content |= {prefix + "fc.weight": torch.rand(5, 6), prefix + "fc.bias": torch.rand(5)}
    for word in wrappers:
        content = {word: content, "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}}
    network, report = loaded(content, tmp_path_factory.mktemp("weights"))
    assert_holds(network, state)
    assert report.missing == report.others == ()
    assert report.unused == tuple(prefix + f"fc.{name}" for name in ("weight", "bias") if classifier)
    assert report.matched == {key.removeprefix("layers."): prefix + key for key in state}


@pytest.mark.parametrize(
    ("copies", "taken", "other"),
    [
        (("student", "teacher"), "teacher", "student"),
        (("model", "model_ema"), "model_ema", "model"),
        (("module.encoder_k", "module.encoder_q"), "module.encoder_q", "module.encoder_k"),
    ],
)
def test_load_weights_takes_the_copy_that_is_evaluated_and_names_the_other(copies, taken, other, tmp_path):
    states = {copy: start(seed) for seed, copy in enumerate(copies)}
    wrapped = copies[0] in ("student", "model")
    content = states if wrapped else {f"{copy}.{key}": value for copy in copies for key, value in states[copy].items()}
    network, report = loaded(content, tmp_path)
    assert_holds(network, states[taken])
    assert report.others == (f"'{other}.layers'",)
    assert f"'{other}.layers' fits as well, and was not taken" in str(report)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_load_weights_reads_half_precision_of_both_formats(suffix, tmp_path):
    state = {key: value.half() if value.is_floating_point() else value for key, value in start().items()}
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(state, tmp_path / f"weights{suffix}")
    network = TinyNet()
    load_weights(network, tmp_path / f"weights{suffix}")
    assert_holds(network, {key: value.float() if value.is_floating_point() else value for key, value in state.items()})


def test_load_weights_accepts_files_without_counters(tmp_path):
    state = {key: value for key, value in start().items() if "num_batches" not in key}
    network, report = loaded(state, tmp_path)
    assert network.layers[1].num_batches_tracked == 0
    assert report.missing == ("1.num_batches_tracked",)


def test_load_weights_matches_by_order_where_all_kinds_and_shapes_agree(tmp_path):
    state = start()
    names = {key: f"_part{key.split('.')[1]}.{key.rpartition('.')[2]}" for key in state}
    content = {names[key]: value for key, value in state.items()} | {"_fc.weight": torch.rand(3, 6)}
    network, report = loaded(content, tmp_path)
    assert report.how.startswith("by order")
    assert report.unused == ("_fc.weight",)
    assert_holds(network, state)


def renamed(state):
    return {key.replace("layers.", "part"): value for key, value in state.items()}


def without(state, *names):
    return {key: value for key, value in state.items() if key not in names}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "holds no weights"),
        ([torch.zeros(1)], "holds no weights"),
        (
            without(start(), "layers.4.bias"),
            r"TinyNet: by name, below 'layers', it lacks 1: 4\.bias; by order.*7 ten.*8",
        ),
        ({**start(), "layers.4.bias": torch.zeros(5)}, r"another shape in 1: 4\.bias \(\(5,\) for \(6,\)\)"),
        ({**start(), "layers.6.weight": torch.zeros(6, 6)}, r"1 more in the same layers: 6\.weight"),
        (
            renamed({**start(), "layers.4.bias": torch.zeros(5)}),
            r"by order, it differs at tensor 8: part4\.bias \(5,\)",
        ),
        (
            renamed({**start(), "layers.4.scale": torch.zeros(5)}),
            "by order, it has 1 more in the same layers: part4.sc",
        ),
        ({**start(), "layers.4.bias": torch.full((6,), torch.nan)}, "NaN or infinity"),
        ({**start(), "layers.4.bias": torch.zeros(1).expand(6)}, "plain tensors"),
    ],
)
def test_load_weights_refuses_what_does_not_fit_and_changes_nothing(content, message, tmp_path):
    network = tiny_net()
    with pytest.raises(CalmError, match=message):
        loaded(content, tmp_path, network)
    assert_holds(network, tiny_net().state_dict())
    assert not hasattr(network, "weights_report")


def test_load_weights_refuses_a_network_that_is_deeper_or_runs_code(tmp_path):
    torch.save(timm.create_model("resnet26").state_dict(), tmp_path / "deep.pth")
    with pytest.raises(CalmError, match=r"more in the same layers: layer1\.2|lacks|another shape"):
        build_backbone("timm/resnet18", pretrained=tmp_path / "deep.pth")
    deeper = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(4)))
    torch.save({f"blocks.{key}": value for key, value in deeper.state_dict().items()}, tmp_path / "deep.pth")
    with pytest.raises(CalmError, match=r"4 more in the same layers: 2\.weight"):
        load_weights(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(2))), tmp_path / "deep.pth")

    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save({"state_dict": Attack()}, tmp_path / "attack.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"no such file")
    for name in ("attack.pth", "bad.safetensors", "missing.pth"):
        with pytest.raises(CalmError, match=name):
            load_weights(tiny_net(), tmp_path / name)
    assert not (tmp_path / "marker").exists()


def test_load_weights_spreads_three_channels(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "rgb.pth")
    backbone = build_backbone("timm/resnet18", in_channels=1, pretrained=tmp_path / "rgb.pth")
    rgb = torch.load(tmp_path / "rgb.pth", weights_only=True)["conv1.weight"]
    assert_close(backbone.model.conv1.weight, rgb.sum(dim=1, keepdim=True))
    assert backbone.weights_report.unused == ("fc.weight", "fc.bias")


def test_load_weights_resamples_positions_as_timm_does(tmp_path):
    source = timm.create_model("test_vit", img_size=96)
    torch.save({"model": source.state_dict()}, tmp_path / "vit.pth")
    backbone = build_backbone("test_vit", pretrained=tmp_path / "vit.pth")
    assert "timm's conversion" in str(backbone.weights_report)
    assert_close(backbone.model.blocks[1].attn.qkv.weight, source.blocks[1].attn.qkv.weight)
    assert backbone.model.pos_embed.shape != source.pos_embed.shape


def test_create_model_takes_a_file_for_named_and_own_backbones(tmp_path):
    torch.save(start(), tmp_path / "own.pth")
    model = create_model(TinyNet(), 3, pretrained=tmp_path / "own.pth")
    assert_holds(model.backbone, start())
    torch.save({"module." + key: value for key, value in model.state_dict().items()}, tmp_path / "whole.pth")
    again = create_model(tiny_net(), 3, pretrained=str(tmp_path / "whole.pth"))
    assert_holds(again.backbone, start())
    unused = {"module.head." + key for key in model.head.state_dict()}
    assert set(again.backbone.weights_report.unused) == unused
    with pytest.raises(CalmError, match="pretrained=FILE"):
        create_model(TinyNet(), 3, pretrained=True)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """No network and nothing in the hub's cache."""
    monkeypatch.setattr("calm.checkpoint.no_answer", lambda url: "the hub does not answer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def test_packaged_weights_serve_where_the_hub_gives_none(no_hub):
    model = create_model("tf_efficientnet_lite0", 3, pretrained=True, output_stride=16)
    report = model.backbone.weights_report
    assert len(report.matched) == 294
    assert report.unused == ("_fc.weight", "_fc.bias")
    assert model.preprocessing.mean == model.preprocessing.std == (0.5, 0.5, 0.5)  # timm's, of that name
    assert model.preprocessing.interpolation == "bicubic"
    assert create_model("small_resnet", 3).preprocessing.interpolation == "bilinear"
    state = torch.load(packaged_weights("tf_efficientnet_lite0"), weights_only=True)
    own = model.backbone.model
    assert_close(own.conv_head.weight, state["_conv_head.weight"])
    assert_close(own.blocks[6][0].bn3.running_var, state["_blocks.15._bn2.running_var"])
    with torch.no_grad():  # what trained weights do and random ones do not: channels that answer to few images only
        features = model.eval().encode(torch.rand(2, 3, 64, 64))
    assert features.shape == (2, 1280, 4, 4)
    assert 0.02 < float((features > 0).float().mean()) < 0.7


def test_pretrained_without_a_network_lists_what_is_here(no_hub, tmp_path):
    (tmp_path / "models--timm--resnet10t.c3_in1k").mkdir()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "vgg16-1.pth").touch()
    here = r"hub's cache: timm--resnet10t\.c3_in1k; torch's cache: vgg16-1\.pth; installed packages: efficientnet-lite0"
    with pytest.raises(CalmError, match=rf"the hub does not answer\. Here are the {here}.*--model\.weights FILE"):
        build_backbone("resnet18", pretrained=True)
    assert packaged_weights("tf_efficientnet_lite9") is None
    assert packaged_weights("efficientnet_lite0") is None  # its symmetric padding is not that of the weights


def test_train_starts_from_a_file_and_keeps_its_report(tmp_path):
    torch.save({"teacher": start()}, tmp_path / "dino.pth")
    options = ModelOptions(weights=tmp_path / "dino.pth", prior_activation="exp")
    config = tiny_config(write_squares(tmp_path / "data"), tmp_path / "run", model=options, epochs=1, lr=0.0)
    run = train(config, backbone=TinyNet(), quiet=True)
    saved = json.loads((run / "weights.json").read_text())
    assert saved["how"] == "by name, below 'teacher.layers'"
    assert "tensors matched by name, below 'teacher.layers'" in (run / "log.txt").read_text()
    weights = safetensors.torch.load_file(run / "last" / "model.safetensors")
    assert_close(weights["backbone.layers.0.weight"], start()["layers.0.weight"])
    with pytest.raises(CalmError, match=r"weights and model\.init_from"):
        ModelOptions(weights=tmp_path, init_from="run")
