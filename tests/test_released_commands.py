"""The released commands as its README has them, on small birds in the released layout of CUB."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from released_cub import SMALL, call, write_released_cub

import calm
from calm.data.check import load_checked
from calm.data.loading import load_split
from calm.errors import CalmError
from calm.evaluate.cue_localization import cue_localization
from calm.evaluate.subject import model_subject
from calm.images import Preprocessing
from calm.released import load_released
from calm.released_commands.experiment import clear
from calm.released_commands.flags import parse

MODEL = ("--architecture=resnet50", "--use_bn=True", "--large_feature_map=True")
NAME = ("--experiment_name=experiment_name/", "--dataset=CUB", *MODEL, *SMALL)
TRAIN = (*NAME, "--attribution_method=CALM-EM")
EVALUATE = (
    *TRAIN,
    "--use_load_checkpoint=True",
    "--load_checkpoint=save/experiment_name/",
    "--score_map_process=jointll",
    "--norm_type=clipping",
)


class Project(NamedTuple):
    """A project in which the three commands were run, and what they printed."""

    root: Path
    trained: str
    removed: str
    cued: str

    @property
    def folder(self) -> Path:
        return self.root / "save" / "experiment_name"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    root = write_released_cub(tmp_path_factory.mktemp("project"))
    printed = []
    for script, flags in (
        ("main.py", TRAIN),
        # An evaluation never deletes: also not the folder that its checkpoint is in.
        ("eval_pixel_perturb.py", (*EVALUATE, "--override_cache=True")),
        ("eval_cue_location.py", (*EVALUATE, "--threshold_type=log")),
    ):
        code, text = call(root, script, *flags)
        assert code == 0, text
        printed.append(text)
    return Project(root, *printed)


def model_of(project: Project) -> calm.CalmModel:
    model = calm.load(project.folder / "run" / "last")
    model.preprocessing = Preprocessing((32, 32))
    return model


def test_main_leaves_the_files_of_the_released_code(project: Project) -> None:
    names = {path.name for path in project.folder.iterdir()}
    assert names == {
        "log.log",
        "last_checkpoint.pth.tar",
        "performance_log.pickle",
        "performance_log.json",
        "reports",
        "measure_jointll.pickle",
        "measure_jointll.json",
        "cue_jointll.pickle",
        "cue_jointll.json",
        "run",
    }


def test_main_writes_the_last_epoch_in_the_released_format(project: Project) -> None:
    path = project.folder / "last_checkpoint.pth.tar"
    content = torch.load(path, weights_only=True)
    assert (content["architecture"], content["epoch"]) == ("resnet50", 1)
    assert {"conv1.weight", "conv_last.weight", "attention.0.weight"} < set(content["state_dict"])
    groups = content["optimizer"]["param_groups"]
    assert sorted(group["lr"] for group in groups) == pytest.approx([0.01, 0.1])
    momenta = [state["momentum_buffer"] for state in content["optimizer"]["state"].values()]
    assert sum(map(torch.numel, momenta)) == sum(p.numel() for p in model_of(project).parameters())
    loaded = load_released(path, method="calm-em", large_feature_map=True).state_dict()
    for name, weight in model_of(project).state_dict().items():
        torch.testing.assert_close(loaded[name], weight, rtol=0, atol=0)


def test_performance_log_holds_what_was_printed(project: Project) -> None:
    with (project.folder / "performance_log.pickle").open("rb") as file:
        log = pickle.load(file)
    assert log == json.loads((project.folder / "performance_log.json").read_text())
    result = json.loads((project.folder / "run" / "result.json").read_text())
    assert log["test"]["cls"]["current_value"] == 100 * result["last"]["test"]["accuracy"]
    assert log["val"]["cls"]["value_per_epoch"] == [100 * result["last"]["val"]["accuracy"]]
    last = [line for line in project.trained.splitlines() if line.startswith("Split")][-4:]
    assert last == [
        f"Split {split}, metric {metric}: {log[split][metric]['current_value']}"
        for split, metric in (("train", "loss"), ("train", "cls"), ("val", "cls"), ("test", "cls"))
    ]
    reports = [json.loads((project.folder / "reports" / name).read_text()) for name in ("1", "1_", "1__")]
    assert [report["step"] for report in reports] == [1, 1, 1]
    assert reports[0]["train/loss"] == log["train"]["loss"]["current_value"]
    assert reports[2]["test/cls"] == log["test"]["cls"]["current_value"]


def test_log_holds_what_the_commands_printed(project: Project) -> None:
    log = (project.folder / "log.log").read_text()
    assert project.removed in log
    assert project.cued in log
    assert "Final epoch evaluation on test set" in log


def test_remove_and_classify_writes_the_released_pickle(project: Project) -> None:
    with (project.folder / "measure_jointll.pickle").open("rb") as file:
        measures = pickle.load(file)
    shares = [0.1, 0.3, 0.5, 0.7, 0.9]
    assert set(measures) == {"preds", "preds-topk", "preds-random"}
    assert list(measures["preds-topk"]) == list(measures["preds-random"]) == shares
    images, labels = [], []
    for record in load_split(project.root / "dataset" / "CUB", "test").records:
        images.append(record.path)
        labels.append(record.label)
    model = model_of(project)
    with torch.no_grad():
        predicted = model(model.preprocess(images)).probs.argmax(dim=1)
    assert measures["preds"] == (predicted == torch.tensor(labels)).tolist()
    for share in shares:
        topk, random = (sum(measures[f"preds-{order}"][share]) for order in ("topk", "random"))
        ratio = f"{topk / random:.04f}" if random else "nan"
        assert f"erase_k: {share}, prediction ratio w.r.t. random erase: {ratio}\n" in project.removed


def test_cue_location_prints_the_figures_of_the_benchmark(project: Project) -> None:
    cub = project.root / "dataset" / "CUB"
    splits, _ = load_checked(cub, ("test",), layout="cub")
    subject = model_subject(model_of(project), normalization="clipping", thresholds="log")
    result = cue_localization(subject, splits["test"], cub, batch_size=4)
    expected = [result.figures.get(f"mpxap_published_{count}") for count in (1, 2, 3)]
    line = re.search(r"^resnet50, jointll : \[(.*)\]$", project.cued, re.MULTILINE)
    assert line is not None
    for printed, figure in zip(line[1].split(", "), expected, strict=True):
        assert printed == ("nan" if figure is None else str(round(100 * figure.value, 2)))
    areas = project.cued.count("Mask AUC on split test: ")
    assert areas == len(result.details["pairs"]) > 0


def test_main_without_training_keeps_the_figures_of_training(project: Project) -> None:
    before = json.loads((project.folder / "performance_log.json").read_text())
    code, text = call(project.root, "main.py", *EVALUATE, "--is_train=False")
    assert code == 0, text
    after = json.loads((project.folder / "performance_log.json").read_text())
    assert after["train"] == before["train"]
    assert after["test"]["cls"]["current_value"] == pytest.approx(before["test"]["cls"]["current_value"])
    assert (project.folder / "last_checkpoint.pth.tar").is_file()


def test_main_does_not_train_a_finished_experiment_again(project: Project) -> None:
    code, text = call(project.root, "main.py", *TRAIN)
    assert code == 2
    assert "experiment with the same name exists" in text
    code, text = call(project.root, "main.py", *EVALUATE, "--override_cache=True")
    assert code == 2
    assert "with the checkpoint in it that is to be loaded" in text
    assert (project.folder / "last_checkpoint.pth.tar").is_file()


@pytest.mark.parametrize(
    ("flag", "complaint"),
    [
        ("--attribution_method=CAM", "--attribution_method says cam, but the checkpoint"),
        ("--large_feature_map=False", "--large_feature_map says False"),
        ("--architecture=vgg16", "--architecture says vgg16"),
        ("--load_checkpoint=nowhere/", "save/nowhere, which --load_checkpoint names; leave it out to take save/"),
        ("--use_load_checkpoint=False", "--use_load_checkpoint=True"),
        ("--score_map_process=vanilla", "cam"),
        ("--score_map_process=jointll-superclass", "superclass"),
        ("--experiment_name=..", "no folder below --save_root"),
    ],
)
def test_remove_and_classify_refuses_what_cannot_work(project: Project, flag: str, complaint: str) -> None:
    code, text = call(project.root, "eval_remove_classify.py", *EVALUATE, flag)
    assert code == 2
    assert complaint in text
    assert text.count("\n") < 5, "a message, no traceback"


def test_main_pretrained_without_a_network_names_the_flag_and_makes_no_folder(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
        monkeypatch.setenv(name.upper(), "http://127.0.0.1:9")
    flags = ("--experiment_name=other", *TRAIN[1:], "--pretrained=True")
    code, text = call(project.root, "main.py", *flags)
    assert code == 2
    assert "--pretrained=False" in text
    assert not (project.root / "save" / "other").exists()


def test_clear_deletes_only_what_the_commands_wrote(tmp_path: Path) -> None:
    flags = parse("main.py", [*MODEL, f"--save_root={tmp_path}", "--experiment_name=mine"])
    clear(flags)  # nothing there
    (flags.folder / "run" / "last").mkdir(parents=True)
    (flags.folder / "log.log").touch()
    thesis = flags.folder / "thesis.tex"
    thesis.touch()
    with pytest.raises(CalmError, match=r"thesis\.tex"):
        clear(flags)
    assert (flags.folder / "run" / "last").is_dir()
    thesis.unlink()
    clear(flags)
    assert not flags.folder.exists()
