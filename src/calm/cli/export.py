"""Models from and for others: ``calm convert`` reads a checkpoint of the released code, ``calm export`` writes one file
for another runtime, ``calm push`` uploads to the hub.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calm.config import ExportFormat, Method
from calm.errors import CalmError
from calm.files import read_text

if TYPE_CHECKING:
    from calm.exporting import Exported
    from calm.released import ConversionReport


def convert(
    checkpoint: Path,
    *,
    out: Path,
    method: Method | None = None,
    large_feature_map: bool | None = None,
    use_bn: bool = True,
    class_names: Path | None = None,
) -> ConversionReport:
    """Convert a checkpoint of the released code into a folder that `calm.load` reads without further options.

    Args:
        checkpoint: the file, or the folder that holds last_checkpoint.pth.tar.
        out: the folder to write.
        method: how it was trained; must be given, the file does not say.
        large_feature_map: whether it was trained on the 28 x 28 map (else 14 x 14); must be given.
        use_bn: whether vgg16 or inception_v3 was built with its optional BatchNorm.
        class_names: a text file with the name of a class on each line, in the order of their indices.

    Returns:
        What became of every key; ``print`` it.

    Raises:
        CalmError: as `load_released`, or a file of class names that does not fit; ``out`` is a training run.
    """
    from calm.released import load_with_report  # here, so that the help page does not import PyTorch

    if not checkpoint.exists():
        raise CalmError(f"there is no checkpoint {checkpoint}")
    if (out / "config.yaml").is_file():
        raise CalmError(f"--out {out} is the folder of a training run: name another one")
    names = None
    if class_names is not None:
        names = [line.strip() for line in read_text(class_names, "class names").rstrip().splitlines()]
    model, report = load_with_report(checkpoint, method, large_feature_map, use_bn, names)
    model.training_summary = {"converted_from": report.source.name, "epoch": report.epoch}
    return replace(report, out=model.save_pretrained(out))


def export_model(
    *,
    model: str,
    out: Path,
    to: ExportFormat = "onnx",
    kind: str | None = None,
    preprocess: bool = False,
    dynamic_size: bool | None = None,
) -> Exported:
    """Write a model as one file that returns probabilities and the maps of chosen classes in the same pass.

    The file takes `image` and `classes` (int64, a row of class indices for each image), and returns `probs`, `maps`
    of these classes on the model's grid and, for CALM, `prior`. Names of classes, preprocessing and the kind of maps
    are in its metadata. Its results are compared with PyTorch's, on other batches and sizes of images than it was
    traced with, before it gets its name; docs/export.md shows how to use it, and examples/onnx_map.py is a program.

    Args:
        model: a run folder of calm train, a saved model, or a hub id.
        out: the file to write: .onnx, .pt2 (torch-export) or .pte (executorch).
        to: for which runtime: onnx (the extra `export`), torch-export, or executorch (the extra of that name).
        kind: which maps it returns: joint, posterior, prior or evidence for CALM; cam or evidence for CAM.
            Default: joint or cam.
        preprocess: let it take uint8 pictures (batch, height, width, channels) of any size, which it resizes and
            normalises itself. Otherwise images are float32 (batch, channels, height, width), normalised.
        dynamic_size: whether images may have another size than the model's. Default: where the network allows it.

    Returns:
        What was written, and how far it is from PyTorch.

    Raises:
        CalmError: a wrong option, a network that cannot be exported, or results that differ; no file is left.
    """
    from calm.exporting import export
    from calm.model import load

    return export(load(model), out, to, kind=kind, preprocess=preprocess, dynamic_size=dynamic_size)


def push(
    repository: str,
    *,
    model: str,
    evaluation: Path | None = None,
    example: Path | None = None,
    private: bool = False,
    overwrite_card: bool = False,
) -> str:
    """Upload a model to the Hugging Face Hub, with a page that describes it.

    The page says how to load the model, how to read its maps, what calm evaluate measured, what is known of its
    training, and its limits. Log in with `hf auth login` first, or set HF_TOKEN.

    Args:
        repository: OWNER/NAME on the hub; created if it does not exist.
        model: a run folder of calm train, or a saved model.
        evaluation: the folder that calm evaluate wrote; results of other models in it are left out. Default: the
            folder `evaluation` of the run, if there is one.
        example: a picture to show on the page with the map of its most probable class over it. It becomes public.
        private: whether a new repository is private.
        overwrite_card: replace a page that the repository has already; otherwise it stays as it is.

    Returns:
        The address of the commit.

    Raises:
        CalmError: there is no model, no result of its weights, the picture cannot be read, or the hub cannot be
            reached or refuses.
    """
    from calm.checkpoint import check_hub
    from calm.errors import needs_extra
    from calm.explain import overlay
    from calm.model import load

    check_hub(repository)
    loaded = load(model)
    folder, figures, drawn = evaluation or Path(model) / "evaluation", "", None
    if evaluation is not None or folder.is_dir():
        with needs_extra("the tables of calm evaluate", "evaluate"):
            from calm.evaluate.subject import weights_digest
            from calm.evaluate.tables import markdown
            from calm.report.found import about, find_groups

        weights, found = weights_digest(loaded), [result for group in find_groups([folder]) for result in group.results]
        own = [result for result in found if about(result, "subject").get("weights") == weights]
        if not own:
            raise CalmError(f"no result in {folder} is of the weights of {model}: run calm evaluate for it again")
        figures = f"\n{markdown(own)}".replace("\n## ", "\n### ")
    if example is not None:
        drawn = overlay(example, loaded.attribute(loaded.preprocess(example))[0])
    return loaded.push_to_hub(
        repository, private=private, figures=figures, example=drawn, overwrite_card=overwrite_card
    )
