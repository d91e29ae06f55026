"""What the simulated device found in the core: each the smallest program that shows it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from aiotrt.testing import FaultKind, SimulatedDevice
from tests.simulated import Striker, run_simulated
from tests.test_laws_simulated import SHAPE, load, right
from tests.tools import count, executor_of, frame


def simulated(program: Callable[[Striker], Coroutine[Any, Any, None]], *, seed: int = 1) -> None:
    device = Striker(SimulatedDevice(seed))
    run_simulated(program(device), device)


async def replayed(lease: aiotrt.Lease, value: float) -> None:
    lease.inputs[0][...] = frame(value)
    await lease.replay()


@pytest.mark.parametrize("kind", [FaultKind.STICKY, FaultKind.PASSING])
def test_a_fault_while_a_lease_is_entered(kind: FaultKind) -> None:
    """`_Hold.open` waits for the gates on the caller's stream; what that raised left the slot with nobody."""

    async def program(device: Striker) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            async with model.lease() as lease:
                await replayed(lease, 1)
            assert executor_of(model).slots[0].gates
            device.strike("wait", kind)
            entering = model.lease()
            with pytest.raises(aiotrt.AiotrtError):
                await entering.__aenter__()
            if kind is FaultKind.STICKY:
                with pytest.raises(aiotrt.AiotrtError):
                    await model(frame(2))
            else:
                assert right(await model(frame(2)), 2)

    simulated(program)


@pytest.mark.parametrize("verb", ["event", "record"])
def test_a_passing_fault_while_a_lease_is_left(verb: str) -> None:
    """As when a consumer named by `consumed` has destroyed its stream: `leave` raised, and the slot stayed READABLE."""

    async def program(device: Striker) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            lease = model.lease()
            await lease.__aenter__()
            await replayed(lease, 1)
            device.strike(verb, FaultKind.PASSING)
            try:
                await lease.__aexit__(None, None, None)
            except aiotrt.AiotrtError:
                pass  # it may say so, and must let go
            assert right(await model(frame(2)), 2)

    simulated(program)


@pytest.mark.parametrize("after", [0, 1])
def test_a_passing_fault_at_one_gate_keeps_the_others(after: int) -> None:
    """`open_gates` took all gates off the slot before it waited for the first."""

    async def program(device: Striker) -> None:
        inner = device.simulated
        async with load(device, slots=1, warmup=frame(0)) as model:
            copies = []
            async with model.lease() as lease:
                await replayed(lease, 1)
                for _ in range(2):
                    consumer = inner.stream()
                    with inner.use(consumer):
                        copies.append(lease.outputs[0].tensor.clone())
                    lease.consumed(consumer)
            device.strike("wait", FaultKind.PASSING, after=after)
            with pytest.raises(aiotrt.AiotrtError):
                await model(frame(2))
            assert right(await model(frame(3)), 3)
            await asyncio.get_running_loop().run_in_executor(None, inner.synchronize)
            assert all(right(inner.read(copy), 1) for copy in copies)

    for seed in range(5):
        simulated(program, seed=seed)


def test_a_failed_launch_keeps_the_consumers_and_the_inputs() -> None:
    """`_Hold._submit` forgot who reads and what was written before it had told the device: a second try used old data."""

    async def program(device: Striker) -> None:
        inner = device.simulated
        async with load(device, slots=1, warmup=frame(0)) as model, model.lease(outputs="numpy") as lease:
            await replayed(lease, 1)
            consumer = inner.stream()
            with inner.use(consumer):
                copy = lease.outputs[0].tensor.clone()
            lease.consumed(consumer)
            lease.inputs[0][...] = frame(2)
            device.strike("record", FaultKind.PASSING)
            with pytest.raises(aiotrt.AiotrtError):
                lease.launch()
            await asyncio.sleep(0.1)
            assert right(await lease.replay(), 2)
            await asyncio.get_running_loop().run_in_executor(None, inner.synchronize)
            assert right(inner.read(copy), 1)

    simulated(program)


def test_a_lease_is_usable_at_once_after_its_engine_raised() -> None:
    """ "After an EngineError the lease is usable", says `Lease.replay`: a second try at once was told to await the first."""
    calls: list[int] = []

    def moody(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("not now")
        return x * 3 + 1

    async def program(device: Striker) -> None:
        inner = device.simulated
        async with aiotrt.load(moody, device=device, slots=1, graphs=False, warmup=frame(0)) as model:
            assert len(calls) == 1
            async with model.lease(outputs="numpy") as lease:
                await asyncio.get_running_loop().run_in_executor(None, inner.synchronize)
                lease.inputs[0][...] = frame(2)
                with pytest.raises(aiotrt.EngineError):
                    await lease.replay()
                assert right(await lease.replay(), 2)

    simulated(program)


def test_launch_raises_only_our_own_errors() -> None:
    """`_Hold.launch` makes its event outside the `try`, and waits on the caller's stream outside it."""

    async def program(device: Striker) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model, model.lease() as lease:
            lease.inputs[0][...] = frame(1)
            for verb in ("event", "wait"):
                device.strike(verb, FaultKind.PASSING)
                with pytest.raises(aiotrt.AiotrtError):
                    lease.launch()
                await asyncio.sleep(0.1)

    simulated(program)


def test_the_first_lease_of_a_model_without_a_graph_is_ordered_after_the_warm_up() -> None:
    """Without a capture nobody waited for the slot's stream, so its zeros could land on what the holder wrote."""

    async def program(device: Striker) -> None:
        inner = device.simulated
        async with load(device, slots=1, graphs=False, warmup=frame(0)) as model, model.lease(outputs="numpy") as lease:
            lease.inputs[0][...] = inner.tensor(frame(2))
            assert right(await lease.replay(), 2)

    for seed in range(10):
        simulated(program, seed=seed)


def test_a_lease_that_is_left_after_its_model_was_closed_in_flight() -> None:
    """`Executor.drop` left the slot DRAINING with its request, so `leave` released it again: IllegalTransitionError."""

    async def program(device: Striker) -> None:
        model = await load(device, slots=1, warmup=frame(0))
        closing: asyncio.Future[None] | None = None
        async with model.lease() as lease:
            lease.inputs[0][...] = frame(1)
            lease.launch()
            closing = asyncio.ensure_future(model.aclose(drain=False))
            while count(model, State.DRAINING) == 0:
                await asyncio.sleep(0)
            with pytest.raises(aiotrt.ModelClosedError):  # its holder is told at its next step
                lease.launch()
        await closing

    simulated(program)


@pytest.mark.parametrize(("verb", "kind"), [("stream", FaultKind.MEMORY), ("event", FaultKind.PASSING)])
def test_a_model_that_could_not_be_opened_leaves_nothing_behind(verb: str, kind: FaultKind) -> None:
    """`Executor.__init__` raised in the device's own words."""

    async def program(device: Striker) -> None:
        from aiotrt.completion import hub as completion

        users = {key: hub._users for key, hub in completion._hubs.items()}
        device.strike(verb, kind)
        with pytest.raises(aiotrt.AiotrtError):
            _ = await load(device)
        assert {key: hub._users for key, hub in completion._hubs.items()} == users

    simulated(program)


def test_results_in_numpy_are_the_callers() -> None:
    """A sanity check of this file: all of the above on a device that works."""

    async def program(device: Striker) -> None:
        async with load(device) as model:
            results = [await model(frame(value)) for value in range(4)]
            assert all(isinstance(result, np.ndarray) and result.shape == SHAPE for result in results)
            assert all(map(right, results, range(4)))

    simulated(program)
