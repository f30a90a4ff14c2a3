"""`train` against a loop written out by hand, and what its folder holds."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from train_cases import SIZE, rich_config, tiny_config, tiny_net, weights_of, write_squares

from calm.data.dataset import EpochSampler, ImageDataset
from calm.data.loading import load_split
from calm.data.seeds import mix_seed
from calm.data.transforms import eval_transform, train_transform
from calm.errors import CalmError
from calm.images import Preprocessing
from calm.model import CalmModel, create_model, load
from calm.train import train
from calm.train.config import (
    Hardware,
    LogOptions,
    LossOptions,
    OptimOptions,
    RunLength,
    TrainConfig,
)
from calm.train.optim import build_scheduler

PREPROCESSING = Preprocessing(size=(SIZE, SIZE))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def rich(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything switched on."""
    config = rich_config(data, tmp_path_factory.mktemp("rich") / "run")
    return train(config, backbone=tiny_net(), quiet=True)


def trained_by_hand(config: TrainConfig) -> CalmModel:
    """The published EM (or CAM) with plain PyTorch: one forward, one loss, one SGD step."""
    split = load_split(config.data, "train")
    torch.manual_seed(mix_seed(config.seed) >> 1)
    model = create_model(tiny_net(), split.num_classes, config.method, preprocessing=PREPROCESSING)
    dataset = ImageDataset(split, train_transform(config.augment, PREPROCESSING), seed=config.seed)
    sampler = EpochSampler(dataset, config.batch_size, seed=config.seed, rank=0, world_size=1)
    run = RunLength(config.epochs, sampler.steps)
    groups = [
        {"params": model.backbone.parameters(), "lr": config.lr},
        {"params": model.head.parameters(), "lr": config.lr * config.optim.head_ratio},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9, nesterov=True, weight_decay=1e-4)
    scheduler = build_scheduler(optimizer, config.optim, run)
    model.train()
    for epoch in range(config.epochs):
        sampler.set_epoch(epoch)
        torch.manual_seed(mix_seed(config.seed, epoch, 0) >> 1)
        order = list(sampler)
        for step in range(run.steps_per_epoch):
            items = [dataset[i] for i in order[step * config.batch_size : (step + 1) * config.batch_size]]
            images, labels = (
                torch.stack([item[0] for item in items]),
                torch.tensor([item[1] for item in items]),
            )
            loss = model.loss(images, labels)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
    return model


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, msg=name, **({"rtol": 0, "atol": 0} | tolerance))


@pytest.mark.parametrize("method", ["calm-em", "cam"])
def test_weights_are_those_of_the_loop_written_by_hand(method: Any, data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", method=method)
    by_hand = trained_by_hand(config).state_dict()
    train(config, backbone=tiny_net(), quiet=True)
    ours = weights_of(config.run_dir or data)
    assert_close(by_hand, ours, rtol=1e-5, atol=1e-7)


def test_seed_decides_the_weights_and_workers_do_not(rich: Path, data: Path, tmp_path: Path) -> None:
    again = train(rich_config(data, tmp_path / "again", workers=2), backbone=tiny_net(), quiet=True)
    assert_close(weights_of(rich), weights_of(again))
    other = train(replace(rich_config(data, tmp_path / "other"), seed=1), backbone=tiny_net(), quiet=True)
    assert any(not torch.equal(value, weights_of(rich)[name]) for name, value in weights_of(other).items())


def test_accumulating_parts_of_a_batch_takes_the_same_steps(data: Path, tmp_path: Path) -> None:
    runs = []
    for parts in (1, 4):
        config = tiny_config(data, tmp_path / str(parts))
        config = replace(config, optim=replace(config.optim, accumulate=parts, clip_norm=0.5))
        runs.append(weights_of(train(config, backbone=tiny_net(stateful=False), quiet=True)))
    assert_close(*runs, rtol=1e-4, atol=1e-6)
    with pytest.raises(CalmError, match="equal parts"):
        train(
            replace(config, run_dir=tmp_path / "3", optim=OptimOptions(accumulate=3)),
            backbone=tiny_net(),
            quiet=True,
        )


def test_run_folder_has_everything_about_the_run(rich: Path, data: Path) -> None:
    names = {path.name for path in rich.iterdir()}
    files = {"config.yaml", "versions.json", "data.json", "log.txt", "metrics.csv", "result.json"}
    assert names == files | {"checkpoints", "best", "last", "panels", "tensorboard"}
    assert yaml.safe_load((rich / "config.yaml").read_text())["data"] == str(data.resolve())
    described = json.loads((rich / "data.json").read_text())
    assert described["splits"]["train"]["class_counts"] == {"colour0": 12, "colour1": 12, "colour2": 12}
    assert {path.name for path in (rich / "panels").iterdir()} == {f"epoch_00{i}.png" for i in (1, 2, 3)}
    rows = list(csv.DictReader((rich / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["step"] for row in rows] == ["4", "8", "12"]
    assert float(rows[-1]["temperature"]) == 1.0
    assert "epoch 3/3" in (rich / "log.txt").read_text()


def test_saved_models_have_the_accuracy_that_the_result_says(rich: Path, data: Path) -> None:
    result = json.loads((rich / "result.json").read_text())
    for name in ("last", "best"):
        model = load(rich / name, backbone=tiny_net())
        for split in ("val", "test"):
            images = ImageDataset(load_split(data, split), eval_transform(PREPROCESSING))  # type: ignore[arg-type]
            right, surprise = 0, 0.0
            for image, label, _ in images:
                with torch.no_grad():
                    log_probs = model(image[None]).log_probs[0]
                right += int(log_probs.argmax() == label)
                surprise -= float(log_probs[label])
            assert result[name][split]["accuracy"] == pytest.approx(right / len(images))
            assert result[name][split]["nll"] == pytest.approx(surprise / len(images), rel=1e-4)
    rows = list(csv.DictReader((rich / "metrics.csv").read_text().splitlines()))
    ranked = sorted(rows, key=lambda row: (-float(row["val_accuracy"]), float(row["val_nll"])))
    assert result["best"]["epoch"] == int(ranked[0]["epoch"])


def test_finished_run_is_left_alone(rich: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in rich.rglob("*")}
    assert train(rich_config(data, rich), backbone=tiny_net()) == rich
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in rich.rglob("*")}


def test_other_data_are_noticed_before_a_run_goes_on(data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    run = train(tiny_config(mine, tmp_path / "run", epochs=1), backbone=tiny_net(), quiet=True)
    (run / "result.json").unlink()
    (mine / "train" / "colour0" / "0.png").unlink()
    with pytest.raises(CalmError, match="other data"):
        train(tiny_config(mine, run, epochs=1), backbone=tiny_net(), quiet=True)


def test_bad_images_are_told_before_training_or_skipped_and_counted(data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    (mine / "train" / "colour1" / "3.png").write_bytes(b"not a picture")
    config = tiny_config(mine, tmp_path / "run", epochs=1)
    with pytest.raises(CalmError, match=r"3\.png"):
        train(config, backbone=tiny_net(), quiet=True)
    assert not (tmp_path / "run").exists()
    run = train(
        replace(config, reading=replace(config.reading, skip_bad=True)), backbone=tiny_net(), quiet=True
    )
    assert json.loads((run / "data.json").read_text())["check"]["left_out"]["train"] == 1


def test_too_few_images_for_a_batch_are_told(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="only 36 training images"):
        train(tiny_config(data, tmp_path / "run", batch_size=64), backbone=tiny_net(), quiet=True)


def test_diverging_run_stops_with_step_and_cause_and_saves_nothing_bad(data: Path, tmp_path: Path) -> None:
    optim = OptimOptions(schedule="constant", momentum=0.0, nesterov=False)
    config = tiny_config(data, tmp_path / "run", lr=1e30, optim=optim)
    with pytest.raises(
        CalmError, match=r"not finite at step \d+ \(epoch 1, learning rate 1e\+31\).*lower lr"
    ):
        train(config, backbone=tiny_net(stateful=False), quiet=True)
    assert not (tmp_path / "run" / "last").exists()
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_training_starts_from_given_weights(rich: Path, data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", epochs=1, lr=0.0)
    config = replace(config, model=replace(config.model, init_from=str(rich)))
    run = train(config, backbone=tiny_net().eval(), quiet=True)
    start = load(rich, backbone=tiny_net())
    trained = weights_of(run)
    assert_close(
        dict(start.named_parameters()), {name: trained[name] for name, _ in start.named_parameters()}
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware": Hardware(accelerator="cpu", precision="bf16-mixed", channels_last=True)},
        {"method": "calm-ml", "optim": OptimOptions(name="adamw", schedule="one-cycle", decay="weights")},
        {"loss": LossOptions(temperature=0.5), "log": LogOptions(every_n_steps=1, panel_images=2)},
    ],
)
def test_options_run_and_learn(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, tmp_path / "run", **changes), backbone=tiny_net(), quiet=True)
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_impossible_hardware_is_told(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", hardware=Hardware(accelerator="abacus"))
    with pytest.raises(CalmError, match="abacus"):
        train(config, backbone=tiny_net(), quiet=True)


def test_world_is_left_as_found(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state, level = torch.get_rng_state(), logging.getLogger("lightning.pytorch").level
    hardware = Hardware(accelerator="cpu", deterministic=True)
    train(tiny_config(data, tmp_path / "run", epochs=1, hardware=hardware), backbone=tiny_net(), quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lightning.pytorch").level == level
    assert not torch.are_deterministic_algorithms_enabled()
    assert capfd.readouterr() == ("", "")
