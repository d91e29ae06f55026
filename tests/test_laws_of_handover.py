"""What one owner of a slot passes to the next: readers, events, turns, and the slot itself.

Each law runs on the simulated GPU and on the host device, in virtual time. Each enters one state and checks that it did.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from aiotrt.testing import FaultKind, Scripted, SimulatedDevice
from tests.simulated import Striker, held_streams, run_simulated
from tests.test_laws_of_turns_simulated import BOTH, stubborn
from tests.test_laws_simulated import right
from tests.tools import Affine, count, executor_of, frame, turns, until, woken_by_the_loop
from tests.virtual_devices import VirtualDevice, held, held_slots, later, load, on_both, read, run_on

#: How a reader of a lease's output says that it reads.
SAYS = ("names its stream", "assigns an event", "uses the current stream")

#: Loop iterations within which a slot must be free again after its last user has gone.
SOON = 2000


async def comes_back(model: aiotrt.Model, slots: int = 1) -> None:
    """Return when all slots are free.

    Raises:
        AssertionError: a slot stays with a caller that has gone.
    """
    for _ in range(SOON):
        if count(model, State.FREE) == slots and model.statistics().waiting == 0:
            return
        await asyncio.sleep(0)
    states = [state.value for state in executor_of(model).machine.states]
    raise AssertionError(f"the slot was lost: {states}, {model.statistics().waiting} waiting")


# Record, then release...


@contextlib.contextmanager
def reading(
    device: VirtualDevice, model: aiotrt.Model, slot: aiotrt.Lease, copies: list[torch.Tensor], says: str
) -> Iterator[None]:
    """A reader of the lease's output that does not read before the block has ended, and that says so in one of `SAYS`."""
    output = slot.outputs[0]
    produced: Any = output.tensor
    reader: Any = device.current_stream() if says == "uses the current stream" else model.stream()
    with held(device, reader):
        reader.run(lambda: copies.append(output.tensor.clone()))
        if says == "names its stream":
            slot.consumed(reader)
        elif says == "assigns an event":
            produced._trt_graph_state.consumer_done_event = reader.record()
        yield


@pytest.mark.parametrize("says", SAYS)
@on_both
def test_a_lease_gates_the_request_that_waits_for_its_slot(where: str, says: str) -> None:
    """Leaving launches the first request in the queue at once, so all gates must be on the slot before that."""

    async def program(device: VirtualDevice) -> None:
        copies: list[torch.Tensor] = []
        async with load(device) as model:
            lease = model.lease()
            slot = await lease.__aenter__()
            slot.inputs[0][...] = frame(1)
            await slot.replay()
            assert count(model, State.READABLE) == 1, "leaving must free the slot at once"
            with reading(device, model, slot, copies, says):
                waiting = asyncio.ensure_future(model(frame(100)))
                await turns()
                assert model.statistics().waiting == 1, "the request must be in the queue when the lease ends"
                await lease.__aexit__(None, None, None)
                await later()
                assert not waiting.done(), "the request ran before the lease's reader had read"
            assert right(await waiting, 100)
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert [right(read(device, copy), 1) for copy in copies] == [True]

    run_on(where, program)


@pytest.mark.parametrize("says", SAYS)
@on_both
def test_the_next_launch_of_a_lease_waits_for_the_readers_of_the_last(where: str, says: str) -> None:
    async def program(device: VirtualDevice) -> None:
        copies: list[torch.Tensor] = []
        async with load(device) as model, model.lease() as slot:
            for value in range(2):
                slot.inputs[0][...] = frame(value)
                await slot.replay()
                with reading(device, model, slot, copies, says):
                    slot.inputs[0][...] = frame(100)
                    replay = asyncio.ensure_future(slot.replay())
                    await later()
                    assert not replay.done(), "the launch ran before the last one's reader had read"
                assert right(read(device, await replay), 100)
        await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
        assert [right(read(device, copy), value) for value, copy in enumerate(copies)] == [True, True]

    run_on(where, program)


# An event belongs to one launch...


@pytest.mark.parametrize("then", ["launch", "replay"])
@on_both
def test_an_event_that_launch_returned_is_never_recorded_again(where: str, then: str) -> None:
    async def program(device: VirtualDevice) -> None:
        async with load(device) as model, model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            given = []
            for _ in range(3):
                given.append(slot.launch())
                await aiotrt.wait(given[-1])
                await until(lambda: count(model, State.READABLE) == 1)
                earlier = list(given)
                with held_slots(device, model):
                    if then == "launch":
                        given.append(slot.launch())
                        pending = asyncio.ensure_future(aiotrt.wait(given[-1]))
                    else:
                        pending = asyncio.ensure_future(slot.replay())
                    await turns()
                    assert not pending.done()
                    assert count(model, State.IN_FLIGHT) == 1, "the later launch must be pending"
                    assert all(event.query() for event in earlier), "an event of an earlier launch was recorded again"
                await pending
                await until(lambda: count(model, State.READABLE) == 1)
            assert len({id(event) for event in given}) == len(given)

    run_on(where, program)


# The turn is passed on whatever happens to the caller...


@pytest.mark.parametrize("what", ["call", "lease", "failing call", "failing lease"])
def test_a_worker_passes_the_turn_on_though_its_caller_has_gone(what: str) -> None:
    """With `overlap=False`, the third launch waits for the first, past a second one that nobody waits for.

    The host device submits no launches in workers, so this law is for the simulated GPU alone.
    """

    async def program(device: Striker) -> None:
        simulated = device.simulated
        async with contextlib.AsyncExitStack() as stack, contextlib.AsyncExitStack() as leases:
            model = await stack.enter_async_context(
                aiotrt.load(
                    Affine(), device=device, slots=3, overlap=False, warmup=BOTH, postprocess=stubborn, hang_timeout=10.0
                )
            )
            slot: Any = None
            if "lease" in what:
                slot = await leases.enter_async_context(model.lease([(3, 3)]))
                slot.inputs[0][...] = frame(2, (3, 3))
            states, slots = executor_of(model).machine.states, executor_of(model).slots
            with contextlib.ExitStack() as latches:
                latch = [latches.enter_context(contextlib.ExitStack()) for _ in slots]
                for one_latch, one_slot in zip(latch, slots, strict=True):
                    one_latch.enter_context(held_streams(simulated, one_slot.stream))
                one = asyncio.ensure_future(model(frame(1)))
                await until(lambda: count(model, State.IN_FLIGHT) == 1)
                first = states.index(State.IN_FLIGHT)
                for index, one_latch in enumerate(latch):
                    if index != first:
                        one_latch.close()  # from here on only the first launch is held
                runs = model.statistics().fallback_runs
                if "failing" in what:
                    device.strike("run", FaultKind.PASSING)
                two = asyncio.ensure_future(model(frame(2, (3, 3))) if slot is None else slot.replay())
                await until(lambda: count(model, State.PREPARING) == 1)
                second = states.index(State.PREPARING)
                if slot is None:
                    two.cancel()
                    await until(two.done)
                else:
                    await leases.aclose()
                assert states[second] is State.DRAINING, "the caller must go while the worker submits"
                assert model.statistics().fallback_runs == runs
                await later()
                if "failing" in what:
                    assert device.happened, "the worker's launch must fail"
                else:
                    assert model.statistics().fallback_runs == runs + 1
                three = asyncio.ensure_future(model(frame(3)))
                await later()
                third = next(i for i, state in enumerate(states) if state is State.IN_FLIGHT and i != first)
                assert not one.done()
                assert not slots[third].stream.query(), "the third launch did not wait for the first"
            assert right(await one, 1)
            assert right(await three, 3)
            await asyncio.wait([two])
            assert two.cancelled() or isinstance(two.exception(), aiotrt.AiotrtError)
            await comes_back(model, 3)
            assert right(await model(frame(4)), 4)

    for seed in range(3):
        device = Striker(SimulatedDevice(seed))
        run_simulated(program(device), device)


# The grant and a cancellation in one loop iteration...


@pytest.mark.parametrize("freed_by", ["call", "lease", "worker"])
@on_both
def test_a_lease_that_is_granted_and_cancelled_in_one_iteration_frees_its_slot(where: str, freed_by: str) -> None:
    """The cancellation comes after the grant, and before the task that entered the lease has run.

    `freed_by` says what the lease waited for: a call or a lease that held the slot, or a worker that prepared it.
    """

    async def program(device: VirtualDevice) -> None:
        # No poll wakes the lease's task itself: the loop does, in the iteration after the grant.
        with woken_by_the_loop():
            await granted_and_cancelled(device)

    async def granted_and_cancelled(device: VirtualDevice) -> None:
        async with load(device) as model:
            holder = model.lease()
            call: asyncio.Future[Any] | None = None
            if freed_by == "lease":
                await holder.__aenter__()
            with held_slots(device, model) if freed_by == "call" else contextlib.nullcontext():
                if freed_by == "call":
                    call = asyncio.ensure_future(model(frame(1)))
                    await until(lambda: count(model, State.IN_FLIGHT) == 1)
                entering = asyncio.ensure_future(model.lease((4, 3) if freed_by == "worker" else None).__aenter__())
                await turns()
                if freed_by == "worker":
                    assert count(model, State.PREPARING) == 1
                else:
                    assert model.statistics().waiting == 1
            if freed_by == "lease":
                await holder.__aexit__(None, None, None)
            await until(lambda: count(model, State.CLAIMED) == 1)
            assert not entering.done(), "the cancellation must come before the lease's task has run"
            entering.cancel()
            with pytest.raises(asyncio.CancelledError):
                await entering
            assert count(model, State.CLAIMED) == 0, "the slot stayed with a lease that nobody entered"
            if call is not None:
                assert right(await call, 1)
            await comes_back(model)
            assert right(await model(frame(2)), 2)
            assert model.statistics().cancelled == 1

    run_on(where, program)


@pytest.mark.parametrize("woken", ["in the poll", "by the loop"])
@pytest.mark.parametrize("kind", ["call", "lease", "new lease", "map", "item"])
@on_both
def test_a_cancellation_at_any_iteration_leaves_the_slot_to_the_next(where: str, kind: str, woken: str) -> None:
    """Try each loop iteration from the moment the slot becomes free until the request has ended."""
    met: set[tuple[bool, State]] = set()  # when it was cancelled: whether it was in the queue, and the state of the slot

    async def second(model: aiotrt.Model, step: int) -> None:
        if "lease" in kind:
            async with model.lease((4 + step, 3) if kind == "new lease" else (2, 3), outputs="numpy") as slot:
                slot.inputs[0][...] = 2.0
        elif kind == "map":
            assert [right(result, 2) async for result in model.map([frame(2)] * 2, in_flight=1)] == [True] * 2
        else:
            assert right(await model(frame(2)), 2)

    async def attempt(device: VirtualDevice, model: aiotrt.Model, step: int) -> bool:
        """Cancel the second of three after `step` iterations. Returns whether it had ended before."""
        before = model.statistics()
        with held_slots(device, model):
            first = asyncio.ensure_future(model(frame(1)))
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            gone = asyncio.ensure_future(second(model, step))
            await turns()
            third = asyncio.ensure_future(model(frame(3)))
            await turns()
            assert model.statistics().waiting == 2
        await turns(step)
        had_ended = gone.done()
        if not had_ended:
            met.add((model.statistics().waiting == 2, executor_of(model).machine.states[0]))
        gone.cancel()
        for _ in range(SOON):
            if first.done() and third.done():
                break
            await asyncio.sleep(0)
        assert first.done(), f"the first call was not served, {kind} cancelled at iteration {step}"
        assert third.done(), f"the slot did not go to the next, {kind} cancelled at iteration {step}"
        assert right(first.result(), 1)
        assert right(third.result(), 3)
        await asyncio.wait([gone])
        assert gone.cancelled() is not had_ended, gone
        await comes_back(model)
        after = model.statistics()
        counted = [getattr(after, name) - getattr(before, name) for name in ("submitted", "completed", "cancelled")]
        left = had_ended and "lease" in kind  # a lease that was left is neither completed nor cancelled
        assert counted[0] == counted[1] + counted[2] + left, f"counted {counted}, {kind} cancelled at iteration {step}"
        return had_ended

    async def program(device: VirtualDevice) -> None:
        options: dict[str, Any] = {"batching": aiotrt.Batching(max_size=1)} if kind == "item" else {}
        async with load(device, **options) as model:
            for step in itertools.count():
                if await attempt(device, model, step):
                    break
                assert step < SOON

    with woken_by_the_loop() if woken == "by the loop" else contextlib.nullcontext():
        run_on(where, program, [Scripted()])
    assert (True, State.IN_FLIGHT) in met, "it was never cancelled in the queue"
    if "lease" not in kind or woken == "by the loop":  # else its task runs in the poll in which it is granted
        assert (False, State.CLAIMED if "lease" in kind else State.IN_FLIGHT) in met, "it was never cancelled with a slot"


# First come, first served...


@on_both
def test_a_request_does_not_pass_earlier_ones_because_a_slot_suits_it(where: str) -> None:
    """Both slots have a graph for the second request, and none for the first."""

    async def program(device: VirtualDevice) -> None:
        served: list[tuple[int, ...]] = []
        async with load(device, slots=2) as model, contextlib.AsyncExitStack() as held_by:
            holders = [await held_by.enter_async_context(model.lease()) for _ in range(2)]

            async def enter(*shape: int) -> None:
                async with model.lease(shape):
                    served.append(shape)

            tasks = []
            for shape in ((4, 3), (2, 3)):
                tasks.append(asyncio.ensure_future(enter(*shape)))
                await turns()
            assert model.statistics().waiting == 2
            assert model.statistics().graphs == 2, "only the second request's shape must have graphs"
            await holders[0].__aexit__(None, None, None)
            await asyncio.gather(*tasks)
            assert served == [(4, 3), (2, 3)], "a later request was served first"

    run_on(where, program)
