"""Items that end in the very moment in which something else happens to them, and what a model with batching leaves behind.

On a simulated device, and audited, as in `test_laws_simulated`. Where two things fall into one turn of the loop, time is
moved on while the loop stands still: then all timers that are due ring in that turn, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.batching.batch import Batch
from aiotrt.batching.group import Group
from aiotrt.runtime.route import Route
from aiotrt.runtime.slots import State
from aiotrt.testing import FaultKind, SimulatedDevice
from tests.simulated import Striker, held_streams
from tests.test_batches_simulated import balanced, load, simulated
from tests.test_laws_of_owners_simulated import GROUPS, streams_of
from tests.test_laws_simulated import SHAPE, right, settle, under_schedules
from tests.tools import count, executor_of, frame, turns


def calls(model: aiotrt.Model, values: range, **options: Any) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(model(frame(value), **options)) for value in values]


def timers() -> int:
    """How many are set on the running loop."""
    loop: Any = asyncio.get_running_loop()
    return sum(not handle.cancelled() for handle in loop._scheduled)


async def in_flight(model: aiotrt.Model) -> None:
    while count(model, State.IN_FLIGHT) == 0:
        await asyncio.sleep(0)


def soon(what: Any) -> None:
    """Do this first of all that is due when time is moved on."""
    loop = asyncio.get_running_loop()
    loop.call_at(loop.time(), what)


@pytest.mark.parametrize("group", GROUPS)
def test_a_model_that_ends_takes_no_more_items(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        ends = choose.choice(["closes", "breaks"])
        model = await load(device, slots=1, max_size=2, warmup=frame(0))
        with held_streams(device, *streams_of(model)):
            (call,) = calls(model, range(1))
            await in_flight(model)
            if ends == "closes":
                closing = asyncio.ensure_future(model.aclose())
                await turns()
                with pytest.raises(aiotrt.ModelClosedError):
                    await model(frame(1))
            else:
                device.fail(aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress"))
                with pytest.raises(aiotrt.ModelBrokenError):
                    await model(frame(1))
                closing = asyncio.ensure_future(model.aclose())
            submitted = model.statistics().submitted
        await closing
        assert submitted == 1
        if ends == "closes":
            assert right(await call, 0)
        else:
            with pytest.raises(aiotrt.DeviceError):
                await call

    under_schedules(group, program)


def test_whoever_came_earlier_in_this_turn_makes_room_by_going() -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=2, max_size=2, max_queue=0, warmup=frame(0)) as model:
            with held_streams(device, *streams_of(model)):
                items = calls(model, range(4))
                await turns()
            results = await asyncio.gather(*items, return_exceptions=True)
            assert all(map(right, results[:3], range(3)))
            assert isinstance(results[3], aiotrt.QueueFullError)
            assert model.statistics().batches == {2: 1, 1: 1}

    simulated(program)


@pytest.mark.parametrize("warm", [True, False])
def test_a_batch_that_everybody_left_in_line_costs_nothing(warm: bool) -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, max_size=2, warmup=frame(0) if warm else ()) as model:
            executor = executor_of(model)
            async with asyncio.timeout(10.0):
                with held_streams(device, *streams_of(model)):
                    (first,) = calls(model, range(1))
                    while count(model, State.FREE):
                        await asyncio.sleep(0)
                    (gone,) = calls(model, range(1, 2))
                    await turns()
                    assert executor.machine.waiting == 1
                    gone.cancel()
                    await turns()
                assert right(await first, 0)
                await settle(model, 1)
            counters = executor.counters
            assert (counters.submitted, counters.completed, counters.cancelled, counters.failed) == (2, 1, 1, 0)
            assert counters.captures == (2 if warm else 1)  # one for each size, or the one that was needed
            assert balanced(model)

    simulated(program)


@pytest.mark.parametrize("moment", ["submitted", "complete", "expired", "broken"])
@pytest.mark.parametrize("group", GROUPS)
def test_an_item_cancelled_in_the_turn_in_which_it_ends_is_counted_once(group: int, moment: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=1, max_size=2, warmup=frame(0))
        stays, goes = items = calls(model, range(2), deadline=1.0 if moment == "expired" else 100.0)
        if moment == "submitted":
            await asyncio.sleep(0)  # the batch is made in the next turn, and before the cancelled one's task runs
            goes.cancel()
        elif moment == "complete":
            await in_flight(model)
            device.time.advance(0.1)
            goes.cancel()
            executor_of(model).hub._fire()  # finds the batch complete, before the cancelled one's task runs
        else:
            with held_streams(device, *streams_of(model)):
                if moment == "expired":
                    await in_flight(model)
                    soon(goes.cancel)
                    device.time.advance(2.0)
                else:
                    flying = items
                    await in_flight(model)
                    stays, goes = items = calls(model, range(2), deadline=100.0)
                    await turns()
                    goes.cancel()
                    device.fail(aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress"))
                    for call in flying:
                        with pytest.raises(aiotrt.DeviceError):
                            await call
                await asyncio.wait(items)
        with pytest.raises(asyncio.CancelledError):
            await goes
        if moment in ("submitted", "complete"):
            assert right(await stays, 0)
        else:
            with pytest.raises(aiotrt.DeadlineError if moment == "expired" else aiotrt.DeviceError):
                await stays
        if moment != "broken":
            await settle(model, 1)
        statistics = model.statistics()
        ended = (statistics.completed, statistics.expired, statistics.failed, statistics.cancelled)
        assert ended == {
            "submitted": (1, 0, 0, 1), "complete": (1, 0, 0, 1), "expired": (0, 1, 0, 1), "broken": (0, 0, 3, 1),
        }[moment]  # fmt: skip
        assert balanced(model)
        await model.aclose()

    under_schedules(group, program)


def test_an_item_whose_deadline_passed_while_the_loop_stood_still_does_not_go() -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, max_size=2, warmup=frame(0)) as model:
            with held_streams(device, *streams_of(model)):
                (first,) = calls(model, range(1))
                await in_flight(model)
                (late,) = calls(model, range(1, 2), deadline=0.05)
                await turns()
            device.time.advance(0.1)  # the slot is free before the alarm has rung
            assert right(await first, 0)
            with pytest.raises(aiotrt.DeadlineError):
                await late
            await settle(model, 1)
            statistics = model.statistics()
            assert (statistics.expired, statistics.cancelled, statistics.batches) == (1, 0, {1: 1})
            assert balanced(model)

    simulated(program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_deadline_is_kept_whatever_its_fraction_and_whatever_came_before(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        loop = asyncio.get_running_loop()
        async with load(device, slots=1, max_size=1, warmup=frame(0)) as model:
            with held_streams(device, *streams_of(model)):
                (flying,) = calls(model, range(1))
                await in_flight(model)
                for _ in range(30):
                    due = choose.uniform(0.0, 0.02)
                    began = loop.time()
                    async with asyncio.timeout(due + 1.0):  # or it would wait for the device, which waits for this
                        with pytest.raises(aiotrt.DeadlineError):
                            await model(frame(1), deadline=due)
                    assert loop.time() - began < due + 1e-4
                before = timers()
                endless = calls(model, range(1), deadline=float("inf"))
                await turns()
                assert timers() == before, "a deadline that never comes needs no timer"
            assert right(await flying, 0)
            assert right(await endless[0], 0)

    under_schedules(group, program)


def test_there_is_one_timer_for_each_deadline_and_one_for_what_is_held() -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, max_size=64, max_delay=1.0, warmup=frame(0)) as model:
            before = timers()
            items = []
            for value in range(20):
                items += calls(model, range(value, value + 1), deadline=1000.0 - value if value % 2 else None)
                await turns()
                assert timers() <= before + 1 + len(items) // 2
            assert all(map(right, await asyncio.gather(*items), range(20)))
            assert timers() == before
            assert model.statistics().batches == {20: 1}

    simulated(program)


@pytest.mark.parametrize("end", ["closes", "drops", "breaks"])
def test_a_model_that_ended_is_kept_by_no_timer(end: str) -> None:
    async def program(device: SimulatedDevice) -> None:
        before = timers()
        model = await load(device, slots=1, max_size=4, max_delay=50.0, warmup=frame(0))
        items = calls(model, range(2), deadline=1000.0)
        await turns()
        if end == "breaks":
            device.fail(aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress"))
        await model.aclose(drain=end == "closes")
        kinds = {"closes": type(None), "drops": aiotrt.ModelClosedError, "breaks": aiotrt.DeviceError}
        for item in await asyncio.gather(*items, return_exceptions=True):
            assert isinstance(item, kinds[end]) or (end == "closes" and not isinstance(item, BaseException)), item
        assert timers() <= before
        forgotten = weakref.ref(model)
        del model, items, item
        await turns()
        gc.collect()
        assert forgotten() is None or end == "breaks"  # the error that broke the device knows where it was raised

    simulated(program)


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_held_back_goes_when_the_model_closes(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=choose.randint(1, 2), max_size=4, max_delay=1000.0, warmup=frame(0))
        items = calls(model, range(choose.randint(1, 3)))
        await turns()
        began = asyncio.get_running_loop().time()
        await model.aclose()
        assert all(map(right, await asyncio.gather(*items), range(3)))
        assert asyncio.get_running_loop().time() - began < 1.0

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_what_items_are_is_known_when_the_first_has_been_served(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=4) as model:
            before = model.inputs
            assert before is None
            assert right(await model(frame(1)), 1)
            after = model.inputs
            assert after is not None
            (spec,) = after
            assert (spec.name, spec.shape, spec.dtype) == ("x", (None, None), torch.float32)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_warm_up_shows_that_outputs_cannot_be_split(group: int) -> None:
    def reduced(x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=0)

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        with pytest.raises(aiotrt.EngineError, match="for a batch of 1"):
            async with load(device, slots=2, max_size=2, source=reduced, warmup=frame(0, (2, 2))):
                pytest.fail("it opened")

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_outputs_on_the_device_that_cannot_be_split_are_named(group: int) -> None:
    def reduced(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"kept": x, "lost": x.sum(dim=0)}

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=2, source=reduced) as model:
            for _ in range(4):  # from the third on, by the short path
                with pytest.raises(aiotrt.EngineError, match="output 'lost' has shape"):
                    await model(device.tensor(frame(0)))
                await settle(model, 1)

    under_schedules(group, program)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_tensors_on_the_host_share_a_batch_by_either_way(group: int, warm: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=4, warmup=frame(0) if warm else ()) as model:
            for count_of_items in (1, 1, 3, 3):  # the first batches of a size take the long way
                items = [torch.full(SHAPE, float(value)) for value in range(count_of_items)]
                results = await asyncio.gather(*map(model, items))
                assert all(isinstance(result, torch.Tensor) for result in results)
                assert all(map(right, results, range(count_of_items)))
            assert balanced(model)

    under_schedules(group, program)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_one_item_on_the_device_at_a_time_takes_the_short_path(group: int, stack: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=4, stack=stack, warmup=frame(0)) as model:
            long = Batch._take_long_way
            for value in range(4):
                with mock.patch.object(Batch, "_take_long_way", side_effect=long, autospec=True) as took_long_way:
                    result = await model(device.tensor(frame(value)))
                assert right(device.read(result), value)
                assert tuple(result.shape) == SHAPE
                assert result._trt_produce_event is executor_of(model).complete
                assert took_long_way.called is (value == 0), "only the first one's signature was new"
            assert balanced(model)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_what_a_batch_is_padded_with_is_its_last_item(group: int) -> None:
    def crowd(x: torch.Tensor) -> torch.Tensor:
        return x * 0 + x.sum(dim=0, keepdim=True)

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=4, source=crowd, warmup=frame(0)) as model:

            async def call(value: float, on_device: bool) -> float:
                result = await model(device.tensor(frame(value)) if on_device else frame(value))
                return float((device.read(result) if on_device else result)[0, 0])

            for on_device in (True, False):
                for values, seen in (((100, 100, 100, 100), 400), ((1, 2, 4), 1 + 2 + 4 + 4)):
                    results = await asyncio.gather(*[call(value, on_device) for value in values])
                    assert results == [seen] * len(values)
            assert model.statistics().padding == 2

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_who_left_a_batch_is_not_told_by_it(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=4, warmup=frame(0)) as model:
            with held_streams(device, *streams_of(model)):
                items = calls(model, range(4))
                await in_flight(model)
                gone = choose.sample(range(4), choose.randint(1, 4))
                for i in gone:
                    items[i].cancel()
                await turns()
                assert count(model, State.DRAINING) == (len(gone) == 4)
            for i, result in enumerate(await asyncio.gather(*items, return_exceptions=True)):
                assert isinstance(result, asyncio.CancelledError) if i in gone else right(result, i)
            await settle(model, 1)
            assert model.statistics().cancelled == len(gone)
            assert right(await model(frame(5, SHAPE)), 5)
            assert balanced(model)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_what_the_first_item_fixed_is_asked_of_the_next(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=4, fixed=True) as model:
            assert right(await model(frame(1)), 1)
            with pytest.raises(aiotrt.InputError):
                await model(np.zeros(SHAPE, np.int32))
            assert model.statistics().submitted == 1, "it was taken in, and refused only with its batch"

    under_schedules(group, program)


def test_who_would_be_served_too_late_is_refused_at_once() -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, max_size=1, warmup=frame(0)) as model:
            for value in range(20):
                assert right(await model(frame(value)), value)
            assert model._gatherer is not None
            usual = model._gatherer._pace._mean
            with held_streams(device, *streams_of(model)):
                items = calls(model, range(10))
                await in_flight(model)
                await turns()
                with pytest.raises(aiotrt.OverloadedError):
                    await model(frame(9), deadline=5 * usual)
                items += calls(model, range(10, 11), deadline=1000.0)
                await turns()
                statistics = model.statistics()
                assert (statistics.rejected, statistics.expired, statistics.waiting) == (1, 0, 10)
            assert all(map(right, await asyncio.gather(*items), range(11)))

    simulated(program)


@pytest.mark.parametrize(
    ("what", "steps"),
    [
        ("in time", -1 / 256), ("longer", 1), ("expired in line", 1), ("expired on the device", 1),
        ("cancelled in line", 0), ("given up in line", 1), ("given up in line, without a deadline", 0),
        ("given up on the device", 1), ("failed", 0), ("without a deadline", 0), ("not shed", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("priority", [0, 1])
def test_the_pace_learns_from_waits(what: str, steps: float, priority: int) -> None:
    """Whoever was told how long it would take, and whose wait has shown whether it took longer."""

    async def program(device: SimulatedDevice) -> None:
        striker = Striker(device)
        async with load(striker, slots=1, max_size=1, warmup=frame(0), shed=what != "not shed") as model:
            for value in range(20):  # whoever finds a free slot is told nothing, and teaches nothing
                assert right(await model(frame(value), deadline=1000.0), value)
            assert model._gatherer is not None
            pace = model._gatherer._pace
            usual, before = pace._mean, list(pace._margins)
            assert before == [0.25, 0.25]
            deadline = 4 * usual if what.startswith("expired") else None if "without a deadline" in what else 1000.0
            with contextlib.ExitStack() as second_hold:
                with held_streams(device, *streams_of(model)):
                    (first,) = calls(model, range(1))
                    await in_flight(model)
                    item = asyncio.ensure_future(model(frame(1), deadline=deadline, priority=priority))
                    await turns()
                    if what.endswith("on the device"):  # after the first, before the item
                        second_hold.enter_context(held_streams(device, *streams_of(model)))
                    elif what == "failed":
                        striker.strike("launch", FaultKind.PASSING)
                    elif what not in ("in time", "cancelled in line"):
                        await asyncio.sleep(5 * usual)
                    if what.startswith(("cancelled in line", "given up in line")):
                        item.cancel()
                        await turns()
                assert right(await first, 0)
                if what.endswith("on the device"):
                    await asyncio.sleep(5 * usual)
                if what == "given up on the device":
                    item.cancel()
                    await turns()
            outcome = (await asyncio.gather(item, return_exceptions=True))[0]
            error = {
                "expired": aiotrt.DeadlineError, "cancelled": asyncio.CancelledError, "given": asyncio.CancelledError,
                "failed": aiotrt.EngineError,
            }.get(what.split(maxsplit=1)[0])  # fmt: skip
            assert isinstance(outcome, error) if error else right(outcome, 1)
            before[priority] += 0.02 * steps
            assert pace._margins == pytest.approx(before, abs=1e-9)
            await settle(model, 1)
            went = 22 - what.startswith(("cancelled in line", "given up in line", "expired in line"))
            assert sum(model.statistics().batches.values()) == went

    simulated(program)


def test_an_alarm_that_rings_a_moment_early_rings_again() -> None:
    async def program(device: SimulatedDevice) -> None:
        loop: Any = asyncio.get_running_loop()
        async with load(device, slots=1, max_size=1, warmup=frame(0)) as model:
            with held_streams(device, *streams_of(model)):
                (flying,) = calls(model, range(1))
                await in_flight(model)
                (late,) = calls(model, range(1, 2), deadline=0.05)
                await turns()
                loop._clock_resolution = 0.01  # a loop's timers may ring early by as much as its clock is coarse
                began = loop.time()
                async with asyncio.timeout(1.0):
                    await asyncio.sleep(0.045)
                    with pytest.raises(aiotrt.DeadlineError):
                        await late
                assert 0.045 < loop.time() - began < 0.051
            assert right(await flying, 0)

    simulated(program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_batch_that_all_have_left_is_over(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=2, warmup=frame(0)) as model:
            with held_streams(device, *streams_of(model)):
                flying = calls(model, range(2))
                await in_flight(model)
                for call in flying:
                    call.cancel()
                await asyncio.wait(flying)
            await settle(model, 1)
            assert model._gatherer is not None
            assert not model._gatherer._pace._running, "it is thought to be on the device still"

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_batch_that_all_left_before_its_slot_was_free_is_not_launched(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=2, warmup=frame(0)) as model:
            counters = executor_of(model).counters
            before = counters.failed, counters.misses
            with held_streams(device, *streams_of(model)):
                flying = calls(model, range(2))
                await in_flight(model)
                waiting = calls(model, range(2))
                await turns()
                for call in waiting:
                    call.cancel()
                await asyncio.wait(waiting)
            await asyncio.gather(*flying)
            await settle(model, 1)
            assert (counters.failed, counters.misses) == before, "something was built for a batch of nothing"
            assert right(await model(frame(3)), 3)
            assert balanced(model)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_batch_that_failed_is_over(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with load(striker, slots=1, max_size=2, warmup=frame(0)) as model:
            striker.strike("launch", FaultKind.PASSING)
            for item in await asyncio.gather(*calls(model, range(2)), return_exceptions=True):
                assert isinstance(item, aiotrt.EngineError)
            await settle(model, 1)
            assert model._gatherer is not None
            assert not model._gatherer._pace._running, "it is thought to be on the device still"
            assert right(await model(frame(1)), 1)

    under_schedules(group, program)


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_a_batch_that_cannot_be_put_together_fails_its_items_and_whoever_is_next_goes(group: int, busy: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        unpatched = Group.route_of
        full = choose.randint(1, 3)  # so many batches in a row; three are all

        def route_of(group: Group, size: int) -> Route:
            nonlocal full
            if full:
                full -= 1
                raise MemoryError("no memory")
            return unpatched(group, size)

        async with load(device, slots=1, max_size=2, warmup=frame(0)) as model:
            bad = min(2 * full, 5)
            with contextlib.ExitStack() as hold, contextlib.ExitStack() as patch:
                hold.enter_context(held_streams(device, *streams_of(model)))
                before = calls(model, range(busy))
                if busy:
                    await in_flight(model)
                patch.enter_context(mock.patch.object(Group, "route_of", route_of))
                items = calls(model, range(bad), deadline=choose.choice([None, 60.0])) + calls(model, range(bad, 5))
                await turns()
                hold.close()
                results = await asyncio.gather(*before, *items, return_exceptions=True)
            if busy:
                assert right(results.pop(0), 0)
            for item in results[:bad]:
                assert isinstance(item, aiotrt.EngineError)
                assert "Affine raised MemoryError before it was launched: no memory" in str(item)
            assert all(right(results[value], value) for value in range(bad, 5))
            await settle(model, 1)
            assert balanced(model)
            assert model.statistics().failed == bad
            assert right(await model(frame(1)), 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_not_stacked_is_read_where_it_is_if_its_caller_says_so(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, stack=False, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            assert right(device.read(await model(x)), 1)
            assert model.statistics().captures == 1, "copied into the graph that was there"
            x._trt_reuse_as_input_buffer = True  # type: ignore[attr-defined]
            for _ in range(2):
                assert right(device.read(await model(x)), 1)
                assert model.statistics().captures == 2, "a graph that reads it where it is"

    under_schedules(group, program)
