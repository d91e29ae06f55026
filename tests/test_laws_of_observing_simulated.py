"""What a model says of its calls is what happened: how many found their graph there, and when each got how far.

On a simulated device under adversarial schedules, and audited, as in `test_laws_simulated`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import pytest

import aiotrt
from aiotrt.batching.item import Item
from aiotrt.runtime.slots import State
from aiotrt.testing import SimulatedDevice
from tests.simulated import held_streams
from tests.test_laws_of_owners_simulated import GROUPS, streams_of
from tests.test_laws_simulated import SHAPE, load, right, under_schedules
from tests.tools import count, executor_of, frame, turns


@pytest.mark.parametrize("group", GROUPS)
def test_who_finds_a_graph_and_who_has_to_wait_for_one_are_counted(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:

            def counted() -> tuple[int, int]:
                statistics = model.statistics()
                return statistics.hits, statistics.misses

            assert counted() == (0, 0), "a warm-up is nobody's request"
            assert right(await model(frame(1)), 1)
            assert counted() == (1, 0)
            assert right(await model(frame(2, (1, 5))), 2)
            assert counted() == (1, 1)
            async with model.lease([SHAPE]):
                assert counted() == (2, 1)
            async with model.lease([(4, 1)]):
                assert counted() == (2, 2)
            await model.warmup([(7, 7)])
            assert counted() == (2, 2)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_the_times_of_a_call_are_in_the_order_in_which_things_happened(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            seen: list[Any] = []
            model.observe(seen.append)
            with held_streams(device, *streams_of(model)):
                calls = [asyncio.ensure_future(model(frame(1)))]
                while count(model, State.IN_FLIGHT) == 0:
                    await asyncio.sleep(0)
                calls.append(asyncio.ensure_future(model(frame(2))))
                await turns()
                first, second = [request.times for request in seen]
                assert 0.0 < first.entered <= first.granted <= second.entered
                assert second.granted == first.seen == second.seen == first.ran == 0.0
                await asyncio.sleep(0.1)
            assert all(map(right, await asyncio.gather(*calls), (1, 2)))
            assert second.entered <= first.seen <= second.granted <= second.seen
            assert first.ran >= 0.1 > second.ran > 0.0, "a call runs from when the one before it was done"
            assert 0.0 < first.late <= 0.1 > second.late >= 0.0
            await model.warmup([(7, 7)])
            assert len(seen) == 2, "a warm-up is nobody's request"

    under_schedules(group, program)


@pytest.mark.parametrize("stack", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_the_times_of_an_item_say_when_it_went(group: int, stack: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        batching = aiotrt.Batching(max_size=2, stack=stack)
        async with load(device, slots=1, warmup=frame(0), batching=batching) as model:
            seen: list[Any] = []
            model.observe(seen.append)
            with held_streams(device, *streams_of(model)):
                calls = [asyncio.ensure_future(model(frame(1)))]
                while count(model, State.IN_FLIGHT) == 0:
                    await asyncio.sleep(0)
                calls.append(asyncio.ensure_future(model(frame(2))))
                await turns()
                items: list[Any] = [call for call in seen if isinstance(call, Item)]
                first, second = [item.times for item in items]
                assert 0.0 < first.entered <= first.granted <= second.entered
                assert second.granted == 0.0
            assert all(map(right, await asyncio.gather(*calls), (1, 2)))
            one, two = [request.times for request in seen if not isinstance(request, Item)]
            assert one.seen <= second.granted <= two.seen
            assert first.seen == second.seen == 0.0, "of the batch it is known"

    under_schedules(group, program)


@pytest.mark.parametrize("batching", [None, aiotrt.Batching(max_size=2)])
@pytest.mark.parametrize("group", GROUPS)
def test_an_observer_that_raises_is_reported_and_costs_nobody_anything(group: int, batching: aiotrt.Batching | None) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        loop = asyncio.get_running_loop()
        contexts: list[dict[str, Any]] = []
        audited = loop.get_exception_handler()
        async with load(device, slots=1, warmup=frame(0), batching=batching) as model:

            def bad(_: Any) -> None:
                raise RuntimeError("bad observer")

            loop.set_exception_handler(lambda _, context: contexts.append(context))
            model.observe(bad)
            results = await asyncio.gather(*[model(frame(value)) for value in range(3)])
            assert all(map(right, results, range(3)))
            if batching is None:
                async with model.lease([SHAPE]):
                    pass
            loop.set_exception_handler(audited)
            assert len(contexts) >= 3
            assert {str(context["exception"]) for context in contexts} == {"bad observer"}
            model.observe(None)
            assert right(await model(frame(5)), 5)
            statistics = model.statistics()
            assert statistics.free == 1
            assert statistics.submitted == statistics.completed + (batching is None)

    under_schedules(group, program)


def test_an_interrupt_in_an_observer_loses_no_slot() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:

            def struck(_: Any) -> None:
                raise KeyboardInterrupt

            executor = executor_of(model)
            for is_busy in (False, True):
                async with contextlib.AsyncExitStack() as stack:
                    if is_busy:
                        await stack.enter_async_context(model.lease([SHAPE]))
                    model.observe(struck)
                    with pytest.raises(KeyboardInterrupt):
                        _ = executor.submit((frame(1),), {})
                    model.observe(None)
                assert right(await model(frame(2)), 2)
            statistics = model.statistics()
            assert statistics.submitted == statistics.completed + statistics.cancelled + 1, "and one lease"

    under_schedules(0, program)
