"""The benchmarks run, and what they print reaches the right place of the page."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from train_cases import tiny_config, write_squares

import calm
from calm.data.augmentation import Augmentation
from calm.data.loading import load_split
from calm.train import train
from calm.train.config import ModelOptions

FOLDER = Path(__file__).parent.parent / "benchmarks"

PAGE = """# Title

<!-- bench: good.py --rows 2 -->
old
<!-- end -->
Prose.
<!-- bench: bad.py -->
old, too
<!-- end -->
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of the benchmarks as their scripts do."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "good.py").write_text("import sys\nprint('| new |', *sys.argv[1:])\n")
    (tmp_path / "bad.py").write_text("print('half a table')\nraise SystemExit('no memory')\n")
    path = tmp_path / "README.md"
    path.write_text(PAGE)
    return path


def test_output_replaces_the_old_table_and_nothing_else(
    page: Path, module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    assert module("run").main(["good"], page.parent) == 0
    before, rest = page.read_text().split("<!-- bench: good.py --rows 2 -->\n")
    inside, after = rest.split("<!-- end -->", 1)
    assert (before, after) == ("# Title\n\n", PAGE.split("<!-- end -->", 1)[1])
    line, _, output = inside.partition("\n\n")
    assert output == "| new | --rows 2\n"
    assert line.startswith("`python benchmarks/good.py --rows 2`, 20")
    assert f"PyTorch {torch.__version__}" in line


def test_a_script_that_fails_leaves_its_table_and_is_named(
    page: Path, module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    assert module("run").main([], page.parent) == 1
    assert "| new |" in page.read_text()
    assert "<!-- bench: bad.py -->\nold, too\n<!-- end -->" in page.read_text()
    said = capsys.readouterr().err
    assert "no memory" in said
    assert said.endswith("failed: bad\n")


def test_an_unknown_topic_runs_nothing(
    page: Path, module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    assert module("run").main(["god"], page.parent) == 2
    assert "did you mean 'good'" in capsys.readouterr().err
    assert page.read_text() == PAGE


def test_a_mark_without_end_is_an_error(
    page: Path, module: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    page.write_text(PAGE.replace("old, too\n<!-- end -->", "old, too"))
    assert module("run").main(["good"], page.parent) == 2
    assert "1 of 2" in capsys.readouterr().err


BEFORE = """
| classes | way | ms | time over CAM | target | old / new |
| --- | --- | ---: | ---: | --- | ---: |
| 200 | ours | 617 | 1.44 | **not met** | 2.0 |
| 200 | theirs | 429 | +10.0 % |  | 1.0 |

| way | wall | wall over the passes | over both | loop over pairs, s | times faster |
| --- | ---: | ---: | ---: | ---: | ---: |
| command | 9 | 1.5 | 3.0 | 7 | 4.0 |
| straightforward command | 9 | 1.0 | 1.0 | 7 | 1.0 |

| way | wall | wall over the passes | over both | loop over pairs, s | times faster |
| --- | ---: | ---: | ---: | ---: | ---: |
| command | 9 | 2.5 | 3.0 | 7 | 4.0 |
"""


def test_regressions_names_ratios_that_are_ten_percent_worse(module: Callable[[str], ModuleType]) -> None:
    run = module("run")
    found = run.ratios(BEFORE)
    assert found["1", "200", "ours", "time over CAM"] == 1.44
    assert found["1", "200", "theirs", "time over CAM"] == pytest.approx(1.1)
    assert found["1", "200", "ours", "old / new"] == 0.5
    assert [found[table, "command", "wall over the passes"] for table in ("2", "3")] == [1.5, 2.5]
    assert [found["2", "command", column] for column in ("over both", "times faster")] == [3.0, 0.25]
    assert len(found) == 10
    assert run.regressions(BEFORE, BEFORE) == []
    slower = BEFORE.replace("1.44", "1.60").replace("+10.0 %", "+20.0 %").replace("2.0 |", "1.7 |").replace("617", "9")
    assert run.regressions(BEFORE, slower) == [
        "200, ours, time over CAM: 1.11 times what it was",
        "200, ours, old / new: 1.18 times what it was",
    ]


def test_regressions_against_the_last_tag(module: Callable[[str], ModuleType], tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    run, page = module("run"), tmp_path / "README.md"
    assert run.last_release(tmp_path) == ("HEAD", "")
    for text, *after in (("one", ["tag", "v1"]), ("two",)):
        page.write_text(text)
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", text], *after):
            subprocess.run([*git, *words], check=True, capture_output=True)
    assert run.last_release(tmp_path) == ("v1", "one")


def test_the_page_names_every_script_that_prints_tables(module: Callable[[str], ModuleType]) -> None:
    named = {topic.name for topic in module("run").topics((FOLDER / "README.md").read_text())}
    # against and suite need an older commit, devices other machines, peers other packages, linear_probe finished runs
    others = {"against", "cub_size", "devices", "linear_probe", "measure", "peers", "run", "straightforward", "suite"}
    scripts = {path.stem for path in FOLDER.glob("*.py")} - others
    assert named == scripts


def test_suite_keeps_the_tests_that_both_commits_have(
    module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite, deselected = module("suite"), list[SimpleNamespace]()
    hook = SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items))
    one, two = (SimpleNamespace(nodeid=f"tests/test_a.py::test_{name}") for name in ("one", "two"))
    for names, items, kept in (("new", [one, two], [one, two]), ("both", [one, two], [one])):
        (tmp_path / "both").write_text(f"{one.nodeid}\ntests/test_gone.py::test_gone\n")
        monkeypatch.setenv(suite.BOTH, str(tmp_path / names))
        suite.pytest_collection_modifyitems(SimpleNamespace(hook=hook), items)
        assert items == kept
    assert deselected == [two]
    assert (tmp_path / "new").read_text().splitlines() == [one.nodeid, two.nodeid]


def test_suite_counts_the_processes_that_a_command_leaves() -> None:
    burn = "import time; [None for _ in iter(lambda: time.process_time() < 0.3, False)]"
    leave = ["sh", "-c", 'python=$0; ("$python" -c "$1" &); exit 0', sys.executable, burn]
    code = f"import suite, pathlib; print(suite.taken({leave!r}, pathlib.Path()).processor)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=FOLDER, capture_output=True, text=True, check=True)
    assert 0.3 <= float(ended.stdout) < 30


def test_suite_prints_both_sides_and_their_ratio(module: Callable[[str], ModuleType]) -> None:
    suite = module("suite")
    rows = {"tests of both (3)": [suite.Taken(200.4, 110.0), suite.Taken(150.3, 90.0)]}
    assert suite.report(rows, "v1").splitlines()[2] == "| tests of both (3) | 200 | 150 | 0.75 | 110 | 90 |"


def touch(mib: int) -> None:
    """Hold and write so much memory."""
    torch.ones(mib, 2**18)


def test_peak_memory_is_that_of_the_work_alone(module: Callable[[str], ModuleType]) -> None:
    assert 195 < module("measure").peak_memory(touch, 200) < 230


def test_ways_take_turns_and_start_from_a_new_one_each_round(module: Callable[[str], ModuleType]) -> None:
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in "abc"}
    times = module("measure").seconds(ways, 2, warm=1)
    assert "".join(order) == "abcbcacab"
    assert [len(values) for values in times.values()] == [2, 2, 2]


def test_ratio_is_the_median_over_rounds_not_that_of_the_medians(module: Callable[[str], ModuleType]) -> None:
    assert module("measure").ratio([2.0, 8.0, 3.0], [1.0, 4.0, 30.0]) == 2.0


SMALLEST = [
    "attribute.py --photographs 2 --rounds 1 --backbone tiny_resnet --no-command",
    "training_step.py --backbone tiny_resnet --size 32 --batch 2 --classes 5 200 --rounds 1",
    "explain.py --networks tiny_resnet:32:1 --rounds 1 --steps 2",
    "export.py --networks tiny_resnet:32:1:5 --rounds 1",
    "data.py --images 2 --rounds 1",
    "head.py --classes 5 --channels 8 --grid 4 --batch 2 --rounds 1",
    "pooling.py --sizes 2x3x4 --rounds 1",
    "startup.py --rounds 1 --commands 'data check' --code 'import calm'",
]


@pytest.mark.parametrize("command", SMALLEST, ids=lambda command: command.split()[0])
def test_a_benchmark_prints_tables(
    command: str,
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, *arguments = shlex.split(command)
    here = module("measure")  # processes would import PyTorch anew: not part of what is tested
    some = itertools.count(1.0)
    monkeypatch.setattr(here, "peak_memory", lambda way, *args: (way(*args), next(some))[1])
    monkeypatch.setattr(here, "peak_and_result", lambda way, *args: (next(some), way(*args)))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    runpy.run_path(os.fspath(FOLDER / script), run_name="__main__")
    said = capsys.readouterr().out
    tables = [block.strip().splitlines() for block in said.split("\n\n") if block.strip().startswith("| ")]
    assert tables
    for lines in tables:
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) > 2


def test_linear_probe_stands_beside_the_head_of_its_run(
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    probe, data = module("linear_probe"), write_squares(tmp_path / "data")
    frozen = ModelOptions(pretrained=False, freeze=True)
    augment = Augmentation(crop="none", flip=0.0)
    run = train(
        tiny_config(data, tmp_path / "run", backbone="tiny_resnet", model=frozen, augment=augment, method="cam"),
        quiet=True,
    )
    monkeypatch.setattr(sys, "argv", ["linear_probe.py", str(run), "--C", "0.1"])
    probe.main()
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[2].strip("|").split("|")]
    model = calm.load(run)

    def means(name: str) -> tuple[np.ndarray, np.ndarray]:
        records = load_split(data, name).records
        with torch.no_grad():
            features = model.encode(model.preprocess([record.path for record in records])).mean((2, 3))
        return features.numpy(), np.array([record.label for record in records])

    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)).fit(*means("train"))
    right = 100 * fitted.score(*means("test"))
    head = json.loads((run / "result.json").read_text())["last"]["test"]
    assert cells[:3] == ["run", "0.1", f"{right:.1f}"]
    assert cells[5:] == [f"{100 * head['accuracy']:.1f}", f"{head['nll']:.2f}", f"{100 * head['ece']:.1f}", "cam"]
    assert not (run / "features").exists()
