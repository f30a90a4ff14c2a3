"""Milliseconds an image in onnxruntime, of an exported model, beside the same model in PyTorch.

*Prediction alone* in onnxruntime is the part of the exported graph that `probs` needs. Every way takes the same images
and, with a map, one class for each; the maps stay on the grid. Prints Markdown tables: where a target is missed, also
what onnxruntime's own profiler counts, beside `torch.mm`.

Run: python benchmarks/export.py [--networks resnet18:224:4:200 ...] [--threads 2] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import textwrap
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read where torch is imported; see `session_of`

import measure
import onnx
import onnxruntime
import torch
from torch.utils.flop_counter import FlopCounterMode

import calm
from calm.exporting import export
from calm.images import Preprocessing

EAGER, OPTIMISED = "PyTorch, prediction and map", "the same, `model.optimized_for_inference()`"
ALONE, MAP = "onnxruntime, prediction alone", "onnxruntime, prediction and map"
FASTER, ADDED = 1.5, 1.05
NETWORKS = ["resnet18:224:4:200", "timm/tf_efficientnet_lite0:224:4:1000", "vit_tiny_patch16_224:224:4:200"]


def session_of(path: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
    """A session with as many threads as PyTorch has; with ``profile`` it records its operations in such a file.

    Its threads sleep while they wait: the ways take turns, and one that spins takes the processor of the next.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def made(backbone: str, size: int, batch: int, classes: int) -> tuple[calm.CalmModel, torch.Tensor, torch.Tensor]:
    """A model, images and a class for each."""
    torch.manual_seed(0)
    model = calm.create_model(backbone, classes, preprocessing=Preprocessing(size=(size, size))).eval()
    return model, torch.randn(batch, 3, size, size), torch.randint(classes, (batch, 1))


def hottest(seconds: float, backbone: str, size: int, batch: int, classes: int, passes: int = 5) -> str:
    """A table of the operations that take most of the ``seconds`` of a pass through the exported model, and a line on
    how fast they multiply. The profiler's own clock is the wall's: only the shares are taken from it."""
    model, images, targets = made(backbone, size, batch, classes)
    with tempfile.TemporaryDirectory() as folder:
        export(model, Path(folder) / "model.onnx", dynamic_size=False)
        session = session_of(Path(folder) / "model.onnx", Path(folder) / "profile")
        for _ in range(passes + 1):
            session.run(None, {"image": images.numpy(), "classes": targets.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    nodes = nodes[len(nodes) // (passes + 1) :]  # the first pass prepares
    calls, taken = Counter[str](), Counter[str]()
    for event in nodes:
        calls[event["args"]["op_name"]] += 1
        taken[event["args"]["op_name"]] += event["dur"]
    total = taken.total()
    rows = [
        (f"`{name}`", calls[name] // passes, f"{1000 * seconds * time / total / batch:.2f}", f"{time / total:.1%}")
        for name, time in taken.most_common(6)
    ]
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(images)
    share = sum(time for name, time in taken.items() if "Conv" in name or "MatMul" in name or "Gemm" in name) / total
    flops = counted.get_total_flops()
    speed = flops / share / seconds
    square = torch.randn(1024, 1024)
    best = min(measure.seconds({"mm": lambda: square @ square}, 20)["mm"])
    line = (
        "Its convolutions and matrix products, "
        f"{flops / batch / 1e9:.1f} GFLOP an image and {share:.0%} of the time, reach {speed / 1e9:.0f} GFLOP/s; "
        f"`torch.mm` of 1024 x 1024 reaches {2 * 1024**3 / best / 1e9:.0f}."
    )
    return f"{measure.table(['operation', 'calls', 'ms/image', 'share'], rows)}\n\n{textwrap.fill(line, 120)}"


def ways(backbone: str, size: int, batch: int, classes: int) -> dict[str, measure.Way]:
    """The ways, as functions without arguments."""
    model, images, targets = made(backbone, size, batch, classes)
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder) / "whole.onnx", Path(folder) / "part.onnx"
        export(model, whole, dynamic_size=False)
        onnx.utils.extract_model(str(whole), str(part), ["image"], ["probs"])
        with_map, alone = session_of(whole), session_of(part)
    feed = {"image": images.numpy(), "classes": targets.numpy()}

    def torch_way(network: calm.CalmModel) -> measure.Way:
        @torch.no_grad()
        def run() -> object:
            output = network(images)
            return output.probs, output.attribute(targets)

        return run

    return {
        EAGER: torch_way(model),
        OPTIMISED: torch_way(model.optimized_for_inference()),
        ALONE: lambda: alone.run(None, {"image": feed["image"]}),
        MAP: lambda: with_map.run(None, feed),
    }


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="BACKBONE:PIXELS:BATCH:CLASSES")
    parser.add_argument("--threads", type=int, help="of PyTorch and onnxruntime each; above 1, times are of the wall")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    if flags.threads:
        torch.set_num_threads(flags.threads)
    rows, profiles = [], ""
    for network in flags.networks:
        backbone, *numbers = network.split(":")
        size, batch, classes = map(int, numbers)
        times = measure.seconds(ways(backbone, size, batch, classes), flags.rounds)
        faster, added = measure.ratio(times[EAGER], times[MAP]), measure.ratio(times[MAP], times[ALONE])
        both = measure.verdict(faster, FASTER, least=True), measure.verdict(added, ADDED)
        judged = {MAP: f"{both[0]}, {both[1]}"}
        if set(both) != {"met"}:
            table = hottest(measure.median(times[MAP]), backbone, size, batch, classes)
            profiles += f"\n\n{MAP}, {backbone}, batch {batch}, by operation:\n\n{table}"
        for name, taken in times.items():
            ms = f"{1000 * measure.median(taken) / batch:.1f}"
            ratios = measure.ratio(times[EAGER], taken), measure.ratio(taken, times[ALONE])
            what = f"{backbone}, {size} pixels, {classes} classes, batch {batch}" + (
                f", {flags.threads} threads" if flags.threads else ""
            )
            rows.append([what, name, ms, f"{ratios[0]:.2f}", f"{ratios[1]:.3f}", judged.get(name, "")])
    header = ["network", "way", "ms/image", "PyTorch over this", "this over onnxruntime's prediction"]
    print(measure.table([*header, f"targets {FASTER} and {ADDED}"], rows) + profiles)


if __name__ == "__main__":
    main()
