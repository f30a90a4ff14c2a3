"""What a process has imported after a help page: a measure of its time that does not depend on the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from calm.cli import COMMANDS

NEVER = {"matplotlib", "captum", "gradio", "lightning", "torchvision", "torchmetrics", "timm", "pytorch_grad_cam"}
HEAVY = NEVER | {"torch", "scipy", "tensorboard", "huggingface_hub", "safetensors"}


def imported(*codes: str) -> list[set[str]]:
    """The top-level modules of a Python process after each of the codes, which it runs one after another."""
    report = "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    code = "\n".join(["import sys", *(line for code in codes for line in (code, report))])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [set(line.split()) for line in done.stderr.splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_main_help_imports_no_slow_library(name: str) -> None:
    (found,) = imported(f"from calm.cli import main\nassert main({[*name.split(), '--help']}) == 0")
    assert not found & HEAVY


def test_imports_wait_until_they_are_needed() -> None:
    """In one process, of which each step may have imported no more than those before it were allowed to."""
    package, records, datasets, models, created, drawn = imported(
        "import calm, calm.data",
        "import calm.data.check, calm.data.augmentation",
        "import calm.data.dataset, calm.data.transforms",
        "calm.create_model, calm.load, calm.attribute, calm.normalize",
        "calm.create_model('small_resnet', 2)",
        "import numpy as np\nfrom calm.render import *\n"
        "panel([[Tile(overlay(np.zeros((8, 8, 3), np.uint8), np.eye(4)), 'x')]])",
    )
    assert not package & (HEAVY | {"numpy", "cv2", "PIL", "rich", "jsonargparse"})
    assert "torch" not in records
    assert not datasets & {"torchvision", "cv2", "rich", "matplotlib"}
    assert "torch" in models
    assert not models & NEVER
    assert not created & {"matplotlib", "captum", "cv2", "lightning", "timm"}
    assert not drawn & {"matplotlib", "cv2", "captum"}


@pytest.mark.parametrize("name", ["all", "remove-and-classify"])
def test_main_help_of_a_benchmark_imports_no_slow_library(name: str) -> None:
    code = f"from calm.cli import main\nassert main(['evaluate', {name!r}, '--help']) == 0"
    (found,) = imported(code)
    assert not found & HEAVY
