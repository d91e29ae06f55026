"""Copies as nodes of a captured graph: used where they can be, right where they cannot, never those of an earlier launch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import Device, Event, Graph, open_device
from aiotrt.devices.base import Copies
from aiotrt.devices.cuda import CudaGraph, CudaStream
from aiotrt.tensors import Argument
from tests.tools import Latch, executor_of, held, turns

pytestmark = pytest.mark.gpu


@dataclass
class Bench:
    """A captured ``y = 2 * a + b`` on a stream."""

    device: Device
    stream: CudaStream
    graph: CudaGraph
    a: torch.Tensor
    b: torch.Tensor
    y: torch.Tensor

    def launch(self, before: Copies = (), after: Copies = ()) -> None:
        self.graph.launch(self.stream, before, after)
        self.stream.synchronize()


@pytest.fixture
def bench() -> Iterator[Bench]:
    device = open_device("cuda")
    device.prepare_thread()
    stream = device.stream()
    assert isinstance(stream, CudaStream)
    a, b = torch.zeros(1024, device="cuda"), torch.zeros(1024, device="cuda")
    torch.cuda.synchronize()
    graph, (y,) = device.capture(stream, lambda: [2 * a + b], [a, b])
    assert isinstance(graph, CudaGraph)
    yield Bench(device, stream, graph, a, b, y)
    graph.close()
    stream.close()


def on_device(value: float, size: int = 1024) -> torch.Tensor:
    tensor = torch.full((size,), float(value), device="cuda")
    torch.cuda.synchronize()
    return tensor


def pinned(value: float) -> torch.Tensor:
    return torch.full((1024,), float(value)).pin_memory()


def watch_copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The copies that are submitted by themselves, from now on."""
    seen: list[int] = []
    copy = CudaStream.copy

    def counted(self: CudaStream, destination: torch.Tensor, source: torch.Tensor) -> None:
        seen.append(destination.nbytes)
        copy(self, destination, source)

    monkeypatch.setattr(CudaStream, "copy", counted)
    return seen


def test_copies_are_part_of_the_graph(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = watch_copies(monkeypatch)
    results = [on_device(-1), pinned(-1)]
    for i in range(8):
        source, result = (on_device(i), pinned(i))[i % 2], results[i // 2 % 2]
        bench.launch([(bench.a, source), (bench.b, on_device(10 * i))], [(result, bench.y)])
        assert result.unique().tolist() == [12 * i]
    assert alone == []


def test_a_launch_makes_its_own_copies_and_no_others(bench: Bench) -> None:
    result, source = on_device(-1), on_device(1)
    bench.launch([(bench.a, source)], [(result, bench.y)])
    source.fill_(100)
    torch.cuda.synchronize()
    bench.a.fill_(3)
    torch.cuda.synchronize()
    bench.launch()
    assert bench.y.unique().tolist() == [6]
    assert result.unique().tolist() == [2]
    bench.launch([(bench.b, source)], [(result, bench.y)])
    assert result.unique().tolist() == [106]
    bench.launch([(bench.a, source)])
    assert bench.y.unique().tolist() == [300]
    assert result.unique().tolist() == [106]


def test_the_same_address_after_another(bench: Bench) -> None:
    one, two, host = on_device(1), on_device(2), pinned(3)
    for source in (one, two, one, host, one, host, two):
        bench.launch([(bench.a, source)])
        assert bench.y.unique().tolist() == [2 * source[0].item()]


def test_what_cannot_be_a_node_is_copied_by_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = watch_copies(monkeypatch)
    wide = torch.arange(2048, device="cuda", dtype=torch.float32)
    torch.cuda.synchronize()
    halves = torch.full((512,), -1.0, device="cuda")
    bench.launch([(bench.a, wide[::2]), (bench.b[:512], on_device(1, 512))], [(halves, bench.y[512:])])
    expected = 2 * torch.arange(0, 2048, 2) + torch.cat([torch.ones(512), torch.zeros(512)])
    assert torch.equal(bench.y.cpu(), expected)
    assert torch.equal(halves.cpu(), expected[512:])
    assert alone == [4096, 2048, 2048]


def test_launches_in_flight_keep_their_addresses(bench: Bench) -> None:
    sources = [on_device(i) for i in range(100)]
    results = [on_device(-1) for _ in sources]
    for source, result in zip(sources, results, strict=True):
        bench.graph.launch(bench.stream, [(bench.a, source)], [(result, bench.y)])
    bench.stream.synchronize()
    assert [result[-1].item() for result in results] == [2.0 * i for i in range(100)]


@pytest.mark.asyncio
async def test_the_next_results_are_prepared_while_a_launch_is_in_flight() -> None:
    """A launch writes the results that it was submitted with, whatever its graph was pointed at since."""
    async with aiotrt.load(lambda x: 3 * x + 1, device="cuda", slots=1, warmup=on_device(0)) as model:
        x = on_device(0)
        await model(x)
        await model(x)  # from here on by the short path
        one = on_device(1)
        with held(model) as latch:
            call = asyncio.ensure_future(model(one))
            await turns()
            program = executor_of(model).slots[0].program
            assert program is not None
            assert program.spare is not None, "no results for the next call"
            (spare,) = program.spare[1]
            spare.fill_(-1.0)
            latch.open()
            assert (await call)[0].item() == 4.0
        torch.cuda.synchronize()
        assert spare[0].item() == -1.0, "the launch wrote what was meant for the next one"
        following = await model(on_device(2))
        assert following.data_ptr() == spare.data_ptr()
        assert following[0].item() == 7.0


def test_a_graph_that_draws_is_replayed_by_torch(bench: Bench) -> None:
    graph: Graph
    graph, (y,) = bench.device.capture(bench.stream, lambda: [bench.a + torch.rand_like(bench.a)], [bench.a])
    result = on_device(-1)
    graph.launch(bench.stream, [(bench.a, on_device(5))], [(result, y)])
    bench.stream.synchronize()
    assert 5 <= result.min().item() < result.max().item() < 6
    graph.close()


def test_an_output_that_is_returned_twice_goes_to_two_places() -> None:
    async def main() -> None:
        def twice(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = 3 * x
            return y, y

        async with aiotrt.load(twice, device="cuda", slots=1, warmup=np.zeros(8, np.float32)) as model:
            for i in range(3):
                for value in (np.full(8, i, np.float32), on_device(i, 8)):
                    assert [result.tolist() for result in await model(value)] == [[3.0 * i] * 8] * 2

    asyncio.run(main())


def test_calls_of_every_kind_use_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with aiotrt.load(lambda x: 3 * x + 1, device="cuda", slots=1, warmup=np.zeros(8, np.float32)) as model:
            await model(on_device(0, 8))
            alone = watch_copies(monkeypatch)
            for i in range(6):
                host = np.full(8, i, np.float32)
                assert (await model(host)).tolist() == [3 * i + 1] * 8
                assert (await model(on_device(i, 8))).tolist() == [3 * i + 1] * 8
                async with model.lease(outputs="numpy") as slot:
                    slot.inputs[0][...] = host
                    assert (await slot.replay()).tolist() == [3 * i + 1] * 8
            assert alone == []
            assert model.statistics().captures == 1
            assert len(executor_of(model).cache) == 1

    asyncio.run(main())


def watch_waits(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The events that streams are made to wait for, from now on."""
    seen: list[object] = []
    wait = CudaStream.wait

    def counted(self: CudaStream, event: Event) -> None:
        seen.append(event)
        wait(self, event)

    monkeypatch.setattr(CudaStream, "wait", counted)
    return seen


@pytest.mark.asyncio
async def test_the_order_of_slots_is_part_of_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (64, 64)
    async with aiotrt.load(lambda x: 2 * x, device="cuda", slots=3, overlap=False, warmup=torch.zeros(shape)) as model:
        waits = watch_waits(monkeypatch)
        alone = watch_copies(monkeypatch)
        for i in range(20):
            results = await asyncio.gather(*[model(np.full(shape, 10 * i + j, np.float32)) for j in range(7)])
            assert [set(result.ravel()) for result in results] == [{2 * (10 * i + j)} for j in range(7)]
        assert (waits, alone) == ([], [])
        assert model.statistics().captures == 3


LARGE = (512, 1024)  # 2 MiB, which would be copied by a worker


@pytest.mark.asyncio
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("graphs", [True, False])
async def test_page_locked_inputs_are_read_where_they_are(
    overlap: bool, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []
    write = Argument.write

    def counted(self: Argument, view: np.ndarray[Any, Any]) -> None:
        copied.append(self)
        write(self, view)

    monkeypatch.setattr(Argument, "write", counted)
    async with aiotrt.load(
        lambda x: x[::64, ::64] * 2, device="cuda", slots=2, overlap=overlap, graphs=graphs, warmup=torch.zeros(LARGE)
    ) as model:
        copied.clear()
        buffers = [torch.empty(LARGE).pin_memory() for _ in range(4)]

        async def call(buffer: torch.Tensor, value: float, kind: str) -> None:
            for again in range(10):
                buffer.fill_(value + again)  # the call before has returned
                result = await model(buffer if kind == "torch" else buffer.numpy())
                assert isinstance(result, torch.Tensor if kind == "torch" else np.ndarray)
                assert set(np.asarray(result).ravel()) == {2 * (value + again)}

        await asyncio.gather(*[call(buffer, 100 * i, ("torch", "numpy")[i % 2]) for i, buffer in enumerate(buffers)])
        assert not copied
        pageable = np.full(LARGE, 3, np.float32)
        assert set((await model(pageable)).ravel()) == {6}
        assert len(copied) == 1


@pytest.mark.asyncio
async def test_a_page_locked_input_may_be_overwritten_once_its_call_is_over() -> None:
    """Also by cancellation: what its work reads then, nobody gets to see."""
    async with aiotrt.load(lambda x: x.double().sum(), device="cuda", slots=2, warmup=torch.zeros(LARGE)) as model:
        x = torch.empty(LARGE).pin_memory()
        for value in range(50):
            x.fill_(-1)
            call = asyncio.ensure_future(model(x))
            await asyncio.sleep(0)
            if call.cancel():  # else it was complete within this iteration
                with pytest.raises(asyncio.CancelledError):
                    await call
            x.fill_(value)
            assert (await model(x)).item() == value * x.numel()


@pytest.mark.asyncio
async def test_a_page_locked_input_outlives_the_callers_interest() -> None:
    async with aiotrt.load(lambda x: 2 * x, device="cuda", slots=1, warmup=torch.zeros(LARGE)) as model:
        latch = Latch("cuda")
        latch.hold(executor_of(model).slots[0].stream)
        try:
            call = asyncio.ensure_future(model(torch.full(LARGE, 5.0).pin_memory()))
            await turns(10)
            scribbles = [torch.full(LARGE, -1.0).pin_memory() for _ in range(4)]  # would get that memory, were it free
        finally:
            latch.open()
        assert (await call).unique().tolist() == [10]
        del scribbles


def test_what_others_have_registered_is_copied() -> None:
    """They may unregister it while the device reads it, after a cancellation."""
    device = open_device("cuda")
    array = np.zeros(4 << 20, np.uint8)
    whole = torch.from_numpy(array)
    page = -(-whole.data_ptr() // 4096) * 4096
    begin = page - whole.data_ptr()
    runtime = torch.cuda.cudart()
    assert int(runtime.cudaHostRegister(page, 1 << 20, 0)) == 0
    try:
        assert not device.is_pinned(whole[begin : begin + (1 << 20)])
        assert not device.is_pinned(whole[begin : begin + (2 << 20)])
    finally:
        assert int(runtime.cudaHostUnregister(page)) == 0
