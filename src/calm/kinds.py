"""The kinds of attribution maps that a model's output has, how each is read, and the released code's names of them.

Source: paper, section 4 (attribution maps), and the released code's score map processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm import latent
from calm.errors import CalmError, unknown
from calm.heatmaps import normalize

Superclass: TypeAlias = Mapping[int, Sequence[int]]
"""For each target class, the classes of its superclass (which normally include the target)."""


def _joint(output: Any, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    log_joint: Tensor = output.class_log_joint(classes)
    return log_joint.exp()


def _posterior(output: Any, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    return latent.log_posterior(output.class_log_joint(classes)).exp()


def _prior(output: Any, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    prior: Tensor = output.prior
    return prior.unsqueeze(1).expand(-1, classes.shape[1], -1, -1)


def _evidence(output: Any, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    if output.family == "cam":
        maps: Tensor = output.class_logits(classes)
        return maps / (maps.shape[-2] * maps.shape[-1])
    return latent.evidence(output.class_log_conditional(classes), output.log_prior)


def _cam(output: Any, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    maps: Tensor = output.class_maps(classes)
    return maps


def _normalized_cam(output: Any, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    return normalize(output.class_maps(classes), "minmax")


@dataclass(frozen=True)
class MapKind:
    """How a kind of map is computed.

    Attributes:
        families: The models that have it, ``calm`` and ``cam``; of others, it would show weights never trained.
        read: From an output and classes (B, K) to their maps (B, K, h, w).
        over: The classes whose maps are summed: ``target``, ``superclass`` or ``all``.
        mean: Whether the sum is divided by the number of classes.
        compares: Whether only the difference of two classes' maps says where: a class alone is highest where the prior
            is 0.
        adds: Whether the values of cells add up to that of a region, as probabilities and nats do; scores do not.
    """

    families: tuple[str, ...]
    read: Callable[[Any, Tensor], Tensor]
    over: str = "target"
    mean: bool = False
    compares: bool = False
    adds: bool = True

    def maps(
        self, output: Any, classes: Int[Tensor, "b k"], superclass: Superclass | None = None
    ) -> Float[Tensor, "b k h w"]:
        """Return an output's maps of classes (B, K), each summed over what `over` names."""
        if self.over == "target":
            return self.read(output, classes)
        every = torch.arange(output.num_classes, device=output.device)
        rows = self.read(output, every.expand(output.batch_size, -1))
        members = torch.ones(*classes.shape, output.num_classes).to(rows)
        if superclass is not None:
            members = _superclass_members(classes, superclass, output.num_classes).to(rows)
        maps = torch.einsum("bkc,bchw->bkhw", members, rows)
        return maps / members.sum(dim=2)[..., None, None] if self.mean else maps


_CALM, _CAM = ("calm",), ("cam",)

MAP_KINDS: dict[str, MapKind] = {
    "joint": MapKind(_CALM, _joint),  # p(y, z | x); sums to p(y | x)
    "joint-superclass": MapKind(_CALM, _joint, over="superclass"),  # p(one of the classes, z | x): sum of their joints
    "joint-superclass-mean": MapKind(_CALM, _joint, over="superclass", mean=True),  # divided by their number
    "posterior": MapKind(_CALM, _posterior),  # p(z | x, y); sums to 1
    "posterior-superclass": MapKind(_CALM, _posterior, over="superclass"),  # sum of the classes' posteriors
    "posterior-superclass-mean": MapKind(_CALM, _posterior, over="superclass", mean=True),  # their mean; sums to 1
    "prior": MapKind(_CALM, _prior),  # p(z | x); sums to 1
    "cam": MapKind(_CAM, _cam, adds=False),  # the class logit f[y] at z
    "cam-saliency": MapKind(_CAM, _normalized_cam, over="all", adds=False),  # sum over classes of min-max normalised f
    "cam-superclass": MapKind(_CAM, _normalized_cam, over="superclass", adds=False),  # ... of a superclass's classes
    # p(z | x) * log p(y | x, z) in nats: the difference of two classes sums to their expected log-odds. Of CAM, f[y] at
    # z over the number of locations, N: the difference sums to log p(y1 | x) - log p(y2 | x).
    "evidence": MapKind(_CALM + _CAM, _evidence, compares=True),
}
"""The kinds of maps, and what a value of each is."""

_RELEASED_WORDS = {"joint": "jointll", "posterior": "gtcond", "prior": "saliency", "cam": "vanilla"}
ALIASES = {
    released + name.removeprefix(word): name
    for name in MAP_KINDS
    for word, released in _RELEASED_WORDS.items()
    if name.split("-")[0] == word
}
"""The released code's names of the map kinds: ``jointll-superclass`` is joint-superclass, ``saliency`` is prior."""


def canonical_kind(kind: str, family: str) -> str:
    """Return the name under which `MAP_KINDS` holds ``kind``, a name or an alias.

    Raises:
        CalmError: If there is no such kind, or models of this family ("calm" or "cam") do not have it.
    """
    name = ALIASES.get(kind, kind)
    if name not in MAP_KINDS:
        raise unknown("map kind", kind, [*MAP_KINDS, *ALIASES])
    if family not in MAP_KINDS[name].families:
        allowed = ", ".join(other for other, spec in MAP_KINDS.items() if family in spec.families)
        raise CalmError(f"map kind {kind!r} cannot be read from a {family.upper()} model: choose one of {allowed}")
    return name


def _superclass_members(targets: Int[Tensor, "b k"], superclass: Superclass, classes: int) -> Bool[Tensor, "b k c"]:
    """Return which classes are in the superclass of each target."""
    table = torch.zeros(*targets.shape, classes, dtype=torch.bool, device=targets.device)
    for row, target in zip(table.flatten(0, 1), targets.flatten().tolist(), strict=True):
        members = list(superclass.get(target, ()))
        if not members:
            raise CalmError(f"superclass has no classes for target {target}: it names {sorted(superclass)}")
        wrong = [member for member in members if not 0 <= member < classes]
        if wrong:
            raise CalmError(f"superclass of target {target} names class {wrong[0]}: allowed are 0 to {classes - 1}")
        row[members] = True
    return table
