"""What is benchmarked: a model with one way to explain it, or a folder of maps that another program computed.

A benchmark asks a `Subject` for one `Prediction` per batch. The model's own maps all come from that one forward pass; a
baseline runs the model again for each class.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from calm import baselines
from calm.config import Precision
from calm.data.cues import PROTOCOL_SIZE
from calm.data.loading import match_classes
from calm.data.records import Split
from calm.errors import CalmError, unknown
from calm.files import open_regular
from calm.heatmaps import Normalization
from calm.images import Preprocessing
from calm.latent import check_exponent
from calm.metrics.pixels import Thresholds
from calm.model import CalmModel
from calm.output import MAP_KINDS, CalmOutput, CamOutput


class Prediction(Protocol):
    """The result of one forward pass of a batch of images."""

    @property
    def probs(self) -> Float[Tensor, "b c"]:
        """p(y | x)."""

    def maps(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Return score maps of classes, at the method's own resolution, not normalised."""


@dataclass(frozen=True)
class Subject:
    """A row of a benchmark's table: a model with an explanation.

    Attributes:
        label: its name in the table, "CALM-EM joint".
        predict: from normalised images (b, 3, H, W) on ``device`` to their prediction.
        preprocessing: how image files become its input.
        device: where images must be.
        normalization: of its maps before a protocol.
        thresholds: of its protocol, "even" or "log".
        box_normalization: of its maps before boxes are fitted. That protocol quantises maps to 8 bits, which makes
            probabilities of single cells 0; so it is ``minmax`` by default.
        box_thresholds: of boxes.
        about: the model and its weights, the method and its options, ready for JSON: the identity of stored results.
        model: the model, if there is one.
        predict_with: as ``predict``, with the weights of another model of the same architecture.
        cache: where benchmarks keep what does not depend on the maps, for other rows of the same model on the same
            split: predictions without random pixels. None keeps nothing.
    """

    label: str
    predict: Callable[[Tensor], Prediction]
    preprocessing: Preprocessing
    device: torch.device
    normalization: Normalization = "minmax"
    thresholds: Thresholds = "even"
    box_normalization: Normalization = "minmax"
    box_thresholds: Thresholds = "even"
    about: Mapping[str, Any] = field(default_factory=dict)
    model: CalmModel | None = None
    predict_with: Callable[[CalmModel, Tensor], Prediction] | None = None
    cache: dict[Any, Any] | None = None

    def classes(self, split: Split) -> Int[Tensor, " c"]:
        """Return the class of the prediction that is each class of the data: by name if there is a model, or by number.

        Raises:
            CalmError: see `calm.data.match_classes`.
        """
        if self.model is None:
            return torch.arange(split.num_classes)
        name = str(self.about.get("model", self.label))
        return torch.tensor(match_classes(self.model.class_names, split.class_names, model=name, data=str(split.root)))


@dataclass(frozen=True)
class _OwnMaps:
    """The model's own maps, from one output."""

    output: CalmOutput | CamOutput
    kind: str
    prior_exponent: float = 1.0

    @cached_property  # the output computes it anew, over all locations, at each read
    def probs(self) -> Tensor:
        return self.output.probs

    def maps(self, classes: Tensor) -> Tensor:
        with torch.no_grad():
            return self.output.attribute(classes, self.kind, prior_exponent=self.prior_exponent)


@dataclass(frozen=True)
class _BaselineMaps:
    """A baseline's maps, computed for one column of classes after another."""

    model: CalmModel
    images: Tensor
    probs: Tensor
    method: str
    options: Mapping[str, Any]

    def maps(self, classes: Tensor) -> Tensor:
        columns = [
            baselines.attribute(self.model, self.images, column, self.method, **self.options)
            for column in classes.unbind(dim=1)
        ]
        return torch.stack(columns, dim=1)


def model_subject(
    model: CalmModel,
    *,
    method: str | None = None,
    label: str | None = None,
    about: Mapping[str, Any] | None = None,
    normalization: Normalization | None = None,
    thresholds: Thresholds | None = None,
    predictor: CalmModel | None = None,
    precision: Precision = "32-true",
    **options: Any,
) -> Subject:
    """Return the subject of a model and one of its explanations.

    Args:
        model: is put in evaluation mode.
        method: a map kind of the model or a baseline (`calm.baselines.METHODS`); None: the model's main kind.
        label: the row's name; None: the training method and the explanation, "CAM gradcam".
        about: more to identify the result by, such as the path of the model.
        normalization: None: ``clipping`` for CALM's own maps, which are probabilities, else ``minmax``; and ``minmax``
            for boxes.
        thresholds: None: ``log`` for CALM's own maps, else ``even``; and ``even`` for boxes.
        predictor: computes predictions and own maps in place of ``model``: its `CalmModel.optimized_for_inference`.
        precision: of these; baselines and randomised models are always computed in float32.
        options: of the baseline: steps, samples, noise, seed, target_layer, batch_size; of CALM's own maps:
            prior_exponent.

    Raises:
        CalmError: an unknown method, one that the model does not have, an option that it does not read, or weights
            that are not finite.
    """
    name = model.map_kind() if method is None else baselines.canonical_method(method)
    own = name in MAP_KINDS
    if own:
        name = model.map_kind(name)
        if MAP_KINDS[name].over == "superclass":
            raise CalmError(f"map kind {name!r} needs a superclass, and benchmarks ask about single classes")
    has_prior = own and model.config.method != "cam"
    allowed = frozenset({"prior_exponent"} if has_prior else ()) if own else baselines.BASELINES[name].options
    allowed |= frozenset() if own else {"batch_size"}
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {name!r}", option, sorted(allowed))
    exponent = float(options.get("prior_exponent", 1.0))
    check_exponent(exponent)
    model.eval()
    model.check_finite(label or "the model")

    def predict_with(
        model: CalmModel, images: Tensor, predictor: CalmModel | None = None, *, half: bool = False
    ) -> Prediction:
        with torch.no_grad():
            with torch.autocast(images.device.type, torch.bfloat16, enabled=half):
                output: CalmOutput | CamOutput = (predictor or model)(images)
            if own:
                return _OwnMaps(output, name, exponent)
            return _BaselineMaps(model, images, output.probs, name, options)

    half = precision == "bf16-mixed"
    probabilities = own and MAP_KINDS[name].families == ("calm",)
    return Subject(
        label or f"{model.config.title} {name}{f' prior^{exponent:g}' * (exponent != 1)}{', bf16' * half}",
        partial(predict_with, model, predictor=predictor, half=half),
        model.preprocessing,
        model.device,
        normalization or ("clipping" if probabilities else "minmax"),
        thresholds or ("log" if probabilities else "even"),
        normalization or "minmax",
        thresholds or "even",
        {
            "model_config": {**asdict(model.config), "preprocessing": asdict(model.preprocessing)},
            "weights": weights_digest(model),
            "method": name,
            "options": {key: value for key, value in options.items() if key != "batch_size"},
            **own_code(MAP_KINDS[name].read if own else baselines.BASELINES[name].explain),
            **({"precision": precision} if half else {}),
            **(about or {}),
        },
        model,
        predict_with,
    )


def own_code(function: Callable[..., Any]) -> dict[str, str]:
    """Return a digest of a user's own method: of its file, or of the function where it has no file. Empty for ours.

    The package's version stands for its own methods in the identity of a stored result; a function that was changed
    must not be shown the figures of what it was.
    """
    bound = ""
    while isinstance(function, partial):
        bound += f"{function.args} {function.keywords} "
        function = function.func
    if (function.__module__ or "").partition(".")[0] == "calm":
        return {}
    try:
        code = Path(inspect.getfile(function)).read_bytes()
    except (TypeError, OSError):  # an object that is called, a notebook's cell
        found = getattr(function, "__code__", None)
        code = repr((found.co_code, found.co_consts, found.co_names) if found else function).encode()
    return {"code": hashlib.sha256(bound.encode() + code).hexdigest()}


def weights_digest(model: torch.nn.Module) -> str:
    """Return the SHA-256 of a model's parameters and buffers: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class MapFolder:
    """A row of a benchmark's table that needs no model (see `Subject`); ``files`` are in the split's order."""

    label: str
    files: tuple[Path, ...]
    thresholds: Thresholds
    about: Mapping[str, Any]

    @property
    def box_thresholds(self) -> Thresholds:
        """Thresholds of boxes: the same, since maps are used as they are."""
        return self.thresholds

    def maps(self, positions: Sequence[int]) -> Float[Tensor, "b h w"]:
        """Return the maps of images by their positions in the split, float32 or wider."""
        return torch.from_numpy(np.stack([read_map(self.files[position]) for position in positions]))


def open_map_folder(
    folder: Path,
    split: Split,
    *,
    size: tuple[int, int] = PROTOCOL_SIZE,
    label: str | None = None,
    thresholds: Thresholds = "even",
) -> MapFolder:
    """Find and check the maps of all images of a split.

    The map of image ``birds/003.jpg`` is ``birds/003.jpg.npy`` or ``birds/003.npy``: an array (height, width) with
    values in [0, 1], of the image's true class.

    Args:
        folder: where the ``.npy`` files are.
        split: the images.
        size: (height, width) that every map must have.
        label: the row's name; None: the folder's.
        thresholds: "even", or "log" for maps of small probabilities.

    Raises:
        CalmError: one report of everything that is wrong: no such folder, images without a map, maps of no image,
            files that are no array of numbers, maps of another shape, with NaN, or with values outside [0, 1].
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CalmError(f"there is no folder {folder}: give the folder with the .npy maps")
    present = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.npy"))}
    files, problems = _match([record.id for record in split.records], present)
    digest = hashlib.sha256()
    for path in files.values():
        if problem := _problem(path, size, digest):
            problems[problem[0]].append(f"{path.relative_to(folder).as_posix()}{problem[1]}")
    if problems:
        images = f"{len(split.records)} images, maps of {size[0]} x {size[1]}"
        lines = [f"the maps in {folder} do not fit split {split.name!r} ({images}):"]
        for kind, names in problems.items():
            more = f", and {len(names) - _EXAMPLES} more" if len(names) > _EXAMPLES else ""
            lines.append(f"  {len(names)} {kind}: {_FIXES[kind]}. {', '.join(names[:_EXAMPLES])}{more}")
        raise CalmError("\n".join(lines))
    about = {"method": "maps", "maps": str(folder.resolve()), "digest": digest.hexdigest()}
    return MapFolder(label or folder.resolve().name, tuple(files.values()), thresholds, about)


def read_map(path: Path) -> NDArray[Any]:
    """Return the map of a file, float32 or wider in the machine's byte order.

    Raises:
        CalmError: naming the file: it is missing, or no whole array of numbers.
    """
    array = _open_array(path)
    return array.astype(np.float64 if array.dtype.kind == "f" and array.dtype.itemsize == 8 else np.float32)


def _open_array(path: Path) -> NDArray[Any]:
    """Map the array of an untrusted file into memory, which neither unpickles nor allocates what a header claims."""
    open_regular(path, "map").close()  # no pipe, device or folder, which could be waited for
    try:
        array: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind not in "fiub":
            raise ValueError(f"its values are of type {array.dtype.str!r:.40}")
        if array.offset + array.nbytes != path.stat().st_size:
            raise ValueError(f"it is longer than its header says, {array.shape} of {array.dtype.str}")
    except Exception as error:  # a damaged header can make NumPy's parser fail in any way
        raise CalmError(f"cannot read map {path}: {str(error)[:200] or type(error).__name__}") from error
    return array


_EXAMPLES = 5
"""Examples of each kind of problem in a message."""

_FIXES = {
    "images have no map": "save each as <image id>.npy, in folders as the id has them",
    "maps belong to no image of the split": "take them out, or choose the split they were made for",
    "images have two maps": "keep either <image id>.npy or the one without the picture's suffix",
    "files are no array of numbers": "save them with numpy.save, without pickled objects",
    "maps have another shape": "resize them, bilinear, before normalising",
    "maps hold NaN or infinite values": "find out where they come from; a map without information is all zeros",
    "maps leave [0, 1]": "normalise each map, (map - min) / (max - min)",
}


def _match(ids: Sequence[str], present: Mapping[str, Path]) -> tuple[dict[str, Path], defaultdict[str, list[str]]]:
    """Return the file of each image that has one, in order, and the images and files that do not match, by problem."""
    stem_of = {name: str(PurePosixPath(name).with_suffix("")) for name in ids}
    times = Counter(stem_of.values())
    files: dict[str, Path] = {}
    problems: defaultdict[str, list[str]] = defaultdict(list)
    unused = dict.fromkeys(present)
    for name, stem in stem_of.items():
        candidates = {f"{name}.npy"} | ({f"{stem}.npy"} if times[stem] == 1 else set())
        there = sorted(candidates & present.keys())
        for candidate in there:
            del unused[candidate]
        if len(there) == 1:
            files[name] = present[there[0]]
        else:
            problems["images have two maps" if there else "images have no map"].append(name)
    if unused:
        problems["maps belong to no image of the split"] += unused
    return files, problems


def _problem(path: Path, size: tuple[int, int], digest: Any) -> tuple[str, str] | None:
    """Return the kind and the details of a file's problem, if it has one; add its content to the digest."""
    try:
        array = _open_array(path)
    except CalmError as error:
        return "files are no array of numbers", f" ({str(error).rpartition(f'{path}: ')[2]})"
    digest.update(np.ascontiguousarray(array).tobytes())
    if array.shape != size:
        return "maps have another shape", f" {array.shape}"
    if not np.isfinite(array).all():
        return "maps hold NaN or infinite values", ""
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        return "maps leave [0, 1]", f" ({low:g} to {high:g})"
    return None
