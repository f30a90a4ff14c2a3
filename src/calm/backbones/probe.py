"""What a network does with an image, found without computing: shapes and dependencies on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from calm.inference import evaluation_mode

__all__ = ["output_shape", "unused_parameters"]


def output_shape(module: nn.Module, height: int, width: int) -> tuple[int, ...] | None:
    """Shape of what ``module`` gives for one image of height x width pixels; None if that is not one tensor.

    Raises whatever the module raises for such an image.
    """
    with torch.no_grad():
        output = _run(module, height, width, _on_meta(module))
    return tuple(output.shape) if isinstance(output, Tensor) else None


def unused_parameters(module: nn.Module, height: int, width: int) -> list[str]:
    """Names of the parameters that the output for an image of height x width pixels does not depend on."""
    state = _on_meta(module)
    trainable = {name: state[name].requires_grad_() for name, _ in module.named_parameters()}
    output = _run(module, height, width, state)
    assert isinstance(output, Tensor)
    gradients = torch.autograd.grad(output.sum(), list(trainable.values()), allow_unused=True)
    return [name for name, gradient in zip(trainable, gradients, strict=True) if gradient is None]


def _on_meta(module: nn.Module) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().to("meta") for name, tensor in tensors}


def _run(module: nn.Module, height: int, width: int, state: dict[str, Tensor]) -> object:
    with evaluation_mode(module):
        return functional_call(module, state, (torch.empty(1, 3, height, width, device="meta"),))
