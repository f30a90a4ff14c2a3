"""Export a model to one file that returns probabilities and maps in the same pass, for runtimes without this package.

The file's program takes ``image`` and ``classes`` (int64, (B, K)) and returns ``probs`` (B, C), ``maps`` (B, K, h, w)
of the chosen classes on the grid, and, for CALM, ``prior`` (B, h, w). What else a program that uses it needs (names of
the classes, preprocessing, the kind of maps, versions) is in the file too. docs/export.md shows how to use it.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from calm.backbones import grid_size
from calm.config import ExportFormat
from calm.errors import CalmError, needs_extra, unknown
from calm.files import atomic_path
from calm.model import CalmModel
from calm.output import MAP_KINDS, CalmOutput

TOLERANCE = 1e-4
"""Most that a result of an exported file may differ from PyTorch's, relative to the largest value where that is above
1 (maps in nats or logits)."""

SUFFIXES: dict[str, str] = {"onnx": ".onnx", "torch-export": ".pt2", "executorch": ".pte"}
LARGEST_ONNX = 2**31 - 2**24
"""Most bytes of weights in one ONNX file: a protocol buffer holds 2 GB, and the graph needs room."""

METADATA = "calm.json"
"""The name of the metadata in a ``.pt2`` file; its fields are the keys of an ONNX file's, as JSON texts."""

Run = Callable[[Tensor, Tensor], list[Tensor]]


@dataclass(frozen=True)
class Exported:
    """An exported file, as `export` checked it; ``print`` says it in lines.

    Attributes:
        path: The file.
        metadata: What the file says of itself.
        error: The largest difference of its results from PyTorch's (see `TOLERANCE`).
        cases: The shapes of the images that it was compared on.
        note: Why the size of images is fixed, if it had to be; empty otherwise.
    """

    path: Path
    metadata: dict[str, Any]
    error: float
    cases: list[tuple[int, ...]]
    note: str = ""

    def __str__(self) -> str:
        inputs, outputs = (
            ", ".join(f"{name} {dtype} {_by(shape)}" for name, (dtype, *shape) in self.metadata[part].items())
            for part in ("inputs", "outputs")
        )
        shapes = ", ".join(map(_by, self.cases))
        lines = [
            f"{self.path}: {self.path.stat().st_size / 2**20:.1f} MB, {self.metadata['kind']} maps",
            f"takes    {inputs}",
            f"returns  {outputs}",
            f"checked  against PyTorch on images of {shapes}: at most {self.error:.0e} apart",
        ]
        return "\n".join(lines + [f"note     {self.note}"] * bool(self.note))


class Pass(nn.Module):
    """One forward pass as a function of tensors alone: what is exported.

    Args:
        model: In float32, on the CPU.
        kind: A canonical map kind that needs no superclass.
        preprocess: Whether images are uint8 (B, H, W, channels) of any size, which are resized and normalised here.
    """

    def __init__(self, model: CalmModel, kind: str, preprocess: bool) -> None:
        super().__init__()
        self.model, self.kind, self.preprocess = model, kind, preprocess

    def forward(self, image: Tensor, classes: Int[Tensor, "b k"]) -> tuple[Tensor, ...]:
        """Return probs (B, C), maps (B, K, h, w) and, for CALM, the prior (B, h, w)."""
        output = self.model.head(self.model.backbone(self.prepared(image) if self.preprocess else image))
        maps = MAP_KINDS[self.kind].read(output, classes)
        return (output.probs, maps, output.prior) if isinstance(output, CalmOutput) else (output.probs, maps)

    def prepared(self, image: Tensor) -> Float[Tensor, "b c H W"]:
        """Return uint8 pictures (B, H, W, channels) as `Preprocessing` does, but not rounded to grey levels."""
        settings = self.model.preprocessing
        values = image.permute(0, 3, 1, 2).float()
        values = F.interpolate(values, settings.size, mode=settings.interpolation, antialias=True)
        return settings.normalize(values / 255)


def export(
    model: CalmModel,
    out: str | Path,
    to: ExportFormat = "onnx",
    *,
    kind: str | None = None,
    preprocess: bool = False,
    dynamic_size: bool | None = None,
) -> Exported:
    """Write a model as one file for another runtime, and compare its results with PyTorch's before it gets its name.

    Args:
        model: The model, on any device and in any precision; the file computes in float32.
        out: The file: ``.onnx``, ``.pt2`` (torch-export) or ``.pte`` (executorch). An earlier one is replaced.
        to: The format.
        kind: Which maps it returns: a kind of the model that needs no superclass; None is the default kind.
        preprocess: Whether it takes uint8 pictures (B, H, W, channels), of any size but one size in a batch, and
            resizes and normalises them itself; otherwise images are float32 (B, channels, H, W), normalised.
        dynamic_size: Whether images may have another size than the model's. None allows it where the network does:
            not for networks with tables of relative positions, such as Swin. ExecuTorch's are fixed, and of batch 1.

    Returns:
        The file, and how far its results were from PyTorch's, on other batches and sizes than it was traced with.

    Raises:
        CalmError: If a name is unknown, the kind cannot be exported, a package is missing, the network cannot be
            traced, or the results differ from PyTorch's by more than `TOLERANCE`; then no file is left.
    """
    path = Path(out)
    if to not in get_args(ExportFormat):
        raise unknown("export format", to, get_args(ExportFormat))
    if path.suffix != SUFFIXES[to] or path.is_dir():
        other = next(
            (f", or to={name}" for name, suffix in SUFFIXES.items() if suffix == path.suffix != SUFFIXES[to]), ""
        )
        raise CalmError(f"cannot export to {path} as {to}: give a file whose name ends in {SUFFIXES[to]}{other}")
    kind = model.map_kind(kind)
    if MAP_KINDS[kind].over != "target":
        family = "cam" if model.config.method == "cam" else "calm"
        allowed = (name for name, spec in MAP_KINDS.items() if spec.over == "target" and family in spec.families)
        raise CalmError(f"map kind {kind!r} sums over classes, which is not exported: choose {', '.join(allowed)}")
    if to == "executorch" and (dynamic_size or preprocess):
        what = "dynamic_size" if dynamic_size else "preprocess"
        raise CalmError(f"executorch programs have one size of images: leave {what} out, or export to onnx")
    weights = sum(tensor.numel() for tensor in model.state_dict().values()) * 4
    if to == "onnx" and weights > LARGEST_ONNX:
        raise CalmError(f"{weights / 2**30:.1f} GB of weights do not fit into one ONNX file (2 GB): use torch-export")
    with needs_extra(f"exporting to {to}", "executorch" if to == "executorch" else "export"), _quiet():
        if to == "onnx":
            os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read at the import, which else notes the device
            import onnxruntime  # noqa: F401  (what is missing is said before the network is traced)
            import onnxscript  # noqa: F401
        elif to == "executorch":
            import executorch.exir  # noqa: F401
        plain = Pass(copy.deepcopy(model).cpu().float().eval().requires_grad_(False), kind, preprocess)
        sizes, note = _sizes(plain.model, to, preprocess, dynamic_size)
        with torch.no_grad(), atomic_path(path) as file:
            try:
                error, cases, metadata = _written(plain, file, to, sizes)
            except CalmError as fault:
                if dynamic_size or len(sizes) == 1 or preprocess:
                    raise
                note = f"images of other sizes than {_by(sizes[0])} pixels are not taken: {fault}"
                error, cases, metadata = _written(plain, file, to, sizes[:1])
    return Exported(path, metadata, error, cases, note)


def _sizes(model: CalmModel, to: str, preprocess: bool, dynamic: bool | None) -> tuple[list[tuple[int, int]], str]:
    """Return the sizes of images to compare on, the model's own first; and why there is one, if that was not asked."""
    height, width = own = model.preprocessing.size
    if preprocess:
        return [own, (height + 13, 2 * width), (2 * height // 3 + 1, width // 2 + 1)], ""
    if dynamic is False or to == "executorch":
        return [own], ""
    windows = any("rel_pos" in name or "relative_position" in name for name, _ in model.backbone.named_parameters())
    # timm's layers for weights from TensorFlow: traced, their paddings are terms that 20 minutes did not simplify.
    same = any(type(part).__name__.endswith("Same") for part in model.backbone.modules())
    channels = model.config.in_channels
    others = [(height + step, width + 2 * step) for step in (32, 28, 64, 56)]
    taken = [size for size in others if grid_size(model.backbone, size, channels) is not None][:1]
    why = "its positions are a table for windows of one size" if windows and dynamic is None else ""
    why = why or ("its padding depends on the size (SAME)" if same else "" if taken else "the network takes no other")
    if why and dynamic:
        raise CalmError(f"images must be {_by(own)} pixels, {why}: leave dynamic_size out")
    if why:
        return [own], f"images must be {_by(own)} pixels: {why}"
    return [own, *taken], ""


def _by(shape: Sequence[object]) -> str:
    return " x ".join(map(str, shape))


def _written(
    plain: Pass, file: Path, to: ExportFormat, sizes: list[tuple[int, int]]
) -> tuple[float, list[tuple[int, ...]], dict[str, Any]]:
    """Write a program of several sizes of images, or of one; return its error, the shapes compared, the metadata."""
    batch = 1 if to == "executorch" else 2
    dynamic, example = len(sizes) > 1, _inputs(plain, batch, 3, sizes[0], seed=0)
    sides = ((1, 2) if plain.preprocess else (2, 3)) if dynamic else ()
    image: dict[int, Any] = dict.fromkeys(sides, Dim.DYNAMIC)
    classes: dict[int, Any] = {1: Dim.DYNAMIC}
    if batch == 1:  # memory is planned ahead, so that the most classes must be known
        classes = {1: Dim("k", min=1, max=max(4, plain.model.config.num_classes))}
    else:
        image[0] = classes[0] = Dim.DYNAMIC
    metadata = _metadata(plain, example, dynamic)
    try:
        program = torch.export.export(plain, example, dynamic_shapes={"image": image, "classes": classes})
        for node in program.graph.nodes:  # places in files of this machine
            node.meta.pop("stack_trace", None)
        run = _WRITERS[to](program, file, metadata)
    except (ModuleNotFoundError, OSError):
        raise
    except Exception as error:  # whatever tracing a network raises
        which = "any size" if dynamic else f"{_by(sizes[0])} pixels"
        first = str(error).strip().partition("\n")[0][:300]
        raise CalmError(
            f"it cannot be exported to {to} for images of {which}: {type(error).__name__}: {first}"
        ) from error
    worst, cases = 0.0, []
    for number, size in enumerate(sizes, start=1):
        for images, count in ((1, 1), (1, 4)) if batch == 1 else ((1, 2), (3, 1)):
            inputs = _inputs(plain, images, count, size, seed=number)
            cases.append(tuple(inputs[0].shape))
            worst = max(worst, _difference(run, plain, inputs))
    return worst, cases, metadata


def _difference(run: Run, plain: Pass, inputs: tuple[Tensor, Tensor]) -> float:
    """Return how far a program's results are from PyTorch's; raise a CalmError above `TOLERANCE`."""
    what = f"images of {_by(inputs[0].shape)}"
    try:
        found = run(*inputs)
    except Exception as error:  # whatever a runtime raises
        raise CalmError(f"the exported program does not run on {what}: {str(error)[:300]}") from error
    worst = 0.0
    for expected, other in zip(plain(*inputs), found, strict=True):
        if expected.shape != other.shape:
            raise CalmError(f"{what} give {_by(other.shape)} values instead of {_by(expected.shape)}")
        apart = float((expected - other).abs().max() / expected.abs().max().clamp(min=1))
        if not apart <= TOLERANCE:  # NaN is not, either
            raise CalmError(f"results on {what} are {apart:.1e} from PyTorch's, allowed are {TOLERANCE:g}")
        worst = max(worst, apart)
    return worst


def _inputs(plain: Pass, images: int, classes: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Return random images and classes of the program's kind."""
    generator, config = torch.Generator().manual_seed(seed), plain.model.config
    chosen = torch.randint(config.num_classes, (images, classes), generator=generator)
    if plain.preprocess:
        shape = (images, *size, config.in_channels)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8), chosen
    return torch.randn(images, config.in_channels, *size, generator=generator), chosen


def _metadata(plain: Pass, example: tuple[Tensor, Tensor], dynamic: bool) -> dict[str, Any]:
    """Return what a user of the file needs to know, as JSON data; a tensor is its dtype and the names of its sides."""
    model, (image, _), results = plain.model, example, plain(*example)
    batch = "batch" if len(image) > 1 else 1
    sides = ["height", "width"] if dynamic else list(model.preprocessing.size)
    cells = ["rows", "columns"] if dynamic and not plain.preprocess else list(results[1].shape[2:])
    channels = model.config.in_channels
    shape = [*sides, channels] if plain.preprocess else [channels, *sides]
    outputs = {
        "probs": ["float32", batch, model.config.num_classes],
        "maps": ["float32", batch, "k", *cells],
        "prior": ["float32", batch, *cells],
    }
    return {
        "class_names": model.class_names,
        "kind": plain.kind,
        "preprocess": plain.preprocess,
        "preprocessing": asdict(model.preprocessing),
        "inputs": {"image": [str(image.dtype).removeprefix("torch."), batch, *shape], "classes": ["int64", batch, "k"]},
        "outputs": dict(list(outputs.items())[: len(results)]),
        "model": asdict(model.config),
        "versions": {package: version(package) for package in ("calm", "torch", "timm")},
    }


def _onnx(program: ExportedProgram, file: Path, metadata: dict[str, Any]) -> Run:
    import onnxruntime

    names = {**metadata["inputs"], **metadata["outputs"]}
    made = torch.onnx.export(
        program, input_names=list(metadata["inputs"]), output_names=list(metadata["outputs"]), verbose=False
    )
    assert made is not None
    proto = made.model_proto
    del proto.graph.value_info[:]  # shapes within the graph, under names of the tracer
    for node in proto.graph.node:
        del node.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for side, name in zip(value.type.tensor_type.shape.dim, names[value.name][1:], strict=True):
            if isinstance(name, str):
                side.dim_param = name
    for key, content in metadata.items():
        proto.metadata_props.add(key=key, value=json.dumps(content, ensure_ascii=False))
    file.write_bytes(proto.SerializeToString())
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])

    def run(image: Tensor, classes: Tensor) -> list[Tensor]:
        found = session.run(None, {"image": image.numpy(), "classes": classes.numpy()})
        return [torch.from_numpy(values) for values in found]

    return run


def _torch_export(program: ExportedProgram, file: Path, metadata: dict[str, Any]) -> Run:
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata, ensure_ascii=False)})
    module = torch.export.load(file).module()
    return lambda image, classes: list(module(image, classes))


def _executorch(program: ExportedProgram, file: Path, metadata: dict[str, Any]) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    texts = {METADATA.partition(".")[0]: json.dumps(metadata)}
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], constant_methods=texts)
    file.write_bytes(lowered.to_executorch().buffer)
    method = Runtime.get().load_program(file).load_method("forward")
    return lambda image, classes: list(method.execute([image, classes]))


_WRITERS: dict[str, Callable[[ExportedProgram, Path, dict[str, Any]], Run]] = {
    "onnx": _onnx,
    "torch-export": _torch_export,
    "executorch": _executorch,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Run the block without the exporters' warnings, which are about their own code."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
