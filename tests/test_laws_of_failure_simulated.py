"""When something fails: everybody is told, at once, nothing hangs, and what can go on goes on.

Every point of failure is enumerated: `fault_points` lists each use of each device call in a scenario; each is made to fail
in each way. The rest are failures that are not a call's: work that never ends, clocks that jump, loops that stall or close.
On a simulated device, and audited, as in `test_laws_simulated`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import warnings
from collections.abc import Awaitable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch

import aiotrt
from aiotrt.devices import Event
from aiotrt.runtime import launch as submission
from aiotrt.runtime import memory
from aiotrt.runtime.programs import Program
from aiotrt.runtime.request import Request, Slot
from aiotrt.runtime.slots import State
from aiotrt.testing import Fault, FaultInjector, FaultKind, SimulatedDevice, VirtualLoop, Workers, fault_points
from tests.simulated import Audit, Striker, held_streams, run_simulated
from tests.test_laws_of_owners_simulated import GROUPS, streams_of
from tests.test_laws_simulated import SHAPE, load, right, settle, under_schedules
from tests.tools import Affine, count, executor_of, frame, turns


def fault() -> aiotrt.DeviceError:
    return aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress")


# Calls of the device that fail, each of them...


async def rest(device: FaultInjector, log: list[type[BaseException]]) -> None:
    """What `test_laws_simulated.everything` does not do: maps, forgotten leases, evictions, pieces, and no graph at all."""
    inner = device.simulated

    def finish(y: torch.Tensor) -> torch.Tensor:
        return y + (0 if y.sum().item() >= 0 else 1)  # cannot be captured, so the model is captured in pieces

    async def told(what: Awaitable[None]) -> None:
        try:
            await what
        except aiotrt.AiotrtError as error:
            log.append(type(error))  # not the error: its traceback would keep a lease that is to be forgotten

    async def mapped(model: aiotrt.Model) -> None:
        seen = 0
        async for result in model.map([frame(value) for value in range(3)], in_flight=2):
            assert right(result, seen)
            seen += 1

    async def forgets(model: aiotrt.Model) -> None:
        slot = await model.lease([SHAPE]).__aenter__()
        slot.inputs[0][...] = frame(1)
        reader = inner.stream()
        reader.wait(slot.launch())
        with inner.use(reader):
            slot.outputs[0].tensor.clone()

    async def launches(model: aiotrt.Model) -> None:
        async with model.lease([SHAPE], outputs="numpy") as slot:
            slot.inputs[0][...] = frame(2)
            assert right(await slot.replay(), 2)
            slot.inputs[0][...] = inner.tensor(frame(3))
            assert right(await slot.replay(), 3)

    async def call(model: aiotrt.Model, rows: int) -> None:
        assert right(await model(frame(rows, (rows, 3))), rows)

    async def device_call(model: aiotrt.Model) -> None:
        x = inner.tensor(frame(4))
        x._trt_reuse_as_input_buffer = True  # type: ignore[attr-defined]
        assert right(inner.read(await model(x)), 4)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for options in ({"graph_cache_entries": 2}, {"postprocess": finish}, {"graphs": False}):
            async with load(device, slots=1, warmup=frame(0), **options) as model:
                jobs = [mapped(model), call(model, 1), device_call(model), launches(model), call(model, 3)]
                if "graph_cache_entries" in options:
                    jobs.insert(3, forgets(model))
                await asyncio.gather(*map(told, jobs))
                if model.is_ready:
                    await call(model, 2)
                    await settle(model, 1)


def run_rest(device: FaultInjector) -> list[type[BaseException]]:
    log: list[type[BaseException]] = []
    try:
        run_simulated(rest(device, log), device)
    except aiotrt.AiotrtError as error:  # while it was loaded, or by the last call
        log.append(type(error))
    return log


def make() -> SimulatedDevice:
    return SimulatedDevice(5)


def fails_nowhere(device: FaultInjector) -> None:
    log = run_rest(device)
    assert not log, log


POINTS = list(fault_points(fails_nowhere, make))


#: Queries are many, and each is one more "not yet" to the next: of those after the hundredth, every twenty-fifth.
POINTS = [point for point in POINTS if point.verb != "query" or point.use <= 100 or point.use % 25 == 1]


def points(verb: str, kind: FaultKind) -> list[Fault]:
    return [point for point in POINTS if (point.verb, point.kind) == (verb, kind)]


def fails(fault: Fault) -> list[type[BaseException]]:
    """Let it happen, and return what callers were told."""
    device = FaultInjector(make(), fault)
    try:
        log = run_rest(device)
    except BaseException as error:
        error.add_note(f"with the fault {fault}")
        raise
    assert device.happened == [fault]
    return log


def a_sticky_fault_reaches_everyone_whatever_they_do(fault: Fault) -> None:
    log = fails(fault)
    assert log, fault
    assert all(issubclass(kind, (aiotrt.DeviceError, aiotrt.ModelBrokenError)) for kind in log), (fault, log)


def work_that_never_ends_is_reported_or_in_nobodys_way(fault: Fault) -> None:
    log = fails(fault)
    assert all(issubclass(kind, (aiotrt.DeviceHangError, aiotrt.ModelBrokenError)) for kind in log), (fault, log)


def a_passing_fault_fails_one_caller_and_loses_nothing(fault: Fault) -> None:
    log = fails(fault)
    assert len(log) <= 1, (fault, log)


#: By kind of fault: what must hold.
FAULT_LAWS = {
    FaultKind.STICKY: a_sticky_fault_reaches_everyone_whatever_they_do,
    FaultKind.HANG: work_that_never_ends_is_reported_or_in_nobodys_way,
    FaultKind.PASSING: a_passing_fault_fails_one_caller_and_loses_nothing,
    FaultKind.MEMORY: a_passing_fault_fails_one_caller_and_loses_nothing,
    FaultKind.CAPTURE: a_passing_fault_fails_one_caller_and_loses_nothing,
}


#: Every call and every kind is in the plain run, with a quarter of the uses.
SHARES = 4


@pytest.mark.parametrize("group", range(SHARES))
@pytest.mark.parametrize(("verb", "kind"), sorted({(point.verb, point.kind) for point in POINTS}, key=str), ids=str)
def test_every_use_of_every_call_fails_in_every_way(verb: str, kind: FaultKind, group: int) -> None:
    for fault in points(verb, kind)[group::SHARES]:
        FAULT_LAWS[kind](fault)


@pytest.mark.parametrize("group", range(10))
def test_whoever_is_told_first_finds_every_model_of_the_device_broken(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        graphs = choose.random() < 0.7
        async with (
            load(striker, slots=1, graphs=graphs, warmup=frame(0)) as model,
            load(striker, slots=1, warmup=frame(0)) as other,
        ):

            async def told(what: Awaitable[Any]) -> None:
                try:
                    await what
                except (aiotrt.DeviceError, aiotrt.ModelBrokenError):
                    assert not model.is_ready
                    assert not other.is_ready
                    with pytest.raises(aiotrt.ModelBrokenError) as caught:
                        await other(frame(1))
                    assert isinstance(caught.value.__cause__, aiotrt.DeviceError)

            async def lease() -> None:
                async with model.lease([SHAPE]) as slot:
                    slot.inputs[0][...] = frame(1)
                    await told(slot.replay())
                    if model.is_ready and graphs:
                        reader = device.stream()
                        reader.wait(slot.launch())
                        with device.use(reader):
                            slot.outputs[0].tensor.clone()
                        slot.consumed(reader)

            async def device_call() -> None:
                await model(device.tensor(frame(1)))

            striker.strike(
                choose.choice(
                    ["launch" if graphs else "run", "copy", "record", "wait", "event", "query", "call", "capture"]
                ),
                FaultKind.STICKY,
                after=choose.choice([0, 1, 2, 3, 5, 8, 13]),
            )
            jobs = [lease, lambda: model(frame(1)), device_call, lease]
            await asyncio.gather(*[told(job()) for job in jobs])

    under_schedules(group, program)


@pytest.mark.parametrize("second", [FaultKind.PASSING, FaultKind.STICKY])
@pytest.mark.parametrize("what", ["call", "launch", "replay"])
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_a_failed_launch_whose_end_cannot_be_seen_costs_the_model(
    group: int, graphs: bool, what: str, second: FaultKind
) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with (
            load(striker, slots=1, graphs=graphs, warmup=frame(0)) as model,
            load(striker, slots=1, warmup=frame(0)) as other,
        ):
            await asyncio.sleep(0.1)
            launch = "launch" if graphs else "run"
            if what == "call":
                striker.strike(launch, FaultKind.PASSING)
                striker.strike("record", second)
                failing = asyncio.ensure_future(model(frame(1)))
                waiting = asyncio.ensure_future(model(frame(3)))
                with pytest.raises(aiotrt.AiotrtError):
                    await failing
                with pytest.raises((aiotrt.DeviceError, aiotrt.ModelBrokenError)):
                    await waiting
            else:
                async with model.lease() as slot:
                    slot.inputs[0][...] = frame(1)
                    waiting = asyncio.ensure_future(model(frame(3)))
                    await turns()
                    striker.strike(launch, FaultKind.PASSING)
                    striker.strike("record", second)
                    with pytest.raises(aiotrt.AiotrtError):
                        if what == "launch":
                            slot.launch()
                        else:
                            await slot.replay()
                    with pytest.raises(aiotrt.DeviceError):
                        await waiting
            assert not model.is_ready
            assert other.is_ready == (second is FaultKind.PASSING)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_lease_that_could_not_be_left_has_ended_all_the_same(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with load(striker, slots=1, warmup=frame(0)) as model:
            slot = await model.lease().__aenter__()
            slot.inputs[0][...] = frame(1)
            await slot.replay()
            striker.strike("record", FaultKind.PASSING)
            with pytest.raises(aiotrt.EngineError, match="while its consumers were recorded"):
                await slot.__aexit__(None, None, None)
            with pytest.raises(aiotrt.UsageError, match="has ended"):
                slot.launch()
            assert right(await model(frame(2)), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_lease_that_could_not_be_entered_can_be_tried_again(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with load(striker, slots=1, warmup=frame(0)) as model:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                await slot.replay()
            lease = model.lease()
            striker.strike("wait", FaultKind.PASSING)
            with pytest.raises(aiotrt.EngineError, match="while a lease was entered"):
                await lease.__aenter__()
            with pytest.raises(aiotrt.UsageError, match="has not been entered"):
                lease.launch()
            async with lease as slot:
                slot.inputs[0][...] = frame(2)
                assert right(device.read(await slot.replay()), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_fault_found_by_another_thread_reaches_everyone_though_the_device_never_answers(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await aiotrt.load(Affine(), device=device, slots=4, warmup=frame(0), hang_timeout=None)
        slot = await model.lease().__aenter__()
        slot.inputs[0][...] = frame(1)
        with pytest.warns(ResourceWarning):
            await model.lease().__aenter__()
            gc.collect()
        with held_streams(device, *streams_of(model)):
            told: list[asyncio.Future[Any]] = [asyncio.ensure_future(slot.replay())]
            told += [asyncio.ensure_future(model(frame(value, (1, value + 1)))) for value in range(4)]
            told += [asyncio.ensure_future(model.lease().__aenter__()), asyncio.ensure_future(model(frame(9)))]
            for _ in range(choose.choice([1, 5, 50])):
                await asyncio.sleep(0)
            await asyncio.get_running_loop().run_in_executor(None, device.fail, fault())
            await turns()
            for future in told:
                assert future.done(), future
                assert isinstance(future.exception(), (aiotrt.DeviceError, aiotrt.ModelBrokenError)), future
            with pytest.raises(aiotrt.ModelBrokenError):
                slot.launch()
            await slot.__aexit__(None, None, None)
            await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_whoever_closes_is_woken_when_the_device_breaks(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await aiotrt.load(Affine(), device=device, slots=1, warmup=frame(0), hang_timeout=None)
        with held_streams(device, *streams_of(model)):
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            closing = [asyncio.ensure_future(model.aclose()) for _ in range(2)]
            await turns()
            device.fail(fault())
            await asyncio.gather(*closing)
            with pytest.raises(aiotrt.DeviceError):
                await call

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_model_whose_warm_up_fails_is_closed(group: int) -> None:
    def never(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("never")

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = aiotrt.load(never, device=device, slots=3, warmup=frame(0))
        with pytest.raises(aiotrt.EngineError, match="never"):
            _ = await model
        with pytest.raises(aiotrt.ModelClosedError):
            _ = await model

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_of_a_warm_up_that_fails_on_every_slot_one_failure_is_raised_and_the_others_are_seen(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        striker.strike("capture", FaultKind.STICKY)
        with pytest.raises(aiotrt.DeviceError):
            _ = await load(striker, slots=3, warmup=frame(0))
        del striker
        gc.collect()  # an error that nobody has seen is told to the loop now, and by that to the audit

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_model_that_cannot_be_opened_is_closed(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        striker.strike("event", FaultKind.PASSING)
        model = load(striker)
        nothing = aiotrt.load("nowhere.onnx", device=device)
        for missing in (model, nothing):
            with pytest.raises(aiotrt.AiotrtError):
                _ = await missing
            with pytest.raises(aiotrt.ModelClosedError):
                _ = await missing

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_device_that_was_broken_before_is_refused(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        device.fail(fault())
        with pytest.raises(aiotrt.ModelBrokenError, match="is broken"):
            _ = await load(device)

    under_schedules(group, program)


@pytest.mark.parametrize("when", ["while it is prepared", "while it is copied"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_worker_thread_that_comes_back_to_a_broken_model_changes_nothing(group: int, when: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=1, **({} if "prepared" in when else {"warmup": frame(0), "graphs": False}))
        call = asyncio.ensure_future(model(frame(1)))
        while count(model, State.PREPARING) == 0:
            await asyncio.sleep(0)
        executor_of(model).break_down(fault())
        with pytest.raises(aiotrt.DeviceError):
            await call
        await asyncio.sleep(1.0)
        assert count(model, State.BROKEN) == 1
        await model.aclose()

    under_schedules(group, program)


# Errors of one call's own, on the loop...


@pytest.mark.parametrize("group", GROUPS)
def test_who_reshapes_an_array_that_is_in_line_fails_alone(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            rows = choose.choice([2, 3])  # of the latter there is no program yet
            array = frame(2, (rows, 3))
            with held_streams(device, *streams_of(model)):
                first = asyncio.ensure_future(model(frame(1)))
                bad, third = (asyncio.ensure_future(model(x)) for x in (array, frame(3)))
                await turns()
                array.resize((rows * 3,), refcheck=False)
            assert right(await first, 1)
            with pytest.raises(aiotrt.EngineError, match="ValueError while its inputs were copied"):
                await bad
            assert right(await third, 3)
            await settle(model, 1)
            assert model.statistics().failed == 1

    under_schedules(group, program)


@pytest.mark.parametrize("when", ["before its launch", "after its launch", "by a fault"])
@pytest.mark.parametrize("group", GROUPS)
def test_an_error_that_nobody_foresaw_is_told_and_takes_nobody_else_with_it(group: int, when: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=1, warmup=frame(0))
        executor = executor_of(model)
        begin = executor.begin

        def beginning(slot: Slot, request: Request) -> None:
            host = request.arguments[0].host
            if host is None or host[0, 0] != 2:
                begin(slot, request)
                return
            if when == "after its launch":
                begin(slot, request)
            raise fault() if when == "by a fault" else KeyError("nobody foresaw this")

        with mock.patch.object(executor, "begin", beginning):
            calls = [asyncio.ensure_future(model(frame(value))) for value in range(1, 5)]
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert right(results[0], 1), "the one that had the slot before"
        assert isinstance(results[1], aiotrt.EngineError if when == "before its launch" else aiotrt.DeviceError)
        if when == "before its launch":
            assert "Affine raised KeyError before it was launched" in str(results[1])
            assert right(results[2], 3)
            assert right(results[3], 4)
            await settle(model, 1)
            assert model.statistics().failed == 1
        else:  # the end of what is on the device will not be seen
            assert all(isinstance(result, aiotrt.DeviceError) for result in results[2:])
            assert not model.is_ready
        await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_if_no_thread_can_be_started_one_call_fails_and_nothing_is_lost(group: int) -> None:
    """A pool refuses a job while it has no thread, and so never the retirement of a program: a thread has built that."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        submit = Workers.submit
        strikes = set(choose.sample(range(30), 8))
        uses = itertools.count()

        def submitting(self: Workers, function: Any, *args: Any) -> Any:
            if function.__name__ == "run" and next(uses) in strikes:
                raise aiotrt.ResourceError("no worker thread could be started: can't start new thread")
            return submit(self, function, *args)

        slots = choose.randint(1, 2)
        async with load(device, slots=slots, graph_cache_entries=choose.choice([1, 4])) as model:
            with (
                mock.patch.object(Workers, "submit", submitting),
                mock.patch("aiotrt.runtime.executor.COPY_ON_LOOP_BYTES", choose.choice([0, 1 << 20])),
            ):
                calls = [asyncio.ensure_future(model(frame(i, (1 + i % 3, 3)))) for i in range(8)]
                results = await asyncio.gather(*calls, return_exceptions=True)
                await settle(model, slots)
            for i, result in enumerate(results):
                if isinstance(result, BaseException):
                    assert isinstance(result, aiotrt.ResourceError)
                    assert "can't start new thread" in str(result)
                else:
                    assert right(result, i)
            assert right(await model(frame(9)), 9)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_evicted_for_memory_waits_for_its_readers_though_its_slot_is_taken_meanwhile(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        awaited: dict[int, list[Event]] = {}

        def retiring(program: Program, gates: Sequence[Event]) -> None:
            awaited[program.slot] = list(gates)
            submission.retire(program, gates)

        async with load(striker, slots=2, warmup=frame(0)) as model:
            executor = executor_of(model)
            work, gates = executor.work, dict[int, list[Event]]()

            def working(*job: Any) -> None:
                work(*job)
                if executor.counters.evictions and not gates:  # before the thread begins, whoever takes the slot opens them
                    for slot in executor.slots:
                        gates[slot.index] = list(slot.gates)
                        slot.gates.clear()

            reader = device.stream()
            async with model.lease(), model.lease() as first:
                first.inputs[0][...] = frame(3)
                first.launch()
                first.consumed(reader)
            striker.strike("empty", FaultKind.MEMORY)
            with mock.patch.object(executor, "work", working), mock.patch("aiotrt.runtime.executor.retire", retiring):
                assert right(await model(frame(1, (5, 5))), 1)
            assert awaited
            assert all(awaited.values())
            assert all(gates[slot] == awaited[slot] for slot in awaited)

    under_schedules(group, program)


# Work that never ends...


@pytest.mark.parametrize("group", GROUPS)
def test_work_that_never_ends_is_a_hang_of_its_model_alone_and_keeps_its_memory(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as other:
            model = await load(device, slots=2, warmup=frame(0))
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                streams = streams_of(model)
                with held_streams(device, *streams):
                    told = [asyncio.ensure_future(model(frame(value))) for value in range(3)]
                    if choose.random() < 0.5:
                        told.append(asyncio.ensure_future(slot.replay()))
                    for future in told:
                        with pytest.raises(aiotrt.DeviceHangError, match="hang_timeout=1 s"):
                            await future
                    assert not model.is_ready
                    assert right(await other(frame(1)), 1)
                    await slot.__aexit__(None, None, None)
                    await model.aclose()
                    del model, slot, told, future
                    gc.collect()
                    device.check()
            # What the device still did when it went on after all went to memory that was kept.
            await asyncio.sleep(1.0)
            device.check()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_readers_who_never_end_are_a_hang_when_the_model_closes(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=3, warmup=frame(0))
        readers = [device.stream() for _ in range(3)]
        with held_streams(device, *readers):
            async with contextlib.AsyncExitStack() as stack:
                for reader in readers:
                    slot = await stack.enter_async_context(model.lease())
                    slot.inputs[0][...] = frame(1)
                    await slot.replay()
                    with device.use(reader):
                        slot.outputs[0].tensor.clone()
                    slot.consumed(reader)
            await model.aclose()
            assert executor_of_closed(model).broken is not None

    under_schedules(group, program)


def executor_of_closed(model: aiotrt.Model) -> Any:
    """The executor that this model had: a broken one is kept."""
    kept = [thing for thing in memory._kept if hasattr(thing, "broken")]
    assert kept
    return kept[-1]


@pytest.mark.parametrize("group", GROUPS)
def test_a_wait_that_is_given_up_leaves_nothing_to_look_at(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        stream = device.stream()
        with held_streams(device, stream):
            event = stream.record()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(choose.choice([1e-5, 1e-2])):
                    await aiotrt.wait(event)
            await asyncio.sleep(0.1)
            Audit(device).end()
        await aiotrt.wait(event)

    under_schedules(group, program)


# Clocks and loops...


@pytest.mark.parametrize("jump", [3600.0, -50.0, 0.5, -1e-4])
@pytest.mark.parametrize("group", GROUPS)
def test_a_clock_that_jumps_is_no_hang_and_loses_no_wake_up(group: int, jump: float) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            calls = [asyncio.ensure_future(model(frame(value))) for value in range(6)]
            for _ in range(choose.choice([1, 5, 20])):
                await asyncio.sleep(0)
            device.time.now += jump
            assert all(right(result, value) for value, result in enumerate(await asyncio.gather(*calls)))
            assert right(await model(frame(1)), 1)

    under_schedules(group, program)


@pytest.mark.parametrize("stuck", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_a_loop_that_stalls_is_no_hang_unless_the_device_is(group: int, stuck: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            with held_streams(device, *streams_of(model)[:stuck]):
                calls = [asyncio.ensure_future(model(frame(value))) for value in range(6)]
                for _ in range(choose.choice([1, 5, 20])):
                    await asyncio.sleep(0)
                device.advance(3600.0)  # as a callback that takes an hour
                results = await asyncio.gather(*calls, return_exceptions=True)
            if stuck:
                assert any(isinstance(result, aiotrt.DeviceHangError) for result in results), results
            else:
                assert all(right(result, value) for value, result in enumerate(results)), results

    under_schedules(group, program)


async def cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


@pytest.mark.parametrize("seed", range(20))
def test_a_loop_that_is_closed_under_pending_work_frees_nothing_that_is_in_use(seed: int) -> None:
    device = SimulatedDevice(seed)
    choose = random.Random(seed)
    kept = len(memory._kept)

    async def main() -> aiotrt.Model:
        model = await load(device, slots=3, warmup=frame(0))
        slot = await model.lease().__aenter__()
        slot.inputs[0][...] = frame(1)
        slot.launch()
        calls = [asyncio.ensure_future(model(frame(value, (1, 1 + value % 2)))) for value in range(4)]
        for _ in range(choose.choice([1, 3, 10, 30])):
            await asyncio.sleep(0)
        assert all(not call.done() or call.exception() is None for call in calls)
        return model

    with warnings.catch_warnings(), device.intercepting():
        warnings.simplefilter("ignore")
        loop = VirtualLoop(device)
        model: aiotrt.Model | None = loop.run_until_complete(main())
        loop.run_until_complete(cancel_all())
        assert model is not None
        busy = count(model, State.FREE) < 3
        loop.close()
        if choose.random() < 0.5:
            device.run_until_idle()
        model = None
        gc.collect()
        assert len(memory._kept) > kept or not busy
        device.run_until_idle()
        assert len(memory._kept) == kept  # the device is done with it
        device.time.end()
        device.check()
    del memory._kept[kept:]
