"""Engines at work: the same bodies on the host device, and with real streams, addresses and graphs on CUDA."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import open_device
from aiotrt.engines import tensorrt_kernels
from aiotrt.engines.tensorrt import TensorRTEngine
from aiotrt.engines.tensorrt_execution import TensorRTExecution
from tests.tensorrt.double import (
    Border,
    MisuseError,
    Network,
    RuntimeCache,
    RuntimeConfig,
    TensorRTDouble,
)
from tests.tensorrt.tools import (
    AFFINE,
    MANY,
    POSITIVE,
    PROFILES,
    REPEAT,
    Tensors,
    affine,
    double_on,
    engine_of,
    loading,
    save,
)

F32 = np.float32


def rows(n: int, start: float = 0.0) -> np.ndarray[Any, Any]:
    return np.arange(start, start + n * 3, dtype=F32).reshape(n, 3)


@pytest.mark.asyncio
async def test_a_static_engine(device: str, tmp_path: Path) -> None:
    double = double_on(device)
    path = save(tmp_path / "affine.engine", double, AFFINE)
    with loading(double):
        async with aiotrt.load(path, device=device, slots=2) as model:
            for i in range(20):
                np.testing.assert_array_equal(await model(rows(2, i)), rows(2, i) * 3 + 1)
            statistics = model.statistics()
            assert statistics.fallbacks == ()
            assert statistics.replays == 20
    gc.collect()
    assert set(double.ended[:-2]) == {"context"}
    assert double.ended[-2:] == ["engine", "runtime"]
    assert 0 not in double.enqueued


@pytest.mark.asyncio
@pytest.mark.parametrize("product", ["tensorrt", "tensorrt_rtx", "tensorrt_lean"])
async def test_every_product(device: str, tmp_path: Path, product: str) -> None:
    double = double_on(device, product, "11.4.0.106")
    with loading(double):
        async with aiotrt.load(save(tmp_path / "x.plan", double, AFFINE), device=device) as model:
            np.testing.assert_array_equal(await model(rows(2)), rows(2) * 3 + 1)


@pytest.mark.asyncio
async def test_many_inputs_and_outputs(device: str, tmp_path: Path) -> None:
    double = double_on(device)
    with loading(double):
        async with aiotrt.load(save(tmp_path / "many.engine", double, MANY), device=device) as model:
            x, y, index = rows(2), rows(2).astype(np.float16), np.array([1, 0])
            for _ in range(3):
                out = await model(index=index, x=x, y=y)
                assert out._fields == ("total", "product", "picked")
                np.testing.assert_array_equal(out.total, x + y)
                np.testing.assert_array_equal(out.product, x.astype(np.float16) * y)
                np.testing.assert_array_equal(out.picked, x[index])


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["FLOAT", "HALF", "BF16", "FP8", "INT8", "UINT8", "INT32", "INT64", "BOOL"])
async def test_every_dtype(device: str, tmp_path: Path, name: str) -> None:
    double = double_on(device)
    network = Network((Border("x", (4,), name),), (Border("y", (4,), name),), lambda v: {"y": v["x"].clone()})
    path = save(tmp_path / "x.engine", double, network)
    with loading(double) as engines:
        async with aiotrt.load(path, device=device) as model:
            assert engines[0].inputs is not None
            x = torch.tensor([0, 1, 1, 0]).to(engines[0].inputs[0].dtype)
            assert torch.equal((await model(x)).view(torch.uint8), x.view(torch.uint8))


@pytest.mark.asyncio
async def test_the_fitting_profile_is_chosen(device: str, tmp_path: Path) -> None:
    double = double_on(device)
    path = save(tmp_path / "profiles.engine", double, PROFILES)
    with loading(double):
        async with aiotrt.load(path, device=device, slots=2) as model:
            for n in (1, 4, 8, 16, 2, 9, 1, 16):
                got = await asyncio.gather(*(model(rows(n, i)) for i in range(4)))
                for i, result in enumerate(got):
                    np.testing.assert_array_equal(result, rows(n, i) * 3 + 1)
            with pytest.raises(aiotrt.InputError, match=r"no optimisation profile.*\(1, 3\) to \(4, 3\).*\(8, 3\) to \(16"):
                await model(rows(6))
            with pytest.raises(aiotrt.InputError):
                await model(rows(17))
            np.testing.assert_array_equal(await model(rows(3)), rows(3) * 3 + 1)


@pytest.mark.asyncio
async def test_slots_do_not_share_activation_memory(device: str, tmp_path: Path) -> None:
    """The double computes in it, so sharing would mix up the callers' results."""
    double = double_on(device)
    with loading(double):
        async with aiotrt.load(save(tmp_path / "x.engine", double, PROFILES), device=device, slots=4) as model:
            for _ in range(5):
                got = await asyncio.gather(*(model(rows(1 + i % 4, i)) for i in range(64)))
                for i, result in enumerate(got):
                    np.testing.assert_array_equal(result, rows(1 + i % 4, i) * 3 + 1)


def test_contexts_of_a_slot_share_activation_memory_and_give_it_back(device: str, tmp_path: Path) -> None:
    double = double_on(device)
    engine = engine_of(save(tmp_path / "x.engine", double, PROFILES), double, device)
    where = open_device(device)
    first, second = where.stream(), where.stream()
    a = engine.execution(where, first, ["x"], ((1, 3),))
    b = engine.execution(where, first, ["x"], ((16, 3),))
    c = engine.execution(where, second, ["x"], ((1, 3),))
    assert a._workspace is b._workspace
    assert a._workspace is not c._workspace
    assert a._workspace is not None
    assert a._workspace.nbytes == 16 * 3 * 4  # of the largest profile, so it never grows
    assert a.nbytes == 16 * 3 * 4 + 3 * 4
    assert b.nbytes == 16 * 3 * 4  # its outputs alone
    address = a._workspace.address
    a.close()
    d = engine.execution(where, first, ["x"], ((2, 3),))
    assert d._workspace is not None
    assert d._workspace.address == address
    for execution in (b, c, d):
        execution.close()
    assert dict(engine._workspaces) == {}
    engine.close()
    for stream in (first, second):
        stream.close()
    with pytest.raises(aiotrt.EngineError, match="closed"):
        engine.execution(where, first, ["x"], ((1, 3),))
    with pytest.raises(aiotrt.EngineError, match="closed"):
        b([torch.zeros(16, 3, device=where.torch_device)])


def test_contexts_end_before_their_engine_and_it_before_its_runtime(tmp_path: Path) -> None:
    double = double_on("host")
    engine = engine_of(save(tmp_path / "x.engine", double, AFFINE), double)
    where = open_device("host")
    stream = where.stream()
    kept = [engine.execution(where, stream, ["x"], ((2, 3),)) for _ in range(3)]
    engine.close()  # whoever forgot to close them
    assert double.ended == ["context"] * 3 + ["engine", "runtime"]
    assert len(kept) == 3
    stream.close()


@pytest.mark.asyncio
async def test_outputs_whose_shape_depends_on_the_data(device: str, tmp_path: Path) -> None:
    double = double_on(device)
    with loading(double):
        async with aiotrt.load(save(tmp_path / "x.engine", double, POSITIVE), device=device, slots=2) as model:
            for values in ([1, -1, 2, -2, 3, -3], [-1] * 6, [5] * 6, [0, 0, 0, 0, 0, 7]):
                x = np.array(values, F32)
                np.testing.assert_array_equal(await model(x), x[x > 0])
            got = await asyncio.gather(*(model(np.full(6, i - 8, F32)) for i in range(16)))
            assert [result.size for result in got] == [0] * 9 + [6] * 7
            statistics = model.statistics()
            assert statistics.replays == 0
            assert "depends on the data" in statistics.fallbacks[0]


@pytest.mark.asyncio
async def test_host_inputs_whose_values_matter(device: str, tmp_path: Path) -> None:
    double = double_on(device)
    with loading(double):
        async with aiotrt.load(save(tmp_path / "x.engine", double, REPEAT), device=device, slots=1) as model:
            x = np.array([1, 2], F32)
            for times in (1, 3, 4, 2):
                np.testing.assert_array_equal(await model(x, np.array(times)), np.tile(x, times))
            with pytest.raises(aiotrt.EngineError, match=r"'times' holds \[5\].*\[1\] to \[4\]"):
                await model(x, np.array(5))
            np.testing.assert_array_equal(await model(x, np.array(2)), np.tile(x, 2))
            assert "'times'" in model.statistics().fallbacks[0]


@pytest.mark.asyncio
async def test_host_outputs(device: str, tmp_path: Path) -> None:
    double = double_on(device)
    network = Network(
        (Border("x", (2, 3)),),
        (Border("y", (2, 3)), Border("size", (2,), "INT64", host=True)),
        lambda v: {"y": v["x"] * 3 + 1, "size": torch.tensor(v["x"].shape)},
    )
    with loading(double):
        async with aiotrt.load(save(tmp_path / "x.engine", double, network), device=device) as model:
            out = await model(rows(2))
            np.testing.assert_array_equal(out.size, [2, 3])
            np.testing.assert_array_equal(out.y, rows(2) * 3 + 1)
            assert "host memory" in model.statistics().fallbacks[0]


@pytest.mark.asyncio
async def test_pre_and_postprocess_around_an_engine(device: str, tmp_path: Path) -> None:
    double = double_on(device)

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x.float().t()  # a view, not row-major: the adapter must not hand over its address

    with loading(double):
        async with aiotrt.load(
            save(tmp_path / "x.engine", double, AFFINE),
            device=device,
            preprocess=transposed,
            postprocess=lambda y: y - 1,
            warmup=[np.zeros((3, 2), np.uint8)],
        ) as model:
            for i in range(5):
                x = np.arange(i, i + 6, dtype=np.uint8).reshape(3, 2)
                np.testing.assert_array_equal(await model(x), x.T.astype(F32) * 3)


# Calls that say no...


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("call", "answer", "says"),
    [
        ("create_execution_context", None, "creating an execution context"),
        ("create_execution_context", RuntimeError("no"), "creating an execution context"),
        ("create_runtime_config", None, "runtime configuration"),
        ("set_optimization_profile_async", False, "selecting optimisation profile 0"),
        ("set_input_shape", False, "setting input 'x' to (2, 3)"),
        ("set_input_shape", RuntimeError("no"), "setting input 'x'"),
        ("set_device_memory", RuntimeError("no"), "activation memory"),
        ("infer_shapes", RuntimeError("no"), "inferring shapes"),
        ("set_tensor_address", False, "setting the address of"),
        ("execute_async_v3", False, "enqueueing the engine"),
        ("execute_async_v3", RuntimeError("no"), "enqueueing the engine"),
    ],
)
async def test_every_no_is_an_engine_error_with_the_log(
    device: str, tmp_path: Path, call: str, answer: object, says: str
) -> None:
    double = double_on(device)
    path = save(tmp_path / "x.engine", double, PROFILES)
    with loading(double):
        async with aiotrt.load(path, device=device, slots=1) as model:
            double.fail(call, answer, message="Error Code 99: the reason")
            with pytest.raises(aiotrt.EngineError) as caught:
                await model(rows(2))
            message = str(caught.value)
            del caught  # its traceback keeps what failed
            for part in (path.name, says, "Error Code 99: the reason"):
                assert part in message, message
            double.mend()
            np.testing.assert_array_equal(await model(rows(2)), rows(2) * 3 + 1)
    if isinstance(answer, Exception):
        answer.__traceback__ = None  # likewise
    gc.collect()  # which ends garbage in any order
    assert {"engine", "runtime"} <= set(double.ended)


@pytest.mark.asyncio
async def test_an_output_allocator_that_is_refused(device: str, tmp_path: Path) -> None:
    double = double_on(device)
    with loading(double):
        async with aiotrt.load(save(tmp_path / "x.engine", double, POSITIVE), device=device, slots=1) as model:
            double.fail("set_output_allocator", False)
            with pytest.raises(aiotrt.EngineError, match="output allocator for 'y'"):
                await model(np.ones(6, F32))


def test_an_allocator_that_finds_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    double = double_on("host")
    engine = engine_of(save(tmp_path / "x.engine", double, POSITIVE), double)
    where = open_device("host")
    stream = where.stream()
    execution = engine.execution(where, stream, ["x"], ((6,),))

    def empty(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("all of it is taken")

    with monkeypatch.context() as patch:
        patch.setattr(where, "empty", empty)
        with pytest.raises(torch.OutOfMemoryError, match="all of it"):
            execution([torch.ones(6)])
    assert execution([torch.ones(6)])["y"].shape == (6,)
    engine.close()
    stream.close()


def test_a_shape_that_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shape of the last run is no answer to this one."""
    double = double_on("host")
    engine = engine_of(save(tmp_path / "x.engine", double, POSITIVE), double)
    where = open_device("host")
    stream = where.stream()
    execution = engine.execution(where, stream, ["x"], ((6,),))
    assert execution([torch.ones(6)])["y"].shape == (6,)
    monkeypatch.setattr(double.IExecutionContext, "_give", lambda *_: True)
    with pytest.raises(aiotrt.EngineError, match="did not report the shape of output 'y'"):
        execution([torch.ones(6)])
    engine.close()
    stream.close()


@pytest.mark.asyncio
async def test_a_call_that_fails_later_fails_alone(device: str, tmp_path: Path) -> None:
    """Without a graph: with one, TensorRT is not called again."""
    double = double_on(device)
    path = save(tmp_path / "x.engine", double, AFFINE)
    with loading(double):
        async with aiotrt.load(path, device=device, slots=1, graphs=False) as model:
            await model(rows(2))
            double.fail("execute_async_v3", False)
            with pytest.raises(aiotrt.EngineError, match="enqueueing"):
                await model(rows(2))
            double.mend()
            np.testing.assert_array_equal(await model(rows(2)), rows(2) * 3 + 1)


async def run_once(path: Path, double: TensorRTDouble, device: str) -> None:
    with loading(double):
        async with aiotrt.load(path, device=device, slots=2) as model:
            for n in (2, 9):
                np.testing.assert_array_equal(await model(rows(n)), rows(n) * 3 + 1)


@pytest.mark.asyncio
async def test_what_was_compiled_is_kept_for_the_next_process(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(tmp_path / "cache"))
    double = double_on(device)
    path = save(tmp_path / "x.engine", double, PROFILES)
    await run_once(path, double, device)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.name.startswith("x-")
    assert kept.suffix == ".kernels"
    both = kept.read_bytes()
    assert both.count(b"(2, 3)") == both.count(b"(9, 3)") == 1
    written = kept.stat().st_ino
    os.utime(kept, (1, 1))
    with caplog.at_level("DEBUG", "aiotrt"):
        await run_once(path, double, device)
    assert kept.stat().st_ino == written  # nothing was compiled that it did not have
    for part in ("deserialised", "created a context", "prepared a context for {'x': (2, 3)}", "enqueued for the first time"):
        assert re.search(rf"x\.engine: {re.escape(part)} in \d+\.\d+ s", caplog.text)
    assert f"read {len(both)} bytes of compiled kernels" in caplog.text
    assert "bytes of compiled kernels\n" not in caplog.text  # none was kept
    caplog.clear()
    assert kept.stat().st_mtime > 1  # but it was used
    caplog.set_level("INFO", "aiotrt")
    kept.write_bytes(b"made for another GPU")
    await run_once(path, double, device)
    assert "compiled for another GPU" in caplog.text
    assert sorted(kept.read_bytes().split(b"\n")) == sorted(both.split(b"\n"))


@pytest.mark.asyncio
async def test_a_cache_that_cannot_be_written_costs_time_only(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(tmp_path / "cache"))
    double = double_on(device)
    await run_once(save(tmp_path / "x.engine", double, PROFILES), double, device)
    assert "its compiled kernels cannot be saved" in caplog.text


@pytest.mark.asyncio
async def test_compiled_kernels_that_were_used_least_recently_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(cache))
    monkeypatch.setattr(tensorrt_kernels, "ROOM", 1000)
    for age, name in enumerate(("lately.kernels", "before.kernels", "long_ago.kernels", "long_ago.engine")):
        (cache / name).write_bytes(bytes(450))
        os.utime(cache / name, (1000 - age, 1000 - age))
    double = double_on("host")
    path = save(tmp_path / "x.engine", double, PROFILES)
    await run_once(path, double, "host")
    names = {file.name.partition("-")[0] for file in cache.iterdir()}
    assert names == {"x", "lately.kernels", "before.kernels", "long_ago.engine"}
    monkeypatch.setattr(tensorrt_kernels, "ROOM", 1)
    (own,) = cache.glob("x-*.kernels")
    own.unlink()
    await run_once(path, double, "host")
    assert [file.name for file in cache.glob("*.kernels")] == [own.name]  # what is new is kept, however large


@pytest.mark.asyncio
async def test_kernels_that_tensorrt_does_not_tell_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(RuntimeCache, "serialize", lambda self: None)
    double = double_on("host")
    await run_once(save(tmp_path / "x.engine", double, PROFILES), double, "host")
    assert "x.engine: TensorRT cannot serialise its compiled kernels" in caplog.text
    assert not (tmp_path / "cache").exists()


@pytest.mark.asyncio
async def test_a_configuration_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not today")

    double = double_on("host")
    with loading(double):
        async with aiotrt.load(save(tmp_path / "x.engine", double, AFFINE), device="host") as model:
            with monkeypatch.context() as patch:
                patch.setattr(RuntimeConfig, "create_runtime_cache", refuse)
                with pytest.raises(aiotrt.EngineError, match=r"x\.engine: configuring the runtime failed: not today"):
                    await model(rows(2))
            np.testing.assert_array_equal(await model(rows(2)), rows(2) * 3 + 1)


@pytest.mark.asyncio
async def test_auxiliary_streams_are_ours(device: str, tmp_path: Path) -> None:
    """TensorRT's own would synchronise with the default stream, and so break captures and be broken by them."""
    double = double_on(device)
    network = dataclasses.replace(PROFILES, auxiliary=2)
    await run_once(save(tmp_path / "x.engine", double, network), double, device)  # the double refuses any others


@pytest.mark.gpu
@pytest.mark.asyncio
async def test_an_engine_that_cannot_be_captured(tmp_path: Path) -> None:
    double = double_on("cuda")
    network = Network(AFFINE.inputs, AFFINE.outputs, affine, capturable=False)
    with loading(double):
        async with aiotrt.load(save(tmp_path / "x.engine", double, network), device="cuda") as model:
            for i in range(5):
                np.testing.assert_array_equal(await model(rows(2, i)), rows(2, i) * 3 + 1)
            statistics = model.statistics()
            assert statistics.replays == 0
            assert "capturing" in statistics.fallbacks[0]


# The double is strict...


def executed(engine: TensorRTEngine) -> TensorRTExecution:
    """An execution that has run once; it keeps the memory that its context points to."""
    where = open_device("host")
    stream = where.stream()
    assert engine.inputs is not None
    shape = engine.inputs[0].maximum or tuple(extent or 1 for extent in engine.inputs[0].shape or ())
    execution = engine.execution(where, stream, ["x"], (shape,))
    execution([torch.zeros(shape)])
    stream.close()
    return execution


def test_the_double_finds_what_tensorrt_would_pass_over(tmp_path: Path) -> None:
    double = TensorRTDouble()
    engine = engine_of(save(tmp_path / "x.engine", double, PROFILES), double)
    execution = executed(engine)
    context: Any = execution._context
    with pytest.raises(MisuseError, match="shape"):
        context.set_input_shape("x", (8, 3))
    with pytest.raises(MisuseError, match="profile"):
        context.set_optimization_profile_async(0, 1)
    with pytest.raises(MisuseError, match="moved"):
        context.set_device_memory(4096, 1 << 20)
    with pytest.raises(MisuseError, match="bytes of activation memory"):
        context.set_device_memory(4096, 16)
    with pytest.raises(MisuseError, match="default stream"):
        context.execute_async_v3(0)
    raw: Any = engine._engine
    with pytest.raises(MisuseError, match="moves its memory"):
        raw.create_execution_context(double.ExecutionContextAllocationStrategy.STATIC)
    with pytest.raises(MisuseError, match="lazily"):
        config = raw.create_runtime_config()
        config.set_execution_context_allocation_strategy(double.ExecutionContextAllocationStrategy.USER_MANAGED)
        raw.create_execution_context(config)
    engine.close()


def test_the_double_says_no_where_tensorrt_does(tmp_path: Path) -> None:
    double = TensorRTDouble()
    engine = engine_of(save(tmp_path / "x.engine", double, PROFILES), double)
    raw: Any = engine._engine
    config = raw.create_runtime_config()
    config.set_execution_context_allocation_strategy(double.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = double.DynamicShapesKernelSpecializationStrategy.EAGER
    first, second = (raw.create_execution_context(config) for _ in range(2))
    assert first.set_input_shape("x", (4, 3))
    assert not first.set_input_shape("x", (5, 3))
    assert not first.set_input_shape("y", (4, 3))
    assert not second.set_input_shape("x", (4, 3))  # only the first context has a profile from the start
    with pytest.raises(RuntimeError):
        second.set_optimization_profile_async(2, 1)
    assert not first.set_tensor_address("x", 0)
    assert not first.set_tensor_address("z", 4096)
    assert not first.execute_async_v3(1)
    assert first.get_tensor_shape("y") == [4, 3]
    assert second.get_tensor_shape("y") == [-1, 3]
    assert second.infer_shapes() == ["x"]
    engine.close()


def test_the_double_works_at_the_addresses_that_it_is_given(tmp_path: Path) -> None:
    double = TensorRTDouble()
    values: Tensors = {"x": torch.ones(2, 3), "y": torch.zeros(2, 3), "memory": torch.zeros(6)}
    engine = engine_of(save(tmp_path / "x.engine", double, AFFINE), double)
    execution = executed(engine)
    context: Any = execution._context
    context.set_tensor_address("x", values["x"].data_ptr())
    context.set_tensor_address("y", values["y"].data_ptr())
    assert context.execute_async_v3(1)
    assert values["y"].eq(4).all()
    engine.close()
