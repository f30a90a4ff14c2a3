"""Grad-CAM and its family, through pytorch-grad-cam (``pip install "calm[baselines]"``).

The weights of the channels are the library's; what is around them is ours. The library min-max scales the map of every
image to [0, 1], after which maps of two images or two classes cannot be compared. Here a map is ReLU(sum over channels
of weight * activation), as in the papers. Ablation-CAM is left out: it divides by the score, which reverses its sign
where the score is negative, as log p(y | x) is.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from calm.baselines.gradient import Options, class_scores
from calm.errors import CalmError
from calm.model import CalmModel


def gradcam(library_class: str) -> Callable[[CalmModel, Tensor, Tensor, Options], Tensor]:
    """Return the function, for `calm.baselines.BASELINES`, of a class of pytorch-grad-cam such as ``"GradCAM"``."""

    def explain(
        model: CalmModel, images: Float[Tensor, "b 3 h w"], targets: Int[Tensor, " b"], options: Options
    ) -> Float[Tensor, "b gh gw"]:
        """Return maps on the grid of the target layer, at least 0."""
        import pytorch_grad_cam

        layer = _target_layer(model, options.target_layer)
        scorer = _Scorer(model)
        with layer.register_forward_hook(_start_graph):
            # The library applies its transform as soon as it sees a value: before a later layer works in place.
            cam = getattr(pytorch_grad_cam, library_class)(scorer, [layer], torch.clone)
            seen = cam.activations_and_grads
            try:
                scores = seen(images)
                if cam.uses_gradients:
                    scores.gather(1, targets[:, None]).sum().backward()
                if len(seen.activations) != 1 or (cam.uses_gradients and len(seen.gradients) != 1):
                    problem = "must run once in a forward pass and lead to the score"
                    raise CalmError(f"target_layer {options.target_layer!r} {problem}")
                activations = _as_grid(seen.activations[0], scorer.grid)
                gradients = _as_grid(seen.gradients[0], scorer.grid) if cam.uses_gradients else None
                seen.release()  # or the features of every pass of Score-CAM would be kept
                cam.batch_size = options.batch_size
                scores_of = [itemgetter(target) for target in targets.tolist()]
                with contextlib.redirect_stderr(io.StringIO()):  # Score-CAM draws a progress bar for each image
                    maps = cam.get_cam_image(images, layer, scores_of, activations, gradients, False)
            finally:
                seen.release()
        return torch.as_tensor(maps, device=images.device).clamp(min=0)

    return explain


class _Scorer(nn.Module):
    """The model as the library calls it: images in, scores (B, C) out."""

    def __init__(self, model: CalmModel) -> None:
        super().__init__()
        self.model = model
        self.grid = (0, 0)

    def forward(self, images: Tensor) -> Tensor:
        features = self.model.encode(images)
        self.grid = (features.shape[-2], features.shape[-1])
        return class_scores(self.model.head(features))


def _target_layer(model: CalmModel, layer: nn.Module | str) -> nn.Module:
    """Return the module of the model that ``layer`` names or is."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    found = modules.get(layer) if isinstance(layer, str) else layer
    if found is None or found not in modules.values():
        given = repr(layer) if isinstance(layer, str) else type(layer).__name__
        raise CalmError(f"target_layer {given} is no module of the model: its parts are named like 'backbone'")
    return found


def _start_graph(module: nn.Module, args: Any, output: Any) -> Tensor:
    """Forward hook: start the graph here, as no layer before needs gradients; copied, as the next may overwrite."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CalmError(f"target_layer must return a grid (B, D, h, w) or tokens (B, T, D), this one returns {shape}")
    return output.detach().requires_grad_().clone()


def _as_grid(values: Tensor, grid: tuple[int, int]) -> Any:
    """Return (B, D, h, w), float32 or wider; of tokens (B, T, D), the last h * w become the grid."""
    if values.ndim == 3:
        height, width = grid
        if values.shape[1] < height * width:
            raise CalmError(f"target_layer returns {values.shape[1]} tokens, the grid has {height}x{width}")
        values = values[:, -height * width :].mT.reshape(len(values), -1, height, width)
    return (values if values.dtype == torch.float64 else values.float()).numpy()
