"""The released evaluations: eval_pixel_perturb.py (remove-and-classify) and eval_cue_location.py (cue localization)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import torch
from torch import Tensor

from calm.data.records import Split
from calm.errors import CalmError
from calm.evaluate.cue_localization import cue_localization
from calm.evaluate.erasing import after_erasing, ranked_batches
from calm.evaluate.result import Result
from calm.evaluate.subject import Subject
from calm.metrics.erasing import FRACTIONS
from calm.released_commands.experiment import check_place, save_measures
from calm.released_commands.flags import Flags, Log
from calm.released_commands.weights import load_model, released_subject, test_split

INTERVAL = 0.001  # distance of the thresholds, the only one that cue localization has

COUNTS = (1, 2, 3)  # numbers of part groups that the two classes of a pair differ in


def cue_location(flags: Flags) -> None:
    """Print the released figures and the exact ones; write them, pair by pair, to cue_PROCESS.json and .pickle.

    The released figures pool the pixels of a pair with those of all pairs before it, and leave out pixels below the
    lowest threshold; the exact ones do neither.

    Raises:
        CalmError: another data set than CUB; a checkpoint, a map or data that cannot be evaluated.
    """
    if flags.dataset_name != "CUB":
        raise CalmError(f"--dataset={flags.dataset_name}: cue localization needs the parts of CUB's birds")
    if flags.cam_curve_interval != INTERVAL:
        raise CalmError(f"--cam_curve_interval={flags.cam_curve_interval}: cue localization has {INTERVAL} only")
    subject, split = _subject_and_split(flags)
    cub = flags.images / flags.dataset_name
    split = _segmented(split, cub)
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
    save_measures(flags.folder / f"cue_{process}", {**test, "strict": strict, "pairs": result.details["pairs"]})


def _subject_and_split(flags: Flags) -> tuple[Subject, Split]:
    """Return the subject and the test images, before the experiment's folder is made."""
    check_place(flags)
    model = load_model(flags)
    return released_subject(flags, model), test_split(flags, model)


def _mean(result: Result, ending: str, count: int) -> float:
    """Return mPxAP in percent, rounded to two digits; NaN if no pair differs in ``count`` groups."""
    figure = result.figures.get(f"mpxap{ending}_{count}")
    return float("nan") if figure is None else round(100 * figure.value, 2)


def _segmented(split: Split, cub: Path) -> Split:
    """Add CUB's segmentations, which the metadata lists do not name, to the records of a split."""
    folder = cub / "segmentations"
    if not folder.is_dir():
        raise CalmError(f"no {folder}: cue localization needs CUB's segmentations, a separate official download")
    masks = [folder / PurePosixPath(record.id).with_suffix(".png") for record in split.records]
    records = (replace(record, masks=(mask,)) for record, mask in zip(split.records, masks, strict=True))
    return replace(split, records=tuple(records))


Measures: TypeAlias = dict[str, Any]
"""The content of the released pickle: whether the prediction of each test image is right, for the whole image
(``preds``), and by the share erased without the highest-scored (``preds-topk``) and random ones (``preds-random``)."""

PROGRESS_EVERY = 50  # batches between two lines of progress


def remove_and_classify(flags: Flags) -> None:
    """Write measure_PROCESS.pickle and .json to the experiment's folder, and print R_k.

    The folder is made if there is none. Nothing in it is deleted, whatever ``--override_cache`` says.

    Raises:
        CalmError: a checkpoint, a map or data that cannot be evaluated.
    """
    subject, split = _subject_and_split(flags)
    flags.folder.mkdir(parents=True, exist_ok=True)
    log = Log(flags.folder / "log.log")
    log(f"{flags}\nstart! {flags.score_map_process}")
    measures = measure(
        subject, split, batch_size=flags.batch_size, workers=flags.workers, seed=flags.seed or 0, log=log
    )
    save_measures(flags.folder / f"measure_{flags.score_map_process}", measures)
    topk, random = (measures[f"preds-{order}"] for order in ("topk", "random"))
    for share in FRACTIONS:
        right = sum(random[share])
        # No image right without random pixels: the released code ends in a division by zero.
        ratio = sum(topk[share]) / right if right else float("nan")
        log(f"erase_k: {share}, prediction ratio w.r.t. random erase: {ratio:.04f}")


@torch.no_grad()
def measure(
    subject: Subject, split: Split, *, batch_size: int, workers: int, seed: int, log: Log | None = None
) -> Measures:
    """Return what `calm.evaluate.remove_and_classify` sums up, for each image, with one draw of random pixels."""

    def classify(images: Tensor) -> Tensor:
        return subject.predict(images).probs

    right: list[bool] = []
    erased: dict[str, list[Tensor]] = {"topk": [], "random": []}
    batches = ranked_batches(subject, split, "label", "zero", seed, batch_size=batch_size, workers=workers)
    for number, ranked in enumerate(batches, start=1):
        images, labels, _, prediction = ranked.batch
        right += (prediction.probs.argmax(dim=1) == labels).tolist()
        for name, order in (("topk", ranked.order), ("random", ranked.random)):
            hits, _ = after_erasing(classify, images, order, ranked.filler, labels, FRACTIONS)
            erased[name].append(hits)
        if log is not None and number % PROGRESS_EVERY == 0:
            log(f"Iteration: {number}")
    columns = {name: torch.cat(parts).T.tolist() for name, parts in erased.items()}
    return {"preds": right} | {
        f"preds-{name}": dict(zip(FRACTIONS, shares, strict=True)) for name, shares in columns.items()
    }
