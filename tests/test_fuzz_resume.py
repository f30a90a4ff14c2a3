"""Untrusted run folders: `calm train` resumes as it must, or CalmError names the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Marker, cases, damaged, outcome
from hypothesis import given, strategies as st
from stress_counts import FULL
from train_cases import checkpoint_of, tiny_config, tiny_net, weights_of, write_squares

from calm.errors import CalmError
from calm.files import read_torch
from calm.train import checkpoints
from calm.train.config import TrainConfig
from calm.train.run import train

pytestmark = [pytest.mark.stress, pytest.mark.filterwarnings("ignore:The dataloader:UserWarning")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that is over."""
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_config(write_squares(folder / "data", train=4, other=2), folder / "finished")
    train(config, backbone=tiny_net(), quiet=True)
    return config


@pytest.fixture(scope="module")
def stopped(finished: TrainConfig) -> TrainConfig:
    """The same run, stopped after its second epoch."""
    config = tiny_config(finished.data, finished.data.parent / "stopped")

    class StopError(Exception):
        pass

    before = checkpoints.save_checkpoint

    def save(checkpoint: dict[str, Any], path: Path) -> None:
        before(checkpoint, path)
        if checkpoint["epoch"] == 2:
            raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save_checkpoint", save)
        with pytest.raises(StopError):
            train(config, backbone=tiny_net(), quiet=True)
    return config


@pytest.fixture
def run(stopped: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A copy of the stopped run, to be damaged."""
    assert stopped.run_dir is not None
    shutil.copytree(stopped.run_dir, tmp_path / "run")
    return tiny_config(stopped.data, tmp_path / "run")


def go_on(config: TrainConfig) -> Path:
    return train(config, backbone=tiny_net(), quiet=True)


def test_train_resumes_an_undamaged_run_to_the_same_end(run: TrainConfig, finished: TrainConfig) -> None:
    assert finished.run_dir is not None
    end, whole = weights_of(go_on(run)), weights_of(finished.run_dir)
    assert all(torch.equal(end[name], whole[name]) for name in whole)


@cases(60)
@given(data=st.data())
def test_load_checkpoint_of_damaged_files(stopped: TrainConfig, data: st.DataObject) -> None:
    assert stopped.run_dir is not None
    whole = (stopped.run_dir / "checkpoints" / "last.ckpt").read_bytes()
    path = stopped.run_dir.parent / "damaged.ckpt"
    path.write_bytes(data.draw(damaged(whole)))
    found = outcome(partial(read_torch, path, "checkpoint"), path.name)
    if found is not None:  # the damage was where nothing is read: between the files of the archive, say
        good = checkpoint_of(stopped.run_dir)
        assert found["epoch"] == good["epoch"]
        assert all(torch.equal(found["model"][name], good["model"][name]) for name in good["model"])


def first_key(tree: dict[str, Any]) -> str:
    return next(name for name, value in tree.items() if value.ndim > 1)


def widened(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["model"]
    state[first_key(state)] = torch.zeros(3, 1000)


def renamed(checkpoint: dict[str, Any]) -> None:
    state = checkpoint["model"]
    state["other"] = state.pop(first_key(state))


CHANGES: list[Callable[[dict[str, Any]], Any]] = [
    widened,
    renamed,
    lambda checkpoint: checkpoint.update(optimizer=[]),
    lambda checkpoint: checkpoint.update(optimizer=3),
    lambda checkpoint: checkpoint["optimizer"]["param_groups"].pop(),
    lambda checkpoint: checkpoint["optimizer"].pop("state"),
    lambda checkpoint: checkpoint.update(scheduler=[3]),
    lambda checkpoint: checkpoint.update(scheduler={}),
    lambda checkpoint: checkpoint.update(history=3),
    lambda checkpoint: checkpoint.update(history=[]),
    lambda checkpoint: checkpoint["history"][0].update(seconds="long"),
    lambda checkpoint: checkpoint.update(averages={}),
    lambda checkpoint: checkpoint.update(best={}),
    lambda checkpoint: checkpoint.update(last={"epoch": "last"}),
    lambda checkpoint: checkpoint.update(epoch=7),
    lambda checkpoint: checkpoint.update(step=None),
    lambda checkpoint: checkpoint.update(model=None),
    lambda checkpoint: checkpoint.pop("model"),
    lambda checkpoint: checkpoint.clear(),
    lambda checkpoint: checkpoint.update(more=Marker(Path("marker"))),
]


@pytest.mark.parametrize("number", range(len(CHANGES)) if FULL else (0, 3, 9, len(CHANGES) - 1))
def test_train_refuses_a_checkpoint_of_another_content_or_ignores_it(run: TrainConfig, number: int) -> None:
    assert run.run_dir is not None
    path = run.run_dir / "checkpoints" / "last.ckpt"
    checkpoint = checkpoint_of(run.run_dir)
    CHANGES[number](checkpoint)
    torch.save(checkpoint, path)
    done = outcome(partial(go_on, run), str(path))
    assert done is None or (run.run_dir / "result.json").exists()
    assert not Path("marker").exists()


@pytest.mark.parametrize("name", ["data.json", "config.yaml"])
@pytest.mark.parametrize("text", ["", "[1]", "{", "a: &a [*b]", "3", "\0"])
def test_train_names_a_damaged_file_of_the_run_folder(run: TrainConfig, name: str, text: str) -> None:
    assert run.run_dir is not None
    (run.run_dir / name).write_text(text)
    with pytest.raises(CalmError, match=str(run.run_dir)):
        go_on(run)
