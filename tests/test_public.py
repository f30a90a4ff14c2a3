"""The public surface: every name resolves, and importing the package is cheap."""

from __future__ import annotations

import pkgutil

import pytest

import calm


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
