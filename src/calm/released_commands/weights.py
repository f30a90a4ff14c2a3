"""What a released command works on: the model that its flags name, the test images, and the map to evaluate."""

from __future__ import annotations

from collections.abc import Mapping
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
from calm.data.records import SPLITS, Split
from calm.errors import CalmError
from calm.evaluate.subject import Subject, model_subject
from calm.files import write_text
from calm.images import Preprocessing
from calm.inference import resolve_device
from calm.model import CalmModel, create_model, load
from calm.released import FILE_NAME, load_released
from calm.released_commands.experiment import finished
from calm.released_commands.flags import GRADIENT_PROCESSES, Flags

LISTS = ("image_ids.txt", "class_labels.txt", "image_sizes.txt", "localization.txt")


def load_model(flags: Flags) -> CalmModel:
    """Load the model of ``--load_checkpoint``, in eval mode, on the GPU if there is one. Nothing is downloaded.

    Raises:
        CalmError: no checkpoint is named or none is there, or it is one that is not what the flags say.
    """
    if not flags.use_load_checkpoint:
        raise CalmError(
            "nothing to evaluate: give --use_load_checkpoint=True and --load_checkpoint=FOLDER. (The released code "
            "scores a random head then.)"
        )
    source = _checkpoint_folder(flags)
    size = (flags.crop_size, flags.crop_size)
    if (source / FILE_NAME).is_file():
        card = source / "run" / "last" / checkpoint.CARD
        if card.is_file():
            _check_config(flags, Card.read(card).model, source)
        large, batch_norm = flags.large_feature_map, flags.batch_norm
        model = load_released(source, method=flags.method, large_feature_map=large, use_bn=batch_norm)
        model.preprocessing = Preprocessing(size)
    else:
        model = load(source)
        model.preprocessing = replace(model.preprocessing, size=size)
    _check_config(flags, model.config, source)
    return model.to(resolve_device())


def _checkpoint_folder(flags: Flags) -> Path:
    """Return the checkpoint's folder: as given, or below ``--save_root``; by default the experiment's own."""
    named = flags.load_checkpoint
    places = [flags.folder] if named is None else [Path(named), Path(flags.save_root) / named]
    for place in places:
        if place.is_dir():
            return place
    own = f"; leave it out to take {flags.folder / FILE_NAME}" if finished(flags) else ""
    raise CalmError(
        f"no checkpoint: there is no folder {' nor '.join(map(str, places))}, which --load_checkpoint names{own}"
    )


def _check_config(flags: Flags, config: ModelConfig, source: Path) -> None:
    """Check that the flags agree with a checkpoint. What a released file does not say is taken from the flags."""
    for flag, given, actual in (
        ("--architecture", flags.architecture, config.backbone),
        ("--attribution_method", flags.method, config.method),
        ("--large_feature_map", flags.large_feature_map, config.large_feature_map),
        ("--use_bn", flags.batch_norm, config.use_bn),
    ):
        if given != actual:
            raise CalmError(f"{flag} says {given}, but the checkpoint in {source} is of {actual}")


def check_pretrained(flags: Flags) -> None:
    """Check that the ImageNet weights are available, which may download them; if not, raise a `CalmError`."""
    large, batch_norm = flags.large_feature_map, flags.batch_norm
    try:
        build_backbone(flags.architecture, pretrained=True, large_feature_map=large, use_bn=batch_norm)
    except CalmError as error:
        raise CalmError(f"--pretrained=True (the default): {error}: here --pretrained=False") from error


def transplant(model: CalmModel, num_classes: int, *, seed: int) -> CalmModel:
    """Return ``model`` for other classes, as the released ``--is_different_checkpoint``: all its weights but the
    classifier's, which are initialised from ``seed``."""
    config = model.config
    names = ("backbone", "method", "large_feature_map", "use_bn", "prior_activation", "prior_denominator")
    options = {name: getattr(config, name) for name in names}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        other = create_model(num_classes=num_classes, preprocessing=model.preprocessing, **options)
    kept = {name: value for name, value in model.state_dict().items() if "conv_last" not in name}
    other.load_state_dict(kept, strict=False)
    return other


def test_split(flags: Flags, model: CalmModel) -> Split:
    """Return the test images, checked; a `CalmError` if the data are wrong or the model has other classes."""
    splits, _ = load_checked(flags.images, ("test",), layout="metadata", metadata_root=flags.lists)
    split, classes = splits["test"], model.config.num_classes
    if split.num_classes != classes:
        raise CalmError(f"the checkpoint has {classes} classes, but {flags.lists} has {split.num_classes}")
    if model.class_names == tuple(map(str, range(classes))):  # released checkpoints number classes as the lists do
        model.class_names = split.class_names
    return split


def proxy_lists(flags: Flags) -> Path:
    """Write lists as in ``--metadata_root``, whose training images are those of ``image_ids_proxy.txt``; return their
    folder, in the experiment's. A `CalmError` if there is no such file."""
    proxy = flags.lists / "train" / "image_ids_proxy.txt"
    if not proxy.is_file():
        raise CalmError(
            f"--proxy_training_set=True needs {proxy}, which the released code has for ILSVRC only: leave it out"
        )
    chosen = set(proxy.read_text(encoding="utf-8").split("\n"))
    out = flags.folder / "proxy" / flags.dataset_name
    for name in ("classes.txt", *(f"{split}/{name}" for split in SPLITS for name in LISTS)):
        if (flags.lists / name).is_file():
            lines = (flags.lists / name).read_text(encoding="utf-8").splitlines()
            if name.startswith("train/"):
                lines = [line for line in lines if line.split(",")[0] in chosen]
            write_text(out / name, "".join(f"{line}\n" for line in lines))
    return out


def released_subject(flags: Flags, model: CalmModel) -> Subject:
    """Return the model with the map of ``--score_map_process`` and ``--score_map_method``, for the benchmarks.

    Two released names do not mean what they say, and keep the released meaning: ``input_grad`` is the gradient alone,
    and ``integrated_grad`` adds up absolute gradients on the line from 0 to the image, without the product with the
    image.

    Raises:
        CalmError: a map that the model does not have, or one that needs superclasses, which no released command has.
    """
    process = flags.score_map_process
    if flags.score_map_method == "backprop" and process not in GRADIENT_PROCESSES:
        process = "input_grad"  # as in the released code: the method decides, whatever the process is called
    noise = {"samples": flags.smooth_grad_nr_iter, "noise": 1 / flags.smooth_grad_sigma, "seed": flags.seed or 0}
    methods: dict[str, tuple[str, Mapping[str, Any]]] = {
        "input_grad": ("gradient", {}),
        "integrated_grad": ("gradient", {}),
        "smooth_grad": ("smoothgrad", noise),
        "var_grad": ("vargrad", noise),
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
    if process != "integrated_grad":
        return subject
    steps = flags.integrated_grad_nr_iter
    return replace(subject, predict=lambda images: _GradientSums(model, images, subject.predict(images).probs, steps))


@dataclass(frozen=True)
class _GradientSums:
    """Sum of the absolute gradients at i / steps of the image, i = 0 .. steps, over ``steps``."""

    model: CalmModel
    images: Float[Tensor, "b 3 H W"]
    probs: Float[Tensor, "b c"]
    steps: int

    def maps(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k H W"]:
        """Return maps of classes: see `calm.evaluate.subject`."""
        columns = []
        for column in classes.unbind(dim=1):
            total = torch.zeros_like(self.images[:, 0])
            for i in range(self.steps + 1):
                total += attribute(self.model, self.images * (i / self.steps), column, "gradient")
            columns.append(total / self.steps)
        return torch.stack(columns, dim=1)
