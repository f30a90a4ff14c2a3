"""Data sets: readers of several layouts, checks, augmentation, the torch data set. Names are loaded when first used."""

from typing import TYPE_CHECKING

from calm.errors import lazy_names

if TYPE_CHECKING:
    from calm.data.augmentation import AUGMENTATIONS as AUGMENTATIONS, Augmentation as Augmentation
    from calm.data.check import check_splits as check_splits, drop_bad as drop_bad, load_checked as load_checked
    from calm.data.dataset import EpochSampler as EpochSampler, ImageDataset as ImageDataset
    from calm.data.loading import (
        LAYOUTS as LAYOUTS,
        detect_layout as detect_layout,
        fingerprint as fingerprint,
        load_split as load_split,
        load_splits as load_splits,
        match_classes as match_classes,
        summary as summary,
    )
    from calm.data.records import SPLITS as SPLITS, Box as Box, Record as Record, Report as Report, Split as Split
    from calm.data.transforms import (
        BatchMix as BatchMix,
        eval_transform as eval_transform,
        train_transform as train_transform,
    )

_MODULES = {
    "augmentation": "AUGMENTATIONS Augmentation",
    "check": "check_splits drop_bad load_checked",
    "dataset": "EpochSampler ImageDataset",
    "loading": "LAYOUTS detect_layout fingerprint load_split load_splits match_classes summary",
    "records": "SPLITS Box Record Report Split",
    "transforms": "BatchMix eval_transform train_transform",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
