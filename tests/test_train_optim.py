"""Parameter groups, schedules against those of PyTorch and written numbers, and moving averages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.optim import lr_scheduler as torchs
from train_cases import tiny_net

from calm.errors import CalmError
from calm.model import create_model
from calm.train.config import OptimOptions, RunLength, is_new
from calm.train.optim import (
    Average,
    backbone_parts,
    build_optimizer,
    build_scheduler,
    freeze_norm,
    freeze_until,
    parameter_groups,
)


def test_parameter_groups_hold_every_parameter_once() -> None:
    model = create_model(tiny_net(), 3)
    groups = parameter_groups(model, "custom", 0.1, OptimOptions(decay="weights", weight_decay=0.5))
    listed = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}
    assert len(listed) == len(list(model.parameters()))
    for group in groups:
        assert all((p.ndim > 1) == (group["weight_decay"] == 0.5) for p in group["params"])


def test_parameter_groups_give_the_head_the_ratio() -> None:
    model = create_model(tiny_net(), 3)
    groups = parameter_groups(model, "custom", 0.1, OptimOptions(head_ratio=4))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in model.head.parameters()} == {0.4}
    assert {rates[id(p)] for p in model.backbone.parameters()} == {0.1}


def test_parameter_groups_give_the_prior_its_ratio_of_the_heads_rate() -> None:
    model = create_model(tiny_net(), 3)
    groups = parameter_groups(model, "custom", 0.1, OptimOptions(head_ratio=4, prior_ratio=0.5, decay="weights"))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in model.head.attention.parameters()} == {0.2}
    assert {rates[id(p)] for p in model.head.conv_last.parameters()} == {0.4}
    assert len({group["name"] for group in groups}) == len(groups) == 6


def test_parameter_groups_leave_out_frozen_parameters() -> None:
    model = create_model(tiny_net(), 3)
    model.backbone.requires_grad_(False)
    (group,) = parameter_groups(model, "custom", 0.1, OptimOptions())
    assert len(group["params"]) == 4


def test_parameter_groups_lower_the_rate_from_part_to_part() -> None:
    model = create_model(tiny_net(), 3)
    assert list(backbone_parts(model)[1]) == ["0", "1", "4"]  # convolution, BatchNorm, convolution
    groups = parameter_groups(model, "custom", 1.0, OptimOptions(head_ratio=10, layer_decay=0.5))
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    layers = model.backbone.get_submodule("layers")
    for part, rate in (("0", 0.125), ("1", 0.25), ("4", 0.5)):
        assert {rates[id(p)] for p in layers.get_submodule(part).parameters()} == {rate}
    assert {rates[id(p)] for p in model.head.parameters()} == {10.0}
    assert len({group["name"] for group in groups}) == len(groups)


@pytest.mark.parametrize(
    ("backbone", "first", "count"), [("resnet50", "conv1", 18), ("vit_tiny_patch16_224", "patch_embed", 14)]
)
def test_backbone_parts_are_blocks_in_their_order(backbone: str, first: str, count: int) -> None:
    prefix, parts = backbone_parts(model := create_model(backbone, 3))
    assert (next(iter(parts)), len(parts)) == (first, count)
    assert sum(map(len, parts.values())) == len(list(model.backbone.parameters()))
    assert all(names[-1].startswith(prefix + part) for part, names in parts.items())


def test_freeze_until_stops_a_part_and_all_before_it() -> None:
    model = create_model("small_resnet", 3).train()
    freeze_until(model, "stages")
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"head"}
    freeze_until(model, "stages", frozen=False)
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert freeze_until(model, True) == sum(p.numel() for p in model.backbone.parameters())
    assert not any(module.training for module in model.backbone.stages.modules())
    freeze_until(model, True, frozen=False)
    freeze_until(model, "stages.1")
    trained = {
        ".".join(name.split(".")[1:3]) for name, p in model.backbone.named_parameters(prefix="b") if p.requires_grad
    }
    assert trained == {"stages.2", "stages.3"}
    batch_norms = {m for m in model.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d) and m.training}
    assert batch_norms == {m for m in model.backbone.stages[2:].modules() if isinstance(m, torch.nn.BatchNorm2d)}
    freeze_norm(model)
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    with pytest.raises(CalmError, match=r"'stage'.*model.freeze.*stages"):
        freeze_until(model, "stage")


def test_is_new_reproduces_the_released_rates() -> None:
    # Released code, main.py: what is not named conv1, layer1, layer2 or layer3 gets ten times the rate.
    high = (
        "backbone.bn1.weight",
        "backbone.layer4.0.conv2.weight",
        "backbone.layer4.2.bn3.bias",
        "head.conv_last.bias",
    )
    low = ("backbone.conv1.weight", "backbone.layer4.1.conv1.weight", "backbone.layer1.0.bn1.weight")
    assert all(is_new(name, "resnet50", "released") for name in high)
    assert not any(is_new(name, "resnet50", "released") for name in low)
    assert is_new("backbone.conv6.weight", "vgg16", "released")
    assert is_new("backbone.A3_1b.0.weight", "inception_v3", "released")
    assert not is_new("backbone.Mixed_6e.branch1x1.conv.weight", "inception_v3", "released")


def test_is_new_refuses_released_grouping_of_another_backbone() -> None:
    with pytest.raises(CalmError, match="small_resnet"):
        is_new("head.x", "small_resnet", "released")


def test_build_optimizer_takes_its_options() -> None:
    model = create_model(tiny_net(), 3)
    sgd = build_optimizer(model, "custom", 0.1, OptimOptions(momentum=0.7))
    adamw = build_optimizer(model, "custom", 0.1, OptimOptions(name="adamw", betas=(0.8, 0.95)))
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adamw, torch.optim.AdamW)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.7, True)
    assert adamw.defaults["betas"] == (0.8, 0.95)


def test_average_follows_its_recurrence() -> None:
    model = create_model(tiny_net(), 3)
    average = Average(model, decay=0.5)
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.train()(torch.rand(2, 3, 16, 16))  # moves BatchNorm's statistics
        average.update_parameters(model)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value.double()
            expected[name] = mixed if value.is_floating_point() else value.double()
    for name, value in average.module.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert not average.module.training
    assert not any(parameter.requires_grad for parameter in average.module.parameters())


def test_average_continues_from_its_state() -> None:
    model = create_model(tiny_net(), 3)
    average, other = Average(model, 0.9), Average(create_model(tiny_net(), 3), 0.9)
    average.update_parameters(model)
    other.load_state_dict(average.state_dict())
    average.update_parameters(model)
    other.update_parameters(model)
    for name, value in average.module.state_dict().items():
        assert torch.equal(value, other.module.state_dict()[name])


RUN = RunLength(epochs=6, steps_per_epoch=5)


def rates(options: OptimOptions, run: RunLength = RUN) -> list[float]:
    return torch_rates(lambda optimizer: build_scheduler(optimizer, options, run), run.steps)


def torch_rates(make: Callable[[torch.optim.Optimizer], torchs.LRScheduler], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_build_scheduler_one_cycle_is_pytorchs() -> None:
    expected = torch_rates(lambda o: torchs.OneCycleLR(o, 1.0, total_steps=30, cycle_momentum=False), 30)
    assert rates(OptimOptions(schedule="one-cycle")) == pytest.approx(expected)


def test_build_scheduler_cosine_is_pytorchs() -> None:
    expected = torch_rates(lambda o: torchs.CosineAnnealingLR(o, 30), 30)
    assert rates(OptimOptions(schedule="cosine")) == pytest.approx(expected)


def test_build_scheduler_step_is_pytorchs_per_epoch() -> None:
    expected = torch_rates(lambda o: torchs.StepLR(o, step_size=2, gamma=0.3), 6)
    options = OptimOptions(schedule="step", step_epochs=2, step_factor=0.3)
    assert rates(options)[::5] == pytest.approx(expected)
    assert rates(options)[4::5] == pytest.approx(expected)


def test_build_scheduler_released_step_has_29_epochs_at_the_base_rate_and_step_30() -> None:
    run = RunLength(epochs=40, steps_per_epoch=1)
    assert rates(OptimOptions(schedule="released-step"), run).count(1.0) == 29
    assert rates(OptimOptions(schedule="step"), run).count(1.0) == 30


def test_build_scheduler_warm_up_rises_linearly_to_the_full_rate() -> None:
    values = rates(OptimOptions(schedule="constant", warmup_epochs=0.8))
    assert values == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 26)


def test_build_scheduler_one_cycle_rises_for_the_warm_up() -> None:
    values = rates(OptimOptions(schedule="one-cycle", warmup_epochs=1))
    assert max(range(30), key=values.__getitem__) == 4


@pytest.mark.parametrize("schedule", ["step", "released-step", "cosine", "one-cycle", "constant"])
@pytest.mark.parametrize("run", [RunLength(1, 1), RunLength(1, 2), RunLength(3, 1)])
def test_build_scheduler_has_a_rate_in_the_shortest_runs(schedule: str, run: RunLength) -> None:
    options = OptimOptions(schedule=schedule)  # type: ignore[arg-type]
    assert all(0 < value <= 1 for value in rates(options, run))
