"""Nothing is freed while it is used, and everything is once it is not: caches, copies, forgotten leases, dropped models.

On a simulated device under adversarial schedules, and audited, as in `test_laws_simulated`.
"""

from __future__ import annotations

import asyncio
import gc
import random
import warnings
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

import aiotrt
from aiotrt.runtime import memory
from aiotrt.runtime.slots import State
from aiotrt.testing import FaultKind, SimulatedDevice
from tests.simulated import Striker, held_streams
from tests.test_laws_of_owners_simulated import GROUPS
from tests.test_laws_simulated import SHAPE, load, right, settle, under_schedules
from tests.tools import Affine, count, executor_of, frame, turns


def live_bytes(device: SimulatedDevice) -> int:
    """What somebody owns, of device and pinned memory."""
    device.time.checkpoint("looking at memory")
    device.check()
    return sum(block.memory.nbytes for block in device.memory._blocks.values() if not block.is_free)


@pytest.mark.parametrize("group", GROUPS)
def test_a_model_that_is_gone_keeps_no_memory(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        before = live_bytes(device)
        async with load(device, slots=2, graph_cache_entries=3) as model:
            x = device.tensor(frame(1))
            x._trt_reuse_as_input_buffer = True  # type: ignore[attr-defined]
            await model(x)
            del x
            for value in range(6):
                assert right(await model(frame(value, (choose.randint(1, 3), 3))), value)
            async with model.lease([SHAPE]) as slot:
                slot.inputs[0][...] = frame(1)
                slot.launch()
        del model, slot
        gc.collect()
        assert live_bytes(device) == before

    under_schedules(group, program)


def test_what_is_evicted_is_freed_without_the_garbage_collector() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, graph_cache_entries=1) as model:
            gc.collect()
            gc.disable()
            try:
                sizes = []
                for value in range(6):
                    assert right(await model(frame(value, (value + 1, 16))), value)
                    await asyncio.sleep(0.1)
                    sizes.append(live_bytes(device) / (value + 1))
                assert max(sizes) == min(sizes), sizes
            finally:
                gc.enable()

    under_schedules(0, program)


@pytest.mark.parametrize("forgotten", [False, True])
def test_what_a_lease_had_is_freed_without_the_garbage_collector(forgotten: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            gc.collect()
            gc.disable()
            try:
                lease = model.lease()
                slot = await lease.__aenter__()
                slot.inputs[0][...] = frame(1)
                await slot.replay()
                hold = weakref.ref(lease._hold)  # what all its buffers refer to
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ResourceWarning)
                    if not forgotten:
                        await lease.__aexit__(None, None, None)
                    del slot, lease
                await asyncio.sleep(0.1)
                await settle(model, 1)
                assert hold() is None
            finally:
                gc.enable()

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_the_least_recently_used_graph_goes_first(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, graph_cache_entries=2) as model:
            captures = []
            for rows in (1, 2, 1, 3, 1, 2):
                assert right(await model(frame(1, (rows, 3))), 1)
                captures.append(model.statistics().captures)
            assert captures == [1, 2, 2, 3, 3, 4]
            assert model.statistics().evictions == 2
            for rows in (1, 1, 4, 5):  # how often one was used does not count, only when
                assert right(await model(frame(1, (rows, 3))), 1)
            captures = [model.statistics().captures]
            assert right(await model(frame(1, (4, 3))), 1)
            assert model.statistics().captures == captures[0]

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_the_cache_is_bounded_in_bytes(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, graph_cache_bytes=72 * 3) as model:
            for rows in (2, 1, 3, 1, 4, 2):
                assert right(await model(frame(rows, (rows, 3))), rows)
                statistics = model.statistics()
                assert statistics.graph_bytes <= 72 * 3
                assert statistics.graph_bytes >= 36 * rows

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_eviction_waits_for_who_reads_the_outputs(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, graph_cache_entries=2, warmup=frame(0)) as model:
            reader = device.stream()

            async def read_late() -> torch.Tensor:
                async with model.lease() as slot:
                    slot.inputs[0][...] = frame(3)
                    await slot.replay()
                    with device.use(reader):
                        copy: torch.Tensor = slot.outputs[0].tensor.clone()
                    slot.consumed(reader)
                    return copy

            with held_streams(device, reader):
                copy = await read_late()  # from here on nobody but the cache keeps the graph
                calls = [asyncio.ensure_future(model(frame(value, (1, 5)))) for value in range(2)]
                await asyncio.sleep(choose.choice([0, 1e-5, 1e-2]))
            assert all(map(right, await asyncio.gather(*calls), range(2)))
            assert model.statistics().evictions == 2
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert right(device.read(copy), 3)

    under_schedules(group, program)


@pytest.mark.parametrize("verb", ["capture", "empty", "call"])
@pytest.mark.parametrize("group", GROUPS)
def test_out_of_memory_evicts_what_nobody_uses_and_tries_again(group: int, verb: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with load(striker, slots=2) as model:
            assert right(await model(frame(1)), 1)
            striker.strike(verb, FaultKind.MEMORY)
            assert right(await model(frame(2, (5, 5))), 2)
            statistics = model.statistics()
            assert (statistics.evictions, statistics.graphs, statistics.failed) == (1, 1, 0)
            striker.strike(verb, FaultKind.MEMORY)
            striker.strike(verb, FaultKind.MEMORY, after=1)
            message = "OutOfMemoryError while it was prepared; use fewer slots"
            with pytest.raises(aiotrt.EngineError, match=message) as caught:
                await model(frame(2, (7, 7)))
            assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
            await settle(model, 2)
            assert right(await model(frame(3)), 3)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_out_of_pinned_memory_leaves_nothing_behind(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        striker = Striker(device)
        async with load(striker, slots=1) as model:
            striker.strike("pinned", choose.choice([FaultKind.MEMORY, FaultKind.PASSING]), after=choose.randint(0, 1))
            with pytest.raises(aiotrt.EngineError):
                await model(frame(1))
            await settle(model, 1)
            assert model.statistics().graphs == 0
            assert right(await model(frame(2)), 2)
            # A graph that was made for the device has no staging for results yet: out of memory, it is made anew.
            async with model.lease([(1, 3)]) as slot:
                slot.inputs[0][...] = frame(1, (1, 3))
                slot.launch()
            striker.strike("pinned", FaultKind.MEMORY)
            assert right(await model(frame(3, (1, 3))), 3)
            assert model.statistics().evictions == 2

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_copies_in_worker_threads_keep_what_they_use(group: int) -> None:
    """As large inputs and results are copied: here everything counts as large."""

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        slots = choose.randint(1, 2)
        async with load(device, slots=slots) as model:

            async def call(value: float) -> None:
                assert right(await model(frame(value)), value)

            await call(0)
            tasks = [asyncio.ensure_future(call(value)) for value in range(10)]
            for task in tasks:
                for _ in range(choose.choice([0, 1, 5, 20, 100])):
                    await asyncio.sleep(0)
                if choose.random() < 0.5:
                    task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError), result
            await settle(model, slots)
            assert all_told(model)

    with mock.patch("aiotrt.runtime.executor.COPY_ON_LOOP_BYTES", 0):
        under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_call_that_is_cancelled_while_its_results_are_copied_keeps_its_slot_until_they_are(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            workers: Any = executor_of(model)._workers
            call = asyncio.ensure_future(model(frame(1)))
            while not call.done() and (count(model, State.IN_FLIGHT) == 0 or not workers._busy):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            assert right(await model(frame(2)), 2)

    with mock.patch("aiotrt.runtime.executor.COPY_ON_LOOP_BYTES", 0):
        under_schedules(group, program)


def all_told(model: aiotrt.Model) -> bool:
    total = model.statistics()
    return total.submitted == total.completed + total.failed + total.cancelled


@pytest.mark.parametrize("where", ["on the loop", "in a worker"])
@pytest.mark.parametrize("group", GROUPS)
def test_out_of_host_memory_for_results_fails_that_call_only(group: int, where: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:

            def full(*_: object) -> object:
                raise MemoryError

            with mock.patch("aiotrt.runtime.executor.own", full):
                with pytest.raises(aiotrt.EngineError, match="MemoryError while its results were copied"):
                    await model(frame(1))
            await settle(model, 1)
            assert right(await model(frame(2)), 2)
            assert all_told(model)

    with mock.patch("aiotrt.runtime.executor.COPY_ON_LOOP_BYTES", 0 if where == "in a worker" else 1 << 20):
        under_schedules(group, program)


# Leases that overlap launches, and readers who use handshakes...


@pytest.mark.parametrize("group", GROUPS)
def test_a_slot_is_free_after_the_last_of_several_launches(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            for _ in range(2):
                async with model.lease(outputs="numpy") as slot:
                    slot.inputs[0][...] = frame(1)
                    event = slot.launch()
                    for _ in range(choose.randint(1, 3)):
                        event = slot.launch()
                        if choose.random() < 0.3:
                            await asyncio.sleep(1e-5)
                    if choose.random() < 0.5:
                        await aiotrt.wait(event)
                assert right(await model(frame(2)), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_reader_may_say_that_it_is_done_before_the_next_launch_of_the_same_lease(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model, model.lease() as slot:
            copies = []
            for value in range(3):
                slot.inputs[0][...] = frame(value)
                output = await slot.replay()
                reader = device.stream()
                reader.wait(output._trt_produce_event)
                with device.use(reader):
                    copies.append(output.clone())
                if choose.random() < 0.5:
                    output._trt_graph_state.consumer_done_event = reader.record()
                else:
                    slot.consumed(reader)
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert all(right(device.read(copy), value) for value, copy in enumerate(copies))

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_lease_entered_on_one_stream_and_launched_on_another_waits_for_the_last_readers(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            copies = []
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                await slot.replay()
                reader = device.stream()
                with device.use(reader):
                    copies.append(slot.outputs[0].tensor.clone())
                slot.consumed(reader)
            async with model.lease() as slot:
                other = device.stream()
                with device.use(other):
                    slot.inputs[0][...] = frame(2)
                    await slot.replay()
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert right(device.read(copies[0]), 1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_who_copies_from_a_lease_reads_it(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            other = device.stream()
            async with model.lease(outputs="numpy") as second:
                async with model.lease() as first:
                    first.inputs[0][...] = frame(1)
                    other.wait(first.launch())
                    with device.use(other):
                        second.inputs[0][...] = first.outputs[0]
                assert right(await model(frame(7)), 7)
                with device.use(other):
                    second.launch()
                assert right(await second.replay(), 4)

    under_schedules(group, program)


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_after_a_cancelled_replay_the_outputs_are_read_in_order(group: int, graphs: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0), graphs=graphs) as model:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(3)
                replay = asyncio.ensure_future(slot.replay())
                while count(model, State.IN_FLIGHT) == 0:
                    await asyncio.sleep(0)
                with held_streams(device, device.current_stream()):
                    replay.cancel()
                    await asyncio.wait([replay])
                    mine = slot.outputs[0].tensor.clone()
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert right(device.read(mine), 3)

    under_schedules(group, program)


def test_results_on_the_device_can_be_written_whoever_infers_meanwhile() -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            inputs = [device.tensor(frame(value)) for value in range(3)]
            with torch.inference_mode():  # the mode is the thread's, and so that of all tasks while this one waits
                results = await asyncio.gather(*map(model, inputs))
            for value, result in enumerate(results):
                assert not result.is_inference()
                assert right(device.read(result), value)

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_outputs_from_before_a_cancelled_replay_are_read_in_order_after_it(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model, model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            output = await slot.replay()
            slot.inputs[0][...] = frame(2)
            replay = asyncio.ensure_future(slot.replay())
            await turns(1)
            replay.cancel()
            await asyncio.wait([replay])
            with device.use():
                copy = output.clone()
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert right(device.read(copy), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("use", ["read", "chain", "write", "two streams"])
@pytest.mark.parametrize("group", GROUPS)
def test_buffers_are_used_in_order_while_a_replay_is_awaited_elsewhere(group: int, use: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:
            copies = []
            async with model.lease() as slot, model.lease(outputs="numpy") as other:
                slot.inputs[0][...] = frame(1)
                replay = asyncio.ensure_future(slot.replay())
                await turns(1)
                if use == "write":
                    slot.inputs[0][...] = device.tensor(frame(2))
                if use == "chain":
                    other.inputs[0][...] = slot.outputs[0]
                    assert right(await other.replay(), 4)
                else:
                    if use == "two streams":
                        side = device.stream()
                        with device.use(side):
                            copies.append(slot.outputs[0].tensor.clone())
                        slot.consumed(side)
                    with device.use():
                        copies.append(slot.outputs[0].tensor.clone())
                await replay
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert all(right(device.read(copy), 1) for copy in copies)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_graph_results_on_the_device_belong_to_the_callers_stream(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, graphs=False) as model:
            totals = []
            for value in range(6):
                stream = device.stream() if choose.random() < 0.5 else device.current_stream()
                with device.use(stream):
                    result = await model(device.tensor(frame(value)))
                    totals.append(result.sum())
                    del result
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert [device.read(total).item() for total in totals] == [6 * (3 * value + 1) for value in range(6)]

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_graph_the_shape_of_a_result_may_depend_on_the_data(group: int) -> None:
    def positive(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0] * 3 + 1

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with aiotrt.load(positive, device=device, slots=1, graphs=False) as model:
            for positives in (2, 6, 1, 4, 4, 3):
                x = frame(-1)
                x.flat[:positives] = 5
                result = await model(x) if choose.random() < 0.5 else device.read(await model(device.tensor(x)))
                assert result.shape == (positives,)
                assert right(result, 5)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_functions_before_and_after_the_engine(group: int) -> None:
    def prepare(x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"x": x + 1}

    def finish(y: torch.Tensor) -> torch.Tensor:
        return y - 3 + (0 if y.sum().item() >= 0 else 1)  # the host must see it, so this cannot be captured

    def finish_on_the_device(y: torch.Tensor) -> torch.Tensor:
        return y - 3

    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        hard = choose.random() < 0.5
        async with aiotrt.load(
            Affine(), device=device, slots=2, preprocess=prepare, postprocess=finish if hard else finish_on_the_device
        ) as model:
            results = await asyncio.gather(*[model(frame(value)) for value in range(6)])
            assert all(right(result, value) for value, result in enumerate(results))
            fallbacks = model.statistics().fallbacks
            assert len(fallbacks) == hard
            if hard:
                assert fallbacks[0].startswith("postprocess could not be captured: ")
                assert "operation not permitted when stream is capturing" in fallbacks[0]

    under_schedules(group, program)


# What is forgotten...


@pytest.mark.parametrize("launched", ["never", "in flight", "complete", "in a worker"])
@pytest.mark.parametrize("group", GROUPS)
def test_a_forgotten_lease_comes_back_when_the_device_is_idle(group: int, launched: str) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        graphs = launched != "in a worker"
        async with load(device, slots=1, warmup=frame(0), graphs=graphs) as model:
            copies = []
            reader = device.stream()  # that nobody is told of
            lease = model.lease()
            slot = await lease.__aenter__()
            buffer = slot.inputs[0]
            if launched != "never":
                buffer[...] = frame(1)
                if graphs:
                    reader.wait(slot.launch())
                else:
                    replay = asyncio.ensure_future(slot.replay())
                    while count(model, State.PREPARING) == 0:
                        await asyncio.sleep(0)
                    replay.cancel()
                    await asyncio.wait([replay])
                    del replay
                if launched == "complete":
                    while count(model, State.READABLE) == 0:
                        await asyncio.sleep(1e-5)
                if graphs:
                    with device.use(reader):
                        copies.append(slot.outputs[0].tensor.clone())
            with pytest.warns(ResourceWarning, match="was never left: use 'async with'"):
                del slot, lease
                gc.collect()
            with pytest.raises(aiotrt.UsageError, match="has ended"):
                buffer[...] = frame(5)
            assert right(await model(frame(2)), 2)
            await settle(model, 1)
            with held_streams(device, device.stream()) if graphs else held_streams(device):
                # The next lease has nothing to do with that: it comes back although the device is busy elsewhere.
                async with model.lease() as slot:
                    slot.inputs[0][...] = frame(1)
                    slot.launch()
                bystander = device.stream()
                with held_streams(device, bystander), device.use(bystander):
                    device.tensor(frame(1))
                    await settle(model, 1)
            await asyncio.get_running_loop().run_in_executor(None, device.synchronize)
            assert all(right(device.read(copy), 1) for copy in copies)

    under_schedules(group, program)


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_a_device_that_is_never_idle_again_hangs_whoever_waits_for_a_forgotten_lease(group: int, launched: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        model = await load(device, slots=1, warmup=frame(0))
        slot = await model.lease().__aenter__()
        slot.inputs[0][...] = frame(1)
        if launched:
            slot.launch()
        reader = device.stream()
        with held_streams(device, reader):
            reader.record()
            with pytest.warns(ResourceWarning, match="was never left"):
                del slot
                gc.collect()
            call = asyncio.ensure_future(model(frame(2)))
            async with asyncio.timeout(5.0):
                with pytest.raises(aiotrt.DeviceHangError, match="a lease was forgotten, and the device was not idle"):
                    await call
                await model.aclose()

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_forgotten_lease_that_came_back_breaks_nothing_later(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0)) as model:
            slot = await model.lease().__aenter__()
            with pytest.warns(ResourceWarning, match="was never left"):
                del slot
                gc.collect()
            await asyncio.sleep(3.0)
            assert right(await model(frame(2)), 2)

    under_schedules(group, program)


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_a_model_that_was_forgotten_says_so_and_keeps_what_is_in_use(group: int, busy: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        kept = len(memory._kept)
        model = await load(device, slots=1, warmup=frame(0))
        if busy:
            call = asyncio.ensure_future(model(frame(1)))
            while count(model, State.IN_FLIGHT) == 0:
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            del call
        workers = executor_of(model)._workers
        with pytest.warns(ResourceWarning, match="was never closed: use 'async with'"):
            del model
            gc.collect()
        assert workers._is_shut  # type: ignore[attr-defined]
        assert len(memory._kept) == kept + busy
        await asyncio.sleep(0.1)

    under_schedules(group, program)


@pytest.mark.parametrize("group", GROUPS)
def test_a_model_lives_as_long_as_somebody_has_a_slot_of_it(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async def use() -> bool:
            async with (await load(device, slots=1, warmup=frame(0))).lease(outputs="numpy") as slot:
                gc.collect(1)
                slot.inputs[0][...] = frame(2)
                return right(await slot.replay(), 2)

        with pytest.warns(ResourceWarning, match="was never closed: use 'async with'"):
            using = asyncio.ensure_future(use())
            await asyncio.wait([using])
        assert using.result()

    under_schedules(group, program)


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("group", GROUPS)
def test_what_a_lease_has_that_is_forgotten_with_its_model_is_kept(group: int, launched: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        kept = len(memory._kept)
        slot = await (await load(device, slots=1, warmup=frame(0))).lease().__aenter__()
        slot.inputs[0][...] = frame(1)
        if launched:
            slot.launch()
        buffer, executor = slot.inputs[0], slot._executor
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one that is recorded keeps the lease that it is of
            del slot
            gc.collect()
        assert executor.is_discarded
        assert len(memory._kept) == kept + 1
        await asyncio.sleep(0.1)  # nothing of this is for the loop's exception handler
        with pytest.raises(aiotrt.UsageError, match="this lease has ended"):
            buffer[...] = frame(2)
        with pytest.raises(aiotrt.ModelClosedError, match="is closed"):
            executor.submit((frame(1),), {})  # type: ignore[unused-awaitable]

    under_schedules(group, program)


def test_a_model_that_outlives_its_loop_lets_go_of_everything() -> None:
    """On a loop of asyncio's own: there is a real timer, whose file must be closed."""
    from aiotrt.completion import hub as completion

    hubs: list[completion.Hub] = []

    async def main() -> aiotrt.Model:
        model = await aiotrt.load(Affine(), device="host", slots=1, warmup=frame(0))
        hubs.append(executor_of(model).hub)
        return model

    model: aiotrt.Model | None = asyncio.run(main())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del model
        gc.collect()
    assert hubs[0]._closed
    assert hubs[0] not in completion._hubs.values()


# Results and inputs in the caller's hands...


@pytest.mark.parametrize("group", GROUPS)
def test_inputs_that_the_caller_drops_at_once_are_read_all_the_same(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=2, warmup=frame(0)) as model:

            async def call(value: float) -> None:
                result = await model(device.tensor(frame(value)))
                assert right(device.read(result), value)

            tasks = [asyncio.ensure_future(call(value)) for value in range(6)]
            for task in tasks:
                for _ in range(choose.choice([0, 1, 5, 20])):
                    await asyncio.sleep(0)
                if choose.random() < 0.5:
                    task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert result is None or isinstance(result, asyncio.CancelledError), result
            for _ in range(4):  # memory that was dropped is handed out again at once
                with device.use():
                    device.tensor(frame(-1))
            await settle(model, 2)

    under_schedules(group, program)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_lease_that_replays_for_long_makes_no_more_events(graphs: bool) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        async with load(device, slots=1, warmup=frame(0), graphs=graphs) as model, model.lease([SHAPE]) as slot:
            slot.inputs[0][...] = frame(1)
            await slot.replay()
            with mock.patch.object(SimulatedDevice, "event", side_effect=AssertionError("one more event")):
                for _ in range(20):
                    assert right(device.read(await slot.replay()), 1)

    under_schedules(0, program)


@pytest.mark.parametrize("group", GROUPS)
def test_without_a_graph_what_the_function_keeps_is_handed_to_nobody(group: int) -> None:
    async def program(device: SimulatedDevice, choose: random.Random) -> None:
        table = device.tensor(frame(5))
        await aiotrt.wait(device.current_stream().record())
        kept = table.data_ptr()
        async with aiotrt.load(lambda x: table, device=device, slots=1, graphs=False) as model:
            for _ in range(choose.randint(1, 3)):
                result = await model(device.tensor(frame(1)))
                assert result.data_ptr() != kept
                assert (device.read(result) == 5).all()
                async with model.lease() as slot:
                    slot.inputs[0][...] = device.tensor(frame(1))
                    for _ in range(choose.randint(1, 2)):
                        view = await slot.replay()
                        assert view.data_ptr() != kept
                        assert (device.read(view) == 5).all()
            assert (device.read(table) == 5).all()
            await settle(model, 1)

    under_schedules(group, program)
