"""Models of those defects of the original that are no race: the same calls in another order would be as wrong.

The detector has nothing to say of them, and something else finds each: the device refuses, a result is wrong, memory is not
given back, or the loop is blocked. The races are in `test_origin_defects`.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from aiotrt.devices import CaptureError
from aiotrt.errors import DeviceError
from aiotrt.testing import LoopBlockedError, SimulatedDevice, run
from tests.simulated import in_use
from tests.testing.test_origin_defects import SEEDS, F, Original


def in_a_thread(function: Callable[[], object]) -> list[DeviceError]:
    """Call it in a thread of somebody who knows nothing of captures; returns what the driver refuses."""
    refused: list[DeviceError] = []

    def call() -> None:
        try:
            function()
        except DeviceError as error:
            refused.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return refused


@pytest.mark.parametrize("what", ["query", "synchronise", "pin"])
def test_b3_a_capture_in_global_mode_and_its_bystanders_break_each_other(what: str) -> None:
    m = Original(0)
    event = m.record("outer")
    bystander: dict[str, Callable[[], object]] = {
        "query": event.query,
        "synchronise": event.synchronize,
        "pin": lambda: m.device.pinned((4,), F),
    }
    with pytest.raises(CaptureError, match="was broken by"), m.device.captured_elsewhere():
        (refused,) = in_a_thread(bystander[what])
    assert refused.code == 900
    assert in_a_thread(bystander[what]) == []  # it was the capture that stood in the way, and nothing is broken


def test_b3_a_thread_that_was_prepared_breaks_nothing() -> None:
    m = Original(0)
    event = m.record("outer")

    def ask() -> None:
        m.device.prepare_thread()
        event.query()

    with m.device.captured_elsewhere():
        assert in_a_thread(ask) == []


def test_b9_results_are_copied_after_the_lock_is_let_go() -> None:
    outcomes = set()
    for seed in range(SEEDS):
        m = Original(seed)
        results: list[torch.Tensor] = []

        def caller(value: float, m: Original = m, results: list[torch.Tensor] = results) -> Iterator[None]:
            m.fill_input(value)  # the lock is held
            m.graph.launch(m.graph_stream)
            yield  # and is not any more: the other thread may go first
            m.graph_stream.run(lambda: results.append(m.y.clone()))
            m.expected.append(2 * value)

        callers = [caller(1.0), caller(5.0)]
        while callers:
            turn = callers[m.device.time.schedule.choose(["the first", "the second"][: len(callers)])]
            if next(turn, "over") == "over":
                callers.remove(turn)
        m.finish(*results)
        m.device.check()  # all of it is on one stream, in order
        outcomes.add(m.seen == m.expected)
    assert outcomes == {True, False}


def test_b13_a_cache_that_two_models_share_answers_with_the_others_graph() -> None:
    m = Original(0)
    cache: dict[object, torch.Tensor] = {}

    def infer(body: Callable[[torch.Tensor], torch.Tensor]) -> float:
        key = m.x.shape, m.x.dtype, m.x.device
        if key not in cache:
            m.graph, (cache[key],) = m.device.capture(m.graph_stream, lambda: [body(m.x)])
        m.graph.launch(m.graph_stream)
        m.wait(m.record("graph"))
        value: float = m.device.read(cache[key])[0].item()
        return value

    m.fill_input(3.0)
    answers = [infer(lambda x: x * 2), infer(lambda x: x + 1)]
    m.device.check()
    assert answers == [6.0, 6.0], "the second one is the first model's"


def test_b15_memory_is_read_as_if_it_were_in_plain_order() -> None:
    m = Original(0)
    image = m.device.tensor([[1.0, 2.0], [3.0, 4.0]]).T
    m.graph_stream.wait(m.record("outer"))
    m.graph_stream.copy(m.x, image.as_strided((4,), (1,)))  # by its address, whatever its strides
    m.graph.launch(m.graph_stream)
    m.wait(m.record("graph"))
    found = m.device.read(m.y).reshape(2, 2)
    m.device.check()
    assert found.tolist() == [[2.0, 4.0], [6.0, 8.0]], "of the image that it was before it was turned"


@pytest.mark.parametrize("points_back", [True, False])
def test_b16_results_that_point_to_their_graph_keep_what_was_evicted(points_back: bool) -> None:
    m = Original(0)
    cache: OrderedDict[int, SimpleNamespace] = OrderedDict()

    def infer(size: int) -> None:
        x = m.device.call(m.graph_stream, lambda: m.device.empty((size,), F).zero_())
        graph, (y,) = m.device.capture(m.graph_stream, lambda: [x * 2])
        state = cache[size] = SimpleNamespace(graph=graph, x=x, y=y)
        if points_back:
            y._trt_graph_state = state  # type: ignore[attr-defined]
        if len(cache) > 2:  # entries are counted, and bytes are not
            cache.popitem(last=False)

    gc.collect()
    gc.disable()
    try:
        used = []
        for size in range(1000, 10_000, 1000):
            infer(size)
            used.append(in_use(m.device))
    finally:
        gc.enable()
    cached = sum(4 * 2 * size for size in cache)
    assert (used[-1] > 2 * cached) is points_back, f"{cached} bytes are in the cache, and {used} were in use"


@pytest.mark.parametrize("how", ["waits for an event", "captures", "pins memory"])
def test_b17_the_loop_is_blocked(how: str) -> None:
    device = SimulatedDevice(0)

    async def handler() -> None:
        stream = device.stream()
        x = device.tensor([1.0] * 4)
        stream.wait(device.current_stream().record())
        if how == "captures":
            device.capture(stream, lambda: [x * 2])
        elif how == "pins memory":
            device.pinned((4,), F)
        else:
            with device.use(stream):
                _ = x * 2
            event = device.event()
            stream.record(event)
            event.synchronize()
        await asyncio.sleep(0)

    with pytest.raises(LoopBlockedError):
        run(handler(), device)
