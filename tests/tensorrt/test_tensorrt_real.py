"""The real runtime on a real GPU: TensorRT-RTX engines through `aiotrt.load`, against bare TensorRT, bit for bit."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import open_device
from aiotrt.engines.tensorrt import TensorRTEngine
from aiotrt.engines.tensorrt_runtime import open_product
from tests.building import models

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="the real runtime is NOT tested in this run")


def built(trt: Any, path: Path) -> Path:
    """A small FP16 engine with two profiles that do not touch.

    None whose output's shape depends on the data: TensorRT-RTX 1.6.1 refuses to build NonZero ("has no runners"), so that
    is the double's part.
    """
    builder = trt.Builder(_logger(trt))
    network = builder.create_network(0)
    config = builder.create_builder_config()
    random = np.random.default_rng(0)
    weights = (random.standard_normal((64, 32)) / 8).astype(np.float16)
    x = network.add_input("x", trt.float16, (-1, 64))
    w = network.add_constant(weights.shape, trt.Weights(weights)).get_output(0)
    product = network.add_matrix_multiply(x, trt.MatrixOperation.NONE, w, trt.MatrixOperation.NONE).get_output(0)
    output = network.add_activation(product, trt.ActivationType.RELU).get_output(0)
    for low, high in ((1, 4), (8, 16)):
        profile = builder.create_optimization_profile()
        profile.set_shape("x", (low, 64), (low, 64), (high, 64))
        config.add_optimization_profile(profile)
    output.name = "y"
    network.mark_output(output)
    path.write_bytes(bytes(builder.build_serialized_network(network, config)))
    return path


_loggers: list[Any] = []  # TensorRT keeps the first logger that it is given, for ever


def _logger(trt: Any) -> Any:
    if not _loggers:
        _loggers.append(trt.Logger(trt.Logger.ERROR))
    return _loggers[0]


def bare(trt: Any, path: Path, inputs: list[Array]) -> list[Array]:
    """The same engine without aiotrt: plain enqueue and synchronise."""
    engine = trt.Runtime(_logger(trt)).deserialize_cuda_engine(path.read_bytes())
    config = engine.create_runtime_config()
    # As aiotrt has it. By default the first runs at a shape use other kernels than later ones, and differ in the last bits.
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    context, stream, results = engine.create_execution_context(config), torch.cuda.Stream(), []
    for x in inputs:
        profile = 0 if len(x) <= 4 else 1
        assert context.set_optimization_profile_async(profile, stream.cuda_stream)
        stream.synchronize()
        assert context.set_input_shape("x", x.shape)
        device_x = torch.from_numpy(x).cuda()
        y = torch.empty(tuple(context.get_tensor_shape("y")), dtype=torch.float16, device="cuda")
        assert context.set_tensor_address("x", device_x.data_ptr())
        assert context.set_tensor_address("y", y.data_ptr())
        torch.cuda.synchronize()
        assert context.execute_async_v3(stream.cuda_stream)
        stream.synchronize()
        results.append(y.cpu().numpy())
    return results


def loaded(path: Path, **options: Any) -> Any:
    """`aiotrt.load`, whatever the core makes of the suffix."""
    patch = mock.patch("aiotrt.model.open_engine", lambda source, device, _: TensorRTEngine(Path(source), device))
    patch.start()
    return aiotrt.load(path, device="cuda", **options), patch


@pytest.mark.asyncio
@pytest.mark.parametrize("slots", [1, 3])
async def test_bit_equal_to_bare_tensorrt(trt: Any, tmp_path: Path, slots: int) -> None:
    path = built(trt, tmp_path / "dense.engine")
    random = np.random.default_rng(1)
    inputs = [random.standard_normal((n, 64)).astype(np.float16) for n in (1, 4, 8, 16, 2, 12, 3, 9) * 8]
    expected = await asyncio.to_thread(bare, trt, path, inputs)
    opening, patch = loaded(path, slots=slots)
    try:
        async with opening as model:
            for _ in range(3):
                got = await asyncio.gather(*(model(x) for x in inputs))
                for result, want in zip(got, expected, strict=True):
                    np.testing.assert_array_equal(result, want)
            assert model.statistics().fallbacks == ()
            with pytest.raises(aiotrt.InputError, match="no optimisation profile"):
                await model(np.zeros((6, 64), np.float16))
    finally:
        patch.stop()


@pytest.mark.asyncio
async def test_the_core_opens_the_file_by_itself(trt: Any, tmp_path: Path) -> None:
    path = built(trt, tmp_path / "dense.engine")
    x = np.ones((2, 64), np.float16)
    (expected,) = await asyncio.to_thread(bare, trt, path, [x])
    async with aiotrt.load(path, device="cuda") as model:
        np.testing.assert_array_equal(await model(x), expected)


@pytest.mark.asyncio
async def test_functions_around_the_engine(trt: Any, tmp_path: Path) -> None:
    """With a temporary input, whose address in the warm-up is another than in the capture."""
    path = built(trt, tmp_path / "dense.engine")
    opening, patch = loaded(path, preprocess=lambda x: (x.half() / 255).t(), postprocess=lambda y: y.argmax(1))
    try:
        async with opening as model:
            for i in range(5):
                x = np.random.default_rng(i).integers(0, 255, (64, 4), np.uint8)
                half = (torch.from_numpy(x).cuda().half() / 255).t().contiguous().cpu().numpy()
                (y,) = await asyncio.to_thread(bare, trt, path, [half])
                np.testing.assert_array_equal(await model(x), y.argmax(1))
            assert model.statistics().fallbacks == ()
    finally:
        patch.stop()


@pytest.mark.asyncio
async def test_an_input_that_is_read_as_a_shape(trt: Any, tmp_path: Path) -> None:
    """Its values are read on the host at every run, so there is no graph; and the output's shape follows from them."""
    path = models.reshape(tmp_path / "reshape.onnx")
    engine = aiotrt.build(path, tmp_path / "reshape.engine", profiles={"size": ((1, 1), (4, 6), (24, 24))})
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    async with aiotrt.load(engine, device="cuda", slots=2) as model:
        for shape in ((4, 6), (6, 4), (2, 12), (24, 1), (4, 6)):
            np.testing.assert_array_equal(await model(x=x, size=np.array(shape)), x.reshape(shape))
        with pytest.raises(aiotrt.EngineError, match=r"'size' holds \[48, 1\].*\[1, 1\] to \[24, 24\]"):
            await model(x=x, size=np.array((48, 1)))
        np.testing.assert_array_equal(await model(x=x, size=np.array((3, 8))), x.reshape(3, 8))
        statistics = model.statistics()
        assert statistics.replays == 0
        assert "'size'" in statistics.fallbacks[0]


@pytest.mark.asyncio
async def test_a_loop_is_right_with_a_graph_or_without(trt: Any, tmp_path: Path) -> None:
    """Whether it can be captured is TensorRT's affair; which of both it was is told."""
    engine = aiotrt.build(models.loop(tmp_path / "loop.onnx", 5), tmp_path / "loop.engine")
    async with aiotrt.load(engine, device="cuda", slots=2) as model:
        for i in range(6):
            x = np.arange(i, i + 4, dtype=np.float32)
            np.testing.assert_array_equal(await model(x), 32 * x)
        statistics = model.statistics()
        assert (statistics.replays == 6) == (statistics.fallbacks == ())
        assert statistics.completed == 6


def test_damaged_files_are_refused_and_the_process_lives(trt: Any, tmp_path: Path) -> None:
    """Past the header as well: what TensorRT makes of a flipped bit there is seen here only."""
    data = built(trt, tmp_path / "dense.engine").read_bytes()
    path = tmp_path / "damaged.engine"
    device = open_device("cuda")
    path.write_bytes(data[:-100])
    with pytest.raises(aiotrt.EngineError, match="truncated"):
        TensorRTEngine(path, device)
    for position in (4, 24, 40, 70, 120):
        flipped = bytearray(data)
        flipped[position] ^= 0x40
        path.write_bytes(bytes(flipped))
        try:
            TensorRTEngine(path, device).close()
        except aiotrt.EngineError as error:
            assert str(path) in str(error)  # noqa: PT017  # some bits are of no consequence


def test_the_log_of_the_real_runtime_is_taken(trt: Any, tmp_path: Path) -> None:
    path = built(trt, tmp_path / "dense.engine")
    engine = TensorRTEngine(path, open_device("cuda"))
    log = open_product(path, engine.plan, None).log
    stream = open_device("cuda").stream()
    context = engine.execution(open_device("cuda"), stream, ["x"], ((1, 64),))._context
    assert context is not None
    mark = log.mark()
    assert context.set_input_shape("x", (99, 64)) is False
    assert log.since(mark), "TensorRT said nothing, or said it to another logger"
    engine.close()
    stream.close()


LOAD = """
import asyncio, logging, sys, time
import numpy as np, torch, aiotrt

logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)
logging.getLogger("asyncio").setLevel(logging.WARNING)

async def main():
    torch.zeros(1, device="cuda")  # so that making the context of CUDA is not part of it
    started = time.perf_counter()
    example = np.zeros(tuple(map(int, sys.argv[2].split("x"))), np.float32)
    async with aiotrt.load(sys.argv[1], device="cuda", runtime="tensorrt_rtx", slots=2, warmup=[example]):
        print(f"loaded in {time.perf_counter() - started:.3f} s")

asyncio.run(main())
"""


@pytest.mark.parametrize(("name", "shape"), [("detector", "1x3x320x320"), ("recogniser", "1x3x48x320")])
def test_a_cached_load_compiles_no_kernel_again(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, shape: str
) -> None:
    """In a process of its own each; what takes how long stands in the report of a failure, and with -s."""
    monkeypatch.setenv("AIOTRT_CACHE_DIR", str(tmp_path / "cache"))
    said = []
    for _ in range(3):
        command = [sys.executable, "-c", LOAD, str(models.ocr(name)), shape]
        said.append(subprocess.run(command, check=True, capture_output=True, text=True, timeout=250).stdout)
        print(said[-1])
    first, *others = said
    assert re.search(r"wrote \d+ bytes of compiled kernels", first)
    for again in others:
        assert re.search(r"read \d+ bytes of compiled kernels", again)
        assert "building" not in again
        assert not re.search(r"wrote \d+ bytes", again), "something was compiled that was not kept before"
