"""Prediction with a map beside prediction alone, and beside the explainers people use, on one network and batch.

The network is a CALM-EM model with 200 classes and random weights; times do not depend on what it learnt. Every way
starts from the same images and ends with maps of the predicted class in the images' size:

- calm: one forward pass gives the prediction and the joint of the predicted class, which is resized.
- pytorch-grad-cam: `GradCAM` on the backbone's last feature map, as its documentation shows it; it takes a forward
  pass, a backward pass of the whole network, and resizes with OpenCV.
- calm's own call of pytorch-grad-cam (`method="gradcam"`), where the graph starts at that layer.
- Captum: `IntegratedGradients`, 50 steps, as many images at once as the batch has; its maps have the images' size. The
  parameters take no gradient. It runs once, in a process of its own.

Each of the last three explains log p(y | x) of a class that a prediction has named before, which is not timed.
Prints a Markdown table.

Run: python benchmarks/explain.py [--networks small_resnet:96:8 resnet50:224:2 --rounds 7 --steps 50]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import measure
import torch
from captum.attr import IntegratedGradients
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

import calm
from calm.images import Preprocessing

CLASSES = 200
ALONE = "prediction alone"
MAP = "prediction and map"
EVERY_GRID, EVERY = "prediction and maps of all classes, on the grid", "prediction and maps of all classes"
GRADCAM, OWN_GRADCAM = "Grad-CAM, pytorch-grad-cam", "Grad-CAM, calm's call of pytorch-grad-cam"
CAPTUM = "integrated gradients, Captum, {} steps"


class Scores(nn.Module):
    """The model as the explainers want it: images to log p(y | x)."""

    def __init__(self, model: calm.CalmModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).log_probs


def ways(model: calm.CalmModel, images: Tensor) -> dict[str, Callable[[], Tensor]]:
    """All ways but Captum's."""
    size = (images.shape[-2], images.shape[-1])
    every = torch.arange(CLASSES, device=images.device).expand(len(images), -1)
    scores = Scores(model)
    with torch.no_grad():
        predicted = model(images).log_probs.argmax(dim=1)
    named = [ClassifierOutputTarget(number) for number in predicted.tolist()]

    @torch.no_grad()
    def alone() -> Tensor:
        return model(images).probs.argmax(dim=1)

    @torch.no_grad()
    def with_map() -> Tensor:
        output = model(images)
        return output.attribute(output.probs.argmax(dim=1), size=size)

    @torch.no_grad()
    def all_on_grid() -> Tensor:
        output = model(images)
        output.probs.argmax(dim=1)
        return output.attribute(every)

    @torch.no_grad()
    def all_maps() -> Tensor:
        output = model(images)
        output.probs.argmax(dim=1)
        return output.attribute(every, size=size)

    def gradcam() -> Tensor:
        with GradCAM(model=scores, target_layers=[model.backbone]) as explainer:
            return torch.from_numpy(explainer(input_tensor=images, targets=named))

    def own_gradcam() -> Tensor:
        return calm.attribute(model, images, predicted, "gradcam")

    return {
        ALONE: alone,
        MAP: with_map,
        EVERY_GRID: all_on_grid,
        EVERY: all_maps,
        GRADCAM: gradcam,
        OWN_GRADCAM: own_gradcam,
    }


def integrated_gradients(model: calm.CalmModel, images: Tensor, points: int) -> Callable[[], Tensor]:
    """Captum's way."""
    scores = Scores(model)
    with torch.no_grad():
        predicted = model(images).log_probs.argmax(dim=1)

    def explain() -> Tensor:
        model.requires_grad_(False)
        explainer = IntegratedGradients(scores)
        found = explainer.attribute(images, target=predicted, n_steps=points, internal_batch_size=len(images))
        model.requires_grad_(True)
        return found.abs().amax(dim=1)

    return explain


def model_and_images(backbone: str, size: int, batch: int) -> tuple[calm.CalmModel, Tensor]:
    """On the GPU, if there is one."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = calm.create_model(backbone, CLASSES, preprocessing=Preprocessing(size=(size, size)))
    return model.to(device).eval(), torch.randn(batch, 3, size, size, device=device)


def once(name: str, *network: object) -> None:
    """One way, once: for its peak memory."""
    model, images = model_and_images(*network)
    ways(model, images)[name]()


def captum_once(points: int, *network: object) -> float:
    """Seconds of Captum's way, once."""
    explain = integrated_gradients(*model_and_images(*network), points)
    return measure.seconds({CAPTUM: explain}, 1, warm=0)[CAPTUM][0]


def compare(network: tuple[str, int, int], rounds: int, points: int) -> None:
    """Print a network's table."""
    model, images = model_and_images(*network)
    cases = ways(model, images)
    times = measure.seconds(cases, rounds)
    memory = {name: measure.peak_memory(once, name, *network) for name in cases}
    # Minutes long, so once, in a process of its own.
    memory[CAPTUM], captum = measure.peak_and_result(captum_once, points, *network)
    times[CAPTUM] = [captum]
    ours, alone = times[MAP], times[ALONE]
    judged = {
        MAP: measure.verdict(measure.ratio(ours, alone), 1.05),
        EVERY: measure.verdict(measure.ratio(times[EVERY], alone), 2),
        GRADCAM: measure.verdict(measure.ratio(times[GRADCAM], ours), 2.5, least=True),
        CAPTUM: measure.verdict(measure.ratio(times[CAPTUM], ours), 40, least=True),
    }
    rows = []
    for name, taken in times.items():
        rows.append(
            [
                name.format(points),
                f"{1000 * measure.median(taken) / len(images):.1f}",
                f"{measure.ratio(taken, alone):.3f}",
                f"{measure.ratio(taken, ours):.2f}",
                judged.get(name, ""),
                f"{memory[name]:.0f}",
            ]
        )
    backbone, size, batch = network
    grid = "x".join(map(str, model(images).log_prior.shape[1:]))
    print(f"{backbone}, {size}x{size} pixels, {grid} grid, batch {batch}, {CLASSES} classes:\n")
    header = ["way", "ms/image", "over prediction", "over prediction and map", "target", "peak MiB"]
    print(measure.table(header, rows) + "\n")
    for name in (MAP, EVERY):
        if judged[name] != "met":
            print(f"{name}, by operation:\n\n{measure.hottest(cases[name])}\n")


def network(text: str) -> tuple[str, int, int]:
    """``backbone:pixels:batch``."""
    backbone, size, batch = text.split(":")
    return backbone, int(size), int(batch)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", type=network, default=["small_resnet:96:8", "resnet50:224:2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50, help="of integrated gradients")
    flags = parser.parse_args()
    for one in flags.networks:
        compare(network(one) if isinstance(one, str) else one, flags.rounds, flags.steps)


if __name__ == "__main__":
    main()
