"""What a process has imported after a help page: a measure of its time that does not depend on the machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from calm.cli import COMMANDS

NEVER = {"matplotlib", "captum", "gradio", "lightning", "torchvision", "torchmetrics", "timm", "pytorch_grad_cam"}
HEAVY = NEVER | {"torch", "scipy", "tensorboard", "huggingface_hub", "safetensors"}


def imported(code: str) -> set[str]:
    """The top-level modules of a Python process that has run ``code``."""
    report = "\nimport sys\nprint(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.split())


@pytest.mark.parametrize("name", COMMANDS)
def test_main_help_imports_no_slow_library(name: str) -> None:
    assert not imported(f"from calm.cli import main\nassert main({[*name.split(), '--help']}) == 0") & HEAVY


def test_import_calm_imports_no_library() -> None:
    assert not imported("import calm") & (HEAVY | {"numpy", "cv2", "PIL", "rich", "jsonargparse"})


def test_import_of_models_imports_no_library_of_commands() -> None:
    found = imported("import calm\ncalm.create_model, calm.load, calm.attribute, calm.normalize")
    assert "torch" in found
    assert not found & NEVER


@pytest.mark.parametrize("name", ["all", "remove-and-classify"])
def test_main_help_of_a_benchmark_imports_no_slow_library(name: str) -> None:
    code = f"from calm.cli import main\nassert main(['evaluate', {name!r}, '--help']) == 0"
    assert not imported(code) & HEAVY
