"""The sanity check of model randomisation: whether maps change when the model's weights do."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Unpack, get_args

import torch
from torch import Tensor, nn

from calm.config import Order
from calm.data.records import Split
from calm.errors import CalmError, unknown
from calm.evaluate.distributed import all_gather, gather_dict
from calm.evaluate.reading import Reading, predictions, scaled_progress
from calm.evaluate.result import Curve, Result
from calm.evaluate.subject import Subject
from calm.metrics.bootstrap import REPLICATES, Estimate, bootstrap_mean
from calm.metrics.classification import rank_correlation
from calm.model import CalmModel

_SEED_OFFSET = 0x52414E444F4D
"""Added to seeds, so that a small seed does not draw the weights that a model was initialised with."""


@torch.no_grad()
def randomisation(
    subject: Subject,
    split: Split,
    *,
    order: Order = "cascading",
    images: int = 200,
    seed: int = 0,
    replicates: int = REPLICATES,
    **reading: Unpack[Reading],
) -> Result:
    """Draw the weights anew and compare the label's maps before and after, by Spearman's rank correlation.

    A map that explains the classifier must change with it: a correlation of 0 means that the maps before and after
    have nothing in common, 1 that the map does not depend on the weights at all. A method passes the check if the
    correlation falls toward 0; passing does not make its maps right. Rank correlation depends on the order of values
    only, not on their scale, which random weights change. Maps are compared at their own resolution, signed, not
    normalised.

    Args:
        subject: a model with the method to check (`calm.evaluate.model_subject`). The model stays as it is; a copy
            is randomised.
        split: images and the classes explained.
        order: ``cascading``: one stage (`stages`) after another, from the head down; ``all``: at once.
        images: number of images, spread evenly over the split; their maps are kept in memory.
        seed: of the weights and the bootstrap.
        replicates: bootstrap samples of images.
        reading: see `calm.evaluate.reading.Reading`.

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
    model, predict_with = subject.model, subject.predict_with
    if model is None or predict_with is None:
        raise CalmError(f"{subject.label} has no weights to draw anew: randomisation needs a model")
    count = len(split.records)
    chosen = range(count) if images >= count else [i * count // images for i in range(images)]
    changed = copy.deepcopy(model)
    rounds: list[tuple[str, list[nn.Module]]] = stages(changed) if order == "cascading" else [("all", [changed])]
    reading["progress"] = scaled_progress(reading.get("progress"), len(chosen) * (1 + len(rounds)), count)

    def maps_with(weights: CalmModel) -> Iterator[tuple[list[int], Tensor]]:
        randomised = replace(subject, predict=partial(predict_with, weights))
        for _, labels, keys, prediction in predictions(randomised, split, chosen, **reading):
            yield keys.tolist(), prediction.maps(labels[:, None])[:, 0].flatten(1).cpu()

    reference = list(maps_with(model))
    if all(all_gather(all(bool((maps == maps[:, :1]).all()) for _, maps in reference))):
        raise CalmError(f"every map of {subject.label} is constant: there is nothing to compare")
    points, constant = [Estimate(1.0, 1.0, 1.0)], []
    for number, (_, modules) in enumerate(rounds, start=1):
        for module in modules:
            reinitialise(module, seed + number)
        correlations: dict[int, float] = {}
        for (keys, before), (_, after) in zip(reference, maps_with(changed), strict=True):
            correlations |= dict(zip(keys, rank_correlation(before, after).tolist(), strict=True))
        values = torch.tensor(list(gather_dict(correlations).values()), dtype=torch.float64)
        defined = values[values.isfinite()]
        constant.append(len(values) - len(defined))
        undefined = Estimate(torch.nan, torch.nan, torch.nan)
        points.append(bootstrap_mean(defined, replicates, seed) if len(defined) else undefined)
    curve = Curve.of(range(len(points)), points, "stages drawn anew", "rank correlation with the map before")
    return Result(
        "randomisation",
        subject.label,
        figures={"randomisation": points[-1]},
        curves={"randomisation": curve},
        details={"stages": [name for name, _ in rounds], "constant_maps": constant, "images": len(chosen)},
    )


def stages(model: CalmModel) -> list[tuple[str, list[nn.Module]]]:
    """Return the parts of a model that have weights: the head, then the backbone's children, last first.

    A wrapper around a single child counts as the child. If there would be fewer than four parts, sequences among them
    are taken apart.
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
    """Draw the weights of a module and its children anew, in place; random number generators are restored.

    Layers with ``reset_parameters`` (convolutions, linear layers, normalisations with their running statistics) are
    initialised by it; the weights of any other are shuffled, which keeps their distribution.
    """
    with torch.random.fork_rng():
        torch.manual_seed(_SEED_OFFSET + seed)
        for layer in module.modules():
            reset = getattr(layer, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for weight in layer.parameters(recurse=False):
                shuffled = torch.randperm(weight.numel()).to(weight.device)
                weight.copy_(weight.flatten()[shuffled].view_as(weight))


def _opened(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return [(name, module)]
    return [(f"{name}.{inner}", child) for inner, child in _with_weights(module)]


def _with_weights(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in module.named_children() if list(child.parameters())]
