"""Milliseconds an image in onnxruntime, of an exported model, beside the same model in PyTorch.

*Prediction alone* in onnxruntime is the part of the exported graph that `probs` needs. Every way takes the same images
and, with a map, one class for each; the maps stay on the grid. Prints Markdown tables.

Run: python benchmarks/export.py [--networks resnet18:224:4:200 ...] [--rounds 5]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import measure
import onnx
import onnxruntime
import torch

import calm
from calm.exporting import export
from calm.images import Preprocessing

EAGER, OPTIMISED = "PyTorch, prediction and map", "the same, `model.optimized_for_inference()`"
ALONE, MAP = "onnxruntime, prediction alone", "onnxruntime, prediction and map"
FASTER, ADDED = 1.5, 1.05
NETWORKS = ["resnet18:224:4:200", "timm/tf_efficientnet_lite0:224:4:1000", "vit_tiny_patch16_224:224:4:200"]


def session_of(path: Path) -> onnxruntime.InferenceSession:
    """A session with as many threads as PyTorch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def ways(backbone: str, size: int, batch: int, classes: int) -> dict[str, measure.Way]:
    """The ways, as functions without arguments."""
    torch.manual_seed(0)
    model = calm.create_model(backbone, classes, preprocessing=Preprocessing(size=(size, size))).eval()
    images, targets = torch.randn(batch, 3, size, size), torch.randint(classes, (batch, 1))
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
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    rows = []
    for network in flags.networks:
        backbone, *numbers = network.split(":")
        size, batch, classes = map(int, numbers)
        times = measure.seconds(ways(backbone, size, batch, classes), flags.rounds)
        faster, added = measure.ratio(times[EAGER], times[MAP]), measure.ratio(times[MAP], times[ALONE])
        both = measure.verdict(faster, FASTER, least=True), measure.verdict(added, ADDED)
        judged = {MAP: f"{both[0]}, {both[1]}"}
        for name, taken in times.items():
            ms = f"{1000 * measure.median(taken) / batch:.1f}"
            ratios = measure.ratio(times[EAGER], taken), measure.ratio(taken, times[ALONE])
            what = f"{backbone}, {size} pixels, {classes} classes, batch {batch}"
            rows.append([what, name, ms, f"{ratios[0]:.2f}", f"{ratios[1]:.3f}", judged.get(name, "")])
    header = ["network", "way", "ms/image", "PyTorch over this", "this over onnxruntime's prediction"]
    print(measure.table([*header, f"targets {FASTER} and {ADDED}"], rows))


if __name__ == "__main__":
    main()
