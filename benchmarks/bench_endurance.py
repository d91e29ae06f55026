"""Does memory grow?

    python -m benchmarks endurance

100,000 awaits, 10,000 cancellations at every stage of a call, and 1,000 calls that each need a graph of another shape, with
a cache that holds sixteen. The process's resident memory and the device's memory are read twenty times in each; growth is
the median of the last three readings over that of the three after the first quarter, when everything was used once.
"""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

import aiotrt
from benchmarks.measure import Spread, Usage, drive
from benchmarks.rows import Bench, Part, Row, Run, verdict
from benchmarks.waits import Work

__all__ = ["ENDURANCE"]

MIB: Final = 1 << 20
COUNTS: Final = {"awaits": 100_000, "cancellations": 10_000, "shapes": 1_000}
QUICK_COUNTS: Final = {"awaits": 200, "cancellations": 100, "shapes": 40}
READINGS: Final = 20
QUICK_READINGS: Final = 4
SLOTS: Final = 4
AWAITERS: Final = 64
CACHE: Final = 16
WIDTHS: Final = 100  # different shapes, taken in turn: with a smaller cache every one is captured anew
NOMINAL: Final = {"cuda": 30e-6, "host": 100e-6}
RSS_BAR: Final = 8 * MIB
#: What the device's memory may differ by: nothing, but torch's own count has the last results in it, whose sizes differ.
DEVICE_BARS: Final = {"device": 0, "reserved": 0, "allocated": MIB // 16}

#: One of `READINGS` equal shares of a phase: the model, the work, how many, and how many went before.
Share = Callable[[aiotrt.Model, Work, int, int], Awaitable[list[float]]]


def endurance(bench: Bench) -> Iterator[Row]:
    """Every phase, on the last loop installed."""
    loop = bench.loops[-1]
    work = Work(bench.device, NOMINAL[bench.device])
    counts = QUICK_COUNTS if bench.quick else COUNTS
    for phase in bench.each("endurance", counts):
        row = bench.run(loop, endured(bench, work, phase, counts[phase], loop))
        if row is not None:
            yield row


async def endured(bench: Bench, work: Work, phase: str, count: int, loop: str) -> Row:
    """One phase."""
    readings: list[dict[str, int]] = []
    seconds: list[float] = []  # of the last share: those of all would be growth themselves
    async with aiotrt.load(
        work.function, device=bench.device, slots=SLOTS, max_queue=None, graph_cache_entries=CACHE, warmup=[work.example]
    ) as model:
        share = count // (QUICK_READINGS if bench.quick else READINGS)
        done = 0
        with Usage() as usage:
            while done < count and not bench.is_over:
                seconds = await PHASES[phase](model, work, share, done)
                done += share
                readings.append(memory(bench.device))
        statistics_ = model.statistics()
    if done < count:
        bench.unreached.append(f"endurance: {phase} after {done:,}")
    run = Run(Spread.of(seconds), done / usage.seconds, usage.cpu, usage.others)
    facts: dict[str, Any] = {
        "count": done,
        "memory": {name: extremes([reading[name] for reading in readings]) for name in readings[0]},
        "growth": {name: growth([reading[name] for reading in readings]) for name in readings[0]},
        "completed": statistics_.completed,
        "cancelled": statistics_.cancelled,
        "captures": statistics_.captures,
        "evictions": statistics_.evictions,
        "is_complete": done >= count and not bench.quick,
    }
    return Row.measured("endurance", loop, "aiotrt call", {"phase": phase}, work.seconds, [run], facts=facts)


async def awaits(model: aiotrt.Model, work: Work, count: int, _: int) -> list[float]:
    """Plain calls."""
    return await drive(lambda: model(work.example), AWAITERS, max(count, AWAITERS))


async def cancellations(model: aiotrt.Model, work: Work, count: int, before: int) -> list[float]:
    """Calls that are cancelled: before they have begun, in line, on the device, and when they are nearly done."""
    loop, left = asyncio.get_running_loop(), count
    seconds = []
    while left > 0:
        batch = min(left, AWAITERS)
        started = loop.time()
        tasks = [asyncio.ensure_future(model(work.example)) for _ in range(batch)]
        for _ in range((before + left) % 5):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        seconds.append(loop.time() - started)
        left -= batch
    await model(work.example)  # when this is served, everything that drained has drained
    return seconds


async def shapes(model: aiotrt.Model, work: Work, count: int, before: int) -> list[float]:
    """Calls of ever other shapes."""
    loop = asyncio.get_running_loop()
    seconds = []
    for i in range(before, before + count):
        x = torch.zeros(64 + i % WIDTHS, device=work.device.torch_device)
        started = loop.time()
        await model(x)
        seconds.append(loop.time() - started)
    return seconds


PHASES: Final[dict[str, Share]] = {"awaits": awaits, "cancellations": cancellations, "shapes": shapes}


def memory(device: str) -> dict[str, int]:
    """Bytes in use now, once garbage is gone."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    found = {"rss": pages * os.sysconf("SC_PAGE_SIZE")}
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "device": total - free,
            "reserved": torch.cuda.memory_reserved(),
            "allocated": torch.cuda.memory_allocated(),
        }
    return found


def extremes(values: Sequence[int]) -> dict[str, int]:
    """The first, the last, the least and the most of several readings."""
    return {"first": values[0], "last": values[-1], "least": min(values), "most": max(values)}


def growth(values: Sequence[int]) -> int:
    """How much more at the end than after the first quarter."""
    quarter = len(values) // 4
    return round(statistics.median(values[-3:]) - statistics.median(values[quarter : quarter + 3]))


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """No growth of the device's memory, and next to none of the host's."""
    for row in rows:
        if not row.facts["is_complete"]:
            continue
        grown: dict[str, int] = row.facts["growth"]
        misses = [
            f"{name} memory grew by {size / MIB:.1f} MiB"
            for name, bar in DEVICE_BARS.items()
            if (size := grown.get(name, 0)) > bar
        ]
        if grown["rss"] > RSS_BAR:
            misses.append(f"resident memory grew by {grown['rss'] / MIB:.1f} MiB, not {RSS_BAR // MIB}")
        row.verdict = verdict(misses)


ENDURANCE: Final[Part] = Part("endurance", "memory over many awaits, cancellations and shapes", endurance, judge, 300)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["endurance", *sys.argv[1:]]))
