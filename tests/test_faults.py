"""When the device fails: everybody who waits is told, later calls fail at once, nothing hangs, and closing works.

On the host device, with faults put into it at the places where CUDA reports them; `tests/gpu` has a real one.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices.base import CaptureError, Event, Stream
from aiotrt.devices.host import HostDevice, HostStream
from aiotrt.errors import DeviceError
from aiotrt.runtime.slots import Event as Move
from aiotrt.runtime.slots import State
from aiotrt.tensors import Kind
from tests.tools import Affine, count, executor_of, frame, held, no_threads, turns, until

pytestmark = pytest.mark.asyncio


def fault() -> DeviceError:
    return DeviceError("the device failed", code=700, name="cudaErrorIllegalAddress")


class Faulty(HostDevice):
    """A host device of its own, so that its fault is nobody else's, that fails where a test says."""

    def __init__(self) -> None:
        super().__init__()
        self.fails: dict[str, Callable[[], BaseException]] = {}

    def _maybe(self, verb: str) -> None:
        if verb in self.fails:
            error = self.fails[verb]()
            raise error

    def query(self, event: Event) -> bool:
        self._maybe("query")
        return super().query(event)

    def capture(self, stream: Stream, body: Callable[[], Any], inputs: Any = (), **options: Any) -> Any:
        self._maybe("capture")
        return super().capture(stream, body, inputs, **options)

    def call(self, stream: Stream, function: Callable[[], Any]) -> Any:
        self._maybe("call")
        return super().call(stream, function)


async def test_a_fault_reaches_every_pending_await_and_later_calls_fail_at_once() -> None:
    device = Faulty()
    model = await aiotrt.load(Affine(), device=device, slots=2, warmup=frame(0))
    other = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
    async with other.lease() as slot:
        with held(model):
            calls = [asyncio.ensure_future(model(frame(i))) for i in range(5)]
            calls.append(asyncio.ensure_future(other(frame(1))))  # waits for the lease, and would for ever
            await turns()
            device.fails["query"] = fault
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, aiotrt.DeviceError)
                assert (outcome.code, outcome.name) == (700, "cudaErrorIllegalAddress")
        for broken in (model, other):
            with pytest.raises(aiotrt.ModelBrokenError, match="cudaErrorIllegalAddress") as caught:
                await broken(frame(1))
            assert isinstance(caught.value.__cause__, aiotrt.DeviceError)
            assert not broken.is_ready
        with pytest.raises(aiotrt.ModelBrokenError):
            slot.launch()
    assert count(model, State.BROKEN) == 2
    await model.aclose()
    await other.aclose()
    with pytest.raises(aiotrt.ModelBrokenError):
        _ = await aiotrt.load(Affine(), device=device)


async def test_a_fault_reaches_replays_and_leases_in_line() -> None:
    device = Faulty()
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model, model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        waiting = asyncio.ensure_future(model.lease().__aenter__())
        with held(model):
            replay = asyncio.ensure_future(slot.replay())
            await turns()
            device.fails["query"] = fault
            for future in (replay, waiting):
                with pytest.raises(aiotrt.DeviceError):
                    await future


async def test_a_fault_found_by_another_loop_or_thread_reaches_this_one() -> None:
    device = Faulty()
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        with held(model):
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            await asyncio.to_thread(device.fail, fault())
            with pytest.raises(aiotrt.DeviceError):
                await call


@pytest.mark.parametrize("verb", ["capture", "call"])
async def test_a_fault_while_preparing(verb: str) -> None:
    device = Faulty()
    async with aiotrt.load(Affine(), device=device, slots=1) as model:
        device.fails[verb] = fault
        with pytest.raises(aiotrt.DeviceError):
            await model(frame(1))
        with pytest.raises(aiotrt.ModelBrokenError):
            await model(frame(1))


async def test_a_fault_during_warmup_fails_the_load_and_leaves_nothing() -> None:
    device = Faulty()
    device.fails["capture"] = fault
    with pytest.raises(aiotrt.DeviceError):
        _ = await aiotrt.load(Affine(), device=device, warmup=frame(0))


async def test_overdue_work_is_a_hang_that_breaks_this_model_only() -> None:
    device = Faulty()
    async with (
        aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0), hang_timeout=0.02) as model,
        aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as other,
    ):
        with held(model):
            call, waiting = (asyncio.ensure_future(model(frame(i))) for i in range(2))
            for future in (call, waiting):
                with pytest.raises(aiotrt.DeviceHangError, match=r"hang_timeout=0.02 s"):
                    await future
            with pytest.raises(aiotrt.ModelBrokenError):
                await model(frame(1))
            assert not model.is_ready
            await model.aclose()
        assert (await other(frame(1)))[0, 0] == 4


async def test_a_consumer_that_never_ends_is_a_hang_when_the_model_closes() -> None:
    device = Faulty()
    model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0))
    side = model.stream()
    release = threading.Event()
    async with model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        await slot.replay()
        side.run(lambda: release.wait(30))
        slot.consumed(side)
    executor_of(model).hang_timeout = 0.02  # only now: on a busy machine the launch itself may take longer
    await model.aclose()
    release.set()
    side.close()


async def test_a_consumer_that_never_ends_is_a_hang_for_the_next_caller() -> None:
    device = Faulty()
    release = threading.Event()
    async with aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0)) as model:
        side = model.stream()
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            await slot.replay()
            side.run(lambda: release.wait(30))
            slot.consumed(side)
        executor_of(model).hang_timeout = 0.02  # only now, as above
        with pytest.raises(aiotrt.DeviceHangError):
            await model(frame(2))
        release.set()
        side.close()


async def test_what_cannot_be_captured_runs_without_a_graph_and_says_why() -> None:
    device = Faulty()
    device.fails["capture"] = lambda: CaptureError("operation not permitted when stream is capturing")
    async with aiotrt.load(Affine(), device=device, slots=2) as model:
        results = await asyncio.gather(*(model(frame(i)) for i in range(10)))
        assert [result[0, 0] for result in results] == [3 * i + 1 for i in range(10)]
        statistics = model.statistics()
        assert (statistics.replays, statistics.fallback_runs) == (0, 10)
        assert statistics.fallbacks == ("Affine could not be captured: operation not permitted when stream is capturing",)


async def test_if_the_whole_cannot_be_captured_its_pieces_are_tried() -> None:
    class Picky(Faulty):
        """Refuses to capture anything that calls `stubborn`."""

        def capture(self, stream: Stream, body: Callable[[], Any], inputs: Any = (), **options: Any) -> Any:
            called.clear()
            captured = super().capture(stream, body, inputs, **options)
            if called:
                raise CaptureError("stubborn")
            return captured

    called: list[int] = []

    def stubborn(y: torch.Tensor) -> torch.Tensor:
        called.append(1)
        return y + 100

    async with aiotrt.load(Affine(), device=Picky(), slots=1, postprocess=stubborn) as model:
        for i in range(4):
            assert (await model(frame(i)))[0, 0] == 3 * i + 101
        statistics = model.statistics()
        assert statistics.fallbacks == ("postprocess could not be captured: stubborn",)
        assert statistics.fallback_runs == 4


async def test_a_finalizer_may_stop_listening_in_the_middle_of_a_fault() -> None:
    """The garbage collector runs where it likes."""
    device = Faulty()
    told: list[str] = []

    class Collecting(dict[object, Callable[[DeviceError], None]]):
        def values(self) -> Any:
            stop()
            return super().values()

    device._callbacks = Collecting()
    stop = device.on_fault(lambda _: told.append("gone"))
    device.on_fault(lambda _: told.append("there"))
    device.fail(fault())
    assert told == ["there"]


async def test_while_a_thread_waits_for_all_streams_others_may_open_more() -> None:
    device = Faulty()

    class Guarded(weakref.WeakSet[HostStream]):
        def __iter__(self) -> Any:
            assert device._streams_lock.locked()
            return super().__iter__()

        def add(self, stream: HostStream) -> None:
            assert device._streams_lock.locked()
            super().add(stream)

    device._streams = Guarded()
    stream = device.stream()
    done: list[bool] = []
    stream.run(lambda: done.append(not device._streams_lock.locked()))
    device.synchronize()
    assert done == [True], "and not only when it is over"
    stream.close()


@pytest.mark.parametrize("spare", [True, False])
async def test_out_of_memory_evicts_what_nobody_uses_and_tries_again(spare: bool) -> None:
    device = Faulty()
    async with aiotrt.load(Affine(), device=device, slots=1) as model:
        if spare:
            await model(frame(1))
        fails = device.fails

        def once() -> BaseException:
            if spare:
                del fails["capture"]
            return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        fails["capture"] = once
        if spare:
            assert (await model(frame(2, (9, 9))))[0, 0] == 7
            assert model.statistics().evictions == 1
        else:
            with pytest.raises(aiotrt.EngineError, match="OutOfMemoryError while it was prepared; use fewer slots"):
                await model(frame(2, (9, 9)))
            fails.clear()
        assert (await model(frame(3)))[0, 0] == 10


async def test_running_out_of_host_memory_for_results_fails_that_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async with aiotrt.load(Affine(), device=Faulty(), slots=1, warmup=frame(0)) as model:

        def full(*_: object) -> object:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr("aiotrt.runtime.executor.own", full)
            with pytest.raises(aiotrt.EngineError, match="MemoryError while its results were copied"):
                await model(frame(1))
        assert (await model(frame(1)))[0, 0] == 4


async def test_a_call_for_which_no_thread_can_be_started_fails_alone() -> None:
    async with aiotrt.load(Affine(), device=Faulty(), slots=1) as model:
        with no_threads(), pytest.raises(aiotrt.ResourceError, match="no worker thread could be started: can't start new"):
            await model(frame(1))
        assert count(model, State.FREE) == 1
        assert (await model(frame(1)))[0, 0] == 4
        assert model.statistics().captures == 1


async def test_an_interrupt_of_the_next_request_is_not_that_of_the_one_before() -> None:
    async with aiotrt.load(Affine(), device=Faulty(), slots=1, warmup=frame(0)) as model:
        executor = executor_of(model)
        specs = executor.specs.specs
        assert specs is not None
        first, second = (executor.lease(specs, ((2, 3),), Kind.NUMPY) for _ in range(2))
        assert first.slot is not None
        told: list[bool] = []
        with mock.patch.object(executor, "begin", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
            executor.move(first.slot, Move.RELEASE, then=lambda: told.append(True))
        assert told == [True]
        executor.abandon(second)
        assert (await model(frame(1)))[0, 0] == 4


async def test_an_engine_that_raises_for_one_input_fails_that_call_only() -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] == 13:
            raise ValueError("thirteen")
        return x * 3 + 1

    async with aiotrt.load(picky, device=Faulty(), slots=2, warmup=frame(0)) as model:
        outcomes = await asyncio.gather(*(model(frame(i)) for i in range(20)), return_exceptions=True)
        for i, outcome in enumerate(outcomes):
            if i == 13:
                assert isinstance(outcome, aiotrt.EngineError)
                assert "picky raised ValueError while it ran: thirteen" in str(outcome)
            else:
                assert isinstance(outcome, np.ndarray)
                assert outcome[0, 0] == 3 * i + 1
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(13)
            with pytest.raises(aiotrt.EngineError, match="thirteen"):
                await slot.replay()
            slot.inputs[0][...] = frame(1)
            assert (await slot.replay())[0, 0] == 4
        await until(lambda: executor_of(model)._is_idle())
