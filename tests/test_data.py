"""calm.data: names are there, and cheap to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import calm.data


@pytest.mark.parametrize("name", calm.data.__all__)
def test_data_resolves_every_public_name(name: str) -> None:
    assert getattr(calm.data, name) is not None


def test_data_raises_attribute_error_for_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        calm.data.nothing  # noqa: B018


def test_import_of_data_needs_no_torch() -> None:
    """Reading and checking need no torch; torchvision waits until a transform is made."""
    code = (
        "import sys, calm, calm.data; assert 'numpy' not in sys.modules\n"
        "import calm.data.check, calm.data.augmentation; assert 'torch' not in sys.modules\n"
        "import calm.data.dataset, calm.data.transforms\n"
        "assert not {'torchvision', 'cv2', 'rich', 'matplotlib'} & set(sys.modules), sorted(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
