"""The released architectures, written down a second time: their key lists, and their forward passes by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

State = Mapping[str, Tensor]

VARIANTS = {
    # architecture, large_feature_map, use_bn: keys, sha256 of the sorted lines "key 64x3x3x3" for 20 classes
    ("resnet50", True, True): (322, "1454e50bf9deddba3255fbb0e2dc8da5fdeea8def0a3d31c6a59caa47de66910"),
    ("resnet50", False, True): (322, "1454e50bf9deddba3255fbb0e2dc8da5fdeea8def0a3d31c6a59caa47de66910"),
    ("vgg16", True, True): (102, "42d317451c182d6c48ccbc6c90d94e09d843d5bcc02a312a4b60f122d6f79a29"),
    ("vgg16", False, False): (32, "48604089314f7357a83c74d2f6bf93b0f7dde285a6e2648bfb4cb20e74edef1f"),
    ("inception_v3", True, True): (438, "f2d308dad8ba484096413ff5545b488019bfe9945d0f23ca552e7beb27cfc460"),
    ("inception_v3", False, True): (438, "f2d308dad8ba484096413ff5545b488019bfe9945d0f23ca552e7beb27cfc460"),
}


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> str:
    lines = sorted(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def expected_shapes(architecture: str, large: bool, use_bn: bool, classes: int) -> dict[str, tuple[int, ...]]:
    """Key to shape of a released state_dict, from torchvision's own names and the rules of the layout."""
    with torch.device("meta"):
        body, channels = _body(architecture, large, use_bn)
        body["conv_last"] = nn.Conv2d(channels, classes, 1)
        body["attention"] = nn.Sequential(nn.Conv2d(channels, 1, 1))
    return {key: tuple(tensor.shape) for key, tensor in nn.ModuleDict(body).state_dict().items()}


def _body(architecture: str, large: bool, use_bn: bool) -> tuple[dict[str, nn.Module], int]:
    if architecture == "resnet50":
        return _children(torchvision.models.resnet50(), without=("fc", "avgpool")), 2048
    if architecture == "vgg16":
        body: dict[str, nn.Module] = {"features": nn.Sequential(*vgg_layers(large, use_bn))}
        body["conv6"] = nn.Conv2d(512, 1024, 3)
        if use_bn:
            body["bn6"] = nn.BatchNorm2d(1024)
        return body, 1024
    whole = torchvision.models.inception_v3(init_weights=False)
    beyond = ("AuxLogits", "Mixed_7a", "Mixed_7b", "Mixed_7c", "avgpool", "dropout", "fc")
    body = _children(whole, without=beyond)
    for name, inputs in (("A3_1b", 768), ("A3_2b", 1024)):
        body[name] = nn.Sequential(nn.Conv2d(inputs, 1024, 3), *[nn.BatchNorm2d(1024)][: int(use_bn)])
    return body, 1024


def _children(module: nn.Module, *, without: tuple[str, ...]) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if name not in without}


def vgg_layers(large: bool, use_bn: bool) -> list[nn.Module]:
    """The layers of torchvision's ``features`` that stay, in order."""
    whole = torchvision.models.vgg16_bn if use_bn else torchvision.models.vgg16
    with torch.device("meta"):
        layers = list(whole().features)
    pools = [layer for layer in layers if isinstance(layer, nn.MaxPool2d)]
    gone = pools[-2:] if large else pools[-1:]
    return [layer for layer in layers if not any(layer is pool for pool in gone)]


def random_weights(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Weights that keep activations of order 1, with BatchNorm statistics that are not the initial ones."""
    generator = torch.Generator().manual_seed(1)
    state = {}
    for key, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, dtype=dtype)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
        elif key.endswith("running_var") or (key.endswith("weight") and len(shape) == 1):
            state[key] = 1 + noise.abs() / 4
        else:
            state[key] = noise * (2 / noise[0].numel()) ** 0.5 if len(shape) == 4 else noise / 10
    return state


def _norm(x: Tensor, w: State, name: str, eps: float = 1e-5) -> Tensor:
    mean, var, gain, bias = (
        w[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + eps).sqrt() * gain + bias


def resnet50(x: Tensor, w: State, large: bool) -> Tensor:
    x = _norm(F.conv2d(x, w["conv1.weight"], stride=2, padding=3), w, "bn1").relu()
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, (blocks, first_stride) in enumerate([(3, 1), (4, 2), (6, 1 if large else 2), (3, 1)], start=1):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", first_stride if block == 0 else 1
            y = _norm(F.conv2d(x, w[f"{name}.conv1.weight"]), w, f"{name}.bn1").relu()
            y = F.conv2d(y, w[f"{name}.conv2.weight"], stride=stride, padding=1)
            y = F.conv2d(_norm(y, w, f"{name}.bn2").relu(), w[f"{name}.conv3.weight"])
            y = _norm(y, w, f"{name}.bn3")
            if block == 0:
                shortcut = F.conv2d(x, w[f"{name}.downsample.0.weight"], stride=stride)
                x = _norm(shortcut, w, f"{name}.downsample.1")
            x = (x + y).relu()
    return x


def vgg16(x: Tensor, w: State, large: bool, use_bn: bool) -> Tensor:
    plan = [2, 2, 3, 3, 3]  # convolutions between poolings
    number = 0
    for group, convolutions in enumerate(plan):
        for _ in range(convolutions):
            x = F.conv2d(x, w[f"features.{number}.weight"], w[f"features.{number}.bias"], padding=1)
            if use_bn:
                x = _norm(x, w, f"features.{number + 1}")
            x = x.relu()
            number += 3 if use_bn else 2
        if group < (3 if large else 4):
            x = F.max_pool2d(x, 2)
            number += 1
    x = F.conv2d(x, w["conv6.weight"], w["conv6.bias"], padding=1)
    return (_norm(x, w, "bn6") if use_bn else x).relu()


def inception_v3(x: Tensor, w: State, large: bool, use_bn: bool) -> Tensor:
    def conv(x: Tensor, name: str, stride: int = 1, padding: int | tuple[int, int] = 0) -> Tensor:
        y = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
        return _norm(y, w, f"{name}.bn", eps=0.001).relu()

    def chain(x: Tensor, *names: str) -> Tensor:
        for name in names:
            height, width = w[f"{name}.conv.weight"].shape[-2:]
            x = conv(x, name, padding=(height // 2, width // 2))
        return x

    def averaged(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1)

    x = conv(x, "Conv2d_1a_3x3", stride=2, padding=1)
    x = conv(conv(x, "Conv2d_2a_3x3"), "Conv2d_2b_3x3", padding=1)
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    x = conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3")
    x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = torch.cat(
            [
                chain(x, f"{block}.branch1x1"),
                chain(x, f"{block}.branch5x5_1", f"{block}.branch5x5_2"),
                chain(x, *(f"{block}.branch3x3dbl_{i}" for i in (1, 2, 3))),
                chain(averaged(x), f"{block}.branch_pool"),
            ],
            dim=1,
        )
    if not large:
        x = F.max_pool2d(x, 3, 2, 0, ceil_mode=True)
    double = chain(x, *(f"Mixed_6a.branch3x3dbl_{i}" for i in (1, 2, 3)))
    x = torch.cat([chain(x, "Mixed_6a.branch3x3"), double, F.max_pool2d(x, 3, 1, 1)], dim=1)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = torch.cat(
            [
                chain(x, f"{block}.branch1x1"),
                chain(x, *(f"{block}.branch7x7_{i}" for i in (1, 2, 3))),
                chain(x, *(f"{block}.branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
                chain(averaged(x), f"{block}.branch_pool"),
            ],
            dim=1,
        )
    for name in ("A3_1b", "A3_2b"):
        x = F.conv2d(x, w[f"{name}.0.weight"], w[f"{name}.0.bias"], padding=1)
        x = (_norm(x, w, f"{name}.1") if use_bn else x).relu()
    return x


FORWARD: dict[str, Callable[[Tensor, State, bool, bool], Tensor]] = {
    "resnet50": lambda x, w, large, _: resnet50(x, w, large),
    "vgg16": vgg16,
    "inception_v3": inception_v3,
}


def grid_side(architecture: str, pixels: int, large: bool) -> int:
    """Cells along a side of ``pixels``, by the arithmetic of each strided layer."""

    def layer(side: int, kernel: int, stride: int, padding: int, *, up: bool = False) -> int:
        room = side + 2 * padding - kernel
        cells = (-(-room // stride) if up else room // stride) + 1
        return cells - (up and (cells - 1) * stride >= side + padding)  # no window begins in the end padding

    if architecture == "resnet50":
        layers = [(7, 2, 3), *[(3, 2, 1)] * (2 if large else 3)]
    elif architecture == "vgg16":
        layers = [(2, 2, 0)] * (3 if large else 4)
    else:
        pixels = layer(layer(layer(pixels, 3, 2, 1), 3, 1, 0), 3, 2, 1, up=True)
        pixels = layer(layer(pixels, 3, 1, 0), 3, 2, 1, up=True)
        return pixels if large else layer(pixels, 3, 2, 0, up=True)
    for kernel, stride, padding in layers:
        pixels = layer(pixels, kernel, stride, padding)
    return pixels
