"""calm.data: names are there, and cheap to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import calm.data


@pytest.mark.parametrize("name", calm.data.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(calm.data, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        calm.data.nothing  # noqa: B018


def test_importing_is_cheap() -> None:
    """Reading and checking need no torch; torchvision waits until a transform is made."""
    code = (
        "import sys, calm, calm.data; assert 'numpy' not in sys.modules\n"
        "import calm.data.check, calm.data.augmentation; assert 'torch' not in sys.modules\n"
        "import calm.data.dataset, calm.data.transforms\n"
        "assert not {'torchvision', 'cv2', 'rich', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
