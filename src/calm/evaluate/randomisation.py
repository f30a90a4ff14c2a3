"""The sanity check of model randomisation: does the map change when the weights do?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from calm.config import Order
from calm.data.records import Split
from calm.errors import CalmError, unknown
from calm.evaluate.reading import Progress, gathered, in_order, looks, paced
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import Subject
from calm.metrics.bootstrap import REPLICATES, Estimate, bootstrap_mean
from calm.metrics.classification import rank_correlation
from calm.model import CalmModel

__all__ = ["Order", "randomisation", "reinitialise", "stages"]

_SEEDS = 0x52414E444F4D
"""Added to seeds, so that a small one does not draw the very weights that a model was initialised with."""


@torch.no_grad()
def randomisation(
    subject: Subject,
    split: Split,
    *,
    order: Order = "cascading",
    images: int = 200,
    batch_size: int = 32,
    workers: int = 0,
    progress: Progress | None = None,
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Result:
    """Draw the weights anew and compare the label's maps before and after, by Spearman's rank correlation.

    A map that explains the classifier must change with it: 0 is a map that has nothing in common with the one
    before, 1 one that does not depend on the weights at all. It passes the check if it falls toward 0; a low figure
    does not make a map right. Rank correlation reads the order of values only, so it does not mind that random
    weights change their scale. Maps are compared at their own resolution, signed, not normalised.

    Args:
        subject: a model with the method to check (`calm.evaluate.model_subject`). The model stays as it is; a copy
            is randomised.
        split: images and the classes explained.
        order: ``cascading`` from the head down, one stage (`stages`) after another; or ``all`` at once.
        images: how many, spread evenly over the split; their maps are kept in memory.
        batch_size: images in a forward pass.
        workers: processes that read images.
        progress: told after each batch its share of the work, as a number of the split's images.
        seed: of the weights and the bootstrap.
        replicates: bootstrap samples of images.

    Returns:
        Figure ``randomisation``: the mean correlation with every weight drawn anew; the curve ``randomisation`` over
        the number of stages drawn anew; in ``details`` the stages' names, and how many images at each had a
        constant map, for which the correlation is undefined and which are left out.

    Raises:
        CalmError: an impossible option; a subject without a model; unreadable images; all maps constant.

    Source: Adebayo et al., Sanity Checks for Saliency Maps, 2018, section 3.
    """
    if order not in get_args(Order):
        raise unknown("order of randomisation", order, get_args(Order))
    if images < 1:
        raise CalmError(f"images is {images}: give 1 or more")
    model, look_with = subject.model, subject.look_with
    if model is None or look_with is None:
        raise CalmError(f"{subject.label} has no weights to draw anew: randomisation needs a model")
    count = len(split.records)
    chosen = range(count) if images >= count else [i * count // images for i in range(images)]
    changed = copy.deepcopy(model)
    whole: list[tuple[str, list[nn.Module]]] = [("all", [changed])]
    rounds = stages(changed) if order == "cascading" else whole
    progress = paced(progress, len(chosen) * (1 + len(rounds)), count)

    def maps_with(weights: CalmModel) -> Iterator[tuple[list[int], Tensor]]:
        looking = replace(subject, look=partial(look_with, weights))
        for _, labels, keys, looked in looks(
            looking, split, batch_size=batch_size, workers=workers, progress=progress, indices=chosen
        ):
            yield keys.tolist(), looked.maps(labels[:, None])[:, 0].flatten(1).cpu()

    reference = list(maps_with(model))
    if all(gathered(all(bool((maps == maps[:, :1]).all()) for _, maps in reference))):
        raise CalmError(f"every map of {subject.label} is constant: there is nothing to compare")
    points, constant = [Estimate(1.0, 1.0, 1.0)], []
    for number, (_, modules) in enumerate(rounds, start=1):
        for module in modules:
            reinitialise(module, seed + number)
        similar: dict[int, float] = {}
        for (keys, before), (_, now) in zip(reference, maps_with(changed), strict=True):
            similar |= dict(zip(keys, rank_correlation(before, now).tolist(), strict=True))
        correlation = torch.tensor(list(in_order(similar).values()), dtype=torch.float64)
        known = correlation[correlation.isfinite()]
        constant.append(len(correlation) - len(known))
        unknown_mean = Estimate(torch.nan, torch.nan, torch.nan)
        points.append(bootstrap_mean(known, replicates, seed) if len(known) else unknown_mean)
    return Result(
        "randomisation",
        subject.label,
        figures={"randomisation": points[-1]},
        curves={
            "randomisation": Curve.of(
                range(len(points)), points, "stages drawn anew", "rank correlation with the map before"
            )
        },
        details={
            "stages": [name for name, _ in rounds],
            "constant_maps": constant,
            "images": len(chosen),
            "options": {"order": order, "images": images, "seed": seed, "replicates": replicates},
        },
    )


def stages(model: CalmModel) -> list[tuple[str, list[nn.Module]]]:
    """The parts of a model that have weights, from the head down: the head, then the backbone's children, last first.

    A wrapper around a single child counts as the child. Where there would be fewer than four parts, sequences among
    them are taken apart.
    """
    body: nn.Module = model.backbone
    prefix = "backbone"
    while len(children := _with_weights(body)) == 1 and not list(body.parameters(recurse=False)):
        prefix, body = f"{prefix}.{children[0][0]}", children[0][1]
    if len(children) < 4:
        children = [part for name, child in children for part in _opened(name, child)]
    parts = [(f"{prefix}.{name}", [child]) for name, child in reversed(children)]
    if list(body.parameters(recurse=False)) or not parts:
        parts = [(prefix, [body])]
    return [("head", [model.head]), *parts]


@torch.no_grad()
def reinitialise(module: nn.Module, seed: int) -> None:
    """Draw the weights of a module and its children anew, in place; the generators are left as they were.

    Layers that know how (``reset_parameters``: convolutions, linear layers, normalisations with their running
    statistics) do it themselves; the weights of any other are shuffled, which keeps their distribution.
    """
    with torch.random.fork_rng():
        torch.manual_seed(_SEEDS + seed)
        for layer in module.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for weight in layer.parameters(recurse=False):
                mixed = torch.randperm(weight.numel()).to(weight.device)
                weight.copy_(weight.flatten()[mixed].view_as(weight))


def _opened(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return [(name, module)]
    return [(f"{name}.{inner}", child) for inner, child in _with_weights(module)]


def _with_weights(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if list(child.parameters())]
