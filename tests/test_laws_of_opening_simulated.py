"""Opening, warming up and closing a model at any moment, and what a call takes: nobody is forgotten, and nothing is left.

On a simulated device, and audited, as in `test_laws_simulated`; what needs two real threads is on the host device.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import warnings
from collections.abc import AsyncIterator
from typing import Any
from unittest import mock

import pytest
import torch

import aiotrt
from aiotrt import engines
from aiotrt import model as model_module
from aiotrt.runtime.slots import State
from aiotrt.testing import Fault, FaultInjector, FaultKind, SimulatedDevice
from aiotrt.testing.virtual import Workers
from tests.simulated import held_streams, run_simulated
from tests.test_laws_of_owners_simulated import GROUPS, streams_of
from tests.test_laws_simulated import SHAPE, load, right, settle, under_schedules
from tests.tools import Affine, count, executor_of, frame, turns


async def opened(model: aiotrt.Model) -> None:
    _ = await model


@pytest.mark.parametrize("group", GROUPS)
def test_without_batching_deadline_and_priority_are_inputs_like_any_other(group: int) -> None:
    def total(x: torch.Tensor, deadline: torch.Tensor, priority: torch.Tensor) -> torch.Tensor:
        return x + deadline * 10 + priority * 100

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with aiotrt.load(total, device=device, slots=1) as model:
            given: dict[str, Any] = {"deadline": frame(2), "priority": frame(3)}
            assert (await model(frame(1), **given) == 321).all()
            with pytest.raises(aiotrt.InputError, match="priority"):
                await model(frame(1), deadline=given["deadline"])
            with pytest.raises(aiotrt.InputError, match="deadline"):
                await model(frame(1), priority=given["priority"])

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_options_of_files_are_refused_where_the_engine_is_none(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        with pytest.raises(aiotrt.InputError, match="sha256 is for files"):
            _ = aiotrt.load(Affine(), device=device, sha256="ab" * 32)

    under_schedules(group, program)


def test_the_engine_is_built_for_the_shapes_of_the_examples() -> None:
    found = model_module._example_shapes([frame(0), {"x": frame(0, (4, 3))}, (2, 5)], aiotrt.Batching(max_size=4))
    assert found.batch == 4
    assert list(found.shapes) == [(((2, 3),), {}), ((), {"x": (4, 3)}), (((2, 5),), {})]


@pytest.mark.parametrize("group", GROUPS)
def test_a_model_that_is_closed_while_it_opens_is_closed_when_that_is_over(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = load(device, slots=2, warmup=[frame(0), frame(0, (1, 3))])
        awaiting = [asyncio.ensure_future(opened(model)) for _ in range(2)]
        for _ in range(choose.choice([1, 2, 5, 20, 50])):
            await asyncio.sleep(choose.choice([0, 1e-6]))
        was_ready = model.is_ready
        await model.aclose()
        assert model._opening is not None
        assert model._opening.done()
        assert not model.is_ready
        for result in await asyncio.gather(*awaiting, return_exceptions=True):
            assert was_ready or isinstance(result, aiotrt.ModelClosedError), result
        with pytest.raises(aiotrt.ModelClosedError):
            await opened(model)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_an_opening_ends_with_the_last_who_waits_for_it(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = load(device, slots=2, warmup=[frame(0), frame(0, (1, 3))])
        awaiting = [asyncio.ensure_future(opened(model)) for _ in range(3)]
        await turns(choose.randint(1, 10))
        for task in choose.sample(awaiting, 3):
            assert not model.is_ready
            task.cancel()
            await turns(2)
            assert task.cancelled()
        assert model._opening is not None
        assert not model.is_ready
        if choose.random() < 0.5:
            await model.aclose()
        else:
            await asyncio.wait([model._opening])
        assert repr(model) == "<aiotrt.Model Affine: closed>"

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_an_opening_that_is_given_up_takes_back_what_others_have(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = load(device, slots=1, warmup=[frame(0), frame(0, (1, 3))])
        waiting = asyncio.ensure_future(opened(model))
        while model._executor is None or model.inputs is None:
            await asyncio.sleep(0)
        slot = await model.lease([SHAPE]).__aenter__()  # before the second warm-up
        call = asyncio.ensure_future(model(frame(1)))
        await turns()
        waiting.cancel()
        await asyncio.wait([waiting])
        async with asyncio.timeout(10.0):
            with pytest.raises(aiotrt.ModelClosedError):
                await call
            await model.aclose()
        with pytest.raises(aiotrt.ModelClosedError, match="and this lease with it"):
            slot.launch()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_warm_up_that_was_cancelled_is_no_failure_when_the_device_breaks_after_it(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=2, warmup=frame(0))
        with held_streams(device, *streams_of(model)):
            warming = asyncio.ensure_future(model.warmup([(4, 3)]))
            while count(model, State.PREPARING) < 2:
                await asyncio.sleep(0)
            await turns(choose.randint(0, 5))
            warming.cancel()
            await asyncio.wait([warming])
            assert count(model, State.DRAINING) == 2
            device.fail(aiotrt.DeviceError("it broke", code=700, name="cudaErrorIllegalAddress"))
            statistics = model.statistics()
            assert (statistics.broken, statistics.failed, statistics.submitted) == (2, 0, 0)
        await model.aclose()
        gc.collect(1)  # or an error that nobody looked at would be found by somebody else's law

    under_schedules(group, program)


def test_a_warm_up_that_is_refused_half_way_gives_back_what_it_has() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=3, warmup=frame(0)) as model:
            executor = executor_of(model)
            lease, refusals = executor.lease, iter([None, None, aiotrt.EngineError("no more")])

            def refused(*args: Any, **options: Any) -> Any:
                if refusal := next(refusals):
                    raise refusal
                return lease(*args, **options)

            with mock.patch.object(executor, "lease", refused), pytest.raises(aiotrt.EngineError, match="no more"):
                await model.warmup([(1, 3)])
            await settle(model, 3)
            assert right(await model(frame(1)), 1)

    under_schedules(0, program)


@pytest.mark.parametrize("group", range(1))
def test_a_warm_up_that_fails_on_every_slot_is_one_error(group: int) -> None:
    def narrow(x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > 2:
            raise ValueError("too wide")
        return x * 3 + 1

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with aiotrt.load(narrow, device=device, slots=3, warmup=frame(0)) as model:
            with pytest.raises(aiotrt.EngineError, match="too wide"):
                await model.warmup([(3, 3)])
            await settle(model, 3)
            assert right(await model(frame(1)), 1)
            gc.collect()  # all of it: the errors are in cycles

    under_schedules(group, program)


@pytest.mark.parametrize("kind", [FaultKind.PASSING, FaultKind.STICKY])
@pytest.mark.parametrize("verb", ["stream", "event"])
def test_a_model_that_cannot_have_its_slots_leaves_nothing(verb: str, kind: FaultKind) -> None:
    expected = aiotrt.DeviceError if kind is FaultKind.STICKY else aiotrt.EngineError

    async def program(device: FaultInjector) -> int:
        simulated = device.simulated
        before = set(simulated._streams.values())
        pools: list[Workers] = []
        make = simulated.workers

        def workers(count: int) -> Workers:
            pools.append(make(count))
            return pools[-1]

        with mock.patch.object(simulated, "workers", workers):
            try:
                model = await aiotrt.load(Affine(), device=device, slots=3)
            except expected:
                assert all(stream._is_closed for stream in set(simulated._streams.values()) - before)
                assert all(pool._is_shut for pool in pools)
                assert not simulated._callbacks
            else:
                await model.aclose()
        return len(device.happened)

    failed = 0
    for use in range(1, 20):
        device = FaultInjector(SimulatedDevice(use), Fault(verb, use, kind))
        failed += run_simulated(program(device), device)
    assert failed >= 3


@pytest.mark.parametrize("first", ["left", "read"])
def test_an_engine_that_nobody_waits_for_any_more_is_closed(first: str) -> None:
    reading, go_on, read, closed = (threading.Event() for _ in range(4))
    original, run = engines.open_engine, model_module._Loading.run

    def reads(*args: Any) -> Any:
        reading.set()
        assert go_on.wait(10.0)
        engine: Any = original(*args)
        engine.close = closed.set
        return engine

    def runs(loading: Any) -> Any:
        result = run(loading)
        read.set()
        return result

    async def main() -> None:
        loop = asyncio.get_running_loop()
        opening = asyncio.ensure_future(opened(aiotrt.load(Affine(), device="host")))
        assert await loop.run_in_executor(None, reading.wait, 10.0)
        if first == "read":  # by the thread, and the loop, which stands still here, has not heard of it
            go_on.set()
            assert read.wait(10.0)
        opening.cancel()
        await asyncio.wait([opening])
        assert opening.cancelled()
        go_on.set()
        assert await loop.run_in_executor(None, closed.wait, 3.0)

    with mock.patch.object(model_module, "open_engine", reads), mock.patch.object(model_module._Loading, "run", runs):
        asyncio.run(main())


@pytest.mark.parametrize("group", GROUPS)
def test_leaving_a_map_ends_a_source_that_gives_nothing_more(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            ended = []
            fails = choose.random() < 0.5

            async def camera() -> AsyncIterator[Any]:
                yield frame(0)
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.append(True)
                    if fails:
                        raise KeyError("a source that complains when it is told to stop")

            results = model.map(camera(), in_flight=2)
            async for result in results:
                assert right(result, 0)
                break
            await results.aclose()
            assert ended
            await settle(model, 1)
            gc.collect(1)
            assert right(await model(frame(1, SHAPE)), 1)

    under_schedules(group, program)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_model_that_a_child_process_inherits_is_left_alone_there() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a fork with threads; this law is about just that
                child = os.fork()
            if child == 0:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    model.__del__()
                os._exit(bool(told) or executor_of(model)._workers._is_shut)  # type: ignore[attr-defined]
            assert os.waitpid(child, 0)[1] == 0  # noqa: ASYNC222  # there is nobody else on this loop
            assert right(await model(frame(1)), 1)

    under_schedules(0, program)


@pytest.mark.parametrize("outputs", ["numpy", "torch", "device"])
@pytest.mark.parametrize("group", GROUPS)
def test_results_come_as_load_was_told_whatever_went_in(group: int, outputs: Any) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0), outputs=outputs) as model:
            for value in range(4):
                given: Any = frame(2 * value)
                if choose.random() < 0.7:
                    producer = device.stream()
                    with device.use(producer):
                        given = device.tensor(frame(value)) * 2
                    made = device.event()
                    producer.record(made)
                    device.current_stream().wait(made)
                result = await model(given)
                assert isinstance(result, torch.Tensor) == (outputs != "numpy")
                if outputs == "device":
                    assert device.holds(result)
                    result = device.read(result)
                assert right(result, 2 * value)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_lease_counts_in_line_and_a_warm_up_does_not(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, max_queue=0, warmup=frame(0)) as model:
            async with model.lease():
                warming = asyncio.ensure_future(model.warmup([(1, 3)]))
                await turns()
                assert not warming.done()
                assert model.statistics().waiting == 1
                with pytest.raises(aiotrt.QueueFullError):
                    await model.lease().__aenter__()
            await warming
            assert (model.statistics().submitted, model.statistics().rejected) == (1, 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_call_goes_to_the_free_slot_that_has_its_graph(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                await slot.replay()
                assert right(await model(frame(2, (1, 3))), 2)
            before = model.statistics().captures
            for value in range(4):
                assert right(await model(frame(value, choose.choice([(1, 3), SHAPE]))), value)
            assert model.statistics().captures == before

    under_schedules(group, program)
