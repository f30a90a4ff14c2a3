"""Attribution maps as questions to a classifier's output, one function each.

=======================  ============================  =====================================================
kind (ours)              released code's name          what a value of the map is
=======================  ============================  =====================================================
jointll                  jointll                       p(y, z | x); sums to p(y | x)
jointll-superclass       jointll-superclass            p(one of the classes, z | x): sum of their joints
jointll-superclass-mean  jointll-superclass-mean       the same divided by the number of classes
gtcond                   gtcond                        p(z | x, y); sums to 1
gtcond-superclass        gtcond-superclass             sum of the classes' posteriors
gtcond-superclass-mean   gtcond-superclass-mean        their mean; sums to 1
saliency                 saliency                      p(z | x); sums to 1
cam                      vanilla                       the class logit f[y] at z
cam-saliency             vanilla-saliency              sum over classes of min-max normalised f
cam-superclass           vanilla-superclass            that sum over the classes of a superclass
=======================  ============================  =====================================================

``joint``, ``posterior`` and ``prior`` are accepted for jointll, gtcond and saliency. The first seven need a CALM
model, the last three a CAM model: asking the wrong one is an error, not a picture of untrained weights.

Source: paper, section 4 (attribution maps) and the released code's score map processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.errors import CalmError, shown, unknown
from calm.latent import log_posterior
from calm.normalization import normalize
from calm.resample import resize_maps

if TYPE_CHECKING:
    from calm.output import CalmOutput, CamOutput

__all__ = [
    "ALIASES",
    "MAP_KINDS",
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
    "vanilla": "cam",
    "vanilla-saliency": "cam-saliency",
    "vanilla-superclass": "cam-superclass",
    "joint": "jointll",
    "joint-superclass": "jointll-superclass",
    "joint-superclass-mean": "jointll-superclass-mean",
    "posterior": "gtcond",
    "posterior-superclass": "gtcond-superclass",
    "posterior-superclass-mean": "gtcond-superclass-mean",
    "prior": "saliency",
}


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
    "jointll": MapKind("calm", joint),
    "jointll-superclass": MapKind("calm", joint, over="superclass"),
    "jointll-superclass-mean": MapKind("calm", joint, over="superclass", mean=True),
    "gtcond": MapKind("calm", posterior),
    "gtcond-superclass": MapKind("calm", posterior, over="superclass"),
    "gtcond-superclass-mean": MapKind("calm", posterior, over="superclass", mean=True),
    "saliency": MapKind("calm", prior),
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
