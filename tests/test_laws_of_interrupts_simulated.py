"""An interrupt in the middle of a launch, on a loop that goes on, leaves no slot claimed and no caller waiting.

On a simulated device, and audited, as in `test_laws_simulated`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any
from unittest import mock

import pytest

import aiotrt
from aiotrt.batching.batch import Batch
from aiotrt.batching.group import Group
from aiotrt.batching.queue import Queue
from aiotrt.completion.hub import Hub
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.programs import ProgramCache
from aiotrt.runtime.slots import Slots
from aiotrt.tensors import Kind
from aiotrt.testing import SimulatedDevice, SimulatedGraph, SimulatedStream
from tests.test_batches_simulated import balanced
from tests.test_batches_simulated import load as load_batching
from tests.test_laws_of_owners_simulated import GROUPS
from tests.test_laws_simulated import load, right, settle, under_schedules
from tests.tools import executor_of, frame

#: What is interrupted, and whether it has done its work by then.
PLACES = [
    (owner, name, is_done)
    for owner, name in (
        (SimulatedGraph, "launch"), (SimulatedStream, "record"), (Hub, "add"), (Slots, "move"), (SimulatedDevice, "empty"),
    )
    for is_done in (False, True)
]  # fmt: skip


def interrupted(owner: Any, name: str, is_done: bool) -> Any:
    """Raise KeyboardInterrupt at the first use of a method."""
    original, left = getattr(owner, name), [1]

    def method(*args: Any, **options: Any) -> Any:
        result = original(*args, **options) if is_done or not left else None
        if left:
            left.clear()
            raise KeyboardInterrupt
        return result

    return mock.patch.object(owner, name, method)


@pytest.mark.parametrize("way", ["the short path", "the long way"])
@pytest.mark.parametrize(("owner", "name", "is_done"), PLACES, ids=[f"{o.__name__}.{n}-{d}" for o, n, d in PLACES])
@pytest.mark.interpreted
@pytest.mark.parametrize("group", GROUPS)
def test_an_interrupted_call_fails_and_its_slot_drains(group: int, owner: Any, name: str, is_done: bool, way: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            executor = executor_of(model)
            x = device.tensor(frame(1))
            for _ in range(3):
                assert right(device.read(await model(x)), 1)
            assert (executor._route is not None) is True
            if way == "the long way":
                executor._route = executor._likely = None
            for program in executor.cache:
                program.spare = None  # so that results are allocated
            with interrupted(owner, name, is_done):
                try:
                    request = executor.submit((x,), {})
                except KeyboardInterrupt:
                    pass
                else:
                    assert name == "empty", "it was not interrupted"
                    assert right(device.read(await request), 1)
            await settle(model, 1)
            assert right(device.read(await model(x)), 1)
            statistics = model.statistics()
            assert statistics.submitted == statistics.completed + statistics.failed + statistics.cancelled

    under_schedules(group, program)


@pytest.mark.parametrize(("owner", "name", "is_done"), PLACES[:8], ids=[f"{o.__name__}.{n}-{d}" for o, n, d in PLACES[:8]])
@pytest.mark.interpreted
@pytest.mark.parametrize("group", GROUPS)
def test_an_interrupted_replay_is_drained_before_the_slot_goes_on(group: int, owner: Any, name: str, is_done: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            async with model.lease() as slot:
                slot.inputs[0][...] = device.tensor(frame(1))
                await slot.replay()
                with interrupted(owner, name, is_done), pytest.raises(KeyboardInterrupt):
                    slot.launch()
                assert right(device.read(await slot.replay()), 1)
                with interrupted(owner, name, is_done), pytest.raises(KeyboardInterrupt):
                    slot.launch()
            await settle(model, 1)
            assert right(device.read(await model(device.tensor(frame(2)))), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("way", ["the short path", "the long way"])
def test_an_interrupt_while_results_are_copied_fails_the_call_and_its_slot_goes_on(way: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            executor = executor_of(model)
            for _ in range(3):
                assert right(await model(frame(1)), 1)
            if way == "the long way":
                executor._route = executor._likely = None
            request = executor.submit((frame(1),), {})
            device.run_until_idle()
            for lane in executor.hub.lanes:
                lane.due = 0.0
            with mock.patch("aiotrt.runtime.executor.own", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
                executor.hub._poll()
            with pytest.raises(aiotrt.EngineError, match="while its results were copied"):
                await request
            await settle(model, 1)
            assert right(await model(frame(2)), 2)

    under_schedules(0, program)


BATCH_PLACES = [
    *[(SimulatedGraph, "launch", done) for done in (False, True)],
    *[(Hub, "add", done) for done in (False, True)],
    *[(Slots, "move", done) for done in (False, True)],
    *[(Batch, "fill", done) for done in (False, True)],
    *[(Group, "route_of", done) for done in (False, True)],
    (Queue, "take", False),
    (Slots, "request", False),
]


@pytest.mark.parametrize("is_free", [True, False], ids=["a free slot", "a busy slot"])
@pytest.mark.parametrize(
    ("owner", "name", "is_done"), BATCH_PLACES, ids=[f"{o.__name__}.{n}-{d}" for o, n, d in BATCH_PLACES]
)
@pytest.mark.interpreted
@pytest.mark.parametrize("group", range(1))
def test_after_an_interrupt_no_item_of_a_batch_waits_forever(
    group: int, owner: Any, name: str, is_done: bool, is_free: bool
) -> None:
    if owner is Slots and name == "move" and not is_free:
        pytest.skip("the first move ends the lease that keeps the slot busy")

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load_batching(device, slots=1, max_size=2, warmup=frame(0)) as model:
            executor, gatherer = executor_of(model), model._gatherer
            assert gatherer is not None
            assert right(await model(frame(1)), 1)
            await settle(model, 1)
            held = None
            if not is_free:
                specs = executor.specs.specs
                assert specs is not None
                held = executor.lease(specs, ((1, *frame(0).shape),), Kind.NUMPY)
                await held
            items = [gatherer.submit((frame(value),), {}) for value in range(3)]
            gatherer.close()  # of the pump that submitting has scheduled: only the interrupted one may schedule another
            with interrupted(owner, name, is_done), contextlib.suppress(KeyboardInterrupt):
                gatherer.pump()
                if held is not None:
                    assert held.slot is not None
                    slot, held = held.slot, None
                    executor.end_lease(slot)
            if held is not None:
                assert held.slot is not None
                executor.end_lease(held.slot)
            for value, outcome in enumerate(await asyncio.gather(*map(as_result, items))):
                assert isinstance(outcome, aiotrt.EngineError) or right(outcome, value)
            await settle(model, 1)
            assert right(await model(frame(4)), 4)
            assert balanced(model)

    under_schedules(group, program)


async def as_result(item: Any) -> Any:
    """What awaiting an item gives, or raises."""
    try:
        return await item
    except aiotrt.AiotrtError as error:
        return error


@pytest.mark.interpreted
def test_the_next_request_is_served_after_an_interrupt_that_freed_the_slot() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            executor = executor_of(model)
            specs = executor.specs.specs
            assert specs is not None
            first, second, third = (executor.lease(specs, ((2, 3),), Kind.NUMPY) for _ in range(3))
            await first
            assert first.slot is not None
            with interrupted(Executor, "begin", False), pytest.raises(KeyboardInterrupt):
                executor.abandon(first)  # frees the slot, and the second request is interrupted
            with pytest.raises(aiotrt.EngineError, match="was interrupted"):
                await second
            await third
            executor.abandon(third)
            await settle(model, 1)

    under_schedules(0, program)


def test_an_interrupt_is_told_to_the_caller_whose_call_it_hit() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            x = device.tensor(frame(1))
            for _ in range(3):
                await model(x)
            executor = executor_of(model)
            with interrupted(SimulatedGraph, "launch", False), pytest.raises(KeyboardInterrupt):
                _ = executor.submit((x,), {})
            (request,) = [slot.request for slot in executor.slots]
            assert request is not None
            with pytest.raises(aiotrt.EngineError, match="was interrupted while this call was launched"):
                await request
            await settle(model, 1)

    under_schedules(0, program)


@pytest.mark.parametrize("is_lease", [False, True])
def test_an_interrupt_before_there_is_a_program_frees_the_slot_at_once(is_lease: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            executor = executor_of(model)
            specs = executor.specs.specs
            assert specs is not None
            with interrupted(ProgramCache, "get", False), pytest.raises(KeyboardInterrupt):
                _ = executor.lease(specs, ((2, 3),), Kind.NUMPY) if is_lease else executor.submit((frame(1),), {})
            await settle(model, 1)
            assert right(await model(frame(2)), 2)

    under_schedules(0, program)
