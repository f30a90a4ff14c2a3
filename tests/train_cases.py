"""A tiny training run for the tests, also in a process of its own that may be killed; as a script, in two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forks import Ended, Fork
from PIL import Image
from torch import Tensor, nn

from calm.config import WsolOptions
from calm.data.augmentation import Augmentation
from calm.train.config import DataOptions, Hardware, LogOptions, OptimOptions, TrainConfig

SIZE = 16


class TinyNet(nn.Module):
    """Features (B, 6, 4, 4) of 16x16 images, with BatchNorm and dropout if ``stateful``."""

    out_channels = 6

    def __init__(self, *, stateful: bool = True) -> None:
        super().__init__()
        between: list[nn.Module] = [nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2)] if stateful else [nn.ReLU()]
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=4, padding=1), *between, nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images)
        return features


def tiny_net(*, stateful: bool = True) -> TinyNet:
    """The same start weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return TinyNet(stateful=stateful)


def write_squares(root: Path, train: int = 12, other: int = 4) -> Path:
    """Three classes, a bright square of the class's colour on noise, in a folder per split and class."""
    generator = np.random.default_rng(5)
    for split, count in (("train", train), ("val", other), ("test", other)):
        for label in range(3):
            folder = root / split / f"colour{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 100, (SIZE, SIZE, 3), dtype=np.uint8)
                y, x = generator.integers(0, SIZE - 6, 2)
                pixels[y : y + 6, x : x + 6, label] = 250
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def tiny_config(data: Path, run_dir: Path, **changes: Any) -> TrainConfig:
    """Three epochs of four steps, on the CPU."""
    config = TrainConfig(
        data=data,
        run_dir=run_dir,
        epochs=3,
        batch_size=8,
        lr=0.02,
        reading=DataOptions(image_size=SIZE, workers=0),
        augment=Augmentation(crop="pad-shift"),
        optim=OptimOptions(schedule="cosine", warmup_epochs=0.5, head_ratio=2.0),
        hardware=Hardware(accelerator="cpu", precision="32-true"),  # on every machine the same
        log=LogOptions(panel_images=0),
    )
    return replace(config, **changes)


def checkpoint_of(run_dir: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint


def weights_of(run_dir: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = checkpoint_of(run_dir)["model"]
    return weights


def rich_config(data: Path, run_dir: Path, workers: int = 0) -> TrainConfig:
    """Everything that has a state: averages of weights, mixed batches, a teacher, momentum, an annealed E-step."""
    from calm.train.config import LossOptions

    config = tiny_config(data, run_dir)
    return replace(
        config,
        reading=replace(config.reading, workers=workers),
        augment=replace(config.augment, mixup=0.3, cutmix=0.3, mix_probability=0.5, erase=0.2),
        loss=LossOptions(posterior="ema", teacher_decay=0.9, temperature="0.5:1.0"),
        optim=replace(config.optim, ema_decay=0.9),
        log=LogOptions(panel_images=2),
    )


def killed(folder: Path, **task: Any) -> Ended:
    """Run a task of `_train` in a process of its own."""
    return Fork(folder, _train, task).end()


def in_two_processes(data: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """Run this file, for Fabric starts the second process by the words of the first."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__, str(data), str(run_dir)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def _kill_myself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _train(task: dict[str, Any]) -> None:
    from calm.train import checkpoints, run

    data, run_dir = Path(task["data"]), Path(task["run_dir"])
    if task["kind"] == "kill in step":
        take_step = run.Trainer.take_step

        def step(self: run.Trainer) -> None:
            take_step(self)
            if self.state.step == task["step"]:
                _kill_myself()

        run.Trainer.take_step = step
    if task["kind"] == "kill while saving":
        save_checkpoint = checkpoints.save_checkpoint
        saved: list[int] = []

        def save(*args: Any) -> None:
            saved.append(1)
            if len(saved) == 2:
                os.fsync = _kill_myself  # the new file is written, but does not have its name yet
            save_checkpoint(*args)

        checkpoints.save_checkpoint = save
    run.train(rich_config(data, run_dir, workers=1), backbone=tiny_net())


if __name__ == "__main__":
    from calm.train.run import train

    torch.set_num_threads(1)
    hardware = Hardware(accelerator="cpu", devices=2, strategy="ddp", precision="32-true")
    config = tiny_config(Path(sys.argv[1]), Path(sys.argv[2]), hardware=hardware, wsol=WsolOptions(["acol"]))
    train(config, backbone=tiny_net(stateful=False))
