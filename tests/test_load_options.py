"""Options that `load` must refuse, at once where it can; and what the queue's bound means."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from tests.test_engines import cannot_load, nothing_left
from tests.tools import Affine, count, frame, held, until

REFUSED: list[tuple[str, object, str]] = [
    ("slots", 0, "slots must be an integer of at least 1, got 0"),
    ("slots", -1, "slots must be an integer of at least 1, got -1"),
    ("slots", True, "slots must be an integer of at least 1, got True"),
    ("slots", "2", "slots must be an integer of at least 1, got '2'"),
    ("slots", 2.0, "slots must be an integer of at least 1, got 2.0"),
    ("slots", None, "slots must be an integer of at least 1, got None"),
    ("threads", 0, "threads must be an integer of at least 1, got 0"),
    ("threads", None, "threads must be an integer of at least 1, got None"),
    ("max_queue", -1, "max_queue must be an integer of at least 0"),
    ("max_queue", 1.5, "max_queue must be an integer of at least 0"),
    ("max_queue", False, "max_queue must be an integer of at least 0"),
    ("graph_cache_entries", 0, "graph_cache_entries must be an integer of at least 1, got 0"),
    ("graph_cache_entries", None, "graph_cache_entries must be an integer of at least 1, got None"),
    ("graph_cache_bytes", -1, "graph_cache_bytes must be an integer of at least 0, got -1"),
    ("graph_cache_bytes", None, "graph_cache_bytes must be an integer of at least 0, got None"),
    ("hang_timeout", 0, "hang_timeout must be a positive number of seconds or None, got 0"),
    ("hang_timeout", -1.0, "hang_timeout must be a positive number of seconds or None, got -1.0"),
    ("hang_timeout", float("nan"), "hang_timeout must be a positive number of seconds or None, got nan"),
    ("hang_timeout", "60", "hang_timeout must be a positive number of seconds or None, got '60'"),
    ("outputs", "nump", "outputs must be 'numpy', 'torch', 'device' or None, got 'nump'"),
    ("outputs", ["numpy"], "outputs must be 'numpy', 'torch', 'device' or None, got ['numpy']"),
    ("progress", "sleep", "progress must be 'predict', 'spin' or 'interval', got 'sleep'"),
    ("preprocess", 3, "preprocess must be a function over tensors, got int"),
    ("postprocess", "numpy", "postprocess must be a function over tensors, got str"),
    ("overlap", 1, "overlap must be True or False, got 1"),
    ("graphs", "no", "graphs must be True or False, got 'no'"),
    ("allow_host_code", "no", "allow_host_code must be True or False, got 'no'"),
    ("runtime", "trt", "runtime must be 'tensorrt', 'tensorrt_rtx', 'tensorrt_lean' or None, got 'trt'"),
    ("runtime", "tensorrt", "runtime is for files, and the engine is of type Affine: leave it out"),
    ("precision", "int8", "precision must be 'fp32', 'fp16', 'bf16' or None, got 'int8'"),
    ("precision", "fp16", "precision is for files"),
    ("profiles", 3, "profiles must be dicts of input names to shapes, or None, got 3"),
    ("profiles", "x", "profiles must be dicts of input names to shapes, or None, got 'x'"),
    ("profiles", {"x": (1, 3)}, "profiles is for files"),
    ("sha256", "abc", "sha256 must be 64 hexadecimal digits or None, got 'abc'"),
    ("sha256", b"0" * 64, "sha256 must be 64 hexadecimal digits or None, got b'0"),
    ("sha256", "0" * 64, "sha256 is for files"),
]


@pytest.mark.parametrize(("option", "value", "message"), REFUSED, ids=[f"{name}={value!r}" for name, value, _ in REFUSED])
def test_options_out_of_range_are_refused_at_once(option: str, value: object, message: str) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(aiotrt.InputError) as caught:
        _ = aiotrt.load(Affine(), device="host", **options)
    assert message in str(caught.value)


def test_an_unknown_option_is_a_type_error() -> None:
    options: dict[str, Any] = {"slot": 2}
    with pytest.raises(TypeError, match="slot"):
        _ = aiotrt.load(Affine(), **options)


@pytest.mark.asyncio
@pytest.mark.parametrize("device", ["gpu", "cpu:1", "cuda1", "", "meta", "cuda:one", "cuda:-1", "cuda:99"])
async def test_unknown_devices(device: str) -> None:
    await cannot_load(Affine(), aiotrt.UsageError, repr(device), device=device)


@pytest.mark.asyncio
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")], ids=str)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
async def test_cuda_where_there_is_none(device: str) -> None:
    await cannot_load(Affine(), aiotrt.UsageError, repr(str(device)), "sees no CUDA device", "device='host'", device=device)


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["host", "cpu", torch.device("cpu"), "auto"], ids=str)
async def test_names_of_the_host(name: str | torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    async with aiotrt.load(Affine(), device=name) as model:
        assert model.statistics().device == "host"
        np.testing.assert_array_equal(await model(frame(1)), frame(4))


@pytest.mark.asyncio
@pytest.mark.parametrize("outputs", ["nump", "gpu", ["numpy"]], ids=str)
async def test_a_lease_with_unknown_outputs(device: str, outputs: Any) -> None:
    async with aiotrt.load(Affine(), device=device, warmup=[frame(1)]) as model:
        with pytest.raises(aiotrt.InputError, match="outputs must be 'numpy', 'torch', 'device' or None"):
            model.lease(outputs=outputs)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "shapes",
    [5, "2x3", [(2, "3")], [(2, 3), (2, 3)], (2, 3, 4), {"z": (2, 3)}, (-1, 3), (2, -3)],
    ids=str,
)
async def test_a_lease_with_wrong_shapes(device: str, shapes: object) -> None:
    async with aiotrt.load(Affine(), device=device, warmup=[frame(1)]) as model:
        with pytest.raises(aiotrt.InputError):
            model.lease(shapes)
        assert count(model, State.FREE) == 2


# The line...


@pytest.mark.asyncio
async def test_max_queue_0_means_no_waiting(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=2, max_queue=0, warmup=[frame(0)]) as model:
        with held(model) as latch:
            calls = [asyncio.ensure_future(model(frame(i))) for i in range(2)]
            await until(lambda: count(model, State.IN_FLIGHT) == 2)
            for _ in range(3):
                with pytest.raises(aiotrt.QueueFullError, match=r"2 of 2 slots are busy and 0 of max_queue=0 places"):
                    await model(frame(9))
            assert model.statistics().rejected == 3
            with pytest.raises(aiotrt.QueueFullError):
                async with model.lease():
                    raise AssertionError("there is no slot")
            latch.open()
            for i, result in enumerate(await asyncio.gather(*calls)):
                np.testing.assert_array_equal(result, frame(i) * 3 + 1)
        np.testing.assert_array_equal(await model(frame(9)), frame(28))
        assert model.statistics().free == 2


@pytest.mark.asyncio
async def test_max_queue_bounds_the_line(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, max_queue=2, warmup=[frame(0)]) as model:
        with held(model) as latch:
            calls = [asyncio.ensure_future(model(frame(i))) for i in range(3)]
            await until(lambda: model.statistics().waiting == 2)
            with pytest.raises(aiotrt.QueueFullError, match=r"1 of 1 slots are busy and 2 of max_queue=2 places"):
                await model(frame(9))
            latch.open()
            for i, result in enumerate(await asyncio.gather(*calls)):
                np.testing.assert_array_equal(result, frame(i) * 3 + 1)


@pytest.mark.asyncio
async def test_max_queue_none_has_no_bound(device: str) -> None:
    async with aiotrt.load(Affine(), device=device, slots=1, max_queue=None, warmup=[frame(0)]) as model:
        with held(model) as latch:
            calls = [asyncio.ensure_future(model(frame(i))) for i in range(2000)]
            await until(lambda: model.statistics().waiting == 1999)
            latch.open()
            results = await asyncio.gather(*calls)
        assert all((result == 3 * i + 1).all() for i, result in enumerate(results))


@pytest.mark.asyncio
async def test_warming_up_needs_no_queue(device: str) -> None:
    """Every slot is captured for, whatever `max_queue` says, and the counts are those of calls alone."""
    warmup = [frame(0), frame(0, (4, 3))]
    async with aiotrt.load(Affine(), device=device, slots=3, max_queue=0, warmup=warmup) as model:
        statistics = model.statistics()
        assert (statistics.captures, statistics.free, statistics.rejected) == (6, 3, 0)
        assert (statistics.submitted, statistics.completed, statistics.cancelled) == (0, 0, 0)


@pytest.mark.asyncio
async def test_nothing_happens_before_a_model_is_opened(tmp_path: Path) -> None:
    async with nothing_left():
        model = aiotrt.load(tmp_path / "gone.onnx", warmup=["nonsense"])
        assert "not open" in repr(model)
        with pytest.raises(aiotrt.ModelClosedError, match="not open: use 'async with"):
            await model(frame(1))
        del model
