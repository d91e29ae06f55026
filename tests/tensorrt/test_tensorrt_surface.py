"""Every name that the adapter uses exists in the real products and in the double, takes what it is given, and is used."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import aiotrt
from aiotrt.engines.tensorrt_api import DTYPES, INSPECTOR_SURFACE, PROTOCOLS, RTX_SURFACE, SURFACE, missing_names
from tests.tensorrt.double import TensorRTDouble

ADAPTER = [
    Path(aiotrt.__file__).parent / f"{name}.py"
    for name in (*(f"engines/tensorrt{part}" for part in ("", "_execution", "_kernels", "_runtime")), "building/log")
]
PRODUCTS = ["tensorrt", "tensorrt_rtx", "tensorrt_lean"]
#: What a parameter of this annotation must look like in a binding's docstring.
ACCEPTED = {
    "int": r"SupportsInt|int",
    "str": r"\bstr",
    "tuple[int, ...]": r"tuple|Dims",
    "bytes | memoryview": r"[Bb]uffer",
    "bytes": r"[Bb]uffer",
    "Sequence[int]": r"Sequence\[.*Int",
    "RuntimeCache": r"IRuntimeCache",
    "Enumerator": r"Strategy|Severity|Format",
    "Enumerator | RuntimeConfig": r"Strategy|IRuntimeConfig",
    "Any": r".",
}


def product(name: str) -> ModuleType:
    module: ModuleType = pytest.importorskip(name, reason=f"{name} is not installed: its surface is NOT checked in this run")
    return module


def names() -> list[tuple[str, str]]:
    surfaces = (SURFACE, RTX_SURFACE, INSPECTOR_SURFACE)
    return [(holder, name) for surface in surfaces for holder, names in surface.items() for name in names]


def methods() -> list[tuple[str, str]]:
    return [(h, n) for h, n in names() if h and h in PROTOCOLS and inspect.isfunction(vars(PROTOCOLS[h]).get(n))]


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_name_exists(name: str) -> None:
    module = product(name)
    assert missing_names(module, SURFACE) == []
    assert (missing_names(module, INSPECTOR_SURFACE) == []) == (name != "tensorrt_lean")
    if name == "tensorrt_rtx":
        assert missing_names(module, RTX_SURFACE) == []


@pytest.mark.parametrize(("holder", "method"), methods(), ids=str)
@pytest.mark.parametrize("name", PRODUCTS)
def test_every_call_takes_what_it_is_given(name: str, holder: str, method: str) -> None:
    module = product(name)
    if method in RTX_SURFACE.get(holder, ()) and name != "tensorrt_rtx":
        return
    if holder in INSPECTOR_SURFACE and name == "tensorrt_lean":
        return
    documentation = getattr(module, holder).__dict__[method].__doc__
    signatures = re.findall(rf"{method}\((.*)\) ->", documentation)
    assert signatures, documentation
    wanted = _annotations(holder, method)
    assert any(_accepts(signature, wanted) for signature in signatures), (wanted, signatures)


def test_the_signature_check_is_able_to_fail() -> None:
    module = product("tensorrt_rtx")
    (signature,) = re.findall(r"\((.*)\) ->", module.IExecutionContext.set_tensor_address.__doc__)
    assert _accepts(signature, ["str", "int"])
    assert not _accepts(signature, ["int", "str"])
    assert not _accepts(signature, ["str"])


def _annotations(holder: str, method: str) -> list[str]:
    parameters = list(inspect.signature(vars(PROTOCOLS[holder])[method]).parameters.values())[1:]
    return [str(parameter.annotation) for parameter in parameters]


def _accepts(signature: str, wanted: list[str]) -> bool:
    """Whether a pybind signature, without its parentheses, takes positional arguments of these annotations."""
    depth, parts = 0, [""]
    for character in signature:
        depth += {"[": 1, "(": 1, "<": 1, "]": -1, ")": -1, ">": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    types = [part.partition(":")[2] for part in parts[1:]]  # without self
    required = [kind for kind in types if "=" not in kind]
    return len(required) <= len(wanted) <= len(types) and all(
        re.search(ACCEPTED[annotation], kind) for annotation, kind in zip(wanted, types, strict=False)
    )


@pytest.mark.parametrize("name", PRODUCTS)
def test_bases_can_be_derived_from_and_have_the_callbacks(name: str) -> None:
    module = product(name)
    for callback in ("reallocate_output", "reallocate_output_async", "notify_shape"):
        assert callback in module.IOutputAllocator.__doc__

    said = []

    class Logger(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: object, msg: str) -> None:
            said.append((severity, msg))

    Logger().log(module.ILogger.WARNING, "hello")
    assert said == [(module.ILogger.WARNING, "hello")]
    assert len({hash(getattr(module.ILogger, name)) for name in SURFACE["ILogger"] if name.isupper()}) == 5


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_dtype_of_the_product_is_mapped_or_refused_by_name(name: str) -> None:
    module = product(name)
    for member, value in module.DataType.__members__.items():
        assert value.name == member
    assert set(module.DataType.__members__) - set(DTYPES) <= {"INT4", "FP4", "E8M0"}


# The double...


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_double_has_the_same_surface(name: str) -> None:
    double = TensorRTDouble(name)
    assert missing_names(double, SURFACE) == []
    assert (missing_names(double, RTX_SURFACE) == []) == (name == "tensorrt_rtx")


@pytest.mark.parametrize(("holder", "method"), methods(), ids=str)
def test_the_double_takes_what_the_real_one_takes(holder: str, method: str) -> None:
    double: Any = TensorRTDouble("tensorrt_rtx")
    ours = inspect.signature(vars(PROTOCOLS[holder])[method])
    theirs = inspect.signature(getattr(getattr(double, holder), method))
    assert [p.kind for p in ours.parameters.values()] == [p.kind for p in theirs.parameters.values()]
    assert list(ours.parameters) == list(theirs.parameters)


def test_the_double_refuses_as_the_real_classes_do_where_no_gpu_is_needed() -> None:
    real = product("tensorrt_rtx")
    for module in (real, TensorRTDouble("tensorrt_rtx")):
        runtime: Any = module.Runtime
        with pytest.raises((TypeError, AssertionError)):
            runtime(object())


# The adapter...


def test_every_name_of_the_surface_is_used_and_no_other_of_the_products() -> None:
    used = {
        node.attr for path in ADAPTER for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    }
    # Callbacks and enumerations that the type checker ties to a Protocol, or that are reached through a table.
    indirect = {*DTYPES, "DataType", "log"}
    assert {name for _, name in names()} - used - indirect == set()
    everything: set[str] = set()
    for name in PRODUCTS:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        for holder in ("Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig"):
            everything |= {n for n in vars(getattr(module, holder)) if not n.startswith("_")}
    if not everything:
        pytest.skip("no product is installed: that nothing else is used is NOT checked in this run")
    known = {name for _, name in names()}
    ours = {"name", "engine", "logger", "profiler"}  # names of the adapter's own that TensorRT's classes happen to share
    assert (used & everything) - known - ours == set()
