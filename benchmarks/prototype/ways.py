"""The prototype as a way to wait: slots on a device, and a request."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.prototype.build import COMPILED, Build, build, fill

if TYPE_CHECKING:
    from benchmarks.waits import Work

__all__ = ["opened_prototype"]


@asynccontextmanager
async def opened_prototype(
    name: str, work: Work, slots: int, *, copies: bool
) -> AsyncIterator[Callable[[], Awaitable[object]]]:
    """A function that launches the work once and waits for it, by this build of the prototype.

    Args:
        name: the build.
        work: what to launch.
        slots: how many streams.
        copies: whether each request copies its input in and its result out, as a call does and a lease does not.
    """
    made = build(name)
    if isinstance(made, str):
        raise RuntimeError(f"there is no {name} prototype: {made}")
    system = made.calls.LinuxSystem()
    opened: list[Any] = []
    poller = None
    try:
        make = _HostSlot if work.device.unified else _CudaSlot
        while len(opened) < slots:
            opened.append(make(made, work, copies))
        loop = asyncio.get_running_loop()
        poller = made.core.Poller(loop, system, system.descriptor)
        allocate = _allocate_on(work.device.torch_device, work.example)
        is_ordered = _always if work.device.unified else _current_stream_is_idle()
        model = made.core.Model(loop, poller, [entry.slot for entry in opened], work.example, allocate, is_ordered)
        yield _call(model, work.example) if copies else _lease(model)
    finally:
        if poller is not None:
            poller.close()
        for entry in opened:
            entry.close()
        system.close()


def _call(model: Any, x: torch.Tensor) -> Callable[[], Awaitable[object]]:
    async def request() -> object:
        result: object = await model.call(x)
        return result

    return request


def _lease(model: Any) -> Callable[[], Awaitable[object]]:
    async def request() -> object:
        result: object = await model.lease()
        return result

    return request


def _allocate_on(device: torch.device | str, example: torch.Tensor) -> Callable[[], torch.Tensor]:
    shape, dtype, empty = example.shape, example.dtype, torch.empty
    return lambda: empty(shape, dtype=dtype, device=device)


def _current_stream_is_idle() -> Callable[[], bool]:
    driver = importlib.import_module("cuda.bindings.driver")
    query, stream = driver.cuStreamQuery, driver.CUstream(torch.cuda.current_stream().cuda_stream)
    return lambda: not query(stream)[0]


def _always() -> bool:
    return True


class _CudaSlot:
    """A slot on CUDA, and what it is made of."""

    def __init__(self, made: Build, work: Work, copies: bool) -> None:
        if made.name == COMPILED:
            fill(made.calls)
        self._driver = importlib.import_module("cuda.bindings.driver")
        work.device.prepare_thread()
        stream: Any = work.device.stream()
        self._stream = stream
        example = work.example
        given, taken, inside = (torch.zeros_like(example) for _ in range(3))
        with torch.no_grad():
            with torch.cuda.stream(stream.torch):
                for _ in range(3):
                    work.function(inside)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            with torch.cuda.graph(graph, stream=stream.torch, capture_error_mode="thread_local"):
                if copies:
                    inside.copy_(given)
                out = work.function(inside)
                if copies:
                    taken.copy_(out)
        raw = self._driver.CUgraph(int(graph.raw_cuda_graph()))
        self._executable = self._answer("cuGraphInstantiate", self._driver.cuGraphInstantiate(raw, 0))
        self._kept = (graph, given, taken, inside, out)
        # Uploads the graph, before it is measured.
        self._answer("cuGraphLaunch", self._driver.cuGraphLaunch(self._executable, stream.driver))
        torch.cuda.synchronize()
        self.slot = made.calls.CudaSlot(work.seconds, int(self._executable), stream.handle)
        if copies:
            node_in = self._copy(raw, "srcDevice", given.data_ptr())
            node_out = self._copy(raw, "dstDevice", taken.data_ptr())
            self.slot.set_copies(node_in, node_out, inside.data_ptr(), out.data_ptr(), inside.nbytes, out.nbytes)

    def close(self) -> None:
        self._answer("cuStreamSynchronize", self._driver.cuStreamSynchronize(self._stream.driver))
        self.slot.close()
        self._driver.cuGraphExecDestroy(self._executable)
        del self._kept
        self._stream.close()

    def _copy(self, graph: Any, end: str, address: int) -> int:
        """The graph's only copy from or to this address."""
        driver = self._driver
        nodes = self._answer("cuGraphGetNodes", driver.cuGraphGetNodes(graph, 64))
        found = []
        for node in nodes:
            if not int(node):
                continue
            kind = self._answer("cuGraphNodeGetType", driver.cuGraphNodeGetType(node))
            if kind == driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_MEMCPY:
                copy = self._answer("cuGraphMemcpyNodeGetParams", driver.cuGraphMemcpyNodeGetParams(node))
                if int(getattr(copy, end)) == address:
                    found.append(int(node))
        (node,) = found
        return node

    @staticmethod
    def _answer(doing: str, answer: tuple[Any, ...]) -> Any:
        if int(answer[0]):
            raise RuntimeError(f"{doing}: the driver answered {answer[0]}")
        return answer[1] if len(answer) > 1 else None


class _HostSlot:
    """A slot on the host device, for tests without a GPU: the copies are part of the work."""

    def __init__(self, made: Build, work: Work, copies: bool) -> None:
        device = work.device
        stream, event = device.stream(), device.event()
        self._stream = stream
        inside = torch.zeros_like(work.example)

        class Slot(made.core.Slot):  # type: ignore[misc, name-defined]  # of either build
            source = destination = 0

            def launch(self) -> int:
                graph.launch(stream)
                stream.record(event)
                return 0

            def copy_and_launch(self, source: int, destination: int) -> int:
                self.source, self.destination = source, destination
                return self.launch()

            def query(self) -> bool:
                return event.query()

        slot = self.slot = Slot(work.seconds)

        def body() -> list[torch.Tensor]:
            if copies and slot.source:
                ctypes.memmove(inside.data_ptr(), slot.source, inside.nbytes)
            out = work.function(inside)
            if copies and slot.destination:
                ctypes.memmove(slot.destination, out.data_ptr(), out.nbytes)
            return [out]

        graph, _ = device.capture(stream, body)
        self._graph = graph

    def close(self) -> None:
        self._stream.synchronize()
        self._graph.close()
        self._stream.close()
