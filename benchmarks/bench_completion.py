"""How soon, and at what cost, does an awaiter learn that its work is done? And how busy do many awaiters keep the device?

    python -m benchmarks.bench_completion [--device auto|host|cuda] [--part completion|throughput] [--quick] [--out DIR]

`completion`: one awaiter, work of several lengths, input on the device: the time an await takes over the device's own time,
and the processor time that it costs. `throughput`: 64 awaiters on 2 and 4 slots: launches a second, as a share of what the
device does when nobody waits. Both on every event loop installed, next to baselines that wait for the same graphs.

On CUDA the figures are held against the project's bars; on the host device there are none, and short work takes a sleep's
own imprecision longer.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, Heartbeat, Spread, Usage, idle_lag, loops, median_of, run_on, write
from benchmarks.waits import AIOTRT, BASELINES, CALL, EXECUTOR, FLOOR, Request, Work, ceiling, opened

AWAITERS: Final = 64
#: Lengths in microseconds: (one awaiter, many awaiters). A sleep in a thread cannot be as short as a kernel.
LENGTHS: Final = {"cuda": ((20, 100, 200, 1000, 5000), (50, 200, 1000)), "host": ((200, 1000, 5000), (1000, 5000))}
QUICK_LENGTHS: Final = ((1000,), (1000,))

#: One awaiter, by length: p50 over the floor's in us (asyncio, uvloop), and share of a core.
COMPLETION_BARS: Final = {
    20: (7, 4, None),
    100: (7, 4, 1 / 3),
    200: (7, 4, 1 / 3),
    1000: (20, 10, 0.09),
    5000: (20, 15, 0.05),
}
P99_BAR: Final = 100  # us over the device's time, from 1 ms on
#: Many awaiters, by slots: share of the ceiling, from this length in us on.
THROUGHPUT_BARS: Final = {2: (0.99, 50), 4: (0.95, 200)}

console: Final = Console()


@dataclass(frozen=True)
class Run:
    """One run. Times in seconds; `overhead` is an await's time less the device's own."""

    overhead: Spread
    rate: float
    cpu: float
    others: float | None


@dataclass(frozen=True)
class Row:
    """One way to wait, in one setting: its runs, and the median of each of their figures.

    Attributes:
        nominal: seconds that the work was asked to take.
        device_seconds: that it takes.
        ceiling: launches a second when nobody waits; None for one awaiter.
        lag: of the loop, from a run of its own.
    """

    part: str
    loop: str
    way: str
    nominal: float
    device_seconds: float
    slots: int
    awaiters: int
    ceiling: float | None
    runs: list[Run]
    lag: Spread
    overhead: Spread = field(init=False)
    rate: float = field(init=False)
    cpu: float = field(init=False)

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "overhead", median_of(run.overhead for run in self.runs))
        set_(self, "rate", statistics.median(run.rate for run in self.runs))
        set_(self, "cpu", statistics.median(run.cpu for run in self.runs))


@dataclass(frozen=True)
class Plan:
    """How much to measure: runs of each setting, seconds of each run, and requests at the least."""

    runs: int
    seconds: float
    least: int

    def count(self, expected: float) -> int:
        """How many requests make one run, if each takes this long."""
        return max(self.least, min(20_000, round(self.seconds / expected)))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "host", "cuda"], default="auto")
    parser.add_argument("--part", choices=["completion", "throughput"], help="one part only")
    parser.add_argument("--quick", action="store_true", help="one short run of each, to see that it works; no results")
    parser.add_argument("--out", type=Path, help=f"folder for the results; {RESULTS.name} beside this file if not quick")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "host"
    plan = Plan(runs=1, seconds=0.05, least=AWAITERS) if arguments.quick else Plan(runs=5, seconds=0.1, least=2 * AWAITERS)
    single, many = QUICK_LENGTHS if arguments.quick else LENGTHS[device]
    idle = {loop: run_on(loop, idle_lag(0.2 if arguments.quick else 1.0)) for loop in loops()}
    rows: list[Row] = []
    with console.status("starting") as status:
        parts = [completion(device, single, plan), throughput(device, many, plan)]
        for part, measured in zip(("completion", "throughput"), parts, strict=True):
            if arguments.part in (None, part):
                for row in measured:
                    rows.append(row)
                    status.update(f"{row.part}: {1e6 * row.nominal:,.0f} us, {row.slots} slots, {row.loop}, {row.way}")
    folder = arguments.out or (None if arguments.quick else RESULTS)
    if folder is not None:
        results = {"device": device, "quick": arguments.quick, "idle_lag": idle, "rows": rows}
        name = "-".join(filter(None, ["completion", device, arguments.part and f"only-{arguments.part}"]))
        console.print(f"results: {write(name, results, folder)}")
    show(rows, idle, has_bars=device == "cuda")


# Measuring...


def completion(device: str, lengths: Sequence[int], plan: Plan) -> Iterator[Row]:
    """One awaiter."""
    for length in lengths:
        work = Work(device, length / 1e6)
        for loop in loops():
            for way in (*BASELINES, *AIOTRT):
                measured = run_on(loop, measure(way, work, slots=1, awaiters=1, plan=plan))
                yield Row("completion", loop, way, work.nominal, work.seconds, 1, 1, None, *measured)


def throughput(device: str, lengths: Sequence[int], plan: Plan) -> Iterator[Row]:
    """Many awaiters."""
    for length in lengths:
        work = Work(device, length / 1e6)
        for slots in THROUGHPUT_BARS:
            top = ceiling(work, slots, plan.count(work.seconds / slots))
            for loop in loops():
                for way in (*BASELINES, CALL):
                    measured = run_on(loop, measure(way, work, slots=slots, awaiters=AWAITERS, plan=plan))
                    yield Row("throughput", loop, way, work.nominal, work.seconds, slots, AWAITERS, top, *measured)


async def measure(way: str, work: Work, *, slots: int, awaiters: int, plan: Plan) -> tuple[list[Run], Spread]:
    """Several runs in a row, after one that does not count: it warms caches, and teaches aiotrt how long the work takes.

    And the loop's lag in one more, since the heartbeat would cost the others what they are measured by.
    """
    count = plan.count(work.seconds / slots)
    async with opened(way, work, slots) as request:
        await drive(request, awaiters, min(count, 256))
        runs = []
        for _ in range(plan.runs):
            gc.collect()
            with Usage() as usage:
                seconds = await drive(request, awaiters, count)
            overhead = Spread.of([taken - work.seconds for taken in seconds])
            runs.append(Run(overhead, len(seconds) / usage.seconds, usage.cpu, usage.others))
        async with Heartbeat() as heartbeat:
            await drive(request, awaiters, count)
        return runs, heartbeat.spread


async def drive(request: Request, awaiters: int, count: int) -> list[float]:
    """So many requests from so many awaiters; returns how long each took."""
    seconds: list[float] = []

    async def awaiter() -> None:
        for _ in range(max(1, count // awaiters)):
            started = time.perf_counter()
            await request()
            seconds.append(time.perf_counter() - started)

    if awaiters == 1:
        await awaiter()
    else:
        await asyncio.gather(*(awaiter() for _ in range(awaiters)))
    return seconds


# Showing...


def show(rows: Sequence[Row], idle: dict[str, Spread], *, has_bars: bool) -> None:
    """A short table for each part; for CUDA with the bars that aiotrt's figures meet or miss."""
    for part in dict.fromkeys(row.part for row in rows):
        chosen = [row for row in rows if row.part == part]
        table = Table(title=f"{part}: medians of {len(chosen[0].runs)} runs; times in us", title_justify="left")
        columns = ("over p50", "over p99") if part == "completion" else ("awaits/s", "of ceiling")
        table.add_column("work", justify="right")
        for heading in ("loop", "way"):
            table.add_column(heading, no_wrap=True)
        for heading in (*columns, "CPU", "lag p99 ms"):
            table.add_column(heading, justify="right", no_wrap=True)
        for i, row in enumerate(chosen):
            slots = f" x{row.slots}" if part == "throughput" else ""
            if row.ceiling is None:
                figures = [f"{1e6 * row.overhead.p50:,.1f}", f"{1e6 * row.overhead.p99:,.1f}"]
            else:
                figures = [f"{row.rate:,.0f}", f"{row.rate / row.ceiling:.2f}"]
            table.add_row(
                f"{1e6 * row.device_seconds:,.0f}{slots}",
                row.loop,
                row.way,
                *figures,
                f"{row.cpu:.1%}",
                f"{1e3 * (row.lag.p99 - idle[row.loop].p99):+,.1f}",
                style="bold" if row.way in AIOTRT else None,
                end_section=i + 1 < len(chosen) and chosen[i + 1].loop != row.loop,
            )
        console.print(table)
        if has_bars:
            show_verdicts(chosen)
    console.print("over: an await's time over the device's. lag p99: of the loop, over the idle loop's in this run.")
    others = [run.others for row in rows for run in row.runs if run.others is not None]
    if others and max(others) > 0.2:
        console.print(f"Other programs used {statistics.median(others):.1f} cores meanwhile, at most {max(others):.1f}.")


def show_verdicts(rows: Sequence[Row]) -> None:
    """Which bars aiotrt meets and misses."""
    for row in rows:
        if said := verdict(row, rows):
            setting = f"{1e6 * row.nominal:,.0f} us, {row.slots} slot{'s' * (row.slots > 1)}, {row.loop}, {row.way}"
            console.print(f"{setting}: {said}", highlight=False)


def verdict(row: Row, rows: Sequence[Row]) -> str:
    """Whether aiotrt's figures meet the bars; empty for baselines, and where there is no bar."""
    if row.way not in AIOTRT:
        return ""
    length = round(1e6 * row.nominal)
    misses = []
    if row.ceiling is not None:
        share, least = THROUGHPUT_BARS[row.slots]
        if length < least:
            return ""
        if row.rate < share * row.ceiling:
            misses.append(f"{share:.0%} of the ceiling")
    else:
        beside = {
            other.way: other
            for other in rows
            if (other.part, other.loop, other.nominal) == ("completion", row.loop, row.nominal)
        }
        on_asyncio, on_uvloop, cpu = COMPLETION_BARS[length]
        allowed = on_uvloop if row.loop == "uvloop" else on_asyncio
        over = 1e6 * (row.overhead.p50 - beside[FLOOR].overhead.p50)
        if over > allowed:
            misses.append(f"{over:.1f} us over the floor, not {allowed}")
        if cpu is not None and row.cpu > cpu:
            misses.append(f"{cpu:.0%} CPU")
        if length >= 1000 and 1e6 * row.overhead.p99 > P99_BAR:
            misses.append(f"p99 {P99_BAR} us")
        if length == 1000:
            thread = beside[EXECUTOR]
            if row.overhead.p50 > thread.overhead.p50 / 4 or row.cpu > thread.cpu / 10:
                misses.append("a quarter of the thread's overhead and a tenth of its CPU")
    return "misses " + "; ".join(misses) if misses else "meets"


if __name__ == "__main__":
    main()
