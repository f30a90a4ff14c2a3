"""The map that ``--score_map_process`` and ``--score_map_method`` ask for, as a subject of the benchmarks.

Two released names are not what they say, and keep here what they are there: ``input_grad`` is the gradient alone, and
``integrated_grad`` adds up absolute gradients on the line from 0 to the image, without the product with the image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm.baselines import attribute
from calm.evaluate.subject import Looked, Subject, model_subject
from calm.model import CalmModel
from calm.released_commands.flags import GRADIENT_PROCESSES, Flags

__all__ = ["released_subject"]


def released_subject(flags: Flags, model: CalmModel) -> Subject:
    """The subject that the flags describe.

    Raises:
        CalmError: a map that the model does not have, or one that needs superclasses, which no released command has.
    """
    process = flags.score_map_process
    if flags.score_map_method == "backprop" and process not in GRADIENT_PROCESSES:
        process = "input_grad"  # as in the released code: the method decides, whatever the process is called
    noisy = {"samples": flags.smooth_grad_nr_iter, "noise": 1 / flags.smooth_grad_sigma}
    methods: dict[str, tuple[str, Mapping[str, Any]]] = {
        "input_grad": ("gradient", {}),
        "integrated_grad": ("gradient", {}),
        "smooth_grad": ("smoothgrad", {**noisy, "seed": flags.seed or 0}),
        "var_grad": ("vargrad", {**noisy, "seed": flags.seed or 0}),
    }
    method, options = methods.get(process, (process, {}))
    subject = model_subject(
        model,
        method=method,
        label=f"{flags.attribution_method} {flags.score_map_process}",
        normalization=flags.norm_type,
        thresholds=flags.threshold_type,
        **options,
    )
    if process == "integrated_grad":
        subject = replace(subject, look=_gradient_sums(model, subject, flags.integrated_grad_nr_iter))
    return subject


@dataclass(frozen=True)
class _GradientSums:
    """Sum of the absolute gradients at i / steps of the image, i = 0 .. steps, over ``steps``."""

    model: CalmModel
    images: Float[Tensor, "b 3 H W"]
    probs: Float[Tensor, "b c"]
    steps: int

    def maps(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k H W"]:
        columns = []
        for column in classes.unbind(dim=1):
            maps = (
                attribute(self.model, self.images * (i / self.steps), column, "gradient")
                for i in range(self.steps + 1)
            )
            columns.append(sum(maps, torch.zeros_like(self.images[:, 0])) / self.steps)
        return torch.stack(columns, dim=1)


def _gradient_sums(model: CalmModel, subject: Subject, steps: int) -> Callable[[Tensor], Looked]:
    return lambda images: _GradientSums(model, images, subject.look(images).probs, steps)
