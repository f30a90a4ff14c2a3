"""Run models: the device by its name, evaluation mode for a while, finite weights, seeds that fit their purpose."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import nn

from calm.errors import CalmError


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device of a name: cpu, cuda, cuda:1, mps, ...; ``auto`` is a GPU if there is one, else the CPU.

    Raises:
        CalmError: no tensor can be made there.
    """
    device = name
    if name == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise CalmError(f"device {name!r} cannot be used: {error}") from error


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
