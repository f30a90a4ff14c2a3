"""eval_pixel_perturb.py: erase the highest-scored pixels, or random ones, and classify again."""

from __future__ import annotations

from typing import TypeAlias

import torch

from calm.data.records import Split
from calm.evaluate.reading import batches
from calm.evaluate.remove_and_classify import after_erasing
from calm.evaluate.subject import Subject
from calm.metrics.erasing import erasing_order, filling, random_order
from calm.metrics.remove_and_classify import FRACTIONS
from calm.normalization import resize_and_normalize
from calm.released_commands.data import test_split
from calm.released_commands.experiment import check_place, save_measures
from calm.released_commands.flags import Flags
from calm.released_commands.subject import released_subject
from calm.released_commands.terminal import Log
from calm.released_commands.weights import load_model

__all__ = ["Measures", "main", "measure"]

Measures: TypeAlias = dict[str, list[bool] | dict[float, list[bool]]]
"""As the released pickle has them: for each test image whether the prediction is right, on the whole image (``preds``)
and, by the share erased, without the highest-scored (``preds-topk``) and random pixels (``preds-random``)."""

EVERY = 50
"""Batches between two lines of progress."""


def main(flags: Flags) -> None:
    """Write measure_PROCESS.pickle and .json to the experiment's folder, and print R_k.

    The folder is made if there is none. Nothing in it is deleted, whatever ``--override_cache`` says.

    Raises:
        CalmError: a checkpoint, a map or data that cannot be evaluated.
    """
    check_place(flags)
    model = load_model(flags)
    subject = released_subject(flags, model)
    split = test_split(flags, model)
    flags.folder.mkdir(parents=True, exist_ok=True)
    log = Log(flags.folder / "log.log")
    log(f"{flags}\nstart! {flags.score_map_process}")
    measures = measure(
        subject, split, batch_size=flags.batch_size, workers=flags.workers, seed=flags.seed or 0, log=log
    )
    save_measures(flags.folder / f"measure_{flags.score_map_process}", measures)
    topk, random = (measures[f"preds-{order}"] for order in ("topk", "random"))
    assert isinstance(topk, dict)
    assert isinstance(random, dict)
    for share in FRACTIONS:
        right = sum(random[share])
        # No image right without random pixels: the released code ends in a division by zero.
        ratio = sum(topk[share]) / right if right else float("nan")
        log(f"erase_k: {share}, prediction ratio w.r.t. random erase: {ratio:.04f}")


@torch.no_grad()
def measure(
    subject: Subject, split: Split, *, batch_size: int, workers: int, seed: int, log: Log | None = None
) -> Measures:
    """What `calm.evaluate.remove_and_classify` sums up, kept for each image, as the released code keeps it."""
    whole: list[bool] = []
    erased: dict[str, list[list[bool]]] = {"topk": [], "random": []}
    read = batches(split, subject.preprocessing, subject.device, batch_size=batch_size, workers=workers)
    for number, (images, labels, indices) in enumerate(read, start=1):
        keys, labels = indices.to(subject.device), labels.to(subject.device)
        looked = subject.look(images)
        whole += (looked.probs.argmax(dim=1) == labels).tolist()
        grid = looked.maps(labels[:, None])[:, 0]
        maps = resize_and_normalize(grid, (images.shape[-2], images.shape[-1]), subject.normalization)
        random = random_order(keys, images.shape[-2] * images.shape[-1], seed)
        orders = {"topk": erasing_order(maps, random), "random": random}
        for name, order in orders.items():
            right, _ = after_erasing(
                lambda batch: subject.look(batch).probs,
                images,
                order,
                filling(images, "zero", keys=keys, seed=seed),
                labels,
                FRACTIONS,
            )
            erased[name] += right.tolist()
        if log is not None and number % EVERY == 0:
            log(f"Iteration: {number}")
    return {
        "preds": whole,
        **{
            f"preds-{name}": {share: [row[k] for row in rows] for k, share in enumerate(FRACTIONS)}
            for name, rows in erased.items()
        },
    }
