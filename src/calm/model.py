"""The classifier: a network with its reading of pictures and its files, and how to create and load one."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from calm import checkpoint
from calm.acol import AcolCalmHead, AcolCamHead
from calm.config import Interpolation, Method, ModelConfig, PriorActivation, PriorDenominator, check_trusted, parse_code
from calm.errors import CalmError
from calm.heads import CalmHead as CalmHead, CamHead as CamHead, Network
from calm.images import ImageLike, Preprocessing
from calm.inference import evaluation_mode, first_nonfinite_weight, optimized_for_inference

FLAT = 0.97
"""The entropy of the posterior p(z | x, y), over log N, above which a model's maps are called flat: at an 8x8 grid, 57
of 64 cells count alike."""

INDEPENDENT = (
    "its pooling exponent is 0: the class and the place of its cue are independent given the image, so that joint and"
    " posterior maps show the prior for every class; evidence maps show what tells two classes apart"
)


@dataclass(frozen=True, repr=False)
class Prediction:
    """The most probable classes of one image, best first.

    Attributes:
        names: Their names.
        probs: p(y | x) of each.
        source: The image's file, if it was read from one.
    """

    names: tuple[str, ...]
    probs: tuple[float, ...]
    source: str | None = None

    @property
    def name(self) -> str:
        """The name of the most probable class."""
        return self.names[0]

    @property
    def prob(self) -> float:
        """The probability of the most probable class."""
        return self.probs[0]

    def __str__(self) -> str:
        classes = ", ".join(f"{name} {prob:.3f}" for name, prob in zip(self.names, self.probs, strict=True))
        return f"{self.source}: {classes}" if self.source else classes

    def __repr__(self) -> str:
        return f"Prediction({self})"


class CalmModel(Network):
    """An image classifier whose output also says where the evidence is.

    Build one with `create_model`, `calm.load` or `calm.load_released`.

    Attributes:
        config: What the model is made of.
        backbone: Maps images (B, 3, H, W) to features (B, D, h, w).
        head: Maps features to a `CalmOutput` or `CamOutput`.
        preprocessing: How an image file becomes the model's input.
        class_names: The C names of the classes.
        training_summary: What the training recorded about itself (data, seed, accuracy), if anything.
    """

    def __init__(
        self,
        config: ModelConfig,
        backbone: nn.Module,
        head: CalmHead | CamHead,
        *,
        class_names: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        training_summary: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(config, backbone, head, class_names=class_names)
        self.preprocessing = preprocessing or Preprocessing()
        self.training_summary = dict(training_summary or {})

    @property
    def flat(self) -> bool:
        """Whether the training recorded maps that are almost flat (`FLAT`)."""
        spread = self.training_summary.get("posterior_entropy_relative", 0.0)
        return isinstance(spread, float) and spread > FLAT

    @property
    def caution(self) -> str:
        """What a reader of the maps must know first, in a sentence; empty if the training recorded nothing of it."""
        if not self.flat:
            return INDEPENDENT if self.config.pooling_exponent == 0 else ""
        spread = self.training_summary["posterior_entropy_relative"]
        return (
            f"its maps are almost flat: where the evidence of the training images is has {spread:.2f} of the entropy of"
            " not knowing at all. Classes are as sure as their probabilities; joint, posterior and prior say little"
        )

    def preprocess(self, images: ImageLike | Sequence[ImageLike]) -> Float[Tensor, "b 3 H W"]:
        """Return image files, PIL images or uint8 RGB arrays (H, W, 3) as a batch on the model's device."""
        return self.preprocessing(images).to(self.device)

    @property
    def transform(self) -> Callable[[ImageLike], Tensor]:
        """What turns one picture into a model's input (3, H, W): the ``transform`` of a torchvision data set."""
        return self.preprocessing.one

    def predict(
        self, images: ImageLike | Sequence[ImageLike], *, top: int = 5, batch_size: int = 16
    ) -> Prediction | list[Prediction]:
        """Return the most probable classes of pictures. The model runs in eval mode; its own mode is restored.

        Args:
            images: A file, a PIL image, uint8 (H, W, 3), or a normalised input (3, H, W) as `transform` makes it; or
                several: a list of these, a batch (B, 3, H, W), or a folder, of which all images are read, sorted.
            top: How many classes, at most.
            batch_size: Images in one pass; the memory does not grow with their number.

        Returns:
            A `Prediction` of one image; a list of several, even if it has one.

        Raises:
            CalmError: If a file is no image, a folder has none, tensors do not fit, or ``top`` is below 1.
        """
        if top < 1:
            raise CalmError(f"top is {top}: give how many classes to return, 1 or more")
        if isinstance(images, (str, Path)) and Path(images).is_dir():
            from calm.data.loading import files_below, is_image

            folder = Path(images)
            images = sorted(file for file in files_below(folder) if is_image(file, folder))
        one = not isinstance(images, (list, tuple)) and getattr(images, "ndim", 3) == 3
        every: Sequence[Any] = [images] if one else images  # type: ignore[assignment]
        if not len(every):
            raise CalmError("no images to predict: the list or the folder is empty")
        found = []
        with evaluation_mode(self), torch.no_grad():
            for start in range(0, len(every), batch_size):
                part = every[start : start + batch_size]
                ready = (isinstance(image, Tensor) and image.is_floating_point() for image in part)
                inputs = [im if is_input else self.transform(im) for im, is_input in zip(part, ready, strict=True)]
                if len(shapes := {tuple(image.shape) for image in inputs}) > 1:
                    raise CalmError(f"inputs of shapes {sorted(shapes)} make no batch: give tensors of one shape")
                best = self(torch.stack(inputs).to(self.device)).probs.topk(min(top, self.config.num_classes))
                for image, probs, classes in zip(part, best.values.tolist(), best.indices.tolist(), strict=True):
                    source = str(image) if isinstance(image, (str, Path)) else None
                    found.append(Prediction(tuple(self.class_names[c] for c in classes), tuple(probs), source))
        return found[0] if one else found

    def optimized_for_inference(self) -> CalmModel:
        """Return a copy for predictions and own maps alone, which are the same but for rounding, and faster on a CPU.

        It is in eval mode, with BatchNorm folded into convolutions, and channels last: not to be trained or saved. The
        file ``benchmarks/README.md`` says how much faster it is.
        """
        size = self.config.in_channels, *self.preprocessing.size
        image = torch.randn(1, *size, generator=torch.Generator().manual_seed(0))
        backbone = optimized_for_inference(self.backbone, image.to(self.head.conv_last.weight))
        head = copy.deepcopy(self.head).requires_grad_(False)
        return CalmModel(
            self.config,
            backbone,
            head,
            class_names=self.class_names,
            preprocessing=self.preprocessing,
            training_summary=self.training_summary,
        ).eval()

    def check_finite(self, where: str = "the model") -> None:
        """Raise a CalmError if a weight or saved buffer is NaN or infinite; ``where`` they are is for the message."""
        if name := first_nonfinite_weight(self):
            fix = "no result would mean anything; take an earlier checkpoint, or train again with a lower learning rate"
            raise CalmError(f"{where}: {name} holds NaN or infinity, so {fix}")

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the weights (safetensors) and everything else (JSON) to ``folder``: see `calm.checkpoint.write`.

        Raises:
            CalmError: If a weight is not finite, or the folder cannot be written.
        """
        self.check_finite()
        return checkpoint.write(
            folder, self.state_dict(), self.config, self.class_names, self.preprocessing, self.training_summary
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        figures: str = "",
        example: Image.Image | None = None,
        overwrite_card: bool = False,
    ) -> str:
        """Upload the model to the Hugging Face Hub, with a page about it, and return the address of the commit.

        The page (``README.md``) says how to load the model, how to read its maps, what is known of its training, and
        its limits. The command ``calm push`` adds the tables of ``calm evaluate`` and draws the example.

        Args:
            repo_id: ``owner/name``, under which `load` finds it; created if it does not exist.
            private: Whether a new repository is private.
            token: The token of the hub; None is the one that ``hf auth login`` stored.
            figures: Tables of its evaluation for the page, in Markdown.
            example: A picture for the page, such as `calm.overlay` makes. It becomes public with the repository.
            overwrite_card: Whether to replace a page that the repository has already.

        Raises:
            CalmError: If the hub cannot be reached, or refuses.
        """
        checkpoint.check_hub(repo_id)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "model")
            card = checkpoint.Card.read(folder / checkpoint.CARD)
            text = checkpoint.readme(card, repo_id, figures, self.caution, example=example is not None)
            (folder / checkpoint.README).write_text(text, encoding="utf-8")
            if example is not None:
                example.save(folder / "example.png")
            return checkpoint.upload(folder, repo_id, private=private, token=token, overwrite_card=overwrite_card)

    @staticmethod
    def from_pretrained(source: str | Path, **options: Any) -> CalmModel:
        """Load a model from a folder or a hub id: `calm.load`."""
        return load(source, **options)

    def extra_repr(self) -> str:
        """Return the configuration, the first line of ``print(model)``."""
        return str(self.config)


def create_model(
    backbone: str | nn.Module,
    num_classes: int,
    method: Method = "calm-em",
    large_feature_map: bool = True,
    pretrained: bool | str | os.PathLike[str] = False,
    *,
    use_bn: bool = True,
    output_stride: int | None = None,
    prior_activation: PriorActivation = "softplus",
    prior_denominator: PriorDenominator = "differentiated",
    in_channels: int = 3,
    acol_threshold: float | None = None,
    acol_channels: int | None = None,
    pooling_exponent: float = 1.0,
    class_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
) -> CalmModel:
    """Create a classifier. This is the one place that puts backbone, head and preprocessing together.

    Args:
        backbone: A name (see `ModelConfig`); your own module that returns features (B, D, h, w); or the name of code
            that builds it, such as ``"nets:small(width=32)"``, which the saved model keeps.
        pretrained: Whether the backbone starts from published weights (needs a network the first time, or the extra
            ``offline``); or a file whose weights it starts from, of which the backbone's ``weights_report`` then says
            how they were matched: see `calm.backbones.load_weights`.
        class_names: The names of the classes, in the order of their indices.
        preprocessing: Input size and normalisation; the default is 224x224, or the size of a timm model that needs
            another, and ImageNet's mean and std (for other channels than 3 the averages of these), and the bilinear
            filter. Where these are the default, and the pretrained weights of a timm model expect others, theirs are
            taken.

    The other arguments are those of `ModelConfig`.

    Raises:
        CalmError: If a name is unknown, a value is impossible, the backbone returns no feature map, or does not take
            images of the preprocessing's size.

    >>> model = create_model("small_resnet", num_classes=3)
    >>> model(torch.zeros(2, 3, 64, 64)).probs.shape
    torch.Size([2, 3])
    """
    from calm.backbones import adapt_backbone, build_backbone, image_size, import_backbone, load_weights

    default = Preprocessing()
    size = None if preprocessing is None else preprocessing.size
    preprocessing = preprocessing or default
    config = ModelConfig(
        backbone=backbone if isinstance(backbone, str) else "custom",
        num_classes=num_classes,
        method=method,
        large_feature_map=large_feature_map,
        use_bn=use_bn,
        output_stride=output_stride,
        prior_activation=prior_activation,
        prior_denominator=prior_denominator,
        in_channels=in_channels,
        acol_threshold=acol_threshold,
        acol_channels=acol_channels,
        pooling_exponent=pooling_exponent,
    )
    own = import_backbone(backbone) if isinstance(backbone, str) and parse_code(backbone) else backbone
    if isinstance(own, str):
        body = build_backbone(
            own,
            pretrained=pretrained,
            large_feature_map=large_feature_map,
            use_bn=use_bn,
            output_stride=output_stride,
            in_channels=in_channels,
        )
    elif pretrained is True or output_stride is not None:
        fix = "your own module comes as it is, or with pretrained=FILE"
        raise CalmError(f"pretrained=True and output_stride choose among named backbones: {fix}")
    else:
        body = adapt_backbone(own, preprocessing.size, in_channels)
        if pretrained is not False:
            load_weights(body, pretrained)
    preprocessing = replace(preprocessing, size=image_size(body, size, in_channels))
    if (preprocessing.mean, preprocessing.std) == (default.mean, default.std):
        published = getattr(body, "normalization", None) if pretrained else None
        mean, std = published or (default.mean, default.std)
        if in_channels != 3:
            mean, std = ((sum(values) / 3,) * in_channels for values in (mean, std))
        preprocessing = replace(preprocessing, mean=mean, std=std)
    if pretrained and preprocessing.interpolation == default.interpolation:
        how: Interpolation = getattr(body, "interpolation", default.interpolation)
        preprocessing = replace(preprocessing, interpolation=how)
    if len(preprocessing.mean) != in_channels:
        given = f"in_channels={in_channels}, but preprocessing has {len(preprocessing.mean)} means"
        raise CalmError(f"{given}: give a mean and a std for each channel")
    channels = int(body.out_channels)  # type: ignore[arg-type]
    kinds = (CamHead, CalmHead) if acol_threshold is None else (AcolCamHead, AcolCalmHead)
    second: Any = {} if acol_threshold is None else {"threshold": acol_threshold, "channels": acol_channels}
    prior = () if method == "cam" else (prior_activation, prior_denominator, pooling_exponent)
    head = kinds[method != "cam"](channels, num_classes, *prior, **second)
    return CalmModel(config, body, head, class_names=class_names, preprocessing=preprocessing)


def load(
    source: str | os.PathLike[str],
    *,
    backbone: nn.Module | str | None = None,
    map_location: str | torch.device = "cpu",
    revision: str | None = None,
) -> CalmModel:
    """Load a saved model, in eval mode. The global random state is left as it was.

    Args:
        source: A folder that `CalmModel.save_pretrained` wrote; or the folder of a training run, whose best model is
            taken, or its last if there is no best; or a model on the Hugging Face Hub, ``owner/name``.
        backbone: For a model whose backbone was the user's own: the module, built as it was then, or the name of the
            code that builds it, which the model keeps. That code is imported only if it is named here, or trusted
            (``calm --trust``, the environment variable CALM_TRUST): a model's files may come from anybody.
        map_location: The device.
        revision: A branch, tag or commit of a model on the hub; None is its main branch.

    Raises:
        CalmError: See `calm.checkpoint.read`; or the weights do not fit or are not finite, or a backbone is missing or
            superfluous.
    """
    folder, card, state = checkpoint.read(source, revision)
    config, path = card.model, folder / checkpoint.CARD
    code = parse_code(config.backbone)
    if isinstance(backbone, str) and backbone != config.backbone:
        raise CalmError(f"{path} has the backbone {config.backbone!r}, not {backbone!r}")
    if isinstance(backbone, nn.Module) and code is None and config.backbone != "custom":
        raise CalmError(f"the model in {folder} has the backbone {config.backbone!r}: leave backbone= out")
    if backbone is None and config.backbone == "custom":
        fix = "build that module as it was, and give it as backbone="
        raise CalmError(f"the model in {folder} was made with the user's own backbone: {fix}")
    if backbone is None:
        check_trusted(config.backbone, str(path))
    options = {name: value for name, value in asdict(config).items() if name != "backbone"}
    try:
        with torch.random.fork_rng(devices=[]):
            model = create_model(
                backbone or config.backbone, class_names=card.class_names, preprocessing=card.preprocessing, **options
            )
    except CalmError as error:
        raise CalmError(f"{path}: {error}") from error
    model.config = config
    model.training_summary = card.training
    try:
        checkpoint.fill(model, state)
    except CalmError as error:
        saved, installed = card.versions.get("timm"), version("timm")
        hint = f" (made with timm {saved}, here is {installed})" if saved != installed else ""
        raise CalmError(
            f"{folder / checkpoint.WEIGHTS} does not fit the model in {checkpoint.CARD}: {error}{hint}"
        ) from error
    model.check_finite(str(folder / checkpoint.WEIGHTS))
    return model.to(map_location).eval()
