"""Untrusted run folders: read right for a report, or refused by CalmError that names the damaged file."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from fuzzing import cases, damaged_text, outcome
from hypothesis import given

from calm.errors import CalmError
from calm.released_commands.experiment import Performance
from calm.report.found import read_run

pytestmark = pytest.mark.stress

TABLE = """epoch,step,lr,train_loss,train_accuracy,val_accuracy,val_nll
1,140,0.0021,2.731,0.188,0.241,2.51
2,280,0.001,1.5,0.4,0.5,nan
"""
FIGURES = {"test": {"accuracy": 0.5, "nll": 1.25}, "val": {"accuracy": 0.25}}
FILES = {
    "config.yaml": "method: calm-em\nepochs: 2\noptim: {betas: [0.9, 0.999]}\n",
    "result.json": json.dumps({"best": FIGURES, "last": FIGURES, "seconds": 3.5}, indent=1),
    "metrics.csv": TABLE,
    "versions.json": '{"python": "3.11",\n "threads": 2}',
}
WORDS = (
    *("", "0", "-1", "nan", "inf", "1e999", "null", "true", "[]", "{}", "x" * 50, "\0", "9" * 30, "\ud800", '"', ","),
    *("é", "epoch", "1,2", "٣", "1_0", "\r", "\x85", '"a', "0x10", "method: cam", "best", "&a [1]", "x" * 1000),
)


def write_run(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_read_run_of_damaged_files(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.getbasetemp() / f"run-{name}"

    @cases(40)
    @given(content=damaged_text(FILES[name], WORDS))
    def damage(content: bytes) -> None:
        (write_run(root) / name).write_bytes(content)
        run = outcome(partial(read_run, root), name)
        if run is not None:
            assert run.label in ("CALM-EM", "CALM-ML", "CAM")
            assert isinstance(run.test, dict)
            assert len({len(column) for column in run.history.values()}) == 1
            assert all(isinstance(value, float) for column in run.history.values() for value in column)
        if name == "metrics.csv":
            outcome(partial(Performance.of_run, root), name)

    damage()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no column 'epoch'"),
        (b"epoch,val_nll\n", "no row"),
        (b"step,val_nll\n1,2\n", "no column 'epoch'"),
        (b"epoch,val_nll,epoch\n1,2,3\n", "a column twice"),
        (b"epoch,val_nll\n1,0.5\n2\n", "row 2 has 1 fields, not 2"),
        (b"epoch,val_nll\n1,0.5,3\n", "row 1 has 3 fields, not 2"),
        (b"epoch,val_nll\n1,hot\n", "'hot'"),
        (b"epoch,val_nll\n1,\xff\n", "not UTF-8"),
        (b"epoch,val_nll\n1,\0\n", "table of numbers"),
    ],
)
def test_read_run_names_a_damaged_table_with_the_reason(tmp_path: Path, content: bytes, words: str) -> None:
    (write_run(tmp_path) / "metrics.csv").write_bytes(content)
    with pytest.raises(CalmError, match=words) as caught:
        read_run(tmp_path)
    assert "metrics.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.yaml", lambda content: [content], "not names with values"),
        ("config.yaml", lambda content: content | {"method": ["cam"]}, "allowed are calm-em"),
        ("result.json", lambda content: 3, "not names with values"),
        ("result.json", lambda content: content | {"best": None}, "no figures of the best weights"),
        ("versions.json", lambda content: None, "not names with values"),
    ],
)
def test_read_run_names_files_of_another_content(
    tmp_path: Path, name: str, change: Callable[[object], object], words: str
) -> None:
    content = change(yaml.safe_load((write_run(tmp_path) / name).read_text()))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CalmError, match=words) as caught:
        read_run(tmp_path)
    assert name in str(caught.value)


def test_read_run_reads_an_undamaged_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path))
    assert run.history["step"] == [140, 280]
    assert run.test == {"accuracy": 0.5, "nll": 1.25}
    assert Performance.of_run(tmp_path).values["val"]["cls"] == pytest.approx([24.1, 50])
