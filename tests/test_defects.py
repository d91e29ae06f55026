"""None of the eighteen defects of the original, through the public API: on the simulated GPU, on the host, and on a GPU.

Streams are held, so that the window in which the defect would show stays open. The models of the defects themselves are in
`tests/testing/test_origin_defects.py` and `test_origin_habits.py`; docs/internals/verification.md describes B1 to B18.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import aiotrt
from tests.places import Place, on_every_device, on_every_gpu
from tests.tools import frame, turns, until


@on_every_device
async def test_b1_an_input_in_the_making_is_waited_for(place: Place) -> None:
    async with place.load() as first, place.load() as second, first.lease() as a, second.lease(outputs="numpy") as b:
        with place.held(first):
            a.inputs[0][...] = frame(1)
            a.launch()
            b.inputs[0][...] = a.outputs[0]
            replay = asyncio.ensure_future(b.replay())
            await place.some_time()
            assert not replay.done()
        assert place.is_right(await replay, 4)


@on_every_gpu
async def test_b1_an_input_on_the_device_is_waited_for(place: Place) -> None:
    async with place.load() as model:
        x = place.tensor(-1)
        producer = model.stream()
        producer.wait(place.device.current_stream().record())
        with place.gate(producer):
            producer.run(lambda: x.fill_(5))
            x._trt_ready_event = producer.record()  # type: ignore[attr-defined]
            call = asyncio.ensure_future(model(x))
            await place.some_time()
            assert not call.done()
        assert place.is_right(await call, 5)
        producer.close()


@on_every_device
async def test_b2_the_produce_event_is_of_the_stream_that_runs_the_graph(place: Place) -> None:
    async with place.load() as model, model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        with place.held(model):
            event = slot.launch()
            for _ in range(100):
                assert not place.device.query(event)
                await asyncio.sleep(0)
        await aiotrt.wait(event)
        assert place.is_right(slot.outputs[0].tensor, 1)


@on_every_device
async def test_b3_a_capture_elsewhere_is_not_broken_and_breaks_nothing(place: Place) -> None:
    async with place.load(slots=2) as model:
        with place.captured_elsewhere():
            for _ in range(3):
                results = await asyncio.gather(*(model(frame(i)) for i in range(8)))
                assert all(map(place.is_right, results, range(8)))
            async with model.lease(outputs="numpy") as slot:
                slot.inputs[0][...] = frame(9)
                assert place.is_right(await slot.replay(), 9)


@on_every_device
async def test_b4_what_the_caller_reads_at_once_is_waited_for(place: Place) -> None:
    async with place.load() as model, model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        current, mine = place.device.current_stream(), None
        with place.held(model):
            slot.launch()
            if place.has_memory:
                mine = slot.outputs[0].tensor.clone()
                assert not place.device.query(current.record())
            else:  # plain Python runs on no stream there, and nothing could wait for it
                with pytest.raises(aiotrt.UsageError, match="not complete"):
                    _ = slot.outputs[0].tensor
        await aiotrt.wait(current.record())
        await slot.replay()
        assert place.is_right(slot.outputs[0].tensor if mine is None else mine, 1)


def reading(buffer: aiotrt.Buffer, into: torch.Tensor) -> Callable[[], object]:
    """For a stream to run: a copy of what the buffer holds when its turn comes."""
    return lambda: into.copy_(buffer.tensor)


@on_every_device
async def test_b5_every_consumer_gates_the_next_replay(place: Place) -> None:
    async with place.load() as model:
        sides, seen = [model.stream(), model.stream()], [place.empty(), place.empty()]
        with place.gate(sides[0]) as first, place.gate(sides[1]) as second:
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                event = slot.launch()
                for side, copy in zip(sides, seen, strict=True):
                    side.wait(event)
                    side.run(reading(slot.outputs[0], copy))
                    slot.consumed(side)
            call = asyncio.ensure_future(model(frame(100)))
            for gate in (first, second):
                await place.some_time()
                assert not call.done()
                gate.open()
        assert place.is_right(await call, 100)
        for side, copy in zip(sides, seen, strict=True):
            await place.finished(side)
            assert place.is_right(copy, 1)
            side.close()


def kinds(place: Place, value: float, shape: tuple[int, ...] = (2, 3)) -> list[Any]:
    """A frame as everything that a model takes."""
    given = [frame(value, shape), torch.from_numpy(frame(value, shape))]
    return [*given, place.tensor(value, shape)] if place.has_memory else given


def share_nothing(results: list[Any]) -> bool:
    """Whether no two of them have a byte in common, and each is an object of its own."""
    begin = [result.ctypes.data if isinstance(result, np.ndarray) else result.data_ptr() for result in results]
    spans = sorted(zip(begin, (start + result.nbytes for start, result in zip(begin, results, strict=True)), strict=True))
    return all(end <= after for (_, end), (after, _) in itertools.pairwise(spans))


@on_every_device
async def test_b6_results_of_two_calls_are_never_one(place: Place) -> None:
    async with place.load() as model:
        given = [(value, x) for value in range(4) for x in kinds(place, value)]
        results = await asyncio.gather(*(model(x) for _, x in given))
        results += [await model(x) for _, x in given]
        assert share_nothing(results)
        assert all(place.is_right(result, value) for (value, _), result in zip(given * 2, results, strict=True))


@on_every_device
async def test_b7_the_parts_of_a_batch_share_nothing(place: Place) -> None:
    async with place.load(batching=aiotrt.Batching(max_size=4)) as model:
        given = [(value, x) for value in range(5) for x in kinds(place, value)]
        with place.held(model):
            calls = [asyncio.ensure_future(model(x)) for _, x in given]
            await turns(20)
        results = await asyncio.gather(*calls)
        assert max(model.statistics().batches) == 4  # they were together, and more than one batch
        assert len(model.statistics().batches) > 1
        assert share_nothing(results)
        assert all(place.is_right(result, value) for (value, _), result in zip(given, results, strict=True))


@on_every_device
async def test_b8_a_padded_result_is_waited_for(place: Place) -> None:
    async with place.load(batching=aiotrt.Batching(max_size=4, sizes=[4])) as model:
        for x in kinds(place, 7):
            with place.held(model):
                call = asyncio.ensure_future(model(x))
                await place.some_time()
                assert not call.done()
            result = await call
            assert result.shape == (2, 3)
            assert place.is_right(result, 7)
        assert model.statistics().padding == 3 * len(kinds(place, 7))


@on_every_device
async def test_b9_callers_in_two_threads_get_their_own(place: Place) -> None:
    loop = asyncio.get_running_loop()
    async with place.load(slots=2) as model:

        def elsewhere(values: range) -> Any:
            with pytest.raises(aiotrt.UsageError, match="outside any event loop"):
                model.lease()  # a model is used on its loop, and calls from elsewhere come to it there
            return [asyncio.run_coroutine_threadsafe(model(frame(value)), loop) for value in values]

        first, second = range(16), range(100, 116)
        futures = await asyncio.gather(asyncio.to_thread(elsewhere, first), asyncio.to_thread(elsewhere, second))
        for values, calls in zip((first, second), futures, strict=True):
            results = await asyncio.gather(*map(asyncio.wrap_future, calls))
            assert all(map(place.is_right, results, values))


@on_every_device
async def test_b10_any_number_may_be_in_flight_and_of_any_shape(place: Place) -> None:
    shapes = [(2, 3), (1, 3), (4, 3)]
    async with place.load(slots=2, warmup=[frame(0, shape) for shape in shapes]) as model:
        given = [(value, x) for value in range(6) for x in kinds(place, value, shapes[value % 3])]
        with place.held(model):
            calls = [asyncio.ensure_future(model(x)) for _, x in given]
            await turns(20)
        results = await asyncio.gather(*calls)
        assert share_nothing(results)
        for (value, x), result in zip(given, results, strict=True):
            assert result.shape == x.shape
            assert place.is_right(result, value)


@on_every_device
async def test_b11_done_means_that_the_device_is_done(place: Place) -> None:
    async with place.load() as model:
        for x in kinds(place, 3):
            with place.held(model):
                call = asyncio.ensure_future(model(x))
                for _ in range(100):
                    await asyncio.sleep(0)
                    assert not call.done()
                assert model.statistics().in_flight == 1
            assert place.is_right(await call, 3)


@on_every_device
async def test_b12_an_eviction_waits_for_who_still_reads(place: Place) -> None:
    async with place.load(graph_cache_entries=1) as model:
        side, seen = model.stream(), place.empty()
        with place.gate(side):
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                side.wait(slot.launch())
                side.run(reading(slot.outputs[0], seen))
                slot.consumed(side)
            del slot  # while it lives, so does the memory
            call = asyncio.ensure_future(model(frame(2, (7, 7))))  # its graph needs the place of the one that is read
            await place.some_time()
            assert not call.done()
        assert place.is_right(await call, 2)
        assert model.statistics().evictions == 1
        await place.finished(side)
        assert place.is_right(seen, 1)
        side.close()


@on_every_device
async def test_b13_models_share_no_graph_and_shapes_have_their_own(place: Place) -> None:
    async with place.load(slots=2) as model, place.load(lambda x: x * 2, slots=2) as other:
        shapes = [(2, 3), (3, 2), (6, 1)]  # as many bytes each
        for shape in shapes * 2:
            mine, others = await asyncio.gather(model(frame(5, shape)), other(frame(5, shape)))
            assert mine.shape == others.shape == shape
            assert place.is_right(mine, 5)
            assert (others == 10).all()
        assert model.statistics().graphs >= len(shapes)


@on_every_gpu
async def test_b13_a_graph_on_a_callers_memory_is_for_that_memory_only(place: Place) -> None:
    async with place.load() as model:
        marked = [place.tensor(value) for value in (5, 6)]
        for x in marked:
            x._trt_reuse_as_input_buffer = True  # type: ignore[attr-defined]
        for _ in range(2):
            for value, x in zip((5, 6), marked, strict=True):
                assert place.is_right(await model(x), value)
        assert place.is_right(await model(place.tensor(7)), 7)
        assert [place.read(x)[0, 0] for x in marked] == [5, 6]


@on_every_device
async def test_b14_an_input_is_not_overwritten_while_it_is_read(place: Place) -> None:
    async with place.load() as model:
        with place.held(model):
            calls = [asyncio.ensure_future(model(frame(value))) for value in range(5)]  # through one staging buffer
            await turns(20)
        assert all(map(place.is_right, await asyncio.gather(*calls), range(5)))
        async with model.lease() as slot:
            slot.inputs[0].host.fill_(6)
            with place.held(model):
                event = slot.launch()
                with pytest.raises(aiotrt.UsageError, match="not complete"):
                    slot.inputs[0].host.fill_(-1)
                with pytest.raises(aiotrt.UsageError, match="not complete"):
                    slot.inputs[0][...] = frame(-1)
            await aiotrt.wait(event)
            assert place.is_right(slot.outputs[0].tensor, 6)


@on_every_gpu
async def test_b14_an_input_on_the_device_may_be_dropped_at_once(place: Place) -> None:
    shape = (64, 64)
    async with place.load(warmup=frame(0, shape)) as model:
        with place.held(model):
            call = asyncio.ensure_future(model(place.tensor(5, shape)))
            await turns()
            junk = [place.tensor(-1, shape) for _ in range(8)]  # would get its memory, had that been let go
        assert place.is_right(await call, 5)
        del junk


@on_every_device
async def test_b15_strides_are_honoured_and_other_dtypes_refused(place: Place) -> None:
    array = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    async with place.load(warmup=array, signatures="fixed") as model:
        views: list[Any] = [array, array.transpose(0, 3, 1, 2), array[:, ::2], array[..., ::-1]]
        tensor = torch.from_numpy(array)
        for x in (
            (tensor, place.simulated.tensor(array)) if place.simulated else (tensor, tensor.to(place.device.torch_device))
        ):
            views += [x.permute(0, 3, 1, 2), x[:, ::2], x.transpose(1, 2), x[:1].expand(2, -1, -1, -1)]
            views.append(x.to(memory_format=torch.channels_last))
        for view in views:
            result = await model(view)
            expected = place.read(view) * np.float32(3) + np.float32(1)
            np.testing.assert_array_equal(place.read(result), expected)
        for wrong in (array.astype(np.float16), array.astype(np.int32), array[0]):
            with pytest.raises(aiotrt.InputError, match="expected x"):
                await model(wrong)


@on_every_device
async def test_b16_memory_is_bounded_in_bytes_and_given_back(place: Place) -> None:
    bound = 100_000  # the graph of the largest of these shapes; with their results all of them are 480,000

    async def use(before: int) -> None:
        async with place.load(warmup=frame(0, (1, 3)), graph_cache_bytes=bound) as model:
            results = [await model(kinds(place, 1, (extent, 3))[-1]) for extent in range(300, 3000, 300)]
            statistics = model.statistics()
            assert statistics.evictions > 0
            assert statistics.graph_bytes <= bound
            del results  # they were kept up to here, and kept nothing else
            # The bound is for inputs and what a capture reserves. Outputs may have had room in what was reserved before, and
            # the next caller's results are ready: each as large as the inputs.
            await until(lambda: place.allocated() <= before + 4 * bound)

    gc.collect()
    gc.disable()  # what is given back, nobody has to look for
    try:
        await use(place.allocated())
        before = place.allocated()  # there may be some that a device needs once
        await use(before)
        await until(lambda: place.allocated() <= before)
    finally:
        gc.enable()


@on_every_device
async def test_b17_the_loop_goes_on_whatever_happens(place: Place) -> None:
    turned = threading.Event()

    class Patient(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # On the simulated GPU any call that blocks the loop is an error by itself.
            assert place.simulated is not None or turned.wait(30)
            return x * 3 + 1

    async def turning(awaited: Any) -> Any:
        """Await it; what it waits for in its threads is a loop that has turned a hundred times meanwhile."""
        turned.clear()
        task = asyncio.ensure_future(awaited)
        await turns(100)
        turned.set()
        return await task

    model = place.load(Patient())
    await turning(model.__aenter__())
    assert place.is_right(await turning(model(frame(1, (5, 3)))), 1)
    with place.held(model):
        call = asyncio.ensure_future(model(frame(2)))
        await place.some_time()
        closing = asyncio.ensure_future(model.aclose())
        await place.some_time()
        assert not closing.done()
    assert place.is_right(await call, 2)
    await closing


@on_every_device
async def test_b18_a_view_that_carries_nothing_is_as_safe(place: Place) -> None:
    async with place.load() as model:
        side, seen = model.stream(), place.empty((1, 3))
        with place.gate(side):
            async with model.lease() as slot:
                slot.inputs[0][...] = frame(1)
                view = (await slot.replay())[1:]
                assert not vars(view)
                side.run(lambda: seen.copy_(view))
                slot.consumed(side)
            call = asyncio.ensure_future(model(frame(100)))
            await place.some_time()
            assert not call.done()
        assert place.is_right(await call, 100)
        await place.finished(side)
        assert place.is_right(seen, 1)
        side.close()
