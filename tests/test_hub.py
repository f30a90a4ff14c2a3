"""A model goes to the hub and comes back: against a fake hub in this process, through the real client."""

from __future__ import annotations

import base64
import io
import json
import re
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import HFValidationError, validate_repo_id
from PIL import Image
from torch.testing import assert_close

import calm
from calm.checkpoint import CARD, HUB_ID, README, WEIGHTS
from calm.cli import main
from calm.errors import CalmError
from calm.evaluate.result import Result
from calm.evaluate.subject import weights_digest
from calm.metrics.bootstrap import Estimate


class Hub(BaseHTTPRequestHandler):
    """What the client asks for: repositories, commits of files, and their download by revision."""

    files: dict[str, dict[str, bytes]]  # by revision
    requests: list[str]

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):
        found = re.fullmatch(r"/owner/birds/resolve/(\w+)/(.+)", self.path)
        if self.path == "/":
            self.answer()
        elif found and found[1] not in self.files:
            self.answer(status=404, X_Error_Code="RevisionNotFound")
        elif found and found[2] in self.files[found[1]]:
            content = self.files[found[1]][found[2]]
            self.answer(content, ETag=f'"{sha256(content).hexdigest()}"', X_Repo_Commit=found[1].ljust(40, "0"))
        else:
            self.answer(status=404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append(f"{self.path} {self.headers['Authorization']}")
        said = {"url": "https://huggingface.co/owner/birds", "id": "owner/birds"}  # the client accepts no other host
        if "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            said = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.files["main"][value["path"]] = base64.b64decode(value["content"])
            said = {"commitUrl": "https://huggingface.co/owner/birds/commit/1", "commitOid": "1"}
        self.answer(json.dumps(said).encode(), Content_Type="application/json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one empty repository, and an empty cache."""

    class Mine(Hub):
        files, requests = {"main": {}}, []

    with ThreadingHTTPServer(("127.0.0.1", 0), Mine) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield Mine
        server.shutdown()


def made(method="calm-em", names=("crow", "raven")):
    preprocessing = calm.Preprocessing(size=(32, 32))
    model = calm.create_model("tiny_resnet", len(names), method, class_names=names, preprocessing=preprocessing)
    model.training_summary = {"data": "birds", "fingerprint": "f00", "validation": {"accuracy": 0.91234}}
    return model


def test_a_model_goes_to_the_hub_with_a_page_and_comes_back_by_revision_and_offline(hub, monkeypatch):
    model = made()
    assert model.push_to_hub("owner/birds", token="secret") == "https://huggingface.co/owner/birds/commit/1"
    assert hub.files["main"].keys() == {CARD, WEIGHTS, README}
    assert all(request.endswith("Bearer secret") for request in hub.requests)
    page = hub.files["main"][README].decode()
    assert page.startswith("---\nlibrary_name: calm\npipeline_tag: image-classification\n")
    for text in ('calm.load("owner/birds")', "p(y, z | x)", "- validation, accuracy: 0.9123", "crow, raven", "CALM-EM"):
        assert text in page
    assert "f00" not in page

    hub.files["v1"] = dict(hub.files["main"])
    with torch.no_grad():
        model.head.conv_last.bias += 1
    hub.files["main"][README] = b"mine"
    model.push_to_hub("owner/birds", token="secret")
    assert hub.files["main"][README] == b"mine"  # what people wrote stays
    assert_close(calm.load("owner/birds").state_dict(), model.state_dict())
    former = calm.CalmModel.from_pretrained("owner/birds", revision="v1")
    assert_close(former.head.conv_last.bias + 1, model.head.conv_last.bias)
    with pytest.raises(CalmError, match="no saved model at owner/birds, revision v9: there"):
        calm.load("owner/birds", revision="v9")
    model.push_to_hub("owner/birds", token="secret", overwrite_card=True)
    assert hub.files["main"][README] != b"mine"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.files.clear()
    assert_close(calm.load("owner/birds").state_dict(), model.state_dict())
    assert_close(calm.load("owner/birds", revision="v1").state_dict(), former.state_dict())


def test_calm_push_shows_figures_with_intervals_and_an_example(hub, tmp_path, capsys):
    model, folder = made("cam"), tmp_path / "run" / "evaluation" / "classification"
    model.training_summary["posterior_entropy_relative"] = 0.99
    model.save_pretrained(tmp_path / "run")
    for label, value, weights in (("CAM", 0.75, weights_digest(model)), ("ANOTHER", 0.99, "f00")):
        about = {"data": {"root": "birds"}, "subject": {"weights": weights}}
        figures = {"top1": Estimate(value, value - 0.05, value + 0.05)}
        Result("classification", label, figures, provenance=about).save(folder / f"{label}.json")
    Image.new("RGB", (40, 30), "green").save(tmp_path / "bird.png")
    words = ["push", "owner/birds", "--model", str(tmp_path / "run"), "--example", str(tmp_path / "bird.png")]
    assert main(words) == 0
    assert capsys.readouterr().out == "https://huggingface.co/owner/birds/commit/1\n"
    page = hub.files["main"][README].decode()
    assert re.search(r"### classification .*\n\n.*\n.*\n\| CAM \| .*75\.0.*70\.0.*80\.0", page)
    assert "ANOTHER" not in page
    assert "Of this model: its maps are almost flat" in page
    assert "![A picture, and where the model saw the evidence](example.png)" in page
    assert "mean is the class's logit" in page
    with Image.open(io.BytesIO(hub.files["main"]["example.png"])) as example:
        assert example.size == (40, 30)
    assert main([*words, "--evaluation", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (folder / "CAM.json").unlink()
    assert main(words) == 2
    assert "is of the weights of" in capsys.readouterr().err


NAMES = ["me/birds", "a-b.c_1/d", "me/.x", "me/x-", "me/a--b", "me/a..b", "me/x.git", "m e/x", "-/x", "me/" + 97 * "x"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_models_on_the_hub_are_those_of_its_client(name):
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not HUB_ID.fullmatch(name)
    else:
        assert HUB_ID.fullmatch(name)


@pytest.mark.parametrize("name", ["bad name", "birds", "me/birds/v1", "../birds"])
def test_push_names_a_wrong_name_before_anything_else(name, monkeypatch, capsys):
    monkeypatch.setattr("calm.checkpoint.no_answer", None)  # neither the network nor the model is looked for
    assert main(["push", name, "--model", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"calm: {name!r} cannot be a model on the Hugging Face Hub: give user/name")
    with pytest.raises(CalmError, match="give user/name"):
        made().push_to_hub(name)
    with pytest.raises(CalmError, match=f"no saved model at {name}: no such folder.*, and no hub id either"):
        calm.load(name)


def test_push_says_that_there_is_no_network_before_it_reads_the_model(monkeypatch, capsys):
    monkeypatch.setattr("calm.checkpoint.no_answer", lambda url: "the hub does not answer")
    assert main(["push", "me/birds", "--model", "nowhere"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "calm: cannot upload to 'me/birds' on the Hugging Face Hub: the hub does not answer; connect"
    )


def test_the_page_of_many_classes_names_the_first(hub):
    made(names=[f"class {number}" for number in range(203)]).push_to_hub("owner/birds", token="secret")
    assert "class 199, and 3 more (calm.json)" in hub.files["main"][README].decode()


def test_a_folder_has_no_revision(tmp_path):
    made().save_pretrained(tmp_path / "model")
    with pytest.raises(CalmError, match="has no revision 'v1': leave revision out"):
        calm.load(tmp_path / "model", revision="v1")
