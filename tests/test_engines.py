"""Engines that cannot be loaded: the error says which file or module and why, and nothing is left behind."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnx.helper
import pytest
import torch

import aiotrt
from aiotrt._install import install_hint
from aiotrt.building.profiles import Examples
from aiotrt.devices.host import HostDevice
from tests.building.models import external
from tests.tools import Affine, frame

FLOAT, STRING = onnx.TensorProto.FLOAT, onnx.TensorProto.STRING


@contextlib.asynccontextmanager
async def nothing_left() -> AsyncIterator[None]:
    """No thread of aiotrt's that was not there before, and nothing that was never closed."""
    before = set(threading.enumerate())
    yield
    gc.collect()  # a ResourceWarning is an error
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("aiotrt"):
            thread.join(10)  # the bound; not a wait for something that should have been waited for
            assert not thread.is_alive(), f"{thread.name} is left"


async def cannot_load(source: Any, error: type[Exception], *says: str, device: str = "host", warmup: object = ()) -> None:
    """Loading raises this, in both ways, and says all of this."""
    async with nothing_left():
        with pytest.raises(error) as awaited:
            _ = await aiotrt.load(source, device=device, warmup=warmup)
        with pytest.raises(error) as entered:
            async with aiotrt.load(source, device=device, warmup=warmup):
                raise AssertionError("this model must not exist")
        for message in (str(awaited.value), str(entered.value)):
            for part in says:
                assert part in message, f"{part!r} is not in {message!r}"


def detector() -> Path:
    """The PP-OCR detector inside the wheel of rapidocr-onnxruntime, whose code is never imported."""
    model = "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
    return Path(str(importlib.metadata.distribution("rapidocr-onnxruntime").locate_file(model)))


def save(path: Path, operator: str, inputs: dict[str, int], outputs: dict[str, int]) -> Path:
    """An ONNX model of one node."""
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node(operator, list(inputs), list(outputs))],
        "graph",
        [helper.make_tensor_value_info(name, kind, ["n", 4]) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, kind, ["n", 4]) for name, kind in outputs.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)
    return path


# Files...


@pytest.mark.asyncio
async def test_files_that_are_no_engines(tmp_path: Path) -> None:
    empty = tmp_path / "empty.onnx"
    empty.touch()
    await cannot_load(empty, aiotrt.EngineError, str(empty), "empty")
    await cannot_load(tmp_path / "gone.onnx", aiotrt.EngineError, str(tmp_path / "gone.onnx"), "no such file")
    await cannot_load(str(tmp_path / "gone.engine"), aiotrt.EngineError, str(tmp_path / "gone.engine"), "no such file")
    folder = tmp_path / "folder.onnx"
    folder.mkdir()
    await cannot_load(folder, aiotrt.EngineError, str(folder), "is a directory")
    inside = empty / "model.onnx"
    await cannot_load(inside, aiotrt.EngineError, str(inside), "cannot be read: Not a directory")
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"x")
    await cannot_load(weights, aiotrt.EngineError, str(weights), "'.safetensors'", ".onnx, .engine or .plan")
    bare = tmp_path / "model"
    bare.write_bytes(b"x")
    await cannot_load(bare, aiotrt.EngineError, str(bare), "unknown kind of file")


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["theinput", "theoutput"])
async def test_a_tensor_whose_name_is_not_text(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "named.onnx", "Relu", {"theinput": 1}, {"theoutput": 1})
    path.write_bytes(path.read_bytes().replace(name.encode(), b"\xff\xfe" + name[2:].encode()))
    await cannot_load(path, aiotrt.EngineError, str(path))


@pytest.mark.asyncio
async def test_damaged_files(tmp_path: Path) -> None:
    garbage, text = tmp_path / "garbage.onnx", tmp_path / "text.onnx"
    garbage.write_bytes(np.random.default_rng(0).bytes(5000))
    text.write_text("version https://git-lfs.github.com/spec/v1\n")
    await cannot_load(garbage, aiotrt.EngineError, str(garbage), "5,000 bytes")
    await cannot_load(text, aiotrt.EngineError, str(text), "git lfs pull", "copy it again")
    whole = detector().read_bytes()
    for size in (1, 1000, len(whole) // 2, len(whole) - 1):
        cut = tmp_path / f"cut{size}.onnx"
        cut.write_bytes(whole[:size])
        await cannot_load(cut, aiotrt.EngineError, str(cut), f"{size:,} bytes")
    without = external(tmp_path / "without.onnx")
    (tmp_path / "weights.bin").unlink()
    await cannot_load(without, aiotrt.EngineError, str(without), "weights.bin", "with any files of its weights")


@pytest.mark.asyncio
@pytest.mark.parametrize("suffix", [".engine", ".plan", ".ENGINE"])
async def test_tensorrt_engines_say_what_to_do_instead(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"ftrt" + bytes(100))
    gpu = "device='cuda'" if torch.cuda.is_available() else "torch finds none here"
    await cannot_load(path, aiotrt.EngineError, path.name, "TensorRT", gpu, ".onnx", "device='host'")


@pytest.mark.asyncio
async def test_onnx_models_with_other_things_than_tensors(tmp_path: Path) -> None:
    text = save(tmp_path / "text.onnx", "Identity", {"words": STRING}, {"same": STRING})
    await cannot_load(text, aiotrt.EngineError, str(text), "'words'", "tensor(string)")
    unknown = save(tmp_path / "unknown.onnx", "NoSuchOperator", {"x": FLOAT}, {"y": FLOAT})
    await cannot_load(unknown, aiotrt.EngineError, str(unknown), "NoSuchOperator")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BFLOAT16", torch.bfloat16),
        ("FLOAT8E4M3FN", torch.float8_e4m3fn),
        ("FLOAT8E4M3FNUZ", torch.float8_e4m3fnuz),
        ("FLOAT8E5M2", torch.float8_e5m2),
        ("FLOAT8E5M2FNUZ", torch.float8_e5m2fnuz),
    ],
)
async def test_onnx_models_of_dtypes_that_numpy_lacks(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    helper, kind = onnx.helper, onnx.TensorProto.DataType.Value(name)
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Cast", ["x"], ["wide"], to=FLOAT)]
    nodes.append(helper.make_node("Add", ["wide", "z"], ["sum"]))
    x, z = (helper.make_tensor_value_info("x", kind, ["n"]), helper.make_tensor_value_info("z", FLOAT, ["n"]))
    y, total = (helper.make_tensor_value_info("y", kind, ["n"]), helper.make_tensor_value_info("sum", FLOAT, ["n"]))
    path = tmp_path / "a.onnx"
    graph = helper.make_graph(nodes, "graph", [x, z], [y, total])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10), path)
    async with aiotrt.load(path, device="host", slots=2) as model:
        assert [(spec.name, spec.dtype) for spec in model.inputs or ()] == [("x", dtype), ("z", torch.float32)]
        for values in ([1.0, -2.5, 3.0], [0.5], [4.0, 8.0]):
            narrow, one = torch.tensor(values).to(dtype), torch.ones(len(values))
            same, summed = await model(narrow, one)
            assert same.dtype is dtype
            assert same.view(torch.uint8).tolist() == narrow.view(torch.uint8).tolist()
            assert summed.tolist() == (narrow.float() + 1).tolist()
        with pytest.raises(aiotrt.InputError, match="'x'"):
            await model(np.ones(3, np.float32), np.ones(3, np.float32))


@pytest.mark.asyncio
async def test_onnx_models_of_dtypes_that_torch_lacks_are_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "a.onnx", "DequantizeLinear", {"x": onnx.TensorProto.INT4, "scale": FLOAT}, {"y": FLOAT})
    model = onnx.load(path)
    model.opset_import[0].version = 21
    onnx.save(model, path)
    await cannot_load(path, aiotrt.EngineError, str(path), "'x' has type tensor(int4)")


@pytest.mark.asyncio
async def test_onnxruntime_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    await cannot_load(detector(), aiotrt.MissingDependencyError, detector().name, "onnxruntime", install_hint("onnx"))
    with pytest.raises(ImportError):  # so that `except ImportError` works too
        _ = await aiotrt.load(detector(), device="host")


@pytest.mark.asyncio
@pytest.mark.gpu
async def test_onnx_on_cuda_says_what_to_do_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    await cannot_load(detector(), aiotrt.MissingDependencyError, detector().name, "device='host'", device="cuda")


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", [str, Path])
async def test_the_detector_runs(kind: type[str | Path]) -> None:
    import onnxruntime

    images = np.random.default_rng(0).random((2, 1, 3, 32, 64), np.float32)
    session = onnxruntime.InferenceSession(str(detector()), providers=["CPUExecutionProvider"])
    async with aiotrt.load(kind(detector())) as model:
        assert model.inputs is not None
        assert [str(spec) for spec in model.inputs] == ["x: float32 (*, 3, *, *)"]
        for image in images:
            np.testing.assert_allclose(await model(x=image), session.run(None, {"x": image})[0], atol=1e-5)


@pytest.mark.asyncio
async def test_an_onnx_model_that_fails_for_one_input_fails_that_call_alone(tmp_path: Path) -> None:
    # Its symbolic extents are independent to a reader of the specs; the operator wants them to be equal.
    path = save(tmp_path / "sum.onnx", "Add", {"a": FLOAT, "b": FLOAT}, {"c": FLOAT})
    async with aiotrt.load(path, slots=1) as model:
        with pytest.raises(aiotrt.EngineError, match=r"sum\.onnx: ONNX Runtime failed"):
            await model(frame(1, (2, 4)), frame(1, (3, 4)))
        np.testing.assert_array_equal(await model(frame(1, (2, 4)), b=frame(2, (2, 4))), frame(3, (2, 4)))
        assert model.statistics().free == 1


# Modules...


class RaisesAtOnce(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError(f"no good with {tuple(x.shape)}")


@pytest.mark.asyncio
async def test_a_module_on_another_device_is_refused(device: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2, device="meta"))
    torch_device = "cpu" if device == "host" else "cuda:0"
    says = ("Sequential", "0.weight is on meta", f".to('{torch_device}')")
    await cannot_load(module, aiotrt.EngineError, *says, device=device)


@pytest.mark.asyncio
async def test_a_buffer_on_another_device_is_refused(device: str) -> None:
    module = torch.nn.Module()
    module.register_buffer("table", torch.ones(3, device="meta"))
    await cannot_load(module, aiotrt.EngineError, "table is on meta", device=device)


@pytest.mark.asyncio
async def test_a_module_that_raises_in_its_warm_up(device: str) -> None:
    says = ("RaisesAtOnce raised ValueError", "no good with (2, 3)")
    await cannot_load(RaisesAtOnce(), aiotrt.EngineError, *says, device=device, warmup=[frame(1)])


@pytest.mark.asyncio
async def test_a_second_warm_up_that_raises(device: str) -> None:
    """The first shape was captured already: that must go too."""
    module = torch.nn.Linear(3, 2).to("cpu" if device == "host" else device)
    warmup = [frame(1, (2, 3)), frame(1, (2, 4))]
    await cannot_load(module, aiotrt.EngineError, "Linear raised RuntimeError", device=device, warmup=warmup)


@pytest.mark.asyncio
async def test_a_warm_up_that_is_no_input(device: str) -> None:
    await cannot_load(Affine(), aiotrt.InputError, "input 'x'", "got str", device=device, warmup=["frame"])
    await cannot_load(Affine(), aiotrt.InputError, "no input 'z'", device=device, warmup=[{"z": frame(1)}])
    warmup = [frame(1), np.ones((2, 3))]
    linear = torch.nn.Linear(3, 3).to("cpu" if device == "host" else device)
    await cannot_load(linear, aiotrt.InputError, "(input: float64 (*, *))", "do not work", device=device, warmup=warmup)


@pytest.mark.asyncio
@pytest.mark.parametrize("source", [None, 42, b"model.onnx", {"x": 1}], ids=["None", "int", "bytes", "dict"])
async def test_things_that_are_no_engines(device: str, source: object) -> None:
    says = ("a file, a torch module, an ExportedProgram or a function", type(source).__name__)
    await cannot_load(source, aiotrt.EngineError, *says, device=device)


@pytest.mark.asyncio
async def test_a_failed_model_says_so_from_then_on(tmp_path: Path) -> None:
    model = aiotrt.load(tmp_path / "gone.onnx")
    with pytest.raises(aiotrt.EngineError):
        _ = await model
    for _ in range(2):
        with pytest.raises(aiotrt.ModelClosedError, match=r"gone\.onnx is closed"):
            _ = await model
    with pytest.raises(aiotrt.ModelClosedError, match=r"gone\.onnx is closed"):
        await model(frame(1))
    await model.aclose()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"warmup": [np.zeros((1, 3), np.float32), (torch.zeros(2, 3),)]}, Examples(((((1, 3),), {}), (((2, 3),), {})))),
        ({"warmup": [(2, 3)]}, Examples(((((2, 3),), {}),))),
        ({"warmup": {"x": np.zeros(3)}, "batching": aiotrt.Batching(max_size=4)}, Examples((((), {"x": (3,)}),), 4)),
        ({"warmup": [object(), 3]}, Examples(((((),), {}), (((),), {})))),
        ({}, Examples(())),
        ({"warmup": [np.zeros((1, 3))], "preprocess": lambda x: x}, None),
    ],
)
@pytest.mark.asyncio
async def test_the_builder_is_told_of_the_examples(tmp_path: Path, options: Any, wanted: object) -> None:
    class Gpu(HostDevice):
        torch_device = torch.device("cuda")

    path = tmp_path / "a.onnx"
    path.write_bytes(b"model")
    with (
        mock.patch("aiotrt.engines.cached_engine", side_effect=aiotrt.EngineError("told")) as builder,
        pytest.raises(aiotrt.EngineError, match="told"),
    ):
        _ = await aiotrt.load(path, device=Gpu(), **options)
    assert builder.call_args.kwargs["examples"] == wanted
