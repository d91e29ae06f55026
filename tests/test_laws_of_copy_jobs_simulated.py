"""Host inputs that a thread copies, which then launches: such calls are as right as all others.

On a simulated device, and audited, as in `test_laws_simulated`. The compiled build's threads are tested in `test_submitter`,
and on a GPU in `tests/gpu`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest

import aiotrt
from aiotrt.completion.hub import Hub
from aiotrt.runtime.copy_job import CopyJob
from aiotrt.runtime.executor import COPY_ON_LOOP_BYTES
from aiotrt.runtime.slots import Slots, State
from aiotrt.testing import SimulatedDevice, SimulatedGraph
from aiotrt.testing.virtual import Workers
from tests.simulated import held_streams
from tests.test_laws_of_interrupts_simulated import interrupted
from tests.test_laws_of_owners_simulated import GROUPS, streams_of
from tests.test_laws_simulated import load, right, settle, under_schedules
from tests.tools import changed, executor_of, frame, turns


@contextlib.contextmanager
def counted() -> Iterator[list[CopyJob]]:
    """The jobs that are started meanwhile."""
    started: list[CopyJob] = []
    start = CopyJob.start

    def starting(self: CopyJob) -> None:
        started.append(self)
        start(self)

    with mock.patch.object(CopyJob, "start", starting):
        yield started


@contextlib.asynccontextmanager
async def loaded(device: SimulatedDevice, slots: int, **options: Any) -> AsyncIterator[aiotrt.Model]:
    """A model whose calls with host inputs are all given to threads."""
    with mock.patch("aiotrt.runtime.executor.COPY_ON_LOOP_BYTES", -1):
        async with load(device, slots=slots, overlap=True, warmup=frame(0), **options) as model:
            executor_of(model)._thread_bytes = 0
            for _ in range(3):
                assert right(await model(frame(1)), 1)
            yield model


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("group", GROUPS)
def test_every_caller_gets_its_own_result(group: int, slots: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, slots) as model:
            with counted() as started:
                results = await asyncio.gather(*[model(frame(i)) for i in range(9)])
            assert all(right(result, i) for i, result in enumerate(results))
            assert len(started) == 9
            await settle(model, slots)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_small_input_is_copied_by_a_thread_only_while_another_slot_is_busy(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, overlap=True, warmup=frame(0)) as model:
            executor_of(model)._thread_bytes = 0
            for _ in range(3):
                await model(frame(1))
            with counted() as started, held_streams(device, *streams_of(model)):
                calls = []
                for i in range(2):
                    calls.append(asyncio.ensure_future(model(frame(i))))
                    await turns()
                    assert len(started) == i
            assert [right(result, i) for i, result in enumerate(await asyncio.gather(*calls))] == [True, True]

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_callers_that_are_cancelled_lose_nothing(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 3)
        async with loaded(device, slots) as model:
            calls = [asyncio.ensure_future(model(frame(i))) for i in range(10)]
            for call in choose.sample(calls, 5):
                for _ in range(choose.randint(0, 4)):
                    await asyncio.sleep(0)
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            for i, result in enumerate(results):
                assert isinstance(result, asyncio.CancelledError) or right(result, i)
            await settle(model, slots)
            assert right(await model(frame(20)), 20)

    under_schedules(group, program)


@pytest.mark.parametrize("after", [False, True], ids=["before the launch", "after the launch"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_launch_that_fails_in_a_thread_is_its_callers_error(group: int, after: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 2)
        async with loaded(device, slots) as model:
            launch, strikes = SimulatedGraph.launch, set(choose.sample(range(8), 3))
            uses = iter(range(100))

            def launching(self: SimulatedGraph, *args: Any) -> None:
                strikes_now = next(uses) in strikes
                if after or not strikes_now:
                    launch(self, *args)
                if strikes_now:
                    raise RuntimeError("the driver said no")

            with mock.patch.object(SimulatedGraph, "launch", launching):
                results = await asyncio.gather(*[model(frame(i)) for i in range(8)], return_exceptions=True)
                await settle(model, slots)
            failed = [result for result in results if isinstance(result, BaseException)]
            assert len(failed) == 3
            assert all(isinstance(error, aiotrt.EngineError) and "the driver said no" in str(error) for error in failed)
            assert all(right(result, i) for i, result in enumerate(results) if not isinstance(result, BaseException))
            assert right(await model(frame(9)), 9)

    under_schedules(group, program)


@pytest.mark.parametrize("record", [False, True], ids=["the launch", "the record after a launch that failed"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_fault_in_a_thread_breaks_the_model_and_ends_every_call(group: int, record: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, 2) as model:
            error = RuntimeError("no") if record else aiotrt.DeviceError("an illegal address", code=700, name="ILLEGAL")
            with contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.object(SimulatedGraph, "launch", side_effect=error))
                if record:
                    stream = type(executor_of(model).slots[0].stream)
                    stack.enter_context(mock.patch.object(stream, "record", side_effect=RuntimeError("no record")))
                results = await asyncio.gather(*[model(frame(i)) for i in range(5)], return_exceptions=True)
            assert all(isinstance(result, aiotrt.DeviceError) for result in results)
            assert model.statistics().broken == 2

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_closing_waits_for_the_thread_and_for_what_it_launches(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, 2) as model:
            calls = [asyncio.ensure_future(model(frame(i))) for i in range(2)]
            await asyncio.sleep(0)
        assert [right(call.result(), i) for i, call in enumerate(calls)] == [True, True]

    under_schedules(group, program)


def test_without_a_thread_the_loop_does_it() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, 2) as model:
            submit, refused = Workers.submit, []

            def submitting(self: Workers, function: Any, *args: Any) -> Any:
                if function.__name__ == "_run":
                    refused.append(function)
                    raise aiotrt.ResourceError("no worker thread could be started: can't start new thread")
                return submit(self, function, *args)

            with mock.patch.object(Workers, "submit", submitting):
                assert right(await model(frame(3)), 3)
            assert len(refused) == 1

    under_schedules(0, program)


PLACES = [
    (owner, name, is_done)
    for owner, name in ((SimulatedGraph, "copy_job"), (Slots, "move"), (Hub, "add"), (CopyJob, "start"))
    for is_done in (False, True)
]


@pytest.mark.parametrize(("owner", "name", "is_done"), PLACES, ids=[f"{o.__name__}.{n}-{d}" for o, n, d in PLACES])
@pytest.mark.interpreted
@pytest.mark.parametrize("group", GROUPS)
def test_an_interrupt_leaves_no_slot_claimed_and_no_memory_to_two(group: int, owner: Any, name: str, is_done: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, 1) as model:
            with interrupted(owner, name, is_done), pytest.raises(KeyboardInterrupt):
                _ = executor_of(model).submit((frame(2),), {})
            results = await asyncio.gather(*[model(frame(i)) for i in range(3)])
            assert all(right(result, i) for i, result in enumerate(results))
            await settle(model, 1)
            statistics = model.statistics()
            assert statistics.submitted == statistics.completed + statistics.failed + statistics.cancelled

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_inputs_are_read_until_they_are_copied_and_no_longer_kept_than_that(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, 1) as model:
            with counted() as started:
                call = asyncio.ensure_future(model(frame(5)))
                await asyncio.sleep(0)
                (job,) = started
                assert executor_of(model).machine.states == [State.IN_FLIGHT]
                call.cancel()
                await asyncio.wait([call])
                await settle(model, 1)
            assert len(job._copies) == 0

    under_schedules(group, program)


def test_a_copy_that_fails_submits_nothing() -> None:
    submitted = mock.Mock()
    device = mock.Mock(**{"query.return_value": True})
    copies = [(np.zeros(3), np.zeros(4))]
    workers = mock.Mock(**{"submit.side_effect": RuntimeError})
    job = CopyJob(workers, device, mock.Mock(), mock.Mock(), copies, submitted, lambda: True)
    assert job() is False
    job.start()
    for ask in (job, job.confirm):
        with pytest.raises(ValueError, match="broadcast"):
            ask()
    submitted.assert_not_called()


@pytest.mark.parametrize("group", GROUPS)
def test_a_thread_launches_after_the_slots_last_consumers(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, 1) as model:
            reader, copies = device.stream(), []
            async with model.lease() as slot:
                slot.inputs[0][...] = device.tensor(frame(1))
                output = await slot.replay()
                reader.run(lambda: copies.append(output.clone()))
                slot.consumed(reader)
            assert right(await model(frame(7)), 7)
            await aiotrt.wait(reader.record())
            assert right(device.read(copies[0]), 1)

    under_schedules(group, program)


def test_calls_by_a_thread_are_counted_and_their_programs_are_in_use() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, 1) as model:
            before, uses = model.statistics(), executor_of(model).cache.uses
            for i in range(4):
                assert right(await model(frame(i)), i)
            after = model.statistics()
            assert (after.hits - before.hits, after.replays - before.replays, after.misses) == (4, 4, before.misses)
            assert executor_of(model).cache.uses == uses + 4
            assert next(iter(executor_of(model).cache)).used == uses + 4

    under_schedules(0, program)


def test_a_query_that_raises_is_confirmed_by_the_job() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with loaded(device, 1) as model:
            (slot,) = executor_of(model).slots
            with changed(slot, "query", mock.Mock(side_effect=RuntimeError("an error that is nobody's"))):
                assert right(await model(frame(3)), 3)

    under_schedules(0, program)


def test_which_calls_with_large_host_inputs_may_be_given_to_threads() -> None:
    """Those of host inputs alone, with results on the host, where inputs are copied at all."""
    size = (COPY_ON_LOOP_BYTES >> 2) + 1
    large = np.ones((1, size), np.float32)

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        for options, has_route in (({}, True), ({"outputs": "device"}, False)):
            given: dict[str, Any] = {"device": device, "slots": 1, "warmup": large, **options}
            async with aiotrt.load(lambda x: x[:, :4] + 1, **given) as model:
                assert executor_of(model)._thread_bytes == device.thread_copy_bytes == COPY_ON_LOOP_BYTES + 1
                with counted() as started:
                    for _ in range(4):
                        await model(large)
                assert (executor_of(model)._route is not None) == has_route
                assert len(started) == 2 * has_route

    under_schedules(0, program)


@pytest.mark.asyncio
async def test_on_the_host_device_large_inputs_have_no_route() -> None:
    large = np.ones((1, (COPY_ON_LOOP_BYTES >> 2) + 1), np.float32)
    async with aiotrt.load(lambda x: x[:, :4] + 1, device="host", slots=1, warmup=large) as model:
        for _ in range(4):
            assert (await model(large) == 2).all()
        assert executor_of(model)._route is None


@pytest.mark.parametrize("kind", ["device results", "batches"])
def test_results_on_the_device_and_batches_are_the_loops(kind: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        options: dict[str, Any] = {"outputs": "device"}
        if kind == "batches":
            options = {"batching": aiotrt.Batching(max_size=2)}
        async with load(device, slots=2, overlap=True, warmup=frame(0), **options) as model:
            executor_of(model)._thread_bytes = 0
            with counted() as started:
                for _ in range(4):
                    results = await asyncio.gather(*[model(frame(i)) for i in range(6)])
                    for i, result in enumerate(results):
                        assert right(device.read(result) if kind == "device results" else result, i)
            assert not started
            await settle(model, 2)

    under_schedules(0, program)


@pytest.mark.parametrize("missing", ["inputs", "outputs"])
def test_a_slot_without_staging_memory_gets_it_first(missing: str) -> None:
    """Its program was made for calls from the device, or for a lease whose results stay there."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, overlap=True) as model:
            executor = executor_of(model)
            executor._thread_bytes = 0
            if missing == "inputs":
                with held_streams(device, *streams_of(model)):
                    calls = [asyncio.ensure_future(model(device.tensor(frame(i)))) for i in range(2)]
                    await turns()
                await asyncio.gather(*calls)
            else:
                await model(device.tensor(frame(0, (1, 3))))  # so that it knows its inputs, of other shapes
                async with model.lease(((2, 3),)) as first, model.lease(((2, 3),)) as second:
                    for slot in (first, second):
                        slot.inputs[0].host[...] = 0
                        await slot.replay()
            for _ in range(3):
                assert right(await model(frame(4)), 4)
            assert executor._route is not None
            assert len(executor.cache.holders(executor._route.key)) == 2
            results = await asyncio.gather(*[model(frame(i)) for i in range(4)])
            assert all(right(result, i) for i, result in enumerate(results))
            await settle(model, 2)

    under_schedules(0, program)


@pytest.mark.parametrize("has_launched", [False, True], ids=["before the launch", "after the launch"])
@pytest.mark.interpreted
def test_a_model_that_is_dropped_keeps_its_memory_until_the_launch_is_complete(has_launched: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        with mock.patch("aiotrt.runtime.executor.COPY_ON_LOOP_BYTES", -1):
            model = await load(device, slots=1, overlap=True, warmup=frame(0))
            executor = executor_of(model)
            executor._thread_bytes = 0
            for _ in range(3):
                await model(frame(1))
            run, order = CopyJob._run, list[str]()

            def running(self: CopyJob) -> None:
                if not has_launched:
                    executor.is_discarded = True  # and what `discard` waited for is complete: nothing was submitted
                run(self)

            with (
                mock.patch.object(CopyJob, "_run", running),
                mock.patch("aiotrt.runtime.executor.keep", side_effect=lambda _: order.append("keep")),
                mock.patch("aiotrt.runtime.executor.release_when_idle", side_effect=lambda *_: order.append("release")),
            ):
                assert right(await model(frame(2)), 2)
            assert order == ([] if has_launched else ["keep", "release"])
            executor.is_discarded = False
            await model.aclose()

    under_schedules(0, program)
