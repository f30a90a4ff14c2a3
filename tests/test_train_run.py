"""`train` against a loop written out by hand, killed and continued, in two processes, and what its folder holds."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml
from forks import Fork
from torch import nn
from train_cases import (
    SIZE,
    TinyNet,
    checkpoint_of,
    in_two_processes,
    killed,
    rich_config,
    tiny_config,
    tiny_net,
    weights_of,
    write_squares,
)

from calm.cli import main
from calm.cli.attribute import attribute_files
from calm.config import WsolOptions
from calm.data.dataset import EpochSampler, ImageDataset
from calm.data.loading import load_split
from calm.data.transforms import eval_transform, train_transform
from calm.errors import CalmError
from calm.images import Preprocessing, read_image
from calm.inference import mix_seed
from calm.model import CalmModel, create_model, load
from calm.train import run as run_module, train
from calm.train.checkpoints import TrainingState
from calm.train.config import (
    DataOptions,
    Hardware,
    LogOptions,
    LossOptions,
    ModelOptions,
    OptimOptions,
    RunLength,
    TrainConfig,
)
from calm.train.data import build_model
from calm.train.folder import LOCK, check_folder, held, is_finished, write_config
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
    model.to(memory_format=torch.channels_last)  # as the default is; it rounds otherwise
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
            images, labels = (torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items]))
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
def test_train_gives_the_weights_of_a_loop_written_by_hand(method: Any, data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", method=method)
    by_hand = trained_by_hand(config).state_dict()
    train(config, backbone=tiny_net(), quiet=True)
    ours = weights_of(config.run_dir or data)
    assert_close(by_hand, ours, rtol=1e-5, atol=1e-7)


def test_train_seed_decides_the_weights_and_workers_do_not(rich: Path, data: Path, tmp_path: Path) -> None:
    again = train(rich_config(data, tmp_path / "again", workers=2), backbone=tiny_net(), quiet=True)
    assert_close(weights_of(rich), weights_of(again))
    other = train(replace(rich_config(data, tmp_path / "other"), seed=1), backbone=tiny_net(), quiet=True)
    assert any(not torch.equal(value, weights_of(rich)[name]) for name, value in weights_of(other).items())


def test_train_accumulating_parts_of_a_batch_takes_the_same_steps(data: Path, tmp_path: Path) -> None:
    runs = []
    for parts in (1, 4):
        config = tiny_config(data, tmp_path / str(parts))
        config = replace(config, optim=replace(config.optim, accumulate=parts, clip_norm=0.5))
        runs.append(weights_of(train(config, backbone=tiny_net(stateful=False), quiet=True)))
    assert_close(*runs, rtol=1e-4, atol=1e-6)
    with pytest.raises(CalmError, match="equal parts"):
        train(
            replace(config, run_dir=tmp_path / "3", optim=OptimOptions(accumulate=3)), backbone=tiny_net(), quiet=True
        )


def test_train_writes_everything_about_the_run(rich: Path, data: Path) -> None:
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


def test_train_saves_models_with_the_accuracy_that_the_result_says(rich: Path, data: Path) -> None:
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
    top = max(float(row["val_accuracy"]) for row in rows)
    alike = [row for row in rows if float(row["val_accuracy"]) >= top - math.sqrt(top * (1 - top) / len(images))]
    assert result["best"]["epoch"] == int(min(alike, key=lambda row: float(row["val_nll"]))["epoch"])


@pytest.mark.parametrize(
    ("images", "epochs", "best"),
    [
        (100, [(0.80, 0.7), (0.77, 0.6), (0.75, 0.5)], 2),  # one standard error is 0.04
        (100, [(0.60, 0.5), (0.80, 0.7)], 2),
        (100, [(0.80, 0.7), (0.80, 0.7)], 1),
        (10_000, [(0.80, 0.7), (0.79, 0.6)], 1),
        (100, [(1.00, 0.3), (1.00, 0.2), (0.99, 0.1)], 2),
    ],
)
def test_finish_epoch_takes_the_least_nll_of_accuracies_that_cannot_be_told_apart(
    images: int, epochs: list[tuple[float, float]], best: int
) -> None:
    state = TrainingState(*[None] * 5)  # type: ignore[arg-type]
    for accuracy, nll in epochs:
        state.finish_epoch({"val_accuracy": accuracy}, {"accuracy": accuracy, "nll": nll}, images)
    assert state.best["epoch"] == best


def test_train_warns_where_the_maps_stayed_flat(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", epochs=1, loss=LossOptions(temperature=0.0, prior_weight=10.0))
    config = replace(config, optim=replace(config.optim, warmup_epochs=0.0), lr=1e-4)
    train(config, backbone=tiny_net(), quiet=True)
    model = load(tmp_path / "run", backbone=tiny_net())
    assert "almost flat" in model.caution
    assert f"warning: {model.caution}" in (tmp_path / "run" / "log.txt").read_text()
    model.training_summary["posterior_entropy_relative"] = 0.6
    assert model.caution == ""


def test_train_takes_the_precision_of_the_processor(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "automatic_precision", lambda device: ("bf16-mixed", f"{device} is said to"))
    config = tiny_config(data, tmp_path / "auto", epochs=1, hardware=Hardware(accelerator="cpu"))
    config = replace(config, optim=replace(config.optim, warmup_epochs=0.0))

    def net() -> TinyNet:
        built = tiny_net()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built.layers.append(nn.Conv2d(6, 6, 5, padding=2, groups=6))
        return built

    train(config, backbone=net(), quiet=True)
    log = (tmp_path / "auto" / "log.txt").read_text()
    assert "precision bf16-mixed: cpu is said to\n1 depthwise convolutions are trained in float32" in log
    named = replace(config, run_dir=tmp_path / "named", hardware=replace(config.hardware, precision="bf16-mixed"))
    train(named, backbone=net(), quiet=True)
    assert_close(weights_of(tmp_path / "auto"), weights_of(tmp_path / "named"))
    assert "precision: bf16-mixed" in (tmp_path / "auto" / "config.yaml").read_text()
    assert is_finished(tmp_path / "auto", named)


def test_train_leaves_a_finished_run_alone(rich: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in rich.rglob("*")}
    assert train(rich_config(data, rich), backbone=tiny_net()) == rich
    assert "is finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in rich.rglob("*")}


def test_train_notices_other_data_before_a_run_goes_on(data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    run = train(tiny_config(mine, tmp_path / "run", epochs=1), backbone=tiny_net(), quiet=True)
    (run / "result.json").unlink()
    picture = mine / "val" / "colour0" / "0.png"
    picture.write_bytes(picture.read_bytes() + b"more")  # decoders stop before it
    with pytest.warns(UserWarning, match="^files of val in .* have other sizes than when .* began"):
        train(tiny_config(mine, run, epochs=1), backbone=tiny_net(), quiet=True)
    (run / "result.json").unlink()
    for split, said in (("test", r"\(test changed\)"), ("train", r"\(train.* test changed\)")):
        (mine / split / "colour0" / "0.png").unlink()
        with pytest.raises(CalmError, match=f"other data .* {said}: use another"):
            train(tiny_config(mine, run, epochs=1), backbone=tiny_net(), quiet=True)


def hold(run: Path) -> None:
    with held(run):
        time.sleep(60)


def test_train_refuses_a_folder_that_another_process_trains_in(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = Fork(tmp_path / "said", hold, run).process
    while not ((run / LOCK).exists() and (run / LOCK).read_text()):
        time.sleep(0.01)
    with pytest.raises(CalmError, match=rf"run is being trained in by process {process.pid} on .*another --run_dir"):
        train(tiny_config(data, run, epochs=1), backbone=tiny_net(), quiet=True)
    assert [path.name for path in run.iterdir()] == [LOCK]
    process.kill()
    process.join()
    with held(run):
        pass
    assert not run.exists()  # nothing had begun


def test_train_names_bad_images_or_skips_and_counts_them(data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    (mine / "train" / "colour1" / "3.png").write_bytes(b"not a picture")
    config = tiny_config(mine, tmp_path / "run", epochs=1)
    with pytest.raises(CalmError, match=r"3\.png"):
        train(config, backbone=tiny_net(), quiet=True)
    assert not (tmp_path / "run").exists()
    run = train(replace(config, reading=replace(config.reading, skip_bad=True)), backbone=tiny_net(), quiet=True)
    assert json.loads((run / "data.json").read_text())["check"]["left_out"]["train"] == 1


def test_train_refuses_too_few_images_for_a_batch(data: Path, tmp_path: Path) -> None:
    with pytest.raises(CalmError, match="only 36 training images"):
        train(tiny_config(data, tmp_path / "run", batch_size=64), backbone=tiny_net(), quiet=True)


def test_train_stops_a_diverging_run_and_saves_nothing_bad(data: Path, tmp_path: Path) -> None:
    optim = OptimOptions(schedule="constant", momentum=0.0, nesterov=False)
    config = tiny_config(data, tmp_path / "run", lr=1e30, optim=optim)
    with pytest.raises(CalmError, match=r"not finite at step \d+ \(epoch 1, learning rate 1e\+31\).*lower lr"):
        train(config, backbone=tiny_net(stateful=False), quiet=True)
    assert not (tmp_path / "run" / "last").exists()
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_train_starts_from_given_weights(rich: Path, data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", epochs=1, lr=0.0)
    config = replace(config, model=replace(config.model, init_from=str(rich)))
    run = train(config, backbone=tiny_net().eval(), quiet=True)
    start = load(rich, backbone=tiny_net())
    trained = weights_of(run)
    assert_close(dict(start.named_parameters()), {name: trained[name] for name, _ in start.named_parameters()})


def test_train_starts_from_the_head_of_classes_of_the_same_name(
    rich: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    squares = write_squares(tmp_path / "squares")
    for folder in squares.glob("*/colour0"):
        folder.rename(folder.with_name("zebra"))  # which comes last, so that the others have other numbers
    config = tiny_config(squares, tmp_path / "run", epochs=1, lr=0.0)
    config = replace(config, model=replace(config.model, init_from=str(rich)))
    run = train(config, backbone=tiny_net())
    assert "2 of 3 classes have the weights of its head; new are zebra" in capsys.readouterr().out
    head, start = weights_of(run), load(rich, backbone=tiny_net()).state_dict()
    assert load(run, backbone=tiny_net()).class_names == ("colour1", "colour2", "zebra")
    for name in ("head.conv_last.weight", "head.conv_last.bias"):
        assert torch.equal(head[name][:2], start[name][1:])
        assert not torch.equal(head[name][2], start[name][0])
    assert torch.equal(head["head.attention.weight"], start["head.attention.weight"])


def test_train_starts_without_the_head_of_other_classes(
    rich: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    squares = write_squares(tmp_path / "squares")
    for folder in squares.glob("*/*"):
        folder.rename(folder.with_name(f"my {folder.name}"))
    config = tiny_config(squares, tmp_path / "run", epochs=1, lr=0.0)
    run = train(replace(config, model=replace(config.model, init_from=str(rich))), backbone=tiny_net())
    assert "its head, of other classes or another method, is left out" in capsys.readouterr().out
    name = "head.conv_last.weight"
    assert not torch.equal(weights_of(run)[name], load(rich, backbone=tiny_net()).state_dict()[name])


def test_train_more_epochs_end_as_if_asked_for_at_first(data: Path, tmp_path: Path) -> None:
    optim = OptimOptions(schedule="step", step_epochs=2, warmup_epochs=0.5, ema_decay=0.9)
    config = tiny_config(data, tmp_path / "long", optim=optim)
    train(config, backbone=tiny_net(), quiet=True)
    longer = replace(config, run_dir=tmp_path / "longer")
    for epochs in (1, 3):
        run = train(replace(longer, epochs=epochs), backbone=tiny_net(), quiet=True)
        assert json.loads((run / "result.json").read_text())["last"]["epoch"] == epochs
    assert_same(checkpoint_of(run), checkpoint_of(tmp_path / "long"))
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 3
    with pytest.raises(CalmError, match="epochs: 3 there, 2 now"):
        train(replace(longer, epochs=2), backbone=tiny_net(), quiet=True)


def test_train_freezes_a_part_and_its_statistics_until_it_is_asked_not_to(data: Path, tmp_path: Path) -> None:
    start = create_model(tiny_net(), 3).state_dict()
    optim = OptimOptions(schedule="constant", layer_decay=0.8)

    def moved(run: Path) -> set[str]:
        weights = weights_of(run)
        return {key.removeprefix("backbone.layers.") for key in start if not torch.equal(start[key], weights[key])}

    def run(name: str, epochs: int, **options: Any) -> Path:
        model = ModelOptions(pretrained=False, **options)
        config = tiny_config(data, tmp_path / name, epochs=epochs, optim=optim, model=model)
        return train(config, backbone=tiny_net(), quiet=True)

    first = {"0.weight", "0.bias", "1.weight", "1.bias"}
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    of_backbone = {*first, *statistics, "4.weight", "4.bias"}
    assert moved(run("part", 1, freeze="1")) & of_backbone == {"4.weight", "4.bias"}
    assert moved(run("norm", 1, freeze_norm=True)) & of_backbone == of_backbone - statistics
    whole = run("whole", 2, freeze="1", unfreeze_after=1)
    assert moved(whole) >= of_backbone
    lines = (whole / "log.txt").read_text()
    assert re.search(r"up to 1 \(180 weights\) is frozen.*epoch 1/2.*is trained from now on.*epoch 2/2", lines, re.S)
    every = run("every", 2, freeze=True, unfreeze_after=1)
    assert moved(every) >= of_backbone
    assert not (every / "features").exists()
    longer = run("whole", 3, freeze="1", unfreeze_after=1)  # continues
    assert_same(checkpoint_of(longer), checkpoint_of(run("at once", 3, freeze="1", unfreeze_after=1)))


@pytest.mark.parametrize(
    ("changes", "whole"),
    [
        ({}, "schedule cosine"),
        ({"optim": OptimOptions(schedule="one-cycle")}, "schedule one-cycle"),
        ({"optim": OptimOptions(), "loss": LossOptions(temperature="0.5:1")}, "temperature 0.5:1"),
    ],
)
def test_check_folder_refuses_more_epochs_of_a_course_over_the_whole_run(
    changes: dict[str, Any], whole: str, data: Path, tmp_path: Path
) -> None:
    config = tiny_config(data, tmp_path / "run", **changes)
    write_config(config, tmp_path / "run")
    with pytest.raises(CalmError, match=rf"epochs: 3 there, 5 now[\s\S]*its {whole} goes over .*--model.init_from"):
        check_folder(tmp_path / "run", replace(config, epochs=5))


def test_train_goes_on_with_data_and_run_that_have_moved(data: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    run = train(tiny_config(mine, tmp_path / "run"), backbone=tiny_net(), quiet=True)
    config, weights = tiny_config(tmp_path / "elsewhere", tmp_path / "moved"), weights_of(run)
    mine.rename(config.data)
    run.rename(tmp_path / "moved")
    (tmp_path / "moved" / "result.json").unlink()
    with pytest.raises(CalmError, match=r"no longer in .*data: say with --data where"):
        train(replace(config, data=mine), backbone=tiny_net(), quiet=True)
    moved = train(config, backbone=tiny_net(), quiet=True)
    assert moved == tmp_path / "moved"
    assert not run.exists()
    assert yaml.safe_load((moved / "config.yaml").read_text())["data"] == str(config.data)
    assert_close(weights_of(moved), weights)
    assert len((moved / "metrics.csv").read_text().splitlines()) == 4


def test_train_on_five_bands_of_twelve_bits_and_explain_them(tmp_path: Path) -> None:
    for split, label, index in product(("train", "val", "test"), range(2), range(4)):
        folder = tmp_path / "bands" / split / f"kind{label}"
        folder.mkdir(parents=True, exist_ok=True)
        values = np.random.default_rng([label, index, len(split)]).integers(0, 900, (SIZE, SIZE, 5), dtype=np.uint16)
        values[2:9, 2:9, 3 + label] += 3000
        tifffile.imwrite(folder / f"{index}.tif", values, photometric="minisblack", planarconfig="contig")
    config = tiny_config(
        tmp_path / "bands",
        tmp_path / "run",
        backbone="tiny_resnet",
        model=ModelOptions(pretrained=False),
        reading=DataOptions(
            image_size=64, workers=0, channels=5, bits=12, mean=(0.2,) * 5, std=(0.1,) * 5, view=(4, 3, 0)
        ),
    )
    with pytest.raises(CalmError, match=r"it has 5 bands, and 3 are read: train with --reading\.channels 5"):
        train(replace(config, reading=DataOptions()), quiet=True)
    with pytest.raises(CalmError, match=r"reading\.mean has 3 values: give 5"):
        train(replace(config, reading=replace(config.reading, mean=(0.2,) * 3, std=(0.1,) * 3)), quiet=True)
    assert not (tmp_path / "run").exists()
    model = load(train(config, quiet=True))
    preprocessing = Preprocessing((64, 64), (0.2,) * 5, (0.1,) * 5, bits=12, view=(4, 3, 0))
    assert model.preprocessing == preprocessing
    image = tmp_path / "bands/test/kind1/0.tif"
    attribute_files([str(image)], model=str(tmp_path / "run"), out=tmp_path / "out", grid=True, device="cpu")
    joint = np.load(tmp_path / "out/0.joint.grid.npy").sum()
    assert joint == pytest.approx(float(model(model.preprocess(image)).probs.max().detach()), abs=1e-5)
    assert read_image(tmp_path / "out/0.joint.png").std() > 20


def test_train_that_fails_before_its_first_step_leaves_no_folder(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", epochs=1)
    for wrong, message in (
        ({"optim": replace(config.optim, accumulate=3)}, "equal parts"),
        ({"batch_size": 1, "reading": replace(config.reading, image_size=8)}, "BatchNorm cannot normalise"),
    ):
        backbone = nn.Sequential(tiny_net(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(6))
        with pytest.raises(CalmError, match=message):
            train(replace(config, **wrong), backbone=backbone, quiet=True)
        assert not (tmp_path / "run").exists()
    train(config, backbone=tiny_net(), quiet=True)
    with pytest.raises(CalmError, match=r"lr: 0\.02 there, 0\.5 now"):
        train(replace(config, lr=0.5), backbone=tiny_net(), quiet=True)
    assert (tmp_path / "run" / "result.json").exists()


def test_train_names_the_sizes_that_a_model_takes_before_it_starts(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", backbone="vit_tiny_patch16_224")
    config = replace(config, model=replace(config.model, pretrained=False))
    with pytest.raises(CalmError, match="takes no images of 250 x 250 pixels: take 240 x 240 or 256 x 256"):
        train(replace(config, reading=replace(config.reading, image_size=250)), quiet=True)
    assert not (tmp_path / "run").exists()


def test_train_prints_what_the_check_found(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = Path(shutil.copytree(data, tmp_path / "data"))
    for picture in (mine / "train" / "colour1").iterdir():
        picture.rename(picture.with_suffix(".heic"))
    train(tiny_config(mine, tmp_path / "run", epochs=1), backbone=tiny_net())
    said = capsys.readouterr().out
    for text in (said, (tmp_path / "run" / "log.txt").read_text()):
        assert "colour1" in text
        assert "warning" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware": Hardware(accelerator="cpu", precision="bf16-mixed", channels_last=True)},
        {"method": "calm-ml", "optim": OptimOptions(name="adamw", schedule="one-cycle", decay="weights")},
        {"loss": LossOptions(temperature=0.5, cam_weight="1:0"), "log": LogOptions(every_n_steps=1, panel_images=2)},
    ],
)
def test_train_learns_with_these_options(changes: dict[str, Any], data: Path, tmp_path: Path) -> None:
    run = train(tiny_config(data, tmp_path / "run", **changes), backbone=tiny_net(), quiet=True)
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze_norm": True}, "warning: model.freeze_norm keeps BatchNorm's statistics"),
        ({"freeze": "stages.0"}, "warning: model.freeze keeps the backbone at its random start"),
        ({"freeze": True, "freeze_norm": True}, "warning: model.freeze keeps the backbone at its random start"),
    ],
)
def test_build_model_warns_of_a_random_start_that_is_kept(options: dict[str, Any], said: str, data: Path) -> None:
    config = tiny_config(data, Path("run"), backbone="small_resnet", model=ModelOptions(pretrained=False, **options))
    split = load_split(data, "train")
    model, line = build_model(config, split, None)
    assert line.startswith(said)
    assert "--model.weights FILE" in line
    assert build_model(config, split, tiny_net())[1] == ""  # an own module starts as its maker says
    model.save_pretrained(data.parent / "start")
    start = ModelOptions(pretrained=False, init_from=str(data.parent / "start"), **options)
    assert "warning" not in build_model(replace(config, model=start), split, None)[1]


def test_build_model_takes_the_size_of_a_network_that_takes_no_other(data: Path) -> None:
    config = tiny_config(data, Path("run"), backbone="botnet26t_256", model=ModelOptions(pretrained=False))
    config = replace(config, reading=DataOptions())
    assert config.reading.processes == min(4, len(os.sched_getaffinity(0)))
    assert build_model(config, load_split(data, "train"), None)[0].preprocessing.size == (256, 256)


def test_train_refuses_impossible_hardware(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "run", hardware=Hardware(accelerator="abacus"))
    with pytest.raises(CalmError, match="abacus"):
        train(config, backbone=tiny_net(), quiet=True)


def test_train_restores_generators_and_settings(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state, level = torch.get_rng_state(), logging.getLogger("lightning.fabric").level
    hardware = Hardware(accelerator="cpu", deterministic=True)
    train(tiny_config(data, tmp_path / "run", epochs=1, hardware=hardware), backbone=tiny_net(), quiet=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.getLogger("lightning.fabric").level == level
    assert not torch.are_deterministic_algorithms_enabled()
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(data, run folder)"""
    folder = tmp_path_factory.mktemp("uninterrupted")
    data = write_squares(folder / "data")
    return data, train(rich_config(data, folder / "run"), backbone=tiny_net(), quiet=True)


def assert_same(a: Any, b: Any, place: str = "") -> None:
    """Equal to the last bit, but for what a clock says."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for name in a.keys() - {"seconds", "images_per_second"}:
            assert_same(a[name], b[name], f"{place}.{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), place
        for index, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{place}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    else:
        assert a == b, place


@pytest.mark.slow
@pytest.mark.parametrize("task", [{"kind": "kill in step", "step": 6}, {"kind": "kill while saving"}])
def test_train_after_a_kill_ends_as_if_there_had_been_none(
    uninterrupted: tuple[Path, Path], task: dict[str, Any], tmp_path: Path
) -> None:
    data, alone = uninterrupted
    run = tmp_path / "run"
    process = killed(tmp_path / "said", data=data, run_dir=run, **task)
    assert process.returncode == -9, process.stderr
    assert checkpoint_of(run)["last"]["epoch"] == 1
    assert not (run / "result.json").exists()
    train(rich_config(data, run, workers=1), backbone=tiny_net(), quiet=True)
    assert_same(checkpoint_of(run), checkpoint_of(alone))
    assert not list(run.rglob(".*"))
    ours, theirs = ((folder / "metrics.csv").read_text().splitlines() for folder in (run, alone))
    assert len(ours) == len(theirs) == 4


def test_train_after_a_kill_after_the_last_epoch_only_measures(
    uninterrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    data, alone = uninterrupted
    run = Path(shutil.copytree(alone, tmp_path / "run"))
    (run / "result.json").unlink()
    shutil.rmtree(run / "best")  # killed between the checkpoint and the saved models
    shutil.rmtree(run / "last")
    train(rich_config(data, run), backbone=tiny_net(), quiet=True)
    assert (run / "result.json").read_text() == (alone / "result.json").read_text()
    assert (run / "last" / "model.safetensors").exists()


def command_line(words: list[str]) -> None:
    """Run `calm` as a terminal does, which has Ctrl-C end it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(words))


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_train_stopped_by_a_signal_says_so_and_continues(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    data, run = write_squares(tmp_path / "data"), tmp_path / "run"
    words = ["train", "--preset", "birds", "--data", str(data), "--run_dir", str(run), "--backbone", "tiny_resnet"]
    process = Fork(tmp_path / "said", command_line, [*words, "--batch_size", "8", "--epochs", "2000"])
    while "epoch    2/" not in process.outputs[0].read_text() and process.process.is_alive():
        time.sleep(0.02)
    assert process.process.pid is not None
    os.kill(process.process.pid, sent)
    ended = process.end(60)
    said = ended.stdout + ended.stderr
    assert ended.returncode == code, said
    assert "Traceback" not in said
    found = re.search(r"interrupted: the same command continues after epoch (\d+)\n", said)
    if found:
        assert checkpoint_of(run)["last"]["epoch"] == int(found[1])
    else:
        assert "interrupted: the same command starts again: no epoch was finished\n" in said
        assert not (run / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_train_in_two_processes_takes_the_steps_of_one(tmp_path: Path) -> None:
    data = write_squares(tmp_path / "data", train=13, other=3)  # 39 and 9 images: neither divides by two processes
    one, two = tmp_path / "one", tmp_path / "two"
    process = in_two_processes(data, two)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("epoch 1/3") == 1
    config = tiny_config(data, one, wsol=WsolOptions(["acol"]))  # both heads take part, and the erasing between them
    train(config, backbone=tiny_net(stateful=False), quiet=True)
    ours, theirs = weights_of(one), weights_of(two)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6, msg=name)
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    for measure in ("accuracy", "nll", "ece"):
        for split in ("val", "test"):
            a, b = (result["last"][split][measure] for result in results)
            assert a == pytest.approx(b, rel=1e-4), (split, measure)
    rows = [list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (one, two)]
    for name in ("train_loss", "train_accuracy", "train_nll", "prior_entropy", "val_nll"):
        assert float(rows[0][-1][name]) == pytest.approx(float(rows[1][-1][name]), rel=1e-4), name
