"""eval_cue_location.py: does the difference of two classes' maps lie on the part that tells them apart?"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

from calm.data.records import Split
from calm.errors import CalmError
from calm.evaluate.cue_localization import cue_localization
from calm.evaluate.result import Result
from calm.released_commands.data import test_split
from calm.released_commands.experiment import check_place, save_measures
from calm.released_commands.flags import Flags
from calm.released_commands.subject import released_subject
from calm.released_commands.terminal import Log
from calm.released_commands.weights import load_model

__all__ = ["main"]

INTERVAL = 0.001
COUNTS = (1, 2, 3)


def main(flags: Flags) -> None:
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
