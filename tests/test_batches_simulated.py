"""Dynamic batching on a simulated device: adversarial schedules, cancelled at every step, failing at every device call.

As in `test_laws_simulated`, every run also passes under the hazard detector and on a loop where nothing sleeps.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.testing import Fault, FaultInjector, FaultKind, Schedule, SimulatedDevice, explore, fault_points
from tests.simulated import held_streams, run_simulated
from tests.test_laws_simulated import GROUPS, OVERLAP, SHAPE, right, settle, under_schedules
from tests.tools import Affine, executor_of, frame, turns


def load(device: SimulatedDevice | FaultInjector, *, slots: int = 2, max_queue: int | None = 1024, graphs: bool = True,
         warmup: object = (), source: Any = None, fixed: bool = False, **batching: Any) -> aiotrt.Model:  # fmt: skip
    model: aiotrt.Model = aiotrt.load(
        Affine() if source is None else source, device=device, slots=slots, max_queue=max_queue, graphs=graphs,
        warmup=warmup, hang_timeout=1.0, overlap=OVERLAP.get(), batching=aiotrt.Batching(**batching),
        signatures="fixed" if fixed else "any",
    )  # fmt: skip
    return model


def simulated(program: Callable[[SimulatedDevice], Coroutine[Any, Any, None]], seed: int = 1) -> None:
    device = SimulatedDevice(seed)
    run_simulated(program(device), device)


def balanced(model: aiotrt.Model) -> bool:
    """Every item that was taken in has ended in one way."""
    s = model.statistics()
    assert model._gatherer is not None
    loop: Any = asyncio.get_running_loop()
    timers = [timer for timer in loop._scheduled if not timer.cancelled()]
    assert all(timer._callback != model._gatherer._ring for timer in timers), "a deadline outlives its item"
    evicted = s.rejected  # those that made way were taken in before
    ended = s.completed + s.failed + s.cancelled + s.expired
    return s.waiting == 0 and ended <= s.submitted <= ended + evicted


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_concurrent_items_get_their_own_results(group: int, stack: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 3)
        warmup = frame(0) if choose.random() < 0.5 else ()
        async with load(device, slots=slots, max_size=choose.randint(1, 5), warmup=warmup, stack=stack) as model:
            kept: list[tuple[float, torch.Tensor]] = []

            async def call(value: float) -> None:
                for _ in range(choose.choice([0, 0, 1, 5, 50])):
                    await asyncio.sleep(0)
                priority = choose.choice([None, 0, 1])
                kind = choose.choice(["numpy", "torch", "device", "ready", "shape"])
                if kind == "numpy":
                    assert right(await model(frame(value), priority=priority), value)
                elif kind == "torch":
                    assert right(await model(torch.full(SHAPE, float(value))), value)
                elif kind == "shape":
                    result = await model(frame(value, (1, choose.randint(1, 2))))
                    assert right(result, value)
                else:
                    producer = device.stream()
                    with device.use(producer):
                        x = device.tensor(frame(value))
                    if kind == "ready":
                        x._trt_ready_event = producer.record()  # type: ignore[attr-defined]
                    else:
                        device.current_stream().wait(producer.record())
                    result = await model(x, priority=priority)
                    if kind == "ready":
                        producer.wait(x._trt_consumed_event)  # type: ignore[attr-defined]
                        with device.use(producer):
                            x.fill_(-1.0)
                    with device.use():
                        kept.append((value, result.clone()))

            await asyncio.gather(*[call(value) for value in range(25)])
            assert model.statistics().completed == 25
            assert sum(size * n for size, n in model.statistics().batches.items()) == (25 if stack else 0)
            await settle(model, slots)
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert all(right(device.read(copy), value) for value, copy in kept)
            assert balanced(model)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_callers_on_streams_of_their_own_share_a_batch(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_size=4, warmup=frame(0)) as model:
            totals: list[tuple[float, torch.Tensor]] = []
            streams = [device.stream() for _ in range(3)]

            assert model._gatherer is not None
            submit = model._gatherer.submit

            async def call(value: float) -> None:
                stream = choose.choice(streams)
                with device.use(stream):  # current when the item is submitted, and not for a moment longer
                    item = submit((device.tensor(frame(value)),), {})
                result = await item
                with device.use(stream):
                    totals.append((value, result * 1))
                    del result  # its memory goes back to this stream, and no other
                    if choose.random() < 0.5:
                        device.tensor(frame(-1))

            await asyncio.gather(*[call(value) for value in range(10)])
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert all(right(device.read(total), value) for value, total in totals)

    under_schedules(group, program)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_items_are_cancelled_expire_and_make_way_at_any_step(group: int, captured: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 2)
        model = await load(
            device, slots=slots, graphs=captured, max_queue=choose.choice([None, 0, 3, 8]), max_size=choose.randint(1, 4),
            overload=choose.choice(["wait", "reject", "drop_oldest", "latest"]), patience=choose.randint(1, 3),
            max_delay=choose.choice([0.0, 0.0, 1e-4]), warmup=choose.choice([(), frame(0)]),
        )  # fmt: skip

        async def call(value: float) -> None:
            deadline = choose.choice([None, None, 0.0, choose.uniform(0, 2e-3), 10.0])
            x = choose.choice([frame(value), frame(value, (1, 2)), device.tensor(frame(value))])
            result = await model(x, deadline=deadline, priority=choose.choice([0, 1]))
            if isinstance(result, torch.Tensor):
                result = device.read(result)
            assert right(result, value)

        tasks = [asyncio.ensure_future(call(float(value))) for value in range(30)]
        for task in choose.sample(tasks, len(tasks)):
            for _ in range(choose.choice([0, 0, 1, 2, 5, 20, 100])):
                await asyncio.sleep(0)
            if choose.random() < 0.4:
                task.cancel()
        if choose.random() < 0.3:
            await model.aclose(drain=choose.random() < 0.5)
        ways = (asyncio.CancelledError, aiotrt.DeadlineError, aiotrt.QueueFullError, aiotrt.ModelClosedError)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert result is None or isinstance(result, ways), result
        if model.is_ready:
            await settle(model, slots)
            assert balanced(model)
            assert right(await model(frame(99)), 99)
        await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("group", range(3))
def test_cancelled_at_every_step_of_the_loop(group: int) -> None:
    """One of three items of a batch, and then all of them, at each iteration from submission to result."""
    for everybody in (False, True):
        step = group + 1
        while True:
            done = []

            async def program(device: SimulatedDevice, step: int = step, everybody: bool = everybody) -> None:
                async with load(device, slots=1, max_size=4, warmup=frame(0)) as model:
                    tasks = [asyncio.ensure_future(model(frame(value))) for value in range(3)]
                    for _ in range(step):
                        await asyncio.sleep(0)
                    done.append(all(task.done() for task in tasks))  # noqa: B023
                    for task in tasks if everybody else tasks[1:2]:
                        task.cancel()
                    for value, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
                        assert isinstance(result, asyncio.CancelledError) or right(result, value)
                        assert everybody or value == 1 or right(result, value)
                    await settle(model, 1)
                    assert balanced(model)
                    assert right(await model(frame(9)), 9)

            simulated(program)
            if done == [True]:
                break
            step += 3
        assert step > 5


def test_deadlines_in_line_and_on_the_device() -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, max_size=2, warmup=frame(0)) as model:
            loop = asyncio.get_running_loop()
            began = loop.time()
            took: dict[str, float] = {}

            async def call(name: str, deadline: float | None) -> object:
                try:
                    return await model(frame(1), deadline=deadline)
                finally:
                    took[name] = loop.time() - began

            with held_streams(device, executor_of(model).slots[0].stream):
                flying = [asyncio.ensure_future(call("device", 0.02)), asyncio.ensure_future(call("neighbour", None))]
                await turns()
                waiting = [asyncio.ensure_future(call("line", 0.01)), asyncio.ensure_future(call("patient", 5.0))]
                await turns()
                with pytest.raises(aiotrt.DeadlineError, match=r"there was no result within deadline=0.01 s"):
                    await waiting[0]
                with pytest.raises(TimeoutError):
                    await flying[0]
                assert model.statistics().expired == 2
                assert model.statistics().waiting == 1
            assert right(await flying[1], 1)
            assert right(await waiting[1], 1)
            assert 0.01 <= took["line"] < 0.011
            assert 0.02 <= took["device"] < 0.021
            assert model.statistics().batches == {1: 1, 2: 1}, "the expired one never went"
            assert balanced(model)

    simulated(program)


def test_the_pace_is_learned_in_virtual_time() -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, max_size=2, warmup=frame(0)) as model:
            assert model._gatherer is not None
            loop, pace = asyncio.get_running_loop(), model._gatherer._pace
            began = loop.time()
            for value in range(40):
                assert right(await model(frame(value)), value)
            assert 0 < pace._mean < (loop.time() - began) / 10
            assert not pace._running

    simulated(program)


def test_max_delay_in_virtual_time() -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, max_size=3, max_delay=0.01, warmup=frame(0)) as model:
            loop = asyncio.get_running_loop()

            async def timed(number: int, **options: Any) -> float:
                began = loop.time()
                await asyncio.gather(*[model(frame(value), **options) for value in range(number)])
                return loop.time() - began

            assert 0.01 <= await timed(1) < 0.012, "alone, it is held"
            assert await timed(3) < 0.005, "a full batch is not"
            assert 0.004 <= await timed(2, deadline=0.008) < 0.008, "nor one that has no time for it"
            assert model.statistics().batches == {1: 1, 2: 1, 3: 1}

    simulated(program)


def test_a_load_of_urgent_items_does_not_starve_the_others() -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, max_size=2, patience=3, max_queue=None, warmup=frame(0)) as model:
            served: list[int] = []

            async def urgent() -> None:
                while len(served) < 4:
                    await model(frame(1), priority=0)

            async def patient(shape: tuple[int, ...]) -> None:
                await model(frame(2, shape), priority=1)
                served.append(sum(model.statistics().batches.values()))

            clients = [asyncio.ensure_future(urgent()) for _ in range(8)]
            await turns(20)
            await asyncio.gather(*[patient((1 + i, 2)) for i in range(4)])
            await asyncio.gather(*clients)
            gaps = np.diff([0, *served])
            assert max(gaps[1:]) <= 3 + 2, served

    simulated(program)


def test_three_items_under_every_schedule() -> None:
    def scenario(schedule: Schedule) -> None:
        device = SimulatedDevice(schedule)

        async def main() -> None:
            async with load(device, slots=1, max_size=2, warmup=frame(0)) as model:
                results = await asyncio.gather(*[model(frame(value)) for value in range(3)])
                assert all(map(right, results, range(3)))

        run_simulated(main(), device)

    explore(scenario, limit=500)


def test_ten_thousand_items() -> None:
    async def program(device: SimulatedDevice) -> None:
        choose = random.Random(2)
        async with load(device, slots=2, max_size=16, max_queue=None, warmup=frame(0)) as model:
            tasks = [asyncio.ensure_future(model(frame(value))) for value in range(10_000)]
            await turns(3)
            for i in choose.sample(range(10_000), 9_000):
                tasks[i].cancel()
                if choose.random() < 0.02:
                    await asyncio.sleep(0)
            for value, result in enumerate(await asyncio.gather(*tasks, return_exceptions=True)):
                assert isinstance(result, asyncio.CancelledError) or right(result, value)
            await settle(model, 2)
            assert balanced(model)

    simulated(program)


# Faults...


async def everything(device: FaultInjector, log: list[BaseException]) -> None:
    """Batches from the host and the device; every error goes to the log."""
    inner = device.simulated

    async def call(value: float) -> None:
        assert right(await model(frame(value)), value)

    async def device_call(value: float) -> None:
        assert right(inner.read(await model(inner.tensor(frame(value)), deadline=30.0)), value)

    async with load(device, slots=1, max_size=2, warmup=frame(0)) as model:
        jobs = [call(1.0), call(2.0), call(3.0), device_call(4.0), device_call(5.0)]
        for result in await asyncio.gather(*jobs, return_exceptions=True):
            if isinstance(result, BaseException):
                log.append(result)
        if model.is_ready:  # whatever happened, it is usable, and its slot is not lost
            await call(6.0)
            await settle(model, 1)
        assert balanced(model)


def make() -> SimulatedDevice:
    return SimulatedDevice(3)


POINTS = list(fault_points(lambda device: run_simulated(everything(device, []), device), make))


def strikes(*kinds: FaultKind) -> list[Fault]:
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


@pytest.mark.parametrize("fault", strikes(FaultKind.PASSING, FaultKind.MEMORY, FaultKind.CAPTURE), ids=str)
def test_a_passing_fault_fails_at_most_one_batch_and_loses_no_slot(fault: Fault) -> None:
    device = FaultInjector(make(), fault)
    log: list[BaseException] = []
    try:
        run_simulated(everything(device, log), device)
    except aiotrt.AiotrtError as error:
        log.append(error)
    assert device.happened == [fault]
    assert len(log) <= 2, log  # the members of one batch
    assert all(isinstance(error, aiotrt.AiotrtError) for error in log), log
