"""What a model returns: activations, and every quantity of the paper as a property that is computed when asked.

Encode once, ask many: prediction, loss and maps of any number of classes read the same output, and what one of them
computed (the sum over classes, the prior) the next one finds.

Attribution maps as questions to a classifier's output, one function each.

=========================  ==========================  =====================================================
kind                       released code's name        what a value of the map is
=========================  ==========================  =====================================================
joint                      jointll                     p(y, z | x); sums to p(y | x)
joint-superclass           jointll-superclass          p(one of the classes, z | x): sum of their joints
joint-superclass-mean      jointll-superclass-mean     the same divided by the number of classes
posterior                  gtcond                      p(z | x, y); sums to 1
posterior-superclass       gtcond-superclass           sum of the classes' posteriors
posterior-superclass-mean  gtcond-superclass-mean      their mean; sums to 1
prior                      saliency                    p(z | x); sums to 1
cam                        vanilla                     the class logit f[y] at z
cam-saliency               vanilla-saliency            sum over classes of min-max normalised f
cam-superclass             vanilla-superclass          that sum over the classes of a superclass
=========================  ==========================  =====================================================

The released names are accepted as aliases. The first seven need a CALM
model, the last three a CAM model: asking the wrong one is an error, not a picture of untrained weights.

Source: paper, section 4 (attribution maps) and the released code's score map processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm import latent
from calm.errors import CalmError, shown, unknown
from calm.fused import Moment, Unscored, again
from calm.heatmaps import normalize, resize_maps
from calm.latent import PriorActivation, PriorDenominator, log_posterior, widen

__all__ = [
    "ALIASES",
    "MAP_KINDS",
    "CalmOutput",
    "CamOutput",
    "Superclass",
    "Targets",
    "as_targets",
    "attribute",
    "canonical_kind",
    "difference",
]


Targets: TypeAlias = "Tensor | Sequence[int] | Sequence[Sequence[int]] | int"
"""Class indices (B,) or (B, K), or one that is meant in all images."""

Superclass: TypeAlias = Mapping[int, Sequence[int]]
"""For each target class, the classes of its superclass (which normally include itself)."""

ALIASES = {
    "jointll": "joint",
    "jointll-superclass": "joint-superclass",
    "jointll-superclass-mean": "joint-superclass-mean",
    "gtcond": "posterior",
    "gtcond-superclass": "posterior-superclass",
    "gtcond-superclass-mean": "posterior-superclass-mean",
    "saliency": "prior",
    "vanilla": "cam",
    "vanilla-saliency": "cam-saliency",
    "vanilla-superclass": "cam-superclass",
}
"""The released code's names of the map kinds."""


def joint(output: CalmOutput, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    """p(y, z | x) for the classes asked."""
    return output.log_joint_of(classes).exp()


def posterior(output: CalmOutput, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    """p(z | x, y) for the classes asked: their joints, each divided by its sum."""
    log_joint = output.log_joint_of(classes)
    return log_posterior(log_joint).exp()


def prior(output: CalmOutput, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    """p(z | x), the same for every class."""
    return output.prior.unsqueeze(1).expand(-1, classes.shape[1], -1, -1)


def cam(output: CamOutput, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    """f[y]: the class activation map."""
    return output.logits_of(classes)


def scaled_cam(output: CamOutput, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    """f[y], min-max normalised per image and class."""
    return normalize(output.logits_of(classes), "minmax")


@dataclass(frozen=True)
class MapKind:
    """How a kind of map is put together: what it reads for each class, and over which classes it is summed."""

    family: str  # "calm" or "cam": whose output it reads
    read: Callable[[Any, Tensor], Tensor]
    over: str = "target"  # or "superclass", "all"
    mean: bool = False


MAP_KINDS: dict[str, MapKind] = {
    "joint": MapKind("calm", joint),
    "joint-superclass": MapKind("calm", joint, over="superclass"),
    "joint-superclass-mean": MapKind("calm", joint, over="superclass", mean=True),
    "posterior": MapKind("calm", posterior),
    "posterior-superclass": MapKind("calm", posterior, over="superclass"),
    "posterior-superclass-mean": MapKind("calm", posterior, over="superclass", mean=True),
    "prior": MapKind("calm", prior),
    "cam": MapKind("cam", cam),
    "cam-saliency": MapKind("cam", scaled_cam, over="all"),
    "cam-superclass": MapKind("cam", scaled_cam, over="superclass"),
}


def canonical_kind(kind: str, family: str) -> str:
    """The name under which ``MAP_KINDS`` holds ``kind``.

    Raises:
        CalmError: no such kind, or it cannot be read from a model of this family ("calm" or "cam").
    """
    name = ALIASES.get(kind, kind)
    if name not in MAP_KINDS:
        raise unknown("map kind", kind, [*MAP_KINDS, *ALIASES])
    if MAP_KINDS[name].family != family:
        fitting = [other for other, spec in MAP_KINDS.items() if spec.family == family]
        raise CalmError(
            f"map kind {kind!r} cannot be read from a {family.upper()} model: choose one of {', '.join(fitting)}"
        )
    return name


def attribute(
    output: CalmOutput | CamOutput,
    targets: Targets,
    kind: str,
    *,
    superclass: Superclass | None = None,
    size: tuple[int, int] | None = None,
) -> Float[Tensor, "b H W"] | Float[Tensor, "b k H W"]:
    """Attribution maps of one or several target classes per image, from one forward pass.

    Args:
        output: what the model returned for the images.
        targets: class indices, (B,) for one map per image or (B, K) for K, as a tensor or a list; or one class for all
            images.
        kind: a row of the table at the top of this module.
        superclass: for the ``-superclass`` kinds: the classes that each target is summed over.
        size: (height, width) to resize to; None leaves the grid as it is.

    Returns:
        Maps (B, H, W) or (B, K, H, W); units as in the table.

    Raises:
        CalmError: an unknown kind, a kind of the other model family, targets of a wrong shape, dtype or range,
            or a superclass missing or not wanted.
    """
    spec = MAP_KINDS[canonical_kind(kind, output.family)]
    asked = _checked(targets, output, "targets")
    classes = asked if asked.ndim == 2 else asked.unsqueeze(1)
    if (spec.over == "superclass") != (superclass is not None):
        need = (
            "needs superclass=, a mapping from target to its classes"
            if superclass is None
            else "takes no superclass="
        )
        raise CalmError(f"map kind {kind!r} {need}")
    if spec.over == "target":
        maps = spec.read(output, classes)
    elif spec.over == "all":
        every = torch.arange(output.num_classes, device=classes.device).expand(len(classes), -1)
        maps = spec.read(output, every).sum(dim=1, keepdim=True).expand(-1, classes.shape[1], -1, -1)
    else:
        members, valid = _members(classes, superclass or {}, output)
        batch, k, m = members.shape
        rows = spec.read(output, members.reshape(batch, k * m))
        rows = rows.reshape(batch, k, m, *rows.shape[2:]) * valid[..., None, None]
        maps = rows.sum(dim=2)
        if spec.mean:
            maps = maps / valid.sum(dim=2)[..., None, None]
    maps = maps if asked.ndim == 2 else maps.squeeze(1)
    return maps if size is None else resize_maps(maps, size)


def difference(first: Float[Tensor, "*n h w"], second: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n h w"]:
    """Why one class and not the other: abs(map of the first - map of the second)."""
    return (first - second).abs()


def as_targets(given: Targets, images: int) -> Tensor:
    """Targets as a tensor; one class alone is that of all images. Neither dtype nor range is looked at.

    Raises:
        CalmError: they are no numbers.
    """
    try:
        targets = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalmError(
            f"targets must be class indices, one or a list or a tensor, got {shown(given)}"
        ) from error
    return targets if targets.ndim else targets.expand(images)


def _checked(given: Targets, output: CalmOutput | CamOutput, what: str) -> Tensor:
    """Targets as int64 on the output's device, after checking shape, dtype and range."""
    classes, batch = output.num_classes, output.batch_size
    targets = as_targets(given, batch)
    if targets.dtype.is_floating_point or targets.dtype == torch.bool or targets.ndim not in (1, 2):
        raise CalmError(
            f"{what} must be class indices of shape (B,) or (B, K), got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    if len(targets) != batch:
        raise CalmError(f"{len(targets)} {what} for {batch} images: give one row per image")
    targets = targets.to(output.device, torch.int64)
    if targets.numel() and not torch.compiler.is_compiling():
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise CalmError(
                f"{what} out of range: {low if low < 0 else high}, allowed are 0 to {classes - 1}"
            )
    return targets


def _members(
    targets: Int[Tensor, "b k"], superclass: Superclass, output: CalmOutput | CamOutput
) -> tuple[Int[Tensor, "b k m"], Bool[Tensor, "b k m"]]:
    """The classes of each target's superclass, padded to the longest with class 0, and which are real."""
    rows: list[list[int]] = []
    for target in targets.flatten().tolist():
        members = list(dict.fromkeys(superclass.get(target, ())))
        if not members:
            raise CalmError(f"superclass has no classes for target {target}: it names {sorted(superclass)}")
        wrong = [member for member in members if not 0 <= member < output.num_classes]
        if wrong:
            raise CalmError(
                f"superclass of target {target} names class {wrong[0]}: allowed are 0 to {output.num_classes - 1}"
            )
        rows.append(members)
    longest = max(map(len, rows), default=1)
    padded = targets.new_tensor([row + [0] * (longest - len(row)) for row in rows])
    valid = torch.tensor(
        [[i < len(row) for i in range(longest)] for row in rows], dtype=torch.bool, device=targets.device
    )
    return padded.view(*targets.shape, longest), valid.view(*targets.shape, longest)


class _kept:  # noqa: N801 -- a decorator, like property
    """A property computed once per gradient mode, so that a value first read under ``no_grad`` never enters a loss
    without its gradient."""

    def __init__(self, compute: Callable[[Any], Tensor]) -> None:
        self._compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, output: CalmOutput | CamOutput, owner: type | None = None) -> Tensor:
        key = (self._compute.__name__, torch.is_grad_enabled())
        if key not in output._values:
            output._values[key] = self._compute(output)
        return output._values[key]


class CalmOutput:
    """Output of a CALM model for a batch of images. See `calm.latent` for the five quantities.

    Made of activations that are there, or (`of_features`) of features, whose activations are computed when asked for: a
    loss with hard targets never asks for all logits (`calm.fused`).

    Args:
        logits: f, class scores per location.
        scores: s, one score per location.
        activation: of the prior, see `calm.latent.log_prior`.
        denominator: of the prior.
    """

    family: ClassVar[str] = "calm"

    def __init__(
        self,
        logits: Float[Tensor, "b c h w"],
        scores: Float[Tensor, "b 1 h w"],
        activation: PriorActivation = "softplus",
        denominator: PriorDenominator = "differentiated",
    ) -> None:
        self._activation, self._denominator = activation, denominator
        self._unscored: Unscored | None = None
        self._values: dict[tuple[str, bool], Tensor] = {
            (name, mode): grid
            for name, grid in (("logits", logits), ("scores", scores))
            for mode in (False, True)
        }
        self.num_classes, self.batch_size = logits.shape[1], logits.shape[0]
        self.device = logits.device

    @classmethod
    def of_features(
        cls, unscored: Unscored, activation: PriorActivation, denominator: PriorDenominator
    ) -> CalmOutput:
        """The output for features that are yet to be scored."""
        output = cls.__new__(cls)
        output._activation, output._denominator = activation, denominator
        output._unscored, output._values = unscored, {}
        output.num_classes, output.batch_size = unscored.num_classes, len(unscored.features)
        output.device = unscored.features.device
        return output

    @_kept
    def logits(self) -> Tensor:
        """f, class scores per location, (B, C, h, w), in the dtype the head computes in."""
        assert self._unscored is not None
        return self._unscored.logits()

    @_kept
    def scores(self) -> Tensor:
        """s, one score per location, (B, 1, h, w)."""
        assert self._unscored is not None
        return self._unscored.scores()

    @_kept
    def log_normalizer(self) -> Tensor:
        """log sum over classes of exp f, (B, h, w)."""
        return latent.log_normalizer(self.logits)

    @_kept
    def log_prior(self) -> Tensor:
        """log p(z | x), (B, h, w)."""
        return latent.log_prior(self.scores, self._activation, self._denominator)

    @property
    def log_conditional(self) -> Tensor:
        """log p(y | x, z), (B, C, h, w)."""
        return latent.log_conditional(self.logits)

    @_kept
    def log_joint(self) -> Tensor:
        """log p(y, z | x), (B, C, h, w)."""
        return self._joined(self.logits)

    @_kept
    def log_probs(self) -> Tensor:
        """log p(y | x), (B, C): the prediction. Keeps nothing of shape (B, C, h, w)."""
        return latent.log_likelihood(self._joined(self.logits))

    @property
    def log_posterior(self) -> Tensor:
        """log p(z | x, y), (B, C, h, w)."""
        return latent.log_posterior(self.log_joint)

    @property
    def conditional(self) -> Tensor:
        """p(y | x, z), (B, C, h, w); sums to 1 over classes."""
        return self.log_conditional.exp()

    @property
    def prior(self) -> Tensor:
        """p(z | x), (B, h, w); sums to 1 over locations."""
        return self.log_prior.exp()

    @property
    def joint(self) -> Tensor:
        """p(y, z | x), (B, C, h, w); sums to p(y | x) over locations."""
        return self.log_joint.exp()

    @property
    def probs(self) -> Tensor:
        """p(y | x), (B, C); sums to 1 over classes. float32 or wider."""
        return self.log_probs.exp()

    @property
    def posterior(self) -> Tensor:
        """p(z | x, y), (B, C, h, w); sums to 1 over locations."""
        return self.log_posterior.exp()

    @property
    def dead(self) -> Tensor:
        """Which images have a dead prior: every activation 0, hence the uniform prior. (B,) bool."""
        if self._activation != "relu":
            return torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)
        return (self.scores <= 0).flatten(1).all(dim=1)

    def log_joint_of(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """log p(y, z | x) of the classes asked, for each image its own; the other classes' rows are not made."""
        rows = self.logits.gather(1, classes[..., None, None].expand(-1, -1, *self.logits.shape[2:]))
        return self._joined(rows)

    def _joined(self, rows: Float[Tensor, "b k h w"]) -> Float[Tensor, "b k h w"]:
        """log joint of some rows of the logits: their log conditional plus the log prior."""
        return latent.log_joint(widen(rows) - self.log_normalizer.unsqueeze(1), self.log_prior)

    def target_rows(self, targets: Int[Tensor, " b"]) -> Float[Tensor, "b h w"]:
        """log p(y, z | x) of each image's target. From features it makes no logits that are not there yet; such a row
        can be differentiated once: read ``logits`` before, to differentiate twice."""
        if self._unscored is None or ("logits", torch.is_grad_enabled()) in self._values:
            return self.log_joint_of(targets[:, None]).squeeze(1)
        if not self._unscored.direct():
            return self.log_joint_of(targets[:, None]).squeeze(1)
        row, scores = self._unscored.target(targets, relu=self._activation == "relu")
        return row + latent.log_prior(scores, self._activation, self._denominator)

    def _ml_loss(self, targets: Tensor) -> Float[Tensor, " b"]:
        """-log p(y | x), (B,); with soft targets (B, C), its expectation over them."""
        if targets.ndim == 2:
            return -(targets * self.log_probs).sum(dim=1)
        return latent.ml_loss(self.target_rows(targets))

    def _em_loss(
        self,
        targets: Tensor,
        temperature: float = 1.0,
        teacher: CalmOutput | None = None,
        samples: int | None = None,
    ) -> Float[Tensor, " b"]:
        """The EM loss, (B,). Soft targets (B, C) need the posteriors of all classes and their memory."""
        if samples is not None:
            return self._sampled_em_loss(targets, temperature, teacher, samples)
        soft = targets.ndim == 2
        own = self.log_joint if soft else self.target_rows(targets)
        losses = latent.em_loss(self._e_step(own, targets, temperature, teacher), own)
        return (targets * losses).sum(dim=1) if soft else losses

    def _e_step(
        self, own: Tensor, targets: Tensor, temperature: float, teacher: CalmOutput | None
    ) -> Float[Tensor, "*rows h w"]:
        """q, without a gradient, from this output's log joint ``own`` or the teacher's."""
        believed = own.detach()
        if teacher is not None:
            with torch.no_grad():
                theirs = teacher.log_joint if targets.ndim == 2 else teacher.target_rows(targets)
                # A ReLU prior may have no mass where the teacher's has: those locations can not be taught, and
                # an image without any other keeps its own posterior.
                theirs = theirs.masked_fill(own.isneginf(), -torch.inf)
                lost = theirs.isneginf().all(dim=-1).all(dim=-1)[..., None, None]
                believed = torch.where(lost, believed, theirs)
        return latent.e_step(believed, temperature)

    def _sampled_em_loss(
        self, targets: Tensor, temperature: float, teacher: CalmOutput | None, samples: int
    ) -> Float[Tensor, " b"]:
        """The EM loss with log p(y | x, z) taken at some locations drawn from q; the prior's part stays exact."""
        if targets.ndim == 2:
            raise CalmError("samples need class indices as targets: soft targets ask about every class")
        if samples < 1:
            raise CalmError(
                f"samples is {samples}: draw at least 1 location, or leave it out for all of them"
            )
        with torch.no_grad():
            own = self.target_rows(targets)
        posterior = self._e_step(own, targets, temperature, teacher)
        places = latent.draw(posterior, samples)
        if self._unscored is not None and self._unscored.direct():
            drawn = self._unscored.target_at(targets, places)
        else:
            rows = self.logits.gather(1, targets[:, None, None, None].expand(-1, 1, *self.logits.shape[2:]))
            conditional = widen(rows).squeeze(1) - self.log_normalizer
            drawn = conditional.flatten(1).gather(1, places)
        return latent.em_loss(posterior, self.log_prior) - drawn.mean(dim=1)

    def loss(
        self,
        targets: Tensor,
        *,
        method: str = "calm-em",
        temperature: float = 1.0,
        teacher: CalmOutput | None = None,
        samples: int | None = None,
    ) -> Float[Tensor, ""]:
        """Mean loss over the batch, in nats.

        Args:
            targets: class indices (B,), or soft targets (B, C) whose rows sum to 1 (mixup, label smoothing).
            method: ``calm-em`` or ``calm-ml``.
            temperature: beta of the E-step (`calm.latent.e_step`); EM only.
            teacher: the output, for the same images, that the posterior is taken from; None: this one. EM only.
            samples: teach the classes at so many locations of each image, drawn from the posterior: an unbiased
                estimate of loss and gradient, for very many classes; None: at all of them. EM only.

        Raises:
            CalmError: another number of targets than of images; an option that the method does not have.
        """
        targets = latent.check_targets(targets, self.batch_size, self.num_classes)
        if method == "calm-em":
            return self._em_loss(targets, temperature, teacher, samples).mean()
        if method != "calm-ml":
            raise unknown("loss method", method, ("calm-em", "calm-ml"))
        if temperature != 1.0 or teacher is not None or samples is not None:
            raise CalmError(
                "temperature, teacher and samples belong to the E-step: they need method 'calm-em'"
            )
        return self._ml_loss(targets).mean()

    def attribute(
        self,
        targets: Targets,
        kind: str = "joint",
        *,
        superclass: Superclass | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attribution maps from this forward pass: see `calm.output.attribute`."""
        return attribute(self, targets, kind, superclass=superclass, size=size)


class CamOutput:
    """Output of a CAM model: class scores averaged over the locations, and the class activation maps on demand.

    The prediction needs no maps: the mean of a 1x1 convolution is the convolution of the mean.

    Attributes:
        class_scores: mean over locations of f, (B, C): the classifier's logits.
    """

    family: ClassVar[str] = "cam"

    def __init__(self, features: Float[Tensor, "b d h w"], weight: Tensor, bias: Tensor) -> None:
        self._features, self._weight, self._bias = features, weight, bias
        self.class_scores = widen(F.linear(features.mean(dim=(-2, -1)), weight.flatten(1), bias))
        self._values: dict[tuple[str, bool], Tensor] = {}
        self._then = Moment.now(features.device, (weight, bias))

    @property
    def num_classes(self) -> int:
        """C."""
        return self.class_scores.shape[1]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.class_scores.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return self.class_scores.device

    @_kept
    def logits(self) -> Tensor:
        """f, the class activation maps of all classes, (B, C, h, w)."""
        with again(self._then, (self._weight, self._bias)):
            return F.conv2d(self._features, self._weight, self._bias)

    @_kept
    def log_probs(self) -> Tensor:
        """log p(y | x), (B, C)."""
        return F.log_softmax(self.class_scores, dim=1)

    @property
    def probs(self) -> Tensor:
        """p(y | x), (B, C); sums to 1 over classes. float32 or wider."""
        return self.log_probs.exp()

    def logits_of(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """f of the classes asked, for each image its own, in float32 or wider."""
        with again(self._then, (self._weight, self._bias)):
            weight, bias = self._weight.flatten(1)[classes], self._bias[classes]
            return (
                widen(torch.einsum("bdhw,bkd->bkhw", self._features, weight.to(self._features.dtype)))
                + widen(bias)[..., None, None]
            )

    def loss(self, targets: Tensor) -> Float[Tensor, ""]:
        """Cross-entropy, mean over the batch, in nats; ``targets`` (B,) indices or (B, C) soft.

        Raises:
            CalmError: another number of targets than of images.
        """
        return F.cross_entropy(
            self.class_scores, latent.check_targets(targets, self.batch_size, self.num_classes)
        )

    def attribute(
        self,
        targets: Targets,
        kind: str = "cam",
        *,
        superclass: Superclass | None = None,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Attribution maps from this forward pass: see `calm.output.attribute`."""
        return attribute(self, targets, kind, superclass=superclass, size=size)
