"""Run models: the device by its name, evaluation mode for a while, finite weights, seeds that fit their purpose."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized

from calm.config import Precision
from calm.errors import CalmError


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of a name: cpu, cuda, cuda:1, mps, ...; ``auto`` is a GPU if there is one, else the CPU, and
    ``gpu`` the GPU.

    Raises:
        CalmError: no tensor can be made there.
    """
    device = name
    if name in ("auto", "gpu"):
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if name == "gpu" and device == "cpu":
            raise CalmError("device 'gpu' cannot be used: PyTorch finds none here; cpu is the other one")
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise CalmError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}; cpu always works") from error


def automatic_precision(device: torch.device) -> tuple[Precision, str]:
    """Return the faster precision of training on a device, in Lightning's words, and why it is chosen."""
    if device.type == "cuda":
        computes, what = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    elif device.type == "cpu":
        computes = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        what = "this processor"
    else:
        return "32-true", f"bfloat16 was not tried on {device.type}"
    if computes:
        return "bf16-mixed", f"{what} computes bfloat16, which is faster; 32-true is float32"
    return "32-true", f"{what} does not compute bfloat16 itself"


def is_depthwise(part: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Return whether a module is a convolution of each channel by itself."""
    return isinstance(part, nn.Conv2d) and part.groups == part.in_channels > 1


class _TrainsInFloat32(nn.Module):
    """A convolution that autocast on a CPU does not narrow where a gradient will be taken."""

    def forward(self, x: Tensor) -> Tensor:
        gradient = torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in self.parameters()))
        if x.device.type != "cpu" or not (gradient and torch.is_autocast_enabled("cpu")):
            return super().forward(x)  # type: ignore[no-any-return]
        with torch.autocast("cpu", enabled=False):
            out: Tensor = super().forward(x.float())
        return out.to(torch.get_autocast_dtype("cpu"))


def keep_slow_gradients_in_float32(module: nn.Module) -> int:
    """Let the depthwise convolutions whose bfloat16 gradient is slow on a CPU be trained in float32, in place.

    PyTorch 2.14 (oneDNN) takes 2 to 8 times as long for the gradient of a depthwise convolution in bfloat16 as in
    float32, unless its kernel is 3x3 and its stride and dilation are 1; ``benchmarks/README.md`` says what that is of a
    whole step. Predictions, and steps without autocast, stay as they are.

    Returns:
        How many they are.
    """
    slow = [
        part
        for part in module.modules()
        if is_depthwise(part) and (part.kernel_size, part.stride, part.dilation) != _FAST
    ]
    for part in slow:
        part.__class__ = type(type(part).__name__, (_TrainsInFloat32, type(part)), {})
    return len(slow)


_FAST = (3, 3), (1, 1), (1, 1)


def first_nonfinite_weight(module: nn.Module) -> str | None:
    """Return the name of the first parameter or saved buffer with a NaN or infinity, if any; wait for a GPU once."""
    floats = {name: value for name, value in module.state_dict().items() if value.is_floating_point()}
    finite = torch.stack([value.isfinite().all() for value in floats.values()])
    return None if finite.all() else list(floats)[int(finite.int().argmin())]


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Run the block in eval mode with parameters frozen and gradients enabled.

    On exit, also after an error, restore the mode of every submodule, ``requires_grad`` of every parameter and the
    state of the random number generators, which a module may draw from. Gradients are enabled even if the caller is in
    ``no_grad`` or inference mode; for predictions alone enter ``torch.no_grad()`` inside.
    """
    modes = [(part, part.training) for part in module.modules()]
    frozen = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    gpus = {parameter.device.index for parameter, _ in frozen if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=sorted(gpus)), torch.inference_mode(False), torch.enable_grad():
            module.eval()
            for parameter, _ in frozen:
                parameter.requires_grad_(False)
            yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, required in frozen:
            parameter.requires_grad_(required)


@torch.no_grad()
def optimized_for_inference(module: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy for predictions alone: in eval mode, without gradients, channels last, BatchNorm folded away.

    A BatchNorm that reads the output of a convolution becomes part of its weights. Where features of ``images`` would
    change by more than rounding, as the network does more than that with its parts, the copy is not folded.

    Args:
        module: A network of one tensor, which stays as it is.
        images: An example of its input, (B, C, H, W); random numbers will do.

    Returns:
        The copy. It computes the same but for rounding, and takes images of any memory format. On a GPU a network with
        depthwise convolutions has the channels first, for they are slower otherwise.
    """
    plain = copy.deepcopy(module).eval().requires_grad_(False)
    folded = copy.deepcopy(plain)
    try:
        pairs, expected = _batch_norms_after_convolutions(folded, images)
        names = {part: name for name, part in folded.named_modules()}
        for convolution, norm in pairs:
            _fold(convolution, norm)
            parent, _, leaf = names[norm].rpartition(".")
            setattr(folded.get_submodule(parent), leaf, getattr(norm, "act", nn.Identity()))
        tolerance = min(0.1, 1000 * torch.finfo(expected.dtype).eps) * expected.abs().amax()
        same = bool(((folded(images) - expected).abs() <= tolerance).all())
    except Exception:  # a network may do anything with its parts; what it does then is left alone
        same = False
    chosen: nn.Module = folded if same else plain
    return chosen.to(memory_format=_memory_format(chosen, images.device))


def _memory_format(module: nn.Module, device: torch.device) -> torch.memory_format:
    """Return the faster memory format of predictions."""
    first = device.type == "cuda" and any(map(is_depthwise, module.modules()))
    return torch.contiguous_format if first else torch.channels_last


def _batch_norms_after_convolutions(
    module: nn.Module, images: Tensor
) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], Tensor]:
    """Run a network; return its pairs of a convolution and the BatchNorm of its output, each called once, and its
    features."""
    calls: dict[nn.Module, int] = {}
    outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # by identity, and kept: another tensor would take the number
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def look(part: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[part] = calls.get(part, 0) + 1
        if isinstance(part, nn.Conv2d) and not is_parametrized(part):
            outputs[id(output)] = part, output
        elif isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and id(inputs[0]) in outputs:
            pairs.append((outputs[id(inputs[0])][0], part))  # type: ignore[arg-type]

    # timm's BatchNorm holds the activation that follows; other subclasses may do anything.
    kinds = {"BatchNorm2d", "BatchNormAct2d"}
    parts = [m for m in module.modules() if isinstance(m, nn.Conv2d) or type(m).__name__ in kinds]
    hooks = [part.register_forward_hook(look) for part in parts]
    try:
        features: Tensor = module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1], features


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Multiply a BatchNorm into a convolution's weight and bias, in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    weight, bias = fuse_conv_bn_weights(
        convolution.weight.double(),
        wide(convolution.bias),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        wide(norm.weight),
        wide(norm.bias),
    )
    dtype = convolution.weight.dtype
    convolution.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    convolution.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def mix_seed(*parts: int) -> int:
    """Return a 64-bit seed of integers; other integers, or another order of them, give an unrelated seed.

    >>> mix_seed(0, 1, 2) == mix_seed(0, 1, 2), mix_seed(0, 1, 2) == mix_seed(0, 2, 1)
    (True, False)
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


@contextmanager
def seeded(*parts: int) -> Iterator[None]:
    """Run the block with torch's CPU generator seeded by ``parts``; restore it, but no accelerator's, afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(*parts))
        yield
