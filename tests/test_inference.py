"""Device names, and evaluation mode for a while."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models import DenseNet
from torch import Tensor, nn
from torch.testing import assert_close

from calm.backbones import build_backbone
from calm.errors import CalmError
from calm.inference import (
    _memory_format,
    automatic_precision,
    evaluation_mode,
    keep_slow_gradients_in_float32,
    optimized_for_inference,
    resolve_device,
)


def test_resolve_device_takes_names_and_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device().type in ("cpu", "cuda", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(CalmError, match="device 'gpu' cannot be used: PyTorch finds none here"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "zeros", lambda _, device: torch.empty(1, device="meta" if device == "mps" else device))
    assert resolve_device("gpu").type == "meta"
    with pytest.raises(CalmError, match="device 'dpu' cannot be used"):
        resolve_device("dpu")


@pytest.mark.parametrize("failing", [False, True])
def test_evaluation_mode_restores_everything(failing: bool) -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))
    module[0].weight.requires_grad_(False)
    module[2].eval()
    random = torch.get_rng_state()
    try:
        with torch.no_grad(), evaluation_mode(module):
            assert not any(part.training for part in module.modules())
            assert not any(parameter.requires_grad for parameter in module.parameters())
            assert torch.is_grad_enabled()
            torch.rand(3)
            if failing:
                raise KeyError
    except KeyError:
        pass
    assert [part.training for part in module] == [True, True, False]
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True]
    assert torch.equal(torch.get_rng_state(), random)


class Grouped(nn.Module):
    """Convolutions of all kinds with BatchNorm: grouped, with bias, without affine weights, used twice, read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8, affine=False, eps=0.1))
        self.twice = nn.Conv2d(8, 8, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8, track_running_stats=False)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        for norm in self.norms:
            x = torch.relu(norm(self.twice(x)))
        return x


def randomized(module: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and weights that are not its start."""
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.running_var, part.weight, part.bias):
                if tensor is not None:
                    tensor.data = torch.rand(tensor.shape, generator=generator) + 0.3
    return module


@pytest.mark.parametrize(
    ("name", "norms_left"),
    [
        ("grouped", 2),
        ("tf_efficientnet_lite0", 0),
        ("resnet50", 0),
        ("small_resnet", 0),
        ("densenet", 6),  # most come before convolutions
        ("vit_tiny_patch16_224", 0),
    ],
)
def test_optimized_for_inference_folds_batch_norm_and_computes_the_same(name: str, norms_left: int) -> None:
    own = {"grouped": Grouped, "densenet": lambda: DenseNet(growth_rate=8, block_config=(2, 2), num_classes=3)}
    module = randomized(own[name]() if name in own else build_backbone(name))
    size = 224 if name.startswith("vit") else 64
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fast = optimized_for_inference(module, images)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in fast.modules()) == norms_left
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    module.eval()
    other = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = module(other)
        assert_close(fast(other), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())


class Reader(nn.Module):
    """A network that reads a convolution's output beside its BatchNorm, or asks the BatchNorm for its eps."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.asks = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), asks

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y: Tensor = self.norm(x)
        return y * self.norm.eps if self.asks else x + y


@pytest.mark.parametrize("asks", [False, True])
def test_optimized_for_inference_does_not_fold_what_would_change_the_network(asks: bool) -> None:
    module = randomized(Reader(asks=asks)).eval()
    images = torch.randn(2, 3, 5, 5)
    fast = optimized_for_inference(module, images)
    assert isinstance(fast.norm, nn.BatchNorm2d)
    assert_close(fast(images), module(images))


def test_automatic_precision_follows_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, avx, expected in ((True, False, "bf16-mixed"), (False, True, "bf16-mixed"), (False, False, "32-true")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        precision, why = automatic_precision(torch.device("cpu"))
        assert (precision, "this processor" in why) == (expected, True)
    assert automatic_precision(torch.device("mps"))[0] == "32-true"
    for supported, expected in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, yes=supported: yes)
        assert automatic_precision(torch.device("cuda"))[0] == expected


def test_keep_slow_gradients_in_float32_widens_the_depthwise_convolutions_that_are_slow() -> None:
    """Training under autocast equals float32 there; predictions, weights' names and other layers are untouched."""
    options = {"groups": 4, "padding": 1, "bias": False}
    fast, slow = nn.Conv2d(4, 4, 3, **options), nn.Conv2d(4, 4, 3, stride=2, **options)
    others = nn.Conv2d(4, 4, 5, groups=4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 5, groups=2)
    module = randomized(nn.Sequential(fast, slow, *others, nn.Conv2d(8, 8, 3, dilation=2, groups=8)))
    names, slowest = list(module.state_dict()), copy.deepcopy(module[1])
    assert keep_slow_gradients_in_float32(module) == 3
    module = copy.deepcopy(module)  # as for an average of the weights
    assert list(module.state_dict()) == names
    assert [isinstance(part, nn.Conv2d) for part in module] == [True] * 6
    images = torch.randn(2, 4, 9, 9)

    def gradient(part: nn.Module, *, half: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = part(images)
        assert out.dtype is (torch.bfloat16 if half else torch.float32)
        return torch.autograd.grad(out.float().square().sum(), part.weight)[0]

    with torch.autocast("cpu", torch.bfloat16):
        once = module[1](images)
        assert_close(once, slowest(images), rtol=0.02, atol=0.02)
        assert once.grad_fn.name() == "ToCopyBackward0"  # of float32
        assert "Convolution" in module[0](images).grad_fn.name()
        with torch.no_grad():
            assert torch.equal(module[1](images), slowest(images))
    assert torch.equal(gradient(module[1], half=False), gradient(slowest, half=False))
    assert_close(gradient(module[1], half=True), gradient(slowest, half=False), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("groups", "device", "expected"),
    [(1, "cuda", torch.channels_last), (4, "cuda", torch.contiguous_format), (4, "cpu", torch.channels_last)],
)
def test_optimized_copy_of_a_depthwise_network_has_channels_first_on_a_gpu(
    groups: int, device: str, expected: torch.memory_format
) -> None:
    """On an H100 the copy of EfficientNet-Lite0 took 1.28 times as long with the channels last."""
    assert _memory_format(nn.Sequential(nn.Conv2d(4, 4, 3, groups=groups)), torch.device(device)) is expected
