"""Everything that is measured for a report on two models of the same data: once, before any page is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calm.checkpoint import load
from calm.data.cue_files import read_pairs
from calm.data.cues import CUB_GROUPS, CuePair, group_mask
from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.transforms import eval_transform
from calm.errors import CalmError
from calm.evaluate.cue_data import CueData, read_cue_data
from calm.evaluate.result import Result
from calm.evaluate.runner import Data, run
from calm.evaluate.subject import Subject, model_subject
from calm.evaluate.tables import write_tables
from calm.metrics.bootstrap import REPLICATES
from calm.model import CalmModel
from calm.output import CalmOutput
from calm.render import Picture
from calm.report.names import species_name
from calm.report.runs import Run

__all__ = ["GRADIENT", "Cue", "Study", "measure"]

Progress = Callable[[str], None]

CUES = "cue-localization"
BENCHMARKS = (CUES, "remove-and-classify", "localization", "classification")
"""Those on the page, in its order."""
GRADIENT = "Plain gradient of CAM"
"""A row of cue localization beside the two models' own maps."""
BATCH = 64


@dataclass(frozen=True)
class Cue:
    """A pair of species that differ in one part.

    Attributes:
        number: its place among the pairs of cue localization.
        pair: the two classes, and the part.
        maps: how many difference maps it asks for: test images of the two that show the part.
        figures: of each method its ``peak_in_part``, ``mass_in_part``, and their chance levels ``part_of_image`` and
            ``part_of_object``, means over these maps.
    """

    number: int
    pair: CuePair
    maps: int
    figures: Mapping[str, Mapping[str, float]]

    @property
    def part(self) -> str:
        """The name of the part."""
        return CUB_GROUPS[self.pair.groups[0]].name


@dataclass(frozen=True)
class Study:
    """Two models, their test images, and what came out.

    Attributes:
        root: of the data set.
        dataset: the test images, prepared for both models.
        calm: a CALM model, in evaluation mode.
        cam: a CAM model, in evaluation mode.
        calm_run: the training of ``calm``.
        cam_run: the training of ``cam``.
        calm_probs: p(y | x) of every test image, (n, C).
        cam_probs: the same of the CAM model.
        sum_error: the largest difference, over all images and classes, of the sum of a joint map to p(y | x).
        cues: pairs of species that differ in few parts, and where these are.
        benchmarks: by name, its results: of both runs' labels, and in cue localization of `GRADIENT`.
        data: what the results say about the data set.
        pairs: all pairs of species and the part groups in which they differ.
    """

    root: Path
    dataset: ImageDataset
    calm: CalmModel
    cam: CalmModel
    calm_run: Run
    cam_run: Run
    calm_probs: Float[Tensor, "n c"]
    cam_probs: Float[Tensor, "n c"]
    sum_error: float
    cues: CueData
    benchmarks: Mapping[str, tuple[Result, ...]]
    data: Mapping[str, Any]
    pairs: dict[tuple[int, int], CuePair]

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """True classes of the test images."""
        return torch.tensor([record.label for record in self.dataset.split.records])

    @property
    def names(self) -> list[str]:
        """Names of the classes, as people write them."""
        return [species_name(name) for name in self.dataset.split.class_names]

    @property
    def pointing(self) -> dict[str, Result]:
        """Cue localization by method."""
        return {result.label: result for result in self.benchmarks[CUES]}

    @property
    def single(self) -> list[Cue]:
        """The pairs that differ in one part, of which an image shows it."""
        details = {label: result.details["pairs"] for label, result in self.pointing.items()}
        first = next(iter(details.values()))
        return [
            Cue(number, pair, first[number]["shown"], {name: rows[number] for name, rows in details.items()})
            for number, pair in enumerate(self.cues.pairs)
            if len(pair.groups) == 1 and first[number]["shown"]
        ]

    def images(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b 3 H W"]:
        """Test images as the models see them."""
        return _images(self.dataset, indices)

    def picture(self, index: int) -> Picture:
        """A test image as people see it."""
        return np.asarray(self.dataset.picture(index))

    def truth(self, cue: Cue, images: Sequence[int]) -> Bool[Tensor, "b H W"]:
        """The pixels of the part that differs, in some images, at the size of the protocol."""
        regions = self.cues.regions(self.dataset.split.records, torch.tensor(images))
        return group_mask(regions, cue.pair.groups)

    def differing(self, one: int, other: int) -> list[str]:
        """Names of the part groups in which two classes differ."""
        pair = self.pairs.get((min(one, other), max(one, other)))
        return [CUB_GROUPS[group].name for group in pair.groups] if pair else []


def measure(root: Path, split: Split, calm_run: Run, cam_run: Run, out: Path, progress: Progress) -> Study:
    """Load the best weights of two runs and test them.

    Args:
        root: of a data set in the layout of CUB_200_2011, with segmentations.
        split: its test split.
        calm_run: a run of CALM-EM or CALM-ML.
        cam_run: a run of CAM on the same data.
        out: folder of the benchmarks' results; those that are there already are not computed again.
        progress: told what is being measured.

    Raises:
        CalmError: no two classes differ in one part, or no image shows it.
    """
    calm, cam = load(calm_run.folder), load(cam_run.folder)
    dataset = ImageDataset(split, eval_transform(calm.preprocessing), cache=True)
    progress("predictions")
    calm_probs, sum_error = _predict(calm, dataset)
    cam_probs, _ = _predict(cam, dataset)
    data = Data.of(split, root)
    found = _benchmarks(
        data,
        {calm_run.label: _subject(calm, calm_run), cam_run.label: _subject(cam, cam_run)},
        {GRADIENT: _subject(cam, cam_run, "gradient")},
        out,
        progress,
    )
    if any("peak_in_part" not in result.figures for result in found[CUES]):
        raise CalmError(f"no test image of {root} shows a part that tells two classes apart: try more images")
    cues = read_cue_data(split, root)
    pairs = {(pair.first, pair.second): pair for pair in read_pairs(root, range(1, len(CUB_GROUPS) + 1))}
    return Study(
        root,
        dataset,
        calm,
        cam,
        calm_run,
        cam_run,
        calm_probs,
        cam_probs,
        sum_error,
        cues,
        found,
        data.facts,
        pairs,
    )


def _subject(model: CalmModel, run: Run, method: str | None = None) -> Subject:
    return model_subject(model, method=method, about={"model": str(run.folder.resolve())})


def _benchmarks(
    data: Data, models: Mapping[str, Subject], others: Mapping[str, Subject], out: Path, progress: Progress
) -> dict[str, tuple[Result, ...]]:
    """All results, with the options of ``calm evaluate``, stored as it does, and called as the page calls them."""
    asked = [
        (name, label, subject)
        for name in BENCHMARKS
        for label, subject in ({**models, **others} if name == CUES else models).items()
    ]
    results: list[Result] = []
    for name, label, subject in asked:
        progress(f"{name.replace('-', ' ')} of {label} ({len(results) + 1} of {len(asked)})")
        results.append(run(name, subject, data, out, batch_size=BATCH, replicates=REPLICATES, seed=0))
    write_tables(results, out)
    found: dict[str, tuple[Result, ...]] = dict.fromkeys(BENCHMARKS, ())
    for (name, label, _), result in zip(asked, results, strict=True):
        found[name] += (replace(result, label=label),)
    return found


def _images(dataset: ImageDataset, indices: Tensor) -> Tensor:
    return torch.stack([dataset[index][0] for index in indices.tolist()])


@torch.no_grad()
def _predict(model: CalmModel, dataset: ImageDataset) -> tuple[Tensor, float]:
    """p(y | x) of all images; and for CALM, how far a joint map's sum is from it at most."""
    probs, error = [], 0.0
    for indices in torch.split(torch.arange(len(dataset)), BATCH):
        output = model(_images(dataset, indices))
        probs.append(output.probs)
        if isinstance(output, CalmOutput):
            error = max(error, float((output.joint.sum(dim=(-2, -1)) - output.probs).abs().max()))
    return torch.cat(probs), error
