"""Try what other attribution packages and this one can do, and print the table of docs/peers.md.

Needs, beside this package with its extras, in an environment of their own:
    pip install torchcam==0.5.0 quantus==0.6.0 bcos==0.1.3
A cell is what a small call gave; "no" is followed by what became of the call. Nothing is downloaded.
"""

from __future__ import annotations

import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib import import_module
from importlib.metadata import distribution, version
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import captum.attr
import numpy as np
import pytorch_grad_cam
import quantus
import timm
import torch
import torchcam.methods
import torchvision
from bcos.models.resnet import resnet18 as bcos_resnet18
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

import calm
from calm.baselines import METHODS
from calm.evaluate import BENCHMARKS

PEERS = {
    "CALM": "calm",
    "torch-cam": "torchcam",
    "pytorch-grad-cam": "grad-cam",
    "Captum": "captum",
    "Quantus": "quantus",
    "B-cos": "bcos",
}
CLASSES, SIZE = 5, 64
torch.manual_seed(0)
IMAGES, TARGETS = torch.rand(2, 3, SIZE, SIZE), [0, 1]
SIX = torch.cat([IMAGES, 1 - IMAGES], 1)  # the colours and their opposites, as B-cos networks read them
OURS = calm.create_model("resnet18", CLASSES, preprocessing=calm.Preprocessing(size=(SIZE, SIZE))).eval()
THEIRS = timm.create_model("resnet18", num_classes=CLASSES).eval()
VIT = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, num_classes=CLASSES).eval()
TORCHVISION_VIT = torchvision.models.VisionTransformer(SIZE, 16, 2, 2, 32, 64, num_classes=CLASSES).eval()
BCOS = bcos_resnet18(num_classes=CLASSES).eval()
TABULAR = nn.Linear(4, CLASSES)


def shape(maps: Tensor | np.ndarray, *, images: int = 2) -> str:
    """Return "yes" and the shape of maps, which must be one for each image, with rows and columns."""
    if maps.shape[0] != images or maps.ndim < 3:
        raise ValueError(f"maps of shape {tuple(maps.shape)}")
    return f"yes, {'x'.join(map(str, maps.shape[1:]))}"


def cam(model: nn.Module, method: str, *layer: object, images: Tensor = IMAGES, **options: object) -> Tensor:
    """Return maps of torch-cam."""
    with getattr(torchcam.methods, method)(model, *layer) as extractor:
        return extractor(TARGETS, model(images), **options)[0]


def grad_cam(model: nn.Module, method: str = "GradCAM", *, images: Tensor = IMAGES, layer: nn.Module | None = None,
             reshape: Callable[[Tensor], Tensor] | None = None) -> np.ndarray:  # fmt: skip
    """Return maps of pytorch-grad-cam."""
    explainer = getattr(pytorch_grad_cam, method)(model, [layer or model.layer4], reshape_transform=reshape)
    return explainer(images, None if method == "FinerCAM" else [ClassifierOutputTarget(c) for c in TARGETS])


def tokens(features: Tensor) -> Tensor:
    """Return the patches of a transformer as a grid of features."""
    side = SIZE // 16
    return features[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)


def saliency(model: nn.Module) -> np.ndarray:
    """Return a map of Quantus, by Captum."""
    return quantus.explain(model, IMAGES.numpy(), np.array(TARGETS), method="Saliency")


def error(found: Tensor, expected: Tensor, words: str) -> str:
    """Return to what values add up, if they do."""
    apart = float((found - expected).abs().max())
    if apart > 1e-3:
        raise ValueError(f"{apart:.2g} apart")
    return f"{words} (within {apart:.0e})"


def score(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    return model(images)[range(2), TARGETS]


def scaled(maps: np.ndarray) -> str:
    raise ValueError(f"each map is scaled to {maps.min():.0f} to {maps.max():.0f}")


def contributions() -> Tensor:
    """Return the sum of B-cos contributions, an image at a time, as its function takes them."""
    maps = [BCOS.explain(SIX[i : i + 1], idx=c)["contribution_map"] for i, c in enumerate(TARGETS)]
    return torch.cat([one.sum((1, 2)) for one in maps]) + BCOS.logit_layer.logit_bias


def integrated() -> str:
    maps = captum.attr.IntegratedGradients(THEIRS).attribute(IMAGES, target=TARGETS, n_steps=50)
    change = score(THEIRS) - score(THEIRS, torch.zeros_like(IMAGES))
    return error(maps.sum((1, 2, 3)), change, "change of the logit from a black image, by 50 steps")


@contextmanager
def counted(layer: nn.Module) -> Iterator[Callable[[], str]]:
    """Count the passes through a layer."""
    passes = [0, 0]

    def forward(_: nn.Module, __: object, output: Tensor) -> None:
        passes[0] += 1
        if output.requires_grad:  # a hook of the module would miss a pass that ends at this output
            output.register_hook(lambda _: passes.__setitem__(1, passes[1] + 1))

    hook = layer.register_forward_hook(forward)
    yield lambda: f"{passes[0]} forward, {passes[1]} backward"
    hook.remove()


def passes(layer: nn.Module, maps: Callable[[], object]) -> str:
    with counted(layer) as told:
        maps()
        return told()


def torch_cam_classes() -> None:
    with torchcam.methods.GradCAM(THEIRS, "layer4") as extractor:
        scores = THEIRS(IMAGES)
        for c in range(CLASSES):
            extractor([c, c], scores, retain_graph=True)


def exported(module: nn.Module, images: Tensor) -> str:
    """Return "yes" if a module that returns a map can be written as a program."""
    module(images)
    torch.export.export(module, (images,), strict=False)
    return "yes, by torch.export"


class Mapped(nn.Module):
    """A module whose forward pass returns a map."""

    def __init__(self, network: nn.Module, maps: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.network, self.maps = network, maps

    def forward(self, images: Tensor) -> object:
        return torch.as_tensor(self.maps(images))


def onnx() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return f"yes, {Path(calm.export(OURS, Path(folder) / 'model.onnx').path).suffix[1:]}, with probabilities"


def imported(*modules: str) -> Callable[[], str]:
    return lambda: [import_module(module) for module in modules] and f"yes, {modules[0]}"


def names_in(module: str, *names: str) -> str:
    found = [getattr(import_module(module), name).__name__ for name in names]
    return ", ".join(found)


def console(name: str) -> str:
    scripts = [entry.name for entry in distribution(name).entry_points if entry.group == "console_scripts"]
    if not scripts:
        raise ValueError("no console script")
    return f"yes, {scripts[0]}"


def classes_of(module: object, *others: str) -> int:
    """Return how many public classes a module has whose name begins with none of some words."""
    return len([k for k, v in vars(module).items() if isinstance(v, type) and k[0] != "_" and not k.startswith(others)])


def is_method(name: str) -> bool:
    """Return whether a name of Captum is an attribution class, and no base of several."""
    found = getattr(captum.attr, name)
    return isinstance(found, type) and issubclass(found, captum.attr.Attribution) and not name.endswith("Attribution")


def missing(what: str) -> Callable[[], str]:
    def fail() -> str:
        raise ValueError(what)

    return fail


def finer(module: nn.Module = THEIRS) -> Tensor:
    return cam(module, "FinerCAM", "layer4")


def difference() -> Tensor:
    saliency = captum.attr.Saliency(lambda images: THEIRS(images)[:, 0] - THEIRS(images)[:, 1])
    return saliency.attribute(IMAGES)


def torch_cam_map(images: Tensor) -> Tensor:
    return cam(THEIRS, "GradCAM", "layer4", images=images)


def bcos_map(images: Tensor) -> Tensor:
    return BCOS.explain(images, idx=0)["contribution_map"]


def tabular() -> np.ndarray:
    return quantus.explain(TABULAR, np.ones((2, 4)), np.array(TARGETS), method="Saliency")


def attributed(images: Tensor) -> Tensor:
    return captum.attr.Saliency(THEIRS).attribute(images, target=0)


LAYER4 = THEIRS.layer4
ROWS: dict[str, dict[str, Callable[[], str]]] = {
    "maps of a given ResNet, no training": {
        "CALM": lambda: shape(calm.attribute(THEIRS, IMAGES, TARGETS, method="gradcam")) + "; its own maps: no",
        "torch-cam": lambda: shape(cam(THEIRS, "GradCAM", "layer4")),
        "pytorch-grad-cam": lambda: shape(grad_cam(THEIRS)),
        "Captum": lambda: shape(captum.attr.LayerGradCam(THEIRS, LAYER4).attribute(IMAGES, TARGETS)[:, 0]),
        "Quantus": lambda: shape(saliency(THEIRS)[:, 0]) + ", by Captum",
        "B-cos": lambda: str(THEIRS.explain),
    },
    "of a given vision transformer": {
        "CALM": lambda: shape(calm.attribute(VIT, IMAGES, TARGETS, method="gradcam", target_layer="blocks.11.norm1")),
        "torch-cam": lambda: (
            shape(cam(TORCHVISION_VIT, "LeGrad", list(TORCHVISION_VIT.encoder.layers))) + ", torchvision's"
        ),
        "pytorch-grad-cam": lambda: (
            shape(grad_cam(VIT, layer=VIT.blocks[-1].norm1, reshape=tokens)) + ", with a function for its tokens"
        ),
        "Captum": lambda: shape(captum.attr.Saliency(VIT).attribute(IMAGES, TARGETS)[:, 0]),
        "Quantus": lambda: shape(saliency(VIT)[:, 0]) + ", by Captum",
        "B-cos": lambda: str(VIT.explain),
    },
    "values of a map add up to": {
        "CALM": lambda: error(OURS(IMAGES).attribute(torch.tensor(TARGETS)).sum((1, 2)),
                              OURS(IMAGES).probs[range(2), TARGETS], "p(y given x)"),
        "torch-cam": lambda: error(
            cam(THEIRS, "CAM", "layer4", "fc", normalized=False).mean((1, 2)) + THEIRS.fc.bias[TARGETS],
            score(THEIRS), "logit less its bias, as a mean, if not normalised (CAM)"),
        "pytorch-grad-cam": lambda: scaled(grad_cam(THEIRS)),
        "Captum": integrated,
        "Quantus": missing("it computes no maps of its own"),
        "B-cos": lambda: error(contributions(), score(BCOS, SIX), "logit less its bias"),
    },
    "passes for the maps of five classes of a batch": {
        "CALM": lambda: passes(OURS.backbone, lambda: OURS.attribute(IMAGES, torch.arange(CLASSES).expand(2, -1))),
        "torch-cam": lambda: passes(LAYER4, torch_cam_classes) + " (Grad-CAM)",
        "pytorch-grad-cam": lambda: passes(LAYER4, lambda: [grad_cam(THEIRS) for _ in range(CLASSES)]) + " (Grad-CAM)",
        "Captum": lambda: passes(
            LAYER4, lambda: [captum.attr.LayerGradCam(THEIRS, LAYER4).attribute(IMAGES, c) for c in range(CLASSES)]
        ) + " (Grad-CAM)",
        "Quantus": lambda: passes(LAYER4, lambda: [saliency(THEIRS) for _ in range(CLASSES)]) + " (gradient)",
        "B-cos": lambda: passes(
            BCOS.layer4, lambda: [BCOS.explain(SIX[i : i + 1], idx=c) for c in range(CLASSES) for i in range(2)]
        ) + ", an image at a time",
    },
    "why this class and not that": {
        "CALM": lambda: shape(OURS.difference(IMAGES, 0, 1, "evidence", signed=True)) + ", signed, adds up to log-odds",
        "torch-cam": lambda: shape(finer()) + ", FinerCAM: against the most similar classes",
        "pytorch-grad-cam": lambda: shape(grad_cam(THEIRS, "FinerCAM")) + ", FinerCAM",
        "Captum": lambda: shape(difference()[:, 0]) + ", with a function of two scores",
        "Quantus": missing("it computes no maps of its own"),
        "B-cos": lambda: shape(BCOS.explain(SIX[:1], idx=0)["contribution_map"]
                               - BCOS.explain(SIX[:1], idx=1)["contribution_map"], images=1) + ", subtracting two maps",
    },
    "attribution methods": {
        "CALM": lambda: f"{len(METHODS)}: its own, and some of Captum and pytorch-grad-cam",
        "torch-cam": lambda: f"{classes_of(torchcam.methods, 'OutputTarget')} classes",
        "pytorch-grad-cam": lambda: f"{classes_of(pytorch_grad_cam, 'AblationLayer', 'Activations')} classes",
        "Captum": lambda: f"{len([n for n in captum.attr.__all__ if is_method(n)])} classes, also of layers, text",
        "Quantus": lambda: f"{len(quantus.AVAILABLE_XAI_METHODS_CAPTUM)}, by Captum",
        "B-cos": lambda: f"1, {BCOS.explain.__name__}",
    },
    "measures of maps": {
        "CALM": lambda: f"{len(BENCHMARKS) - 1} benchmarks of maps, with bootstrap intervals",
        "torch-cam": lambda: names_in("torchcam.metrics", "ClassificationMetric", "DeletionInsertionMetric"),
        "pytorch-grad-cam": lambda: names_in("pytorch_grad_cam.metrics.road", "ROADCombined", "ROADMostRelevantFirst"),
        "Captum": lambda: names_in("captum.metrics", "infidelity", "sensitivity_max"),
        "Quantus": lambda: f"{sum(map(len, quantus.AVAILABLE_METRICS.values()))}",
        "B-cos": lambda: str(import_module("bcos.metrics")),
    },
    "trains the classifier": {
        "CALM": imported("calm.train"),
        "torch-cam": imported("torchcam.train"),
        "pytorch-grad-cam": imported("pytorch_grad_cam.train"),
        "Captum": imported("captum.train"),
        "Quantus": imported("quantus.train"),
        "B-cos": imported("bcos.training.trainer"),
    },
    "a program for other runtimes that returns the map": {
        "CALM": onnx,
        "torch-cam": lambda: exported(Mapped(THEIRS, torch_cam_map), IMAGES),
        "pytorch-grad-cam": lambda: exported(Mapped(THEIRS, lambda images: grad_cam(THEIRS, images=images)), IMAGES),
        "Captum": lambda: exported(Mapped(THEIRS, attributed), IMAGES),
        "Quantus": missing("it computes no maps of its own"),
        "B-cos": lambda: exported(Mapped(BCOS, bcos_map), SIX[:1]),
    },
    "a command for folders of pictures": {peer: (lambda name=name: console(name)) for peer, name in PEERS.items()},
    "a page in the browser": {
        "CALM": imported("calm.app"),
        "torch-cam": imported("torchcam.app"),
        "pytorch-grad-cam": imported("pytorch_grad_cam.app"),
        "Captum": imported("captum.insights"),
        "Quantus": imported("quantus.app"),
        "B-cos": imported("bcos.app"),
    },
    "other inputs than images (a table of 4 columns)": {
        "CALM": lambda: shape(calm.attribute(TABULAR, torch.rand(2, 4), TARGETS, method="gradient")),
        "torch-cam": lambda: shape(cam(TABULAR, "GradCAM", images=torch.rand(2, 4))),
        "pytorch-grad-cam": lambda: shape(grad_cam(TABULAR, images=torch.rand(2, 4), layer=TABULAR)),
        "Captum": lambda: f"yes, {captum.attr.Saliency(TABULAR).attribute(torch.rand(2, 4), TARGETS).shape[1]} values",
        "Quantus": lambda: f"yes, {tabular().shape[-1]} values, by Captum",
        "B-cos": lambda: str(TABULAR.explain),
    },
}  # fmt: skip


def tried(cell: Callable[[], str]) -> str:
    """Return what a cell gives, or "no" and why, in short."""
    try:
        return cell()
    except Exception as failure:  # whatever a package does with what it cannot do
        first = str(failure).splitlines()[0] if str(failure) else ""
        return f"no ({type(failure).__name__}: {first[:70]})".replace("|", "/").replace("ValueError: ", "")


def main() -> None:
    warnings.simplefilter("ignore")
    names = ", ".join(f"{peer} {version(name)}" for peer, name in PEERS.items())
    torch_version = f"PyTorch {torch.__version__}, timm {timm.__version__}"
    print(f"{names}; {torch_version}, Python {platform.python_version()}; {date.today()}\n")
    print(f"| | {' | '.join(PEERS)} |\n|---|{'---|' * len(PEERS)}")
    for question, cells in ROWS.items():
        print(f"| {question} | {' | '.join(tried(cells[peer]) for peer in PEERS)} |", flush=True)


if __name__ == "__main__":
    main()
