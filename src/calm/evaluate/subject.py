"""Maps that somebody else computed: a folder of ``.npy`` files, named by image.

The map of image ``birds/003.jpg`` is ``birds/003.jpg.npy`` or ``birds/003.npy`` below the folder: (height, width) as
the protocol has it, values in [0, 1], of the image's true class. Everything is looked at before anything is scored.

What is benchmarked: a model with one way to explain it, behind one call.

A benchmark asks a `Subject` to look at a batch once, and takes from what it saw the class probabilities and the
maps of as many classes as it needs. The model's own maps all come from that one forward pass; a baseline explains
each class asked anew.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from calm import baselines
from calm.data.records import Split
from calm.errors import CalmError, unknown
from calm.files import open_regular
from calm.heatmaps import Normalization
from calm.images import Preprocessing
from calm.metrics.pixels import Thresholds
from calm.model import CalmModel
from calm.output import MAP_KINDS, CalmOutput, CamOutput

__all__ = ["Looked", "MapFolder", "Subject", "model_subject", "open_map_folder", "read_map", "weights_digest"]

_NAMES = {"calm-em": "CALM-EM", "calm-ml": "CALM-ML", "cam": "CAM"}


class Looked(Protocol):
    """One look at a batch of images."""

    @property
    def probs(self) -> Float[Tensor, "b c"]:
        """p(y | x)."""

    def maps(self, classes: Int[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
        """Score maps of the classes asked, at the method's own resolution, not normalised."""


@dataclass(frozen=True)
class Subject:
    """A row of a benchmark's table.

    Attributes:
        label: its name in the table, "CALM-EM joint".
        look: normalised images (b, 3, H, W) on ``device`` to what was seen in them.
        preprocessing: how image files become its input.
        device: where images must be.
        normalization: of its maps before a protocol.
        thresholds: of its protocol, "even" or "log".
        box_normalization: the same before boxes are fitted, whose protocol cuts a map to 256 values: of probabilities
            of single cells most would be below the first.
        box_thresholds: of boxes.
        about: the model and its weights, the method and its options, ready for JSON: what a stored result is known by.
        model: what looks, if it is a model.
        look_with: the same method's look with other weights: (model, images) to what was seen.
    """

    label: str
    look: Callable[[Tensor], Looked]
    preprocessing: Preprocessing
    device: torch.device
    normalization: Normalization = "minmax"
    thresholds: Thresholds = "even"
    box_normalization: Normalization = "minmax"
    box_thresholds: Thresholds = "even"
    about: Mapping[str, Any] = field(default_factory=dict)
    model: CalmModel | None = None
    look_with: Callable[[CalmModel, Tensor], Looked] | None = None


@dataclass(frozen=True)
class _OwnMaps:
    """The model's own maps: from one output."""

    output: CalmOutput | CamOutput
    kind: str

    @property
    def probs(self) -> Tensor:
        return self.output.probs

    def maps(self, classes: Tensor) -> Tensor:
        with torch.no_grad():
            return self.output.attribute(classes, self.kind)


@dataclass(frozen=True)
class _BaselineMaps:
    """A baseline's maps: asked of the model for one column of classes after another."""

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
    **options: Any,
) -> Subject:
    """A model and one of its explanations.

    Args:
        model: is put in evaluation mode.
        method: a map kind of the model or a baseline (`calm.baselines.METHODS`); None: the model's main kind.
        label: the row's name; None: the training method and the explanation, "CAM gradcam".
        about: more to know the result by, such as the path of the model.
        normalization: None: ``clipping`` for CALM's own maps, which are probabilities, else ``minmax``; and ``minmax``
            for boxes.
        thresholds: None: ``log`` for CALM's own maps, else ``even``; and ``even`` for boxes.
        options: of the baseline: steps, samples, noise, seed, target_layer, batch_size.

    Raises:
        CalmError: an unknown method, one that the model does not have, or an option that it does not read.
    """
    name = model.map_kind() if method is None else baselines.canonical_method(method, model)
    own = name in MAP_KINDS
    if own and MAP_KINDS[name].over == "superclass":
        raise CalmError(f"map kind {name!r} needs a superclass, and benchmarks ask about single classes")
    allowed = frozenset() if own else baselines.BASELINES[name].options | {"batch_size"}
    for option in options:
        if option not in allowed:
            raise unknown(f"option of {name!r}", option, sorted(allowed))
    model.eval()

    def look_with(model: CalmModel, images: Tensor) -> Looked:
        with torch.no_grad():
            output: CalmOutput | CamOutput = model(images)
            if own:
                return _OwnMaps(output, name)
            return _BaselineMaps(model, images, output.probs, name, options)

    calm_maps = own and MAP_KINDS[name].family == "calm"
    return Subject(
        label or f"{_NAMES[model.config.method]} {name}",
        partial(look_with, model),
        model.preprocessing,
        model.device,
        normalization or ("clipping" if calm_maps else "minmax"),
        thresholds or ("log" if calm_maps else "even"),
        normalization or "minmax",
        thresholds or "even",
        {
            "model_config": {**asdict(model.config), "preprocessing": asdict(model.preprocessing)},
            "weights": weights_digest(model),
            "method": name,
            "options": {key: value for key, value in options.items() if key != "batch_size"},
            **(about or {}),
        },
        model,
        look_with,
    )


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers: 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


_SHOWN = 5
"""Examples of each kind of problem in a message."""


@dataclass(frozen=True)
class MapFolder:
    """A row of a benchmark's table that needs no model.

    Attributes:
        label: its name in the table.
        files: the map of each image of the split, in the split's order.
        thresholds: of the protocol, "even" or "log".
        about: what a stored result is known by, ready for JSON.
    """

    label: str
    files: tuple[Path, ...]
    thresholds: Thresholds
    about: Mapping[str, Any]

    @property
    def box_thresholds(self) -> Thresholds:
        """Of boxes: the same, the maps are taken as they are."""
        return self.thresholds

    def maps(self, places: Sequence[int]) -> Float[Tensor, "b h w"]:
        """The maps of images by their places in the split, float32 or wider."""
        return torch.from_numpy(np.stack([read_map(self.files[place]) for place in places]))


def open_map_folder(
    folder: Path,
    split: Split,
    *,
    size: tuple[int, int] = (224, 224),
    label: str | None = None,
    thresholds: Thresholds = "even",
) -> MapFolder:
    """Find and check the maps of all images of a split.

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
    found, problems = _matched([record.id for record in split.records], present)
    digest = hashlib.sha256()
    for path in found.values():
        problem = _problem(path, size, digest)
        if problem:
            problems.append((problem[0], f"{path.relative_to(folder).as_posix()}{problem[1]}"))
    if problems:
        raise CalmError(_report(folder, split, size, problems))
    about = {"method": "maps", "maps": str(folder.resolve()), "digest": digest.hexdigest()}
    return MapFolder(label or folder.resolve().name, tuple(found.values()), thresholds, about)


_FIXES = {
    "images have no map": "save each as <image id>.npy, in folders as the id has them",
    "maps belong to no image of the split": "take them out, or choose the split they were made for",
    "images have two maps": "keep either <image id>.npy or the one without the picture's suffix",
    "files are no array of numbers": "save them with numpy.save, without pickled objects",
    "maps have another shape": "resize them, bilinear, before normalising",
    "maps hold NaN or infinite values": "find out where they come from; a map without information is all zeros",
    "maps leave [0, 1]": "normalise each map, (map - min) / (max - min)",
}


def _matched(
    ids: Sequence[str], present: Mapping[str, Path]
) -> tuple[dict[str, Path], list[tuple[str, str]]]:
    """The file of each image that has one, in order; and images and files without their like."""
    stems = Counter(_stem(name) for name in ids)
    found: dict[str, Path] = {}
    problems = []
    used: set[str] = set()
    for name in ids:
        names = [f"{name}.npy"]
        if stems[_stem(name)] == 1 and _stem(name) != name:
            names.append(f"{_stem(name)}.npy")
        there = [candidate for candidate in names if candidate in present]
        used.update(there)
        if not there:
            problems.append(("images have no map", name))
        elif len(there) > 1:
            problems.append(("images have two maps", name))
        else:
            found[name] = present[there[0]]
    problems += [("maps belong to no image of the split", name) for name in present if name not in used]
    return found, problems


def _stem(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _read(path: Path) -> NDArray[Any]:
    """The array of a file; nothing is unpickled, and no more is allocated than the file holds.

    Raises:
        CalmError: naming the file: it is missing, or no whole array of numbers.
    """
    with open_regular(path, "map") as file:
        try:
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise ValueError(f"version {version} of the format is not known")
            shape, fortran, dtype = _HEADERS[version](file)
            if dtype.kind not in "fiub":
                raise ValueError(f"its values are of type {dtype.str!r:.40}")
            count = math.prod(shape)
            content = file.read(count * dtype.itemsize + 1) if 0 <= count <= _file_size(file) else b""
            if len(content) != count * dtype.itemsize:
                raise ValueError(f"its header says {shape} of {dtype.str}, which is not what it holds")
            array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
        except Exception as error:  # a damaged header can make numpy's parser fail in any way
            raise CalmError(f"cannot read map {path}: {str(error)[:200] or type(error).__name__}") from error
    return array


_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def _file_size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def read_map(path: Path) -> NDArray[Any]:
    """The map of a file, float32 or wider in the machine's byte order.

    Raises:
        CalmError: naming the file: it is missing, or no whole array of numbers.
    """
    array = _read(path)
    return array.astype(np.float64 if array.dtype.kind == "f" and array.dtype.itemsize == 8 else np.float32)


def _problem(path: Path, size: tuple[int, int], digest: Any) -> tuple[str, str] | None:
    """What is wrong with a file, and how; its content goes into the digest."""
    try:
        array = _read(path)
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


def _report(folder: Path, split: Split, size: tuple[int, int], problems: Iterable[tuple[str, str]]) -> str:
    """One message about everything."""
    kinds: dict[str, list[str]] = {}
    for kind, what in problems:
        kinds.setdefault(kind, []).append(what)
    lines = [
        f"the maps in {folder} do not fit split {split.name!r} ({len(split.records)} images, maps of "
        f"{size[0]} x {size[1]}):"
    ]
    for kind, names in kinds.items():
        more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"  {len(names)} {kind}: {_FIXES[kind]}. {', '.join(names[:_SHOWN])}{more}")
    return "\n".join(lines)
