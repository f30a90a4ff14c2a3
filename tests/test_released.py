"""Released checkpoints: every key has its place, predictions are the formulas', code in a file is not run."""

from __future__ import annotations

import inspect
import pickle

import pytest
import released_layouts as oracle
import torch
from fuzzing import Marker
from torch.testing import assert_close

import calm
from calm.cli.export import convert
from calm.errors import CalmError
from calm.model import create_model
from calm.released import load_released, released_state_dict, save_released

CLASSES = 3
FILE = "last_checkpoint.pth.tar"


def layout_state(architecture="resnet50", large=True, use_bn=True):
    """Random weights under the keys and shapes that the layout's second writing says."""
    shapes = oracle.expected_shapes(architecture, large, use_bn, classes=CLASSES)
    return oracle.random_weights(shapes, torch.float32)


def write(path, state, architecture="resnet50", **fields):
    content = {"architecture": architecture, "epoch": 40, "state_dict": state, "optimizer": {}, **fields}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A released checkpoint of resnet50 in its folder, and its weights."""
    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(2)
    state = layout_state()
    write(folder / FILE, state)
    return folder, state


def probabilities_by_hand(state, images, architecture, large, use_bn, method):
    """p(y | x) of the released model, by the formulas."""
    features = oracle.FORWARD[architecture](images, state, large, use_bn)
    logits = torch.nn.functional.conv2d(features, state["conv_last.weight"], state["conv_last.bias"])
    if method == "cam":
        return logits.mean(dim=(2, 3)).softmax(dim=1)
    scores = torch.nn.functional.conv2d(features, state["attention.0.weight"], state["attention.0.bias"]).relu()
    prior = scores / scores.sum(dim=(2, 3), keepdim=True)
    return (logits.softmax(dim=1) * prior).sum(dim=(2, 3))


@pytest.mark.parametrize(("layout", "method"), [*zip(oracle.VARIANTS, ["calm-em", "calm-ml", "cam"] * 2, strict=True)])
def test_convert_gives_a_model_that_predicts_as_the_formulas_say(tmp_path, layout, method):
    architecture, large, use_bn = layout
    state = layout_state(*layout)
    state["attention.0.bias"].fill_(0.3)  # a prior that is alive
    write(tmp_path / FILE, {f"module.{key}": tensor for key, tensor in state.items()}, architecture)
    (tmp_path / "names.txt").write_text("crow\nraven\njay\n")

    report = convert(
        tmp_path,
        method=method,
        large_feature_map=large,
        use_bn=use_bn,
        out=tmp_path / "out",
        class_names=tmp_path / "names.txt",
    )
    unused = {"attention.0.weight", "attention.0.bias"} if method == "cam" else set()
    assert set(report.consumed) | set(report.ignored) == set(state)
    assert set(report.ignored) == unused
    assert report.prefixed
    assert not report.absent

    model = calm.load(report.out)
    assert set(model.state_dict()) == set(report.consumed.values())
    for key, ours in report.consumed.items():
        assert torch.equal(model.state_dict()[ours], state[key])
    assert (model.config.backbone, model.config.method) == (architecture, method)
    assert (model.config.large_feature_map, model.config.use_bn) == (large, use_bn)
    assert (model.config.prior_activation, model.config.prior_denominator) == ("relu", "constant")
    assert model.class_names == ("crow", "raven", "jay")
    assert model.training_summary == {"converted_from": FILE, "epoch": 40}

    images = torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        by_hand = probabilities_by_hand(state, images, architecture, large, use_bn, method)
        assert_close(model(images).probs, by_hand, rtol=1e-3, atol=1e-5)
    assert by_hand.std() > 1e-3


def test_conversion_report_accounts_for_every_key(resnet, tmp_path):
    folder, _ = resnet
    text = str(convert(folder, method="cam", large_feature_map=False, out=tmp_path / "out"))
    assert "resnet50, 3 classes, epoch 40" in text
    assert "320 keys consumed" in text
    assert "ignored attention.0.weight: a CAM model has no prior" in text
    assert str(tmp_path / "out") in text


def test_load_released_accepts_file_or_folder_and_keeps_random_state(resnet):
    folder, state = resnet
    before = torch.get_rng_state()
    model = load_released(folder / FILE, method="calm-em", large_feature_map=True)
    assert_close(model.state_dict(), load_released(str(folder), method="calm-em", large_feature_map=True).state_dict())
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    assert torch.equal(model.head.attention.weight, state["attention.0.weight"])


def test_conversion_report_names_missing_batch_counters(resnet, tmp_path):
    state = {key: tensor for key, tensor in resnet[1].items() if not key.endswith("num_batches_tracked")}
    report = convert(write(tmp_path / FILE, state), method="calm-em", large_feature_map=True, out=tmp_path / "out")
    assert len(report.absent) == 53
    assert "absent backbone.bn1.num_batches_tracked: starts at 0" in str(report)


def test_read_released_keeps_a_prefix_that_only_some_keys_have(resnet, tmp_path):
    state = {("module." if key.startswith("bn1") else "") + key: tensor for key, tensor in resnet[1].items()}
    with pytest.raises(CalmError, match=r"4 missing: backbone\.bn1\.weight.*5 unexpected: backbone\.module\.bn1"):
        load_released(write(tmp_path / FILE, state), method="calm-em", large_feature_map=True)


# What the file does not say


@pytest.mark.parametrize("function", [load_released, convert])
def test_load_released_needs_method_and_map_size(function, resnet, tmp_path):
    out = {"out": tmp_path / "out"} if function is convert else {}
    with pytest.raises(CalmError, match=r"give the method \(--method\): .*does not say how it was trained"):
        function(resnet[0], large_feature_map=True, **out)
    with pytest.raises(CalmError, match=r"give large_feature_map \(--large.*28 x 28.*does not say"):
        function(resnet[0], method="cam", **out)
    with pytest.raises(CalmError, match=r"unknown method 'CALM_EM'.*calm-em"):
        function(resnet[0], method="CALM_EM", large_feature_map=True, **out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("layout", "large", "use_bn"),
    [
        (("vgg16", True, True), True, False),
        (("vgg16", True, True), False, True),
        (("vgg16", False, False), True, True),
        (("inception_v3", False, True), False, False),
        (("inception_v3", True, False), True, True),
    ],
)
def test_load_released_names_the_options_that_fit_the_weights(tmp_path, layout, large, use_bn):
    write(tmp_path / FILE, layout_state(*layout), layout[0])
    options = f"with large_feature_map={large}, use_bn={use_bn}"
    fitting = f"its weights are those of large_feature_map={layout[1]}, use_bn={layout[2]}"
    with pytest.raises(CalmError, match=f"does not fit {layout[0]} {options}: {fitting}"):
        load_released(tmp_path, method="calm-em", large_feature_map=large, use_bn=use_bn)


def test_load_released_refuses_class_names_of_another_number(resnet, tmp_path):
    with pytest.raises(CalmError, match="2 class names for 3 classes"):
        load_released(resnet[0], method="cam", large_feature_map=True, class_names=["a", "b"])
    with pytest.raises(CalmError, match=r"cannot read class names .*none\.txt"):
        convert(resnet[0], method="cam", large_feature_map=True, out=tmp_path / "o", class_names=tmp_path / "none.txt")


# Wrong files


def load_it(path):
    return load_released(path, method="calm-em", large_feature_map=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no PyTorch file"),
        (b"\x80\x02garbage", "damaged or no PyTorch file"),
        (b"PK\x03\x04" + bytes(200), "damaged or no PyTorch file"),
        (b"\n<!DOCTYPE html><html>Quota exceeded</html>", "is a text page, not the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a text page, not the file itself"),
    ],
)
def test_load_released_names_a_file_that_is_no_checkpoint(tmp_path, content, message):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CalmError, match=f"{FILE}.*{message}"):
        load_it(tmp_path / FILE)


def test_load_released_names_a_truncated_checkpoint(resnet, tmp_path):
    content = (resnet[0] / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(CalmError, match="damaged or no PyTorch file"):
        load_it(tmp_path)


@pytest.mark.parametrize("name", ["none.pth.tar", "."])
def test_load_released_names_a_missing_file(tmp_path, name):
    with pytest.raises(CalmError, match=r"cannot read the released checkpoint .*pth\.tar"):
        load_it(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds a list"),
        ({"epoch": 3, "model": {}}, "lacks 'architecture'; it holds epoch, model"),
        ({"architecture": "resnet50"}, "lacks 'state_dict'"),
        ({"architecture": "resnet18", "state_dict": {}}, "unknown architecture 'resnet18'.*resnet50"),
        ({"architecture": torch.zeros(2), "state_dict": {}}, "unknown architecture"),
        ({"architecture": "vgg16", "state_dict": {}}, "must be a dict of tensors, and not empty"),
        ({"architecture": "vgg16", "state_dict": {"conv1.weight": 3}}, "not so is 'conv1.weight'"),
        ({"architecture": "vgg16", "state_dict": {1: torch.zeros(1)}}, "not so is 1"),
        ({"architecture": "vgg16", "state_dict": {"a": torch.zeros(1).expand(100)}}, "not so is 'a'"),
        ({"architecture": "vgg16", "state_dict": {"a": torch.zeros(1)}}, "lacks the classifier conv_last.weight"),
        (
            {"architecture": "vgg16", "state_dict": {"a": torch.tensor([1, torch.nan])}},
            "NaN or infinity.* a: .*diverged",
        ),
    ],
)
def test_load_released_explains_a_dict_that_is_no_checkpoint(tmp_path, content, message):
    torch.save(content, tmp_path / FILE)
    with pytest.raises(CalmError, match=message) as caught:
        load_it(tmp_path)
    assert FILE in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer3.2.conv2.weight"), r"1 missing: backbone\.layer3\.2\.conv2\.weight"),
        (lambda state: state.pop("attention.0.bias"), r"1 missing: head\.attention\.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), r"1 unexpected: backbone\.extra"),
        (
            lambda state: state.update({"bn1.bias": torch.zeros(7)}),
            r"1 of another kind: backbone\.bn1\.bias \(float \(7,\), should be float \(64,\)\)",
        ),
    ],
)
def test_load_released_names_keys_that_do_not_fit(resnet, tmp_path, change, message):
    state = dict(resnet[1])
    change(state)
    with pytest.raises(CalmError, match=f"does not fit resnet50.*{message}"):
        load_it(write(tmp_path / FILE, state))


# Hostile files


@pytest.mark.parametrize("place", ["whole", "state_dict", "optimizer", "key", "legacy"])
def test_load_released_runs_no_code_and_names_what_was_asked(tmp_path, place):
    marker = tmp_path / "marker"
    code = Marker(marker)
    whole = {"architecture": "resnet50", "state_dict": {"conv_last.weight": torch.zeros(1)}, "optimizer": {}}
    content = {
        "whole": code,
        "state_dict": whole | {"state_dict": code},
        "optimizer": whole | {"optimizer": code},
        "key": whole | {"state_dict": {"conv_last.weight": code}},
        "legacy": whole | {"epoch": code},
    }[place]
    torch.save(content, tmp_path / FILE, _use_new_zipfile_serialization=place != "legacy")
    with pytest.raises(CalmError, match=r"can be read safely: it asks for posix\.mknod.*nothing in it was run"):
        load_it(tmp_path)
    assert not marker.exists()
    torch.load(tmp_path / FILE, weights_only=False)
    assert marker.exists()  # it is code that can be run


def test_load_released_runs_no_code_of_a_bare_pickle(tmp_path):
    (tmp_path / FILE).write_bytes(pickle.dumps(Marker(tmp_path / "marker"), protocol=2))
    with pytest.raises(CalmError, match="nothing in it was run"):
        load_it(tmp_path)
    assert not (tmp_path / "marker").exists()


# The way back


@pytest.mark.parametrize("layout", oracle.VARIANTS)
def test_released_state_dict_has_exactly_the_released_keys(layout):
    architecture, large, use_bn = layout
    with torch.device("meta"):
        for method in ("calm-em", "cam"):
            model = create_model(architecture, 20, method, large, use_bn=use_bn, prior_activation="relu")
            shapes = {key: tuple(tensor.shape) for key, tensor in released_state_dict(model).items()}
            number, sha256 = oracle.VARIANTS[layout]
            assert (len(shapes), oracle.fingerprint(shapes)) == (number, sha256)


def test_save_released_round_trips(tmp_path):
    model = create_model("resnet50", CLASSES, "calm-ml", prior_activation="relu", prior_denominator="constant")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.loss(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).backward()
    optimizer.step()
    save_released(model, tmp_path / FILE, epoch=5, optimizer=optimizer)
    content = torch.load(tmp_path / FILE, weights_only=True)
    assert set(content) == {"architecture", "epoch", "state_dict", "optimizer"}
    assert (content["architecture"], content["epoch"]) == ("resnet50", 5)
    assert content["optimizer"]["param_groups"][0]["momentum"] == 0.9
    again = load_released(tmp_path, method="calm-ml", large_feature_map=True)
    assert again.config == model.config
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_save_released_refuses_a_model_that_would_be_misread(tmp_path):
    with torch.device("meta"):
        softplus = create_model("resnet50", 2)
        small = create_model("small_resnet", 2, prior_activation="relu")
        bands = create_model("resnet50", 2, prior_activation="relu", in_channels=4)
    with pytest.raises(CalmError, match="means prior_activation='relu', but this model has 'softplus'"):
        save_released(softplus, tmp_path / FILE, epoch=1)
    with pytest.raises(CalmError, match="unknown architecture of the released code 'small_resnet'"):
        save_released(small, tmp_path / FILE, epoch=1)
    with pytest.raises(CalmError, match="the released code reads 3 channels, this model 4"):
        save_released(bands, tmp_path / FILE, epoch=1)
    assert not list(tmp_path.iterdir())


def test_the_command_can_be_made_from_the_signature():
    parameters = inspect.signature(convert).parameters
    assert list(parameters)[:2] == ["checkpoint", "out"]
    assert "num_classes" not in parameters
    for name in parameters:
        assert f"{name}: " in inspect.getdoc(convert)


def test_a_training_run_is_no_place_for_a_converted_model(resnet, tmp_path):
    (tmp_path / "config.yaml").write_text("data: birds\n")
    with pytest.raises(CalmError, match="is the folder of a training run"):
        convert(resnet[0], out=tmp_path, method="calm-em", large_feature_map=True)
    with pytest.raises(CalmError, match="there is no checkpoint"):
        convert(tmp_path / "nowhere", out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
