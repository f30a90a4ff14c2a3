"""The map that ``--score_map_process`` and ``--score_map_method`` ask for, as a subject of the benchmarks.

Two released names are not what they say, and keep here what they are there: ``input_grad`` is the gradient alone, and
``integrated_grad`` adds up absolute gradients on the line from 0 to the image, without the product with the image.

The data of a released command: images below ``--data_root``, lists below ``--metadata_root``.

Which weights a released command starts from: ImageNet's, or a checkpoint's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calm import checkpoint
from calm.backbones import build_backbone
from calm.baselines import attribute
from calm.checkpoint import Card
from calm.config import ModelConfig
from calm.data.check import load_checked
from calm.data.records import Split
from calm.errors import CalmError
from calm.evaluate.subject import Prediction, Subject, model_subject
from calm.files import write_text
from calm.images import Preprocessing
from calm.inference import resolve_device
from calm.model import CalmModel, create_model, load
from calm.released import FILE_NAME, load_released
from calm.released_commands.experiment import finished
from calm.released_commands.flags import GRADIENT_PROCESSES, Flags

__all__ = [
    "FILES",
    "check_pretrained",
    "load_model",
    "proxy_lists",
    "released_subject",
    "test_split",
    "transplant",
]

FILES = ("image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt")


def test_split(flags: Flags, model: CalmModel) -> Split:
    """The test images, checked.

    Raises:
        CalmError: wrong data, all of it in one report; or the model has other classes.
    """
    splits, _ = load_checked(flags.images, ("test",), layout="metadata", metadata_root=flags.lists)
    split = splits["test"]
    if split.num_classes != model.config.num_classes:
        raise CalmError(
            f"the checkpoint has {model.config.num_classes} classes, but {flags.lists} has {split.num_classes}"
        )
    return split


def proxy_lists(flags: Flags) -> Path:
    """Lists as in ``--metadata_root``, whose training images are those of ``image_ids_proxy.txt``.

    They are written into the experiment's folder.

    Raises:
        CalmError: there is no such file.
    """
    proxy = flags.lists / "train" / "image_ids_proxy.txt"
    if not proxy.is_file():
        raise CalmError(
            f"--proxy_training_set=True needs {proxy}, which the released code has for ILSVRC only: leave it out"
        )
    chosen = set(proxy.read_text(encoding="utf-8").split("\n"))
    out = flags.folder / "proxy" / flags.dataset_name
    if (flags.lists / "classes.txt").is_file():
        write_text(out / "classes.txt", (flags.lists / "classes.txt").read_text(encoding="utf-8"))
    for split in ("train", "val", "test"):
        for name in FILES:
            path = flags.lists / split / name
            if path.is_file():
                lines = path.read_text(encoding="utf-8").splitlines()
                if split == "train":
                    lines = [line for line in lines if line.split(",")[0] in chosen]
                write_text(out / split / name, "".join(f"{line}\n" for line in lines))
    return out


def check_pretrained(flags: Flags) -> None:
    """See that the ImageNet weights can be had, which may download them.

    Raises:
        CalmError: they cannot; the message names ``--pretrained=False``.
    """
    try:
        build_backbone(
            flags.architecture,
            pretrained=True,
            large_feature_map=flags.large_feature_map,
            use_bn=flags.batch_norm,
        )
    except CalmError as error:
        raise CalmError(f"--pretrained=True (the default): {error}: here --pretrained=False") from error


def load_model(flags: Flags) -> CalmModel:
    """The model of ``--load_checkpoint``, in eval mode, on the GPU if there is one. Nothing is downloaded.

    Raises:
        CalmError: no checkpoint asked for, none there, or one that is not what the flags say.
    """
    if not flags.use_load_checkpoint:
        raise CalmError(
            "nothing to evaluate: give --use_load_checkpoint=True and --load_checkpoint=FOLDER. (The released code "
            "scores a random head then.)"
        )
    source = _source(flags)
    size = (flags.crop_size, flags.crop_size)
    if (source / FILE_NAME).is_file():
        card = source / "run" / "last" / checkpoint.CARD
        if card.is_file():
            _check(flags, Card.read(card).model, source)
        model = load_released(
            source,
            method=flags.method,
            large_feature_map=flags.large_feature_map,
            use_bn=flags.batch_norm,
        )
        model.preprocessing = Preprocessing(size)
    else:
        model = load(source)
        model.preprocessing = replace(model.preprocessing, size=size)
    _check(flags, model.config, source)
    return model.to(resolve_device())


def transplant(model: CalmModel, num_classes: int, *, seed: int) -> CalmModel:
    """``model`` for other classes: all its weights but the classifier's, which start anew.

    As the released code's ``--is_different_checkpoint``.
    """
    config = model.config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        other = create_model(
            config.backbone,
            num_classes,
            config.method,
            config.large_feature_map,
            use_bn=config.use_bn,
            prior_activation=config.prior_activation,
            prior_denominator=config.prior_denominator,
            preprocessing=model.preprocessing,
        )
    kept = {
        name: value for name, value in model.state_dict().items() if not name.startswith("head.conv_last")
    }
    other.load_state_dict(kept, strict=False)
    return other


def _source(flags: Flags) -> Path:
    """The checkpoint's folder: as given, or below ``--save_root``; by default the experiment's own."""
    if flags.load_checkpoint is None:
        places = [flags.folder]
    else:
        places = [Path(flags.load_checkpoint), Path(flags.save_root) / flags.load_checkpoint]
    for place in places:
        if place.is_dir():
            return place
    own = f"; leave it out to take {flags.folder / FILE_NAME}" if finished(flags) else ""
    raise CalmError(
        f"no checkpoint: there is no folder {' nor '.join(map(str, places))}, which --load_checkpoint names{own}"
    )


def _check(flags: Flags, found: ModelConfig, source: Path) -> None:
    """See that the flags say what the checkpoint is. What a released file does not say is taken from the flags."""
    asked = {
        "--architecture": (flags.architecture, found.backbone),
        "--attribution_method": (flags.method, found.method),
        "--large_feature_map": (flags.large_feature_map, found.large_feature_map),
        "--use_bn": (flags.batch_norm, found.use_bn),
    }
    for flag, (given, actual) in asked.items():
        if given != actual:
            raise CalmError(f"{flag} says {given}, but the checkpoint in {source} is of {actual}")


def released_subject(flags: Flags, model: CalmModel) -> Subject:
    """The subject that the flags describe.

    Raises:
        CalmError: a map that the model does not have, or one that needs superclasses, which no released command has.
    """
    process = flags.score_map_process
    if flags.score_map_method == "backprop" and process not in GRADIENT_PROCESSES:
        process = "input_grad"  # as in the released code: the method decides, whatever the process is called
    noisy = {"samples": flags.smooth_grad_nr_iter, "noise": 1 / flags.smooth_grad_sigma}
    methods: dict[str, tuple[str, Mapping[str, Any]]] = {
        "input_grad": ("gradient", {}),
        "integrated_grad": ("gradient", {}),
        "smooth_grad": ("smoothgrad", {**noisy, "seed": flags.seed or 0}),
        "var_grad": ("vargrad", {**noisy, "seed": flags.seed or 0}),
    }
    method, options = methods.get(process, (process, {}))
    subject = model_subject(
        model,
        method=method,
        label=f"{flags.attribution_method} {flags.score_map_process}",
        normalization=flags.norm_type,
        thresholds=flags.threshold_type,
        **options,
    )
    if process == "integrated_grad":
        subject = replace(subject, predict=_gradient_sums(model, subject, flags.integrated_grad_nr_iter))
    return subject


@dataclass(frozen=True)
class _GradientSums:
    """Sum of the absolute gradients at i / steps of the image, i = 0 .. steps, over ``steps``."""

    model: CalmModel
    images: Float[Tensor, "b 3 H W"]
    probs: Float[Tensor, "b c"]
    steps: int

    def maps(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k H W"]:
        columns = []
        for column in classes.unbind(dim=1):
            maps = (
                attribute(self.model, self.images * (i / self.steps), column, "gradient")
                for i in range(self.steps + 1)
            )
            columns.append(sum(maps, torch.zeros_like(self.images[:, 0])) / self.steps)
        return torch.stack(columns, dim=1)


def _gradient_sums(model: CalmModel, subject: Subject, steps: int) -> Callable[[Tensor], Prediction]:
    return lambda images: _GradientSums(model, images, subject.predict(images).probs, steps)
