"""Untrusted and damaged checkpoints: a model, or CalmError that names the file; no code in it is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from fuzzing import Marker, cases, damaged, outcome
from hypothesis import given, strategies as st

from calm.checkpoint import CARD, WEIGHTS, Card
from calm.errors import CalmError
from calm.model import CalmModel, create_model, load
from calm.released import load_released, read_released

pytestmark = pytest.mark.stress


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("tiny_resnet", 3, class_names=["a", "b", "c"])
    return model.save_pretrained(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def work(saved: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, saved.parent / "work"))


def sign(folder: Path) -> None:
    """Write the digest of the weights as they are now to the card, so that their content is read."""
    card = json.loads((folder / CARD).read_text())
    card["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    (folder / CARD).write_text(json.dumps(card))


def read(folder: Path) -> CalmModel | None:
    model = outcome(partial(load, folder), CARD, WEIGHTS)
    if model is not None:
        assert model.config.num_classes == len(model.class_names)
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 32, 32)).probs.shape == (1, 3)
    return model


# Our own: calm.json and model.safetensors


@cases(60)
@given(data=st.data())
def test_load_of_damaged_weights(saved: Path, work: Path, data: st.DataObject) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    shutil.copyfile(saved / CARD, work / CARD)
    if data.draw(st.booleans()):  # most of the file are numbers, any of which is as good as another
        content = data.draw(damaged(whole[:header])) + whole[header:]
    else:
        content = data.draw(damaged(whole))
    (work / WEIGHTS).write_bytes(content)
    if content != whole:
        with pytest.raises(CalmError, match=WEIGHTS):
            load(work)
    sign(work)
    read(work)


@cases(60)
@given(data=st.data())
def test_load_of_a_damaged_card(saved: Path, work: Path, data: st.DataObject) -> None:
    shutil.copyfile(saved / WEIGHTS, work / WEIGHTS)
    (work / CARD).write_bytes(data.draw(damaged((saved / CARD).read_bytes())))
    read(work)


NUMBERS = ("NaN", "Infinity", "-1e999", "1e308", "9" * 30, "-0", "0", "1", "2", "-1", "1.5", "1e2", "8193")
OTHERS = (
    "null",
    "true",
    '""',
    '"x"',
    "[]",
    "{}",
    "[[]]",
    '{"a": 1}',
    '"\\ud800"',
    '"../../x"',
    '"hf-hub:a/b"',
    '"timm/"',
)


@cases(80)
@given(data=st.data())
def test_load_of_a_card_with_other_values(saved: Path, work: Path, data: st.DataObject) -> None:
    shutil.copyfile(saved / WEIGHTS, work / WEIGHTS)
    card = json.loads((saved / CARD).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from([card, card["model"], card["preprocessing"], card["preprocessing"]["size"]]))
        keys = sorted(place) if isinstance(place, dict) else [0, 1]
        key = data.draw(st.sampled_from(keys))
        match data.draw(st.integers(0, 4)):
            case 0 if isinstance(place, dict) and key not in ("model", "preprocessing", "size"):
                del place[key]
            case 1 if isinstance(place, dict):
                place[data.draw(st.text(max_size=5))] = 1
            case _ if key not in ("model", "preprocessing", "size"):
                place[key] = "\0" + data.draw(st.sampled_from([*NUMBERS, *OTHERS]))
            case _:
                pass
    text = json.dumps(card)
    for value in (*NUMBERS, *OTHERS):
        text = text.replace(json.dumps("\0" + value), value)
    (work / CARD).write_text(text)
    read(work)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = safetensors.torch.load_file(folder / WEIGHTS)
    return state


HEAD = "head.conv_last.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state | {HEAD: state[HEAD][:2].clone()}, r"\(2, \d+, 1, 1\) for 3 classes"),
        (lambda state: state | {HEAD: torch.zeros(3, 0, 1, 1)}, r"\(3, 0, 1, 1\) for 3 classes"),
        (lambda state: state | {HEAD: torch.tensor(0.0)}, "for 3 classes"),
        (lambda state: {key: value for key, value in state.items() if key != HEAD}, "is none for 3 classes"),
        (lambda state: state | {HEAD: state[HEAD].to(torch.complex64)}, "complex64"),
        (lambda state: state | {HEAD: state[HEAD].to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        (lambda state: state | {HEAD: state[HEAD].bool()}, "bool"),
        (lambda state: state | {"x" * 9000: torch.zeros(1)}, "1 unexpected: xxx"),
        (lambda state: {}, "is none for 3 classes"),
    ],
)
def test_load_refuses_weights_of_another_shape_or_kind(saved: Path, tmp_path: Path, change: Any, words: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    safetensors.torch.save_file(change(stored(folder)), folder / WEIGHTS)
    sign(folder)
    with pytest.raises(CalmError, match=words) as caught:
        load(folder)
    assert WEIGHTS in str(caught.value)
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 1, "format": 1}', "'format' is there twice"),
        ('{"format": ' + "9" * 30 + "}", "of a newer release"),
        pytest.param('{"format": 1, "model": {"backbone": "' + "x" * 9000 + '"}}', "lacks the field", id="long"),
        ("[1]", "must be a JSON object"),
        ("", "as JSON"),
        ("\ufeff{}", "must be a JSON object"),
    ],
)
def test_card_read_refuses_another_form_with_the_reason(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / CARD).write_text(text)
    with pytest.raises(CalmError, match=words) as caught:
        Card.read(tmp_path / CARD)
    assert CARD in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("side", [0, -1, 8193])
def test_load_refuses_an_input_size_beyond_the_limit(saved: Path, tmp_path: Path, side: int) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    card = json.loads((folder / CARD).read_text())
    card["preprocessing"]["size"] = [side, 32]
    (folder / CARD).write_text(json.dumps(card))
    with pytest.raises(CalmError, match=rf"{CARD}.*preprocessing.*1 to 8192"):
        load(folder)


@pytest.mark.parametrize("name", [CARD, WEIGHTS])
def test_load_refuses_a_part_that_is_no_regular_file(saved: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    (folder / name).unlink()
    (folder / name).symlink_to(os.devnull)
    with pytest.raises(CalmError, match=name):
        load(folder)


# The released code's: a pickle


def content(**fields: Any) -> dict[str, Any]:
    state = {"module.conv_last.weight": torch.ones(3, 4, 1, 1), "module.attention.0.bias": torch.ones(1)}
    whole = {"architecture": "resnet50", "epoch": 3, "state_dict": state, "optimizer": {"state": {0: torch.ones(2)}}}
    return whole | fields


@pytest.fixture(scope="module", params=["zip", "legacy"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "whole.pth.tar"
    torch.save(content(), path, _use_new_zipfile_serialization=request.param == "zip")
    return path


@cases(150)
@given(data=st.data())
def test_read_released_of_damaged_checkpoints(released: Path, data: st.DataObject) -> None:
    path = released.parent / "damaged.pth.tar"
    path.write_bytes(data.draw(damaged(released.read_bytes())))
    found = outcome(partial(read_released, path), path.name)
    if found is not None:
        assert found.architecture == "resnet50"
        assert all(isinstance(tensor, torch.Tensor) for tensor in found.state.values())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda marker: content(epoch=Marker(marker)),
        lambda marker: content(state_dict={"conv_last.weight": Marker(marker)}),
        lambda marker: Marker(marker),
        lambda marker: content(state_dict=[torch.ones(1)]),
        lambda marker: content(state_dict={}),
        lambda marker: content(state_dict={3: torch.ones(1)}),
        lambda marker: content(state_dict={"a": [["x"], ["x"]]}),
        lambda marker: content(state_dict={"a": torch.ones(1).expand(100)}),
        lambda marker: content(state_dict={"a": torch.eye(3).to_sparse()}),
        lambda marker: content(state_dict={"a": torch.full((2,), torch.nan)}),
        lambda marker: content(state_dict={"a" * 9000: torch.full((2,), torch.inf)}),
        lambda marker: content(architecture=[["x"], ["x"]]),
        lambda marker: content(architecture="x" * 9000),
        lambda marker: content(architecture=3),
        lambda marker: {"x" * 9000: 1},
        lambda marker: [["x"], ["x"]],
        lambda marker: None,
    ],
)
def test_read_released_refuses_what_is_no_released_checkpoint(tmp_path: Path, make: Any, legacy: bool) -> None:
    path = tmp_path / "last_checkpoint.pth.tar"
    torch.save(make(tmp_path / "marker"), path, _use_new_zipfile_serialization=not legacy)
    assert outcome(partial(read_released, path), path.name) is None
    assert not (tmp_path / "marker").exists()


def test_read_released_runs_no_code_of_a_plain_pickle(tmp_path: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "a.pth.tar").write_bytes(pickle.dumps(Marker(tmp_path / "marker"), protocol))
        with pytest.raises(CalmError, match=r"a\.pth\.tar.*nothing in it was run"):
            read_released(tmp_path / "a.pth.tar")
    assert not (tmp_path / "marker").exists()


def test_load_released_refuses_classes_without_weights(tmp_path: Path) -> None:
    path = tmp_path / "a.pth.tar"
    torch.save(content(state_dict={"conv_last.weight": torch.zeros(3, 0, 1, 1)}), path)
    with pytest.raises(CalmError, match=r"a\.pth\.tar.*conv_last\.weight"):
        load_released(path, method="cam", large_feature_map=True)


@pytest.mark.parametrize("epoch", [-1, 2**31, True, "3", None])
def test_read_released_leaves_out_an_epoch_that_is_none(tmp_path: Path, epoch: Any) -> None:
    torch.save(content(epoch=epoch), tmp_path / "a.pth.tar")
    assert read_released(tmp_path / "a.pth.tar").epoch is None
