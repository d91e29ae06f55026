"""The laws of the design, through the public API, on a simulated device under many adversarial schedules.

Every run also passes under the hazard detector, whose clocks see races that were won, and on a loop where a call that
blocks is an error, where nothing sleeps, and where a program that hangs is an error too.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from aiotrt.testing import Fault, FaultInjector, FaultKind, Schedule, SimulatedDevice, explore, fault_points
from tests.simulated import run_simulated
from tests.tools import Affine, count, frame

#: Each test runs under this many schedules, `SEEDS` of them for each parameter.
SEEDS = range(10)
GROUPS = range(10)
SHAPE = (2, 3)


#: Whether the slots of models that `load` makes overlap; under every other seed they do not: the laws are the same.
OVERLAP: ContextVar[bool] = ContextVar("overlap", default=True)


def under_schedules(group: int, program: Callable[[SimulatedDevice, random.Random], Awaitable[None]]) -> None:
    """Run `program` under the schedules of one group."""
    for seed in SEEDS:
        seed += group * len(SEEDS)
        device = SimulatedDevice(seed)
        OVERLAP.set(seed % 2 == 0)

        async def main(device: SimulatedDevice = device, seed: int = seed) -> None:
            await program(device, random.Random(seed))

        try:
            run_simulated(main(), device)
        except BaseException as error:
            error.add_note(f"under the schedule with seed {seed}")
            raise


def load(device: SimulatedDevice | FaultInjector, *, slots: int = 2, **options: Any) -> aiotrt.Model:
    options.setdefault("overlap", OVERLAP.get())
    model: aiotrt.Model = aiotrt.load(Affine(), device=device, slots=slots, hang_timeout=1.0, **options)
    return model


def right(result: object, value: float) -> bool:
    return bool(np.all(np.asarray(result) == 3 * value + 1))


def all_free(model: aiotrt.Model) -> bool:
    return count(model, State.FREE) == model.statistics().free and model.statistics().waiting == 0


async def settle(model: aiotrt.Model, slots: int) -> None:
    """Return when every slot is free again."""
    pause = 1e-5
    while count(model, State.FREE) < slots:
        assert pause < 10.0, f"a slot was lost: {model!r}"
        await asyncio.sleep(pause)
        pause *= 1.1


@pytest.mark.parametrize("group", GROUPS)
def test_concurrent_calls_get_their_own_results(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 3)
        async with load(device, slots=slots) as model:

            async def call(value: float) -> None:
                await asyncio.sleep(choose.uniform(0, 1e-3))
                kind = choose.choice(["numpy", "torch", "device"])
                if kind == "numpy":
                    assert right(await model(frame(value)), value)
                elif kind == "torch":
                    assert right(await model(torch.full(SHAPE, float(value))), value)
                else:
                    result = await model(device.tensor(frame(value)))
                    assert device.holds(result)
                    assert right(device.read(result), value)

            await asyncio.gather(*[call(value) for value in range(12)])
            assert model.statistics().completed == 12
            await settle(model, slots)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_device_inputs_are_read_after_they_were_made(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device) as model:

            async def call(value: float) -> None:
                producer = device.stream()
                with device.use(producer):
                    x = device.tensor(frame(value)) * 2
                made = device.event()
                producer.record(made)
                if choose.random() < 0.5:
                    device.current_stream().wait(made)
                else:
                    x._trt_ready_event = made  # type: ignore[attr-defined]
                assert right(device.read(await model(x)), 2 * value)

            await asyncio.gather(*[call(value) for value in range(5)])

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_results_on_the_device_can_be_consumed_there(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device) as model:
            totals = []
            for value in range(6):
                result = await model(device.tensor(frame(value)))
                with device.use():
                    totals.append(result.sum())  # on the caller's stream, not waited for
                del result
            event = device.event()
            device.current_stream().record(event)
            await aiotrt.wait(event)
            assert [device.read(total).item() for total in totals] == [6 * (3 * value + 1) for value in range(6)]

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_lease_is_not_overwritten(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 2)
        async with load(device, slots=slots, warmup=frame(0)) as model:
            copies: list[tuple[float, torch.Tensor]] = []

            async def hold(value: float) -> None:
                async with model.lease() as lease:
                    lease.inputs[0][...] = frame(value)
                    event = lease.launch()
                    if choose.random() < 0.5:
                        await aiotrt.wait(event)
                    for _ in range(choose.randint(0, 3)):
                        consumer = model.stream()
                        consumer.wait(event)
                        with device.use(device.adopt_stream(consumer)):
                            copies.append((value, lease.outputs[0].tensor.clone()))
                        lease.consumed(consumer)
                    with device.use():
                        copies.append((value, lease.outputs[0].tensor.clone()))
                    if choose.random() < 0.2:
                        raise KeyError("a consumer failed")

            leases = [hold(value) for value in range(6)]
            calls = [model(frame(value)) for value in range(6)]
            results = await asyncio.gather(*leases, *calls, return_exceptions=True)
            for result in results[: len(leases)]:
                assert result is None or isinstance(result, KeyError), result
            assert all(right(result, value) for value, result in enumerate(results[len(leases) :]))
            await settle(model, slots)
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert all(right(device.read(copy), value) for value, copy in copies)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_lease_is_written_and_replayed_again_and_again(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            for _ in range(2):
                async with model.lease(outputs="numpy") as lease:
                    for value in range(3):
                        if choose.random() < 0.5:
                            lease.inputs[0][...] = frame(value)
                        else:
                            lease.inputs[0][...] = device.tensor(frame(value))
                        assert right(await lease.replay(), value)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_chain_of_leases_stays_on_the_device(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:

            async def chain(value: float) -> None:
                async with model.lease() as first, model.lease(outputs="numpy") as second:
                    first.inputs[0][...] = frame(value)
                    first.launch()
                    second.inputs[0][...] = first.outputs[0]
                    result = await second.replay()
                    assert right(result, 3 * value + 1)

            for value in range(4):
                await chain(value)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_call_can_be_cancelled_at_any_step(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 2)
        async with load(device, slots=slots) as model:

            async def lease(value: float) -> None:
                async with model.lease([SHAPE], outputs="numpy") as slot:
                    slot.inputs[0][...] = frame(value)
                    assert right(await slot.replay(), value)

            async def call(value: float) -> None:
                assert right(await model(frame(value)), value)

            async def device_call(value: float) -> None:
                assert right(device.read(await model(device.tensor(frame(value)))), value)

            await call(0.0)
            tasks = [asyncio.ensure_future(choose.choice([lease, call, device_call])(value)) for value in range(9)]
            for task in tasks:
                for _ in range(choose.choice([0, 1, 2, 5, 20, 100])):
                    await asyncio.sleep(0)
                if choose.random() < 0.6:
                    task.cancel()
            for task in tasks:
                try:
                    await task
                except asyncio.CancelledError:
                    pass
            await settle(model, slots)
            await asyncio.gather(*[call(value) for value in range(2 * slots)])
            assert all_free(model)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_closing_at_any_moment_leaves_nobody_waiting(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device)

        async def call(value: float) -> None:
            assert right(await model(frame(value)), value)

        calls = [asyncio.ensure_future(call(value)) for value in range(6)]
        for _ in range(choose.choice([0, 1, 5, 50, 300])):
            await asyncio.sleep(0)
        await model.aclose(drain=choose.random() < 0.5)
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert result is None or isinstance(result, aiotrt.ModelClosedError), result

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_changing_shapes_evict_graphs_that_nobody_reads(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, graph_cache_entries=2) as model:

            async def call(value: int) -> None:
                shape = (choose.randint(1, 4), 3)
                assert right(await model(frame(value, shape)), value)

            await asyncio.gather(*[call(value) for value in range(10)])
            assert model.statistics().evictions > 0

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_what_cannot_be_captured_runs_without_a_graph(group: int) -> None:
    def needs_the_host(x: torch.Tensor) -> torch.Tensor:
        return x * 3 + (1 if x.sum().item() >= 0 else 0)

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with aiotrt.load(needs_the_host, device=device, slots=2) as model:
            results = await asyncio.gather(*[model(frame(value)) for value in range(5)])
            assert all(right(result, value) for value, result in enumerate(results))
            assert model.statistics().fallbacks
            async with model.lease([SHAPE], outputs="numpy") as lease:
                lease.inputs[0][...] = frame(7)
                assert right(await lease.replay(), 7)

    under_schedules(group, program)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_everything_at_once(group: int, captured: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 3)
        model = await load(device, slots=slots, graphs=captured, warmup=frame(0), graph_cache_entries=slots)
        kept: list[tuple[float, torch.Tensor]] = []

        async def call(value: float) -> None:
            shape = (choose.randint(1, 2), 3)
            assert right(await model(frame(value, shape)), value)

        async def device_call(value: float) -> None:
            result = await model(device.tensor(frame(value)))
            with device.use():
                kept.append((value, result.clone()))

        async def lease(value: float) -> None:
            async with model.lease([SHAPE], outputs=choose.choice([None, "numpy"])) as slot:
                for _ in range(choose.randint(0, 3)):
                    slot.inputs[0][...] = device.tensor(frame(value))
                    if captured and choose.random() < 0.5:
                        event = slot.launch()
                        if choose.random() < 0.5:
                            await aiotrt.wait(event)
                    else:
                        await slot.replay()
                    with device.use():
                        kept.append((value, slot.outputs[0].tensor.clone()))

        async def left_early(value: float) -> None:
            async with model.lease([SHAPE]) as slot:
                slot.inputs[0][...] = device.tensor(frame(value))
                replay = asyncio.ensure_future(slot.replay())
                replay.add_done_callback(lambda replay: replay.cancelled() or replay.exception())  # seen, whatever it was
                for _ in range(choose.choice([0, 1, 3, 30])):
                    await asyncio.sleep(0)
                if choose.random() < 0.5:
                    replay.cancel()
            await asyncio.gather(replay, return_exceptions=True)

        async def mapped(value: float) -> None:
            values = [value, value + 1, value + 2]
            results = [result async for result in model.map(map(frame, values), in_flight=choose.randint(1, 4))]
            assert all(map(right, results, values))

        jobs = [call, call, device_call, lease, lease, left_early, mapped]
        tasks = [asyncio.ensure_future(choose.choice(jobs)(float(value))) for value in range(12)]
        for task in tasks:
            for _ in range(choose.choice([0, 1, 5, 50])):
                await asyncio.sleep(0)
            if choose.random() < 0.25:
                task.cancel()
        if choose.random() < 0.3:
            await model.aclose(drain=choose.random() < 0.5)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, (asyncio.CancelledError, aiotrt.ModelClosedError)), result
        if model.is_ready:
            await settle(model, slots)
            await asyncio.gather(*[call(value) for value in range(2 * slots)])
            assert all_free(model)
        await model.aclose()
        await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
        assert all(right(device.read(copy), value) for value, copy in kept)

    under_schedules(group, program)


def test_equal_seeds_are_equal_programs() -> None:
    def run(seed: int) -> tuple[float, aiotrt.Statistics]:
        device = SimulatedDevice(seed)

        async def main() -> tuple[float, aiotrt.Statistics]:
            async with load(device) as model:
                await asyncio.gather(*[model(frame(value)) for value in range(8)])
                return device.time.now, model.statistics()

        return run_simulated(main(), device)

    assert run(5) == run(5)
    assert run(5) != run(6)


def test_two_calls_and_a_lease_under_every_schedule() -> None:
    def scenario(schedule: Schedule) -> None:
        device = SimulatedDevice(schedule)

        async def main() -> None:
            async with load(device, slots=2, warmup=frame(0)) as model:
                copies = []
                async with model.lease() as lease:
                    lease.inputs[0][...] = frame(3)
                    lease.launch()
                    with device.use():
                        copies.append(lease.outputs[0].tensor.clone())
                results = await asyncio.gather(*[model(frame(value)) for value in range(2)])
                assert all(map(right, results, range(2)))
                event = device.event()
                device.current_stream().record(event)
                await aiotrt.wait(event)
                assert right(device.read(copies[0]), 3)

        run_simulated(main(), device)

    explore(scenario, limit=3000)


# Faults...


async def everything(device: FaultInjector, log: list[BaseException]) -> None:
    """Calls from the host and the device and a lease; every error of theirs goes to the log."""
    inner = device.simulated

    async def call(model: aiotrt.Model, value: float) -> None:
        assert right(await model(frame(value)), value)

    async def device_call(model: aiotrt.Model, value: float) -> None:
        assert right(inner.read(await model(inner.tensor(frame(value)))), value)

    async def lease(model: aiotrt.Model, value: float) -> None:
        async with model.lease([SHAPE], outputs="numpy") as slot:
            slot.inputs[0][...] = frame(value)
            assert right(await slot.replay(), value)
            consumer = inner.stream()
            with inner.use(consumer):
                copies.append((value, slot.outputs[0].tensor.clone()))
            slot.consumed(consumer)

    copies: list[tuple[float, torch.Tensor]] = []
    async with load(device, slots=1, warmup=frame(0)) as model:
        jobs = [call(model, 1.0), device_call(model, 2.0), lease(model, 3.0), lease(model, 4.0), call(model, 5.0)]
        for result in await asyncio.gather(*jobs, return_exceptions=True):
            if isinstance(result, BaseException):
                log.append(result)
        if model.is_ready:  # whatever happened, it is usable, and its slot is not lost
            await call(model, 6.0)
            await settle(model, 1)
            await asyncio.get_running_loop().run_in_executor(None, inner.synchronize)
            assert all(right(inner.read(copy), value) for value, copy in copies)


def make() -> SimulatedDevice:
    return SimulatedDevice(3)


POINTS = list(fault_points(lambda device: run_simulated(everything(device, []), device), make))


def strikes(*kinds: FaultKind) -> list[Fault]:
    """The points of these kinds; of queries, which are many and alike, every fiftieth."""
    return [point for point in POINTS if point.kind in kinds and (point.verb != "query" or point.use % 50 == 1)]


@pytest.mark.parametrize("fault", strikes(FaultKind.STICKY, FaultKind.HANG), ids=str)
def test_a_fault_reaches_everyone_and_nothing_hangs(fault: Fault) -> None:
    device = FaultInjector(make(), fault)
    log: list[BaseException] = []
    try:
        run_simulated(everything(device, log), device)
    except aiotrt.AiotrtError as error:  # while it was loaded
        log.append(error)
    assert device.happened == [fault]
    assert all(isinstance(error, (aiotrt.DeviceError, aiotrt.ModelBrokenError)) for error in log), log
    if fault.kind is FaultKind.HANG:
        assert all(isinstance(error, (aiotrt.DeviceHangError, aiotrt.ModelBrokenError)) for error in log), log


@pytest.mark.parametrize("fault", strikes(FaultKind.PASSING, FaultKind.MEMORY, FaultKind.CAPTURE), ids=str)
def test_a_passing_fault_fails_at_most_one_call_and_loses_no_slot(fault: Fault) -> None:
    device = FaultInjector(make(), fault)
    log: list[BaseException] = []
    try:
        run_simulated(everything(device, log), device)
    except aiotrt.AiotrtError as error:
        log.append(error)
    assert device.happened == [fault]
    assert len(log) <= 1, log
    assert all(isinstance(error, aiotrt.AiotrtError) for error in log), log
