"""The rest of the original's eighteen defects, in the form that they have on a real GPU only; see `test_cuda_laws`.

Torch's own streams and events, its allocator, its default stream, and `.cpu()` of code that knows nothing of aiotrt. The
same laws in their general form run on CUDA in `tests/test_defects.py`.
"""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch

import aiotrt
from aiotrt.runtime.slots import State
from tests.tools import Affine, Latch, count, executor_of, frame, held, turns, until

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio]


def cuda(value: float, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    return torch.full(shape, float(value), device="cuda")


async def test_b4_cpu_right_after_a_launch_waits_for_it() -> None:
    """What the original promised: `.cpu()` waits for the current stream, and that must wait for the graph's."""
    async with aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0)) as model, model.lease() as slot:
        slot.inputs[0][...] = frame(1)
        with held(model) as latch:
            slot.launch()
            timer = threading.Timer(0.2, latch.open)  # .cpu() blocks this thread, as it must
            timer.start()
            assert slot.outputs[0].tensor.cpu()[0, 0].item() == 4
            timer.join()
        await slot.replay()


async def test_b7_device_items_of_one_batch_get_memory_of_their_own() -> None:
    batching = aiotrt.Batching(max_size=8)
    async with aiotrt.load(Affine(), device="cuda", slots=1, batching=batching, warmup=frame(0)) as model:
        items = [cuda(i) for i in range(17)]
        with held(model) as latch:
            calls = [asyncio.ensure_future(model(item)) for item in items]
            await turns(50)
            assert not any(call.done() for call in calls)
            latch.open()
        results = await asyncio.gather(*calls)
        assert max(model.statistics().batches) == 8
        assert len({result.data_ptr() for result in results}) == 17
        results[0].fill_(-1)
        assert [result[0, 0].item() for result in results[1:]] == [3 * i + 1 for i in range(1, 17)]


async def test_b8_a_padded_result_is_not_complete_before_its_graph() -> None:
    batching = aiotrt.Batching(max_size=4, sizes=[4])
    async with aiotrt.load(Affine(), device="cuda", slots=1, batching=batching, warmup=frame(0)) as model:
        item = cuda(5)
        with held(model) as latch:
            call = asyncio.ensure_future(model(item))
            await turns(200)
            assert not call.done()
            assert count(model, State.IN_FLIGHT) == 1
            latch.open()
        result = await call
        assert result._trt_produce_event.query()
        assert result.eq(16).all().item()
        assert model.statistics().padding == 3


async def test_b13_marked_buffers_have_graphs_of_their_own_under_a_latch() -> None:
    """Both are in flight at once, and nothing is copied from one into the other."""
    async with aiotrt.load(Affine(), device="cuda", slots=2, warmup=frame(0)) as model:
        first, second = cuda(5), cuda(6)
        for x in (first, second):
            x._trt_reuse_as_input_buffer = True  # type: ignore[attr-defined]
            await asyncio.gather(model(x), model(x))  # on either slot, since nothing is captured under a latch
        with held(model) as latch:
            calls = [asyncio.ensure_future(model(x)) for x in (first, second)]
            await turns(50)
            assert not any(call.done() for call in calls)
            latch.open()
        results = await asyncio.gather(*calls)
        assert [result[0, 0].item() for result in results] == [16, 19]
        assert [x[0, 0].item() for x in (first, second)] == [5, 6]
        assert model.statistics().captures == 2 * 3


async def test_b16_results_that_are_kept_keep_no_graph() -> None:
    """Torch's count of bytes: of what was evicted nothing is left, though every result of it still is."""
    shapes = [(64 * i, 256) for i in range(1, 17)]  # 64 KiB each step, 8.5 MiB together
    bound = 4 << 20

    async def use() -> list[torch.Tensor]:
        async with aiotrt.load(Affine(), device="cuda", slots=1, graph_cache_bytes=bound, warmup=frame(0)) as model:
            results = [await model(cuda(i, shape)) for i, shape in enumerate(shapes)]
            assert model.statistics().evictions > 0
        return results

    await use()
    gc.collect()
    before = torch.cuda.memory_allocated()
    results = await use()
    gc.collect()
    kept = sum(result.nbytes for result in results)
    await until(lambda: torch.cuda.memory_allocated() <= before + kept)
    assert all(result.eq(3 * i + 1).all().item() for i, result in enumerate(results))
    del results
    await until(lambda: torch.cuda.memory_allocated() <= before)


async def test_b17_the_loop_turns_while_the_device_is_held_and_a_graph_is_captured() -> None:
    turned = threading.Event()

    class Patient(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert turned.wait(30)  # for ever, if the capture held the loop
            return x * 3 + 1

    turned.set()
    async with (
        aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0)) as busy,
        aiotrt.load(Patient(), device="cuda", slots=1, warmup=frame(0)) as model,
    ):
        with held(busy) as latch:
            waiting = asyncio.ensure_future(busy(frame(1)))
            turned.clear()
            capturing = asyncio.ensure_future(model(frame(1, (5, 3))))
            await turns(200)
            assert not waiting.done()
            assert not capturing.done()
            latch.open()
            turned.set()
        assert (await waiting)[0, 0] == 4
        assert (await capturing)[0, 0] == 4
        assert model.statistics().captures == 2


async def test_b18_a_slice_of_a_result_is_ordered_though_it_carries_nothing() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0)) as model, Latch("cuda") as latch:
        side, seen = torch.cuda.Stream(), torch.empty(1, 3, device="cuda")
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            view = (await slot.replay())[1:]
            assert not hasattr(view, "_trt_produce_event")
            latch.hold(executor_of(model).device.adopt_stream(side))
            with torch.cuda.stream(side):
                seen.copy_(view)
            slot.consumed(side)
        call = asyncio.ensure_future(model(frame(100)))
        await turns(200)
        assert not call.done()
        latch.open()
        assert (await call)[0, 0] == 301
        side.synchronize()
        assert seen[0, 0].item() == 4
