"""What a model returns for a batch of images: predictions, losses and attribution maps of one forward pass.

Source: paper, sections 3 (model) and 4 (attribution maps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils import _pytree

from calm import latent
from calm.config import PriorActivation, PriorDenominator
from calm.errors import CalmError
from calm.heatmaps import Region, cell_coverage, resize_maps
from calm.kinds import (
    ALIASES as ALIASES,
    MAP_KINDS as MAP_KINDS,
    Superclass as Superclass,
    canonical_kind as canonical_kind,
)
from calm.latent import NamedTargets, check_classes, class_indices, widen


class _Output:
    """What the outputs of both families share: sizes, device and attribution maps."""

    family: ClassVar[str]
    _first: ClassVar[str]  # name of a field whose shape begins with (B, C)
    default_kind: ClassVar[str]
    _contents: ClassVar[tuple[tuple[str, str, str], ...]]  # for people: name, letters of the axes, meaning
    class_names: tuple[str, ...] = ()  # of the model; empty if it is unknown, as after torch.compile
    log_probs: Any  # this and the next are properties of each family
    grid: Any

    @property
    def batch_size(self) -> int:
        """B, the number of images."""
        return self._scores_of_classes.shape[0]

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return self._scores_of_classes.shape[1]

    @property
    def device(self) -> torch.device:
        """The device of the activations."""
        return self._scores_of_classes.device

    @property
    def _scores_of_classes(self) -> Tensor:
        scores: Tensor = getattr(self, self._first)
        return scores

    def attribute(
        self,
        targets: NamedTargets | None = None,
        kind: str | None = None,
        *,
        superclass: Superclass | None = None,
        size: tuple[int, int] | None = None,
        prior_exponent: float = 1.0,
    ) -> Float[Tensor, "b H W"] | Float[Tensor, "b k H W"]:
        """Return attribution maps of one or several target classes per image, from this forward pass.

        Args:
            targets: Class indices, (B,) for one map per image or (B, K) for K, as a tensor or a list; or one class for
                all images. In lists names of classes may stand for indices. None is the most probable class of each
                image.
            kind: A name in `MAP_KINDS`; None is ``joint`` for CALM and ``cam`` for CAM.
            superclass: For the ``-superclass`` kinds: the classes that each target is summed over.
            size: (height, width) to resize to; None leaves the maps on the grid.
            prior_exponent: CALM only: gamma, the maps are read with the prior p(z | x) ** gamma, normalised
                (`calm.latent.temper`). Below 1, more of the locations that recognise the class show.

        Returns:
            Maps (B, H, W) or (B, K, H, W), in the units of `MAP_KINDS`.

        Raises:
            CalmError: If the kind is unknown or of the other model family, the targets have a wrong shape, dtype or
                range, a superclass is missing or not wanted, or the prior's exponent is negative or there is no prior.
        """
        if prior_exponent != 1:
            indices = None if targets is None else class_indices(targets, self.class_names)
            return self._tempered(prior_exponent).attribute(indices, kind, superclass=superclass, size=size)
        kind = self.default_kind if kind is None else kind
        spec = MAP_KINDS[canonical_kind(kind, self.family)]
        given = self.log_probs.argmax(dim=1) if targets is None else class_indices(targets, self.class_names)
        targets = check_classes(given, self.batch_size, self.num_classes).to(self.device)
        classes = targets if targets.ndim == 2 else targets.unsqueeze(1)
        if (spec.over == "superclass") != (superclass is not None):
            needs = "needs superclass=, a mapping from target to its classes"
            raise CalmError(f"map kind {kind!r} {needs if superclass is None else 'takes no superclass='}")
        maps = spec.maps(self, classes, superclass)
        maps = maps if targets.ndim == 2 else maps.squeeze(1)
        return maps if size is None else resize_maps(maps, size)

    def mass(
        self,
        targets: NamedTargets | None,
        region: Region,
        *,
        kind: str | None = None,
        size: tuple[int, int] | None = None,
        superclass: Superclass | None = None,
        prior_exponent: float = 1.0,
    ) -> Float[Tensor, " b"] | Float[Tensor, "b k"]:
        """Return how much of a map lies in a region: of the joint, p(y, cue in the region | x).

        It is the exact sum over the cells of the grid; a cell that lies partly in the region counts by the share of its
        area. The whole image gives p(y | x). It is differentiable.

        Args:
            targets: As for `attribute`.
            region: A rectangle x0, y0, x1, y1 in fractions of the image (0 to 1, from the upper left corner), or in
                pixels if ``size`` is given; or a boolean mask of the image (H, W). One for all images, or (B, 4) or
                (B, H, W). See `calm.heatmaps.cell_coverage`.
            kind: As for `attribute`. Of CAM's maps only the cells of ``evidence`` add up.
            size: (height, width) in pixels of the image that a rectangle refers to.
            superclass: As for `attribute`.
            prior_exponent: As for `attribute`.

        Returns:
            (B,) or (B, K), in the unit of the map.

        Raises:
            CalmError: See `attribute` and `calm.heatmaps.cell_coverage`; or the values of the kind do not add up.
        """
        kind = canonical_kind(self.default_kind if kind is None else kind, self.family)
        if not MAP_KINDS[kind].adds:
            raise CalmError(f"the cells of a {kind!r} map are scores, which do not add up: take kind='evidence'")
        maps = self.attribute(targets, kind, superclass=superclass, prior_exponent=prior_exponent)
        coverage = self._coverage(region, size).to(maps)
        return (maps * (coverage if maps.ndim == 3 else coverage.unsqueeze(1))).sum(dim=(-2, -1))

    def _coverage(self, region: Region, size: tuple[int, int] | None) -> Float[Tensor, "b h w"]:
        """Return `cell_coverage` of each image, or of all (1, h, w)."""
        coverage = cell_coverage(region, self.grid, size)
        if coverage.ndim == 3 and len(coverage) != self.batch_size:
            raise CalmError(f"{len(coverage)} regions for {self.batch_size} images: give one, or one for each")
        return coverage if coverage.ndim == 3 else coverage.unsqueeze(0)

    def __repr__(self) -> str:
        """Say what is in the output, with shapes; the numbers are in its properties."""
        b, c, (h, w) = self.batch_size, self.num_classes, self.grid
        sides = {"b": b, "c": c, "h": h, "w": w, "1": 1}
        rows = [(name, tuple(sides[axis] for axis in axes), what) for name, axes, what in self._contents]
        rows = [*rows, ("attribute(targets, kind)", (b, h, w), "maps of classes, by name or kind: calm.MAP_KINDS")]
        lines = [f"  {name:25}{shape!s:20}{what}" for name, shape, what in rows]
        return "\n".join(
            [f"{type(self).__name__}: {b} image{'s' * (b != 1)}, {c} classes, a grid of {h} x {w}", *lines]
        )

    def _tempered(self, exponent: float) -> _Output:
        """Return the output with the prior p(z | x) ** exponent, normalised."""
        raise CalmError(f"prior_exponent is {exponent:g}, but a {self.family.upper()} model has no prior: leave it out")


@dataclass(eq=False, repr=False)
class CalmOutput(_Output):
    """The output of a CALM model for B images: the activations of its head, and what follows from them.

    The quantities are those of `calm.latent`. Each property is computed from the activations when it is read: keep the
    value if you need it twice.

    Attributes:
        logits: f, class scores per location.
        scores: s, one score per location.
        activation: The prior's activation, see `calm.latent.log_prior`.
        denominator: The prior's denominator, see `calm.latent.log_prior`.
        pooling_exponent: a, with which the locations predict together, see `calm.latent.pooled`. Below 1 the posterior
            is proportional to p(z | x) p(y | x, z) ** a, and the joint is p(y | x) times the posterior.
    """

    family = "calm"
    _first = "logits"
    default_kind = "joint"
    _contents = (
        ("probs", "bc", "p(y | x), sums to 1 over the classes; log_probs"),
        ("joint", "bchw", "p(y, z | x), sums to probs over the grid; log_joint"),
        ("posterior", "bchw", "p(z | x, y), sums to 1 over the grid; log_posterior"),
        ("prior", "bhw", "p(z | x), sums to 1 over the grid; log_prior"),
        ("conditional", "bchw", "p(y | x, z), sums to 1 over the classes; log_conditional"),
        ("logits", "bchw", "class scores of each location, not of the image"),
        ("scores", "b1hw", "scores of the locations"),
    )

    logits: Float[Tensor, "b c h w"]
    scores: Float[Tensor, "b 1 h w"]
    activation: PriorActivation = "softplus"
    denominator: PriorDenominator = "differentiated"
    pooling_exponent: float = 1.0

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the locations."""
        return self.logits.shape[2], self.logits.shape[3]

    @property
    def log_conditional(self) -> Float[Tensor, "b c h w"]:
        """log p(y | x, z)."""
        return latent.log_conditional(self.logits)

    @property
    def log_prior(self) -> Float[Tensor, "b h w"]:
        """log p(z | x)."""
        return latent.log_prior(self.scores, self.activation, self.denominator)

    @property
    def log_joint(self) -> Float[Tensor, "b c h w"]:
        """log p(y, z | x)."""
        if self.pooling_exponent != 1:
            classes = torch.arange(self.num_classes, device=self.device)
            return self.class_log_joint(classes.expand(self.batch_size, -1))
        return latent.log_joint(self.log_conditional, self.log_prior)

    @property
    def log_probs(self) -> Float[Tensor, "b c"]:
        """log p(y | x): the prediction."""
        if self.pooling_exponent == 1:
            return latent.log_likelihood(self.log_joint)
        return self._pooled(self.log_conditional if self.pooling_exponent else widen(self.logits)).log_softmax(dim=1)

    def _pooled(self, log_conditional: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """Return the logarithm of the power mean of all classes, before it is normalised over them."""
        return latent.pooled(log_conditional, self.log_prior, self.pooling_exponent)

    @property
    def log_posterior(self) -> Float[Tensor, "b c h w"]:
        """log p(z | x, y)."""
        return latent.log_posterior(self.log_joint)

    @property
    def conditional(self) -> Float[Tensor, "b c h w"]:
        """p(y | x, z); sums to 1 over the classes."""
        return self.log_conditional.exp()

    @property
    def prior(self) -> Float[Tensor, "b h w"]:
        """p(z | x); sums to 1 over the locations."""
        return self.log_prior.exp()

    @property
    def joint(self) -> Float[Tensor, "b c h w"]:
        """p(y, z | x); sums to p(y | x) over the locations."""
        return self.log_joint.exp()

    @property
    def probs(self) -> Float[Tensor, "b c"]:
        """p(y | x); sums to 1 over the classes. float32 or wider."""
        return self.log_probs.exp()

    @property
    def posterior(self) -> Float[Tensor, "b c h w"]:
        """p(z | x, y); sums to 1 over the locations."""
        return self.log_posterior.exp()

    @property
    def dead(self) -> Bool[Tensor, " b"]:
        """Which images have a dead prior: all activated scores are 0, hence the prior is uniform."""
        if self.activation != "relu":
            return torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)
        return (self.scores <= 0).flatten(1).all(dim=1)

    def _tempered(self, exponent: float) -> CalmOutput:
        scores = latent.temper(self.log_prior, exponent).unsqueeze(1)
        return CalmOutput(self.logits, scores, "exp", pooling_exponent=self.pooling_exponent)

    def within(self, region: Region, size: tuple[int, int] | None = None) -> CalmOutput:
        """Return the output given that the cue lies in a region: its ``probs`` are p(y | x, cue in the region).

        The prior becomes p(z | x) in the region, normalised, and 0 elsewhere; a cell that lies partly in the region
        counts by the share of its area. What `mass` returns is this probability times the prior's mass in the region.
        An image whose (ReLU) prior has no mass there has a uniform one there.

        Args:
            region: As for `mass`.
            size: As for `mass`.

        Raises:
            CalmError: See `calm.heatmaps.cell_coverage`; or the region of an image is empty.
        """
        coverage = self._coverage(region, size)
        if not coverage.flatten(1).any(dim=1).all():
            raise CalmError("the region is empty: no part of the image lies in it")
        coverage = coverage.log().to(self.log_prior)
        inside = self.log_prior + coverage
        nowhere = inside.isneginf().all(dim=(-2, -1), keepdim=True)
        scores = torch.where(nowhere, coverage, inside).unsqueeze(1)
        output = CalmOutput(self.logits, scores, "exp", self.denominator, self.pooling_exponent)
        output.class_names = self.class_names
        return output

    def class_log_conditional(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Return log p(y | x, z) of K classes per image."""
        return _rows(self.log_conditional, classes)

    def class_log_joint(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Return log p(y, z | x) of K classes per image."""
        exponent, log_conditional = self.pooling_exponent, self.log_conditional
        rows = _rows(log_conditional, classes)
        if exponent == 1:
            return latent.log_joint(rows, self.log_prior)
        log_posterior = latent.log_posterior(latent.log_joint(exponent * rows, self.log_prior))
        log_probs = self._pooled(log_conditional).log_softmax(dim=1)
        return log_posterior + log_probs.gather(1, classes)[..., None, None]

    def target_log_joint(self, targets: Int[Tensor, " b"]) -> Float[Tensor, "b h w"]:
        """Return log p(y, z | x) of each image's target: the row of the joint that a loss reads."""
        if self.pooling_exponent != 1:
            return self.class_log_joint(targets[:, None]).squeeze(1)
        return latent.target_log_conditional(self.logits, targets) + self.log_prior

    def loss(
        self,
        targets: Tensor,
        *,
        method: str = "calm-em",
        temperature: float = 1.0,
        teacher: CalmOutput | None = None,
        prior_weight: float = 0.0,
        cam_weight: float = 0.0,
        regions: Bool[Tensor, "k H W"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean loss over the batch, in nats.

        Args:
            targets: Class indices (B,), or soft targets (B, C) whose rows sum to 1 (mixup, label smoothing). Their loss
                is the expectation of the classes' losses; it needs the joints of all classes. With ``regions``, class
                indices (B, K).
            method: ``calm-em`` or ``calm-ml``.
            temperature: EM only: beta of the E-step (`calm.latent.e_step`).
            teacher: EM only: the output, for the same images, that the posterior is taken from; None is this one.
            prior_weight: lambda, the weight of `calm.latent.prior_penalty`. Above 0 it keeps the prior from collapsing.
            cam_weight: Weight of CAM's loss with the same class scores, the cross-entropy of their mean over the grid,
                which teaches all locations at once.
            regions: Masks of the K parts, each with a class of its own, of which every image was put together (CutMix).
                The loss is that of `within` each part, weighted by its area, so that it says nothing on how the prior
                is shared between the parts (docs/mathematics.md).

        Raises:
            CalmError: If the targets do not fit the output (on a GPU their values are asserted by the device, see
                `calm.latent.check_targets`), or the method does not have an option.
        """
        if regions is None:
            targets = latent.check_targets(targets, self.batch_size, self.num_classes)
            loss = self._likelihood_loss(targets, method, temperature, teacher)
        else:
            if targets.ndim != 2 or targets.is_floating_point() or targets.shape[1] != len(regions):
                raise CalmError(f"{len(regions)} regions: give class indices (B, {len(regions)}) as targets")
            areas, losses = regions.double().mean(dim=(1, 2)), []
            for area, region, part in zip(areas.tolist(), regions, targets.unbind(1), strict=True):
                if area:
                    part = latent.check_targets(part, self.batch_size, self.num_classes)
                    of_part = None if teacher is None else teacher.within(region)
                    losses.append(area * self.within(region)._likelihood_loss(part, method, temperature, of_part))
            loss = torch.stack(losses).sum()
            targets = torch.einsum("bkc,k->bc", F.one_hot(targets, self.num_classes).to(loss), areas.to(loss))
        if prior_weight and self.activation == "relu":
            raise CalmError(f"prior_weight is {prior_weight:g}, but a ReLU prior has probabilities of 0: leave it at 0")
        if prior_weight:
            loss = loss + prior_weight * latent.prior_penalty(self.log_prior).mean()
        if cam_weight:
            loss = loss + cam_weight * F.cross_entropy(widen(self.logits).mean(dim=(-2, -1)), targets)
        return loss

    def _likelihood_loss(
        self, targets: Tensor, method: str, temperature: float, teacher: CalmOutput | None
    ) -> Float[Tensor, ""]:
        """Return `loss` without its penalties, for checked targets (B,) or (B, C)."""
        soft, exponent = targets.ndim == 2, self.pooling_exponent
        classes = torch.arange(self.num_classes, device=self.device).expand_as(targets) if soft else targets[:, None]

        def log_joint(output: CalmOutput, log_conditional: Tensor | None = None) -> Tensor:
            if exponent != 1:  # log(p(z | x) p(y | x, z) ** a), which normalised over z is the posterior
                of_all = output.log_conditional if log_conditional is None else log_conditional
                rows = latent.log_joint(exponent * (of_all if soft else _rows(of_all, classes)), output.log_prior)
                return rows if soft else rows.squeeze(1)
            return output.log_joint if soft else output.target_log_joint(targets)

        latent.check_method(method, e_step_options := temperature != 1.0 or teacher is not None)
        if exponent == 0 and e_step_options:
            raise CalmError("temperature and teacher have no limit at pooling_exponent 0: leave them out")
        if exponent == 0 or (exponent != 1 and method == "calm-ml"):
            losses = -self.log_probs if soft else -self.log_probs.gather(1, classes).squeeze(1)
        else:
            log_conditional = None if exponent == 1 else self.log_conditional  # of all classes, for Z, too
            own = log_joint(self, log_conditional)
            if method == "calm-ml":
                losses = latent.ml_loss(own)
            else:
                with torch.no_grad():
                    of_teacher = None if teacher is None else log_joint(teacher)
                losses = latent.em_loss(latent.e_step(own, temperature, of_teacher), own)
            if log_conditional is not None:
                losses = losses / exponent + self._pooled(log_conditional).logsumexp(dim=1, keepdim=soft)
        return ((targets * losses).sum(dim=1) if soft else losses).mean()


def _rows(maps: Float[Tensor, "b c h w"], classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    """Return the maps of K classes per image."""
    return maps.gather(1, classes[..., None, None].expand(-1, -1, *maps.shape[2:]))


@dataclass(eq=False, repr=False)
class CamOutput(_Output):
    """The output of a CAM model for B images: averaged class scores, and class activation maps when they are read.

    The mean of a 1x1 convolution is the convolution of the mean, so the prediction averages the features first. That
    saves the products at all locations and their backward pass. The maps are computed from the features and a copy of
    the weights, so that they still belong to the prediction after an optimiser step.

    Attributes:
        class_scores: The mean of f over the locations: the classifier's logits, in float32 or wider.
        features: The backbone's features.
        weight: The classifier's weight, in the dtype of the features.
        bias: The classifier's bias, in the dtype of the features.
    """

    family = "cam"
    _first = "class_scores"
    default_kind = "cam"
    _contents = (
        ("probs", "bc", "p(y | x), sums to 1 over the classes; log_probs"),
        ("class_scores", "bc", "logits of the image: the mean of logits over the grid"),
        ("logits", "bchw", "class scores of each location: the class activation maps"),
    )

    class_scores: Float[Tensor, "b c"]
    features: Float[Tensor, "b d h w"]
    weight: Float[Tensor, "c d 1 1"]
    bias: Float[Tensor, " c"]

    @classmethod
    def of(cls, features: Float[Tensor, "b d h w"], weight: Tensor, bias: Tensor) -> CamOutput:
        """Classify the averaged features by a classifier's weight (C, D, 1, 1) and bias (C,)."""
        scores = widen(F.linear(features.mean(dim=(-2, -1)), weight.flatten(1), bias))
        return cls(scores, features, weight.to(features.dtype, copy=True), bias.to(features.dtype, copy=True))

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the locations."""
        return self.features.shape[2], self.features.shape[3]

    @property
    def logits(self) -> Float[Tensor, "b c h w"]:
        """f, the class activation maps of all classes."""
        with _without_autocast(self.device):
            return F.conv2d(self.features, self.weight, self.bias)

    @property
    def log_probs(self) -> Float[Tensor, "b c"]:
        """log p(y | x)."""
        return F.log_softmax(self.class_scores, dim=1)

    @property
    def probs(self) -> Float[Tensor, "b c"]:
        """p(y | x); sums to 1 over the classes. float32 or wider."""
        return self.log_probs.exp()

    def class_logits(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Return f of K classes per image, in float32 or wider."""
        with _without_autocast(self.device):
            maps = torch.einsum("bdhw,bkd->bkhw", self.features, self.weight.flatten(1)[classes])
        return widen(maps) + widen(self.bias)[classes][..., None, None]

    def class_maps(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Return the maps of the kind ``cam`` of K classes per image: here `class_logits`."""
        return self.class_logits(classes)

    def loss(self, targets: Tensor) -> Float[Tensor, ""]:
        """Return the cross-entropy, mean over the batch, in nats; targets are those of `CalmOutput.loss`."""
        targets = latent.check_targets(targets, self.batch_size, self.num_classes)
        return F.cross_entropy(self.class_scores, targets)


def _without_autocast(device: torch.device) -> torch.autocast:
    """Return a context for maps that are computed in the dtype of the forward pass, wherever they are read."""
    name = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    return torch.autocast(name, enabled=False)


# Trees of tensors, so that torch.export and DistributedDataParallel see into them. The public registration of data
# classes makes leaves of strings, too, which an exported program can be saved with but not loaded.
_pytree.register_pytree_node(
    CalmOutput,
    lambda output: ([output.logits, output.scores], [output.activation, output.denominator, output.pooling_exponent]),
    lambda tensors, options: CalmOutput(*tensors, *options),
    serialized_type_name="calm.output.CalmOutput",
)
torch.export.register_dataclass(CamOutput, serialized_type_name="calm.output.CamOutput")
