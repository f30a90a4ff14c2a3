"""Configuration of a training run: frozen dataclasses, from which flags, YAML files and docs are made.

The defaults are the recipe of the released code (paper, section 5; SGD with Nesterov momentum, batch 64, 40 epochs,
ten times the rate for the new layers). `calm.train.settings` reads files, presets and flags.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

from calm.config import (
    Interpolation,
    Method,
    PriorActivation,
    PriorDenominator,
    WsolOptions,
    check_options,
    check_pooling,
)
from calm.data.augmentation import Augmentation
from calm.errors import CalmError, shown, unknown
from calm.files import processors

Schedule: TypeAlias = Literal["step", "released-step", "cosine", "one-cycle", "constant"]
Grouping: TypeAlias = Literal["head", "released"]


MOST, LARGEST = 1e9, 1e38  # limits of counts and of quantities that have no other: infinity is not allowed
IMBALANCE = 3.0  # of the largest class's images to the smallest's, from which on it is worth a word


@dataclass(frozen=True)
class DataOptions:
    """Where the images come from and how they are read.

    Attributes:
        layout: how the data folder is laid out; ``auto`` looks.
        metadata_root: folder of the metadata lists, where they are not beside the images.
        val_fraction: share of the training images, the same in every class, that becomes the validation split
            where the data has none; a test split of the same size is taken too, where there is none.
        balance: draw the training images of an epoch at random, so that every class comes equally often, instead of
            each image once. Probabilities are then those of classes that are equally frequent.
        present_classes_only: number only the classes that have images; otherwise class indices stay the source's.
        image_size: height and width in pixels that the model sees; by default 224, or what a network takes
            that takes no other.
        channels: channels of the images that the model sees: 3 for RGB, 1 for grey, else the bands of TIFF files.
        bits: bits that the values of files of more than 8 bits use; by default as many as the files say.
        mean: mean of each channel in [0, 1], as [0.1,0.2]; by default ImageNet's.
        std: standard deviation of each channel; by default ImageNet's.
        interpolation: filter that resizes images, ``bilinear`` or ``bicubic``; by default that of the pretrained
            weights, else bilinear.
        view: the channels, from 0, that overlays show as red, green and blue, as [3,2,1]; by default the first three.
        workers: processes that read images; 0 reads in the training process. By default one for each processor, at most
            four. The result does not depend on it.
        cache: decode all images once, before training, and keep them in memory, resized already where the
            augmentation begins with the same resize every time. The result does not depend on it.
        skip_bad: train without the images that the check complains about, and count them, instead of stopping.
    """

    layout: Literal["auto", "cub", "metadata", "folder"] = "auto"
    metadata_root: Path | None = None
    val_fraction: float = 0.1
    balance: bool = False
    present_classes_only: bool = False
    image_size: int | None = None
    channels: int = 3
    bits: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Interpolation | None = None
    view: tuple[int, ...] | None = None
    workers: int | None = None
    cache: bool = False
    skip_bad: bool = False

    def __post_init__(self) -> None:
        check_options(
            self, "reading.", val_fraction=(0, 0.49), image_size=(8, 8192), workers=(0, 1024), channels=(1, 1000)
        )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise CalmError(f"reading.{name} has {len(values)} values: give {self.channels}, one for each channel")

    @property
    def processes(self) -> int:
        """How many processes read images, on this machine."""
        return min(4, processors()) if self.workers is None else self.workers


@dataclass(frozen=True)
class ModelOptions:
    """The network beside its backbone's name and the method.

    Attributes:
        pretrained: start the backbone from its published weights.
        weights: a file (.safetensors, .pth, ...) whose weights the backbone starts from instead: of torchvision, timm,
            a DINO-like checkpoint, your own training. The log and weights.json say how they were matched.
        large_feature_map: 28x28 grid for 224x224 images instead of 14x14 (released backbones).
        use_bn: BatchNorm in vgg16 and in the added layers of inception_v3.
        output_stride: image pixels per grid cell, for timm backbones that support it.
        prior_activation: the activation a of the prior.
        prior_denominator: ``constant`` trains the prior as the released code does.
        pooling_exponent: exponent a of the power mean over the locations that predicts the class. 1 is the published
            CALM, an average of the locations' probabilities; 0 is CAM weighted by the prior, an average of their class
            scores (docs/mathematics.md).
        freeze: ``true`` keeps the backbone as it starts, in evaluation mode, and trains the head alone, on features
            that are computed once: a model in a minute (docs/frozen-features.md). The name of a part of the backbone
            (``layer3``, ``blocks.4``) keeps that part and all before it so, without such features.
        unfreeze_after: epochs after which what ``freeze`` keeps is trained, too, for which images are read in every
            epoch. 0: never.
        freeze_norm: use BatchNorm's statistics as they start, and do not update them: for fine-tuning on few images.
        views: with ``freeze true``: how many times each training image is augmented; the epochs take turns.
        feature_dropout: with ``freeze true``: probability that a channel of an image's features is dropped in training.
        feature_gib: with ``freeze true``: the most GiB that the files of features may take while the run lasts.
        feature_dir: with ``freeze true``: a folder in which the features stay, for other runs of the same backbone on
            the same images: other methods, losses and rates, and of other seeds those of val and test. Without it they
            are in the run's folder, and go when the run is finished.
        init_from: a run folder, a saved model or a hub id whose weights training starts from. Of the head, the classes
            of the same name come along; the others start anew.
    """

    pretrained: bool = True
    weights: Path | None = None
    large_feature_map: bool = True
    use_bn: bool = True
    output_stride: int | None = None
    prior_activation: PriorActivation = "softplus"
    prior_denominator: PriorDenominator = "differentiated"
    pooling_exponent: float = 1.0
    freeze: bool | str = False
    unfreeze_after: int = 0
    freeze_norm: bool = False
    views: int = 2
    feature_dropout: float = 0.0
    feature_gib: float = 100.0
    feature_dir: Path | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        ranges = {"views": (1, 1000), "feature_dropout": (0, 0.99), "unfreeze_after": (0, MOST)}
        check_options(self, "model.", output_stride=(1, 64), feature_gib=(0, LARGEST), **ranges)
        if self.unfreeze_after and not self.freeze:
            raise CalmError("model.unfreeze_after needs model.freeze: true, or the name of a part of the backbone")
        for name, value in (("feature_dropout", self.feature_dropout), ("feature_dir", self.feature_dir)):
            if value and not self.caches:
                fix = f"set model.freeze true without model.unfreeze_after, or leave model.{name} out"
                raise CalmError(f"model.{name} is {value}, for cached features alone: {fix}")
        if self.weights is not None and self.init_from is not None:
            raise CalmError("model.weights and model.init_from both say where the backbone starts: give one of them")

    @property
    def caches(self) -> bool:
        """Whether the head alone is trained, on features that are computed once."""
        return self.freeze is True and not self.unfreeze_after


SHARED = ("prior_weight", "cam_weight", "pooling_exponent", "cutmix")
"""Options of `LossOptions` that CALM-ML has, too."""


@dataclass(frozen=True)
class LossOptions:
    """The E-step of CALM-EM, and the prior of both CALMs. CAM has nothing to choose.

    Attributes:
        posterior: whose posterior is q: the model's own, or that of an exponential moving average of it.
        teacher_decay: decay per step of that average.
        temperature: exponent of the joint in q: a number, or ``START:END`` for a linear change over the run, or
            ``START:END:cosine``. 1 is the published EM; below 1 spreads q over more locations.
        prior_weight: weight of -mean over z of log p(z | x), which keeps the prior from collapsing on few locations: a
            number or a change over the run, as for ``temperature``. 0 is the published loss.
        cam_weight: weight of CAM's loss with the same class scores, for both CALMs: a number or a change. It teaches
            all locations while the prior is still forming. 0 is the published loss.
        pooling_exponent: exponent of the power mean in the loss, where it is another than the model's, with which it
            predicts: 1 teaches each location to be right by itself, and a model of exponent 0 then predicts from all of
            them together (docs/mathematics.md). By default the model's.
        cutmix: how both CALMs are taught an image of CutMix: by ``regions``, the class of each part given that the cue
            lies in it; or by the ``shares`` of the parts' areas, as CAM is.
    """

    posterior: Literal["current", "ema"] = "current"
    teacher_decay: float = 0.999
    temperature: str | float = 1.0  # str first: of 1:0 after a flag YAML makes a number to base 60
    prior_weight: str | float = 0.0
    cam_weight: str | float = 0.0
    pooling_exponent: float | None = None
    cutmix: Literal["regions", "shares"] = "regions"

    def __post_init__(self) -> None:
        check_options(self, "loss.", teacher_decay=(0, 1))
        for name in ("temperature", "prior_weight", "cam_weight"):
            value = getattr(self, name)
            schedule_of(value, steps=1, name=f"loss.{name}")
            with suppress(ValueError):
                object.__setattr__(self, name, float(value))

    def without_e_step(self) -> LossOptions:
        """Return the options that CALM-ML has, too."""
        return replace(LossOptions(), **{name: getattr(self, name) for name in SHARED})


@dataclass(frozen=True)
class OptimOptions:
    """Optimiser and learning-rate schedule.

    Attributes:
        name: ``sgd`` or ``adamw``.
        momentum: of SGD.
        nesterov: Nesterov momentum of SGD.
        betas: of AdamW.
        weight_decay: L2 penalty (SGD) or decoupled decay (AdamW).
        decay: ``all`` parameters, or ``weights`` only: no decay for biases and normalisation layers.
        head_ratio: learning rate of the new layers, as a multiple of ``lr``.
        prior_ratio: learning rate of the layer that scores the prior, as a multiple of the other new layers'. Below 1
            the prior follows the classes' scores instead of leading them.
        layer_decay: learning rate of each part of the backbone, as a multiple of that of the part after it, down from
            the head's side. 1: the same for all; 0.65 to 0.9 is usual in fine-tuning transformers.
        grouping: which layers are new: ``head`` is CALM's head; ``released`` splits by name as the released code
            does, which also gives the higher rate to most of resnet's layer4 and to the stem's BatchNorm.
        schedule: ``step`` multiplies the rate by ``step_factor`` every ``step_epochs``; ``released-step`` does so one
            epoch early, as the released code does; ``cosine`` goes to 0 over the run; ``one-cycle`` rises to ``lr``
            and falls to almost 0; ``constant``.
        step_epochs: see ``schedule``.
        step_factor: see ``schedule``.
        warmup_epochs: epochs (fractions allowed) of linear warm-up; for ``one-cycle``, the length of its rise, where
            0 means 30 percent of the run.
        accumulate: parts that each batch is computed in, one after the other, to save memory. The batch size and
            the result (but for BatchNorm's statistics) stay the same.
        clip_norm: largest norm of the gradient; longer ones are scaled down. 0: no clipping.
        ema_decay: decay per step of an average of the weights; that average is then what is evaluated and saved.
            0: no averaging.
    """

    name: Literal["sgd", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-4
    decay: Literal["all", "weights"] = "all"
    head_ratio: float = 10.0
    prior_ratio: float = 1.0
    layer_decay: float = 1.0
    grouping: Grouping = "head"
    schedule: Schedule = "step"
    step_epochs: int = 30
    step_factor: float = 0.1
    warmup_epochs: float = 0.0
    accumulate: int = 1
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        shares = dict.fromkeys(("momentum", "step_factor", "ema_decay", "layer_decay"), (0, 1))
        counts = dict.fromkeys(("step_epochs", "accumulate"), (1, MOST))
        open_ended = dict.fromkeys(
            ("weight_decay", "head_ratio", "prior_ratio", "warmup_epochs", "clip_norm"), (0, LARGEST)
        )
        check_options(self, "optim.", **shares, **counts, **open_ended)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise CalmError(f"optim.betas are {shown(list(self.betas))}: allowed are 0 to below 1")
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise CalmError("optim.nesterov needs optim.momentum above 0: set one of them")


@dataclass(frozen=True)
class Hardware:
    """Devices, number of processes and precision, in the terms of Lightning Fabric.

    Attributes:
        accelerator: ``auto``, ``cpu``, ``gpu``, ``mps``, ...
        devices: how many per node; ``auto`` is all GPUs, or one process on the CPU.
        nodes: how many machines.
        strategy: ``auto``, ``ddp``, ...
        precision: ``32-true``, ``bf16-mixed`` or ``16-mixed``. ``auto`` is ``bf16-mixed`` where the GPU or the
            processor (AVX512-BF16, AMX) computes bfloat16, and else ``32-true``; the log says which and why. A run
            goes on in the precision that it began with (config.yaml), so on another machine give that one. On a CPU
            those depthwise convolutions stay in float32 whose gradients are slower in bfloat16 (all but 3x3 of stride
            and dilation 1). Networks of few, narrow channels with attention (MobileViT) are still faster in ``32-true``
            there. Probabilities, losses, validation and test are computed in float32 in any case.
        channels_last: store images, features and weights with the channels last, which is faster for convolutions.
        compile: compile the backbone with ``torch.compile``. On a CPU it gained nothing over the defaults where it was
            measured (0.94 to 0.99 times as fast), and takes a C++ compiler and up to a minute at the start; GPUs were
            not measured.
        deterministic: on GPUs choose algorithms that give the same weights every time (often slower); an operation
            that has none is an error. The CPU needs no choice.
    """

    accelerator: str = "auto"
    devices: int | Literal["auto"] = "auto"
    nodes: int = 1
    strategy: str = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed"] = "auto"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_options(self, "hardware.", nodes=(1, MOST))
        if self.devices != "auto" and not 1 <= self.devices <= MOST:
            raise CalmError(f"hardware.devices is {shown(self.devices)}: give 1 or more, or auto")


@dataclass(frozen=True)
class LogOptions:
    """What is shown and written while training.

    Attributes:
        every_n_steps: steps between two updates of the progress bar, the loggers' curves and checks for NaN.
        panel_images: validation images that are drawn with their maps after each epoch; 0 draws none.
        loggers: where curves and pictures go beside metrics.csv, which is always written: ``tensorboard``; a logger of
            Lightning by its short name, ``wandb``, ``mlflow``, ``comet`` or ``csv``; or the import path of a class
            that is a ``lightning.fabric.loggers.Logger``. Its service's environment variables configure it
            (``WANDB_PROJECT``, ``WANDB_MODE``).
    """

    every_n_steps: int = 20
    panel_images: int = 8
    loggers: list[str] = field(default_factory=lambda: ["tensorboard"])

    def __post_init__(self) -> None:
        check_options(self, "log.", every_n_steps=(1, MOST), panel_images=(0, 64))


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        data: folder of the data set.
        run_dir: folder that the run writes to; None: ``runs/DATA-BACKBONE-METHOD``. The same command on the same
            folder continues an unfinished run.
        method: what is trained: CALM by expectation-maximisation or maximum likelihood, or CAM.
        backbone: ``resnet50``, ``vgg16``, ``inception_v3``, ``small_resnet``, any timm name, or your own code:
            ``package.module:function`` or ``package.module:function(width=32)``.
        epochs: passes over the training images.
        batch_size: images per optimiser step, over all processes together.
        lr: learning rate of the backbone at its highest.
        seed: of everything random. The same seed gives the same weights.
    """

    data: Path
    run_dir: Path | None = None
    method: Method = "calm-em"
    backbone: str = "resnet50"
    epochs: int = 40
    batch_size: int = 64
    lr: float = 0.01
    seed: int = 0
    reading: DataOptions = field(default_factory=DataOptions)
    augment: Augmentation = field(default_factory=Augmentation)
    model: ModelOptions = field(default_factory=ModelOptions)
    wsol: WsolOptions = field(default_factory=WsolOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    hardware: Hardware = field(default_factory=Hardware)
    log: LogOptions = field(default_factory=LogOptions)

    def __post_init__(self) -> None:
        check_options(self, "", epochs=(1, MOST), batch_size=(1, MOST), lr=(0, LARGEST), seed=(0, 2**63 - 1))
        if self.method != "calm-em" and self.loss != self.loss.without_e_step():
            raise CalmError(f"loss.posterior, teacher_decay and temperature are calm-em's, not {self.method}'s")
        check_pooling(self.model.pooling_exponent, self.model.prior_denominator, self.method)
        given = self.loss.pooling_exponent
        exponent = self.model.pooling_exponent if given is None else given
        check_pooling(exponent, self.model.prior_denominator)
        if given is not None and (self.method == "cam" or "acol" in self.wsol.methods):
            raise CalmError(f"loss.pooling_exponent is {given:g}, for CALM with one head alone: leave it out")
        if exponent == 0 and self.loss != self.loss.without_e_step():
            fix = "leave them out, or take a loss.pooling_exponent above 0"
            raise CalmError(f"loss.posterior, teacher_decay and temperature have no pooling_exponent 0: {fix}")
        if self.loss.prior_weight and (self.method == "cam" or self.model.prior_activation == "relu"):
            which = "a CAM model has no prior" if self.method == "cam" else "a ReLU prior has probabilities of 0"
            raise CalmError(f"loss.prior_weight is {self.loss.prior_weight}, but {which}: leave it at 0")
        if self.loss.cam_weight and self.method == "cam":
            raise CalmError("loss.cam_weight adds CAM's loss to CALM's, and this is CAM: leave it at 0")
        if self.optim.warmup_epochs >= self.epochs:
            raise CalmError(f"optim.warmup_epochs {self.optim.warmup_epochs} leaves nothing of {self.epochs} epochs")
        is_new("head.", self.backbone, self.optim.grouping)
        if "cutmix" in self.wsol.methods and not self.augment.cutmix:
            object.__setattr__(self, "augment", replace(self.augment, cutmix=1.0))
        if self.loss.cutmix != LossOptions.cutmix and (self.method == "cam" or not self.augment.cutmix):
            raise CalmError(f"loss.cutmix is {self.loss.cutmix}, for CALM trained with --wsol cutmix: leave it out")
        if self.model.caches and self.augment.mixes:
            raise CalmError("mixup and cutmix mix images, and model.freeze trains on features: set one of them to 0")
        if self.model.caches and (found := {"has", "adl", "spg"} & set(self.wsol.methods)):
            which = ", ".join(sorted(found))
            raise CalmError(f"wsol.methods {which} trains the backbone: leave it out, or set model.freeze false")
        if self.model.unfreeze_after >= self.epochs:
            raise CalmError(f"model.unfreeze_after {self.model.unfreeze_after} leaves nothing of {self.epochs} epochs")

    def whole_run(self) -> str:
        """Return the setting whose schedule spans the whole run, which more epochs would change; empty if none does."""
        if self.optim.schedule in ("cosine", "one-cycle"):
            return f"its schedule {self.optim.schedule}"
        courses = (f"{name} {getattr(self.loss, name)}" for name in ("temperature", "prior_weight", "cam_weight"))
        return next((f"its {course}" for course in courses if ":" in course), "")


# Substrings of the parameter names that the released code trains at the low rate (main.py of the released code).
RELEASED_BACKBONE_NAMES = {
    "vgg16": ("features.",),
    "resnet50": ("conv1", "layer1", "layer2", "layer3"),
    "inception_v3": ("Mixed", "Conv2d_1", "Conv2d_2", "Conv2d_3", "Conv2d_4"),
}


def is_new(name: str, backbone: str, grouping: Grouping) -> bool:
    """Return whether the parameter ``name`` of a `CalmModel` belongs to the new layers, with the higher rate.

    Raises:
        CalmError: ``released`` grouping asked for a backbone that the released code does not have.

    >>> is_new("head.conv_last.weight", "resnet50", "head")
    True
    >>> [is_new(f"backbone.layer4.0.{layer}.weight", "resnet50", "released") for layer in ("conv1", "conv2")]
    [False, True]
    """
    if grouping == "head":
        return name.startswith("head.")
    if backbone not in RELEASED_BACKBONE_NAMES:
        known = ", ".join(RELEASED_BACKBONE_NAMES)
        raise CalmError(f"optim.grouping 'released' is defined for {known}, not for {backbone!r}: use 'head'")
    return not any(part in name for part in RELEASED_BACKBONE_NAMES[backbone])


@dataclass(frozen=True)
class RunLength:
    """Length of a run: ``epochs`` of ``steps_per_epoch`` optimiser steps."""

    epochs: int
    steps_per_epoch: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.epochs * self.steps_per_epoch


def schedule_of(value: float | str, steps: int, name: str = "temperature") -> Callable[[int], float]:
    """Return a setting that may change over the run, such as a temperature, as a function of the optimiser step.

    Args:
        value: a number, or ``START:END``, or ``START:END:linear`` or ``START:END:cosine``.
        steps: optimiser steps of the run; the end value is reached with the last one.
        name: of the setting, for messages.

    Raises:
        CalmError: the text cannot be read, a value is negative or not finite, or the shape is unknown.

    >>> at = schedule_of("0.5:1.0", steps=11)
    >>> [at(0), at(5), at(10)]
    [0.5, 0.75, 1.0]
    """
    start_text, _, rest = str(value).partition(":")
    end_text, _, shape = rest.partition(":")
    try:
        start = float(start_text)
        end = float(end_text) if end_text else start
    except ValueError:
        raise CalmError(f"{name} {value!r} is neither a number nor START:END nor START:END:cosine") from None
    if not all(math.isfinite(value) and value >= 0 for value in (start, end)):
        raise CalmError(f"{name} {value!r}: values must be finite and 0 or more")
    if shape not in ("", "linear", "cosine"):
        raise unknown(f"shape of the {name}", shape, ["linear", "cosine"], where=f"{value!r}")
    last = max(1, steps - 1)

    def at(step: int) -> float:
        progress = min(step / last, 1.0)
        if shape == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2
        return start + (end - start) * progress

    return at
