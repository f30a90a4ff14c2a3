"""Training of the head on a frozen backbone's cached features."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.testing import assert_close
from train_cases import checkpoint_of, tiny_config, tiny_net, write_squares

from calm.data.dataset import ImageDataset
from calm.data.loading import load_split
from calm.data.transforms import train_transform
from calm.errors import CalmError
from calm.evaluate.registry import EvaluateConfig
from calm.evaluate.runner import evaluate
from calm.images import Preprocessing
from calm.model import create_model, load
from calm.train import features as features_module, train
from calm.train.config import Augmentation, LossOptions, ModelOptions, OptimOptions, TrainConfig
from calm.train.settings import preset


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


def frozen_config(data: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    config = tiny_config(data, run_dir, model=ModelOptions(freeze=True, views=2, feature_dropout=0.1))
    return replace(config, lr=0.1, optim=OptimOptions(schedule="constant", head_ratio=1.0), **changes)


def assert_same_weights(a: Path, b: Path) -> None:
    for key, value in checkpoint_of(a)["model"].items():
        assert torch.equal(value, checkpoint_of(b)["model"][key]), key


@pytest.mark.parametrize("method", ["calm-em", "cam"])
def test_train_frozen_changes_the_head_alone_and_leaves_a_whole_run(method: Any, data: Path, tmp_path: Path) -> None:
    config = frozen_config(data, tmp_path / "run", method=method, epochs=12)
    run = train(config, backbone=tiny_net(), quiet=True)
    start = {name: value.clone() for name, value in tiny_net().state_dict().items()}
    model = load(run, backbone=tiny_net())
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, start[name]), name
    result = json.loads((run / "result.json").read_text())
    history = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert float(history[-1]["train_nll"]) < float(history[0]["train_nll"])
    assert not (run / "features").exists()
    assert "features of the frozen backbone" in (run / "log.txt").read_text()
    split = load_split(data, "test")
    images = model.preprocess([record.path for record in split.records])
    with torch.no_grad():
        right = (model(images).probs.argmax(1) == torch.tensor([record.label for record in split.records])).float()
    last = load(run / "last", backbone=tiny_net())
    assert_close(last.backbone.state_dict(), model.backbone.state_dict())
    assert result["best"]["test"]["accuracy"] == pytest.approx(float(right.mean()))


def test_cached_features_are_those_of_the_augmented_images_of_each_view(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    compute = features_module.cache_features

    def keep(*args: Any, **options: Any) -> Any:
        found.append((args[0], compute(*args, **options)))
        copies = {name: np.array(dataset.features) for name, dataset in found[0][1].items()}
        found.append(copies)
        return found[0][1]

    monkeypatch.setattr("calm.train.run.cache_features", keep)
    config = frozen_config(data, tmp_path / "run")
    train(config, backbone=tiny_net(), quiet=True)
    (model, _), copies = found
    preprocessing = model.preprocessing
    images = ImageDataset(load_split(data, "train"), train_transform(config.augment, preprocessing), seed=config.seed)
    model.eval()
    assert copies["train"].dtype == np.float16
    assert [array.shape[0] for array in copies.values()] == [2, 1, 1]
    for view in (0, 1):
        images.set_epoch(view)
        with torch.no_grad():
            expected = model.backbone(torch.stack([images[i][0] for i in range(len(images))]))
        assert_close(
            torch.from_numpy(copies["train"][view]).float(), expected.permute(0, 2, 3, 1), rtol=2e-3, atol=2e-3
        )
    assert not np.array_equal(*copies["train"])


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, what: str, after: int) -> Iterator[None]:
    """Raise KeyboardInterrupt at the ``after``-th call of a function."""
    from calm.train import run

    calls: list[int] = []
    function = getattr(run.Trainer, what)

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(run.Trainer, what, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_train_frozen_continues_to_the_same_weights_without_computing_features_again(
    average: float, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = frozen_config(data, tmp_path / "whole")
    config = replace(config, optim=replace(config.optim, ema_decay=average), loss=LossOptions(prior_weight=0.1))
    whole = train(config, backbone=tiny_net(), quiet=True)
    again = replace(config, run_dir=tmp_path / "again")
    with interrupted(monkeypatch, "train_epoch", after=2):
        train(again, backbone=tiny_net(), quiet=True)
    names = {path.name.split("-")[0] for path in (tmp_path / "again" / "features").iterdir()}
    assert names == {"train", "val", "test"}
    monkeypatch.setattr(features_module, "_check_space", None)  # nothing is written anew
    train(again, backbone=tiny_net(), quiet=True)
    assert_same_weights(whole, tmp_path / "again")
    one, two = (load(run, backbone=tiny_net()) for run in (whole, tmp_path / "again"))
    assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


def test_cached_features_of_other_weights_or_images_are_computed_anew(data: Path, tmp_path: Path) -> None:
    config = frozen_config(data, tmp_path)
    model = create_model(tiny_net(), num_classes=3)
    splits = {name: load_split(data, name) for name in ("train", "test")}
    images = {
        name: ImageDataset(split, train_transform(config.augment, Preprocessing(size=(24, 24))))
        for name, split in splits.items()
    }

    def name_of(split: str = "train", views: int = 2, of: Any = config, dataset: Any = None) -> str:
        return features_module._digest(model, dataset or images[split], of, views)

    known = name_of()
    assert known == name_of()
    records = splits["train"].records
    listed_otherwise = ImageDataset(replace(splits["train"], records=records[::-1]), images["train"].transform)
    flipped, seeded = replace(config, augment=Augmentation(flip=0.1)), replace(config, seed=1)
    bfloat16 = replace(config, hardware=replace(config.hardware, precision="bf16-mixed"))
    strided = replace(model.config, backbone="another")
    others = [name_of("test"), name_of(views=1), name_of(of=flipped), name_of(of=seeded), name_of(of=bfloat16)]
    others.append(name_of(dataset=listed_otherwise))
    assert name_of("test") == name_of("test", of=seeded) == name_of("test", of=flipped)  # these are not augmented
    model.config = strided
    others.append(name_of())
    model.backbone.layers[0].stride = (3, 3)  # the same weights
    others.append(name_of())
    next(model.backbone.parameters()).data[0] += 1
    others.append(name_of())
    assert len({known, *others}) == 1 + len(others)


def test_runs_that_share_a_folder_compute_features_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    config = frozen_config(data, tmp_path / "alone", epochs=2)
    shared = replace(config, run_dir=tmp_path / "first", model=replace(config.model, feature_dir=folder))
    alone = train(config, backbone=tiny_net(), quiet=True)
    assert_same_weights(alone, train(shared, backbone=tiny_net(), quiet=True))
    files = sorted(folder.iterdir())
    assert len(files) == 3
    train(replace(shared, run_dir=tmp_path / "seed", seed=1, epochs=1), backbone=tiny_net(), quiet=True)
    assert len(set(folder.iterdir()) - set(files)) == 1  # the training images of another seed alone
    with monkeypatch.context() as patch:
        patch.setattr(features_module, "_check_space", None)  # nothing is written anew
        second = train(replace(shared, run_dir=tmp_path / "second"), backbone=tiny_net(), quiet=True)
    assert_same_weights(alone, second)
    assert "features of the val images are those of" in (second / "log.txt").read_text()
    wrong = np.load(files[-1], mmap_mode="r+")
    wrong[0, 0] += 1  # as of a backbone that computes something else with these weights
    wrong.flush()
    third = train(replace(shared, run_dir=tmp_path / "third"), backbone=tiny_net(), quiet=True)
    assert_same_weights(alone, third)
    assert files[-1].name not in (third / "log.txt").read_text()


def test_train_frozen_refuses_what_needs_images_or_space(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CalmError, match="mixup and cutmix mix images"):
        frozen_config(data, tmp_path, augment=Augmentation(mixup=0.2))
    for option in ({"feature_dropout": 0.2}, {"feature_dir": tmp_path}):
        with pytest.raises(CalmError, match=rf"model\.{next(iter(option))} is .*set model\.freeze true"):
            ModelOptions(**option)  # type: ignore[arg-type]
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(features_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CalmError, match=r"need 0\.0 GiB.*fewer model\.views"):
        train(frozen_config(data, tmp_path / "run"), backbone=tiny_net(), quiet=True)
    assert not (tmp_path / "run").exists()
    small = frozen_config(data, tmp_path / "run", model=ModelOptions(freeze=True, feature_gib=1e-6))
    with pytest.raises(CalmError, match=r"and model\.feature_gib allows 1e-06: raise it, fewer"):
        train(small, backbone=tiny_net(), quiet=True)


def test_features_beyond_half_precision_are_clipped_and_said(data: Path, tmp_path: Path) -> None:
    backbone = tiny_net(stateful=False).requires_grad_(False)
    backbone.layers[-2].weight *= 1e6
    config = frozen_config(data, tmp_path / "run", epochs=1)
    train(replace(config, lr=0.0), backbone=backbone, quiet=True)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "features of 72 of 72 images (train) lie beyond 65504" in log


def test_ctrl_c_among_the_features_says_what_the_same_command_does(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("calm.train.run.cache_features", stop)
    with pytest.raises(KeyboardInterrupt):
        train(frozen_config(data, tmp_path / "run"), backbone=tiny_net(), quiet=True)
    assert "interrupted: the same command goes on with the features" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(("share", "fits"), [(1.1, False), (1.2, True)])
def test_cached_features_are_refused_before_any_is_written_or_fit(
    share: float, fits: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    disk = share * (2 * 36 + 12 + 12) * 4 * 4 * 6 * 2  # views and images, grid, channels, bytes

    def usage(folder: Path) -> SimpleNamespace:
        files = list(folder.glob("*.npy"))
        assert fits or not files
        return SimpleNamespace(free=disk - sum(file.stat().st_size for file in files))

    monkeypatch.setattr(features_module.shutil, "disk_usage", usage)
    with nullcontext() if fits else pytest.raises(CalmError, match="fewer model"):
        train(frozen_config(data, run, epochs=1), backbone=tiny_net(), quiet=True)
    assert (run / "result.json").exists() == fits


def test_preset_probe_is_the_same_recipe_for_all_methods(tmp_path: Path) -> None:
    for method, weight in (("calm-em", 0.1), ("calm-ml", 0.1), ("cam", 0.0)):
        config = preset("probe", f"--data={tmp_path}", f"--method={method}")
        assert (config.model.freeze, config.loss.prior_weight) == (True, weight)


@pytest.mark.parametrize("frozen", [True, False])
def test_train_on_imagenet_weights_without_a_network(
    frozen: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calm.checkpoint.no_answer", lambda url: "the hub does not answer")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = ["--reading.image_size=80", "--reading.workers=0", "--epochs=2", "--batch_size=12"]
    words += ["--hardware.precision=32-true", "--hardware.accelerator=cpu", "--log.loggers=[]", "--model.views=1"]
    start = create_model("tf_efficientnet_lite0", 3, pretrained=True).backbone.state_dict()
    words += [] if frozen else ["--model.freeze=false", "--model.feature_dropout=0", "--epochs=1"]
    run = train(preset("probe", f"--data={data}", f"--run_dir={tmp_path / 'run'}", *words), quiet=True)
    model = load(run)
    assert model.preprocessing.interpolation == "bicubic"
    same = [torch.equal(value, start[name]) for name, value in model.backbone.named_parameters()]
    assert all(same) if frozen else not any(same)
    config = EvaluateConfig("classification", data=data, model=(str(run),), out=tmp_path / "tables", replicates=50)
    (result,) = evaluate(config)
    trained = json.loads((run / "result.json").read_text())["best"]["test"]
    assert result.figures["top1"].value == pytest.approx(trained["accuracy"])
    assert trained["accuracy"] > (0.4 if frozen else 0.2)


@pytest.mark.parametrize(
    "name", ["vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224"]
)
def test_optimized_backbone_of_a_foundation_model_gives_the_grid_of_its_patches(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    patch = 14 if "14" in name else 16
    with pytest.warns(UserWarning, match="grid of 2 x 3 cells"):
        model = create_model(name, 3, preprocessing=Preprocessing(size=(2 * patch, 3 * patch))).eval()
    images = torch.randn(2, 3, 2 * patch, 3 * patch)
    with torch.no_grad():
        features = model.encode(images)
        assert features.shape[2:] == (2, 3)
        assert_close(model.optimized_for_inference().encode(images), features, rtol=1e-4, atol=1e-4)
