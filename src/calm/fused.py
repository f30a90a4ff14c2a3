"""Features that a head has not scored yet: what an output reads its activations from, when they are asked for.

log p(y | x, z) of each image's target, straight from features and head weights: what a training loss reads.

Of the class logits f = W x + b a loss needs one row, the target's, normalised over the classes,

    u[z] = f[y, z] - log sum_c exp f[c, z],        du[z] / df[c, z] = 1[c = y] - p(c | x, z),

so it needs all logits twice, but never keeps two grids of them. Class logits and location scores read the same
features: they are one matrix product with C + 1 rows. Its result is the only buffer of that size: it holds the
logits, then their exponentials, and in the backward pass it becomes their gradient in place.

The pieces below say which locations are scored, and how many at a time: all at once (fastest), some at a time without
keeping the buffer (memory that does not grow with the number of classes; the product is computed again in the backward
pass), or only some locations at all (those with prior mass, those that were drawn).

Source of the formulas: paper, section 3; the gradient by hand, checked against finite differences.

The circumstances of a forward pass, for what its output computes later: the weights, autocast and gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from calm.errors import CalmError
from calm.latent import FLOAT16_MAX, widen

__all__ = ["Moment", "Unscored", "again", "everywhere", "some_at_a_time", "target_conditional", "where"]

Piece: TypeAlias = tuple[slice, slice | Tensor]
"""Images, and of each of them the locations that are scored in one product."""

HELD_AT_ONCE = 2**21
"""Logits that `some_at_a_time` makes at once: 8 MB in float32. Of more than 131,072 classes it makes more: those of 16
locations."""


def everywhere(images: int) -> list[Piece]:
    """All locations of all images at once."""
    return [(slice(0, images), slice(None))]


def some_at_a_time(images: int, locations: int, classes: int) -> list[Piece]:
    """All locations, so many at a time that their logits take the same memory for any number of classes."""
    step = max(16, min(locations, HELD_AT_ONCE // classes))
    return [
        (slice(image, image + 1), slice(start, min(start + step, locations)))
        for image in range(images)
        for start in range(0, locations, step)
    ]


def where(mask: Bool[Tensor, "b n"]) -> list[Piece]:
    """The locations that are True. Waits for the device, which must tell how many there are."""
    places = torch.split(mask.nonzero()[:, 1], mask.sum(dim=1).tolist())
    return [(slice(image, image + 1), some) for image, some in enumerate(places) if len(some)]


def target_conditional(
    features: Float[Tensor, "b d n"],
    weight: Float[Tensor, "r d"],
    bias: Float[Tensor, " r"] | None,
    targets: Int[Tensor, " b"],
    classes: int,
    pieces: Sequence[Piece],
    *,
    keep: bool = True,
) -> tuple[Float[Tensor, "b n"], Float[Tensor, "b n"]]:
    """log p(y | x, z) of the target, and the location scores.

    Args:
        features: at n locations, in any memory format; of the dtype of ``weight``.
        weight: C rows that score the classes, and one more that scores the locations, if they are wanted.
        bias: of the same rows.
        targets: class of each image.
        classes: C.
        pieces: the locations to score; the others get -inf, score 0 and no gradient.
        keep: hold the buffer until the backward pass; False computes it again there.

    Returns:
        In float32 or wider: log-probabilities, at most 0; and scores (zeros if ``weight`` has no row for them).

    Raises:
        RuntimeError: their gradient is differentiated.
    """
    found: tuple[Tensor, Tensor] = _TargetConditional.apply(
        features, weight, bias, targets, classes, pieces, keep
    )
    return found


class _TargetConditional(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        classes: int,
        pieces: Sequence[Piece],
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        images, _, locations = features.shape
        like = widen(features.new_empty(0))
        log_conditional = like.new_full((images, locations), -torch.inf)
        scores = like.new_zeros(images, locations)
        ctx.kept = {}
        for number, (image, place) in enumerate(pieces):
            buffer, scale, row, score = _score(
                features[image, :, place], weight, bias, targets[image], classes
            )
            log_conditional[image, place] = row
            if score is not None:
                scores[image, place] = score
            if keep:
                ctx.kept[number] = buffer, scale
        ctx.save_for_backward(features, weight, bias, targets, log_conditional)
        ctx.classes, ctx.pieces = classes, pieces
        ctx.set_materialize_grads(False)
        return log_conditional, scores

    @staticmethod
    def backward(ctx: Any, of_row: Tensor | None, of_score: Tensor | None) -> tuple[Tensor | None, ...]:
        features, weight, bias, targets, log_conditional = ctx.saved_tensors
        gradients = _Gradient.apply(ctx, features, weight, bias, targets, log_conditional, of_row, of_score)
        return *gradients, *(None,) * 4


class _Gradient(torch.autograd.Function):
    """The backward pass of `_TargetConditional`, which has none of its own: it would need every logit once more."""

    @staticmethod
    def forward(
        _: Any,
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        log_conditional: Tensor,
        of_row: Tensor | None,
        of_score: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        wants = ctx.needs_input_grad
        whole = len(ctx.pieces) == 1 and isinstance(ctx.pieces[0][1], slice)
        of_features = torch.zeros_like(features) if wants[0] and not whole else None
        of_weight = torch.zeros_like(weight) if wants[1] else None
        of_bias = (
            torch.zeros_like(bias, dtype=log_conditional.dtype) if bias is not None and wants[2] else None
        )
        for number, (image, place) in enumerate(ctx.pieces):
            rows = features[image, :, place]
            buffer, scale = (
                ctx.kept.pop(number, None) or _score(rows, weight, bias, targets[image], ctx.classes)[:2]
            )
            _to_gradient(
                buffer,
                scale,
                targets[image],
                log_conditional[image, place],
                None if of_row is None else of_row[image, place],
                None if of_score is None else of_score[image, place],
                ctx.classes,
            )
            if of_weight is not None:
                _add_outer(of_weight, buffer, rows)
            if of_bias is not None:
                of_bias += buffer.sum(dim=(0, 2), dtype=of_bias.dtype)
            if not wants[0]:
                continue
            if of_features is None:
                of_features = _product(weight.t(), buffer)
            elif isinstance(place, slice):
                of_features[image, :, place] = _product(weight.t(), buffer)
            else:
                of_features[image].index_add_(2, place, _product(weight.t(), buffer))
        return of_features, of_weight, None if of_bias is None else of_bias.to(weight.dtype)

    @staticmethod
    def backward(_: Any, *__: Tensor) -> None:
        raise RuntimeError(
            "the loss of unscored features cannot be differentiated twice: read output.logits before the loss"
        )


def _score(
    rows: Float[Tensor, "b d n"], weight: Tensor, bias: Tensor | None, targets: Tensor, classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The buffer with exp(f - max f) in its first C rows; 1 / their sum; log p(y | x, z); the scores."""
    buffer = _product(weight, rows)
    if bias is not None:
        buffer += bias[:, None]
    if buffer.dtype == torch.float16:
        # A sum beyond its range is infinite, and infinities cancel to NaN.
        buffer.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
    logits = buffer[:, :classes]
    wide = widen(logits)  # the buffer itself, or in half precision a passing copy
    peak = wide.amax(dim=1, keepdim=True)
    target = wide.gather(1, targets.view(-1, 1, 1).expand(-1, 1, wide.shape[2]))
    scores = widen(buffer[:, classes]).clone() if buffer.shape[1] > classes else None
    wide.sub_(peak).exp_()
    total = wide.sum(dim=1)
    if wide.dtype != logits.dtype:
        logits.copy_(wide)
    row = (target - peak).squeeze(1) - total.log()
    return buffer, total.reciprocal_(), row, scores


def _to_gradient(
    buffer: Tensor,
    scale: Tensor,
    targets: Tensor,
    log_conditional: Tensor,
    of_row: Tensor | None,
    of_score: Tensor | None,
    classes: int,
) -> None:
    """Turn the buffer of `_score` into the gradient with respect to what the product gave, in place."""
    logits = buffer[:, :classes]
    if of_row is None:
        logits.zero_()
    else:
        logits.mul_((scale * of_row).neg_().unsqueeze(1))
        at_target = (-torch.expm1(log_conditional) * of_row).to(buffer.dtype).unsqueeze(1)
        logits.scatter_(1, targets.view(-1, 1, 1).expand(-1, 1, logits.shape[2]), at_target)
    if buffer.shape[1] > classes:
        buffer[:, classes] = 0.0 if of_score is None else of_score


def _product(weight: Float[Tensor, "r d"], rows: Float[Tensor, "b d n"]) -> Float[Tensor, "b r n"]:
    """weight @ rows for each image, in the memory format of the rows: each format by the routine that is fast for it,
    and none by `torch.matmul`, which copies the rows."""
    if not rows.transpose(1, 2).is_contiguous():
        return torch.bmm(weight.expand(len(rows), -1, -1), rows)
    if rows.device.type == "cpu":
        return torch.conv2d(rows.unsqueeze(2), weight[:, :, None, None]).squeeze(2)
    product = rows.transpose(1, 2).flatten(0, 1) @ weight.t()
    return product.view(len(rows), -1, len(weight)).transpose(1, 2)


def _add_outer(
    total: Float[Tensor, "r d"], one: Float[Tensor, "b r n"], other: Float[Tensor, "b d n"]
) -> None:
    """Add the sum over images and locations of one times other."""
    flat = other.transpose(1, 2).is_contiguous()
    if flat or total.is_cuda or total.dtype not in (torch.float32, torch.float64):
        # One product: no copy if the channels are last; and sums in float32 where the inputs are narrower.
        total += one.transpose(1, 2).flatten(0, 1).t() @ other.transpose(1, 2).flatten(0, 1)
    else:
        for left, right in zip(one, other, strict=True):  # no copy of either
            total.addmm_(left, right.t())


@dataclass(frozen=True)
class Moment:
    """What held when an output was made.

    Attributes:
        weights: of the layers that are yet to be asked, each with its version and dtype.
        device: type of the device; empty if it has no autocast.
        autocast: dtype that autocast asked for; None without.
        gradients: whether they were recorded.
    """

    weights: tuple[tuple[Tensor, int, torch.dtype], ...]
    device: str
    autocast: torch.dtype | None
    gradients: bool

    @classmethod
    def now(cls, device: torch.device, weights: Iterable[Tensor]) -> Moment | None:
        """This one; None under `torch.compile`, which sees the whole computation."""
        if torch.compiler.is_compiling():
            return None
        name = device.type if torch.amp.is_autocast_available(device.type) else ""
        dtype = torch.get_autocast_dtype(name) if name and torch.is_autocast_enabled(name) else None
        seen = tuple((weight, _version(weight), weight.dtype) for weight in weights)
        return cls(seen, name, dtype, torch.is_grad_enabled())


def again(then: Moment | None, weights: Iterable[Tensor]) -> AbstractContextManager[None]:
    """Compute with the same weights as it was computed then. None: as it is computed now.

    Raises:
        CalmError: the weights are others by now: the features are not theirs.
    """
    return nullcontext() if then is None else _restored(then, weights)


@contextmanager
def _restored(then: Moment, weights: Iterable[Tensor]) -> Iterator[None]:
    if [(id(weight), _version(weight), weight.dtype) for weight in weights] != [
        (id(weight), version, dtype) for weight, version, dtype in then.weights
    ]:
        raise CalmError(
            "the weights have changed since this output's forward pass (an optimiser step, a move to another dtype?):"
            " read what you need of an output, such as probs, before that, or ask the model again"
        )
    quiet = nullcontext() if then.gradients else torch.no_grad()
    on = then.autocast is not None
    cast = torch.autocast(then.device, dtype=then.autocast, enabled=on) if then.device else nullcontext()
    with quiet, cast:
        yield


def _version(weight: Tensor) -> int:
    """Counts the changes in place; inference tensors have no such count."""
    return 0 if weight.is_inference() else weight._version


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
        keep_logits: see `calm.model.CalmHead`.
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
        """log p(y | x, z) of the target, and the location scores: `calm.fused`.

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
