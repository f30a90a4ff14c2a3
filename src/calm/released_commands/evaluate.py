"""The released evaluations: eval_pixel_perturb.py (remove-and-classify) and eval_cue_location.py (cue localization)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import torch

from calm.data.records import Split
from calm.errors import CalmError
from calm.evaluate.cue_localization import cue_localization
from calm.evaluate.erasing import after_erasing
from calm.evaluate.reading import batches
from calm.evaluate.result import Result
from calm.evaluate.subject import Subject
from calm.heatmaps import resize_and_normalize
from calm.metrics.erasing import FRACTIONS, erasing_order, filling, random_order
from calm.released_commands.experiment import check_place, save_measures
from calm.released_commands.flags import Flags, Log
from calm.released_commands.weights import load_model, released_subject, test_split

__all__ = ["Measures", "cue_location", "measure", "remove_and_classify"]

INTERVAL = 0.001
COUNTS = (1, 2, 3)


def cue_location(flags: Flags) -> None:
    """Print the released figures and the right ones; cue_PROCESS.json and .pickle hold them, pair by pair.

    The released figures count all pairs so far as one, and leave out pixels below the lowest threshold; ours do
    neither, and stand beside them.

    Raises:
        CalmError: another data set than CUB; a checkpoint, a map or data that cannot be evaluated.
    """
    if flags.dataset_name != "CUB":
        raise CalmError(f"--dataset={flags.dataset_name}: cue localization needs the parts of CUB's birds")
    if flags.cam_curve_interval != INTERVAL:
        raise CalmError(
            f"--cam_curve_interval={flags.cam_curve_interval}: cue localization has {INTERVAL} only"
        )
    check_place(flags)
    model = load_model(flags)
    subject = released_subject(flags, model)
    cub = flags.images / flags.dataset_name
    split = _segmented(test_split(flags, model), cub)
    flags.folder.mkdir(parents=True, exist_ok=True)
    log = Log(flags.folder / "log.log")
    log(str(flags))
    result = cue_localization(
        subject, split, cub, batch_size=flags.batch_size, workers=flags.workers, seed=flags.seed or 0
    )
    for count in COUNTS:
        log(f"Start class pairs with the number of different parts to be {count}")
        for pair in result.details["pairs"]:
            if len(pair["groups"]) == count:
                log(f"Mask AUC on split test: {100 * pair['pxap_published']}")
    published, strict = ([_mean(result, ending, count) for count in COUNTS] for ending in ("_published", ""))
    process = flags.score_map_process
    log(f"\n{flags.architecture}, {process} : {published}\n")
    log(f"the same, every pair by itself and every pixel counted: {strict}")
    test = {f"test/cue_{count}": value for count, value in zip(COUNTS, published, strict=True)}
    save_measures(
        flags.folder / f"cue_{process}", {**test, "strict": strict, "pairs": result.details["pairs"]}
    )


def _mean(result: Result, ending: str, count: int) -> float:
    """mPxAP in percent, two digits; NaN if no pair differs in ``count`` groups."""
    figure = result.figures.get(f"mpxap{ending}_{count}")
    return float("nan") if figure is None else round(100 * figure.value, 2)


def _segmented(split: Split, cub: Path) -> Split:
    """The split with the birds' segmentations, which the metadata lists do not name.

    Raises:
        CalmError: there is no folder of segmentations, without which the released figures cannot be had.
    """
    folder = cub / "segmentations"
    if not folder.is_dir():
        raise CalmError(
            f"no {folder}: cue localization needs CUB's segmentations, a separate official download"
        )
    records = tuple(
        replace(record, masks=(folder / PurePosixPath(record.id).with_suffix(".png"),))
        for record in split.records
    )
    return replace(split, records=records)


Measures: TypeAlias = dict[str, list[bool] | dict[float, list[bool]]]
"""As the released pickle has them: for each test image whether the prediction is right, on the whole image (``preds``)
and, by the share erased, without the highest-scored (``preds-topk``) and random pixels (``preds-random``)."""

EVERY = 50
"""Batches between two lines of progress."""


def remove_and_classify(flags: Flags) -> None:
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
    """What `calm.evaluate.erasing` sums up, kept for each image, as the released code keeps it."""
    whole: list[bool] = []
    erased: dict[str, list[list[bool]]] = {"topk": [], "random": []}
    read = batches(split, subject.preprocessing, subject.device, batch_size=batch_size, workers=workers)
    for number, (images, labels, indices) in enumerate(read, start=1):
        keys, labels = indices.to(subject.device), labels.to(subject.device)
        prediction = subject.predict(images)
        whole += (prediction.probs.argmax(dim=1) == labels).tolist()
        grid = prediction.maps(labels[:, None])[:, 0]
        maps = resize_and_normalize(grid, (images.shape[-2], images.shape[-1]), subject.normalization)
        random = random_order(keys, images.shape[-2] * images.shape[-1], seed)
        orders = {"topk": erasing_order(maps, random), "random": random}
        for name, order in orders.items():
            right, _ = after_erasing(
                lambda batch: subject.predict(batch).probs,
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
