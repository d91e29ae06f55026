"""One owner each: the line, the counts, leases that have ended, and calls from where none may come.

On a simulated device under adversarial schedules, and audited, as in `test_laws_simulated`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import Stream
from aiotrt.runtime.slots import State
from aiotrt.testing import FaultKind, SimulatedDevice
from tests.simulated import Striker, held_streams
from tests.test_laws_simulated import SHAPE, load, right, settle, under_schedules
from tests.tools import count, executor_of, frame, turns, until

#: Fewer than there: what these laws forbid does not hang on one rare order.
GROUPS = range(2)


def streams_of(model: aiotrt.Model) -> list[Stream]:
    return [slot.stream for slot in executor_of(model).slots]


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_the_numbers_add_up(group: int, captured: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with load(striker, slots=1, max_queue=3, warmup=frame(0), graphs=captured) as model:
            begin = model.statistics()
            assert (begin.submitted, begin.captures, begin.graphs, begin.evictions) == (0, 1, 1, 0)
            assert begin.graph_bytes == (24 + 48 if captured else 24 + 24)
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(7)
                slot.launch()
                calls = [asyncio.ensure_future(model(frame(value))) for value in range(3)]
                await turns()
                assert model.statistics().waiting == 3
                with pytest.raises(aiotrt.QueueFullError):
                    await model(frame(9))
                gone = calls.pop(1)
                gone.cancel()
                await turns()
                assert gone.cancelled()
                assert model.statistics().waiting == 2
                calls.append(asyncio.ensure_future(model(frame(2))))
                await turns()
                assert model.statistics().waiting == 3
            assert all(map(right, await asyncio.gather(*calls), (0, 2, 2)))
            call = asyncio.ensure_future(model(frame(5)))
            while count(model, State.IN_FLIGHT) == 0:
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            await settle(model, 1)
            striker.strike("launch" if captured else "run", FaultKind.PASSING)
            with pytest.raises(aiotrt.EngineError):
                await model(frame(6))
            await settle(model, 1)
            end = model.statistics()
            assert (end.submitted, end.completed, end.failed, end.cancelled, end.rejected) == (7, 3, 1, 2, 1)
            assert (end.replays, end.fallback_runs) == ((5, 0) if captured else (0, 5))
            assert (end.captures, end.graphs, end.evictions, end.waiting, end.free) == (1, 1, 0, 0, 1)
            assert end.polls > begin.polls
            assert end.wakes > begin.wakes

    under_schedules(group, program)


@pytest.mark.parametrize("ends", ["breaks", "closes", "goes on"])
@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("group", range(4))
def test_each_call_is_counted_once_however_it_ends(group: int, captured: bool, ends: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        model = await load(striker, slots=2, warmup=frame(0), graphs=captured)
        counters = executor_of(model).counters
        verbs = ("launch", "record", "copy") if captured else ("run", "record", "copy")
        striker.strike(choose.choice(verbs), FaultKind.PASSING, after=choose.randrange(4))
        calls: list[asyncio.Task[Any]] = []
        for value in range(5):
            calls.append(asyncio.ensure_future(model(frame(value))))
            await turns(choose.randrange(8))
            choose.choice(calls).cancel()
            await turns(choose.randrange(3))
        if ends == "breaks":
            device.fail(aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress"))
            calls[-1].cancel()
        elif ends == "closes":
            calls[-1].cancel()
            await model.aclose(drain=False)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        await model.aclose()
        assert counters.submitted == counters.completed + counters.failed + counters.cancelled, counters
        assert counters.completed >= sum(isinstance(outcome, np.ndarray) for outcome in outcomes)
        assert counters.cancelled <= sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)

    under_schedules(group, program)


@pytest.mark.parametrize("ends", ["breaks", "closes"])
@pytest.mark.parametrize("group", GROUPS)
def test_whoever_waits_when_a_model_ends_is_told_and_counted_once(group: int, ends: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=1, warmup=frame(0))
        counters = executor_of(model).counters
        async with model.lease():
            lease = asyncio.ensure_future(model.lease().__aenter__())
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            if ends == "breaks":
                device.fail(aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress"))
                await turns()
            else:
                await model.aclose(drain=False)
            kind = aiotrt.DeviceError if ends == "breaks" else aiotrt.ModelClosedError
            for waiting in (lease, call):
                with pytest.raises(kind):
                    await waiting
        assert (counters.failed, counters.cancelled, counters.submitted) == (2, 0, 3)
        await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("first", ["cancelled", "freed"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_slot_granted_to_somebody_who_is_gone_goes_to_the_next(group: int, first: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            holder = model.lease()
            await holder.__aenter__()
            gone: asyncio.Future[Any]
            if choose.random() < 0.5:
                gone = asyncio.ensure_future(model.lease().__aenter__())
            else:
                gone = asyncio.ensure_future(model(frame(1)))
            await turns()
            stays = asyncio.ensure_future(model(frame(2)))
            await turns()
            if first == "cancelled":
                gone.cancel()
                await holder.__aexit__(None, None, None)
            else:
                await holder.__aexit__(None, None, None)
                gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            assert right(await stays, 2)
            await settle(model, 1)
            assert model.statistics().cancelled == 1

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_lease_is_entered_by_one_and_by_another_when_that_one_gives_up(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            lease = model.lease(outputs="numpy")
            async with model.lease(), model.lease():
                for _ in range(2):
                    first = asyncio.ensure_future(lease.__aenter__())
                    await turns()
                    with pytest.raises(aiotrt.UsageError, match="entered once; ask the model for another one"):
                        await lease.__aenter__()
                    first.cancel()
                    await asyncio.wait([first])
            async with lease as slot:
                slot.inputs[0][...] = frame(3)
                assert right(await slot.replay(), 3)
            await settle(model, 2)

    under_schedules(group, program)


def test_who_left_the_line_does_not_stand_in_it() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            executor = executor_of(model)
            async with model.lease():
                requests = [executor.submit((frame(value),), {}) for value in range(5)]
                requests[1].cancel()
                executor.abandon(requests[1])
                assert [request.is_queued for request in requests] == [True, False, True, True, True]
                assert model.statistics().waiting == 4
            assert model.statistics().cancelled == 1
            for value in (0, 2, 3, 4):
                assert right(await requests[value], value)

    under_schedules(0, program)


def test_a_line_of_callers_who_are_gone_ends_without_recursion() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_queue=None, warmup=frame(0)) as model:
            executor = executor_of(model)
            async with model.lease():
                requests = [executor.submit((frame(0),), {}) for _ in range(1500)]
                for request in requests:
                    request.cancel()
            assert model.statistics().waiting == 0
            for request in requests:  # their tasks run now
                executor.abandon(request)
            assert model.statistics().cancelled == 1500
            assert right(await model(frame(1)), 1)

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_of_first_calls_that_disagree_one_is_right_and_the_others_are_told(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 2)
        async with load(device, slots=slots, signatures="fixed") as model:
            frames = [frame(1), np.full(SHAPE, 2, np.int32), frame(1), np.full(SHAPE, 2, np.int32)]
            results = await asyncio.gather(*map(model, frames), return_exceptions=True)
            assert model.inputs is not None
            kept = {torch.float32: 1, torch.int32: 2}[model.inputs[0].dtype]
            for value, result in zip((1, 2, 1, 2), results, strict=True):
                assert right(result, kept) if value == kept else isinstance(result, aiotrt.InputError), result
            await settle(model, slots)

    under_schedules(group, program)


def refused(error: type[Exception], message: str, *uses: Callable[[], object]) -> None:
    for use in uses:
        with pytest.raises(error, match=message):
            use()


@pytest.mark.parametrize("group", GROUPS)
def test_a_lease_is_used_by_its_holder_only_and_in_order(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            lease = model.lease(outputs="numpy")
            refused(aiotrt.UsageError, "has not been entered", lease.launch, lambda: lease.inputs)
            async with lease as slot:
                buffer, output = slot.inputs[0], slot.outputs[0]

                def write(value: object, to: Any = buffer) -> Callable[[], object]:
                    return lambda: to.__setitem__(..., value)

                refused(aiotrt.UsageError, "never written", slot.launch)
                refused(aiotrt.UsageError, "nothing was launched", lambda: output.tensor, lambda: output.host)
                refused(aiotrt.UsageError, "only inputs", write(1.0, output))
                refused(aiotrt.InputError, "expected", write(frame(1, (9, 9))), write(device.tensor(frame(1, (9, 9)))))
                with held_streams(device, *streams_of(model)):
                    write(2.0)()
                    slot.launch()
                    refused(aiotrt.UsageError, "not complete", write(3.0), lambda: buffer.host, lambda: output.host)
                assert right(await slot.replay(), 2)
                assert right(output.host, 2)
                buffer.host.numpy()[...] = 4.0
                refused(aiotrt.UsageError, "from the host and from the device", lambda: buffer.tensor)
                assert right(await slot.replay(), 4)
                with device.use():
                    buffer.tensor.fill_(5.0)
                assert right(await slot.replay(), 5)

                def elsewhere() -> None:
                    refused(aiotrt.UsageError, "outside any event loop", slot.launch, lambda: buffer.host, model.lease)

                await asyncio.get_running_loop().run_in_executor(None, elsewhere)
            reads = (lambda: buffer.tensor, lambda: buffer.host, lambda: output.tensor)
            uses = (slot.launch, slot.consumed, *reads, write(1.0))
            refused(aiotrt.UsageError, "this lease has ended", *uses)
            with pytest.raises(aiotrt.UsageError, match="entered once"):
                await lease.__aenter__()
            async with model.lease() as other:
                refused(aiotrt.UsageError, "this lease has ended", write(output, other.inputs[0]))
            assert right(await model(frame(1)), 1)

    under_schedules(group, program)


@pytest.mark.parametrize("index", [7, "a", (0, 0, 0), slice(None, None, -1)])
def test_an_assignment_that_is_refused_wrote_nothing(index: object) -> None:
    """A caller who was refused, and replayed all the same, was given what the one before had written."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=np.zeros(SHAPE, np.uint8)) as model:
            await model(np.full(SHAPE, 42, np.uint8))
            async with model.lease(outputs="numpy") as slot:
                x = slot.inputs[0]

                def write(index: Any, value: object) -> Callable[[], object]:
                    return lambda: x.__setitem__(index, value)

                wrong = np.zeros((5, 5), np.uint8)
                refused(aiotrt.InputError, "expected a value of shape", write(..., wrong), write(..., device.tensor(wrong)))
                for value in (300, -1, float("nan"), 1j, np.str_("a")):
                    refused(aiotrt.InputError, r"expected a number that torch\.uint8 holds, got ", write(..., value))
                some = device.tensor(np.zeros(3, np.uint8))
                refused(aiotrt.InputError, r"input 'x' of shape \(2, 3\) has no ", write(index, some))
                if not isinstance(index, slice):  # numpy has those
                    refused(aiotrt.InputError, r"input 'x' of shape \(2, 3\) has no ", write(index, 1))
                refused(aiotrt.UsageError, "never written", slot.launch)
                x[0], x[1, 0], x[1, 1:] = 1, True, np.float32(1)
                assert right(await slot.replay(), 1)

    under_schedules(0, program)


def same(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.complex32], ids=str)
def test_a_lease_takes_and_gives_numbers_in_dtypes_that_numpy_lacks(dtype: torch.dtype, graphs: bool) -> None:
    """A number was written as the integer that numpy sees in such a buffer's place, and results came as such integers."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        first = torch.zeros(SHAPE, dtype=dtype)
        part = 0.25j if dtype.is_complex else 0.25
        async with aiotrt.load(same, device=device, slots=1, warmup=first, graphs=graphs) as model:
            async with model.lease(outputs="numpy") as slot:
                x = slot.inputs[0]
                x[...] = 1.5
                x[0], x[1, 0] = np.float32(2), 2 + part
                word = np.str_("a")
                refused(aiotrt.InputError, f"expected a number that {dtype} holds, got ", lambda: x.__setitem__(..., word))
                result = await slot.replay()
                assert result.dtype == (np.complex64 if dtype.is_complex else np.float32)
                np.testing.assert_array_equal(result, [[2, 2, 2], [2 + part, 1.5, 1.5]])
                assert slot.outputs[0].host.dtype is dtype
                x[...] = torch.full(SHAPE, 3, dtype=dtype)
                np.testing.assert_array_equal(await slot.replay(), np.full(SHAPE, 3))
                np.testing.assert_array_equal(result, [[2, 2, 2], [2 + part, 1.5, 1.5]])

    under_schedules(0, program)


def test_a_lease_that_launched_nothing_has_nothing_to_copy_from() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model, model.lease() as first, model.lease() as second:
            first.inputs[0][...] = 1.0
            refused(
                aiotrt.UsageError,
                "nothing was launched",
                lambda: second.inputs[0].__setitem__(..., first.outputs[0]),
            )

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_graph_a_lease_is_used_in_order_too(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0), graphs=False) as model:
            async with model.lease(outputs="numpy") as slot:
                with pytest.raises(aiotrt.UsageError, match="never written"):
                    await slot.replay()
                slot.inputs[0][...] = frame(2)
                first = asyncio.ensure_future(slot.replay())
                while count(model, State.IN_FLIGHT) == 0:
                    await asyncio.sleep(0)
                with pytest.raises(aiotrt.UsageError, match="not complete"):
                    await slot.replay()
                assert right(await first, 2)
            assert right(await model(frame(1)), 1)

    under_schedules(group, program)


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("group", GROUPS)
def test_while_a_worker_thread_submits_a_lease_nobody_else_touches_the_slot(group: int, before: int) -> None:
    """A write was accepted and mixed with what was replayed, and a second replay was a move that the slots do not have."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with (
            load(device, slots=1, warmup=frame(0), graphs=False) as model,
            load(device, slots=1, warmup=frame(0)) as next_model,
            model.lease(outputs="numpy") as slot,
            next_model.lease() as other,
        ):
            x, output = slot.inputs[0], slot.outputs[0]
            for value in range(before):
                x[...] = frame(value)
                assert right(await slot.replay(), value)
            x[...] = frame(3)
            replay = asyncio.ensure_future(slot.replay())
            await until(lambda: count(model, State.PREPARING) == 1)
            refused(
                aiotrt.UsageError,
                "the last launch is not complete",
                slot.launch,
                lambda: x.tensor,
                lambda: x.host,
                lambda: x.__setitem__(..., 9.0),
                lambda: x.__setitem__(..., frame(9)),
                lambda: x.__setitem__(..., device.tensor(frame(9))),
                lambda: output.tensor,
                lambda: output.host,
                lambda: other.inputs[0].__setitem__(..., output),
            )
            with pytest.raises(aiotrt.UsageError, match="the last launch is not complete"):
                await slot.replay()
            if choose.random() < 0.5:
                replay.cancel()
                await asyncio.wait([replay])
                await until(lambda: count(model, State.PREPARING) == 0)
                while count(model, State.READABLE) == 0:
                    await asyncio.sleep(1e-5)
                assert right(output.host, 3)
            else:
                assert right(await replay, 3)
            x[...] = frame(4)
            assert right(await slot.replay(), 4)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_replay_whose_lease_has_ended_meanwhile_returns_nothing(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            async with model.lease(outputs="numpy") as slot:
                slot.inputs[0][...] = frame(1)
                replay = asyncio.ensure_future(slot.replay())
                await turns(2)
            with pytest.raises(aiotrt.UsageError, match="has ended"):
                await replay

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_another_loop_is_refused_and_changes_nothing(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:

            async def use() -> None:
                with pytest.raises(aiotrt.UsageError, match="another event loop"):
                    await model(frame(1))
                with pytest.raises(aiotrt.UsageError, match="another event loop"):
                    await model.aclose()
                with pytest.raises(aiotrt.UsageError, match="another event loop"):
                    _ = await model

            await asyncio.get_running_loop().run_in_executor(None, lambda: asyncio.run(use()))
            assert right(await model(frame(1)), 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_model_that_closes_takes_nobody_more(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=1, warmup=frame(0))
        late = model.lease()
        with held_streams(device, *streams_of(model)):
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            closing = asyncio.ensure_future(model.aclose())
            await turns()
            for use in (lambda: model(frame(2)), late.__aenter__, lambda: model.warmup([SHAPE])):
                with pytest.raises(aiotrt.ModelClosedError):
                    await use()
            refused(aiotrt.ModelClosedError, "closed", model.lease, model.stream)
            assert not model.is_ready
            assert not closing.done()
        assert right(await call, 1)
        await closing
        refused(aiotrt.ModelClosedError, "closed", model.lease, model.statistics)
        with pytest.raises(aiotrt.ModelClosedError):
            _ = await model
        await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_cancelled_close_goes_on_when_it_is_asked_again(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=1, warmup=frame(0))
        with held_streams(device, *streams_of(model)):
            call = asyncio.ensure_future(model(frame(1)))
            await turns()
            first, second = asyncio.ensure_future(model.aclose()), asyncio.ensure_future(model.aclose())
            await turns()
            first.cancel()
            await turns()
            assert first.cancelled()
            assert not second.done()
        assert right(await call, 1)
        await second

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_closing_without_draining_tells_everybody_at_once(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=2, warmup=frame(0))
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            with held_streams(device, *streams_of(model)):
                told = [asyncio.ensure_future(slot.replay()), *(asyncio.ensure_future(model(frame(v))) for v in range(3))]
                await turns(20)
                closing = asyncio.ensure_future(model.aclose(drain=False))
                await turns()
                for future in told:
                    assert future.done(), future
                    assert isinstance(future.exception(), aiotrt.ModelClosedError)
                assert not closing.done()  # the device is not done with it
            await closing

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_leaving_a_map_abandons_what_is_under_way_at_once(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            asked: list[int] = []
            ended: list[int] = []

            async def camera() -> Any:
                try:
                    for value in range(100):
                        asked.append(value)
                        await asyncio.sleep(choose.choice([0, 1e-6, 1e-4, 10.0 if value == 8 else 0]))
                        yield frame(value)
                finally:
                    ended.append(1)

            source = camera() if choose.random() < 0.7 else [frame(value) for value in range(100)]
            results = model.map(source, in_flight=4)
            seen = 0
            stop = choose.randint(0, 6)
            async for result in results:
                assert right(result, seen)
                if seen == stop:
                    break
                seen += 1
            with held_streams(device, *streams_of(model)):
                await results.aclose()
                assert model.statistics().waiting == 0
                assert count(model, State.IN_FLIGHT) == 0
            assert len(asked) <= stop + 8
            await settle(model, 1)
            total = model.statistics()
            assert total.submitted == total.completed + total.cancelled
            if asked:
                await source.aclose()  # type: ignore[union-attr]
                assert ended

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_map_gives_results_and_errors_in_order(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            fails = choose.choice([None, 0, 5])

            async def camera() -> Any:
                for value in range(6):
                    if value == fails:
                        raise KeyError("unplugged")
                    await asyncio.sleep(choose.choice([0, 1e-6, 1e-3]))
                    yield choose.choice([frame(value), (frame(value),), {"x": frame(value)}])

            seen = []
            try:
                async for result in model.map(camera(), in_flight=choose.randint(1, 5)):
                    seen.append(float(result[0, 0]))
            except KeyError:
                assert fails is not None
            assert seen == [3 * value + 1 for value in range(6 if fails is None else fails)]

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_load_can_be_cancelled_at_any_step(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = load(device, slots=2, warmup=[frame(0), frame(0, (1, 3))])

        async def opened() -> None:
            _ = await model

        awaiting = [asyncio.ensure_future(opened()) for _ in range(choose.randint(1, 2))]
        for _ in range(choose.choice([0, 1, 2, 5, 20, 50, 100, 200])):
            await asyncio.sleep(choose.choice([0, 1e-6]))
        match choose.choice(["all", "one", "close"]):
            case "all":
                for task in awaiting:
                    task.cancel()
                results = await asyncio.gather(*awaiting, return_exceptions=True)
                assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results), results
                ready = model.is_ready
                await asyncio.sleep(1.0)
                assert model.is_ready == ready  # it does not go on for nobody
            case "one":
                awaiting[0].cancel()
                await asyncio.gather(awaiting[0], return_exceptions=True)
                if len(awaiting) == 2:
                    await awaiting[1]
                    assert right(await model(frame(1)), 1)
            case "close":
                await model.aclose(drain=choose.random() < 0.5)
                results = await asyncio.gather(*awaiting, return_exceptions=True)
                allowed = (asyncio.CancelledError, aiotrt.ModelClosedError)
                assert all(result is None or isinstance(result, allowed) for result in results), results
            case other:
                raise AssertionError(other)
        await model.aclose()
        await asyncio.sleep(1.0)

    under_schedules(group, program)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_is_refused() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python warns of a fork with threads, rightly; this law is about just that
                child = os.fork()
            if child == 0:
                try:
                    executor_of(model).check_usable()
                except aiotrt.UsageError as error:
                    os._exit("loaded before a fork" not in str(error))
                os._exit(2)
            assert os.waitpid(child, 0)[1] == 0  # noqa: ASYNC222  # there is nobody else on this loop
            assert right(await model(frame(1)), 1)

    under_schedules(0, program)


def test_a_model_that_was_never_opened_can_be_closed() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = load(device)
        await model.aclose()
        with pytest.raises(aiotrt.ModelClosedError):
            _ = await model

    under_schedules(0, program)


@pytest.mark.parametrize("first", ["call", "lease"])
@pytest.mark.parametrize("second", ["call", "lease"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_launch_waits_for_the_last_one_of_another_slot_unless_they_may_overlap(
    group: int, first: str, second: str
) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        for overlap in (True, False):
            async with (
                load(device, slots=2, overlap=overlap, warmup=frame(0)) as model,
                contextlib.AsyncExitStack() as stack,
            ):
                machine = executor_of(model).machine
                ahead: Any = executor_of(model).slots[machine._free[-1]]  # of the one who comes first
                starts: list[Callable[[], Any]] = []
                for value, what in enumerate((first, second)):
                    if what == "lease":
                        lease = await stack.enter_async_context(model.lease())
                        lease.inputs[0][...] = frame(value)
                        starts.append(lease.replay)
                    else:
                        starts.append(lambda value=value: model(frame(value)))  # type: ignore[misc]
                if (first, second) == ("call", "lease"):
                    ahead = executor_of(model).slots[machine._free[-1]]  # the lease has its slot already
                with held_streams(device, ahead.stream):
                    one = asyncio.ensure_future(starts[0]())
                    await until(lambda: count(model, State.IN_FLIGHT) == 1)
                    other = asyncio.ensure_future(starts[1]())
                    await asyncio.sleep(0.05)
                    assert not one.done()
                    assert other.done() is overlap
                    behind: Any = next(slot for slot in executor_of(model).slots if slot is not ahead)
                    assert behind.stream.query() is overlap, "the device has done it, and only the hub has not looked"
                    if not overlap:
                        with device.raw():
                            assert (behind.program.inputs[0] == 1).all(), "its input waited too"
                assert right(device.read(await one) if first == "lease" else await one, 0)
                assert right(device.read(await other) if second == "lease" else await other, 1)

    under_schedules(group, program)
