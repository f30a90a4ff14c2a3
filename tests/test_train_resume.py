"""A run that is killed and started again ends with the same weights, bit for bit, as one that was left alone."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cases import checkpoint_of, rich_config, start, tiny_net, write_squares

from calm.train import train


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, run folder)"""
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = write_squares(folder / "data")
    return data, train(rich_config(data, folder / "run"), backbone=tiny_net(), quiet=True)


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Equal to the last bit, but for what a clock says."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for name in a.keys() - {"seconds", "images_per_second"}:
            assert_same(a[name], b[name], f"{place}.{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{place}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    else:
        assert a == b, place


@pytest.mark.slow
@pytest.mark.parametrize("task", [{"kind": "kill in step", "step": 6}, {"kind": "kill while saving"}])
def test_killed_run_ends_as_if_it_had_not_been(
    uninterrupted: tuple[Path, Path], task: dict[str, Any], tmp_path: Path
) -> None:
    data, alone = uninterrupted
    run = tmp_path / "run"
    process = start(data=str(data), run_dir=str(run), **task)
    assert process.returncode == -9, process.stderr
    assert checkpoint_of(run)["last"]["epoch"] == 1
    assert not (run / "result.json").exists()
    train(rich_config(data, run, workers=1), backbone=tiny_net(), quiet=True)
    assert_same(checkpoint_of(run), checkpoint_of(alone))
    assert not list(run.rglob(".*"))
    ours, theirs = ((folder / "metrics.csv").read_text().splitlines() for folder in (run, alone))
    assert len(ours) == len(theirs) == 4


def test_kill_after_the_last_epoch_only_measures(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    data, alone = uninterrupted
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    (run / "result.json").unlink()
    shutil.rmtree(run / "best")  # killed between the checkpoint and the saved models
    shutil.rmtree(run / "last")
    train(rich_config(data, run), backbone=tiny_net(), quiet=True)
    assert (run / "result.json").read_text() == (alone / "result.json").read_text()
    assert (run / "last" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_so_and_continues(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    data, run = write_squares(tmp_path / "data"), tmp_path / "run"
    command = [sys.executable, "-m", "calm.cli", "train", "--preset", "birds", "--data", str(data)]
    command += ["--run_dir", str(run), "--backbone", "tiny_resnet", "--batch_size", "8", "--epochs"]
    process = subprocess.Popen(
        [*command, "2000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    said = ""
    while "epoch    2/" not in said and process.poll() is None:
        said += process.stdout.readline()
    process.send_signal(sent)
    said += process.communicate(timeout=60)[0]
    assert process.returncode == code, said
    assert "Traceback" not in said
    found = re.search(r"interrupted: the same command continues after epoch (\d+)\n", said)
    if found:
        assert checkpoint_of(run)["last"]["epoch"] == int(found[1])
    else:
        assert "interrupted: the same command starts again: no epoch was finished\n" in said
        assert not (run / "checkpoints" / "last.ckpt").exists()
