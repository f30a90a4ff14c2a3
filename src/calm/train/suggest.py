"""What to train on a folder of pictures: a command, and the reason for each of its flags (`calm train --suggest`)."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from statistics import median

from calm.backbones.weights import packaged_weights
from calm.data.loading import load_splits
from calm.data.records import Split
from calm.errors import CalmError
from calm.images import image_size
from calm.inference import resolve_device
from calm.train.config import IMBALANCE, TrainConfig
from calm.train.settings import preset

SAMPLE = 200  # pictures whose sizes are looked at
LEAST_SIDE = 96  # pixels of pictures on whose enlargement to 224 a network that was trained on photographs still works
LEAST_STEPS = 600  # of a network that starts from random weights


def suggest(config: TrainConfig) -> str:
    """Return a command that suits the data of a configuration, what they are, and why each flag.

    It looks at numbers of images and classes, at sizes of pictures, at the pretrained weights that are installed and at
    the processor; of ``config`` it reads where the data are and how they are laid out.

    Raises:
        CalmError: the data cannot be read, or have no pictures.
    """
    names = ("layout", "metadata_root", "val_fraction", "present_classes_only")
    reading = {name: getattr(config.reading, name) for name in names}
    splits = load_splits(config.data, strict=False, **reading)
    train = splits["train"]
    sizes = [size for record in train.records[:: len(train.records) // SAMPLE + 1] if (size := image_size(record.path))]
    if not sizes:
        raise CalmError(f"no picture of {config.data} can be read: `calm data check {config.data}` says why")
    sides = sorted(min(size) for size in sizes)
    flags = [*_flags(train, splits["val"], round(median(sides))), *_given(config)]
    words = ["calm", "train", flags[0][0], "--data", shlex.quote(str(config.data)), *(flag for flag, _ in flags[1:])]
    width = max(len(flag) for flag, why in flags if why)
    counts = ", ".join(f"{len(split.records):,} {name}" for name, split in splits.items())
    carved = [split.name for split in splits.values() if " of train, by class" in split.origin]
    made = f" ({' and '.join(carved)} taken from train, class by class, the same ones every time)" if carved else ""
    about = f"{config.data}: {sum(map(bool, train.class_counts()))} classes with images, {counts} images{made}"
    shown = f"shorter sides of {sides[0]} to {sides[-1]} pixels, half of them up to {median(sides):.0f}"
    reasons = "\n".join(f"  {flag:<{width}}  {why}" for flag, why in flags if why)
    return f"{about}; {shown}\n\n  {' '.join(words)}\n\n{reasons}"


def _given(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield the flags, without a reason, that say where the data are and where the run goes."""
    named = {"reading.layout": config.reading.layout, "reading.metadata_root": config.reading.metadata_root}
    for name, value in {**named, "out": config.run_dir}.items():
        if value not in (None, "auto"):
            yield f"--{name} {shlex.quote(str(value))}", ""


def _flags(train: Split, val: Split, side: int) -> Iterator[tuple[str, str]]:
    """Yield each flag with its reason, the preset first; ``side`` is the usual shorter side of a picture in pixels."""
    images = len(train.records)
    batch = min(64, 2 ** int(math.log2(max(4, images / 8))))
    if side >= LEAST_SIDE and packaged_weights("tf_efficientnet_lite0"):
        yield "--preset probe", "photographs, and ImageNet weights are installed: only the head is trained, in minutes"
        backbone = preset("probe", "--data=.")
    elif side >= LEAST_SIDE and resolve_device().type == "cuda":
        yield "--backbone resnet50", "photographs and a GPU: the paper's recipe, whose weights are downloaded once"
        backbone = TrainConfig(train.root)
    else:
        why = "small pictures" if side < LEAST_SIDE else "neither a GPU nor pretrained weights"
        more = "" if side < LEAST_SIDE else "; after pip install 'calm[offline]' --preset probe is better and quicker"
        yield "--preset small", f"{why}: a small network from scratch{more}"
        backbone = preset("small", "--data=.")
        size = max((size for size in (32, 64, 96, 128) if size <= side), default=32)
        if size != backbone.reading.image_size:
            yield f"--reading.image_size {size}", f"the pictures have {side} pixels; a larger size makes a finer grid"
        epochs = min(200, math.ceil(LEAST_STEPS / max(1, images // batch)))
        if epochs > backbone.epochs:
            yield (f"--epochs {epochs}", f"{epochs * (images // batch)} steps: a network from scratch takes many")
    if batch != backbone.batch_size:
        yield f"--batch_size {batch}", f"{images} training images: {images // batch} steps an epoch"
    counts = [count for count in train.class_counts() if count]
    if len(counts) < train.num_classes:
        yield "--reading.present_classes_only true", f"{len(counts)} of {train.num_classes} classes have images"
    if max(counts) >= IMBALANCE * min(counts):
        yield ("--reading.balance true", f"classes have {min(counts)} to {max(counts)} images: all are drawn as often")
    if " of train, by class" in val.origin and len(val.records) < 50:
        yield "--reading.val_fraction 0.2", f"{len(val.records)} validation images are few to choose the best epoch by"
