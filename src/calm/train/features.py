"""A frozen backbone: its features of every image, computed once and kept in files, and the head that trains on them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from calm.data.dataset import ImageDataset
from calm.data.loading import fingerprint
from calm.errors import CalmError
from calm.files import atomic_path
from calm.latent import widen
from calm.model import CalmModel
from calm.train.config import TrainConfig

FOLDER = "features"
"""The folder of the feature files in a run's folder, while the run is not finished; `feature_dir` is another."""


LARGEST_HALF = 65504
"""The largest finite number in half precision."""


class FeatureDataset(ImageDataset):
    """The features of a split's images as (features, label, index): float16 (h, w, D), class index, position.

    Epoch t gives the view t modulo V: the image as it is augmented in that epoch. They are read from a memory-mapped
    file, so that memory does not grow with the number of images.

    Args:
        images: the images that the features are of.
        features: (V, N, h, w, D) in float16.
    """

    def __init__(self, images: ImageDataset, features: NDArray[np.float16]) -> None:
        super().__init__(images.split, images.transform, seed=images.seed, preprocessing=images.preprocessing)
        self.features = features

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        """Return the features of an image in the view of the current epoch."""
        values = self.features[self.epoch % len(self.features), index]
        return torch.from_numpy(values.copy()), self.split.records[index].label, index


class HeadModel(CalmModel):
    """A model of cached features (B, h, w, D) with the head of another model, which drops channels in training."""

    def __init__(self, model: CalmModel, dropout: float) -> None:
        about = {"class_names": model.class_names, "preprocessing": model.preprocessing}
        super().__init__(model.config, nn.Dropout2d(dropout), model.head, **about)  # type: ignore[arg-type]

    def encode(self, images: Tensor) -> Tensor:
        """Return features as a backbone would, (B, D, h, w), in the precision that the head computes with."""
        half = torch.is_autocast_enabled(images.device.type)
        dtype = torch.get_autocast_dtype(images.device.type) if half else self.head.conv_last.weight.dtype
        dropped: Tensor = self.backbone(images.to(dtype).permute(0, 3, 1, 2))
        return dropped


def cache_features(
    model: CalmModel,
    datasets: Mapping[str, ImageDataset],
    config: TrainConfig,
    run_dir: Path,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Callable[[int, int], None],
    log: Callable[[str], None],
) -> dict[str, FeatureDataset]:
    """Compute the frozen backbone's features of all images into files of a folder, or take those that are there.

    A file is named by what its features depend on, so that runs may share a folder; it takes its name when it is whole.

    Args:
        model: its backbone is in eval mode while it runs.
        datasets: of train, whose views are the first ``config.model.views`` epochs' augmentations, val and test.
        config: the run's; the files are in its ``model.feature_dir``, and without one in RUN/features.
        run_dir: the run's folder.
        autocast: makes the context in which the backbone runs, of the run's precision.
        progress: called with the images that are done and all of them, views counted.
        log: called with a warning if features had to be clipped to half precision, and with what is taken from a
            shared folder.

    Raises:
        CalmError: the files would not fit on the disk, or take more than ``config.model.feature_gib``.
    """
    backbone = model.optimized_for_inference().backbone
    folder = config.model.feature_dir or run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    views = {name: config.model.views if name == "train" else 1 for name in datasets}
    total = sum(count * len(datasets[name]) for name, count in views.items())
    done = 0
    found: dict[str, FeatureDataset] = {}

    def halved(images: Tensor) -> tuple[NDArray[np.float16], int]:
        """Return features (B, h, w, D) in half precision, and of how many images some had to be clipped."""
        with torch.no_grad(), autocast():
            wide = widen(backbone(images.to(model.device)))
        clipped = int((wide.abs() > LARGEST_HALF).flatten(1).any(dim=1).sum())
        half: NDArray[np.float16] = wide.clamp(-LARGEST_HALF, LARGEST_HALF).half().permute(0, 2, 3, 1).cpu().numpy()
        return half, clipped

    for name, dataset in datasets.items():
        path = folder / f"{name}-{_digest(model, dataset, config, views[name])}.npy"
        dataset.set_epoch(0)
        first = halved(dataset[0][0][None])[0][0]
        shape = (views[name], len(dataset), *first.shape)
        if not _holds(path, shape, first):
            limit = config.model.feature_gib
            if total * first.nbytes > limit * 2**30:
                raise _too_large(total * first.nbytes, f"model.feature_gib allows {limit:g}: raise it,")
            _check_space(folder, (total - done) * first.nbytes)  # what is done lies there
            loader = DataLoader(dataset, 32, num_workers=config.reading.processes, generator=torch.Generator())
            all_clipped = 0
            with atomic_path(path) as temporary:
                features = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
                for view in range(views[name]):
                    dataset.set_epoch(view)
                    for images, _, indices in loader:
                        features[view, indices.numpy()], clipped = halved(images)
                        all_clipped += clipped
                        progress(done := done + len(images), total)
                features.flush()
            dataset.set_epoch(0)
            if all_clipped:
                log(
                    f"warning: features of {all_clipped} of {views[name] * len(dataset)} images ({name}) lie beyond "
                    f"{LARGEST_HALF}, the range of half precision, and were clipped: predictions on images, which "
                    "are not, will differ; another layer or model.weights may suit better"
                )
        else:
            progress(done := done + views[name] * len(dataset), total)
            if config.model.feature_dir:
                log(f"features of the {name} images are those of {path}")
        found[name] = FeatureDataset(dataset, np.load(path, mmap_mode="r"))
    return found


def remove_features(run_dir: Path) -> None:
    """Delete the feature files of a finished run."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def _digest(model: CalmModel, dataset: ImageDataset, config: TrainConfig, views: int) -> str:
    """Return a name for what the features depend on: the images in their order, how they are prepared, the network."""
    digest = hashlib.sha256(fingerprint(dataset.split, file_sizes=True).encode())
    about: list[Any] = [
        [record.id for record in dataset.split.records],
        dataset.split.exif,
        asdict(model.preprocessing),
    ]
    about += [model.config.backbone, repr(model.backbone), config.hardware.precision]
    if dataset.split.name == "train":  # the only one that is augmented
        about += [asdict(config.augment), config.seed, views]
    digest.update(json.dumps(about, default=str).encode())
    for tensor in model.backbone.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _holds(path: Path, shape: tuple[int, ...], first: NDArray[np.float16]) -> bool:
    """Return whether a file has features of this shape, the first image's among them (h, w, D): a backbone of one's own
    may compute something else with the weights and layers of another, which its name does not tell."""
    if not path.is_file():
        return False
    found = np.load(path, mmap_mode="r")
    if found.shape != shape or found.dtype != np.float16:
        return False
    there, here = found[0, 0].astype(np.float32), first.astype(np.float32)
    return float(np.abs(there - here).max()) <= 0.1 * float(np.abs(here).max())  # batches and devices round otherwise


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise _too_large(needed, f"{folder} has {free / 2**30:.1f} GiB free: choose another --model.feature_dir,")


def _too_large(needed: int, limit: str) -> CalmError:
    """Return the error for files of ``needed`` bytes; ``limit`` is the start of its second half."""
    fixes = "fewer model.views, or a coarser grid (model.output_stride, reading.image_size)"
    return CalmError(f"the features of all images and views need {needed / 2**30:.1f} GiB, and {limit} {fixes}")
