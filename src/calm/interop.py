"""CALM in the words of other libraries: Captum, pytorch-grad-cam, Quantus, scikit-learn, and plain training loops.

None of them is imported before it is used. `CalmAttribution` and `CalmClassifier` are classes of Captum and of
scikit-learn, made when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from calm.baselines import attribute
from calm.baselines.gradient import class_scores
from calm.config import Method
from calm.errors import CalmError, needs_extra
from calm.heatmaps import resize_and_normalize
from calm.images import ImageLike, Preprocessing
from calm.inference import evaluation_mode, resolve_device
from calm.model import CalmModel, create_model
from calm.output import CalmOutput


def em_loss(
    output: CalmOutput, targets: Tensor, *, temperature: float = 1.0, prior_weight: float = 0.0
) -> Float[Tensor, ""]:
    """Return the CALM-EM loss of a head's output, the mean over the batch in nats: see `CalmOutput.loss`.

    >>> from calm.heads import CalmHead
    >>> features = torch.zeros(2, 8, 4, 4)  # of any network without pooling
    >>> float(em_loss(CalmHead(8, 10)(features), torch.tensor([3, 7])).detach()) > 0
    True
    """
    if not isinstance(output, CalmOutput):
        raise CalmError(f"em_loss takes the output of a CalmHead or of a CALM model, got a {type(output).__name__}")
    return output.loss(targets, method="calm-em", temperature=temperature, prior_weight=prior_weight)


class ScoreModel(nn.Module):
    """A model as a plain classifier, for tools that expect one: images in, scores (B, C) out.

    The softmax of the scores is p(y | x): they are the logits of CAM, and log p(y | x) of CALM.
    """

    def __init__(self, model: CalmModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c"]:
        """Score the classes."""
        return class_scores(self.model(images))


def _own(model: nn.Module) -> CalmModel:
    if not isinstance(model, CalmModel):
        fix = "calm.attribute explains classifiers of other packages"
        raise CalmError(f"this shows the maps of a model of this package, got a {type(model).__name__}: {fix}")
    return model


class CalmCam:
    """A model's own maps behind the call of pytorch-grad-cam, whose tools and metrics take it as one of its methods.

    Maps are resized to the images and min-max scaled to [0, 1], each alone, as that library does: what a value means is
    lost, and maps of two images cannot be compared. A map that is the same everywhere becomes zeros.

    Args:
        model: A model of this package; its mode is restored after each call.
        kind: A map kind of the model; None is its default.

    Attributes:
        outputs: The scores (B, C) of the last call, as of `ScoreModel`.
    """

    def __init__(self, model: CalmModel, kind: str | None = None) -> None:
        self.model, self.kind = _own(model), model.map_kind(kind)
        self.outputs = torch.empty(0)

    def __call__(
        self,
        input_tensor: Float[Tensor, "b k H W"],
        targets: Sequence[Any] | None = None,
        aug_smooth: bool = False,
        eigen_smooth: bool = False,
    ) -> NDArray[np.float32]:
        """Return maps (B, H, W) in [0, 1].

        Args:
            input_tensor: Normalised images.
            targets: For each image an object with the class index ``category``, such as ``ClassifierOutputTarget``;
                None is the most probable class of each.
            aug_smooth: Not offered: a map that is averaged over augmented images is no longer the model's.
            eigen_smooth: Not offered, for the same reason.

        Raises:
            CalmError: If smoothing is asked for, or a target has no category.
        """
        if aug_smooth or eigen_smooth:
            raise CalmError("a CALM map is the model's own probability, which smoothing would change: leave it out")
        classes = None if targets is None else [getattr(target, "category", None) for target in targets]
        if classes is not None and None in classes:
            raise CalmError("targets must name a class: give ClassifierOutputTarget(category) for each image")
        with evaluation_mode(self.model), torch.no_grad():
            output = self.model(input_tensor.to(self.model.device))
            self.outputs = class_scores(output)
            grid = output.attribute(classes, self.kind)
        size = (input_tensor.shape[-2], input_tensor.shape[-1])
        return np.asarray(resize_and_normalize(grid, size, "minmax").float().cpu().numpy())

    def __enter__(self) -> CalmCam:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Leave nothing behind: there are no hooks."""


def quantus_explain(
    model: nn.Module, inputs: ArrayLike, targets: ArrayLike, *, method: str | None = None, **options: Any
) -> NDArray[np.float32]:
    """Explain a batch for Quantus: the ``explain_func`` of its metrics, whose model is a `ScoreModel`.

    Args:
        model: The `ScoreModel`, or the model itself.
        inputs: Normalised images (B, K, H, W).
        targets: Class indices (B,).
        method: One of `calm.list_methods`; None is the model's own map.
        options: Those of `calm.attribute`; Quantus's own ``device`` is that of the model anyway.

    Returns:
        Maps (B, 1, H, W), not normalised.
    """
    own = _own(model.model if isinstance(model, ScoreModel) else model)
    options.pop("device", None)
    images = torch.as_tensor(inputs, dtype=torch.float32, device=own.device)
    maps = attribute(own, images, torch.as_tensor(targets).long(), method or own.map_kind(), **options)
    return np.asarray(maps[:, None].float().cpu().numpy())


class _CalmAttribution:
    """A model's own maps as a method of Captum.

    Args:
        model: A model of this package; its mode is restored after each call.
        kind: A map kind of the model; None is its default.
    """

    def __init__(self, model: CalmModel, kind: str | None = None) -> None:
        self.forward_func, self.model, self.kind = ScoreModel(model), _own(model), model.map_kind(kind)

    def attribute(
        self, inputs: Tensor | tuple[Tensor, ...], target: Any = None, *, kind: str | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Return attributions of the shape of the inputs, as Captum asks: the map is shared out among the channels.

        Their sum over the channels is the map (B, H, W) at the images' size, in the unit of `calm.MAP_KINDS`.

        Args:
            inputs: Normalised images (B, K, H, W), or a tuple of these alone, for which a tuple is returned.
            target: A class index, or one for each image; None is the most probable class of each.
            kind: Another map kind than that of the object.
        """
        if isinstance(inputs, tuple):
            (images,) = inputs
            return (self.attribute(images, target, kind=kind),)  # type: ignore[return-value]
        with evaluation_mode(self.model):
            maps = self.model.attribute(inputs, target, kind or self.kind, size=(inputs.shape[-2], inputs.shape[-1]))
        return maps[:, None].expand(-1, inputs.shape[1], -1, -1) / inputs.shape[1]


class _CalmClassifier:
    """An image classifier that says where, as an estimator of scikit-learn.

    It trains in one process, without validation: for small data and for trying things out. `calm train` reads pictures
    beside the network, validates, resumes and reports. Images are files, PIL images or arrays uint8 (H, W, 3), in a
    list or, of one size, in one array.

    Args:
        backbone: One of `calm.list_backbones`.
        method: ``calm-em``, ``calm-ml`` or ``cam``.
        pretrained: Whether the backbone starts from published weights; it then learns at a tenth of the rate.
        freeze: Whether the backbone stays as it is: its features are computed once, and the head alone is trained.
        output_stride: Pixels per cell of the grid, of timm models that can be dilated: 8 or 16 give finer maps.
        image_size: Pixels of the sides of the input; None is 224, or that of a timm model that takes no other.
        epochs: Passes over the images.
        batch_size: Images in a step.
        lr: The peak learning rate of AdamW, on a one-cycle schedule.
        prior_weight: See `CalmOutput.loss`: above 0 it keeps the prior from collapsing on one place.
        pooling_exponent: See `ModelConfig`: 1 is the published CALM.
        flip: Whether images are mirrored at random (not with ``freeze``).
        device: See `calm.inference.resolve_device`.
        random_state: Seed of weights, order and flips; the global random numbers are left alone.

    Attributes:
        classes_: The labels, sorted.
        model_: The `CalmModel`, with all its maps; ``model_.save_pretrained(FOLDER)`` saves it for every command.
    """

    def __init__(
        self,
        backbone: str = "small_resnet",
        method: Method = "calm-em",
        *,
        pretrained: bool = False,
        freeze: bool = False,
        output_stride: int | None = None,
        image_size: int | None = 64,
        epochs: int = 20,
        batch_size: int = 32,
        lr: float = 0.002,
        prior_weight: float = 0.0,
        pooling_exponent: float = 1.0,
        flip: bool = True,
        device: str = "auto",
        random_state: Any = None,
    ) -> None:
        self.backbone, self.method, self.pretrained, self.freeze = backbone, method, pretrained, freeze
        self.output_stride, self.image_size, self.epochs, self.batch_size = (
            output_stride,
            image_size,
            epochs,
            batch_size,
        )
        self.pooling_exponent = pooling_exponent
        self.lr, self.prior_weight, self.flip, self.device, self.random_state = (
            lr,
            prior_weight,
            flip,
            device,
            random_state,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]
        tags.input_tags.two_d_array = False
        tags.no_validation = True  # images of several sizes, or names of files, are no matrix
        return tags

    def fit(self, images: Sequence[ImageLike] | NDArray[np.uint8], labels: ArrayLike) -> _CalmClassifier:
        """Train on images and their labels, (n,) of any kind that sorts; return the estimator itself."""
        from sklearn.utils import check_random_state

        self.classes_, targets = np.unique(np.asarray(labels), return_inverse=True)
        if np.ndim(labels) != 1 or len(images) != len(targets) or len(self.classes_) < 2:
            given = f"{len(images)} images, labels of shape {np.shape(labels)}, {len(self.classes_)} classes"
            raise CalmError(f"{given}: give one label to each image, of at least two classes")
        seed = int(check_random_state(self.random_state).randint(2**31))
        device = resolve_device(self.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            self.model_ = create_model(
                self.backbone,
                len(self.classes_),
                self.method,
                pretrained=self.pretrained,
                output_stride=self.output_stride,
                pooling_exponent=self.pooling_exponent,
                class_names=[str(label) for label in self.classes_],
                preprocessing=None if self.image_size is None else Preprocessing(size=(self.image_size,) * 2),
            ).to(device)
            self._train(images, torch.from_numpy(targets))
        self.model_.eval()
        return self

    def _train(self, images: Sequence[ImageLike] | NDArray[np.uint8], targets: Tensor) -> None:
        model = self.model_
        if self.freeze:
            model.backbone.requires_grad_(False)
            with torch.no_grad():
                features = torch.cat([model.encode(batch).cpu() for batch in self._batches(images)])
            data: Any = TensorDataset(features, targets)
        else:
            data = _Pictures(images, targets, model.transform)
        loader = DataLoader(data, self.batch_size, shuffle=True, drop_last=len(images) % self.batch_size == 1)
        rates = [self.lr * (0.1 if self.pretrained else 1.0), self.lr]
        groups = [
            {"params": part.parameters(), "lr": rate}
            for part, rate in zip((model.backbone, model.head), rates, strict=True)
        ]
        optimizer = torch.optim.AdamW(groups)
        steps = max(3, self.epochs * len(loader))  # the schedule divides by zero below
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps)
        model.train(not self.freeze)
        for _ in range(self.epochs):
            for inputs, labels in loader:
                if self.flip and not self.freeze:
                    inputs = torch.where(torch.rand(len(inputs), 1, 1, 1) < 0.5, inputs, inputs.flip(-1))
                inputs, labels = inputs.to(model.device), labels.to(model.device)
                loss = model.loss_from_features if self.freeze else model.loss
                optimizer.zero_grad()
                loss(inputs, labels, prior_weight=self.prior_weight).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()

    def _batches(self, images: Sequence[ImageLike] | NDArray[np.uint8]) -> Iterator[Tensor]:
        """Yield the inputs of images, on the model's device."""
        self.model_.eval()
        for start in range(0, len(images), self.batch_size):
            yield self.model_.preprocess(list(images[start : start + self.batch_size]))

    @torch.no_grad()
    def predict_proba(self, images: Sequence[ImageLike] | NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return p(y | x), (n, C), in the order of ``classes_``."""
        self._check_fitted()
        return np.concatenate([self.model_(batch).probs.cpu().numpy() for batch in self._batches(images)])

    def predict(self, images: Sequence[ImageLike] | NDArray[np.uint8]) -> NDArray[Any]:
        """Return the label of the most probable class of each image."""
        best = self.predict_proba(images).argmax(axis=1)
        return np.asarray(self.classes_[best])

    def explain(
        self,
        images: Sequence[ImageLike] | NDArray[np.uint8],
        labels: ArrayLike | None = None,
        *,
        kind: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> NDArray[np.float32]:
        """Return maps: where the evidence for a label is in each image.

        Args:
            images: As for `fit`.
            labels: The label to explain, one or (n,); None is the predicted one of each image.
            kind: A map kind of the model; None is p(y, z | x), which sums to the label's probability (``cam`` of CAM).
            size: (height, width) of the maps; None is the model's grid.
        """
        self._check_fitted()
        targets: list[int] | None = None
        if labels is not None:
            wanted = np.broadcast_to(np.asarray(labels), len(images))
            if unknown := set(wanted.tolist()) - set(self.classes_.tolist()):
                raise CalmError(f"no label {unknown.pop()!r}: the labels are {self.classes_.tolist()}")
            targets = np.searchsorted(self.classes_, wanted).tolist()
        maps = []
        for number, batch in enumerate(self._batches(images)):
            start = number * self.batch_size
            part = None if targets is None else targets[start : start + len(batch)]
            maps.append(self.model_.attribute(batch, part, kind, size=size).cpu().numpy())
        return np.concatenate(maps)

    def _check_fitted(self) -> None:
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Images, transformed when they are read, and their targets."""

    def __init__(self, images: Any, targets: Tensor, transform: Callable[[ImageLike], Tensor]) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.targets[index]


@cache
def _library_class(name: str) -> type:
    """Return one of our classes as a class of the library that it belongs to."""
    own: type
    bases: tuple[type, ...]
    if name == "CalmAttribution":
        with needs_extra("CalmAttribution", "baselines"):
            from captum.attr import Attribution
        own, bases = _CalmAttribution, (Attribution,)
    else:
        with needs_extra("CalmClassifier", "sklearn"):
            from sklearn.base import BaseEstimator, ClassifierMixin
        own, bases = _CalmClassifier, (ClassifierMixin, BaseEstimator)
    return type(name, (own, *bases), {"__module__": __name__, "__doc__": own.__doc__})


def __getattr__(name: str) -> Any:
    if name in ("CalmAttribution", "CalmClassifier"):
        return _library_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
