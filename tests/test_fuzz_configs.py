"""Untrusted YAML configurations: one that can be written and read again, or CalmError that names the file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import cases, damaged, damaged_text, outcome
from hypothesis import given, strategies as st

from calm.cli import train as command
from calm.cli.train import parse
from calm.errors import CalmError
from calm.files import read_yaml
from calm.train.config import TrainConfig
from calm.train.folder import config_dict, write_config

pytestmark = pytest.mark.stress

WHOLE = yaml.safe_dump(config_dict(TrainConfig(data=Path("/data/birds"))), sort_keys=False)
# fmt: off
WORDS = (
    "", "null", "~", "true", "yes", "0", "-1", "1", "3", "0.5", "1e-3", "1e400", ".nan", ".inf", "-.inf", "9" * 30,
    "0x10", "0o7", "1:30:00", "2020-99-99", "2020-01-01", "1_0", "cam", "calm-em", "sgd",
    "[1, 2]", "[0.9, 2]", "[]", "{}", "{a: 1}", "[[[[]]]]", "'text", '"', "|", ">", "&a", "*a", "<<:", "!x", "!!int x",
    "!!python/object/apply:io.open [marker, w]", "!!python/none", "!!binary aGk=", "!!set {a}", "!!float x",
    "data:", "epochs:", "lr:", "lr: 3", "optim:", "optim: 3", "optim: null", "config: other.yaml", "run_dir: 3", "\0",
    "? a", "- a", "...", "---", "%YAML 9.9", "%TAG ! x", "\t", "#", "class_path: io.open", "init_args: {}", "x" * 500,
)
# fmt: on


@pytest.fixture(autouse=True, scope="module")
def _one_parser() -> Iterator[None]:
    """Build the parser once: that takes most of the time of a parse, and a user's process does it once, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "build_parser", cache(command.build_parser))
        yield


def numbers(value: Any) -> Iterator[float]:
    if is_dataclass(value):
        for field in fields(value):
            yield from numbers(getattr(value, field.name))
    elif isinstance(value, tuple):
        for member in value:
            yield from numbers(member)
    elif isinstance(value, (int, float)):
        yield value


def read(path: Path) -> None:
    config = outcome(partial(parse, ["--config", str(path)]), path.name)
    if config is not None:
        assert all(math.isfinite(number) and abs(number) <= 1e38 for number in numbers(config))
        again = path.parent / "again"
        write_config(config, again)
        there = parse(["--config", str(again / "config.yaml")])
        assert replace(there, run_dir=again) == parse(["--resume", str(again)])


@cases(50)
@given(data=st.data())
def test_parse_of_damaged_configurations(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "configs"
    folder.mkdir(exist_ok=True)
    (folder / "mine.yaml").write_bytes(data.draw(damaged_text(WHOLE, WORDS)))
    read(folder / "mine.yaml")
    assert not Path("marker").exists()


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["cam", "0.5:1"])
)
GROUPS = ("reading", "augment", "model", "loss", "optim", "hardware", "log")


@cases(50)
@given(data=st.data())
def test_parse_of_values_of_any_type(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    tree = yaml.safe_load(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([tree, *(tree[name] for name in GROUPS if isinstance(tree.get(name), dict))]))
        name = data.draw(st.one_of(st.sampled_from(sorted(place)), st.text(max_size=5)))
        place[name] = data.draw(
            st.one_of(LEAVES, st.lists(LEAVES, max_size=3), st.dictionaries(st.text(max_size=3), LEAVES, max_size=2))
        )
    path = tmp_path_factory.getbasetemp() / "typed.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8", "surrogatepass")
    read(path)


@cases(100)
@given(data=st.data())
def test_read_yaml_of_damaged_files(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    text = data.draw(
        st.one_of(
            damaged_text(WHOLE, WORDS),
            st.lists(st.sampled_from(WORDS)).map("\n".join).map(os.fsencode),
            damaged(WHOLE.encode()),
        )
    )
    path.write_bytes(text)
    outcome(partial(read_yaml, path), path.name)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("data: !!python/object/apply:io.open ['{marker}', w]", "could not determine a constructor"),
        ("data: !!python/name:io.open ''", "could not determine a constructor"),
        ("data: x\nlr: !!float ''\n", "as YAML"),
        ("data: x\nlr: 1\nlr: 2\n", "'lr' is twice"),
        ("[1, 2]", "no list of 'setting: value'"),
        ("", "no list of 'setting: value'"),
        ("data: x\nlr: .inf", "lr is inf"),
        ("data: x\nlr: .nan", "lr is nan"),
        ("data: x\nepochs: 99999999999999999999", "epochs is 99999999999999999999"),
        ("data: x\noptim:\n  betas: [2, 0.9]", r"optim\.betas"),
        ("data: x\ncolour: red", "colour"),
        ("data: 2020-99-99", "month must be in"),
    ],
)
def test_parse_refuses_what_cannot_be_a_configuration(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("{marker}", str(tmp_path / "marker")))
    with pytest.raises(CalmError, match=words) as caught:
        parse(["--config", str(path)])
    assert "mine.yaml" in str(caught.value)
    assert not (tmp_path / "marker").exists()


def test_parse_reads_aliases_that_stay_small(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: x\nmodel: {prior_activation: &how exp}\naugment: &none {flip: 0.0}\n")
    assert parse(["--config", str(tmp_path / "a.yaml")]).augment.flip == 0
