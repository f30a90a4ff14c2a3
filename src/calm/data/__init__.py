"""Data sets: readers of several layouts, checks, augmentation, and the torch data set.

Names are loaded when first used; importing this package costs nothing.
"""

from typing import TYPE_CHECKING

from calm.errors import lazy_names

if TYPE_CHECKING:
    from calm.data.augmentation import AUGMENTATIONS as AUGMENTATIONS
    from calm.data.augmentation import Augmentation as Augmentation
    from calm.data.check import check_splits as check_splits
    from calm.data.check import drop_bad as drop_bad
    from calm.data.check import load_checked as load_checked
    from calm.data.dataset import EpochSampler as EpochSampler
    from calm.data.dataset import ImageDataset as ImageDataset
    from calm.data.loading import LAYOUTS as LAYOUTS
    from calm.data.loading import detect_layout as detect_layout
    from calm.data.loading import fingerprint as fingerprint
    from calm.data.loading import load_split as load_split
    from calm.data.loading import load_splits as load_splits
    from calm.data.loading import match_classes as match_classes
    from calm.data.loading import summary as summary
    from calm.data.records import SPLITS as SPLITS
    from calm.data.records import Box as Box
    from calm.data.records import Record as Record
    from calm.data.records import Report as Report
    from calm.data.records import Split as Split
    from calm.data.transforms import BatchMix as BatchMix
    from calm.data.transforms import eval_transform as eval_transform
    from calm.data.transforms import train_transform as train_transform

_MODULES = {
    "augmentation": "AUGMENTATIONS Augmentation",
    "check": "check_splits drop_bad load_checked",
    "dataset": "EpochSampler ImageDataset",
    "loading": "LAYOUTS detect_layout fingerprint load_split load_splits match_classes summary",
    "records": "SPLITS Box Record Report Split",
    "transforms": "BatchMix eval_transform train_transform",
}
__getattr__, __dir__, __all__ = lazy_names(__name__, _MODULES)
