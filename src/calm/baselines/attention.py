"""Maps without gradients: a transformer's own attention, and two that look at no image at all.

Attention is that of timm's vision transformers, and says nothing about a class. The centre and the whole image are what
a method of localization must beat, since photographers put objects in the middle, and large.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from calm.baselines.gradient import Options
from calm.errors import CalmError


@torch.no_grad()
def attention_rollout(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], targets: Int[Tensor, " b"], options: Options
) -> Float[Tensor, "b gh gw"]:
    """Return how much of each patch reaches the output by attention and residual connections through all layers.

    The product over the layers of (A + I) / 2, where A is a layer's attention, averaged over its heads: of it the row
    of the class token, or, where there is none, the mean of all rows.

    Source: Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, section 3.
    """
    layers, prefix = _attentions(model, images)
    rollout = torch.eye(layers[0].shape[-1]).to(layers[0])
    for layer in layers:
        rollout = (layer + torch.eye(layer.shape[-1]).to(layer)) / 2 @ rollout
    return _on_grid(rollout[:, 0] if prefix else rollout.mean(dim=1), prefix, images)


@torch.no_grad()
def cls_attention(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], targets: Int[Tensor, " b"], options: Options
) -> Float[Tensor, "b gh gw"]:
    """Return the attention of the last layer from the class token to the patches, averaged over its heads.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021, figure 1.
    """
    layers, prefix = _attentions(model, images)
    if not prefix:
        raise CalmError("cls-attention: this transformer has no class token; take attention-rollout")
    return _on_grid(layers[-1][:, 0], prefix, images)


def _attentions(model: nn.Module, images: Tensor) -> tuple[list[Float[Tensor, "b t t"]], int]:
    """Return the attention of each layer, averaged over the heads, and the number of tokens before those of patches."""
    bodies = [part for part in model.modules() if hasattr(part, "blocks") and hasattr(part, "num_prefix_tokens")]
    layers: list[Any] = [part for part in model.modules() if hasattr(part, "attn_drop") and hasattr(part, "fused_attn")]
    if not bodies or not layers:
        fix = "a timm model such as vit_small_patch16_224 has it; take gradcam for others"
        raise CalmError(f"attention maps are for vision transformers with global attention: {fix}")
    seen: list[Tensor] = []
    fused = [layer.fused_attn for layer in layers]
    hooks = [
        layer.attn_drop.register_forward_hook(lambda part, inputs, output: seen.append(output.mean(dim=1)))
        for layer in layers
    ]
    try:
        for layer in layers:
            layer.fused_attn = False  # the fused kernel does not show the attention
        model(images)
    finally:
        for layer, before, hook in zip(layers, fused, hooks, strict=True):
            layer.fused_attn = before
            hook.remove()
    if len(seen) != len(layers) or len({layer.shape for layer in seen}) > 1:
        raise CalmError("attention maps are for transformers whose layers all attend to all tokens: take gradcam")
    return seen, int(bodies[0].num_prefix_tokens)  # type: ignore[arg-type]


def _on_grid(tokens: Float[Tensor, "b t"], prefix: int, images: Tensor) -> Float[Tensor, "b gh gw"]:
    from calm.backbones.timm_models import grid_of_tokens  # imports torchvision

    patches = tokens[:, prefix:]
    grid = grid_of_tokens(images.shape[-2], images.shape[-1], patches.shape[1])
    if grid is None:
        raise CalmError(f"attention to {patches.shape[1]} tokens is no grid of patches: take gradcam")
    return patches.reshape(len(patches), *grid)


def center(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], targets: Int[Tensor, " b"], options: Options
) -> Float[Tensor, "b h w"]:
    """Return an isotropic Gaussian in the middle of the image: its boxes are centred, of every size.

    Source: Choe et al., "Evaluating Weakly Supervised Object Localization Methods Right", CVPR 2020, section 5.
    """
    height, width = images.shape[-2:]
    y, x = (torch.linspace(-1, 1, side, device=images.device, dtype=images.dtype) for side in (height, width))
    return torch.exp(-2 * (y[:, None].square() + x.square())).expand(len(images), -1, -1)


def whole_image(
    model: nn.Module, images: Float[Tensor, "b 3 h w"], targets: Int[Tensor, " b"], options: Options
) -> Float[Tensor, "b h w"]:
    """Return 1 but for one corner pixel, since a constant map counts as none: its one box is the whole image."""
    maps = torch.ones_like(images[:, 0])
    maps[:, 0, 0] = 0
    return maps
