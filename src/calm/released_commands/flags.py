"""The flags of the released commands: names, choices and defaults of the released parser.

Source: github.com/naver-ai/calm, ``config.py``.

How a released command ends and what it says: on the terminal, and in the experiment's log.log.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from calm.errors import CalmError, unknown
from calm.model import Method
from calm.released import ARCHITECTURES

__all__ = ["DATASETS", "GRADIENT_PROCESSES", "RULE", "Flags", "Log", "build_parser", "method", "parse", "run"]


RULE = "=" * 59


class Log:
    """Prints lines, and appends them to a file from the moment that its folder exists.

    A command that fails before it has made the experiment's folder leaves nothing behind.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = ""

    def __call__(self, line: str = "") -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        self._waiting += line + "\n"
        if self.path.parent.is_dir():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._waiting)
            self._waiting = ""


def run(prog: str, command: Callable[[Flags], None]) -> int:
    """Run a released command on the process's arguments.

    Returns:
        The exit code: 0; 2 after a mistake of the user's, which is printed without a traceback; 130 after Ctrl-C.
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


DATASETS = ("CUB", "ILSVRC", "OpenImages")
METHODS: dict[str, Method] = {"CAM": "cam", "CALM-EM": "calm-em", "CALM-ML": "calm-ml"}
MAP_PROCESSES = (
    "vanilla",
    "vanilla-saliency",
    "vanilla-superclass",
    "jointll",
    "jointll-superclass",
    "jointll-superclass-mean",
    "gtcond",
    "gtcond-superclass",
    "gtcond-superclass-mean",
    "saliency",
)
GRADIENT_PROCESSES = ("input_grad", "integrated_grad", "smooth_grad", "var_grad")
_WORDS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


class Flags(argparse.Namespace):
    """The values of all flags; the flags of `build_parser` say what each means."""

    seed: int | None
    experiment_name: str
    override_cache: bool
    workers: int
    use_load_checkpoint: bool
    load_checkpoint: str | None
    is_different_checkpoint: bool
    save_root: str
    dataset_name: Literal["CUB", "ILSVRC", "OpenImages"]
    data_root: str
    metadata_root: str
    proxy_training_set: bool
    architecture: str
    attribution_method: str
    is_train: bool
    epochs: int
    pretrained: bool
    cam_curve_interval: float
    resize_size: int
    crop_size: int
    batch_size: int
    lr: float
    lr_decay_frequency: int
    lr_classifier_ratio: float
    momentum: float
    weight_decay: float
    use_bn: bool
    large_feature_map: bool
    score_map_method: Literal["activation_map", "backprop"]
    score_map_process: str
    norm_type: Literal["max", "minmax", "clipping"]
    threshold_type: Literal["even", "log"]
    smooth_grad_nr_iter: int
    smooth_grad_sigma: float
    integrated_grad_nr_iter: int

    @property
    def folder(self) -> Path:
        """The experiment's folder."""
        return Path(self.save_root) / self.experiment_name

    @property
    def images(self) -> Path:
        """The data root."""
        return Path(self.data_root.strip('"'))

    @property
    def lists(self) -> Path:
        """The folder of the metadata lists."""
        return Path(self.metadata_root) / self.dataset_name

    @property
    def batch_norm(self) -> bool:
        """``use_bn``, but True for resnet50, which has no choice: the released code ignores the flag there."""
        return self.use_bn or self.architecture == "resnet50"


def parse(prog: str, arguments: Sequence[str] | None = None) -> Flags:
    """Read the command line.

    Args:
        prog: name of the command, for its help.
        arguments: the flags; None: those of the process.

    Raises:
        SystemExit: after ``--help``, or (code 2, the reason on stderr) for a flag or value that the released parser
            refuses.
        CalmError: no architecture, or values that cannot work together.
    """
    flags = build_parser(prog).parse_args(arguments, namespace=Flags())
    if flags.architecture not in ARCHITECTURES:  # the released default is none of the choices
        raise unknown("architecture", flags.architecture, ARCHITECTURES, where="--architecture (its default)")
    if flags.resize_size < flags.crop_size:
        raise CalmError(
            f"--resize_size={flags.resize_size} is below --crop_size={flags.crop_size}: the crop is cut from it"
        )
    if flags.seed is not None and flags.seed < 0:
        raise CalmError(f"--seed={flags.seed}: give 0 or more")
    for name in ("workers", "crop_size", "batch_size", "smooth_grad_nr_iter", "integrated_grad_nr_iter"):
        lowest = 0 if name == "workers" else 1
        if getattr(flags, name) < lowest:
            raise CalmError(f"--{name}={getattr(flags, name)}: give {lowest} or more")
    if not flags.smooth_grad_sigma > 0:
        raise CalmError(f"--smooth_grad_sigma={flags.smooth_grad_sigma}: give a number above 0")
    if not 0 < flags.cam_curve_interval < 1:
        raise CalmError(f"--cam_curve_interval={flags.cam_curve_interval}: give a number between 0 and 1")
    return flags


def method(flags: Flags) -> Method:
    """``--attribution_method`` in this package's words."""
    return METHODS[flags.attribution_method]


def build_parser(prog: str) -> argparse.ArgumentParser:
    """The parser. As in the released one, the start of a flag's name will do if it is no other's."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="A command of the released CALM code, with its flags; `calm --help` has this package's own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for add in (_add_experiment, _add_data, _add_model, _add_training, _add_maps):
        add(parser.add_argument)
    return parser


def _boolean(word: str) -> bool:
    if word.lower() not in _WORDS:
        raise argparse.ArgumentTypeError(f"{word!r} is not a Boolean: give True or False")
    return _WORDS[word.lower()]


Add = Callable[..., argparse.Action]


def _add_boolean(add: Add, name: str, default: bool, meaning: str) -> None:
    add(name, type=_boolean, nargs="?", const=True, default=default, metavar="True|False", help=meaning)


def _add_experiment(add: Add) -> None:
    add("--seed", type=int, help="of everything random; None is 0")
    add("--experiment_name", default="result", help="folder below --save_root: training makes it")
    _add_boolean(
        add, "--override_cache", False, "train anew: delete the experiment's folder first, if that is safe"
    )
    add("--workers", type=int, default=4, help="processes that read images")
    _add_boolean(add, "--use_load_checkpoint", False, "read weights from --load_checkpoint")
    add(
        "--load_checkpoint",
        help="folder with last_checkpoint.pth.tar, or a saved model or run of this package",
    )
    _add_boolean(
        add,
        "--is_different_checkpoint",
        False,
        "the checkpoint is of other classes: its classifier is left out",
    )
    add("--save_root", default="save", help="folder of the experiments")
    add("--logger_type", default="PythonLogger", choices=("PythonLogger",), help="there is one")


def _add_data(add: Add) -> None:
    add("--dataset_name", "--dataset", default="CUB", choices=DATASETS, help="the data set")
    add("--data_root", default="dataset/", help="folder that holds CUB/, ILSVRC/ or OpenImages/")
    add("--metadata_root", default="metadata/", help="the same for the lists")
    add("--mask_root", default="dataset/", help="without effect, as in the released code")
    _add_boolean(add, "--proxy_training_set", False, "train on the images of image_ids_proxy.txt")
    add("--resize_size", type=int, default=256, help="side of a training image before the crop")
    add("--crop_size", type=int, default=224, help="side of the model's input")


def _add_model(add: Add) -> None:
    add("--architecture", default="resnet18", choices=ARCHITECTURES, help="must be given")
    add("--attribution_method", default="CAM", choices=tuple(METHODS), help="what is trained")
    _add_boolean(add, "--pretrained", True, "start from ImageNet weights, downloaded once")
    _add_boolean(add, "--use_bn", False, "BatchNorm in vgg16 and the added layers of inception_v3")
    _add_boolean(add, "--large_feature_map", False, "28 x 28 map instead of 14 x 14")


def _add_training(add: Add) -> None:
    _add_boolean(add, "--is_train", True, "False: only test the checkpoint")
    add("--epochs", type=int, default=40, help="passes over the training images")
    add("--batch_size", type=int, default=64, help="images a step")
    add("--lr", type=float, default=0.01, help="learning rate at the start")
    add("--lr_decay_frequency", type=int, default=30, help="epochs between two decays of the rate by 10")
    add(
        "--lr_classifier_ratio", type=float, default=10, help="rate of the new layers over that of the others"
    )
    add("--momentum", type=float, default=0.9, help="of SGD, Nesterov's")
    add("--weight_decay", type=float, default=1e-4, help="L2 penalty")


def _add_maps(add: Add) -> None:
    processes = (*MAP_PROCESSES, *GRADIENT_PROCESSES)
    add("--score_map_process", default="vanilla", choices=processes, help="the map")
    add(
        "--score_map_method",
        default="activation_map",
        choices=("activation_map", "backprop"),
        help="backprop: the gradient in place of an activation map",
    )
    add(
        "--norm_type",
        default="minmax",
        choices=("max", "minmax", "clipping"),
        help="normalisation of the map",
    )
    add("--threshold_type", default="even", choices=("even", "log"), help="thresholds of cue localization")
    add("--cam_curve_interval", type=float, default=0.001, help="distance of the thresholds")
    add("--iou_thresholds", type=int, nargs="+", default=[30, 50, 70], help="without effect, as released")
    add("--smoothing_ksize", type=int, default=1, help="without effect, as released")
    add("--smooth_grad_nr_iter", type=int, default=50, help="noisy copies of smooth_grad and var_grad")
    add("--smooth_grad_sigma", type=float, default=4.0, help="range of the image over the noise's deviation")
    add("--integrated_grad_nr_iter", type=int, default=50, help="steps of integrated_grad")
