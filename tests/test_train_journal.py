"""Loggers: TensorBoard's own reader finds what ours wrote; others are found by name and by import path."""

from __future__ import annotations

import csv
import errno
import io
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.loggers.logger import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_cases import tiny_config, tiny_net, write_squares

from calm.errors import CalmError
from calm.model import create_model
from calm.train import train
from calm.train.config import LogOptions, LossOptions, ModelOptions
from calm.train.journal import TensorBoardLogger, caution_line, closing_lines, logger_class, open_loggers


def read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def test_tensorboard_logger_writes_curves_and_pictures(tmp_path):
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    file = TensorBoardLogger(tmp_path / "new")
    file.log_metrics({"loss": 0.5}, 3)
    file.log_metrics({"loss": 0.25}, 4)
    file.log_image("panel", [pixels.numpy()], 4)
    file.finalize("success")
    found = read(tmp_path / "new" / "tensorboard")
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(3, 0.5), (4, 0.25)]
    (picture,) = found.Images("panel")
    with Image.open(io.BytesIO(picture.encoded_image_string)) as image:
        assert bytes(image.tobytes()) == pixels.numpy().tobytes()


def test_tensorboard_logger_hides_what_a_killed_run_wrote_after_its_checkpoint(tmp_path):
    for purge_step, steps in ((None, (0, 1, 2)), (2, (2, 3))):
        file = TensorBoardLogger(tmp_path, purge_step)
        for step in steps:
            file.log_metrics({"loss": step + len(steps)}, step)
        file.finalize("success")
    assert [(event.step, event.value) for event in read(tmp_path / "tensorboard").Scalars("loss")] == [
        (0, 3),
        (1, 4),
        (2, 4),
        (3, 5),
    ]


def test_tensorboard_logger_save_makes_points_visible(tmp_path):
    file = TensorBoardLogger(tmp_path)
    file.log_metrics({"loss": 1}, 0)
    file.save()
    assert len(read(tmp_path / "tensorboard").Scalars("loss")) == 1
    file.finalize("success")


def test_tensorboard_logger_names_its_file_when_the_disk_is_full(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = TensorBoardLogger(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        file.log_metrics({"loss": 1}, 0)
        file.log_metrics({"loss": 1}, 1)
        with pytest.raises(OSError, match="large") as caught:
            file.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    file.finalize("success")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file.path))


class ListLogger(Logger):
    """Somebody's own logger: it keeps what it is given."""

    made: list[ListLogger] = []  # noqa: RUF012

    def __init__(self, save_dir: Path) -> None:
        self.save_dir = save_dir
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.configuration: dict[str, Any] = {}
        self.status = ""
        self.made.append(self)

    @property
    def name(self) -> str:
        return "list"

    @property
    def version(self) -> None:
        return None

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.configuration = params

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, metrics))

    def finalize(self, status: str) -> None:
        self.status = status


@pytest.mark.parametrize(("name", "found"), [("wandb", "WandbLogger"), ("CSVLogger", "CSVLogger")])
def test_logger_class_finds_lightnings_by_short_and_class_name(name: str, found: str) -> None:
    assert logger_class(name).__name__ == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandbb", "did you mean 'wandb'"),
        ("nowhere.MyLogger", "cannot import nowhere.MyLogger"),
        ("pathlib.Paths", "cannot import pathlib.Paths"),
        ("pathlib.Path", "no subclass of lightning.fabric.loggers.Logger"),
        ("os.system", "no subclass of lightning.fabric.loggers.Logger"),
    ],
)
def test_logger_class_refuses_what_is_no_logger(name: str, message: str) -> None:
    with pytest.raises(CalmError, match=message):
        logger_class(name)


def test_open_loggers_gives_each_class_the_options_that_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm.train.journal.ListLogger", ListLogger, raising=False)
    for name in ("calm.train.journal.ListLogger", "csv"):
        with open_loggers([name], tmp_path / name, 0) as loggers:
            loggers[0].log_hyperparams({"optim.name": "sgd"})
            loggers[0].log_metrics({"loss": 2.0}, 3)
    assert ListLogger.made[-1].save_dir == tmp_path / "calm.train.journal.ListLogger"
    (table,) = (tmp_path / "csv").rglob("metrics.csv")
    assert [*csv.DictReader(table.read_text().splitlines())] == [{"loss": "2.0", "step": "3"}]


def test_train_gives_loggers_of_the_caller_curves_and_configuration(tmp_path: Path) -> None:
    logger = ListLogger(tmp_path)
    config = tiny_config(write_squares(tmp_path / "data", 4, 2), tmp_path / "run", epochs=2, batch_size=4)
    train(config, backbone=tiny_net(), loggers=[logger], quiet=True)
    assert logger.configuration["optim.schedule"] == "cosine"
    assert [step for step, row in logger.rows if "epoch/val_accuracy" in row] == [2, 5]
    step, row = logger.rows[0]
    assert (step, sorted(row)) == (0, ["lr/backbone", "lr/new", "step/loss"])
    assert logger.status == "success"
    other = tiny_config(config.data, tmp_path / "other", log=LogOptions(loggers=["tensorbord"]))
    with pytest.raises(CalmError, match="did you mean 'tensorboard'"):
        train(other, backbone=tiny_net(), quiet=True)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the client of Weights & Biases
def test_train_logs_to_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    log = LogOptions(loggers=["wandb"], panel_images=1)
    config = tiny_config(write_squares(tmp_path / "data", 4, 2), tmp_path / "run", epochs=1, log=log)
    run = train(config, backbone=tiny_net(), quiet=True)
    (written,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"epoch/val_accuracy" in written.read_bytes()
    assert list(written.parent.rglob("panel*.png"))
    assert not (run / "tensorboard").exists()


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({}, "Try more epochs or larger images"),
        (
            {"loss": LossOptions(temperature=0.5, prior_weight=0.1)},
            "Try --loss.temperature 1.0 (below 1 spreads), a smaller --loss.prior_weight, more epochs or larger images",
        ),
        (
            {"model": ModelOptions(pretrained=False, pooling_exponent=0.0)},
            "Try a pooling exponent above 0 in the loss (1 is CALM), more epochs or larger images",
        ),
        (
            {"method": "calm-ml", "model": ModelOptions(pooling_exponent=0.0), "loss": LossOptions(pooling_exponent=1)},
            0,
        ),
    ],
)
def test_caution_line_advises_what_the_settings_have(changes: dict[str, Any], remedy: str | int) -> None:
    model = create_model(tiny_net(), 2)
    config = tiny_config(Path("data"), Path("run"), **changes)
    assert caution_line(model, config) == ""
    model.training_summary["posterior_entropy_relative"] = 0.99
    assert caution_line(model, config) == f"warning: {model.caution}. {remedy or 'Try more epochs or larger images'}"


def test_closing_lines_tell_this_start_from_the_epochs_before_and_name_code_to_trust(tmp_path: Path) -> None:
    figures = {"accuracy": 0.5, "nll": 1.0, "ece": 0.1}
    result = {"seconds": 130.0, **{name: {"epoch": 3, "val": figures, "test": figures} for name in ("best", "last")}}
    config = tiny_config(tmp_path, tmp_path / "run", backbone="nets:small(width=3)")
    lines = closing_lines(result, Path("run"), config, 9, 40.2, 30.0).splitlines()
    assert "done in 40 s, 30 s of them for training (2 min with the epochs before): run" in lines
    assert [line[6:].startswith("calm --trust 'nets:small(width=3)' ") for line in lines[-3:]] == [True] * 3
    lines = closing_lines(result, Path("run"), replace(config, backbone="custom"), 9, 140.0, 130.0).splitlines()
    assert lines[-1] == "done in 2 min, 2 min of them for training: run"
