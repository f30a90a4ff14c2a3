"""The user's own module as a backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calm.backbones.probe import evaluating
from calm.errors import CalmError

__all__ = ["adapt_backbone"]


def adapt_backbone(module: nn.Module, size: tuple[int, int] = (224, 224)) -> nn.Module:
    """Check that ``module`` returns a feature map, and give it ``out_channels`` if it does not say so itself.

    The module is tried once, in eval mode and without gradient, on an image of zeros; its modes and the
    random state are left as they were. If it does not run on an image of that size, then its own
    ``out_channels`` or ``num_features`` is believed.

    Args:
        module: float images (B, 3, H, W) to features (B, D, h, w).
        size: (height, width) in pixels of the image to try.

    Returns:
        ``module`` itself, with the int attribute ``out_channels``.

    Raises:
        CalmError: it returns something else, or another number of channels than its ``out_channels`` says, or
            it does not run and says no number.

    >>> adapt_backbone(nn.Conv2d(3, 5, kernel_size=3)).out_channels
    5
    """
    name = type(module).__name__
    stated = _int_attribute(module, "out_channels")
    try:
        output = _try(module, size)
    except Exception as error:  # a stranger's module may raise anything; what it raised is in the message
        believed = stated or _int_attribute(module, "num_features")
        if believed is None:
            raise CalmError(
                f"the backbone {name} does not run on an image of {size[0]} x {size[1]} pixels: {error}. "
                "Repair it, or if it needs images of another size, give it an int attribute out_channels"
            ) from error
        module.out_channels = believed  # type: ignore[assignment]
        return module
    if not isinstance(output, Tensor) or output.ndim != 4 or not output.is_floating_point():
        found = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise CalmError(
            f"the backbone {name} must return one float tensor of features (B, D, h, w), but for one image of "
            f"{size[0]} x {size[1]} pixels it returned {found}: take its pooling and classifier out"
        )
    channels = output.shape[1]
    if stated not in (None, channels):
        raise CalmError(
            f"the backbone {name} says out_channels={stated}, its features have {channels} channels"
        )
    module.out_channels = channels  # type: ignore[assignment]
    return module


def _try(module: nn.Module, size: tuple[int, int]) -> object:
    like = next((tensor for tensor in module.parameters() if tensor.is_floating_point()), torch.empty(0))
    devices = [like.device] if like.is_cuda else []
    with evaluating(module), torch.no_grad(), torch.random.fork_rng(devices):
        return module(torch.zeros(1, 3, *size, dtype=like.dtype, device=like.device))


def _int_attribute(module: nn.Module, name: str) -> int | None:
    value = getattr(module, name, None)
    return value if isinstance(value, int) and value > 0 else None
