"""The command line: quick to start, helpful when asked, one line when something is wrong."""

from __future__ import annotations

import inspect
import os
import re
import shlex
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
from calm.cli.parsing import build_parser, parse
from calm.errors import CalmError


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "calm.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
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


def test_the_module_is_the_command() -> None:
    assert run("--version").stdout.startswith("calm ")
    wrong = run("atribute")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    assert wrong.stderr.strip().count("\n") == 0
    assert "did you mean 'attribute'" in wrong.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dta birds x", "unknown command 'dta birds': .*; did you mean 'data birds'[?]"),
        ("data chek x", "unknown command 'data chek': .*; did you mean 'data check'[?]"),
        ("attribute a.jpg --modle x", "unknown flag --modle; did you mean --model[?]"),
        ("attribute a.jpg --modle=x", "unknown flag --modle; did you mean --model[?]"),
        ("attribute a.jpg --zzzzzzzz", "unknown flag --zzzzzzzz; see calm attribute --help"),
        ("attribute", "missing: images, --model; see calm attribute --help"),
        ("attribute a.jpg --model x --batch_size 1.5", "--batch_size is '1.5': give a whole number; see"),
        ("attribute a.jpg --model x --grid perhaps", "--grid is 'perhaps': give true or false; see"),
        ("train --metod cam", "unknown flag --metod; did you mean --method[?]"),
        ("train --data x --loss.tempertaure 1", "unknown flag .*; did you mean --loss.temperature[?]"),
        ("train --data x --method caml", "unknown value 'caml' in --method: .*; did you mean 'cam'[?]"),
        ("train --data x --lr high", "--lr is 'high': give a number; see calm train --help"),
        ("train --data x --method", "argument --method: expected one argument; see calm train --help"),
        ("data birds a b", "nothing is known to do with b; see calm data birds --help"),
        ("data check x --layout cubs", "unknown value 'cubs' in --layout: .*; did you mean 'cub'[?]"),
        ("data prepare cub --form x", "unknown flag --form; did you mean --from[?]"),
        ("data prepare cub", "missing: --from, --out; see calm data prepare --help"),
        ("data prepare cubb --from x --out y", "unknown value 'cubb' in name: .*; did you mean 'cub'[?]"),
        ("evaluate all --modle x", "unknown flag --modle; did you mean --model[?]"),
    ],
)
def test_a_mistyped_line_is_told_its_fix(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"calm: {message}.*\n", said), said


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    said = capsys.readouterr().out
    assert f"usage: calm {name}" in said
    assert "examples:" in said
    assert f"  calm {name} " in said or f"  calm {name}\n" in said
    assert "``" not in said
    assert ":func:" not in said
    assert "SUPPRESS" not in said


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.own_parser])
def test_each_flag_has_a_help_text(name: str) -> None:
    parser = COMMANDS[name].parser(name)
    bare = [action.dest for action in parser._actions if not (action.help or "").strip()]
    assert not bare


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.own_parser])
def test_the_examples_are_accepted(name: str) -> None:
    command = COMMANDS[name]
    parser = command.parser(name)
    for line in command.examples.strip().splitlines():
        words = shlex.split(line)
        assert words[: 1 + len(name.split())] == ["calm", *name.split()]
        parse(parser, words[1 + len(name.split()) :])


def test_data_alone_shows_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data"]) == 0
    said = capsys.readouterr().out
    assert "data birds" in said
    assert "attribute" not in said


def test_nothing_asked_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


# --- a command made for the tests ---------------------------------------------------------------------------


def stand_in(
    files: list[Path],
    size: int,
    *,
    model: str,
    kind: Literal["a", "b"] = "a",
    deep: bool = False,
    lr: float = 0.1,
) -> dict[str, Any]:
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
    return {"files": files, "size": size, "model": model, "kind": kind, "deep": deep, "lr": lr}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []

    def finish(result: Any) -> int:
        seen.append(result)
        return 7

    module = sys.modules[__name__]
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    monkeypatch.setitem(COMMANDS, "test", Command("here:stand_in", "a line", "  calm test\n", finish))
    monkeypatch.delenv("CALM_DEBUG", raising=False)
    return seen


def test_flags_become_arguments_and_the_result_the_exit_code(results: list[Any]) -> None:
    assert main(["test", "a", "b", "3", "--model=m", "--kind", "b", "--deep"]) == 7
    assert results == [
        {"files": [Path("a"), Path("b")], "size": 3, "model": "m", "kind": "b", "deep": True, "lr": 0.1}
    ]
    assert main(["test", "a", "3", "--model", "m", "--deep=false", "--lr", "2"]) == 7
    assert results[1] == {
        "files": [Path("a")],
        "size": 3,
        "model": "m",
        "kind": "a",
        "deep": False,
        "lr": 2.0,
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "3"], "model"),
        (["a", "x", "--model", "m"], "size"),
        (["a", "3", "--model", "m", "--kind", "c"], "kind"),
        (["a", "3", "--model", "m", "--depe"], "--depe"),
        (["a", "13", "--model", "m"], "13 is no size: choose another"),
        (["a", "12", "--model", "m"], "Permission denied: '/somewhere'"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    words: list[str], message: str, results: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", *words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("calm: ")
    assert message in said.err
    assert said.err.count("\n") == 1
    assert not results


def test_debug_shows_where_it_went_wrong(results: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["test", "a", "13", "--model", "m"]
    with pytest.raises(CalmError):
        main(["--debug", *words])
    monkeypatch.setenv("CALM_DEBUG", "1")
    with pytest.raises(CalmError):
        main(words)
    monkeypatch.setenv("CALM_DEBUG", "0")
    assert main(words) == 2


def test_an_interrupt_is_code_130_and_a_fault_keeps_its_traceback(
    results: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["test", "a", "14", "--model", "m"]) == 130
    assert capsys.readouterr().err == "calm: interrupted\n"
    with pytest.raises(RuntimeError, match="a fault of the program"):
        main(["test", "a", "15", "--model", "m"])


def test_help_speaks_of_values_not_of_types() -> None:
    help_text = build_parser(stand_in, prog="calm test", examples="  calm test\n").format_help()
    assert "class '" not in help_text
    assert "type:" not in help_text
    assert "None" not in help_text
    assert "about it and that." in help_text
    assert "FILE [FILE ...] size" in help_text
    assert "(default: 0.1)" in help_text
    assert "{a,b}" in help_text
    assert help_text.rstrip().endswith("calm test")


def test_hyphens_and_underscores_are_the_same() -> None:
    assert cli._underscored("--batch-size=a-b") == "--batch_size=a-b"
    assert cli._underscored("a-b") == "a-b"
    assert cli._underscored("-h") == "-h"


def test_what_the_command_sets_is_no_flag() -> None:
    parser = build_parser(stand_in, prog="p", examples="", fixed=["lr"])
    assert "--lr" not in parser.format_help()
    with pytest.raises(CalmError, match="--lr"):
        parse(parser, ["a", "3", "--model", "m", "--lr", "2"])
    assert "lr" not in parse(parser, ["a", "3", "--model", "m"])


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_can_be_called_from_python_too(name: str) -> None:
    assert inspect.getdoc(COMMANDS[name].load())


def test_a_saved_model_explains_an_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_check_gives_code_1_for_a_bad_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("train/owl", "train/auk", "test/owl", "test/auk"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "broken.jpg").write_text("no image")
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "broken.jpg" in capsys.readouterr().out
