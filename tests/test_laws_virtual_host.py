"""The laws where host memory is device memory: on the host device in virtual time, under many schedules.

What the runtime does there and nowhere else: host writes wait for the last readers, copies between buffers stand in line on
a stream that stands in for the caller's, and what the work itself raised comes out of its event.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from tests.test_laws_simulated import SHAPE, right, settle
from tests.tools import Affine, count, executor_of, frame, turns
from tests.virtual_host import VirtualHost, run_on_host

#: Each test runs under this many schedules.
SEEDS = range(15)
GROUPS = range(1)


def under_schedules(group: int, program: Callable[[VirtualHost, random.Random], Awaitable[None]]) -> None:
    for seed in SEEDS:
        seed += group * len(SEEDS)
        device = VirtualHost(seed)

        async def main(device: VirtualHost = device, seed: int = seed) -> None:
            await program(device, random.Random(seed))

        try:
            run_on_host(main(), device)
        except BaseException as error:
            error.add_note(f"under the schedule with seed {seed}")
            raise


def load(device: VirtualHost, *, slots: int = 2, **options: Any) -> aiotrt.Model:
    model: aiotrt.Model = aiotrt.load(Affine(), device=device, slots=slots, hang_timeout=1.0, **options)
    return model


@pytest.mark.parametrize("group", GROUPS)
def test_results_on_the_device_are_the_callers_own_however_often(group: int) -> None:
    async def program(device: VirtualHost, choose: random.Random) -> None:
        async with load(device, slots=1, outputs="device") as model:
            results = [await model(frame(value)) for value in range(4)]
            for value, result in enumerate(results):
                assert right(result, value)

    under_schedules(group, program)


def above(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0]


@pytest.mark.parametrize("group", GROUPS)
def test_results_of_another_shape_each_time_are_right(group: int) -> None:
    async def program(device: VirtualHost, choose: random.Random) -> None:
        async with aiotrt.load(above, device=device, slots=1, warmup=np.zeros(6, np.float32)) as model:
            for count in (3, 3, 3, 5, 1, 1):
                x = np.asarray([1.0] * count + [-1.0] * (6 - count), np.float32)
                assert (await model(x)).tolist() == [1.0] * count

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_concurrent_calls_get_their_own_results(group: int) -> None:
    async def program(device: VirtualHost, choose: random.Random) -> None:
        slots = choose.randint(1, 3)
        async with load(device, slots=slots, graphs=choose.random() < 0.7) as model:

            async def call(value: float) -> None:
                await asyncio.sleep(choose.uniform(0, 1e-3))
                if choose.random() < 0.5:
                    assert right(await model(frame(value)), value)
                else:
                    assert right(await model(torch.full(SHAPE, float(value))), value)

            tasks = [asyncio.ensure_future(call(value)) for value in range(10)]
            for task in tasks:
                for _ in range(choose.choice([0, 1, 5, 20, 100])):
                    await asyncio.sleep(0)
                if choose.random() < 0.3:
                    task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError), result
            await settle(model, slots)

    under_schedules(group, program)


def reading(model: aiotrt.Model, slot: aiotrt.Lease, seen: list[tuple[float, Any]], value: float) -> aiotrt.Lease:
    """A stream of a consumer's own that reads an input and an output, and is named as a reader."""
    side = model.stream()
    side.wait(slot.launch())
    buffers = slot.inputs[0], slot.outputs[0]

    def read() -> None:
        seen.append((value, [buffer.tensor.clone() for buffer in buffers]))

    side.run(read)
    slot.consumed(side)
    return slot


@pytest.mark.parametrize("group", GROUPS)
def test_a_consumer_gates_the_next_host_write_and_the_next_launch(group: int) -> None:
    async def program(device: VirtualHost, choose: random.Random) -> None:
        slots = choose.randint(1, 2)
        async with load(device, slots=slots, warmup=frame(0)) as model:
            seen: list[tuple[float, Any]] = []

            async def lease(value: float) -> None:
                async with model.lease() as slot:
                    slot.inputs[0][...] = frame(value)
                    for _ in range(choose.randint(1, 2)):
                        reading(model, slot, seen, value)

            async def call(value: float) -> None:
                assert right(await model(frame(value)), value)

            await asyncio.gather(*[choose.choice([lease, call])(value) for value in range(10)])
            await settle(model, slots)
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert all(right(read[1], value) and bool((read[0] == value).all()) for value, read in seen)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_reader_that_never_ends_is_a_hang_for_the_next_caller_and_for_closing(group: int) -> None:
    async def program(device: VirtualHost, choose: random.Random) -> None:
        model = await load(device, slots=1, warmup=frame(0))
        never: Any = device.event()
        reached: Any = device.current_stream().record()
        never.last = type(reached.last)()  # a record that no stream ever reaches
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            event = slot.launch()
            for _ in range(2):
                side = model.stream()
                side.wait(event)
                side.wait(never)
                slot.consumed(side)
        if choose.random() < 0.5:
            calls = [asyncio.ensure_future(model(frame(value))) for value in range(2)]
            for call in calls:
                with pytest.raises(aiotrt.DeviceHangError):
                    await call
            assert not model.is_ready
        executor = executor_of(model)
        await model.aclose()
        assert executor.broken is not None
        left = list(executor.hub.lanes)
        assert not left

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_reader_that_raises_reads_no_more_and_that_is_all(group: int) -> None:
    def read() -> None:
        raise KeyError("the reader's own business")

    async def program(device: VirtualHost, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0), graph_cache_entries=1) as model:
            for value in range(4):
                async with model.lease([SHAPE]) as slot:
                    slot.inputs[0][...] = frame(value)
                    side = model.stream()
                    side.wait(slot.launch())
                    side.run(read)
                    slot.consumed(side)
                rows = choose.choice([2, 3])  # the other one evicts, and the eviction waits for the reader
                assert right(await model(frame(value, (rows, 3))), value)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_leases_chain_on_the_device_and_host_writes_keep_their_place(group: int) -> None:
    async def program(device: VirtualHost, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            for value in range(4):
                async with model.lease() as first, model.lease(outputs="numpy") as second:
                    first.inputs[0][...] = frame(value)
                    first.launch()
                    second.inputs[0][...] = first.outputs[0]
                    if choose.random() < 0.5:
                        second.inputs[0][0] = np.full(3, 7, np.float32)
                        result = await second.replay()
                        assert right(result[0], 7)
                        assert right(result[1], 3 * value + 1)
                    else:
                        assert right(await second.replay(), 3 * value + 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_the_host_is_not_handed_what_is_not_complete(group: int) -> None:
    async def program(device: VirtualHost, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(2)
                slot.launch()
                with pytest.raises(aiotrt.UsageError, match="not complete"):
                    _ = slot.outputs[0].tensor
                with pytest.raises(aiotrt.UsageError, match="not complete"):
                    slot.inputs[0][...] = frame(3)
                while count(model, State.READABLE) == 0:
                    await asyncio.sleep(1e-5)
                assert right(slot.outputs[0].tensor, 2)
                assert right(slot.outputs[0].host, 2)
                replay = asyncio.ensure_future(slot.replay())
                await turns()
                replay.cancel()
            assert right(await model(frame(5)), 5)

    under_schedules(group, program)


class OddError(BaseException):
    """No `Exception`."""


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (ValueError, "ValueError while it ran: thirteen"),
        (SystemExit, "RuntimeError while it ran: the work raised SystemExit: thirteen"),
        (asyncio.CancelledError, "RuntimeError while it ran: the work raised CancelledError: thirteen"),
        (OddError, "RuntimeError while it ran: the work raised OddError: thirteen"),
    ],
)
@pytest.mark.parametrize("group", GROUPS)
def test_an_engine_that_raises_for_one_input_fails_that_call_only(group: int, kind: type[BaseException], said: str) -> None:
    def picky(x: torch.Tensor) -> torch.Tensor:
        if x[0, 0] == 13:
            raise kind("thirteen")
        return x * 3 + 1

    async def program(device: VirtualHost, choose: random.Random) -> None:
        graphs = choose.random() < 0.5
        async with aiotrt.load(picky, device=device, slots=2, warmup=frame(0), graphs=graphs) as model:
            outcomes = await asyncio.gather(*(model(frame(i)) for i in range(11, 16)), return_exceptions=True)
            for i, outcome in enumerate(outcomes, 11):
                if i == 13:
                    assert isinstance(outcome, aiotrt.EngineError)
                    assert f"picky raised {said}" in str(outcome)
                    cause = outcome.__cause__
                    assert cause is not None
                    assert isinstance(cause, kind) or isinstance(cause.__cause__, kind)
                else:
                    assert right(outcome, i), outcome
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(13)
                with pytest.raises(aiotrt.EngineError, match="thirteen"):
                    await slot.replay()
                slot.inputs[0][...] = frame(1)
                assert right(await slot.replay(), 1)
            await settle(model, 2)
            assert model.statistics().failed == 1

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_closing_frees_after_the_last_reader(group: int) -> None:
    async def program(device: VirtualHost, choose: random.Random) -> None:
        seen: list[tuple[float, Any]] = []
        async with load(device, slots=2, warmup=frame(0)) as model:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                reading(model, slot, seen, 1)
        assert len(seen) == 1  # closing waited

    under_schedules(group, program)
