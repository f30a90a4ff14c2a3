"""The commands that must survive everything, each on the smallest input that exercises all it writes."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from stress.processes import Ended, Server
from stress_counts import FULL

from calm.model import create_model
from calm.released import save_released
from calm_birds import write_birds

NAMES = ("train", "evaluate", "birds", "prepare", "convert")


def some(*reduced: str, without: Sequence[str] = ()) -> list[str]:
    """Names of the commands for a test: those of the reduced suite, or all."""
    return [name for name in (NAMES if FULL else reduced) if name not in without]


@dataclass(frozen=True)
class Inputs:
    """What the commands read.

    Attributes:
        root: folder of all of it.
    """

    root: Path

    @property
    def birds(self) -> Path:
        """A data set."""
        return self.root / "birds"

    @property
    def archives(self) -> Path:
        """CUB's archives, made of it."""
        return self.root / "archives"

    @property
    def released(self) -> Path:
        """A checkpoint of the released code."""
        return self.root / "resnet50.pth.tar"

    @property
    def model(self) -> Path:
        """A trained model."""
        return self.root / "trained" / "out"

    @property
    def evaluated(self) -> Path:
        """What benchmarks found about it."""
        return self.root / "evaluated" / "out"

    def make(self) -> None:
        """Write all but the trained model."""
        write_birds(self.birds, species=3, images_per_species=8, size=48, test_fraction=0.25)
        self.archives.mkdir()
        with tarfile.open(self.archives / "CUB_200_2011.tgz", "w:gz") as archive:
            archive.add(self.birds, "CUB_200_2011", filter=_without_masks)
        with tarfile.open(self.archives / "segmentations.tgz", "w:gz") as archive:
            archive.add(self.birds / "segmentations", "segmentations")
        torch.manual_seed(0)
        save_released(create_model("resnet50", 3, "calm-em", prior_activation="relu"), self.released, epoch=1)


def _without_masks(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "segmentations" in member.name else member


def _train(inputs: Inputs, out: Path) -> list[str]:
    return (
        f"train --preset birds --data {inputs.birds} --run_dir {out} --epochs 3 --batch_size 8"
        " --reading.image_size 48 --reading.val_fraction 0.3 --optim.ema_decay 0.9 --log.panel_images 2"
        " --hardware.accelerator cpu --report false"
    ).split()


def _evaluate(inputs: Inputs, out: Path) -> list[str]:
    return (
        f"evaluate all --model {inputs.model} --data {inputs.birds} --out {out} --method joint posterior"
        " --replicates 20 --batch_size 8 --device cpu"
    ).split()


def _birds(inputs: Inputs, out: Path) -> list[str]:
    return f"data birds {out} --species 3 --images_per_species 8 --size 64 --test_fraction 0.25".split()


def _prepare(inputs: Inputs, out: Path) -> list[str]:
    return f"data prepare cub --from {inputs.archives} --out {out} --partial".split()


def _convert(inputs: Inputs, out: Path) -> list[str]:
    return f"convert {inputs.released} --method calm-em --large_feature_map true --out {out}".split()


WORDS: dict[str, Callable[[Inputs, Path], list[str]]] = {
    "train": _train,
    "evaluate": _evaluate,
    "birds": _birds,
    "prepare": _prepare,
    "convert": _convert,
}


def words(name: str, inputs: Inputs, out: Path) -> Sequence[str]:
    """The command line of a command that writes to ``out``."""
    return WORDS[name](inputs, out)


def succeeded(ended: Ended) -> Ended:
    """The same, if it ended well."""
    assert ended.code == 0, ended.text
    assert "Traceback" not in ended.text, ended.text
    return ended


def refused(ended: Ended, reason: str, place: str) -> None:
    """See that a command ended with one line that names a reason and a place."""
    assert ended.code == 2, ended.text
    assert "Traceback" not in ended.text, ended.text
    _, _, message = f"\n{ended.text}".partition("\ncalm: ")
    assert reason in message, ended.text
    assert place in message, ended.text
    assert message.count("\n") == 1, ended.text


@dataclass(frozen=True)
class Undisturbed:
    """A command that nothing happened to.

    Attributes:
        name: of the command.
        root: folder in which it had its output, as ``out``.
        ended: how it ended.
        digests: of what it wrote.
    """

    name: str
    root: Path
    ended: Ended
    digests: dict[str, str]


def run(name: str, inputs: Inputs, root: Path, server: Server, **limits: object) -> Ended:
    """Run a command with its output in ``root / "out"``."""
    return server.run(words(name, inputs, root / "out"), **limits)  # type: ignore[arg-type]
