"""Everything that is measured for a report on two models of the same data: once, before any page is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm.baselines import attribute
from calm.checkpoint import load
from calm.data.cue_files import read_pairs
from calm.data.cues import CUB_GROUPS, PROTOCOL_SIZE, CuePair
from calm.data.dataset import ImageDataset
from calm.data.records import Split
from calm.data.transforms import eval_transform
from calm.maps import difference
from calm.model import CalmModel
from calm.output import CalmOutput
from calm.render import Picture
from calm.report.names import species_name
from calm.report.pointing import CHUNK, CueTask, Pointing, point, read_task
from calm.report.runs import Run

__all__ = ["Study", "measure"]

Progress = Callable[[str], None]


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
        task: pairs of species that differ in one part, and where it is.
        pointing: by method, how it did there.
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
    task: CueTask
    pointing: dict[str, Pointing]
    pairs: dict[tuple[int, int], CuePair]

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """True classes of the test images."""
        return torch.tensor([record.label for record in self.dataset.split.records])

    @property
    def names(self) -> list[str]:
        """Names of the classes, as people write them."""
        return [species_name(name) for name in self.dataset.split.class_names]

    def images(self, indices: Int[Tensor, " b"]) -> Float[Tensor, "b 3 H W"]:
        """Test images as the models see them."""
        return _images(self.dataset, indices)

    def picture(self, index: int) -> Picture:
        """A test image as people see it."""
        return np.asarray(self.dataset.picture(index))

    def differing(self, one: int, other: int) -> list[str]:
        """Names of the part groups in which two classes differ."""
        pair = self.pairs.get((min(one, other), max(one, other)))
        return [CUB_GROUPS[group].name for group in pair.groups] if pair else []


def measure(root: Path, split: Split, calm_run: Run, cam_run: Run, progress: Progress) -> Study:
    """Load the best weights of two runs and test them.

    Args:
        root: of a data set in the layout of CUB_200_2011, with segmentations.
        split: its test split.
        calm_run: a run of CALM-EM or CALM-ML.
        cam_run: a run of CAM on the same data.
        progress: told what is being measured.
    """
    calm, cam = load(calm_run.folder), load(cam_run.folder)
    dataset = ImageDataset(split, eval_transform(calm.preprocessing), cache=True)
    progress("predictions")
    calm_probs, sum_error = _predict(calm, dataset)
    cam_probs, _ = _predict(cam, dataset)
    progress("the parts that tell species apart")
    task = read_task(split, root)
    pointing = {}
    for run, model, how in ((calm_run, calm, "clipping"), (cam_run, cam, "minmax")):
        progress(f"difference maps of {run.label}")
        pointing[run.label] = point(task, _Difference(model, dataset), how)  # type: ignore[arg-type]
    progress("difference maps of the plain gradient")
    pointing["Gradient"] = point(task, _Difference(cam, dataset, "gradient"), "minmax")
    pairs = {(pair.first, pair.second): pair for pair in read_pairs(root, range(1, len(CUB_GROUPS) + 1))}
    return Study(
        root, dataset, calm, cam, calm_run, cam_run, calm_probs, cam_probs, sum_error, task, pointing, pairs
    )


@dataclass(frozen=True)
class _Difference:
    """Difference maps of a model: of its own maps on the grid, or of a baseline's for the two classes."""

    model: CalmModel
    dataset: ImageDataset
    baseline: str = ""

    def __call__(self, image: Tensor, first: Tensor, second: Tensor) -> Tensor:
        images = _images(self.dataset, image)
        if not self.baseline:
            return self.model.difference(images, first, second, size=PROTOCOL_SIZE)
        maps = [
            attribute(self.model, images, classes, self.baseline, batch_size=CHUNK, size=PROTOCOL_SIZE)
            for classes in (first, second)
        ]
        return difference(*maps)


def _images(dataset: ImageDataset, indices: Tensor) -> Tensor:
    return torch.stack([dataset[index][0] for index in indices.tolist()])


@torch.no_grad()
def _predict(model: CalmModel, dataset: ImageDataset) -> tuple[Tensor, float]:
    """p(y | x) of all images; and for CALM, how far a joint map's sum is from it at most."""
    probs, error = [], 0.0
    for indices in torch.split(torch.arange(len(dataset)), CHUNK):
        output = model(_images(dataset, indices))
        probs.append(output.probs)
        if isinstance(output, CalmOutput):
            error = max(error, float((output.joint.sum(dim=(-2, -1)) - output.probs).abs().max()))
    return torch.cat(probs), error
