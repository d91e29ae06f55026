"""Dependencies point down, and the heavy ones stay in their rooms: read from the source, so nothing need be installed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import aiotrt

PACKAGE = Path(aiotrt.__file__).parent

#: Lowest first. A module may import from lower layers, and from its own where that makes no cycle.
LAYERS = [
    {"errors", "_build", "_impl", "_install"},
    {"_workers"},
    {"runtime.slots", "runtime.placement", "completion.prediction", "batching.queue", "run", "tensors.kind"},
    {"tensors.conversion", "tensors.parameters", "tensors.structure"},
    {"tensors.reading", "tensors.tensor_spec", "tensors.output_names"},
    {"tensors.argument", "tensors.signature"},
    {"tensors.input_specs", "tensors"},
    {"completion.lane", "completion.timers"},
    {"completion.waiter"},
    {"building.files", "building.log"},
    {"building.products", "building.progress", "building.proto", "building.profiles", "building.source", "building.sidecar"},
    {"building.network"},
    {"building.builder"},
    {"building.cache"},
    {"building"},
    {"devices.base", "devices.host", "devices.cuda", "devices.cuda_graphs", "devices.cuda_ipc", "devices.numa", "devices"},
    {"engines.base", "engines.module", "engines.onnx", "engines.replicas", "engines", "completion.hub"}
    | {f"engines.tensorrt{part}" for part in ("", "_api", "_execution", "_kernels", "_plan", "_runtime")},
    {"runtime.programs"},
    {"runtime.handshake"},
    {"runtime.alarm"},
    {"runtime.memory", "runtime.copy_job"},
    {"runtime.route"},
    {"runtime.request", "runtime.replay"},
    {"runtime.launch"},
    {"runtime.executor"},
    {"runtime.hold"},
    {"batching.group", "batching.stacked"},
    {"batching.item"},
    {"batching.batch"},
    {"batching.member", "batching.placed"},
    {"buffers", "runtime.mapping", "batching.batcher"},
    {"batching.dispatcher"},
    {"runtime", "completion", "batching"},
    {"lease", "load_options"},
    {"model"},
]
#: Rooms above the model, which may use all of it; nothing below may import them.
UPPER = {"testing", "selftest", "cli", "serving", "video", "decoding", "preprocess", "__main__"}
#: Third-party packages that only these modules may import.
RESERVED = {
    "cuda": {"devices.cuda", "devices.cuda_graphs", "devices.cuda_ipc", "selftest.instruments"},
    "tensorrt": {"engines.tensorrt_runtime"},
    "tensorrt_rtx": {"engines.tensorrt_runtime"},
    "tensorrt_lean": {"engines.tensorrt_runtime"},
    "onnxruntime": {"engines.onnx", "building.source"},
    "uvloop": {"run"},
    "PyNvVideoCodec": {"video.nvdec"},
    "asyncio": {"completion.hub", "completion.timers", "completion.waiter", "run", "lease", "model"}
    | {f"runtime.{name}" for name in ("alarm", "request", "replay", "executor", "hold", "mapping")}
    | {"batching.item", "batching.batcher", "batching.dispatcher"},
}
#: Pure modules, and all that they may import.
PURE = {
    "errors": set(),
    "runtime.slots": {"enum", "collections", "typing"},
    "runtime.placement": {"math", "typing"},
    "completion.prediction": {"enum", "math", "typing"},
    "batching.queue": {"bisect", "collections", "dataclasses", "math", "typing"},
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the layers"
            assert node.module is not None
            yield node.module
            if node.module.startswith("aiotrt"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(name: str) -> int:
    for i, members in enumerate(LAYERS):
        if name in members:
            return i
    if name.split(".", maxsplit=1)[0] in UPPER or name in UPPER:
        return len(LAYERS)
    raise AssertionError(f"{name} has no layer: give it one in tests/test_layers.py")


NAMES = {name for name, _ in modules()}


@pytest.mark.parametrize(("name", "tree"), list(modules()), ids=[name for name, _ in modules()])
def test_imports_point_down(name: str, tree: ast.Module) -> None:
    for imported in imports(tree):
        if imported.startswith("aiotrt."):
            other = imported.removeprefix("aiotrt.")
            if other in NAMES:
                assert layer(other) <= layer(name), f"{name} imports {other}, which is above it"
            continue
        top = imported.split(".")[0]
        if top in RESERVED and name.split(".", maxsplit=1)[0] not in UPPER:
            assert name in RESERVED[top], f"{name} imports {top}; only {RESERVED[top]} may"
        if name in PURE and top not in ("__future__", "aiotrt"):
            assert top in PURE[name] or imported == "collections.abc", f"{name} is pure and imports {imported}"


def test_importing_aiotrt_needs_no_cuda_tensorrt_onnxruntime_or_uvloop() -> None:
    program = """
import sys
for name in ("cuda", "cuda.bindings", "tensorrt", "tensorrt_rtx", "tensorrt_lean", "onnxruntime", "uvloop"):
    sys.modules[name] = None
import aiotrt, asyncio, numpy, torch
async def main():
    async with aiotrt.load(torch.nn.Identity(), device="host") as model:
        assert (await model(numpy.ones((1, 1)))) == 1
aiotrt.run(main())
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=50)


def test_no_module_is_called_utils() -> None:
    assert not [name for name in NAMES if name.split(".")[-1] in ("utils", "helpers", "common", "misc")]
