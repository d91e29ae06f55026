"""Both sides of Roboflow's handshake, on the simulated GPU under several schedules, with every access checked for races."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

import aiotrt
from aiotrt.runtime.handshake import GraphState
from aiotrt.testing import HazardError, SimulatedDevice
from tests.simulated import run_simulated
from tests.test_laws_simulated import load, right
from tests.tools import frame

SEEDS = range(5)


def simulated(program: Callable[[SimulatedDevice], Coroutine[Any, Any, None]], seed: int) -> None:
    device = SimulatedDevice(seed)
    run_simulated(program(device), device)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_marked_input_is_read_where_it_is(seed: int) -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1) as model:
            x, y = device.tensor(frame(2)), device.tensor(frame(3))
            x._trt_reuse_as_input_buffer = y._trt_reuse_as_input_buffer = True  # type: ignore[attr-defined]
            assert right(device.read(await model(x)), 2)
            with device.use():
                x.fill_(5)  # the producer writes the next frame into the same buffer
            assert right(device.read(await model(x)), 5)
            assert model.statistics().captures == 1
            # Another buffer has a graph of its own: the first one's is neither used for it nor written to.
            assert right(device.read(await model(y)), 3)
            assert model.statistics().captures == 2
            assert right(device.read(await model(x)), 5)
            assert right(device.read(await model(device.tensor(frame(7)))), 7)

    simulated(program, seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("marked", [True, False])
def test_a_producer_may_write_again_once_its_input_was_consumed(seed: int, marked: bool) -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            producer = device.stream()
            x = device.tensor(frame(0))
            producer.wait(device.current_stream().record())
            if marked:
                x._trt_reuse_as_input_buffer = True  # type: ignore[attr-defined]
            for value in range(4):
                if value:
                    producer.wait(x._trt_consumed_event)  # type: ignore[attr-defined]
                with device.use(producer):
                    x.fill_(value)
                x._trt_ready_event = producer.record()  # type: ignore[attr-defined]
                assert right(device.read(await model(x)), value)

    simulated(program, seed)


async def reads(device: SimulatedDevice, *, says: list[bool], again: bool = False) -> None:
    """Readers on streams of their own, each of which says that it is done, or forgets to; launched `again` by the lease."""
    async with load(device, slots=1, warmup=frame(0)) as model:
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            output = await slot.replay()
            copies = []
            for done in says:
                reader = device.stream()
                reader.wait(output._trt_produce_event)
                with device.use(reader):
                    copies.append(output.clone())
                if done:
                    output._trt_graph_state.consumer_done_event = reader.record()
            if again:
                await slot.replay()
        assert right(await model(frame(9)), 9)
        await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
        assert all(right(device.read(copy), 1) for copy in copies)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("says", [[True], [True, True]])
def test_readers_that_say_so_gate_the_next_replay(seed: int, says: list[bool], again: bool) -> None:
    simulated(lambda device: reads(device, says=says, again=again), seed)


@pytest.mark.parametrize("says", [[False], [False, True], [True, False]])
def test_a_reader_that_forgets_is_found(says: list[bool]) -> None:
    with pytest.raises((HazardError, AssertionError)) as caught:
        for seed in SEEDS:
            simulated(lambda device: reads(device, says=says), seed)
    story = [str(caught.value), *getattr(caught.value, "__notes__", ())]
    assert any("write before read" in line for line in story)


def test_every_reader_counts_not_the_last_one_only() -> None:
    device = SimulatedDevice(1)
    state = GraphState()
    first, second = device.event(), device.event()
    state.consumer_done_event = first
    state.consumer_done_event = None
    state.consumer_done_event = second
    assert state.consumer_done_event is second
    assert state.take() == [first, second]
    assert state.take() == []
    assert state.consumer_done_event is None


@pytest.mark.parametrize("seed", SEEDS)
def test_results_carry_events_that_can_be_awaited(seed: int) -> None:
    async def program(device: SimulatedDevice) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            result = await model(device.tensor(frame(2)))
            await aiotrt.wait(result)
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                event = slot.launch()
                output: Any = slot.outputs[0].tensor
                assert output._trt_produce_event is event
                await aiotrt.wait(output)
                slot.launch()
                assert output._trt_produce_event is event
                second: Any = slot.outputs[0].tensor
                assert second._trt_produce_event is not event

    simulated(program, seed)
