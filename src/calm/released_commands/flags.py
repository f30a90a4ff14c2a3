"""The flags of the released commands (names, choices and defaults of the released parser), and how a command runs.

Source: github.com/naver-ai/calm, ``config.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from calm.config import Method
from calm.errors import CalmError, unknown
from calm.output import ALIASES
from calm.released import ARCHITECTURES

RULE = "=" * 59  # the line that the released code prints before the evaluation on the test images

METHODS: dict[str, Method] = {"CAM": "cam", "CALM-EM": "calm-em", "CALM-ML": "calm-ml"}
GRADIENT_PROCESSES = ("input_grad", "integrated_grad", "smooth_grad", "var_grad")
_BOOLEANS = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)


def _flag(default: Any, meaning: str, *names: str, choices: Sequence[str] | None = None) -> Any:
    """Return a field of `Flags` with its default, its help text, other names of the flag and its choices."""
    return field(default_factory=lambda: copy(default), metadata={"help": meaning, "names": names, "choices": choices})


@dataclass(frozen=True)
class Flags:
    """The values of all flags, each with its released name and default; see the help text of each."""

    seed: int | None = _flag(None, "of everything random; None is 0")
    experiment_name: str = _flag("result", "folder below --save_root: training makes it")
    override_cache: bool = _flag(False, "train anew: delete the experiment's folder first, if that is safe")
    workers: int = _flag(4, "processes that read images")
    use_load_checkpoint: bool = _flag(False, "read weights from --load_checkpoint")
    load_checkpoint: str | None = _flag(None, "folder with last_checkpoint.pth.tar, or a model or run of this package")
    is_different_checkpoint: bool = _flag(False, "the checkpoint is of other classes: its classifier is left out")
    save_root: str = _flag("save", "folder of the experiments")
    logger_type: Literal["PythonLogger"] = _flag("PythonLogger", "there is one")
    dataset_name: Literal["CUB", "ILSVRC", "OpenImages"] = _flag("CUB", "the data set", "--dataset")
    data_root: str = _flag("dataset/", "folder that holds CUB/, ILSVRC/ or OpenImages/")
    metadata_root: str = _flag("metadata/", "the same for the lists")
    mask_root: str = _flag("dataset/", "without effect, as in the released code")
    proxy_training_set: bool = _flag(False, "train on the images of image_ids_proxy.txt")
    resize_size: int = _flag(256, "side of a training image before the crop")
    crop_size: int = _flag(224, "side of the model's input")
    architecture: str = _flag("resnet18", "must be given", choices=ARCHITECTURES)
    attribution_method: str = _flag("CAM", "what is trained", choices=tuple(METHODS))
    pretrained: bool = _flag(True, "start from ImageNet weights, downloaded once")
    use_bn: bool = _flag(False, "BatchNorm in vgg16 and the added layers of inception_v3")
    large_feature_map: bool = _flag(False, "28 x 28 map instead of 14 x 14")
    is_train: bool = _flag(True, "False: only test the checkpoint")
    epochs: int = _flag(40, "passes over the training images")
    batch_size: int = _flag(64, "images per step")
    lr: float = _flag(0.01, "learning rate at the start")
    lr_decay_frequency: int = _flag(30, "epochs between two decays of the rate by 10")
    lr_classifier_ratio: float = _flag(10, "rate of the new layers over that of the others")
    momentum: float = _flag(0.9, "of SGD, Nesterov's")
    weight_decay: float = _flag(1e-4, "L2 penalty")
    score_map_process: str = _flag("vanilla", "the map", choices=(*ALIASES, *GRADIENT_PROCESSES))
    score_map_method: Literal["activation_map", "backprop"] = _flag(
        "activation_map", "backprop: the gradient in place of an activation map"
    )
    norm_type: Literal["max", "minmax", "clipping"] = _flag("minmax", "normalisation of the map")
    threshold_type: Literal["even", "log"] = _flag("even", "thresholds of cue localization")
    cam_curve_interval: float = _flag(0.001, "distance of the thresholds")
    iou_thresholds: list[int] = _flag([30, 50, 70], "without effect, as in the released code")  # noqa: RUF009
    smoothing_ksize: int = _flag(1, "without effect, as in the released code")
    smooth_grad_nr_iter: int = _flag(50, "noisy copies of smooth_grad and var_grad")
    smooth_grad_sigma: float = _flag(4.0, "range of the image over the noise's standard deviation")
    integrated_grad_nr_iter: int = _flag(50, "steps of integrated_grad")

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return Path(self.save_root) / self.experiment_name

    @property
    def images(self) -> Path:
        """The folder of all data sets."""
        return Path(self.data_root.strip('"'))

    @property
    def lists(self) -> Path:
        """The folder of the data set's metadata lists."""
        return Path(self.metadata_root) / self.dataset_name

    @property
    def method(self) -> Method:
        """``--attribution_method`` in this package's words."""
        return METHODS[self.attribution_method]

    @property
    def batch_norm(self) -> bool:
        """``--use_bn``, but True for resnet50, which has no choice: the released code ignores the flag there."""
        return self.use_bn or self.architecture == "resnet50"


def build_parser(prog: str) -> argparse.ArgumentParser:
    """Make the parser. As in the released one, the start of a flag's name will do if no other flag has it."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="A command of the released CALM code, with its flags; `calm --help` has this package's own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = get_type_hints(Flags)
    defaults = Flags()
    for flag in fields(Flags):
        kind, choices = hints[flag.name], flag.metadata["choices"]
        options: dict[str, Any] = {"help": flag.metadata["help"], "default": getattr(defaults, flag.name)}
        if kind is bool:
            options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        elif get_origin(kind) is Literal or choices:
            options["choices"] = choices or get_args(kind)
        elif get_origin(kind) is list:
            options |= {"type": int, "nargs": "+"}
        else:
            options["type"] = (get_args(kind) or (kind,))[0]  # of X | None, X
        parser.add_argument(f"--{flag.name}", *flag.metadata["names"], **options)
    return parser


def _boolean(word: str) -> bool:
    if word.lower() not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"{word!r} is not a Boolean: give True or False")
    return _BOOLEANS[word.lower()]


def parse(prog: str, arguments: Sequence[str] | None = None) -> Flags:
    """Read the command line of ``prog``; without ``arguments``, that of the process.

    Raises:
        SystemExit: after ``--help``, or (code 2, the reason on stderr) for a flag or value that the released parser
            refuses.
        CalmError: no architecture, or values that cannot work together.
    """
    flags = Flags(**vars(build_parser(prog).parse_args(arguments)))
    if flags.architecture not in ARCHITECTURES:  # the released default is none of the choices
        raise unknown("architecture", flags.architecture, ARCHITECTURES, where="--architecture (its default)")
    size, crop = flags.resize_size, flags.crop_size
    if size < crop:
        raise CalmError(f"--resize_size={size} is below --crop_size={crop}: the crop is cut from it")
    for name in ("seed", "workers", "crop_size", "batch_size", "smooth_grad_nr_iter", "integrated_grad_nr_iter"):
        value, lowest = getattr(flags, name), 0 if name in ("seed", "workers") else 1
        if value is not None and value < lowest:
            raise CalmError(f"--{name}={value}: give {lowest} or more")
    if not flags.smooth_grad_sigma > 0:
        raise CalmError(f"--smooth_grad_sigma={flags.smooth_grad_sigma}: give a number above 0")
    if not 0 < flags.cam_curve_interval < 1:
        raise CalmError(f"--cam_curve_interval={flags.cam_curve_interval}: give a number between 0 and 1")
    return flags


class Log:
    """Prints lines, and appends them to a file once its folder exists: a command that fails before leaves nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending = ""

    def __call__(self, line: str = "") -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        self._pending += line + "\n"
        if self.path.parent.is_dir():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._pending)
            self._pending = ""


def run(prog: str, command: Callable[[Flags], None]) -> int:
    """Run a released command on the process's arguments.

    Returns:
        The exit code: 0; 2 after a mistake of the user, which is printed without a traceback; 130 after Ctrl-C.
    """
    try:
        command(parse(prog))
    except (CalmError, OSError) as error:  # OSError: a full disk, a folder without permission
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command continues an unfinished training", file=sys.stderr)
        return 130
    return 0
