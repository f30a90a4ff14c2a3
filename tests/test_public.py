"""The public surface: every name resolves, and importing the package is cheap."""

from __future__ import annotations

import inspect
import pkgutil
from typing import get_args, get_type_hints

import pytest
from torch import Tensor

import calm


@pytest.mark.parametrize("name", calm.__all__)
def test_every_public_name_resolves(name):
    assert getattr(calm, name) is not None
    assert name in dir(calm)


@pytest.mark.parametrize("kind", [calm.CalmOutput, calm.CamOutput, calm.CalmHead, calm.CalmModel])
def test_hints_of_public_methods_can_be_read_as_types(kind):
    for name, method in inspect.getmembers(kind, inspect.isfunction):
        if not name.startswith("_") and method.__module__.startswith("calm."):
            get_type_hints(method)
    assert Tensor in get_args(get_type_hints(calm.CalmOutput.attribute)["targets"])


def test_no_module_takes_the_place_of_a_public_name():
    """An imported submodule becomes an attribute of its package, whatever the package had of that name."""
    modules = {module.name for module in pkgutil.iter_modules(calm.__path__)}
    assert not modules & set(calm.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = calm.nonsense
