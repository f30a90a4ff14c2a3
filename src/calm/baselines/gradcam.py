"""Grad-CAM and its family, through pytorch-grad-cam (``pip install "calm[baselines]"``).

The weights of the channels are the library's; what is around them is ours. The library min-max scales the map of every
image to [0, 1], after which maps of two images or two classes cannot be compared. Here a map is ReLU(sum over channels
of weight * activation), as in the papers. Ablation-CAM is left out: it divides by the score, which reverses its sign
where the score is negative, as log p(y | x) is.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from calm.baselines.gradient import Options, class_scores
from calm.errors import CalmError
from calm.heatmaps import channels_last
from calm.model import CalmModel


def gradcam(library_class: str) -> Callable[[nn.Module, Tensor, Tensor, Options], Tensor]:
    """Return the function, for `calm.baselines.BASELINES`, of a class of pytorch-grad-cam such as ``"GradCAM"``."""

    def explain(
        model: nn.Module, images: Float[Tensor, "b 3 h w"], targets: Int[Tensor, " b"], options: Options
    ) -> Float[Tensor, "b gh gw"]:
        """Return maps on the grid of the target layer, at least 0."""
        import pytorch_grad_cam

        layer = _target_layer(model, options.target_layer, images)
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
                activations = _as_grid(seen.activations[0], scorer.grid, images)
                gradients = _as_grid(seen.gradients[0], scorer.grid, images) if cam.uses_gradients else None
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

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.grid: tuple[int, int] | None = None  # of a CALM or CAM model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        self.grid = getattr(output, "grid", None)
        return class_scores(output)


def _target_layer(model: nn.Module, layer: nn.Module | str | None, images: Tensor) -> nn.Module:
    """Return the module of the model that ``layer`` names or is; None is the last feature map."""
    if layer is None:
        return model.backbone if isinstance(model, CalmModel) else _last_feature_map(model, images[:1])
    modules: dict[str, nn.Module] = dict(model.named_modules())
    found = modules.get(layer) if isinstance(layer, str) else layer
    if found is None or found not in modules.values():
        given = repr(layer) if isinstance(layer, str) else type(layer).__name__
        parts = ", ".join(name for name, _ in model.named_children())
        raise CalmError(f"target_layer {given} is no module of the model: its parts are {parts}")
    return found


def _last_feature_map(model: nn.Module, image: Tensor) -> nn.Module:
    """Return the module of another classifier that is the last to return a feature map with more than one location.

    Raises:
        CalmError: If there is none, or tokens or channels-last features come after it.
    """
    last: list[tuple[str, nn.Module, tuple[int, ...]]] = []

    def look(name: str, module: nn.Module, output: Any) -> None:
        if isinstance(output, Tensor) and (output.ndim == 3 or (output.ndim == 4 and output.shape[2:].numel() > 1)):
            last[:] = [(name, module, tuple(output.shape))]

    hooks = [
        part.register_forward_hook(lambda module, _, output, name=name: look(name, module, output))
        for name, part in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for hook in hooks:
            hook.remove()
    if not last:
        raise CalmError("the model has no layer that returns a feature map: give target_layer=")
    name, module, shape = last[0]
    if len(shape) != 4 or channels_last(shape, (image.shape[-2], image.shape[-1])):
        raise CalmError(
            f"the model's last features, of {name!r}, have the shape {shape}, not (B, D, h, w): give target_layer=; of"
            " a transformer the first norm of its last block, such as 'blocks.11.norm1'"
        )
    return module


def _start_graph(module: nn.Module, args: Any, output: Any) -> Tensor:
    """Forward hook: start the graph here, as no layer before needs gradients; copied, as the next may overwrite."""
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise CalmError(f"target_layer must return a grid (B, D, h, w) or tokens (B, T, D), this one returns {shape}")
    return output.detach().requires_grad_().clone()


def _as_grid(values: Tensor, grid: tuple[int, int] | None, images: Tensor) -> Any:
    """Return (B, D, h, w), float32 or wider, channels first; of tokens (B, T, D), the last h * w become the grid.

    Without a grid, that of tokens is the largest that they fill with the proportions of the images.
    """
    if values.ndim == 4 and channels_last(tuple(values.shape), (images.shape[-2], images.shape[-1])):
        values = values.permute(0, 3, 1, 2)
    if values.ndim == 3:
        ratio = images.shape[-2] / images.shape[-1]
        rows = math.floor(math.sqrt(values.shape[1] * ratio) + 1e-6)
        height, width = grid or (rows, round(rows / ratio))
        if not 0 < height * width <= values.shape[1]:
            raise CalmError(f"target_layer returns {values.shape[1]} tokens, the grid has {height}x{width}")
        values = values[:, -height * width :].mT.reshape(len(values), -1, height, width)
    return (values if values.dtype == torch.float64 else values.float()).numpy()
