"""Launches of several slots that go one after the other: none begins before the one before it has ended, whatever fails."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from aiotrt.testing import FaultKind, SimulatedDevice
from tests.simulated import Striker, held_streams
from tests.test_laws_simulated import GROUPS, load, right, settle, under_schedules
from tests.tools import count, executor_of, frame, until


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("verb", ["copy", "launch", "wait", "record"])
def test_one_after_the_other_also_past_a_launch_that_failed(group: int, verb: str) -> None:
    """The third must wait for the first, though the second, between them, may have waited for nobody."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with load(striker, slots=3, overlap=False, warmup=frame(0)) as model:
            slots = executor_of(model).slots
            ahead = slots[executor_of(model).machine._free[-1]]
            with held_streams(device, ahead.stream):
                one = asyncio.ensure_future(model(frame(1)))
                await until(lambda: count(model, State.IN_FLIGHT) == 1)
                striker.strike(verb, FaultKind.PASSING)
                two = asyncio.ensure_future(model(frame(2)))
                await until(two.done)
                three = asyncio.ensure_future(model(frame(3)))
                await asyncio.sleep(0.05)
                assert not one.done()
                assert not three.done()
                # The hub looks at them in order, so that what the device has done says more.
                assert not any(slot.stream.query() for slot in slots), "it went past the first"
                assert [count(model, state) for state in (State.IN_FLIGHT, State.DRAINING)] == [2, 1]
            assert right(await one, 1)
            with pytest.raises(aiotrt.EngineError, match="injected"):
                await two
            assert right(await three, 3)
            await settle(model, 3)
            assert right(await model(frame(4)), 4)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("verb", ["copy", "launch", "record"])
def test_past_a_launch_of_a_lease_that_failed_too(group: int, verb: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with (
            load(striker, slots=3, overlap=False, warmup=frame(0)) as model,
            model.lease() as slot,
        ):
            ahead = executor_of(model).slots[executor_of(model).machine._free[-1]]
            with held_streams(device, ahead.stream):
                one = asyncio.ensure_future(model(frame(1)))
                await until(lambda: count(model, State.IN_FLIGHT) == 1)
                slot.inputs[0][...] = frame(2)
                striker.strike(verb, FaultKind.PASSING)
                with pytest.raises(aiotrt.EngineError, match="injected"):
                    slot.launch()
                three = asyncio.ensure_future(model(frame(3)))
                await asyncio.sleep(0.05)
                assert not one.done()
                assert not three.done()
                assert not any(slot.stream.query() for slot in executor_of(model).slots), "it went past the first"
            assert right(await one, 1)
            assert right(await three, 3)
            assert right(device.read(await slot.replay()), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("ahead_is_lease", [True, False])
def test_leases_without_a_graph_wait_their_turn(group: int, ahead_is_lease: bool) -> None:
    """`launch` submits on the loop's thread, in its order; calls without a graph are submitted by workers, in none."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with contextlib.AsyncExitStack() as stack:
            model = await stack.enter_async_context(load(device, slots=2, overlap=False, graphs=False, warmup=frame(0)))
            first: Any = await stack.enter_async_context(model.lease())
            second: Any = await stack.enter_async_context(model.lease())
            if not ahead_is_lease:
                first, second = second, first
            first.inputs[0][...], second.inputs[0][...] = frame(1), frame(2)
            elsewhere = device.stream()  # the current stream waits for what was launched from it
            with held_streams(device, first._hold.slot.stream):
                produced = [first.launch()]
                with device.use(elsewhere):
                    produced.append(second.launch())
                await asyncio.sleep(0.05)
                assert not device.query(produced[0])
                assert not device.query(produced[1]), "it went ahead"
                with device.raw():
                    assert not (second._hold.program.outputs[0] == 7).any()
            for event in produced:
                await aiotrt.wait(event)
            assert right(device.read(first.outputs[0].tensor), 1)
            assert right(device.read(second.outputs[0].tensor), 2)

    under_schedules(group, program)


def stubborn(y: torch.Tensor) -> torch.Tensor:
    """No capture survives it, for inputs of three rows."""
    if y.shape[0] == 3:
        float(y.sum())
    return y


BOTH = [frame(0), frame(0, (3, 3))]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("what", ["call", "lease"])
def test_what_a_worker_submits_does_not_wait_for_whom_its_slot_waited_for_before(group: int, what: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, overlap=False, warmup=BOTH, postprocess=stubborn) as model:
            slots: Any = executor_of(model).slots
            while not all(slot.predecessor is not None for slot in slots):
                await asyncio.gather(*[model(frame(1)) for _ in range(4)])
            async with contextlib.AsyncExitStack() as stack:
                lease: Any = None
                if what == "lease":
                    lease = await stack.enter_async_context(model.lease([(3, 3)]))
                    lease.inputs[0][...] = frame(2, (3, 3))
                ahead = slots[executor_of(model).machine._free[-1]]
                with held_streams(device, ahead.stream):
                    one = asyncio.ensure_future(model(frame(1)))
                    await until(lambda: count(model, State.IN_FLIGHT) == 1)
                    two = asyncio.ensure_future(model(frame(2, (3, 3))) if lease is None else lease.replay())
                    await until(lambda: count(model, State.IN_FLIGHT) == 2)
                    await asyncio.sleep(0.05)
                    other = next(slot for slot in slots if slot is not ahead)
                    with device.raw():
                        assert (other.program.outputs[0] == 7).all(), "it waited for somebody"
                assert right(await one, 1)
                assert right(await two if lease is None else device.read(await two), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("kind", [FaultKind.PASSING, FaultKind.STICKY])
@pytest.mark.parametrize("what", ["call", "lease"])
def test_a_turn_that_cannot_be_passed_on_breaks_the_model(what: str, kind: FaultKind) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with load(striker, slots=2, overlap=False, warmup=BOTH, postprocess=stubborn) as model:
            async with contextlib.AsyncExitStack() as stack:
                lease: Any = None
                if what == "lease":
                    lease = await stack.enter_async_context(model.lease([(3, 3)]))
                    lease.inputs[0][...] = frame(2, (3, 3))
                else:
                    await model(frame(2, (3, 3)))
                striker.strike("record", kind, after=2)  # the turn and the produce event are recorded by the worker
                with pytest.raises(aiotrt.DeviceError, match="injected"):
                    await (model(frame(2, (3, 3))) if lease is None else lease.replay())
                assert not model.is_ready
                with pytest.raises(aiotrt.ModelBrokenError):
                    await model(frame(1))

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("what", ["call", "lease", "failing call", "failing lease"])
def test_what_a_worker_submits_waits_for_nobody_and_lets_nobody_past(group: int, what: str) -> None:
    """Without a graph, between two launches of graphs: the third still waits for the first."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)

        async with load(striker, slots=3, overlap=False, warmup=BOTH, postprocess=stubborn) as model:
            slots = executor_of(model).slots
            for value in range(6):  # each slot has waited for another
                await asyncio.gather(*[model(frame(value)) for _ in range(3)])
            async with contextlib.AsyncExitStack() as stack:
                lease: Any = None
                if "lease" in what:
                    lease = await stack.enter_async_context(model.lease([(3, 3)]))
                    lease.inputs[0][...] = frame(2, (3, 3))
                ahead = slots[executor_of(model).machine._free[-1]]
                with held_streams(device, ahead.stream):
                    one = asyncio.ensure_future(model(frame(1)))
                    await until(lambda: count(model, State.IN_FLIGHT) == 1)
                    runs = model.statistics().fallback_runs
                    if "failing" in what:
                        striker.strike("run", FaultKind.PASSING)
                    two = asyncio.ensure_future(model(frame(2, (3, 3))) if lease is None else lease.replay())
                    await until(lambda: count(model, State.IN_FLIGHT) + count(model, State.DRAINING) == 2)
                    between: Any = next(slot for slot in slots if slot.request is not None and slot is not ahead)
                    three = asyncio.ensure_future(model(frame(3)))
                    await until(lambda: count(model, State.IN_FLIGHT) + count(model, State.DRAINING) == 3)
                    await asyncio.sleep(0.05)
                    if "failing" not in what:
                        assert model.statistics().fallback_runs == runs + 1
                        with device.raw():
                            assert (between.program.outputs[0] == 7).all(), "it waited for somebody"
                    last = next(slot for slot in slots if slot not in (ahead, between))
                    assert not last.stream.query(), "it went past the first"
                assert right(await one, 1)
                if "failing" in what:
                    with pytest.raises(aiotrt.EngineError, match="injected"):
                        await two
                else:
                    assert right(await two if lease is None else device.read(await two), 2)
                assert right(await three, 3)

    under_schedules(group, program)
