"""Memory for results is there before it is needed, and a program's is freed only after its last reader.

On a simulated device, and audited, as in `test_laws_simulated`.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any
from unittest import mock

import pytest
import torch

import aiotrt
from aiotrt.runtime import executor, hold
from aiotrt.runtime import launch as submission
from aiotrt.testing import SimulatedDevice, SimulatedGraph, SimulatedStream
from tests.simulated import held_streams
from tests.test_laws_of_owners_simulated import GROUPS, streams_of
from tests.test_laws_simulated import load, right, settle, under_schedules
from tests.tools import executor_of, frame, turns


@pytest.mark.parametrize("group", GROUPS)
def test_the_next_results_get_their_memory_while_the_device_is_at_work(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        did: list[str] = []
        empty, launch = SimulatedDevice.empty, SimulatedGraph.launch

        def allocated(*args: Any) -> Any:
            did.append("allocate")
            return empty(*args)

        def launched(self: SimulatedGraph, *args: Any, **options: Any) -> None:
            did.append("launch")
            launch(self, *args, **options)

        with (
            mock.patch.object(SimulatedDevice, "empty", allocated),
            mock.patch.object(SimulatedGraph, "launch", launched),
        ):
            async with load(device, slots=1, warmup=frame(0)) as model:
                for value, x in enumerate([device.tensor(frame(value)) for value in range(4)]):
                    did.clear()
                    assert right(device.read(await model(x)), value)
                    assert did == (["launch", "allocate"] if value else ["allocate", "launch", "allocate"])

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_device_that_breaks_while_the_next_results_get_their_memory_is_broken(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        fault = aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress")
        model = await load(device, slots=1, warmup=frame(0))
        x = device.tensor(frame(1))
        with mock.patch.object(executor, "allocate", side_effect=fault):
            with pytest.raises(aiotrt.DeviceError):
                await model(x)
        assert not model.is_ready
        await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_without_memory_for_the_next_results_this_call_is_served(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            with mock.patch.object(executor, "allocate", side_effect=MemoryError("none left")):
                assert right(device.read(await model(x)), 1)
            assert right(device.read(await model(x)), 1)
            await settle(model, 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_for_long_work_the_next_results_get_their_memory_shortly_before_the_end(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        did: list[int] = []
        empty = SimulatedDevice.empty

        def allocated(*args: Any) -> Any:
            assert model._executor is not None
            did.append(model._executor.hub.polls)
            return empty(*args)

        side = device.stream()
        model = load(device, slots=1, overlap=True, warmup=frame(0))
        with mock.patch.object(SimulatedDevice, "empty", allocated):
            async with model:
                x = device.tensor(frame(3))
                for _ in range(2):  # recognised from here on
                    assert right(device.read(await model(x)), 3)
                with mock.patch.object(executor, "LONG", 0.0):
                    with held_streams(device, *streams_of(model)):
                        did.clear()
                        call = asyncio.ensure_future(model(x))
                        await asyncio.sleep(0)
                        assert model._executor is not None
                        before = model._executor.hub.polls
                        assert did == []
                        await asyncio.sleep(0.1)
                        assert did == [before + 1]
                    assert right(device.read(await call), 3)
                    with held_streams(device, *streams_of(model)):
                        with device.use(side):
                            call = asyncio.ensure_future(model(x))
                            await asyncio.sleep(0)
                        did.clear()
                        await asyncio.sleep(0.1)
                        assert did == [], "memory was allocated in the order of a stream that is not the caller's"
                    assert right(device.read(await call), 3)
        side.close()

    under_schedules(group, program)


def test_results_that_go_to_the_host_need_no_memory_on_the_device_in_advance() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0), outputs="numpy") as model:
            for _ in range(3):
                assert right(await model(device.tensor(frame(3))), 3)
                assert [program.spare for program in executor_of(model).cache] == [None]

    under_schedules(0, program)


def test_results_that_are_prepared_while_another_task_infers_can_be_written() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, overlap=True, warmup=frame(0)) as model:
            x = device.tensor(frame(3))
            for _ in range(2):
                assert right(device.read(await model(x)), 3)
            with mock.patch.object(executor, "LONG", 0.0), held_streams(device, *streams_of(model)):
                call = asyncio.ensure_future(model(x))
                await asyncio.sleep(0)
                with torch.inference_mode():  # the mode is the thread's, and so the poll's
                    await asyncio.sleep(0.1)
            assert right(device.read(await call), 3)
            result = await model(x)
            assert not result.is_inference()
            assert right(device.read(result), 3)

    under_schedules(0, program)


@pytest.mark.parametrize("error", [MemoryError("none left"), aiotrt.DeviceError("it broke", code=700, name="x")])
@pytest.mark.parametrize("group", GROUPS)
def test_long_work_ends_whatever_the_preparation_of_the_next_raises(group: int, error: Exception) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        empty = SimulatedDevice.empty
        failures: list[Exception] = []

        def allocated(*args: Any) -> Any:
            if failures:
                raise failures.pop()
            return empty(*args)

        with mock.patch.object(SimulatedDevice, "empty", allocated), mock.patch.object(executor, "LONG", 0.0):
            model = await load(device, slots=1, overlap=True, warmup=frame(0))
            x = device.tensor(frame(3))
            for _ in range(2):
                assert right(device.read(await model(x)), 3)
            with held_streams(device, *streams_of(model)):
                call = asyncio.ensure_future(model(x))
                await asyncio.sleep(0)
                failures.append(error)
                await asyncio.sleep(0.1)
                assert not failures
            if isinstance(error, aiotrt.DeviceError):
                with pytest.raises(aiotrt.DeviceError, match="it broke"):
                    await call
                assert not model.is_ready
            else:
                assert right(device.read(await call), 3)
                assert right(device.read(await model(x)), 3)
            await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_the_driver_is_called_before_a_long_launch_of_a_lease_ends(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        asked: list[str] = []
        current_handle = SimulatedDevice.current_handle

        def handle(self: SimulatedDevice) -> int:
            asked.append("handle")
            return current_handle(self)

        def query(self: SimulatedStream) -> bool:
            asked.append("query")
            raise RuntimeError("no answer")

        with mock.patch.object(executor, "LONG", 0.0), mock.patch.object(hold, "LONG", 0.0):
            async with load(device, slots=1, warmup=frame(0)) as model, model.lease(outputs="numpy") as slot:
                slot.inputs[0][...] = frame(1)
                await slot.replay()
                with held_streams(device, *streams_of(model)):
                    replay = asyncio.ensure_future(slot.replay())
                    await asyncio.sleep(0)
                    with (
                        mock.patch.object(SimulatedDevice, "current_handle", handle),
                        mock.patch.object(SimulatedStream, "query", query),
                    ):
                        await asyncio.sleep(0.1)
                assert asked == ["handle", "query"]
                assert right(await replay, 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_replays_of_a_lease_use_the_same_events_again(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model, model.lease(outputs="numpy") as slot:
            slot.inputs[0][...] = frame(1)
            await slot.replay()
            await slot.replay()
            with mock.patch.object(SimulatedDevice, "event", side_effect=AssertionError("one more event")):
                for _ in range(5):
                    assert right(await slot.replay(), 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_an_event_that_somebody_was_given_stays_that_launchs(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model, model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            with held_streams(device, *streams_of(model)):
                first = asyncio.ensure_future(slot.replay())
                await turns()
                output: Any = slot.outputs[0].tensor
                event = output._trt_produce_event
                assert not device.query(event)
            await first
            assert device.query(event)
            with held_streams(device, *streams_of(model)):
                second = asyncio.ensure_future(slot.replay())
                await turns()
                assert not second.done()
                assert device.query(event), "recorded again, while somebody may wait for it"
            await second

    under_schedules(group, program)


@pytest.mark.parametrize("fails", [False, True])
def test_a_program_is_freed_after_its_last_readers(fails: bool) -> None:
    did: list[str] = []

    def waited() -> None:
        did.append("waited")
        if fails:
            raise KeyError("the reader's own business")

    gates = [mock.Mock(synchronize=waited) for _ in range(2)]
    program = mock.Mock(close=lambda: did.append("closed"))
    submission.retire(program, gates)
    assert did == ["waited", "waited", "closed"]


@pytest.mark.parametrize("group", GROUPS)
def test_what_somebody_holds_is_not_given_up_for_others(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0), graph_cache_entries=2) as model:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                await slot.replay()
                for rows in (1, 3, 4):
                    assert right(await model(frame(rows, (rows, 3))), rows)
                slot.inputs[0][...] = frame(2)
                await slot.replay()
                assert right(device.read(slot.outputs[0].tensor), 2)
            assert model.statistics().evictions == 3

    under_schedules(group, program)
