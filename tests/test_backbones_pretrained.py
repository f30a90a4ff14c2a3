"""ImageNet weights of the released backbones: from torch's cache, key by key, safely, or a clear error."""

from __future__ import annotations

import pickle
from urllib.error import URLError

import pytest
import released_layouts as oracle
import torch
import torchvision
from torch.testing import assert_close
from torchvision.models import WeightsEnum

from calm.backbones import build_backbone
from calm.errors import CalmError

URLS = {
    "resnet50": torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url,
    "vgg16_bn": torchvision.models.VGG16_BN_Weights.IMAGENET1K_V1.url,
    "vgg16": torchvision.models.VGG16_Weights.IMAGENET1K_V1.url,
    "inception_v3": torchvision.models.Inception_V3_Weights.IMAGENET1K_V1.url,
}


@pytest.fixture(autouse=True)
def network(monkeypatch):
    """Servers that answer whether they are there."""
    monkeypatch.setattr("calm.backbones.released.no_answer", lambda url: "")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch, and no network."""

    def no_network(url, *_, **__):
        raise URLError(f"no network for {url}")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def published(name):
    """Random weights under all of torchvision's own keys, classifier and all."""
    with torch.device("meta"):
        options = {"init_weights": False} if name == "inception_v3" else {}
        whole = getattr(torchvision.models, name)(**options)
    state = whole.state_dict()
    heads = {key: torch.zeros(1) for key in state if key.startswith(("classifier", "fc", "AuxLogits"))}
    body = {key: torch.rand(tensor.shape) for key, tensor in state.items() if tensor.is_floating_point()}
    counters = {key: torch.tensor(9) for key, tensor in state.items() if not tensor.is_floating_point()}
    return {key: (body | counters | heads)[key] for key in state}


def test_vgg16_renumbers_the_pretrained_layers(cache):
    state = published("vgg16_bn")
    torch.save(state, cache / URLS["vgg16_bn"].rpartition("/")[2])
    for large in (True, False):
        ours = build_backbone("vgg16", pretrained=True, large_feature_map=large).features
        layers = oracle.vgg_layers(large, use_bn=True)
        theirs = list(torch.nn.Sequential(*layers).to_empty(device="cpu").state_dict())
        old = [key.removeprefix("features.") for key in state if key.startswith("features.")]
        assert len(theirs) == len(old) == 91
        for new_key, old_key in zip(theirs, old, strict=True):  # both in the order of the layers
            assert_close(ours.state_dict()[new_key], state[f"features.{old_key}"])


@pytest.mark.parametrize(
    ("name", "options", "source", "new"),
    [
        ("resnet50", {}, "resnet50", ()),
        ("resnet50", {"large_feature_map": False}, "resnet50", ()),
        ("vgg16", {"use_bn": False, "large_feature_map": False}, "vgg16", ("conv6",)),
        ("inception_v3", {"use_bn": False}, "inception_v3", ("A3_1b", "A3_2b")),
    ],
)
def test_released_backbones_start_from_the_published_weights(name, options, source, new, monkeypatch):
    state = published(source)
    asked = {}

    def get_state_dict(self, **given):
        asked.update(url=self.url, **given)
        return state

    monkeypatch.setattr(WeightsEnum, "get_state_dict", get_state_dict)
    own = build_backbone(name, pretrained=True, **options).state_dict()
    for key, tensor in own.items():
        if not key.startswith(new or "none"):
            assert_close(tensor, state[key])
    assert asked["url"] == URLS[source]
    assert asked["weights_only"] is True
    assert asked["check_hash"] is True


def test_load_pretrained_accepts_files_without_batch_counters(monkeypatch):
    state = {key: tensor for key, tensor in published("resnet50").items() if "num_batches" not in key}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: state)
    assert build_backbone("resnet50", pretrained=True).bn1.num_batches_tracked == 0


def test_imagenet_weights_without_a_network_names_the_remedy(cache):
    with pytest.raises(CalmError, match=r"resnet50-.*\.pth.*no network.*checkpoints.*pretrained=False"):
        build_backbone("resnet50", pretrained=True)


def test_imagenet_weights_does_not_wait_for_a_silent_server(cache, monkeypatch):
    monkeypatch.setattr("calm.backbones.released.no_answer", lambda url: "the server does not answer")
    monkeypatch.setattr(WeightsEnum, "get_state_dict", None)  # calling it would be a TypeError
    with pytest.raises(CalmError, match=r"resnet50-.*\.pth: the server does not answer\. .*put the file into"):
        build_backbone("resnet50", pretrained=True)


def test_imagenet_weights_runs_no_code(cache, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    file = cache / URLS["resnet50"].rpartition("/")[2]
    torch.save({"conv1.weight": Attack()}, file)
    with pytest.raises(CalmError, match="cannot get the pretrained weights"):
        build_backbone("resnet50", pretrained=True)
    assert not (tmp_path / "marker").exists()
    with pytest.raises(pickle.UnpicklingError):  # what the message stands for
        torch.load(file, weights_only=True)


def test_load_pretrained_refuses_weights_of_another_network(monkeypatch):
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: {"conv1.weight": torch.zeros(64, 3, 7, 7)})
    with pytest.raises(CalmError, match=r"pth does not fit ResNet50: by name, it lacks 264: bn1\.weight"):
        build_backbone("resnet50", pretrained=True)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **_: {"conv1.weight": torch.zeros(1)})
    with pytest.raises(CalmError, match=r"fit ResNet50: .*conv1\.weight \(1,\) for conv1\.weight \(64, 3, 7, 7\)"):
        build_backbone("resnet50", pretrained=True)
