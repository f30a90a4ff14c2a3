"""The released parser's flags, and what they become here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import write_lines, write_pack
from released_cub import write_released_cub
from torch import Tensor

from calm.data.loading import load_split
from calm.errors import CalmError
from calm.evaluate.erasing import remove_and_classify
from calm.evaluate.subject import model_subject
from calm.images import Preprocessing
from calm.model import CalmModel, create_model
from calm.released_commands.evaluate import measure
from calm.released_commands.experiment import Performance
from calm.released_commands.flags import Flags, build_parser, parse
from calm.released_commands.train import train_config
from calm.released_commands.weights import proxy_lists, released_subject, transplant

RESNET = "--architecture=resnet50"

DEFAULTS: dict[str, Any] = {
    "seed": None,
    "experiment_name": "result",
    "override_cache": False,
    "workers": 4,
    "use_load_checkpoint": False,
    "load_checkpoint": None,
    "is_different_checkpoint": False,
    "save_root": "save",
    "logger_type": "PythonLogger",
    "dataset_name": "CUB",
    "data_root": "dataset/",
    "metadata_root": "metadata/",
    "mask_root": "dataset/",
    "proxy_training_set": False,
    "architecture": "resnet18",
    "attribution_method": "CAM",
    "is_train": True,
    "epochs": 40,
    "pretrained": True,
    "cam_curve_interval": 0.001,
    "resize_size": 256,
    "crop_size": 224,
    "batch_size": 64,
    "lr": 0.01,
    "lr_decay_frequency": 30,
    "lr_classifier_ratio": 10,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "use_bn": False,
    "large_feature_map": False,
    "iou_thresholds": [30, 50, 70],
    "smoothing_ksize": 1,
    "score_map_method": "activation_map",
    "score_map_process": "vanilla",
    "norm_type": "minmax",
    "threshold_type": "even",
    "smooth_grad_nr_iter": 50,
    "smooth_grad_sigma": 4.0,
    "integrated_grad_nr_iter": 50,
}


def flags(*given: str) -> Flags:
    return parse("main.py", [RESNET, *given])


def test_build_parser_has_the_released_defaults() -> None:
    assert vars(build_parser("main.py").parse_args([])) == DEFAULTS
    with pytest.raises(CalmError, match=r"resnet18.*allowed are resnet50"):
        parse("main.py", [])


def test_parse_takes_every_spelling_of_the_released_readme() -> None:
    assert flags("--dataset=ILSVRC").dataset_name == "ILSVRC"
    assert flags("--dataset_name", "OpenImages").dataset_name == "OpenImages"
    assert flags("--iou", "30", "50").iou_thresholds == [30, 50]  # type: ignore[attr-defined]
    for word, value in (("True", True), ("yes", True), ("1", True), ("False", False), ("n", False)):
        assert flags(f"--use_bn={word}").use_bn is value
    assert flags("--large_feature_map").large_feature_map


@pytest.mark.parametrize(
    "wrong",
    [
        "--dataset=birds",
        "--architecture=resnet18",
        "--attribution_method=CALM",
        "--attribution_method=calm-em",
        "--score_map_process=joint",
        "--score_map_process=smooth_grad_square",
        "--score_map_method=gradient",
        "--norm_type=none",
        "--threshold_type=linear",
        "--logger_type=TensorBoard",
        "--use_bn=maybe",
        "--epochs=many",
        "--no_such_flag=1",
    ],
)
def test_parse_refuses_what_the_released_parser_refuses(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        flags(wrong)
    assert end.value.code == 2
    assert wrong.partition("=")[0].removesuffix("_name") in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong",
    ["--seed=-1", "--crop_size=0", "--batch_size=0", "--workers=-1", "--crop_size=300", "--cam_curve_interval=1"],
)
def test_parse_names_values_that_cannot_work(wrong: str) -> None:
    with pytest.raises(CalmError, match=wrong):
        flags(wrong)


def test_train_config_is_the_released_preset_with_the_flags() -> None:
    given = ("--attribution_method=CALM-ML", "--lr=0.02", "--lr_decay_frequency=7", "--lr_classifier_ratio=3")
    config = train_config(flags(*given, "--momentum=0.8", "--weight_decay=0.5"), lists=Path("metadata/CUB"))
    assert (config.data, config.run_dir) == (Path("dataset"), Path("save/result/run"))
    assert (config.method, config.backbone, config.epochs, config.seed) == ("calm-ml", "resnet50", 40, 0)
    assert (config.batch_size, config.lr) == (64, 0.02)
    assert (config.model.prior_activation, config.model.prior_denominator) == ("relu", "constant")
    assert (config.model.pretrained, config.model.large_feature_map, config.model.use_bn) == (True, False, True)
    optim = config.optim
    assert (optim.grouping, optim.schedule, optim.step_epochs) == ("released", "released-step", 7)
    assert (optim.head_ratio, optim.momentum, optim.weight_decay) == (3, 0.8, 0.5)
    assert config.reading.image_size == round(config.augment.resize_ratio * 224 / (256 / 224)) == 224
    vgg = train_config(parse("main.py", ["--architecture=vgg16"]), lists=Path("x"))
    assert not vgg.model.use_bn


def tiny(method: str = "calm-em", classes: int = 3) -> CalmModel:
    """A network whose predictions depend on the image, unlike a fresh resnet50's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        size = Preprocessing((32, 32))
        model = create_model("tiny_resnet", classes, method, preprocessing=size)  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def test_measure_adds_up_to_the_benchmark(tmp_path: Path) -> None:
    project = write_released_cub(tmp_path, images=8)
    split = load_split(project / "dataset" / "CUB", "test")
    model = tiny()
    model.class_names = split.class_names
    subject = model_subject(model)
    measures = measure(subject, split, batch_size=5, workers=0, seed=2)
    figures = remove_and_classify(subject, split, batch_size=4, draws=1, seed=2, replicates=2).figures
    topk, random = measures["preds-topk"], measures["preds-random"]
    assert isinstance(topk, dict)
    assert isinstance(random, dict)
    assert len(measures["preds"]) == len(split.records) == 12
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert len(topk[share]) == len(random[share]) == 12
        ratio = sum(topk[share]) / sum(random[share])
        assert figures[f"r{round(100 * share)}"].value == pytest.approx(ratio)


def gradient(model: CalmModel, images: Tensor, classes: Tensor) -> Tensor:
    """|d score / d image|, largest over colours, by autograd alone."""
    images = images.clone().requires_grad_()
    output: Any = model(images)
    scores = output.log_probs if model.config.method != "cam" else output.class_scores
    (found,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), images)
    return found.abs().amax(dim=1)


@pytest.mark.parametrize("method", ["cam", "calm-em"])
def test_released_subject_gradients_are_those_of_the_released_code(method: str) -> None:
    model = tiny(method)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([2, 0])

    def maps(*given: str) -> Tensor:
        return released_subject(flags(*given), model).predict(images).maps(classes[:, None])[:, 0]

    plain = gradient(model, images, classes)
    for given in (["--score_map_process=input_grad"], ["--score_map_method=backprop"]):
        torch.testing.assert_close(maps(*given), plain)
    summed = sum(gradient(model, images * (i / 4), classes) for i in range(5))
    assert isinstance(summed, Tensor)
    four = ("--score_map_process=integrated_grad", "--integrated_grad_nr_iter=4")
    torch.testing.assert_close(maps(*four), summed / 4)
    for process in ("smooth_grad", "var_grad"):
        given = [f"--score_map_process={process}", "--smooth_grad_nr_iter=3"]
        assert not torch.equal(maps(*given), maps(*given, "--smooth_grad_sigma=8"))


def test_released_subject_refuses_a_map_of_an_untrained_layer() -> None:
    for method, process, kind in (("cam", "jointll", "joint"), ("calm-em", "vanilla", "cam")):
        with pytest.raises(CalmError, match=kind):
            released_subject(flags(f"--score_map_process={process}"), tiny(method))


def test_transplant_keeps_everything_but_the_classifier() -> None:
    before = tiny().state_dict()
    after = transplant(tiny(), 7, seed=1).state_dict()
    for name in before.keys() - {"head.conv_last.weight", "head.conv_last.bias"}:
        assert torch.equal(before[name], after[name]), name
    assert len(after["head.conv_last.weight"]) == 7
    again = transplant(tiny(), 7, seed=1).state_dict()
    assert all(torch.equal(after[name], again[name]) for name in after)


def test_proxy_lists_keep_the_named_training_images_only(tmp_path: Path) -> None:
    pack = write_pack(tmp_path / "pack")
    (tmp_path / "lists").mkdir()
    (pack / "metadata").rename(tmp_path / "lists" / "CUB")
    given = flags(f"--metadata_root={tmp_path / 'lists'}", f"--save_root={tmp_path / 'save'}")
    with pytest.raises(CalmError, match="image_ids_proxy"):
        proxy_lists(given)
    chosen = ["images/train/1.png", "images/train/4.png"]
    (tmp_path / "lists" / "CUB" / "train" / "image_ids_proxy.txt").write_text("\n".join(chosen) + "\n")
    write_lines(tmp_path / "lists" / "CUB" / "classes.txt", ["0 cat", "1 dog", "2 cow"])
    lists = proxy_lists(given)
    assert load_split(pack, "train", metadata_root=lists).class_names == ("cat", "dog", "cow")
    assert (lists / "train" / "image_ids.txt").read_text().split() == chosen
    assert (lists / "train" / "class_labels.txt").read_text().split() == [f"{chosen[0]},0", f"{chosen[1]},1"]
    assert (lists / "test" / "image_ids.txt").read_text().count("\n") == 2


@pytest.mark.parametrize("text", ["[]", "1", '{"train": 3}', '{"train": {"cls": {}}}', '{"more": {}}'])
def test_performance_read_names_a_damaged_log(tmp_path: Path, text: str) -> None:
    (tmp_path / "performance_log.json").write_text(text)
    with pytest.raises(CalmError, match=r"performance_log\.json"):
        Performance.read(tmp_path)
