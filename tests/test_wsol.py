"""Training methods of weakly-supervised localization: by hand-drawn cases, in models, and through `calm train`."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import conv2d
from torch.utils import _pytree
from train_cases import SIZE, tiny_config, tiny_net, weights_of, write_squares

import calm
from calm.acol import AcolCalmOutput, AcolCamHead, AcolCamOutput
from calm.backbones import build_backbone
from calm.cli import main
from calm.cli.attribute import attribute_files
from calm.cli.train import parse
from calm.config import ModelConfig, WsolOptions
from calm.errors import CalmError
from calm.model import create_model, load
from calm.output import CalmOutput
from calm.released import save_released
from calm.train import train
from calm.train.wsol import (
    SelfProducedGuidance,
    add_attention_dropout,
    drop_by_attention,
    dropout_layers,
    guided_layers,
    hide_patches,
    seed_loss,
    seeds,
)

METHODS = ["has", "adl", "acol", "spg", "cutmix"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"))


# --- Hide-and-Seek


def test_hide_patches_hides_whole_patches_by_the_mean_of_the_batch() -> None:
    images = torch.arange(2 * 3 * 5 * 7, dtype=torch.float32).reshape(2, 3, 5, 7)
    hidden = hide_patches(images, [2], 0.5, 3)
    mean = images.mean(dim=(0, 2, 3))
    changed = (hidden != images).any(dim=1)
    assert changed.any()
    assert not changed.all()
    for image, mask in zip(hidden, changed, strict=True):
        for y in range(0, 5, 2):  # the last row and column are cut
            for x in range(0, 7, 2):
                assert mask[y : y + 2, x : x + 2].unique().numel() == 1
        assert torch.equal(image[:, mask], mean[:, None].expand(-1, int(mask.sum())))


def test_hide_patches_hides_at_its_rate_and_by_its_seed_alone() -> None:
    images = torch.rand(40, 1, 32, 32)
    for rate in (0.0, 0.25, 1.0):
        share = (hide_patches(images, [4, 8], rate, 1, 2) != images).float().mean()
        assert share == pytest.approx(rate, abs=0.02)
    torch.manual_seed(0)
    first = hide_patches(images, [4], 0.5, 1)
    torch.manual_seed(1)
    assert torch.equal(first, hide_patches(images, [4], 0.5, 1))
    assert not torch.equal(first, hide_patches(images, [4], 0.5, 2))


def test_hide_patches_draws_a_side_for_each_image() -> None:
    hidden = hide_patches(torch.rand(60, 1, 8, 8), [8, 1], 0.5, 0)[:, 0].flatten(1)
    whole = [image.unique().numel() in (1, 64) for image in hidden]
    assert 15 < sum(whole) < 45


# --- attention-based dropout


def test_drop_by_attention_drops_the_most_attended_or_weights_by_importance() -> None:
    features = torch.tensor([[[1.0, 2.0], [4.0, 3.0]], [[1.0, 0.0], [4.0, 5.0]]])[None]
    attention = torch.tensor([[1.0, 1.0], [4.0, 4.0]])
    kept = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(drop_by_attention(features, 1.0, 0.9), features * kept)
    torch.testing.assert_close(drop_by_attention(features, 0.0, 0.9), features * attention.sigmoid())
    assert torch.equal(drop_by_attention(features, 1.0, 1.0), features * kept), "the maximum itself is dropped"


def test_drop_by_attention_has_a_maximum_for_each_image_and_one_draw_for_the_batch() -> None:
    features = torch.rand(200, 1, 3, 3) * torch.linspace(0.1, 9, 200)[:, None, None, None]
    dropped = drop_by_attention(features, 1.0, 0.9)
    assert (dropped.flatten(1) == 0).any(dim=1).all()
    torch.manual_seed(0)
    draws = [bool((drop_by_attention(features, 0.75, 0.9) == 0).any()) for _ in range(400)]
    assert sum(draws) == pytest.approx(300, abs=40)


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("resnet50", {}, ["layer3.0", "layer4.0", "layer4.2"]),
        ("vgg16", {"use_bn": False}, ["features.16", "features.22", "features.28"]),
        ("vgg16", {"large_feature_map": False}, ["features.23", "features.32", "features.42"]),
        ("inception_v3", {}, ["Mixed_5d", "Mixed_6e", "A3_2b"]),
        ("tiny_resnet", {}, ["stages.0", "stages.1"]),
        ("timm/resnet10t", {}, ["model.layer3", "model.layer4"]),
        ("tf_efficientnet_lite0", {"output_stride": 16}, ["model.blocks.4", "model.blocks.6"]),
    ],
)
def test_attention_dropout_changes_training_alone(name: str, options: Any, layers: list[str]) -> None:
    backbone = build_backbone(name, **options)
    keys, images = list(backbone.state_dict()), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = backbone.eval()(images)
        assert add_attention_dropout(backbone, WsolOptions(["adl"]), (3, 64, 64)) == layers
        assert torch.equal(backbone(images), before)
        assert list(backbone.state_dict()) == keys
        calls = []
        for part in layers:
            hook = list(backbone.get_submodule(part)._forward_hooks.values())[-1]
            calls.append(hook(backbone.get_submodule(part).train(), (), before))
        assert all((call != before).any() for call in calls)


def test_attention_dropout_says_where_it_has_no_place() -> None:
    options = WsolOptions(["adl"])
    with pytest.raises(CalmError, match="no default place"):
        dropout_layers(tiny_net())
    assert add_attention_dropout(tiny_net(), replace(options, adl_layers=["layers.0"]), (3, SIZE, SIZE)) == ["layers.0"]
    with pytest.raises(CalmError, match=r"no part 'layer.0'; there are layers.0"):
        add_attention_dropout(tiny_net(), replace(options, adl_layers=["layer.0"]), (3, SIZE, SIZE))
    with pytest.raises(CalmError, match=r"shape \(1, 197, 192\)"):
        add_attention_dropout(build_backbone("vit_tiny_patch16_224"), options, (3, 224, 224))


# --- ACoL


def acol(method: Any, threshold: float = 0.6, channels: int | None = 5) -> calm.CalmModel:
    torch.manual_seed(3)
    return create_model(tiny_net(), 4, method, acol_threshold=threshold, acol_channels=channels)


def test_acol_of_cam_follows_the_paper() -> None:
    model = acol("cam").eval()
    head, features, targets = model.head, torch.rand(3, 6, 4, 4), torch.tensor([2, 0, 3])
    assert isinstance(head, AcolCamHead)
    with torch.no_grad():
        first = conv2d(head.hidden(features), head.conv_last.weight, head.conv_last.bias)
        maps = first[range(3), targets]
        low, high = (reduce(dim=(1, 2), keepdim=True) for reduce in (maps.amin, maps.amax))
        erased = (maps - low) / (high - low) >= 0.6
        assert erased.any()
        second = head.second.conv_last(head.second_hidden(features * ~erased[:, None]))
        output = head(features, targets)
        both = [
            (part - part.amin((2, 3), True)) / (part.amax((2, 3), True) - part.amin((2, 3), True))
            for part in (first, second)
        ]
        torch.testing.assert_close(output.attribute([[0, 1, 2, 3]] * 3), torch.maximum(*both))
        torch.testing.assert_close(output.probs, first.mean((2, 3)).softmax(1))
        losses = [torch.nn.functional.cross_entropy(part.mean((2, 3)), targets) for part in (first, second)]
        torch.testing.assert_close(model.output_loss(output, targets), sum(losses))


def test_acol_erases_by_the_prediction_without_targets_and_by_the_largest_of_soft_ones() -> None:
    model, features = acol("calm-em").eval(), torch.rand(3, 6, 4, 4)
    with torch.no_grad():
        first = model.head(features)
        by_prediction = model.head(features, first.first.probs.argmax(1))
        soft = torch.eye(4)[[2, 0, 3]] * 0.6 + 0.1
        by_soft, by_index = model.head(features, soft), model.head(features, torch.tensor([2, 0, 3]))
    assert torch.equal(first.second.logits, by_prediction.second.logits)
    assert torch.equal(by_soft.second.logits, by_index.second.logits)
    assert not torch.equal(first.second.logits, by_index.second.logits)


@pytest.mark.parametrize("activation", ["softplus", "relu", "exp"])
def test_acol_of_calm_is_the_mixture_of_both_heads(activation: Any) -> None:
    torch.manual_seed(0)
    logits, scores = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64), torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    scores[:, 0] = -1  # dead for ReLU
    first, second = (CalmOutput(*pair, activation) for pair in zip(logits, scores, strict=True))
    output = AcolCalmOutput(first, second)
    joint = (first.joint + second.joint) / 2
    targets = torch.tensor([1, 4, 0])
    torch.testing.assert_close(output.joint, joint)
    torch.testing.assert_close(output.probs, joint.sum((2, 3)))
    torch.testing.assert_close(output.prior, joint.sum(1))
    torch.testing.assert_close(output.posterior, joint / joint.sum((2, 3), keepdim=True))
    torch.testing.assert_close(output.conditional.sum(1), torch.ones(3, 4, 4, dtype=torch.float64))
    torch.testing.assert_close(output.target_log_joint(targets).exp(), joint[range(3), targets])
    sharper = output.prior**2 / (output.prior**2).sum((1, 2), keepdim=True)
    tempered = output.attribute(targets, "prior", prior_exponent=2.0)
    torch.testing.assert_close(tempered, sharper)
    assert output.dead.tolist() == [activation == "relu", False, False]
    torch.testing.assert_close(output.loss(targets), first.loss(targets) + second.loss(targets))
    taught = output.loss(targets, teacher=AcolCalmOutput(second, first), temperature=0.5)
    parts = [one.loss(targets, teacher=other, temperature=0.5) for one, other in ((first, second), (second, first))]
    torch.testing.assert_close(taught, sum(parts))
    with pytest.raises(CalmError, match="two heads"):
        output.loss(targets, teacher=first)


@pytest.mark.parametrize("method", ["cam", "calm-em"])
def test_acol_is_saved_loaded_and_a_tree_of_tensors(method: Any, tmp_path: Path) -> None:
    model = acol(method, channels=7).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    again = load(model.save_pretrained(tmp_path / "model"), backbone=tiny_net())
    assert again.config == model.config
    output = again(images)
    assert isinstance(output, (AcolCalmOutput, AcolCamOutput))
    assert torch.equal(output.attribute([1, 2]), model(images).attribute([1, 2]))
    leaves, spec = _pytree.tree_flatten(output)
    assert torch.equal(_pytree.tree_unflatten(leaves, spec).probs, output.probs)
    card = json.loads((tmp_path / "model" / "calm.json").read_text())
    card["model"]["acol_channels"] = 4096
    (tmp_path / "model" / "calm.json").write_text(json.dumps(card))
    with pytest.raises(CalmError, match="acol_channels are 4096"):
        load(tmp_path / "model", backbone=tiny_net())
    model.config = replace(model.config, backbone="resnet50", prior_activation="relu")
    with pytest.raises(CalmError, match="one head"):
        save_released(model, tmp_path / "file", epoch=1)


def test_acol_passes_through_torch_export() -> None:
    model = acol("calm-em").eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images).joint, model(images).joint)


# --- SPG


def test_seeds_are_foreground_background_and_unknown() -> None:
    scores = torch.full((2, 8, 8), 0.3)
    scores[0, :5] = 0.8  # 40 pixels
    scores[0, 7] = 0.05
    scores[1, 0, :4] = torch.tensor([0.9, 0.64, 0.62, 0.0])  # fewer than 30 above: those above 0.7 * 0.9 = 0.63
    first, second = seeds(scores, (0.7, 0.1))
    assert (first[:5] == 1).all()
    assert first[5:7].isnan().all()
    assert (first[7] == 0).all()
    assert second[0, :4].tolist()[:2] == [1, 1]
    assert second[0, 2].isnan()
    assert second[0, 3] == 0
    assert second.isnan().sum() == 61


def test_seed_loss_is_the_cross_entropy_of_the_known_pixels() -> None:
    scores = torch.tensor([[[0.5, -1.0], [2.0, 9.0]]], requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0], [0.0, math.nan]]])
    sigmoid = [1 / (1 + math.exp(-value)) for value in (0.5, -1.0, 2.0)]
    expected = -(math.log(sigmoid[0]) + math.log(1 - sigmoid[1]) + math.log(1 - sigmoid[2])) / 3
    loss = seed_loss(scores, mask)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert (scores.grad != 0).tolist() == [[[True, True], [True, False]]]
    assert float(seed_loss(scores.detach(), torch.full_like(mask, math.nan))) == 0


@pytest.mark.parametrize("method", ["cam", "calm-em"])
def test_self_produced_guidance_teaches_b2_by_the_map_b1_by_b2_and_c_by_both(method: Any) -> None:
    torch.manual_seed(1)
    model = create_model(tiny_net(stateful=False), 3, method)
    options = WsolOptions(["spg"], spg_layers=["layers.0", "layers.2"], spg_channels=5, spg_foreground_b2=0.6)
    guidance = SelfProducedGuidance(model.backbone, options, (3, SIZE, SIZE))
    images, targets = torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 2, 1, 1])
    output = model(images)
    loss = guidance(output, targets, (SIZE, SIZE))
    with torch.no_grad():
        first = model.backbone.layers[0](images)
        features = [first, model.backbone.layers[2](first.relu()), model.backbone(images)]
        hidden = [conv(each).relu() for conv, each in zip(guidance.convolutions, features, strict=True)]
        scores = [guidance.shared(hidden[0]), guidance.shared(hidden[1]), guidance.last(hidden[2])]
        b1, b2, c = (torch.nn.functional.interpolate(score, (SIZE, SIZE), mode="bilinear")[:, 0] for score in scores)
        attention = output.attribute(targets, size=(SIZE, SIZE))
        low, high = attention.amin((1, 2), True), attention.amax((1, 2), True)
        pairs = [
            (b2, (attention - low) / (high - low), (0.6, 0.01)),
            (b1, b2.sigmoid(), (0.5, 0.05)),
            (c, (b1.sigmoid() + b2.sigmoid()) / 2, (0.7, 0.1)),
        ]
        expected = sum(float(seed_loss(score, seeds(teacher, cuts))) for score, teacher, cuts in pairs)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in guidance.parameters())
    assert model.backbone.layers[2].weight.grad is not None
    assert all(weight.grad is None for weight in model.head.parameters()), "no gradient flows into the map"
    with torch.no_grad():
        copy.deepcopy(model)(images)
    assert not guidance._features


@pytest.mark.parametrize(
    ("name", "options", "layers", "channels"),
    [
        ("resnet50", {}, ["layer3.0", "layer3"], [1024, 1024, 2048]),
        ("vgg16", {"use_bn": False}, ["features.22", "features.28"], [512, 512, 1024]),
        ("vgg16", {"large_feature_map": False}, ["features.33", "features.42"], [512, 512, 1024]),
        ("inception_v3", {}, ["Mixed_5d", "Mixed_6e"], [288, 768, 1024]),
        ("tiny_resnet", {}, ["stem", "stages.0"], [32, 32, 64]),
        ("timm/resnet10t", {}, ["model.layer2", "model.layer3"], [128, 256, 512]),
        ("tf_efficientnet_lite0", {"output_stride": 16}, ["model.blocks.2", "model.blocks.4"], [40, 112, 1280]),
    ],
)
def test_self_produced_guidance_has_its_place_in_each_backbone(
    name: str, options: Any, layers: list[str], channels: list[int]
) -> None:
    backbone = build_backbone(name, **options)
    keys = list(backbone.state_dict())
    guidance = SelfProducedGuidance(backbone, WsolOptions(["spg"]), (3, 64, 64))
    assert guidance.layers == layers
    assert [conv.in_channels for conv in guidance.convolutions] == channels
    assert guidance.last.in_channels == min(512, channels[1])
    assert list(backbone.state_dict()) == keys


def test_self_produced_guidance_says_where_it_has_no_place() -> None:
    with pytest.raises(CalmError, match="name two parts"):
        guided_layers(tiny_net())
    with pytest.raises(CalmError, match=r"spg.*shape \(1, 197, 192\)"):
        SelfProducedGuidance(build_backbone("vit_tiny_patch16_224"), WsolOptions(["spg"]), (3, 224, 224))


# --- options and training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["hide"]}, "hide"),
        ({"methods": ["has"], "has_patches": [0]}, "has_patches"),
        ({"methods": ["has"], "has_rate": 1.5}, "wsol.has_rate"),
        ({"methods": ["has"], "adl_rate": 0.5}, "belongs to the method adl"),
        ({"methods": ["acol"], "acol_threshold": 0.0}, "wsol.acol_threshold"),
        (
            {"methods": ["spg"], "spg_foreground_c": 0.1, "spg_background_c": 0.2},
            "background_c 0.2 is above wsol.spg_f",
        ),
        ({"methods": ["spg"], "spg_background_b1": -0.1}, "wsol.spg_background_b1"),
        ({"methods": ["spg"], "spg_layers": ["one"]}, "name two"),
        ({"methods": ["acol"], "spg_channels": 9}, "belongs to the method spg"),
    ],
)
def test_wsol_options_refuse_what_does_not_fit(options: Any, message: str) -> None:
    with pytest.raises(CalmError, match=message):
        WsolOptions(**options)
    with pytest.raises(CalmError, match="acol_channels"):
        ModelConfig("resnet50", 3, acol_channels=9)


def test_train_wsol_flag_names_one_method_or_several() -> None:
    assert parse(["--data=d", "--wsol", "acol"]).wsol.methods == ["acol"]
    for both in ("has+cutmix", "has,cutmix", "has, cutmix"):
        config = parse(["--data=d", "--wsol", both, "--wsol.has_patches=[16,32]"])
        assert config.wsol.methods == ["has", "cutmix"]
    assert (config.wsol.has_patches, config.augment.cutmix) == ([16, 32], 1.0)
    assert parse(["--data=d", "--wsol=cutmix", "--augment.cutmix=0.5"]).augment.cutmix == 0.5
    assert parse(["--data=d", "--wsol=cutmix", "--loss.cutmix=shares", "--method=calm-ml"]).loss.cutmix == "shares"
    for flags in (["--wsol=cutmix", "--method=cam"], ["--wsol=has"]):
        with pytest.raises(CalmError, match=r"loss\.cutmix is shares, for CALM trained with --wsol cutmix"):
            parse(["--data=d", "--loss.cutmix=shares", *flags])
    with pytest.raises(CalmError, match="did you mean 'has'"):
        parse(["--data=d", "--wsol=hass+adl"])
    for flags in (["--wsol", "has"], ["--wsol", "adl"], ["--wsol", "spg"], ["--wsol", "cutmix"]):
        with pytest.raises(CalmError, match=r"model\.freeze"):
            parse(["--data=d", "--model.freeze=true", *flags])


@pytest.mark.parametrize(
    ("method", "wsol"),
    [
        ("cam", "has"),
        ("calm-em", "adl"),
        ("cam", "acol"),
        ("calm-em", "acol"),
        ("calm-em", "cutmix"),
        ("cam", "spg"),
        ("calm-em", "spg"),
    ],
)
def test_train_learns_with_each_method_and_the_model_serves_as_any_other(
    method: Any, wsol: Any, data: Path, tmp_path: Path
) -> None:
    config = tiny_config(data, tmp_path / "run", method=method, backbone="tiny_resnet", epochs=6)
    config = replace(config, model=replace(config.model, pretrained=False), wsol=WsolOptions([wsol]))
    config = replace(config, lr=0.05, optim=replace(config.optim, head_ratio=1.0), log=replace(config.log, loggers=[]))
    run = train(config, quiet=True)
    result = json.loads((run / "result.json").read_text())
    assert result["best"]["test"]["accuracy"] >= 0.75
    model = load(run)
    image = data / "test" / "colour1" / "0.png"
    maps = model.attribute(model.preprocess(image), [1], size=(SIZE, SIZE))
    assert maps.shape == (1, SIZE, SIZE)
    if method == "calm-em":
        output = model(model.preprocess(image))
        torch.testing.assert_close(output.joint.sum((2, 3)), output.probs)
    if wsol == "acol":
        attribute_files([str(image)], model=str(run), out=tmp_path / "maps")
        assert main(["evaluate", "classification", "--model", str(run), "--data", str(data), "--replicates", "10"]) == 0


def test_train_continues_to_the_bit_with_all_methods(data: Path, tmp_path: Path) -> None:
    config = tiny_config(
        data,
        tmp_path / "whole",
        epochs=2,
        wsol=WsolOptions([*METHODS], adl_layers=["layers.0"], spg_layers=["layers.0", "layers.4"]),
    )
    log, optim = replace(config.log, loggers=[]), replace(config.optim, schedule="constant")
    config = replace(config, log=log, optim=optim)
    whole = weights_of(train(config, backbone=tiny_net(), quiet=True))
    parted = replace(config, run_dir=tmp_path / "parted")
    train(replace(parted, epochs=1), backbone=tiny_net(), quiet=True)
    continued = weights_of(train(parted, backbone=tiny_net(), quiet=True))
    for name, value in whole.items():
        assert torch.equal(continued[name], value), name


def test_train_starts_the_second_head_from_a_saved_one(data: Path, tmp_path: Path) -> None:
    config = tiny_config(data, tmp_path / "first", epochs=1, backbone="tiny_resnet", wsol=WsolOptions(["acol"]))
    config = replace(config, log=replace(config.log, loggers=[]))
    config = replace(
        config, model=replace(config.model, pretrained=False), optim=replace(config.optim, warmup_epochs=0.0)
    )
    first = train(config, quiet=True)
    again = replace(config, run_dir=tmp_path / "again", lr=0.0, model=replace(config.model, init_from=str(first)))
    weights, start = weights_of(train(again, quiet=True)), weights_of(first)
    heads = [name for name in start if name.startswith("head.")]
    assert any(name.startswith("head.second.conv_last") for name in heads)
    assert all(torch.equal(weights[name], start[name]) for name in heads)
