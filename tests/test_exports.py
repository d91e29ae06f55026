from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import aiotrt


def test_all_is_sorted_complete_and_documented() -> None:
    assert sorted(aiotrt.__all__) == aiotrt.__all__
    for name in aiotrt.__all__:
        assert inspect.getdoc(getattr(aiotrt, name)), f"{name} has no docstring"


@pytest.mark.parametrize("name", [name for name in aiotrt.__all__ if inspect.isclass(getattr(aiotrt, name))])
def test_public_methods_are_documented(name: str) -> None:
    for attribute, value in vars(getattr(aiotrt, name)).items():
        if not attribute.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
            assert inspect.getdoc(value), f"{name}.{attribute} has no docstring"


def test_every_error_is_exported_and_drawn_in_the_tree() -> None:
    errors = importlib.import_module("aiotrt.errors")
    for name, value in vars(errors).items():
        if inspect.isclass(value) and issubclass(value, Exception):
            assert name in aiotrt.__all__
            assert name in (errors.__doc__ or "")


@pytest.mark.parametrize(
    "name",
    [
        info.name
        for info in pkgutil.walk_packages(aiotrt.__path__, "aiotrt.")
        if info.name not in ("aiotrt.__main__", "aiotrt.devices.cuda", "aiotrt.devices._submitter")
    ],
)
def test_every_module_says_what_it_is_and_exports_what_it_has(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for export in getattr(module, "__all__", ()):
        assert hasattr(module, export), f"{name}.__all__ names {export}, which is not there"
