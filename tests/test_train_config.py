"""Flags, files and presets become a configuration; what cannot work is refused with the reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from calm.cli.train import parse
from calm.errors import CalmError
from calm.files import write_text
from calm.train.config import DataOptions, Hardware, LossOptions, OptimOptions, TrainConfig, schedule_of
from calm.train.folder import check_folder, config_dict, default_run_dir, differences, write_config
from calm.train.settings import PRESETS, load_config, preset


def test_train_config_defaults_are_the_released_recipe() -> None:
    config = TrainConfig(data=Path("x"))
    assert (config.epochs, config.batch_size, config.lr, config.backbone) == (40, 64, 0.01, "resnet50")
    optim = config.optim
    assert (optim.name, optim.momentum, optim.nesterov, optim.weight_decay) == ("sgd", 0.9, True, 1e-4)
    assert (optim.head_ratio, optim.schedule, optim.step_epochs, optim.step_factor) == (10, "step", 30, 0.1)
    assert (config.reading.image_size, config.augment.crop, config.augment.flip) == (None, "resize-crop", 0.5)
    assert (config.model.pretrained, config.model.large_feature_map) == (True, True)
    assert config.loss == LossOptions(posterior="current", temperature=1.0)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_says_only_what_it_changes(name: str) -> None:
    config = config_dict(preset(name, "--data=x"))
    default = config_dict(TrainConfig(data=Path("x")))

    def leaves(tree: dict[str, Any], before: str = "") -> dict[str, Any]:
        parts = [leaves(v, f"{before}{k}.") if isinstance(v, dict) else {before + k: v} for k, v in tree.items()]
        return {name: value for part in parts for name, value in part.items()}

    written = leaves(yaml.safe_load(PRESETS[name].read_text()))
    assert {field: now for field, (_, now) in differences(default, config).items()}.items() <= written.items()


def test_preset_losses_of_calm_are_not_for_cam() -> None:
    for name, prior_weight in (("small", 0.1), ("birds", "0.1:0")):
        calm = prior_weight, "1:0"
        for method, expected in (("calm-em", calm), ("calm-ml", calm), ("cam", (0, 0))):
            loss = parse(["--preset", name, "--data", "birds", "--method", method]).loss
            assert (loss.prior_weight, loss.cam_weight) == expected


def test_preset_losses_are_dropped_one_by_one() -> None:
    flags = ["--preset", "small", "--data", "birds", "--method", "cam", "--loss.cam_weight"]
    assert parse([*flags, "0"]).loss.prior_weight == 0
    with pytest.raises(CalmError, match="this is CAM"):
        parse([*flags, "1"])


def test_preset_leaves_calm_ml_its_prior_weight() -> None:
    for method in ("calm-em", "calm-ml"):
        flags = ["--preset", "small", "--data", "birds", "--method", method, "--loss.prior_weight", "0.3"]
        assert parse(flags).loss.prior_weight == 0.3


def test_parse_reads_the_course_of_a_weight_as_it_is_written(tmp_path: Path) -> None:
    for text, value in (("1:0", "1:0"), ("1:30", "1:30"), ("0.5", 0.5), ("1", 1.0)):
        assert parse(["--data", "birds", "--loss.cam_weight", text]).loss.cam_weight == value
        (tmp_path / "quoted.yaml").write_text(f"loss: {{temperature: '{text}'}}")
        assert parse(["--data", "birds", "--config", str(tmp_path / "quoted.yaml")]).loss.temperature == value
    (tmp_path / "bare.yaml").write_text("epochs: 3\nloss:\n  temperature: 1:30\n")
    with pytest.raises(CalmError, match=r"'1:30' in line 3 .*bare|bare.*'1:30' in line 3"):
        parse(["--data", "birds", "--config", str(tmp_path / "bare.yaml")])


def test_parse_skip_bad_is_short_for_its_option() -> None:
    for words in (["--skip-bad"], ["--skip_bad"], ["--reading.skip_bad", "true"]):
        assert parse(["--data", "birds", *words]).reading.skip_bad
    assert not parse(["--data", "birds"]).reading.skip_bad


def test_parse_lets_flags_win_over_files_and_files_over_presets(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("data: here\nlr: 0.3\nepochs: 7\n")
    config = parse(["--preset", "small", f"--config={file}", "--epochs=9", "--optim.betas=[0.8,0.9]"])
    assert (config.backbone, config.lr, config.epochs, config.optim.betas) == ("small_resnet", 0.3, 9, (0.8, 0.9))


def test_parse_reads_what_print_config_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--preset=small", "--data=here", "--loss.temperature=0.5:1.0"]
    with pytest.raises(SystemExit):
        parse([*flags, "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert parse([f"--config={tmp_path / 'printed.yaml'}"]) == parse(flags)


def test_load_config_reads_what_write_config_writes(tmp_path: Path) -> None:
    config = preset("small", f"--data={tmp_path}", "--loss.temperature=0.5:1.0", "--hardware.devices=2")
    write_config(config, tmp_path)
    assert load_config(tmp_path / "config.yaml") == config
    run = replace(config, run_dir=tmp_path)
    assert parse(["--resume", str(tmp_path)]) == run
    assert parse(["--resume", str(tmp_path), "--epochs", "77"]) == replace(run, epochs=77)
    with pytest.raises(CalmError, match="leave out --preset"):
        parse(["--resume", str(tmp_path), "--preset=small"])


def test_parse_resumes_a_run_where_it_lies_now(tmp_path: Path) -> None:
    config = preset("small", f"--data={tmp_path}", f"--run_dir={tmp_path / 'before'}")
    write_config(config, tmp_path / "before")
    (tmp_path / "before").rename(tmp_path / "now")
    assert parse(["--resume", str(tmp_path / "now")]) == replace(config, run_dir=tmp_path / "now")
    assert parse(["--resume", str(tmp_path / "now"), "--data", "elsewhere"]).data == Path("elsewhere")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset=smal"], "did you mean 'small'"),
        (["--epoch=3"], "epoch"),
        (["--optim.schedule=cosin"], "cosin"),
        (["--epochs=0"], "epochs is 0"),
        (["--optim.warmup_epochs=40"], "leaves nothing"),
        (["--method=cam", "--loss.posterior=ema"], "not cam's"),
        (["--optim.grouping=released", "--backbone=small_resnet"], "small_resnet"),
        (["--loss.temperature=hot"], "hot"),
        (["--method=cam", "--loss.prior_weight=0.1"], "a CAM model has no prior"),
        (["--model.prior_activation=relu", "--loss.prior_weight=0.1"], "a ReLU prior"),
        (["--method=cam", "--loss.cam_weight=0.5"], "this is CAM"),
        (["--method=cam", "--model.pooling_exponent=0"], "CAM has no prior"),
        (["--model.pooling_exponent=2"], "pooling_exponent is 2: give 1"),
        (["--model.pooling_exponent=0.5", "--model.prior_denominator=constant"], "take prior_denominator"),
        (["--model.pooling_exponent=0", "--loss.temperature=0.5:1"], "have no pooling_exponent 0"),
        (["--loss.pooling_exponent=0", "--loss.temperature=0.5:1"], "have no pooling_exponent 0"),
        (["--loss.pooling_exponent=2"], "pooling_exponent is 2: give 1"),
        (["--loss.pooling_exponent=1", "--method=cam"], "loss.pooling_exponent is 1, for CALM with one head alone"),
        (["--loss.pooling_exponent=1", "--wsol=acol"], "for CALM with one head alone"),
        (["--loss.cam_weight=much"], "loss.cam_weight 'much'"),
        (["--model.unfreeze_after=3"], r"unfreeze_after needs model\.freeze: true, or the name"),
        (["--model.freeze=layer3", "--model.unfreeze_after=40"], "leaves nothing of 40 epochs"),
        (["--augment.crop=middle"], "middle"),
        (["--config=nowhere.yaml"], "nowhere"),
        (["--preset"], "needs a value"),
    ],
)
def test_parse_refuses_wrong_flags(flags: list[str], message: str) -> None:
    with pytest.raises(CalmError, match=message):
        parse(["--data=x", *flags])


@pytest.mark.parametrize(
    "make",
    [
        lambda: OptimOptions(momentum=0.0),
        lambda: OptimOptions(ema_decay=1.5),
        lambda: OptimOptions(name="adam"),
        lambda: OptimOptions(accumulate=0),
        lambda: DataOptions(val_fraction=0.7),
        lambda: DataOptions(workers=-1),
        lambda: DataOptions(channels=5, mean=(0.1, 0.2)),
        lambda: Hardware(devices=0),
        lambda: Hardware(precision="16"),
        lambda: LossOptions(teacher_decay=-0.1),
        lambda: TrainConfig(data=Path("x"), method="calm"),
    ],
)
def test_options_refuse_impossible_values(make: Any) -> None:
    with pytest.raises(CalmError, match=r"allowed|needs|give"):
        make()


def test_check_folder_names_what_differs(tmp_path: Path) -> None:
    config = TrainConfig(data=tmp_path)
    check_folder(tmp_path / "run", config)
    write_config(config, tmp_path / "run")
    check_folder(tmp_path / "run", config)
    check_folder(tmp_path / "run", replace(config, reading=DataOptions(workers=1, cache=True)))
    with pytest.raises(CalmError, match=r"lr: 0.01 there, 0.5 now\n  optim.name: 'sgd' there, 'adamw' now"):
        check_folder(tmp_path / "run", replace(config, lr=0.5, optim=OptimOptions(name="adamw")))
    with pytest.raises(CalmError, match="holds no run"):
        check_folder(tmp_path, config)


def test_default_run_dir_is_the_same_for_the_same_command(tmp_path: Path) -> None:
    config = TrainConfig(data=tmp_path / "birds", backbone="timm/resnet18", method="cam")
    assert default_run_dir(config) == Path("runs/birds-timm-resnet18-cam")


def test_schedule_of_reaches_its_end_with_the_last_step() -> None:
    for text in ("0.5:1.5", "0.5:1.5:linear", "0.5:1.5:cosine"):
        at = schedule_of(text, steps=9)
        assert [at(0), at(4), at(8)] == pytest.approx([0.5, 1.0, 1.5])
    assert schedule_of("0.5:1.5:cosine", 9)(1) < schedule_of("0.5:1.5", 9)(1)
    assert schedule_of(2, steps=9)(3) == 2.0


@pytest.mark.parametrize(
    ("text", "message"),
    [("warm", "neither a number"), ("1:2:sine", "did you mean"), ("-1", "0 or more"), ("0:inf", "finite")],
)
def test_schedule_of_refuses_unreadable_text(text: str, message: str) -> None:
    with pytest.raises(CalmError, match=message):
        schedule_of(text, steps=1)


def test_check_folder_says_which_settings_of_an_earlier_version_are_gone(tmp_path):
    config = TrainConfig(data=tmp_path / "data", run_dir=tmp_path)
    former = config_dict(config)
    former["hardware"]["keep_logits"] = True
    write_text(tmp_path / "config.yaml", yaml.safe_dump(former))
    with pytest.raises(CalmError, match=r"hardware\.keep_logits: True there, no setting of this version"):
        check_folder(tmp_path, config)


def test_parse_names_settings_of_an_earlier_version_in_a_resumed_run(tmp_path):
    former = config_dict(TrainConfig(data=tmp_path / "data", run_dir=tmp_path))
    former["loss"]["samples"] = None
    write_text(tmp_path / "config.yaml", yaml.safe_dump(former))
    with pytest.raises(CalmError, match=r"this version lacks: loss\.samples; it cannot be continued"):
        parse(["--resume", str(tmp_path)])
