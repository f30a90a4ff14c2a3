"""Saved models: whole or not at all, self-describing, the same after loading; every wrong folder is explained."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

import calm
from calm.checkpoint import CARD, FORMAT, WEIGHTS, Card, no_answer
from calm.config import ModelConfig
from calm.errors import CalmError
from calm.evaluate import model_subject
from calm.images import Preprocessing
from calm.model import create_model, load

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Tied(nn.Module):
    """A user's backbone whose two layers share their weights."""

    out_channels = 3

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 3, 3, padding=1)
        self.second.weight = self.first.weight

    def forward(self, images):
        return self.second(self.first(images).relu())


def trained(method="calm-em", backbone="tiny_resnet", **options):
    """A model whose weights and BatchNorm statistics are not those of the start."""
    model = create_model(backbone, 3, method, class_names=["a", "b", "c"], **options)
    model.train()
    model(IMAGES)
    return model.eval()


def probabilities(model):
    with torch.no_grad():
        return model(IMAGES).probs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(1)
    return trained().save_pretrained(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize(
    ("method", "prior"), [("calm-em", "relu"), ("calm-ml", "exp"), ("calm-em", "softplus"), ("cam", "softplus")]
)
def test_load_returns_the_saved_model(tmp_path, method, prior):
    model = trained(
        method,
        prior_activation=prior,
        prior_denominator="constant",
        preprocessing=Preprocessing((32, 48), std=(1, 2, 3)),
    )
    model.training_summary = {"epochs": 2, "accuracy": 0.5}
    assert model.save_pretrained(tmp_path / "deep" / "model") == tmp_path / "deep" / "model"
    again = load(tmp_path / "deep" / "model")
    for what in ("config", "class_names", "preprocessing", "training_summary"):
        assert getattr(again, what) == getattr(model, what)
    assert not any(part.training for part in again.modules())
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_close(probabilities(again), probabilities(model), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("backbone", "options"), [("test_vit", {}), ("timm/resnet10t", {"output_stride": 8}), ("vgg16", {"use_bn": False})]
)
def test_load_builds_a_backbone_with_its_options(tmp_path, backbone, options):
    model = create_model(backbone, 3, **options).eval()
    again = load(model.save_pretrained(tmp_path / "model"))
    assert again.config == model.config
    assert_close(probabilities(again), probabilities(model), rtol=0, atol=0)


def test_load_builds_a_backbone_of_other_channels(tmp_path):
    model = create_model("small_resnet", 3, in_channels=5).eval()
    assert model.preprocessing.mean == pytest.approx([0.449] * 5, abs=1e-3)
    again = load(model.save_pretrained(tmp_path / "model"))
    assert (again.config.in_channels, again.preprocessing) == (5, model.preprocessing)
    images = torch.randn(1, 5, 32, 32)
    assert_close(again(images).probs, model(images).probs, rtol=0, atol=0)
    with pytest.raises(CalmError, match=r"images must be floats of shape \(B, 5, H, W\)"):
        again(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_load_keeps_the_dtype(tmp_path, dtype):
    model = trained().to(dtype)
    again = load(model.save_pretrained(tmp_path / "model"))
    assert {tensor.dtype for tensor in again.state_dict().values()} == {dtype, torch.int64}
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["head.attention.bias", "backbone.stem.1.running_var"])
def test_a_model_whose_weights_are_not_finite_is_refused(tmp_path, name, value):
    model = trained()
    model.save_pretrained(tmp_path / "model")
    assert name in model.state_dict()
    model.state_dict()[name][0] = value
    with pytest.raises(CalmError, match=f"the model: {name} holds NaN or infinity"):
        model.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(CalmError, match=f"the model: {name} holds NaN"):
        calm.attribute(model, IMAGES, 0, "gradient")
    with pytest.raises(CalmError, match=f"a row: {name} holds NaN"):
        model_subject(model, label="a row")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model" / WEIGHTS)
    card = json.loads((tmp_path / "model" / CARD).read_text())
    card["weights_sha256"] = hashlib.sha256((tmp_path / "model" / WEIGHTS).read_bytes()).hexdigest()
    (tmp_path / "model" / CARD).write_text(json.dumps(card))
    with pytest.raises(CalmError, match=f"{WEIGHTS}: {name} holds NaN or infinity"):
        load(tmp_path / "model")


def test_load_needs_the_users_own_backbone_and_keeps_it_tied(tmp_path):
    model = trained(backbone=Tied())
    folder = model.save_pretrained(tmp_path / "model")
    again = load(folder, backbone=Tied())
    assert_close(probabilities(again), probabilities(model), rtol=0, atol=0)
    assert again.backbone.second.weight is again.backbone.first.weight
    with pytest.raises(CalmError, match=r"user's own backbone.*backbone="):
        load(folder)


def test_load_refuses_a_superfluous_backbone(folder):
    with pytest.raises(CalmError, match="has the backbone 'tiny_resnet': leave backbone= out"):
        load(folder, backbone=Tied())


def test_load_and_save_pretrained_keep_random_state_and_mode(folder, tmp_path):
    model = trained().train()
    state = torch.get_rng_state()
    model.save_pretrained(tmp_path / "new")
    load(folder)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_load_moves_weights_to_map_location(folder):
    assert load(folder, map_location="meta").device.type == "meta"


# Where a model is looked for


def test_load_takes_the_best_model_of_a_run_else_the_last(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run / "last")
    assert load(run).training_summary == {}
    best = load(folder)
    best.training_summary = {"which": "best"}
    best.save_pretrained(run / "best")
    assert load(str(run)).training_summary == {"which": "best"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "holds no saved model: there is no calm.json"),
        (lambda path: path.write_text(""), "is a file, but a saved model is a folder.*load_released"),
        (lambda path: None, "no saved model at .*: no such folder, and no hub id"),
    ],
)
def test_load_explains_what_is_no_saved_model(tmp_path, make, message):
    make(tmp_path / "thing")
    with pytest.raises(CalmError, match=message):
        load(tmp_path / "thing")


def test_load_of_one_of_the_files_names_its_folder(folder):
    with pytest.raises(CalmError, match=f"load {re.escape(str(folder))}"):
        load(folder / WEIGHTS)


def test_load_of_a_released_checkpoint_names_load_released(tmp_path):
    (tmp_path / "last_checkpoint.pth.tar").touch()
    with pytest.raises(CalmError, match=r"calm\.load_released or calm convert"):
        load(tmp_path)


def test_load_does_not_ask_the_hub_for_a_mistyped_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)  # calling it would be a TypeError
    (tmp_path / "runs").mkdir()
    with pytest.raises(CalmError, match="no saved model at runs/cma: no such folder, and no hub id"):
        load("runs/cma")
    (tmp_path / "runs" / "cam").mkdir()
    with pytest.raises(CalmError, match=r"no such folder \(did you mean runs/cam\?\), and no hub id"):
        load("runs/cma")


# Files that are wrong


def test_load_names_truncated_weights(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(CalmError, match=f"cannot read the weights .*{WEIGHTS}"):
        load(folder)


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_load_names_a_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CalmError, match=name):
        load(folder)


def test_load_refuses_weights_of_another_save(folder, tmp_path):
    other = trained().save_pretrained(tmp_path / "other")
    shutil.copy(other / WEIGHTS, folder / WEIGHTS)
    with pytest.raises(CalmError, match=f"is not the file that {CARD} describes"):
        load(folder)


def test_load_counts_and_names_keys_that_do_not_fit(folder, monkeypatch):
    state = safetensors.torch.load_file(folder / WEIGHTS)
    state["extra"] = state.pop("head.attention.bias")
    state["head.conv_last.bias"] = torch.zeros(4)
    state["head.attention.weight"] = state["head.attention.weight"].int()
    safetensors.torch.save_file(state, folder / WEIGHTS)
    monkeypatch.setattr("calm.checkpoint._sha256", lambda _: json.loads((folder / CARD).read_text())["weights_sha256"])
    with pytest.raises(
        CalmError,
        match=r"1 missing: head\.attention\.bias; 1 unexpected: extra; 2 of another kind: .*"
        r"head\.conv_last\.bias \(float \(4,\), should be float \(3,\)\)",
    ):
        load(folder)


def test_load_does_not_unpickle_weights(folder, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "marker"), "w"))

    torch.save({"x": Attack()}, folder / WEIGHTS)
    with pytest.raises(CalmError, match="cannot read the weights"):
        load(folder)
    assert not (tmp_path / "marker").exists()


# Saving: all or nothing


def test_save_pretrained_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr("calm.checkpoint.write_json", full)
    with pytest.raises(OSError, match="no space"):
        trained().save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_save_pretrained_that_fails_leaves_the_older_model_whole(folder, monkeypatch):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = trained()
    model.training_summary = {"not json": object()}
    with pytest.raises(CalmError, match="training summary"):
        model.save_pretrained(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]


def test_save_pretrained_again_replaces_the_model_and_keeps_other_files(folder):
    (folder / "README.md").write_text("mine")
    model = trained("cam")
    model.save_pretrained(folder)
    assert_close(probabilities(load(folder)), probabilities(model), rtol=0, atol=0)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", CARD, WEIGHTS]


def test_save_pretrained_gives_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        folder = trained().save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()} == {CARD: 0o640, WEIGHTS: 0o640}


def test_save_pretrained_names_a_file_in_the_way(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(CalmError, match="a file of that name exists"):
        trained().save_pretrained(tmp_path / "model")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local cache of the hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_load_reads_a_hub_id_from_the_cache(hub, saved):
    cached = hub / "models--owner--birds"
    shutil.copytree(saved, cached / "snapshots" / ("0" * 40))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    assert_close(load("owner/birds").state_dict(), load(saved).state_dict())


def test_load_takes_the_cache_where_the_hub_does_not_answer(hub, saved, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("calm.checkpoint.no_answer", lambda url: "the hub does not answer")
    monkeypatch.setattr("socket.getaddrinfo", None)  # asking the network would be a TypeError
    shutil.copytree(saved, hub / "models--owner--birds" / "snapshots" / "1")
    (hub / "models--owner--birds" / "refs").mkdir()
    (hub / "models--owner--birds" / "refs" / "main").write_text("1")
    assert load("owner/birds").class_names == ("a", "b", "c")
    with pytest.raises(CalmError, match=r"no saved model at owner/none: .*the hub does not answer\. Without a network"):
        load("owner/none")
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_no_answer_waits_a_moment_only():
    with socket.create_server(("127.0.0.1", 0)) as server:  # it takes connections, and says nothing
        url = f"http://127.0.0.1:{server.getsockname()[1]}/file"
        start = time.monotonic()
        assert no_answer(url, seconds=0.2) == f"{url[7:-5]} does not answer"
        assert time.monotonic() - start < 3
    assert no_answer(url, seconds=5) == f"{url[7:-5]} does not answer"  # nobody takes connections any longer


def test_no_answer_takes_a_refusal_for_an_answer():
    class Refusing(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:  # it knows no method: 501
        Thread(target=server.handle_request, daemon=True).start()
        assert no_answer(f"http://127.0.0.1:{server.server_port}/file") == ""


def test_load_says_that_the_hub_cannot_be_reached(hub):
    with pytest.raises(CalmError, match=r"no saved model at owner/none: .*Hub"):
        load("owner/none")


def test_push_to_hub_says_that_it_was_refused(hub):
    with pytest.raises(CalmError, match="cannot upload to 'owner/birds'"):
        trained().push_to_hub("owner/birds")


def test_push_to_hub_says_that_there_is_no_network(monkeypatch):
    class ConnectError(Exception):
        """As the transport's: neither an OSError nor an error of the hub's client."""

    def unreachable(*_, **__):
        raise ConnectError("connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    for silent, reason in (("", "connection refused"), ("the hub does not answer", "the hub does not answer")):
        monkeypatch.setattr("calm.checkpoint.no_answer", lambda _, silent=silent: silent)
        with pytest.raises(CalmError, match=f"cannot upload to 'owner/birds' on the Hugging Face Hub: {reason}"):
            trained().push_to_hub("owner/birds")


# The card


SAMPLE = Card(
    ModelConfig("resnet50", 2, "calm-ml", large_feature_map=False, output_stride=None, prior_activation="exp"),
    ("crow", "Rabe ü"),
    Preprocessing((96, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    {"epochs": 3, "nested": {"list": [1, None, "x"]}},
    {"calm": "0.1.0"},
    "ab" * 32,
)


@pytest.fixture
def card_path(tmp_path):
    SAMPLE.write(tmp_path / "calm.json")
    return tmp_path / "calm.json"


def change(path, *keys, to):
    """Set the value under ``keys`` of the file to ``to``."""
    content = json.loads(path.read_text())
    place = content
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = to
    path.write_text(json.dumps(content))


def test_card_read_returns_what_was_written(card_path):
    assert Card.read(card_path) == SAMPLE


def test_card_read_accepts_the_sample_of_the_documentation(tmp_path):
    import calm.checkpoint

    sample = re.search(r"::\n\n(.*)\Z", calm.checkpoint.__doc__, re.DOTALL)[1]
    (tmp_path / "calm.json").write_text(sample)
    card = Card.read(tmp_path / "calm.json")
    assert card.class_names == ("crow", "raven")
    card.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(sample)


def test_card_read_accepts_old_files_without_newer_fields(card_path):
    content = json.loads(card_path.read_text())
    del content["model"]["use_bn"], content["model"]["in_channels"]
    card_path.write_text(json.dumps(content))
    assert (Card.read(card_path).model.use_bn, Card.read(card_path).model.in_channels) == (True, 3)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), FORMAT + 1, f"has format {FORMAT + 1}, of a newer release.*upgrade calm"),
        (("format",), 0, "has format 0"),
        (("format",), "1", "must be a JSON object with 'format'"),
        (("format",), True, "must be a JSON object with 'format'"),
        (("extra",), 1, "unknown field 'extra'"),
        (("model", "metod"), "cam", "unknown field 'metod'.*: model.*did you mean 'method'"),
        (("model", "method"), "calm", "calm.json: model: unknown method.*calm-em, calm-ml, cam"),
        (("model", "method"), ["cam"], "calm.json: model: unknown method"),
        (("model", "backbone"), 5, "calm.json: model: backbone must be a string, got 5"),
        (("model", "num_classes"), True, "num_classes must be a whole number, got True"),
        (("model", "num_classes"), 2.0, "num_classes must be a whole number, got 2.0"),
        (("model", "num_classes"), 3, "class_names has 2 names for num_classes 3"),
        (("model", "use_bn"), 1, "use_bn must be true or false, got 1"),
        (("model", "output_stride"), "8", "output_stride must be a whole number, got '8'"),
        (("model",), [], r"model must be a JSON object, got \[\]"),
        (("class_names",), "ab", "class_names must be a list, got 'ab'"),
        (("class_names",), ["a", 1], r"class_names\[1\] must be a string, got 1"),
        (("preprocessing", "size"), [224], r"size must be a list of 2 values, got \[224\]"),
        (("preprocessing", "size"), [0, 4], "calm.json: preprocessing: preprocessing size"),
        (("preprocessing", "mean"), [0, 0, float("nan")], r"mean\[2\] must be a finite number, got nan"),
        (("preprocessing", "std"), [1, 1, 0], "calm.json: preprocessing"),
        (("training",), [], "training must be a JSON object"),
        (("versions",), {"calm": 1}, "versions.calm must be a string"),
        (("weights_sha256",), None, "weights_sha256 must be a string, got None"),
    ],
)
def test_card_read_names_a_wrong_field(card_path, keys, value, message):
    change(card_path, *keys, to=value)
    with pytest.raises(CalmError, match=message) as caught:
        Card.read(card_path)
    assert str(card_path) in str(caught.value)


@pytest.mark.parametrize("field", ["model", "class_names", "weights_sha256"])
def test_card_read_names_a_missing_field(card_path, field):
    content = json.loads(card_path.read_text())
    del content[field]
    card_path.write_text(json.dumps(content))
    with pytest.raises(CalmError, match=f"calm.json lacks the field {field!r}"):
        Card.read(card_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[[1", b"null", b"[1]"])
def test_card_read_refuses_what_is_no_json_object(card_path, content):
    card_path.write_bytes(content)
    with pytest.raises(CalmError, match=re.escape(str(card_path))):
        Card.read(card_path)


def test_card_read_names_a_missing_file(tmp_path):
    with pytest.raises(CalmError, match=r"cannot read .*none\.json"):
        Card.read(tmp_path / "none.json")


def test_save_pretrained_refuses_a_summary_that_is_no_json(tmp_path):
    card = Card(SAMPLE.model, SAMPLE.class_names, SAMPLE.preprocessing, {"x": {1, 2}}, {}, "")
    with pytest.raises(CalmError, match=r"training summary must be plain JSON.*set"):
        card.write(tmp_path / "calm.json")
    assert not list(tmp_path.iterdir())
