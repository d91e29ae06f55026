"""The laws on a real GPU, with streams held by a latch so that the window in which a defect shows stays open.

Each test is named after the defect of the original that it makes impossible (see docs/internals/verification.md).
"""

from __future__ import annotations

import asyncio
import functools
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
import torch

import aiotrt
from aiotrt.devices import open_device
from aiotrt.devices.base import CaptureError
from aiotrt.runtime.slots import State
from tests.tools import Affine, Latch, count, executor_of, frame, held, turns, until

pytestmark = [pytest.mark.gpu, pytest.mark.asyncio]


def cuda(value: float, shape: tuple[int, ...] = (2, 3)) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.float32, device="cuda")


async def test_b1_an_input_still_being_made_on_the_callers_stream_is_waited_for() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0)) as model, Latch("cuda") as latch:
        side = torch.cuda.Stream()
        x = cuda(-1)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            latch.hold(executor_of(model).device.adopt_stream(side))
            x.fill_(5)
            call = asyncio.ensure_future(_call_on(model, x, side))
        await turns(100)
        assert not call.done()
        latch.open()
        assert (await call)[0, 0].item() == 16


async def _call_on(model: aiotrt.Model, x: torch.Tensor, stream: torch.cuda.Stream) -> torch.Tensor:
    coroutine = model(x)
    with torch.cuda.stream(stream):  # current for the first step only: never await inside such a block
        task = asyncio.ensure_future(coroutine)
        await asyncio.sleep(0)
    result: torch.Tensor = await task
    return result


async def test_b1_an_input_that_carries_a_ready_event_waits_for_it() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0)) as model, Latch("cuda") as latch:
        side = torch.cuda.Stream()
        x = cuda(-1)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            latch.hold(executor_of(model).device.adopt_stream(side))
            x.fill_(5)
            ready = torch.cuda.Event()
            ready.record()
        x._trt_ready_event = ready  # type: ignore[attr-defined]
        call = asyncio.ensure_future(model(x))
        await turns(100)
        assert not call.done()
        latch.open()
        assert (await call)[0, 0].item() == 16


async def test_b2_b11_the_produce_event_is_not_complete_while_the_graph_runs() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0)) as model, model.lease() as slot:
        with held(model) as latch:
            slot.inputs[0][...] = frame(1)
            event = slot.launch()
            for _ in range(100):
                assert not event.query()
                await asyncio.sleep(0)
            latch.open()
            await aiotrt.wait(event)
        assert event.query()


async def test_b3_polling_breaks_nobodys_global_capture() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=2, warmup=frame(0)) as model:
        failures: list[BaseException] = []
        stop = threading.Event()

        def capture() -> None:
            x = torch.ones(64, 64, device="cuda")
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                _ = x @ x
            torch.cuda.synchronize()
            for _ in range(20):
                graph = torch.cuda.CUDAGraph()
                try:
                    with torch.cuda.graph(graph, stream=stream):  # torch's default: global mode
                        for _ in range(50):
                            x = x * 1.0
                except BaseException as error:
                    failures.append(error)
            stop.set()

        thread = threading.Thread(target=capture)
        thread.start()
        while not stop.is_set():
            results = await asyncio.gather(*(model(frame(i)) for i in range(16)))
            assert [result[0, 0] for result in results] == [3 * i + 1 for i in range(16)]
        thread.join()
        assert failures == []


async def test_b5_a_consumer_that_has_not_read_yet_gates_the_next_replay() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0)) as model, Latch("cuda") as latch:
        side = model.stream()
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            side.wait(slot.launch())
            latch.hold(side)
            seen = torch.empty(2, 3, device="cuda")
            output = slot.outputs[0].tensor
            side.run(lambda: seen.copy_(output))
            slot.consumed(side)
        call = asyncio.ensure_future(model(frame(100)))
        await turns(200)
        assert not call.done()
        latch.open()
        assert (await call)[0, 0] == 301
        side.synchronize()
        assert seen[0, 0].item() == 4
        side.close()


async def test_b6_b9_b10_many_submitted_before_any_is_consumed() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=2, warmup=frame(0)) as model:
        calls = [asyncio.ensure_future(model(cuda(i))) for i in range(64)]
        results = await asyncio.gather(*calls)
        assert len({result.data_ptr() for result in results}) == 64
        assert [result[0, 0].item() for result in results] == [3 * i + 1 for i in range(64)]


async def test_b12_eviction_waits_for_who_still_reads() -> None:
    async with (
        aiotrt.load(Affine(), device="cuda", slots=1, graph_cache_entries=1, warmup=frame(0)) as model,
        Latch("cuda") as latch,
    ):
        side = model.stream()
        async with model.lease() as slot:
            slot.inputs[0][...] = frame(1)
            side.wait(slot.launch())
            latch.hold(side)
            seen = torch.empty(2, 3, device="cuda")
            side.run(functools.partial(seen.copy_, slot.outputs[0].tensor))
            slot.consumed(side)
        del slot  # while it lives, so does the memory
        call = asyncio.ensure_future(model(frame(2, (7, 7))))
        await turns(200)
        latch.open()
        assert (await call)[0, 0] == 7
        side.synchronize()
        assert seen[0, 0].item() == 4
        side.close()


async def test_b14_a_device_input_may_be_dropped_and_its_memory_reused_at_once() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0, (256, 256))) as model:
        with held(model) as latch:
            call = asyncio.ensure_future(model(cuda(5, (256, 256))))
            await turns()
            junk = [cuda(-1, (256, 256)) for _ in range(8)]  # would get the input's memory, had it been let go
            latch.open()
            assert (await call).eq(16).all().item()
            del junk


async def test_b15_strides_are_honoured() -> None:
    x = torch.randn(2, 8, 5, 7, device="cuda")
    async with aiotrt.load(Affine(), device="cuda", warmup=x) as model:
        expected = x * 3 + 1
        for same in (x, x.to(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(await model(same), expected)


async def test_results_allocated_for_one_stream_are_safe_on_it() -> None:
    """Results are allocated in the caller's stream's order: freeing and reallocating there must not meet the slot's copy."""
    async with aiotrt.load(Affine(), device="cuda", slots=2, warmup=frame(0, (64, 64))) as model:
        side = torch.cuda.Stream()
        for i in range(200):
            with torch.cuda.stream(side):
                x = cuda(i, (64, 64))
            result = await _call_on(model, x, side)
            with torch.cuda.stream(side):
                total = result.sum()
                del result
                _ = cuda(-1, (64, 64))
                assert total.item() == (3 * i + 1) * 64 * 64


async def test_a_module_that_cannot_be_captured_runs_without_a_graph_and_says_why() -> None:
    class Syncs(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 3 + 1 if x.sum().item() > -1e9 else x

    async with aiotrt.load(Syncs(), device="cuda", slots=2) as model:
        results = await asyncio.gather(*(model(frame(i)) for i in range(20)))
        assert [result[0, 0] for result in results] == [3 * i + 1 for i in range(20)]
        statistics = model.statistics()
        assert (statistics.replays, statistics.fallback_runs) == (0, 20)
        assert "Syncs could not be captured" in statistics.fallbacks[0]
    async with aiotrt.load(Affine(), device="cuda") as model:  # the failed captures left nothing behind
        assert (await model(frame(1)))[0, 0] == 4
        assert model.statistics().replays == 1


async def test_b3_others_draw_random_numbers_during_a_capture_and_after_one_that_failed() -> None:
    """torch refuses them while it thinks that its generator is captured, which it goes on thinking after a failure."""
    entered, resume = threading.Event(), threading.Event()
    device = open_device("cuda")
    stream = device.stream()
    x = cuda(1)

    def waits() -> list[torch.Tensor]:
        if torch.cuda.is_current_stream_capturing():
            entered.set()
            resume.wait(20)
        return [x + 1]

    def fails() -> list[torch.Tensor]:
        return [x if x.sum().item() < 0 else x + 1]

    def draws_and_fails() -> list[torch.Tensor]:
        return [torch.rand_like(x), *fails()]

    def draws_and_raises() -> list[torch.Tensor]:
        y = torch.rand_like(x)
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("on purpose")
        return [y]

    capture = asyncio.ensure_future(asyncio.to_thread(device.capture, stream, waits))
    await asyncio.to_thread(entered.wait, 20)
    try:
        assert torch.rand(3, device="cuda").max().item() < 1
    finally:
        resume.set()
    (await capture)[0].close()
    for body in (fails, draws_and_fails, draws_and_raises):
        with pytest.raises(CaptureError):
            await asyncio.to_thread(device.capture, stream, body)
        assert torch.rand(3, device="cuda").max().item() < 1
    torch.manual_seed(7)
    first = torch.rand(3, device="cuda")
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    graph, (noise,) = await asyncio.to_thread(device.capture, stream, lambda: [torch.rand_like(x)])
    seen = []
    for _ in range(2):
        torch.manual_seed(7)
        graph.launch(stream)
        stream.synchronize()
        seen.append(noise.tolist())
    assert seen[0] == seen[1]  # the seed reaches a captured draw
    graph.close()
    stream.close()


async def test_random_numbers_advance_from_replay_to_replay() -> None:
    class Noise(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    async with aiotrt.load(Noise(), device="cuda", slots=1, warmup=frame(0)) as model:
        first, second = await model(frame(0)), await model(frame(0))
        assert not np.array_equal(first, second)


async def test_after_an_abandoned_call_the_slot_drains_on_the_device() -> None:
    async with aiotrt.load(Affine(), device="cuda", slots=1, warmup=frame(0)) as model:
        with held(model) as latch:
            call = asyncio.ensure_future(model(cuda(1)))
            await turns()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            assert count(model, State.DRAINING) == 1
            latch.open()
        await until(lambda: count(model, State.FREE) == 1)


async def test_a_fault_reaches_everybody_who_waits_and_later_calls_fail_at_once() -> None:
    program = """
        import asyncio, ctypes
        import numpy as np, torch, aiotrt

        class Bad(torch.nn.Module):
            def forward(self, x, index):
                return torch.zeros(4, device="cuda")[index] + x.sum()

        async def main():
            bad = await aiotrt.load(Bad(), device="cuda", slots=2, warmup=[(np.zeros(2, np.float32), np.zeros(2, np.int64))])
            good = await aiotrt.load(torch.nn.Identity(), device="cuda", slots=2, warmup=np.zeros(2, np.float32))
            calls = [bad(np.zeros(2, np.float32), np.full(2, 10**6, np.int64)) for _ in range(8)]
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            print({type(outcome).__name__ for outcome in outcomes})
            for model in (bad, good):
                try:
                    await model(*[np.zeros(2, t) for t in ((np.float32, np.int64) if model is bad else (np.float32,))])
                except aiotrt.ModelBrokenError as error:
                    print("broken", type(error.__cause__).__name__, flush=True)
            await bad.aclose()
            await good.aclose()
            print("closed", flush=True)

        asyncio.run(main())
        import os
        os._exit(0)  # the context is lost: tearing it down reports the fault again
    """
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=55,
        check=False,
    )
    assert "{'DeviceError'}" in done.stdout, done.stderr
    assert done.stdout.count("broken DeviceError") == 2, done.stderr
    assert "closed" in done.stdout, done.stderr
