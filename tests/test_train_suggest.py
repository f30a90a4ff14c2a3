"""`calm train --suggest`: a command that parses and suits the data, and the reasons."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calm.cli.train import _report, main, parse
from calm.errors import CalmError
from calm.evaluate.runner import run_split
from calm.report import write_report
from calm.train.config import TrainConfig
from calm.train.suggest import suggest


def write_classes(root: Path, side: int, **counts: int) -> Path:
    """A folder for each class, with so many images of ``side`` pixels, without splits."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = np.random.default_rng([label, number]).integers(0, 256, (side, side + 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors, no GPU."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("calm.train.suggest.resolve_device", lambda: torch.device("cpu"))


def suggested(text: str) -> TrainConfig:
    """Parse the command as a shell would."""
    (line,) = (line for line in text.splitlines() if line.startswith("  calm train "))
    return parse(shlex.split(line)[2:])


def test_suggest_trains_small_pictures_from_scratch_with_enough_steps(tmp_path: Path) -> None:
    data = write_classes(tmp_path / "my birds", 40, crow=60, owl=10)
    text = suggest(TrainConfig(data, run_dir=tmp_path / "run"))
    config = suggested(text)
    assert "2 classes with images, 56 train, 7 val, 7 test images (val and test taken from train" in text
    assert "shorter sides of 40 to 40 pixels" in text
    assert (config.data, config.run_dir, config.backbone) == (data, tmp_path / "run", "small_resnet")
    assert (config.reading.image_size, config.batch_size, config.epochs) == (32, 4, 43)
    assert config.reading.balance
    assert config.reading.val_fraction == 0.2
    assert "classes have 8 to 48 images" in text
    assert "56 training images: 14 steps an epoch" in text


def test_suggest_takes_pretrained_weights_for_photographs_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_classes(tmp_path / "data", 120, crow=9, owl=9)
    for weights, backbone, said in ((tmp_path, "tf_efficientnet_lite0", "head"), (None, "small_resnet", "[offline]")):
        monkeypatch.setattr("calm.train.suggest.packaged_weights", lambda name, weights=weights: weights)
        text = suggest(TrainConfig(data))
        config = suggested(text)
        assert (config.backbone, config.reading.balance, config.batch_size) == (backbone, False, 4)
        assert said in text
        assert config.reading.workers == (None if weights else 0)
    monkeypatch.setattr("calm.train.suggest.resolve_device", lambda: torch.device("cuda"))
    assert suggested(suggest(TrainConfig(data))).backbone == "resnet50"


def test_suggest_is_a_flag_that_trains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_classes(tmp_path / "data", 32, crow=4, owl=4)
    assert main([f"--data={data}", "--suggest"]) is None
    assert "calm train --preset small --data" in capsys.readouterr().out
    (data / "crow" / "bad.png").write_bytes(b"no picture")
    for path in data.glob("*/[0-9]*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(CalmError, match=r"no picture of .* can be read"):
        suggest(TrainConfig(data))


def test_train_on_own_pictures_says_what_a_newcomer_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_classes(tmp_path / "data", 32, crow=30, owl=8)
    run = tmp_path / "my run"
    words = f"--preset small --data {data} --backbone tiny_resnet --epochs 2 --batch_size 8 --reading.image_size 32"
    more = ["--log.panel_images=2", "--log.loggers=[]", "--hardware.accelerator=cpu", "--reading.balance=true"]
    assert main([*words.split(), "--out", str(run), *more]) == run
    said = capsys.readouterr().out
    assert "the classes have 6 (owl) to 24 (crow) training images: drawn equally often" in said
    assert "maps have 8x8 cells for images of 32x32 pixels; a larger --reading.image_size makes a finer grid" in said
    assert re.search(r"epoch 1/2.*\nabout \d+ s to go, until epoch 2\n.*epoch 2/2", said)
    assert re.search(r"best \(epoch \d, chosen by 4 validation images; --model and calm\.load take it\): valid", said)
    assert re.search(rf"done in \d+ s, \d+ s of them for training: {run}\n", said)
    assert f"next: calm attribute --model '{run}' IMAGE.jpg" in said
    assert f"calm evaluate all --model '{run}' --data {data}" in said
    assert re.search(rf"report: {run}/report.html, in \d+ s; the whole command took \d+ s", said)
    page = (run / "report.html").read_text()
    accuracy = json.loads((run / "result.json").read_text())["best"]["test"]["accuracy"]
    assert f"{100 * accuracy:.1f}\u202f%</b> accuracy" in page
    for heading in ("Maps of validation images", "In numbers", "Training", "How it was made", "No benchmark has been"):
        assert heading in page
    assert str(tmp_path) not in page  # nothing about the machine
    (run / "report.html").unlink()
    assert main([*words.split(), "--out", str(run), *more]) == run  # it is finished, and its report was not wanted
    assert not (run / "report.html").exists()
    both = [str(shutil.copytree(run, tmp_path / name)) for name in ("one", "two")]
    text = (tmp_path / "two" / "config.yaml").read_text().replace("method: calm-em", "method: cam")
    (tmp_path / "two" / "config.yaml").write_text(text)
    for sources, kicker in ((both, "CALM on data"), (both[1:], "CAM on data")):
        write_report(list(map(Path, sources)), out=tmp_path / "both.html")
        assert f'<p class="kicker">{kicker}</p>' in (tmp_path / "both.html").read_text()
    with pytest.raises(CalmError, match="--report is 'maybe': give true or false"):
        main([*words.split(), "--report=maybe"])
    _report(tmp_path / "gone", 0.0)
    assert "warning: no report: " in capsys.readouterr().err
    rows = list(csv.reader((run / "splits.csv").read_text().splitlines()))
    assert rows[0] == ["split", "image"]
    listed = {split: {image for name, image in rows if name == split} for split in ("train", "val", "test")}
    assert {split: len(images) for split, images in listed.items()} == {"train": 30, "val": 4, "test": 4}
    evaluated, _ = run_split(data, None, [str(run)])
    assert {record.id for record in evaluated.records} == listed["test"]
