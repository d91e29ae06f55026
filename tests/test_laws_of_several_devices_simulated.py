"""One model on two and three devices: nothing is lost or doubled, results are where the inputs were, failures stay apart.

On simulated devices under adversarial schedules, and audited, as in `test_laws_simulated`. The devices are peers: the hazard
detector knows all of them, and so finds a copy from one to another that nothing orders.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.batching.batch import Batch
from aiotrt.batching.dispatcher import Dispatcher
from aiotrt.batching.placed import PlacedBatch
from aiotrt.runtime.placement import BUILD
from aiotrt.runtime.request import Request, Slot
from aiotrt.runtime.slots import State
from aiotrt.testing import Fault, FaultInjector, FaultKind, SimulatedDevice, fault_points
from tests.simulated import Striker, held_streams, run_simulated
from tests.test_laws_simulated import SHAPE, right
from tests.tools import Affine, frame, turns

SEEDS = range(8)
GROUPS = range(2)


def machine(count: int, seed: int) -> list[SimulatedDevice]:
    """So many GPUs of one machine."""
    first = SimulatedDevice(seed)
    return [first, *(SimulatedDevice(peer=first) for _ in range(count - 1))]


def under_schedules(
    group: int, program: Callable[[list[SimulatedDevice], random.Random], Awaitable[None]], counts: Sequence[int] = (2, 3)
) -> None:
    """Run `program` under the schedules of one group, on machines with these numbers of devices in turn."""
    for seed in range(group * len(SEEDS), (group + 1) * len(SEEDS)):
        devices = machine(counts[seed % len(counts)], seed)

        async def main(devices: list[SimulatedDevice] = devices, seed: int = seed) -> None:
            await program(devices, random.Random(seed))

        try:
            run_simulated(main(), devices[0])
        except BaseException as error:
            error.add_note(f"under the schedule with seed {seed}")
            raise


#: How calls are queued, by name.
BATCHING = {"none": None, "stacked": aiotrt.Batching(max_size=3), "single": aiotrt.Batching(stack=False, patience=100)}


def load(devices: Sequence[Any], *, batching: str = "none", **options: Any) -> aiotrt.Model:
    model: aiotrt.Model = aiotrt.load(
        Affine(), device=list(devices), hang_timeout=1.0, batching=BATCHING[batching], **options
    )
    return model


def streams_of(model: aiotrt.Model, device: int) -> list[Any]:
    return [slot.stream for slot in model._executors[device].slots]


def fault() -> aiotrt.DeviceError:
    return aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress")


async def idle(model: aiotrt.Model) -> None:
    """Return when nothing is under way, on no device."""
    pause = 1e-5
    while any(state not in (State.FREE, State.BROKEN) for e in model._executors for state in e.machine.states):
        assert pause < 10.0, f"a slot was lost: {model!r}"
        await asyncio.sleep(pause)
        pause *= 1.1


def balanced(model: aiotrt.Model, leases: int = 0) -> bool:
    """Every call that came in has ended in one way, and each is counted at one device at most."""
    now = model.statistics()
    ended = now.completed + now.failed + now.cancelled + now.expired
    assert now.submitted == ended + leases, now
    if model._options.batching is None:
        assert sum(one.completed for one in now.devices) == now.completed, now
    assert all(one.waiting == 0 for one in now.devices), now
    return now.waiting == 0


async def call(model: aiotrt.Model, devices: list[SimulatedDevice], choose: random.Random, value: float) -> None:
    """One call of any kind, whose result is right and where its inputs were."""
    for _ in range(choose.choice([0, 0, 1, 5, 50])):
        await asyncio.sleep(0)
    kind = choose.choice(["numpy", "torch", "device", "ready", "shape"])
    if kind == "numpy":
        assert right(await model(frame(value)), value)
    elif kind == "torch":
        assert right(await model(torch.full(SHAPE, float(value))), value)
    elif kind == "shape":
        assert right(await model(frame(value, (choose.randint(1, 2), 2))), value)
    else:
        device = choose.choice(devices)
        producer = device.stream()
        with device.use(producer):
            x = device.tensor(frame(value))
        if kind == "ready":
            x._trt_ready_event = producer.record()  # type: ignore[attr-defined]
        else:
            device.current_stream().wait(producer.record())
        result = await model(x)
        assert device.holds(result), "results are where the inputs were"
        assert right(device.read(result), value)
        if kind == "ready":
            producer.wait(x._trt_consumed_event)  # type: ignore[attr-defined]
        with device.use(producer):
            x.zero_()  # the caller may write to its input again


@pytest.mark.parametrize("batching", ["none", "stacked", "single"])
@pytest.mark.parametrize("group", GROUPS)
def test_concurrent_calls_get_their_own_results_where_their_inputs_were(group: int, batching: str) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        warmup = frame(0) if choose.random() < 0.5 else ()
        options: dict[str, Any] = {"overlap": choose.random() < 0.5, "warmup": warmup}
        async with load(devices, slots=choose.randint(1, 2), batching=batching, **options) as model:
            held = streams_of(model, 0) if choose.random() < 0.3 else []
            with held_streams(devices[0], *held):
                calls = [asyncio.ensure_future(call(model, devices, choose, value)) for value in range(16)]
                await turns(choose.choice([1, 30]))
            await asyncio.gather(*calls)
            await idle(model)
            assert model.statistics().completed == 16
            assert balanced(model)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_an_input_goes_to_another_device_when_its_own_is_busy_for_long(group: int) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        async with load(devices, slots=1, warmup=frame(0)) as model:
            first = devices[0]
            for _ in range(2):
                await asyncio.gather(*(model(frame(1)) for _ in devices))  # so that each has an estimate
            with held_streams(first, *streams_of(model, 0)):
                blocked = model._executors[0].submit((frame(1),), {})
                await asyncio.sleep(0.5)  # the device is overdue by far
                x = first.tensor(frame(2))
                result = await model(x)
                assert first.holds(result)
                assert right(first.read(result), 2)
                assert not blocked.done()
            assert right(await blocked, 1)
            assert sum(one.completed for one in model.statistics().devices[1:]) >= 1

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_inputs_on_two_devices_meet_on_one_and_results_are_where_the_first_was(group: int) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        model = await aiotrt.load(lambda x, y: x + y, device=devices, slots=1)
        async with model:
            for value in range(4):
                a, b = choose.sample(devices, 2)
                x, y = a.tensor(frame(value)), b.tensor(frame(1))
                result = await model(x, y)
                assert a.holds(result)
                assert bool((a.read(result) == value + 1).all())

    under_schedules(group, program)


@pytest.mark.parametrize("batching", ["none", "stacked"])
@pytest.mark.parametrize("group", GROUPS)
def test_calls_that_are_cancelled_at_any_time_cost_nobody_else_anything(group: int, batching: str) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        async with load(devices, slots=choose.randint(1, 2), batching=batching, warmup=frame(0)) as model:
            calls = [asyncio.ensure_future(call(model, devices, choose, value)) for value in range(20)]
            await turns(choose.choice([0, 3, 10, 30]))
            gone = choose.sample(calls, 8)
            for one in gone:
                one.cancel()
                await turns(choose.choice([0, 1]))
            await asyncio.wait(calls)
            for one in calls:
                assert one in gone if one.cancelled() else one.exception() is None, one
            await idle(model)
            assert balanced(model)
            assert right(await model(frame(3)), 3)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_leases_and_maps_use_all_devices(group: int) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        async with load(devices, slots=1, warmup=frame(0)) as model:
            names = [device.name for device in devices]
            async with contextlib.AsyncExitStack() as stack:
                leases = [await stack.enter_async_context(model.lease()) for _ in devices]
                assert sorted(lease.device for lease in leases) == names
                for value, lease in enumerate(leases):
                    device = devices[names.index(lease.device)]
                    lease.inputs[0][...] = device.tensor(frame(value))
                    with device.use():
                        result = await lease.replay()
                    assert device.holds(result)
                    assert right(device.read(result), value)
            made = [model.lease() for _ in devices]  # the device is chosen when it is entered
            async with contextlib.AsyncExitStack() as stack:
                assert sorted([(await stack.enter_async_context(lease)).device for lease in made]) == names
            for device in devices:
                async with model.lease(device=device.name) as lease:
                    assert lease.device == device.name
            with pytest.raises(aiotrt.UsageError, match="one of the model's"):
                model.lease(device="simulated:9")
            seen = 0
            async for result in model.map([frame(value) for value in range(20)]):
                assert right(result, seen)
                seen += 1
            assert all(one.completed for one in model.statistics().devices), "each had some of them"
            await idle(model)
            assert balanced(model, leases=3 * len(devices))

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_slow_device_holds_up_only_what_it_runs(group: int) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        async with load(devices, slots=1, warmup=frame(0), max_queue=0 if choose.random() < 0.2 else 100) as model:
            with held_streams(devices[0], *streams_of(model, 0)):
                stuck = [asyncio.ensure_future(model(frame(value))) for value in range(len(devices))]
                await asyncio.wait(stuck, return_when=asyncio.FIRST_COMPLETED)
                for value in range(10):
                    assert right(await model(frame(value)), value)
            assert all(map(right, await asyncio.gather(*stuck), range(len(devices))))

    under_schedules(group, program)


# Failures...


@pytest.mark.parametrize("batching", ["none", "stacked"])
@pytest.mark.parametrize("group", GROUPS)
def test_when_one_device_fails_only_what_it_runs_fails_or_runs_again_elsewhere(group: int, batching: str) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        how, retry = choose.choice(["fault", "hang"]), choose.random() < 0.5
        model = await load(devices, slots=2, batching=batching, warmup=frame(0), retry=retry)
        victim = choose.randrange(len(devices))
        stopped = held_streams(devices[victim], *streams_of(model, victim))
        stopped.__enter__()  # what hangs goes on only when the model is closed
        calls = [asyncio.ensure_future(model(frame(value))) for value in range(30)]
        while not model._executors[victim].machine.count(State.IN_FLIGHT):
            await asyncio.sleep(0)
        await turns(choose.choice([0, 5]))
        if how == "fault":
            devices[victim].fail(fault())
        results = await asyncio.gather(*calls, return_exceptions=True)
        failed = 0
        for value, result in enumerate(results):
            if isinstance(result, BaseException):
                assert isinstance(result, aiotrt.DeviceHangError if how == "hang" else aiotrt.DeviceError), result
                failed += 1
            else:
                assert right(result, value)
        slots, items = len(streams_of(model, victim)), 3 if batching == "stacked" else 1
        assert failed == 0 if retry else 0 < failed <= slots * items
        assert model.is_ready
        assert model.is_degraded
        assert [one.is_broken for one in model.statistics().devices] == [i == victim for i in range(len(devices))]
        # The others go on, and nothing goes to the one that broke.
        before = model.statistics().devices[victim].submitted
        await asyncio.gather(*(call(model, [d for d in devices if d is not devices[victim]], choose, v) for v in range(9)))
        assert model.statistics().devices[victim].submitted == before
        now = model.statistics()
        assert (now.submitted, now.completed, now.failed) == (39, 39 - failed, failed)
        await model.aclose()
        stopped.__exit__(None, None, None)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_call_runs_again_once_and_when_all_devices_are_gone_everybody_is_told(group: int) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        model = await load(devices, slots=1, warmup=frame(0), retry=True)
        with contextlib.ExitStack() as stack:
            for i, device in enumerate(devices):
                stack.enter_context(held_streams(device, *streams_of(model, i)))
            calls = [asyncio.ensure_future(model(frame(value))) for value in range(12)]
            await turns()
            for i, device in enumerate(devices):
                assert model.is_ready
                device.fail(fault())
                if choose.random() < 0.5:
                    await turns()
                assert model.is_degraded == (i < len(devices) - 1)
            for one in calls:
                with pytest.raises(aiotrt.DeviceError):
                    await one
            with pytest.raises(aiotrt.ModelBrokenError):
                await model(frame(1))
            with pytest.raises(aiotrt.ModelBrokenError):
                model.lease()
            assert not model.is_ready
            assert model.statistics().failed == 12
            await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_device_inputs_never_run_again(group: int) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        model = await load(devices, slots=1, warmup=frame(0), retry=True)
        with held_streams(devices[0], *streams_of(model, 0)):
            x = devices[0].tensor(frame(1))
            waits = asyncio.ensure_future(model(x))
            await turns()
            ran = [i for i, executor in enumerate(model._executors) if executor.machine.count(State.IN_FLIGHT)]
            devices[0].fail(fault())
            if ran == [0]:
                with pytest.raises(aiotrt.DeviceError):
                    await waits
            else:
                waits.cancel()
            await model.aclose()

    under_schedules(group, program)


async def scenario(devices: list[Any], log: list[type[BaseException]]) -> None:
    """Calls, batches and a lease on all devices; each result is right, or an error of aiotrt's."""

    async def told(what: Awaitable[Any], value: float) -> None:
        try:
            assert right(await what, value)
        except aiotrt.AiotrtError as error:
            log.append(type(error))

    for options in ({"warmup": frame(0)}, {"batching": "stacked", "warmup": frame(0)}):
        async with load(devices, slots=1, **options) as model:
            await asyncio.gather(*(told(model(frame(value)), value) for value in range(8)))
            await asyncio.gather(*(told(model(frame(value, (1, 3))), value) for value in range(4)))
            before = len(log)
            await told(model(frame(3)), 3)
            if len(log) > before:  # it was this one that failed
                assert right(await model(frame(3)), 3), "the other device goes on"
            await idle(model)
            now = model.statistics()
            assert now.submitted == now.completed + now.failed + now.rejected


def fault_machine(*faults: Fault) -> tuple[SimulatedDevice, FaultInjector]:
    first = SimulatedDevice(7)
    return first, FaultInjector(SimulatedDevice(peer=first), *faults)


def run_with(fault: Fault | None) -> tuple[list[type[BaseException]], FaultInjector]:
    log: list[type[BaseException]] = []
    first, second = fault_machine(*([fault] if fault else []))
    with contextlib.suppress(aiotrt.AiotrtError):  # while a model was loaded
        run_simulated(scenario([first, second], log), first)
    return log, second


def every_point() -> list[Fault]:
    """Of the second of two devices."""

    def counts(injector: FaultInjector) -> None:
        _, second = run_with(None)
        injector.uses = second.uses

    points = fault_points(counts, SimulatedDevice)
    return [point for point in points if point.verb != "query" or point.use % 7 == 1]


def goes_on(points: Sequence[Fault]) -> None:
    """Whatever fails on one device, the other goes on."""
    for point in points:
        try:
            _, second = run_with(point)
            assert second.happened in ([point], []), "a model that could not be loaded is not used"
        except BaseException as error:
            error.add_note(f"with the fault {point}")
            raise


def test_whatever_fails_on_one_device_the_other_goes_on() -> None:
    points = every_point()
    assert len(points) > 100
    goes_on(points[::10])


@pytest.mark.proof
def test_a_failure_at_every_step_of_one_device_leaves_the_other() -> None:
    goes_on(every_point())


# Loading and closing...


def test_devices_are_warmed_up_side_by_side() -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        model = load(devices, slots=1, warmup=frame(0))
        opening = asyncio.ensure_future(model.__aenter__())
        together = 0
        while not opening.done():
            together = max(together, sum(e.machine.count(State.PREPARING) for e in model._executors))
            await asyncio.sleep(0)
        assert together == len(devices)
        _ = await opening
        await model.aclose()

    under_schedules(0, program)


@pytest.mark.parametrize("drain", [True, False])
@pytest.mark.parametrize("batching", ["none", "stacked"])
@pytest.mark.parametrize("group", GROUPS)
def test_closing_ends_every_call_and_leaves_nothing(group: int, batching: str, drain: bool) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        model = await load(devices, slots=1, batching=batching, warmup=frame(0), retry=True)
        calls = [asyncio.ensure_future(model(frame(value))) for value in range(10)]
        await turns(choose.choice([0, 2, 10]))
        if choose.random() < 0.3:
            devices[0].fail(fault())
        closing = asyncio.ensure_future(model.aclose(drain=drain))
        results = await asyncio.gather(*calls, return_exceptions=True)
        await closing
        for value, result in enumerate(results):
            if isinstance(result, BaseException):
                assert not drain
                assert isinstance(result, aiotrt.ModelClosedError | aiotrt.DeviceError), result
            else:
                assert right(result, value)

    under_schedules(group, program)


def test_a_device_that_is_broken_already_is_refused_by_name_and_nothing_is_left() -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        devices[1].fail(fault())
        with pytest.raises(aiotrt.ModelBrokenError, match="simulated:1 is broken"):
            _ = await load(devices)

    under_schedules(0, program)


def test_a_preprocess_that_uses_a_tensor_of_another_device_is_refused_by_name() -> None:
    other = torch.empty(2, device="meta")

    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        with pytest.raises(aiotrt.EngineError, match="preprocess uses other, which is on meta"):
            _ = await load(devices, preprocess=lambda x: x + other, warmup=frame(0))

    under_schedules(0, program)


def test_if_the_second_device_cannot_be_opened_the_first_is_given_back() -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        striker = Striker(devices[1])
        striker.strike("event", FaultKind.PASSING)
        with pytest.raises(aiotrt.EngineError, match="simulated:1 could not provide"):
            _ = await load([devices[0], striker, *devices[2:]])

    under_schedules(0, program)


# Placement...


@pytest.mark.interpreted
@pytest.mark.parametrize("batching", ["none", "single"])
@pytest.mark.parametrize("kind", ["host", "device"])
def test_calls_that_wait_take_the_short_path_too(kind: str, batching: str) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        async with load(devices, slots=1, warmup=frame(0), batching=batching) as model:
            home = choose.choice(devices)
            inputs = [frame(value) if kind == "host" else home.tensor(frame(value)) for value in range(24)]
            await asyncio.gather(*map(model, inputs[:12]))
            begun: list[Request] = []
            for executor in model._executors:
                begin = executor.begin

                def beginning(slot: Slot, request: Request, begin: Any = begin) -> None:
                    if not request.is_done:
                        begun.append(request)
                    begin(slot, request)

                executor.begin = beginning  # type: ignore[method-assign]
            results = await asyncio.gather(*map(model, inputs[12:]))
            for value, result in enumerate(results, 12):
                assert right(result if kind == "host" else home.read(result), value)
            # A call that runs on another device than its input's is copied, which the short path does not do.
            batches = [request.batch for request in begun if request.batch is not None]  # without one, it did not wait
            assert all(isinstance(batch, PlacedBatch) and batch.home not in (None, batch.member.index) for batch in batches)
            await idle(model)

    under_schedules(0, program)


def test_a_program_that_one_device_lacks_is_built_there_while_calls_go_to_the_other() -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        async with load(devices, slots=1) as model:
            assert right(await model(frame(1)), 1)
            assert model.statistics().captures == 1
            for _ in range(3):
                results = await asyncio.gather(*(model(frame(value)) for value in range(6)))
                assert all(map(right, results, range(6)))
                await asyncio.sleep(2 * BUILD)
            assert all(one.captures == 1 for one in model.statistics().devices), "each has built it, once"
            assert balanced(model)

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_urgent_calls_go_first_and_calls_of_one_class_in_their_order(group: int) -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        order: list[float] = []
        async with load(devices, slots=1, warmup=frame(0), batching="single") as model:
            gatherer = model._gatherer
            assert isinstance(gatherer, Dispatcher)
            assemble = gatherer._assemble

            def assembling(request: Request, batch: Batch) -> bool:
                filled = assemble(request, batch)
                order.extend(float(item.values[0][0, 0]) for item in batch.items)
                return filled

            with mock.patch.object(gatherer, "_assemble", assembling), contextlib.ExitStack() as stack:
                for i, device in enumerate(devices):
                    stack.enter_context(held_streams(device, *streams_of(model, i)))
                busy = [asyncio.ensure_future(model(frame(-1))) for _ in devices]
                await turns()
                calls = [asyncio.ensure_future(model(frame(v), priority=v % 2)) for v in range(10)]
                await turns()
                stack.close()
                results = await asyncio.gather(*busy, *calls)
            assert all(map(right, results[len(devices) :], range(10)))
            assert order[len(devices) :] == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]

    under_schedules(group, program)


def test_deadlines_and_bounds_hold_for_all_devices_together() -> None:
    async def program(devices: list[SimulatedDevice], choose: random.Random) -> None:
        async with load(devices, slots=1, warmup=frame(0), batching="single", max_queue=2) as model:
            with contextlib.ExitStack() as stack:
                for i, device in enumerate(devices):
                    stack.enter_context(held_streams(device, *streams_of(model, i)))
                calls = [asyncio.ensure_future(model(frame(v), deadline=0.1)) for v in range(len(devices) + 3)]
                results = await asyncio.gather(*calls, return_exceptions=True)
            kinds = Counter(type(result) for result in results)
            assert kinds == {aiotrt.DeadlineError: len(devices) + 2, aiotrt.QueueFullError: 1}
            await idle(model)
            assert right(await model(frame(1), deadline=10.0), 1)
            assert model.statistics().expired == len(devices) + 2

    under_schedules(0, program)


def test_arrays_in_results_are_bit_equal_to_those_of_one_device() -> None:
    values = [np.random.default_rng(i).random(SHAPE, np.float32) for i in range(12)]
    found: list[list[bytes]] = []

    def program(count: int) -> None:
        devices = machine(count, 3)

        async def main() -> None:
            async with load(devices, slots=1, warmup=frame(0)) as model:
                found.append([result.tobytes() for result in await asyncio.gather(*map(model, values))])

        run_simulated(main(), devices[0])

    for count in (1, 2, 3):
        program(count)
    assert found[0] == found[1] == found[2]
