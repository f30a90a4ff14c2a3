"""calm.data: names are there, and cheap to import."""

from __future__ import annotations

import pytest

import calm.data


@pytest.mark.parametrize("name", calm.data.__all__)
def test_data_resolves_every_public_name(name: str) -> None:
    assert getattr(calm.data, name) is not None


def test_data_raises_attribute_error_for_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        calm.data.nothing  # noqa: B018
