"""Checks of the handshake's laws while a latch holds the device, which prolongs the state in which a defect is visible.

Every body runs twice: first with the latch open, because the first use of a kernel may need an idle device, and then held,
when its results are checked.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Final

import aiotrt
from aiotrt.devices import Stream
from aiotrt.runtime.request import Request
from aiotrt.selftest.bench import Bench, Sample, as_tensors, digest, within
from aiotrt.selftest.instruments import Latch
from aiotrt.selftest.report import CheckFailed, Finding, NotApplicable

__all__ = ["HOLD", "callers", "completion", "consumers", "held", "inputs"]

#: Seconds for which the device is held. An operation that wrongly does not wait for it ends long before.
HOLD: Final = 0.2
#: Seconds after which a watchdog opens the latch, if a call that should return at once blocks.
STUCK: Final = 20.0
#: The number of concurrent calls with which mixed-up results are detected.
CALLERS: Final = 64


async def completion(bench: Bench) -> Finding:
    """Check that results are not returned, and that a lease's event does not complete, before the device is done."""
    samples = (await bench.samples())[: bench.options.slots]
    streams = [slot.stream for slot in bench.executor.slots]
    for hold in (False, True):
        async with (
            held(bench, streams, hold) as latch,
            bench.started([sample.inputs for sample in samples]) as calls,
        ):
            if hold:
                await asyncio.sleep(HOLD)
                early = sum(call.done() for call in calls)
                if early:
                    raise CheckFailed(f"{early} of {len(calls)} calls returned while the device was held")
            latch.open()
            for call, sample in zip(calls, samples, strict=True):
                results = await within(call, "a call")
                if hold:
                    bench.check(results, sample, "a call that was held returned wrong results")
        bench.progress(0.25 if not hold else 0.5)
    if not all(program.captured for program in bench.programs(bench.usual)):
        return Finding(f"{len(samples)} calls waited for the device for {HOLD:g} s; leases run without a graph")
    sample, _ = await bench.pair()
    for hold in (False, True):
        async with bench.model.lease(sample.case.named) as slot:
            for buffer, value in zip(slot.inputs, sample.inputs, strict=True):
                buffer[...] = value
            async with held(bench, streams, hold) as latch:
                event = slot.launch()
                if hold:
                    await asyncio.sleep(HOLD)
                    if bench.device.query(event):
                        raise CheckFailed("a lease's event was complete while the device was held")
                latch.open()
                await within(aiotrt.wait(event), "a lease's event")
            results = await bench.on_host([buffer.tensor for buffer in slot.outputs])
            if hold:
                bench.check(results, sample, "a lease has wrong results")
    return Finding(f"{len(samples)} calls and a lease waited for the device for {HOLD:g} s, and were then correct")


async def consumers(bench: Bench) -> Finding:
    """Check that the slot's next call does not overwrite results that a consumer on another stream has not read yet."""
    first, second = await bench.pair()
    side = bench.model.stream()
    try:
        for hold in (False, True):
            await _consumers(bench, side, first, second, hold)
            bench.progress(1.0 if hold else 0.5)
    finally:
        await asyncio.to_thread(side.synchronize)
        side.close()
    return Finding(f"a consumer that was held for {HOLD:g} s read its own results; the next call waited for it")


async def _consumers(bench: Bench, side: Stream, first: Sample, second: Sample, hold: bool) -> None:
    model, device = bench.model, bench.device
    async with contextlib.AsyncExitStack() as stack:
        # Lease all slots but one, so that the next call needs the slot with the consumer.
        for _ in range(bench.options.slots - 1):
            await stack.enter_async_context(model.lease(first.case.named))
        async with held(bench, [], hold) as latch:
            async with model.lease(first.case.named) as slot:
                for buffer, value in zip(slot.inputs, first.inputs, strict=True):
                    buffer[...] = value
                await within(slot.replay(), "a replay")
                outputs = list(slot.outputs)
                seen = [device.empty(output.shape, output.dtype) for output in outputs]
                # The memory of `seen` may have a pending use on the current stream.
                side.wait(device.current_stream().record())
                latch.hold(side)

                def read() -> None:
                    for copy, output in zip(seen, outputs, strict=True):
                        copy.copy_(output.tensor)

                side.run(read)
                slot.consumed(side)
            async with bench.started([second.inputs]) as (call,):
                if hold:
                    await asyncio.sleep(HOLD)
                    if call.done():
                        raise CheckFailed("a slot ran again while a consumer of its results had not read them")
                latch.open()
                results = await within(call, "a call")
            await asyncio.to_thread(side.synchronize)
            read_there = await bench.on_host(seen)
            if hold:
                bench.check(results, second, "the call after a consumer returned wrong results")
                bench.check(read_there, first, "a consumer read wrong results")


async def inputs(bench: Bench) -> Finding:
    """Check that a call waits for an input that the caller's stream is still writing."""
    if bench.device.unified:
        raise NotApplicable("host inputs are complete when they are passed; only device inputs can still be pending")
    side = bench.model.stream()
    try:
        for hold in (False, True):
            await _inputs(bench, side, *await bench.pair(), hold)
            bench.progress(1.0 if hold else 0.5)
    finally:
        await asyncio.to_thread(side.synchronize)
        side.close()
    return Finding(f"a call waited for {HOLD:g} s for an input that was still being written, and then read it")


async def _inputs(bench: Bench, side: Stream, first: Sample, second: Sample, hold: bool) -> None:
    values = await bench.on_device(second.inputs)  # values that a call reads if it does not wait
    made = await bench.on_device(first.inputs)

    def start() -> Request:
        for value, source in zip(values, made, strict=True):
            side.copy(value, source)
        return bench.executor.submit(values, {})

    async with held(bench, [side], hold) as latch:
        request = bench.device.call(side, start)
        try:
            if hold:
                await asyncio.sleep(HOLD)
                if request.done():
                    raise CheckFailed("a call returned while its input was still being written")
            latch.open()
            results = as_tensors(await within(request, "a call"))
        finally:
            bench.executor.abandon(request)
    results = await bench.on_host(results)
    if hold:
        bench.check(results, first, "a call did not wait for its input")


async def callers(bench: Bench) -> Finding:
    """Check that concurrent calls, all submitted before the first one ends, get the results of their own inputs."""
    samples = await bench.samples()
    distinct = len({digest(sample.expected) for sample in samples})
    if distinct == 1:
        raise NotApplicable(
            "all inputs give the same results, so mixed-up results cannot be detected; choose other inputs with --range"
        )
    order = [samples[i % len(samples)] for i in range(CALLERS)]
    random.Random(bench.options.seed).shuffle(order)
    streams = [slot.stream for slot in bench.executor.slots]
    placed = {id(sample): sample.inputs for sample in samples}
    kinds = ["host"] if bench.device.unified else ["host", "device"]
    for round_, kind in enumerate(kinds):
        if kind == "device":
            placed = {id(sample): await bench.on_device(sample.inputs) for sample in samples}
        for hold in (False, True):
            async with (
                held(bench, streams, hold) as latch,
                bench.started([placed[id(sample)] for sample in order]) as calls,
            ):
                await asyncio.sleep(0)  # the calls are submitted in this loop iteration
                latch.open()
                all_results = [as_tensors(await within(call, "a call")) for call in calls]
            # Check after the last call has written its results.
            for results, sample in zip(all_results, order, strict=True):
                on_host = results if kind == "host" else await bench.on_host(results)
                if hold:
                    bench.check(on_host, sample, f"one of {CALLERS} concurrent calls got wrong results")
            bench.progress((2 * round_ + hold + 1) / (2 * len(kinds)))
    return Finding(f"{CALLERS} calls at once with {distinct} different results, from {' and '.join(kinds)} inputs")


@contextlib.asynccontextmanager
async def held(bench: Bench, streams: Sequence[Stream], hold: bool) -> AsyncIterator[Latch]:
    """Hold `streams` with a latch until the block ends; with `hold` False the latch is open, for the first run.

    Raises:
        CheckFailed: the watchdog had to open the latch.
    """
    stuck = threading.Event()
    async with Latch(bench.device) as latch:

        def give_up() -> None:
            stuck.set()
            latch.open()

        watchdog = threading.Timer(STUCK, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            if not hold:
                latch.open()
            for stream in streams:
                latch.hold(stream)
            yield latch
        finally:
            latch.open()
            watchdog.cancel()
    if stuck.is_set():
        raise CheckFailed(f"a call did not return for {STUCK:g} s while the device was held, so it blocks on the device")
