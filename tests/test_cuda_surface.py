"""What aiotrt reaches for in CUDA exists: every name that it takes from CUDA's bindings and from torch, without a GPU.

This proves spelling, not behaviour; behaviour is for `tests/gpu` on a machine that has one.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch

import aiotrt

driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")

FOLDER = Path(aiotrt.__file__).parent
FILES = ("devices/cuda.py", "devices/cuda_graphs.py", "selftest/instruments.py")
SOURCES = [ast.parse((FOLDER / name).read_text()) for name in FILES]
#: Only in torch's CUDA builds.
CUDA_BUILDS_ONLY = {
    "torch._C._CudaEventBase.query",
    "torch._C._cuda_getCurrentRawStream",
    "torch._C._cuda_getCurrentStream",
    "torch._C._cuda_getDevice",
    "torch._C._cuda_setStream",
    "torch.cuda.default_generators",
}


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` as text."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else None


def used() -> list[str]:
    nodes = [node for source in SOURCES for node in ast.walk(source)]
    names = {name for node in nodes if isinstance(node, ast.Attribute) and (name := dotted(node))}
    roots = ("driver.", "runtime.", "torch.")
    return sorted(name for name in names if name.startswith(roots) and name not in CUDA_BUILDS_ONLY)


@pytest.mark.parametrize("name", used())
def test_it_exists(name: str) -> None:
    root, *path = name.split(".")
    thing: Any = {"driver": driver, "runtime": runtime, "torch": torch}[root]
    for attribute in path:
        assert hasattr(thing, attribute), f"{name}: there is no {attribute}"
        thing = getattr(thing, attribute)


def test_the_walk_finds_what_is_used() -> None:
    names = {"driver.cuGraphLaunch", "driver.cuStreamWaitValue32", "runtime.cudaGetLastError", "torch.cuda.CUDAGraph"}
    assert names <= set(used())


def test_statuses_are_read_from_messages_and_attributes() -> None:
    from aiotrt.devices.cuda import ASK_LATER, PASSING, _check, _code, query
    from aiotrt.errors import DeviceError

    assert _code(RuntimeError("CUDA error: cudaErrorIllegalAddress")) == (700, "cudaErrorIllegalAddress")
    assert _code(RuntimeError("CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED: no")) == (900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
    assert _code(ValueError("something else")) == (-1, "ValueError")

    class WithCode(RuntimeError):
        error_code = 719

    assert _code(WithCode()) == (719, "cudaErrorLaunchFailure")
    assert ASK_LATER in PASSING

    def refused() -> bool:
        raise RuntimeError("CUDA error: cudaErrorStreamCaptureUnsupported")

    def broken() -> bool:
        raise WithCode

    assert query(refused) is False
    with pytest.raises(DeviceError, match=r"cudaErrorLaunchFailure \(719\)") as caught:
        query(broken)
    assert (caught.value.code, caught.value.name) == (719, "cudaErrorLaunchFailure")
    assert _check("x", (driver.CUresult.CUDA_SUCCESS, 7)) == (7,)
    with pytest.raises(RuntimeError, match=r"copying failed: CUDA_ERROR_INVALID_VALUE \(1\)"):
        _check("copying", (driver.CUresult.CUDA_ERROR_INVALID_VALUE,))
    with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        _check("copying", (driver.CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,))
