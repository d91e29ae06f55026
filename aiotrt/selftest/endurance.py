"""Check that calls can be cancelled at any stage, and that thousands of replays use constant memory."""

from __future__ import annotations

import asyncio
import gc
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from aiotrt.runtime.slots import State
from aiotrt.selftest.bench import Bench, Sample, together, within
from aiotrt.selftest.instruments import Memory, memory
from aiotrt.selftest.laws import HOLD, held
from aiotrt.selftest.report import CheckFailed, Finding

__all__ = ["cancellation", "endurance"]

#: Seconds in which slots must be free again after cancellations.
FREE_WITHIN: Final = 10.0
#: Bytes by which memory may grow, because an allocator keeps the memory of the highest concurrent use.
SLACK: Final = 16 << 20
#: One in this many results is compared with the expected one, because comparing takes longer than running.
COMPARED: Final = 8


async def cancellation(bench: Bench) -> Finding:
    """Cancel calls and leases at random stages; check that all slots become free, and that other results are correct."""
    options = bench.options
    chance = random.Random(options.seed)
    samples = await bench.samples()
    started = time.perf_counter()
    await within(bench.model(*samples[0].inputs), "a call")
    usual = time.perf_counter() - started
    cancelled = await _cancel_on_device(bench, samples)
    completed = kept = 0

    async def use(sample: Sample, leased: bool) -> None:
        if not leased:
            bench.check(await bench.model(*sample.inputs), sample, "a call among cancelled ones returned wrong results")
            return
        async with bench.model.lease(sample.case.named, outputs="torch") as slot:
            for buffer, value in zip(slot.inputs, sample.inputs, strict=True):
                buffer[...] = value
            bench.check(await slot.replay(), sample, "a lease among cancelled calls has wrong results")

    async def cancel_one() -> None:
        nonlocal cancelled, completed
        task = asyncio.create_task(use(chance.choice(samples), leased=chance.random() < 0.25))
        try:
            if chance.random() < 0.5:
                for _ in range(chance.randrange(6)):
                    await asyncio.sleep(0)
            else:
                await asyncio.sleep(
                    chance.uniform(0, 8 * usual)
                )  # concurrent calls share slots, so a call takes longer than `usual`
        finally:
            task.cancel()
        try:
            await within(asyncio.gather(task, return_exceptions=True), "a cancelled call")
        finally:
            cancelled += task.cancelled()
            completed += task.done() and not task.cancelled()
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error

    async def keep_one() -> None:
        nonlocal kept
        await within(use(chance.choice(samples), leased=False), "a call among cancelled ones")
        kept += 1

    async def step(i: int) -> None:
        await (keep_one() if i % 5 == 4 else cancel_one())

    await _spread(bench, options.cancellations * 5 // 4, 4 * options.slots, step)
    figures = {"cancelled": cancelled, "completed_before": completed, "not_cancelled": kept}
    await _all_free(bench, figures)
    for sample in samples:
        bench.check(await within(bench.model(*sample.inputs), "a call"), sample, "after cancellations")
    return Finding(
        f"{cancelled} cancelled, {completed} done before that, {kept} not cancelled and correct; all slots free", figures
    )


async def _cancel_on_device(bench: Bench, samples: list[Sample]) -> int:
    """Cancel a call on each slot while it is on the device, which random times seldom hit. Returns the number of calls."""
    streams = [slot.stream for slot in bench.executor.slots]
    inputs = [samples[i % len(samples)].inputs for i in range(bench.options.slots)]
    async with held(bench, streams, True), bench.started(inputs) as calls:
        for _ in range(int(HOLD / 1e-3)):
            if bench.executor.machine.count(State.IN_FLIGHT) == len(calls):
                break
            await asyncio.sleep(1e-3)
        for call in calls:
            call.cancel()
        await within(asyncio.gather(*calls, return_exceptions=True), "a cancelled call")
    return len(calls)


async def _all_free(bench: Bench, figures: dict[str, int]) -> None:
    deadline = time.monotonic() + FREE_WITHIN
    while (free := bench.executor.machine.count(State.FREE)) < bench.options.slots:
        if time.monotonic() > deadline:
            raise CheckFailed(
                f"{bench.options.slots - free} of {bench.options.slots} slots were not free {FREE_WITHIN:g} s after "
                f"{figures['cancelled']} cancellations: {bench.model!r}",
                figures,
            )
        await asyncio.sleep(1e-3)


async def endurance(bench: Bench) -> Finding:
    """Replay at all shapes, concurrently and from all kinds of inputs; check that device and host memory do not grow."""
    options = bench.options
    samples = await bench.samples()
    placed = [(sample, sample.inputs, True) for sample in samples]
    if not bench.device.unified:
        placed += [(sample, await bench.on_device(sample.inputs), False) for sample in samples]

    async def step(i: int) -> None:
        sample, inputs, on_host = placed[i % len(placed)]
        results = await within(bench.model(*inputs), "a call")
        if on_host and i // len(placed) % COMPARED == 0:
            bench.check(results, sample, f"call {i:,} returned wrong results")

    callers = 2 * options.slots
    warm = min(max(options.replays // 10, 4 * len(placed)), 1000)
    await _spread(bench, warm, callers, step)
    before, counted = await _memory(bench), bench.model.statistics()
    started = time.perf_counter()
    await _spread(bench, options.replays, callers, step)
    seconds = time.perf_counter() - started
    after, statistics = await _memory(bench), bench.model.statistics()
    replays, others = statistics.replays - counted.replays, statistics.fallback_runs - counted.fallback_runs
    grown = {name: _growth(getattr(before, name), getattr(after, name)) for name in vars(before)}
    figures = {
        "replays": replays,
        "runs_without_graph": others,
        "evictions": statistics.evictions,
        "seconds": round(seconds, 3),
        "before": vars(before),
        "after": vars(after),
        "growth": grown,
    }
    numbers = ", ".join(f"{_WORDS[name]} {grown[name]:+,} B" for name in grown if grown[name] is not None)
    # The number of calls in flight at a measurement varies, and the allocator may keep their buffers.
    flight = callers * max(sum(t.nbytes for t in (*s.inputs, *s.expected)) for s in samples)
    limits = {"resident": SLACK + flight, "allocated": 0, "used": SLACK + flight}
    for name, limit in limits.items():
        growth = grown[name]
        if growth is not None and growth > limit:
            hint = "; if another process uses this GPU, run again without it" if name == "used" else ""
            raise CheckFailed(
                f"{_WORDS[name]} grew by {growth:,} bytes over {replays + others:,} runs, at most {limit:,} expected{hint}",
                figures,
            )
    kind = f"{replays:,} replays" + (f" and {others:,} runs without a graph" if others else "")
    return Finding(f"{kind} in {seconds:.1f} s: {numbers}", figures)


_WORDS: Final = {"resident": "host memory", "allocated": "torch's device memory", "used": "device memory"}


async def _memory(bench: Bench) -> Memory:
    gc.collect()
    await _all_free(bench, {"cancelled": 0})
    return memory(bench.device)


def _growth(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


async def _spread(bench: Bench, count: int, workers: int, step: Callable[[int], Awaitable[None]]) -> None:
    """Run `count` steps, `workers` at a time; the first error cancels the others."""
    numbers = iter(range(count))

    async def work() -> None:
        for i in numbers:
            await step(i)
            bench.progress((i + 1) / count)

    await together(work() for _ in range(workers))
