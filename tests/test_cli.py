"""The command line: quick to start, helpful when asked, one line when something is wrong."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import calm
from calm import cli
from calm.cli import COMMANDS, Command, main
from calm.errors import CalmError


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "calm.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_main_shows_help_quickly_without_heavy_imports() -> None:
    code = (
        "import sys; from calm.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'jsonargparse', 'rich', 'PIL', 'matplotlib'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    times = []
    for _ in range(3):
        start = time.process_time() + sum(os.times()[2:4])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        times.append(time.process_time() + sum(os.times()[2:4]) - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 0.5, "seconds of processor time"
    assert all(f"calm {name}" in done.stdout for name in COMMANDS)


def test_main_runs_as_module() -> None:
    assert run("--version").stdout.startswith("calm ")
    wrong = run("atribute")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.strip().count("\n") == 0
    assert "did you mean 'attribute'" in wrong.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_main_shows_help_with_examples_of_each_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: calm {name}" in said
    assert "examples:" in said
    assert f"  calm {name} " in said or f"  calm {name}\n" in said
    assert "``" not in said
    assert ":func:" not in said
    assert "SUPPRESS" not in said


def test_main_lists_the_commands_of_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    said = capsys.readouterr().out
    assert "data birds" in said
    assert "attribute" not in said


def test_main_without_a_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


# --- a command made for the tests ---------------------------------------------------------------------------


class Given(dict[str, Any]):
    """A result with a finding, which exit code 1 reports."""

    seen: list[Given] = []  # noqa: RUF012
    ok = False


def stand_in(
    files: list[Path], size: int, *, model: str, kind: Literal["a", "b"] = "a", deep: bool = False, lr: float = 0.1
) -> Given:
    """Do something.

    A longer text about ``it`` and :func:`that`.

    Args:
        files: what to read.
        size: how large.
        model: which.
        kind: one of two.
        deep: go deep.
        lr: a rate.

    Returns:
        What it was given.
    """
    if size == 13:
        raise CalmError("13 is no size: choose another")
    if size == 12:
        raise PermissionError(13, "Permission denied", "/somewhere")
    if size == 14:
        raise KeyboardInterrupt
    if size == 15:
        raise RuntimeError("a fault of the program")
    Given.seen.append(Given(files=files, size=size, model=model, kind=kind, deep=deep, lr=lr))
    return Given.seen[-1]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Given]:
    Given.seen.clear()
    module = sys.modules[__name__]
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    monkeypatch.setitem(COMMANDS, "test", Command("here:stand_in", "a line", "  calm test\n", prints=True))
    monkeypatch.delenv("CALM_DEBUG", raising=False)
    return Given.seen


def test_main_turns_flags_into_arguments_and_the_result_into_the_exit_code(results: list[Any]) -> None:
    assert main(["test", "a", "b", "3", "--model=m", "--kind", "b", "--deep"]) == 1
    assert results == [{"files": [Path("a"), Path("b")], "size": 3, "model": "m", "kind": "b", "deep": True, "lr": 0.1}]
    assert main(["test", "a", "3", "--model", "m", "--deep=false", "--lr", "2"]) == 1
    assert results[1] == {"files": [Path("a")], "size": 3, "model": "m", "kind": "a", "deep": False, "lr": 2.0}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "3"], "model"),
        (["a", "x", "--model", "m"], "size"),
        (["a", "3", "--model", "m", "--kind", "c"], "kind"),
        (["a", "3", "--model", "m", "--depe"], "--depe"),
        (["a", "13", "--model", "m"], "13 is no size: choose another"),
        (
            ["a", "12", "--model", "m"],
            "cannot use /somewhere: Permission denied; change its permissions, or name another",
        ),
    ],
)
def test_main_reports_a_mistake_in_one_line_and_code_2(
    words: list[str], message: str, results: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("calm: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not results


def test_main_raises_errors_with_debug(results: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["test", "a", "13", "--model", "m"]
    with pytest.raises(CalmError):
        main(["--debug", *words])
    monkeypatch.setenv("CALM_DEBUG", "1")
    with pytest.raises(CalmError):
        main(words)
    monkeypatch.setenv("CALM_DEBUG", "0")
    assert main(words) == 2


def test_main_returns_130_after_an_interrupt_and_raises_bugs(
    results: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", "a", "14", "--model", "m"]) == 130
    assert capsys.readouterr().err == "calm: interrupted\n"
    with pytest.raises(RuntimeError, match="a fault of the program"):
        main(["test", "a", "15", "--model", "m"])


def test_underscored_changes_flags_only() -> None:
    assert cli._underscored("--batch-size=a-b") == "--batch_size=a-b"
    assert cli._underscored("a-b") == "a-b"
    assert cli._underscored("-h") == "-h"


@pytest.mark.parametrize("name", COMMANDS)
def test_command_load_gives_a_documented_function(name: str) -> None:
    assert inspect.getdoc(COMMANDS[name].load())


def test_main_attribute_explains_an_image_with_a_saved_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = calm.create_model(
        "small_resnet", 3, class_names=["owl", "auk", "wren"], preprocessing=calm.Preprocessing((32, 32))
    )
    model.save_pretrained(tmp_path / "model")
    Image.new("RGB", (50, 40), (200, 100, 50)).save(tmp_path / "a.png")
    words = ["--model", str(tmp_path / "model"), str(tmp_path / "a.png"), "--out", str(tmp_path / "out")]
    assert main(["attribute", *words, "--target", "auk", "--grid"]) == 0
    assert "auk" in capsys.readouterr().out
    grid = np.load(tmp_path / "out" / "a.joint.grid.npy")
    with torch.no_grad():
        probs = model.eval()(model.preprocess(tmp_path / "a.png")).probs
    assert grid.sum() == pytest.approx(float(probs[0, 1]), rel=1e-4)
    assert main(["attribute", *words, "--target", "gull"]) == 2
    assert "no class 'gull'" in capsys.readouterr().err


def test_main_data_check_returns_1_for_a_bad_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("train/owl", "train/auk", "test/owl", "test/auk"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "broken.jpg").write_text("no image")
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "broken.jpg" in capsys.readouterr().out


def test_main_shows_a_warning_in_one_line() -> None:
    code = "import warnings; from calm.cli import main; main(['--version']); warnings.warn('by number')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "calm: warning: by number\n"
