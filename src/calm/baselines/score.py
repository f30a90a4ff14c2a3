"""What a baseline explains, and the state it must leave as it found it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from calm.output import CalmOutput, CamOutput

if TYPE_CHECKING:
    from calm.model import CalmModel

__all__ = ["Options", "class_scores", "left_as_found"]


@dataclass(frozen=True)
class Options:
    """The knobs of all baselines; `calm.baselines.BASELINES` says which method reads which.

    Attributes:
        steps: points of the integral of integrated gradients.
        samples: noisy copies of an image (SmoothGrad, SmoothGrad-squared, VarGrad).
        noise: standard deviation of the noise, as a share of the image's own range (max - min over its pixels
            and channels, in normalised input units).
        seed: of the noise.
        batch_size: most images in one pass through the model.
        target_layer: the layer that the Grad-CAM family reads: a module of the model or its dotted name.
    """

    steps: int = 50
    samples: int = 50
    noise: float = 0.25
    seed: int = 0
    batch_size: int = 16
    target_layer: nn.Module | str = "backbone"


def class_scores(output: CalmOutput | CamOutput) -> Float[Tensor, "b c"]:
    """The number that is explained: the logit (mean over locations of f) for CAM, log p(y | x) for CALM.

    Source: paper, section 4 (comparison with gradient-based methods).
    """
    return output.class_scores if isinstance(output, CamOutput) else output.log_probs


@contextmanager
def left_as_found(model: CalmModel) -> Iterator[None]:
    """Inside: evaluation mode, parameters frozen, gradients on. After, also after an error: everything as
    before.

    With the parameters frozen no ``.grad`` is filled. The generators of random numbers are put back, in case
    a module of the model draws from them. Gradients are on even if the caller is in ``no_grad`` or inference
    mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = {p.device for p, _ in wanted if p.device.type == "cuda"}
    try:
        with (
            torch.random.fork_rng(devices=sorted(d.index for d in devices)),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            model.eval()
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, required in wanted:
            parameter.requires_grad_(required)
