"""Features that a head has not scored yet: what an output reads its activations from, when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from calm.moment import Moment, again
from calm.target_conditional import Piece, everywhere, some_at_a_time, target_conditional, where

__all__ = ["Unscored"]

WORTH_SKIPPING = 150
"""Classes times the share of dead locations above which picking the live ones costs less than scoring all: with half of
them dead, 300 classes (from the times of 200 and 1,000 classes in benchmarks/README.md)."""


@dataclass
class Unscored:
    """Features and the two layers of a CALM head. What is asked later is computed as in the forward pass; a change of
    the weights since then is a `CalmError`.

    Attributes:
        features: of the backbone, (B, D, h, w).
        conv_last: scores the classes.
        attention: scores the locations.
        keep_logits: see `calm.head.CalmHead`.
    """

    features: Float[Tensor, "b d h w"]
    conv_last: nn.Module
    attention: nn.Module
    keep_logits: bool = True

    def __post_init__(self) -> None:
        self._then = Moment.now(self.features.device, self._weights())

    def _weights(self) -> Iterator[Tensor]:
        yield from self.conv_last.parameters()
        yield from self.attention.parameters()

    @property
    def num_classes(self) -> int:
        """C."""
        return int(self.conv_last.out_channels)  # type: ignore[arg-type]

    def logits(self) -> Float[Tensor, "b c h w"]:
        """f, the class scores of all classes."""
        with again(self._then, self._weights()):
            logits: Tensor = self.conv_last(self.features)
        return logits

    def scores(self) -> Float[Tensor, "b 1 h w"]:
        """s, the location scores. As a product of one row: a convolution takes four times as long on a CPU
        (benchmarks/README.md)."""
        with again(self._then, self._weights()):
            if not self.direct():
                scores: Tensor = self.attention(self.features)
                return scores
            weight, bias = self._rows(self.attention)
            features = self.features.flatten(2).to(weight.dtype)
            with torch.autocast(features.device.type, enabled=False):
                row = torch.bmm(weight.expand(features.shape[0], -1, -1), features)
            row = row if bias is None else row + bias
            return row.view(features.shape[0], 1, *self.features.shape[2:])

    def direct(self) -> bool:
        """Whether the losses may read the weights themselves. A layer that was wrapped, hooked or parametrised must be
        called; and under `torch.compile` the compiler fuses better than we do."""
        return (
            not torch.compiler.is_compiling()
            and torch.amp.is_autocast_available(self.features.device.type)
            and not _has_any_global_hook()  # type: ignore[no-untyped-call]
            and all(map(_plain, (self.conv_last, self.attention)))
        )

    def target(
        self, targets: Int[Tensor, " b"], *, relu: bool = False
    ) -> tuple[Float[Tensor, "b h w"], Float[Tensor, "b 1 h w"]]:
        """log p(y | x, z) of the target, and the location scores: `calm.target_conditional`.

        Args:
            targets: class indices.
            relu: the prior is: locations with a score of 0 or less have no mass, whatever the class. On a CPU they
                are skipped if they are many; their log-probability is then given as -inf.
        """
        with again(self._then, self._weights()):
            features, (weight, bias) = self.features, self._rows(self.conv_last, self.attention)
            batch, _, height, width = features.shape
            silent = self._silent() if relu and features.device.type == "cpu" else None
            pieces: list[Piece]
            if silent is not None:
                pieces = where(~silent.flatten(1))
            elif self.keep_logits and torch.is_grad_enabled():
                pieces = everywhere(batch)
            else:
                pieces = some_at_a_time(batch, height * width, self.num_classes)
            row, scores = self._scored(features.flatten(2), targets, weight, bias, pieces)
            return row.view(batch, height, width), scores.view(batch, 1, height, width)

    def target_at(self, targets: Int[Tensor, " b"], places: Int[Tensor, "b s"]) -> Float[Tensor, "b s"]:
        """log p(y | x, z) of the target at some locations of each image (flat indices): only these cost."""
        picked = self.features.flatten(2)
        picked = picked.gather(2, places[:, None].expand(-1, picked.shape[1], -1))
        with again(self._then, self._weights()):
            return self._scored(picked, targets, *self._rows(self.conv_last), everywhere(len(places)))[0]

    def _scored(
        self, features: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, pieces: list[Piece]
    ) -> tuple[Tensor, Tensor]:
        flat = features.to(weight.dtype)
        with torch.autocast(flat.device.type, enabled=False):
            return target_conditional(
                flat, weight, bias, targets, self.num_classes, pieces, keep=self.keep_logits
            )

    def _rows(self, *layers: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weights and biases of the layers, one below the other, in the dtype that autocast asks for."""
        convolutions = cast("tuple[nn.Conv2d, ...]", layers)  # `direct` has looked
        weight = torch.cat([layer.weight.flatten(1) for layer in convolutions])
        biases = [layer.bias for layer in convolutions]
        bias = None
        if any(one is not None for one in biases):
            counts = [layer.out_channels for layer in convolutions]
            pairs = zip(biases, counts, strict=True)
            bias = torch.cat([weight.new_zeros(count) if one is None else one for one, count in pairs])
        device = self.features.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            return weight.to(dtype), None if bias is None else bias.to(dtype)
        return weight, bias

    @torch.no_grad()
    def _silent(self) -> Bool[Tensor, "b h w"] | None:
        """Where a ReLU prior has no mass; None if skipping does not pay. An image without any mass has the uniform
        prior, so that all of it counts."""
        if self.num_classes <= WORTH_SKIPPING:
            return None
        silent = self.scores().squeeze(1) <= 0
        silent &= ~silent.flatten(1).all(dim=1)[:, None, None]
        return silent if self.num_classes * float(silent.float().mean()) > WORTH_SKIPPING else None


def _plain(layer: nn.Module) -> bool:
    """Whether a layer is what its weight and bias say: a convolution of single locations that nobody listens to."""
    return (
        type(layer) is nn.Conv2d
        and (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1)
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not (layer._backward_hooks or layer._backward_pre_hooks)
    )
