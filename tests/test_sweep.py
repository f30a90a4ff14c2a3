"""`calm sweep`: searches, resumes, tests once, and refuses what cannot be a sweep."""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from train_cases import SIZE, write_squares

from calm.cli import main, sweep
from calm.cli.sweep import default_space, suggestion
from calm.cli.train import parse
from calm.errors import CalmError

TINY = f"""--preset small --method cam --backbone tiny_resnet --epochs 1 --batch_size 8 --reading.image_size {SIZE}
 --log.panel_images 0 --log.loggers [] --hardware.accelerator cpu --hardware.precision 32-true""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Squares with their boxes, in the metadata format."""
    root = write_squares(tmp_path_factory.mktemp("squares"), train=8, other=3)
    for split in ("train", "val", "test"):
        folder = root / "metadata" / split
        folder.mkdir(parents=True)
        files = sorted((root / split).glob("*/*.png"))
        ids = [str(file.relative_to(root)) for file in files]
        (folder / "image_ids.txt").write_text("\n".join(ids))
        (folder / "class_labels.txt").write_text("\n".join(f"{name},{name.split('colour')[1][0]}" for name in ids))
        (folder / "image_sizes.txt").write_text("\n".join(f"{name},{SIZE},{SIZE}" for name in ids))
        boxes = []
        for name, file in zip(ids, files, strict=True):
            with Image.open(file) as image:
                bright = image.convert("RGB").point(lambda value: 255 * (value > 200)).getbbox()
            assert bright is not None
            boxes.append(f"{name},{bright[0]},{bright[1]},{bright[2] - 1},{bright[3] - 1}")
        (folder / "localization.txt").write_text("\n".join(boxes))
    return root


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "trials.csv").read_text().splitlines()))


def test_sweep_maximises_boxes_on_validation_and_tests_the_best_once(
    data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    out, trained = tmp_path / "sweep", []
    monkeypatch.setattr("calm.train.run.train", _counting(trained))
    words = ["sweep", "--out", str(out), "--data", str(data), *TINY, "--wsol", "has"]
    assert main([*words, "--trials", "2"]) == 0
    said = capsys.readouterr().out
    rows = rows_of(out)
    assert len(rows) == len(trained) == 2
    assert float(rows[0]["maxboxacc_v2"]) >= float(rows[1]["maxboxacc_v2"])
    for row in rows:
        assert 1e-5 <= float(row["lr"]) <= 1
        assert 0 <= float(row["wsol.has_rate"]) <= 1
        config = (out / "runs" / row["run"] / "config.yaml").read_text()
        assert f"has_rate: {row['wsol.has_rate']}" in config
    tested = json.loads((out / "test.json").read_text())
    assert tested["trial"] == int(rows[0]["trial"])
    assert 0 <= tested["test"]["maxboxacc"] <= 1
    assert f"validation maxboxacc_v2 {100 * float(rows[0]['maxboxacc_v2']):.1f}" in said
    with Image.open(out / "trials.png") as plot:
        assert plot.width > 300

    assert main([*words, "--trials", "2"]) == 0, "nothing is left to do"
    assert len(trained) == 2
    with pytest.raises(CalmError, match=r"another sweep \(search differs\)"):
        sweep.main([*words[1:], "--search", "lr=0.1:0.2"])


def _counting(trained: list[Any]) -> Any:
    from calm.train.run import train

    def counted(config: Any, **options: Any) -> Path:
        trained.append(config)
        return train(config, **options)

    return counted


def test_sweep_goes_on_with_the_interrupted_trial(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from calm.train.run import train

    out, trained = tmp_path / "sweep", []
    words = ["--out", str(out), "--data", str(data), *TINY, "--trials", "1", "--measure", "accuracy"]

    def interrupted(config: Any, **options: Any) -> Path:
        trained.append(config)
        if len(trained) == 1:
            raise KeyboardInterrupt
        return train(config, **options)

    monkeypatch.setattr("calm.train.run.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep.main(words)
    sweep.main(words)
    assert trained[0] == trained[1], "the same values, in the same folder"
    (row,) = rows_of(out)
    assert (row["state"], "maxboxacc" in row) == ("complete", False)


def test_sweep_takes_over_from_a_process_that_was_killed(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    words = ["--out", str(out), "--data", str(data), *TINY, "--measure", "accuracy"]
    sweep.main([*words, "--trials", "1"])
    trial = _study(out).ask()
    value = trial.suggest_float("lr", 1e-5, 1, log=True)
    trial.set_user_attr("process", [socket.gethostname(), 2**22 + 1])
    sweep.main([*words, "--trials", "2"])
    assert value in [float(row["lr"]) for row in rows_of(out)]


def _study(out: Path) -> Any:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(out / "journal.log")))
    return optuna.load_study(study_name="sweep", storage=storage)


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Lets trials draw their values and no more; returns their numbers and values."""
    drawn: list[tuple[int, dict[str, Any]]] = []

    def draw(self: Any, trial: Any) -> float:
        for name, text in self.space.items():
            suggestion(name, text)(trial)
        drawn.append((trial.number, trial.params))
        return 0.5

    monkeypatch.setattr(sweep._Sweep, "_trial", draw)
    monkeypatch.setattr(sweep._Sweep, "_show", lambda *_: None)
    monkeypatch.setattr(sweep._Sweep, "_finish", lambda self: self.out)
    return drawn


def test_sweep_takes_over_a_trial_that_was_drawn_and_never_begun(
    data: Path, tmp_path: Path, draws: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    words = ["--out", str(tmp_path), "--data", str(data), *TINY, "--measure", "accuracy"]
    sweep.main([*words, "--trials", "1"])
    study = _study(tmp_path)
    study.enqueue_trial({"lr": 0.0123})
    study.ask()  # and the process is killed
    sweep.main([*words, "--trials", "2"])
    assert len(draws) == 1, "another process may be about to sign it"
    assert "other processes are still at work" in capsys.readouterr().out
    monkeypatch.setattr(sweep, "SIGNED_WITHIN", timedelta(0))
    sweep.main([*words, "--trials", "2"])
    assert draws[1:] == [(2, {"lr": 0.0123})]


def test_sweep_of_two_processes_draws_what_one_draws(
    data: Path, tmp_path: Path, draws: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import optuna

    words = ["--data", str(data), *TINY, "--measure", "accuracy"]
    sweep.main([*words, "--trials", "2", "--out", str(tmp_path / "one")])
    ask = optuna.Study.ask

    def ask_second(study: Any) -> Any:
        if not study.trials:
            ask(_study(tmp_path / "two")).set_user_attr("process", [socket.gethostname(), os.getppid()])
        return ask(study)

    monkeypatch.setattr(optuna.Study, "ask", ask_second)
    sweep.main([*words, "--trials", "2", "--out", str(tmp_path / "two")])
    assert draws[0] != draws[1] == draws[2]


def test_sweep_locks_its_journal_by_a_path_that_can_be_followed(
    data: Path, tmp_path: Path, draws: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    links, symlink = [], os.symlink

    def linked(target: str, link: str) -> None:
        symlink(target, link)
        links.append(Path(link).exists())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "symlink", linked)
    sweep.main(["--out", "folder", "--data", str(data), *TINY, "--measure", "accuracy", "--trials", "1"])
    assert links
    assert all(links), "a lock that leads nowhere has no age, and is never given up"


def test_sweep_trains_the_same_values_in_two_processes_apart(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--data", str(data), *TINY, "--measure", "accuracy", "--search", "lr=0.1", "--out", str(tmp_path)]
    folders: list[str] = []

    def trained(config: Any, **options: Any) -> Path:
        folders.append(config.run_dir.name)
        return tmp_path

    monkeypatch.setattr("calm.train.run.train", trained)
    monkeypatch.setattr(sweep._Sweep, "_figures", lambda *_: {"accuracy": 0.5})
    monkeypatch.setattr(sweep._Sweep, "_finish", lambda self: self.out)
    sweep.main([*words, "--trials", "2"])
    other = _study(tmp_path).ask()
    other.set_user_attr("process", [socket.gethostname(), os.getppid()])
    other.set_user_attr("run", folders[0])
    sweep.main([*words, "--trials", "4"])
    assert folders == [folders[0], folders[0], f"{folders[0]}-4"]


def test_sweep_stops_hopeless_and_diverging_trials(data: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def diverges(config: Any, **options: Any) -> Path:
        raise CalmError("training stopped: the loss is not finite at step 3")

    words = ["--out", str(tmp_path / "sweep"), "--data", str(data), *TINY, "--trials", "1", "--measure", "accuracy"]
    with monkeypatch.context() as patch:
        patch.setattr("calm.train.run.train", diverges)
        with pytest.raises(CalmError, match=r"no trial of .* was finished"):
            sweep.main(words)
    shutil.rmtree(tmp_path / "sweep")
    monkeypatch.setattr("optuna.Trial.should_prune", lambda trial: trial.number == 0)
    sweep.main([*words, "--trials", "2"])
    rows = rows_of(tmp_path / "sweep")
    assert [row["state"] for row in rows] == ["complete", "pruned"]
    assert not (tmp_path / "sweep" / "runs" / rows[1]["run"]).exists()
    assert "1 stopped early" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--out"),
        (["--out", "o", "--trials", "0"], "--trials is 0"),
        (["--out", "o", "--run_dir", "r"], "--run_dir"),
        (["--out", "o", "--search", "lr"], "NAME=LOW:HIGH"),
        (["--out", "o", "--search", "lr=2:1"], "LOW < HIGH"),
        (["--out", "o", "--search", "lr=0:1:log"], "LOW above 0"),
        (["--out", "o", "--search", "learning=1:2"], "learning"),
        (["--out", "o", "--measure", "pxap"], "needs masks"),
    ],
)
def test_sweep_refuses_what_does_not_fit_before_it_begins(
    flags: list[str], message: str, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CalmError, match=message):
        sweep.main([*flags, "--data", str(data), *TINY])
    assert not list(tmp_path.iterdir())


def test_sweep_space_is_that_of_the_methods() -> None:
    assert default_space(parse(["--data=d"])) == {"lr": "1e-5:1:log"}
    space = default_space(parse(["--data=d", "--wsol=adl+cutmix"]))
    assert list(space) == ["lr", "wsol.adl_rate", "wsol.adl_threshold", "augment.cutmix", "augment.mix_probability"]
    with pytest.raises(CalmError, match="lr=a:b"):
        suggestion("lr", "a:b")
