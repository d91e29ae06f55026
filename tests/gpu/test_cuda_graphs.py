"""Copies as nodes of a captured graph: used where they can be, right where they cannot, never those of an earlier launch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import Device, Graph, open_device
from aiotrt.devices.base import Copies
from aiotrt.devices.cuda import CudaGraph, CudaStream
from tests.tools import executor_of

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
