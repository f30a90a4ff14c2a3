"""``calm convert``: turn a checkpoint of the released code into a model folder of this package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from calm.config import Method
from calm.errors import CalmError
from calm.files import read_text

if TYPE_CHECKING:
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
