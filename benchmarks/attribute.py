"""`calm attribute` on a folder of photographs, beside the bare forward passes and beside the loops of other packages.

The network is timm's ResNet-18 with 200 classes and random weights, at 224 pixels; the photographs are noise with the
spectrum of natural images, 500 x 375 pixels, as JPEG. Each way starts from the folder, except for the passes:

- the bare forward passes of the model, and of its copy for inference: p(y | x) of batches that are there already.
- `calm attribute`: reads, explains, draws and writes an overlay and a map for each; as a function, and as a command,
  whose time includes the start of Python, PyTorch and timm.
- pytorch-grad-cam (Grad-CAM) and torch-cam (LayerCAM): a picture at a time, as their READMEs show it, and the overlay
  written as PNG.

Wall seconds are those of all threads together, processor seconds do not count other programs. Prints Markdown tables.

Run: python benchmarks/attribute.py [--photographs 500 --rounds 2 --threads 2]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import preprocess_image, show_cam_on_image
from torchcam.methods import LayerCAM
from torchcam.utils import overlay_mask
from torchvision.transforms.v2 import functional

import calm
from calm.cli.attribute import attribute_files

BATCH = 16  # of `calm attribute`
PASSES, OPTIMISED = "forward passes", "forward passes, optimised copy"
OURS, COMMAND = "`calm attribute`, without start-up", "`calm attribute`, the command"
GRADCAM, TORCHCAM = "pytorch-grad-cam's loop", "torch-cam's loop"


class Scores(torch.nn.Module):
    """The model as these packages want it: images to log p(y | x)."""

    def __init__(self, model: calm.CalmModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images).log_probs


def gradcam_loop(model: calm.CalmModel, files: list[Path], out: Path) -> None:
    """pytorch-grad-cam's README, for each file."""
    out.mkdir(exist_ok=True)
    with GradCAM(model=Scores(model), target_layers=[model.backbone]) as explainer:
        for file in files:
            image = Image.open(file).convert("RGB")
            pixels = np.asarray(image.resize((224, 224)), dtype=np.float32) / 255
            preprocessing = model.preprocessing
            batch = preprocess_image(pixels, mean=list(preprocessing.mean), std=list(preprocessing.std))
            grey = explainer(input_tensor=batch, targets=None)[0]
            resized = np.asarray(Image.fromarray(grey).resize(image.size, Image.Resampling.BILINEAR))
            drawn = show_cam_on_image(np.asarray(image, dtype=np.float32) / 255, resized, use_rgb=True)
            Image.fromarray(drawn).save(out / f"{file.stem}.png")


def torchcam_loop(model: calm.CalmModel, files: list[Path], out: Path) -> None:
    """torch-cam's README, for each file."""
    out.mkdir(exist_ok=True)
    scores = Scores(model)
    with LayerCAM(scores, model.backbone, input_shape=(3, 224, 224)) as explainer:
        for file in files:
            image = Image.open(file).convert("RGB")
            pixels = functional.to_dtype(functional.to_image(image.resize((224, 224))), torch.float32, scale=True)
            batch = functional.normalize(pixels, model.preprocessing.mean, model.preprocessing.std)[None]
            output = scores(batch)
            (grey,) = explainer(int(output[0].argmax()), output)
            overlay_mask(image, functional.to_pil_image(grey, mode="F"), alpha=0.5).save(out / f"{file.stem}.png")


def times(way: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds and processor seconds of a way, its processes included."""
    before, start = sum(os.times()[:4]), time.perf_counter()
    way()
    return time.perf_counter() - start, sum(os.times()[:4]) - before


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2, help="the medians are shown")
    parser.add_argument("--backbone", default="timm/resnet18")
    parser.add_argument("--command", action=argparse.BooleanOptionalAction, default=True, help="time the command, too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of PyTorch, and as many beside")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    os.environ["OMP_NUM_THREADS"] = str(flags.threads)  # of the command
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photographs").mkdir()
        files = [folder / "photographs" / f"{number:04}.jpg" for number in range(flags.photographs)]
        for number, file in enumerate(files):
            measure.photograph(number).save(file, quality=90)
        model = calm.create_model(flags.backbone, 200)
        source = str(model.save_pretrained(folder / "model"))
        fast = model.eval().optimized_for_inference()
        images = model.preprocess(files[:BATCH])

        @torch.no_grad()
        def passes(model: calm.CalmModel) -> None:
            for start in range(0, len(files), BATCH):
                _ = model(images[: len(files) - start]).probs

        def ours() -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                attribute_files([str(folder / "photographs")], model=source, out=folder / "ours", overwrite=True)

        def command() -> None:
            words = ["attribute", str(folder / "photographs"), "--model", source, "--out", str(folder / "command")]
            code = f"import sys; from calm.cli import main; sys.exit(main({[*words, '--overwrite']!r}))"
            subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

        ways: dict[str, Callable[[], object]] = {
            PASSES: lambda: passes(model),
            OPTIMISED: lambda: passes(fast),
            OURS: ours,
            **({COMMAND: command} if flags.command else {}),
            GRADCAM: lambda: gradcam_loop(model, files, folder / "gradcam"),
            TORCHCAM: lambda: torchcam_loop(model, files, folder / "torchcam"),
        }
        passes(model)
        taken = {name: [times(way)] for name, way in ways.items()}
        for _ in range(flags.rounds - 1):  # in turns
            for name, way in ways.items():
                taken[name].append(times(way))
    wall, processor = ({way: [pair[i] for pair in pairs] for way, pairs in taken.items()} for i in (0, 1))
    targets = {OURS: 1.3, COMMAND: 1.3}
    rows = []
    for way in ways:
        over = measure.ratio(wall[way], wall[PASSES])
        rows.append(
            [
                way,
                f"{measure.median(wall[way]):.1f}",
                f"{measure.median(processor[way]):.1f}",
                f"{over:.2f}",
                f"{measure.ratio(processor[way], processor[PASSES]):.2f}",
                measure.verdict(over, targets[way]) if way in targets else "",
            ]
        )
    print(f"{flags.photographs} photographs, {flags.backbone}, {flags.threads} thread(s) of PyTorch:\n")
    header = ["way", "wall, s", "processor, s", "wall over the passes", "processor over the passes", "target: wall 1.3"]
    print(measure.table(header, rows))


if __name__ == "__main__":
    main()
