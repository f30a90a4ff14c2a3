"""The public surface: every name resolves, and importing the package is cheap."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import calm

HEAVY = ["torch", "matplotlib", "captum", "cv2", "lightning", "timm", "gradio", "torchvision"]


@pytest.mark.parametrize("name", calm.__all__)
def test_every_public_name_resolves(name):
    assert getattr(calm, name) is not None
    assert name in dir(calm)


def test_no_module_takes_the_place_of_a_public_name():
    """An imported submodule becomes an attribute of its package, whatever the package had of that name."""
    modules = {module.name for module in pkgutil.iter_modules(calm.__path__)}
    assert not modules & set(calm.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = calm.nonsense


def test_importing_the_package_imports_nothing_heavy():
    code = f"import sys, calm; print([m for m in {HEAVY} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_model_needs_no_training_or_plotting_library():
    code = (
        "import sys, calm; calm.create_model('small_resnet', 2);"
        "print([m for m in ['matplotlib', 'captum', 'cv2', 'lightning', 'timm'] if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
