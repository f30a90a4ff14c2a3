"""Parsers made from signatures: help pages, values, and what a mistyped command line is answered."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Literal

import pytest

from calm.cli import COMMANDS, main
from calm.cli.parsing import build_parser, parse
from calm.cli.train import parse as parse_train
from calm.errors import CalmError
from calm.train.config import TrainConfig
from calm.train.folder import config_dict, flattened


def stand_in(
    files: list[Path], size: int, *, model: str, kind: Literal["a", "b"] = "a", deep: bool = False, lr: float = 0.1
) -> None:
    """Do something.

    A longer text about ``it`` and :func:`that`.

    Args:
        files: what to read.
        size: how large.
        model: which.
        kind: one of two.
        deep: go deep.
        lr: a rate.
    """


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
        ("train --data d --model resnet18", "unknown flag --model; did you mean --backbone[?]"),
        ("train --data d --device cpu", "unknown flag --device; did you mean --hardware.accelerator[?]"),
        ("train --data d --cpu", "unknown flag --cpu; did you mean --hardware.accelerator cpu[?]"),
        ("train --data d --gpu=1", "unknown flag --gpu; did you mean --hardware.accelerator gpu[?]"),
        ("attribute a.jpg --cuda", "unknown flag --cuda; did you mean --device cuda[?]"),
        ("train --data d --freeze true", "unknown flag --freeze; did you mean --model.freeze[?]"),
        ("train --data d --class owl", "unknown flag --class; calm attribute --model RUN IMAGE --target CLASS"),
        ("evaluate all --heatmap joint", "unknown flag --heatmap; calm attribute --model RUN IMAGE --kind KIND"),
        ("attribute a.jpg --class owl", "unknown flag --class; did you mean --target[?]"),
        ("attribute a.jpg --heatmap cam", "unknown flag --heatmap; did you mean --kind[?]"),
        ("attribute a.jpg --run_dir maps", "unknown flag --run_dir; did you mean --out[?]"),
        ("train --metod cam", "unknown flag --metod; did you mean --method[?]"),
        ("train --data x --loss.tempertaure 1", "unknown flag .*; did you mean --loss.temperature[?]"),
        ("train --data x --method caml", "unknown value 'caml' in --method: .*; did you mean 'cam'[?]"),
        ("train --data x --lr high", "--lr is 'high': give a number; see calm train --help"),
        ("train --data x --method", "argument --method: expected one argument; see calm train --help"),
        ("data birds a b", "'b' belongs to no flag; see calm data birds --help"),
        ("train pics", "'pics' belongs to no flag; did you mean --data pics[?]"),
        ("train --preset small --epochs 3 pics", "'pics' belongs to no flag; did you mean --data pics[?]"),
        ("train --preset small", "missing: --data; see calm train --help"),
        ("export runs/birds", "'runs/birds' belongs to no flag; did you mean --model runs/birds[?]"),
        ("sweep --trial 3", "unknown flag --trial; did you mean --trials[?]"),
        ("data check x --layout cubs", "unknown value 'cubs' in --layout: .*; did you mean 'cub'[?]"),
        ("data prepare cub --form x", "unknown flag --form; did you mean --from[?]"),
        ("data prepare cub", "missing: --from, --out; see calm data prepare --help"),
        ("data prepare cubb --from x --out y", "unknown value 'cubb' in name: .*; did you mean 'cub'[?]"),
        ("attribute a.jpg --model x b.jpg", "'b.jpg' belongs to no flag; give it next to a.jpg"),
        ("evaluate all --modle x", "unknown flag --modle; did you mean --model[?]"),
    ],
)
def test_parse_names_the_fix_of_a_mistyped_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(f"calm: {message}.*\n", said), said


@pytest.mark.parametrize("words", ["[csv,wandb]", "csv,wandb", "csv, wandb"])
def test_parse_takes_lists_with_and_without_brackets(words: str) -> None:
    assert parse_train(["--data", "d", "--log.loggers", words]).log.loggers == ["csv", "wandb"]
    assert parse_train(["--data", "d", "--log.loggers", "csv"]).log.loggers == ["csv"]
    assert parse_train(["--data", "d", "--log.loggers="]).log.loggers == []


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.own_parser])
def test_build_parser_gives_each_flag_a_help_text(name: str) -> None:
    parser = COMMANDS[name].parser(name)
    bare = [action.dest for action in parser._actions if not (action.help or "").strip()]
    assert not bare


@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.own_parser])
def test_parse_accepts_the_examples(name: str) -> None:
    command = COMMANDS[name]
    parser = command.parser(name)
    for line in command.examples.strip().splitlines():
        words = shlex.split(line, comments=True)
        assert words[: 1 + len(name.split())] == ["calm", *name.split()]
        parse(parser, words[1 + len(name.split()) :])


def test_format_help_shows_values_and_no_types() -> None:
    help_text = build_parser(stand_in, prog="calm test", examples="  calm test\n").format_help()
    assert "class '" not in help_text
    assert "type:" not in help_text
    assert "None" not in help_text
    assert "about it and that." in help_text
    assert "FILE [FILE ...] size" in help_text
    assert "(default: 0.1)" in help_text
    assert "{a,b}" in help_text
    assert help_text.rstrip().endswith("calm test")


def test_build_parser_makes_no_flag_of_fixed_parameters() -> None:
    parser = build_parser(stand_in, prog="p", examples="", fixed=["lr"])
    assert "--lr" not in parser.format_help()
    with pytest.raises(CalmError, match="--lr"):
        parse(parser, ["a", "3", "--model", "m", "--lr", "2"])
    assert "lr" not in parse(parser, ["a", "3", "--model", "m"])


def test_parse_reads_lists_of_flags_and_bare_switches() -> None:
    def copy(sources: list[str], out: Path, *, deep: bool = False) -> None:
        """Copy.

        Args:
            sources: from where.
            out: where to.
            deep: all levels.
        """

    parser = build_parser(copy, prog="p", examples="", flags={"sources": "--from", "out": "--out"})
    assert parse(parser, ["--from", "a", "b", "--deep", "--out", "c"]) == {
        "sources": ["a", "b"],
        "out": Path("c"),
        "deep": True,
    }
    with pytest.raises(CalmError, match="missing: --from; see p --help"):
        parse(parser, ["--out", "c"])


def test_train_help_fits_on_a_screen_and_help_all_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    first = capsys.readouterr().out.splitlines()
    assert len(first) <= 45
    assert max(map(len, first)) <= 120
    text = "\n".join(first)
    for part in ("--out", "resnet50", "(0.01)", "probe     A classifier that says where", "--help-all", "--suggest"):
        assert part in text
    assert main(["train", "--help-all"]) == 0
    every = capsys.readouterr().out
    flags = {f"--{name}" for name in flattened(config_dict(TrainConfig(Path()))) if name != "wsol.methods"}
    assert not {flag for flag in flags if flag not in every}
    assert "--loss.prior_weight" in every
    assert "--loss.prior_weight" not in text


def test_train_resume_names_a_missing_run_and_the_one_beside_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(CalmError, match=rf"no run of calm train is there \(did you mean {tmp_path}/run\?\)"):
        parse_train(["--resume", f"{tmp_path}/rnu"])


@pytest.mark.parametrize("words", [["--out", "here"], ["--out=here"], ["--run_dir", "here"]])
def test_train_takes_the_other_commands_word_for_its_folder(words: list[str]) -> None:
    assert parse_train(["--data=d", *words]).run_dir == Path("here")
