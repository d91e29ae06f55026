"""Does the event loop stay free while a real model keeps the processors busy?

    python -m benchmarks loop_lag --device host

64 awaiters on the host device, the PP-OCRv4 text detector at 320 by 320 pixels, its engine on one thread, 1 and 2 slots.
Every result must have the same bits as calling the engine directly with that awaiter's input. The 99th percentile of the
loop's lag must be within 5 ms of the idle loop's, on two cores. For comparison, the same through `asyncio.to_thread`.

The process keeps to two cores if there are more.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

import aiotrt
from benchmarks.measure import (
    HEARTBEAT,
    RESULTS,
    Heartbeat,
    Spread,
    Usage,
    finish,
    idle_lag,
    loops,
    mean_of_known,
    median_of,
    run_on,
)
from examples import ocr

__all__ = ["main"]

AWAITERS: Final = 64
QUICK_AWAITERS: Final = 8
TO_THREAD: Final = "to_thread"
WAYS: Final = {"1 slot": 1, "2 slots": 2, TO_THREAD: 0}  # and how many slots
BAR: Final = 5e-3  # seconds that the lag's p99 may be over the idle loop's
CORES: Final = 2

console: Final = Console()


@dataclass(frozen=True)
class Run:
    """One run. Times in seconds; `others` is how many cores other programs used meanwhile."""

    idle: Spread
    lag: Spread
    rate: float
    cpu: float
    others: float | None
    wrong: int


@dataclass(frozen=True)
class Row:
    """One setting: the summary of its runs, each figure the median over them.

    Attributes:
        runs: how many there were.
        idle: the lag of the idle loop; `lag` that of the busy one.
        over_idle: the p99 of `lag` less that of `idle`.
        others: cores that other programs used meanwhile, the mean; None if unknown.
        wrong: results of all runs that differ from the engine's own in any bit.
        spread: the least and the most over the runs of the lag's p99, the rate and cpu.
    """

    loop: str
    way: str
    runs: int
    idle: Spread
    lag: Spread
    over_idle: float
    rate: float
    cpu: float
    others: float | None
    wrong: int
    spread: dict[str, tuple[float, float]]

    @classmethod
    def measured(cls, loop: str, way: str, runs: Sequence[Run]) -> Row:
        """Summarise runs."""
        idle, lag = median_of(run.idle for run in runs), median_of(run.lag for run in runs)
        figures = {
            "lag": [run.lag.p99 for run in runs],
            "rate": [run.rate for run in runs],
            "cpu": [run.cpu for run in runs],
        }
        return cls(
            loop, way, len(runs), idle, lag, lag.p99 - idle.p99,
            rate=statistics.median(figures["rate"]),
            cpu=statistics.median(figures["cpu"]),
            others=mean_of_known(run.others for run in runs),
            wrong=sum(run.wrong for run in runs),
            spread={name: (min(values), max(values)) for name, values in figures.items()},
        )  # fmt: skip

    @property
    def meets(self) -> bool:
        """Whether it meets the bar."""
        return self.over_idle <= BAR and self.wrong == 0


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short run of each, to see that it works; no results")
    parser.add_argument("--out", type=Path, help=f"folder for the results; {RESULTS.name} beside this file if not quick")
    arguments = parser.parse_args(words)
    try:
        file = ocr.detector_file()
    except FileNotFoundError as error:
        console.print(f"skipped: {error}")
        return
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(processors)[:CORES])
    inputs = detector_inputs()[: QUICK_AWAITERS if arguments.quick else AWAITERS]
    session = ocr.direct_session(file)
    expected = [session(x) for x in inputs]
    rounds, runs = 1, 1 if arguments.quick else 5
    rows = []
    with console.status("starting") as status:
        for loop in loops():
            for way in WAYS:
                status.update(f"{loop}, {way}")
                measured = run_on(loop, measure(way, file, inputs, expected, rounds, runs))
                rows.append(Row.measured(loop, way, measured))
    os.sched_setaffinity(0, processors)
    folder = arguments.out or (None if arguments.quick else RESULTS)
    if folder is not None:
        results = {
            "quick": arguments.quick,
            "heartbeat": HEARTBEAT,
            "awaiters": len(inputs),
            "bar_seconds": BAR,
            "rows": rows,
        }
        console.print(finish("loop_lag-host", results, folder, is_whole=True), soft_wrap=True)
    show(rows, len(inputs))


def detector_inputs() -> list[ocr.Floats]:
    """One for each awaiter: pieces of the scanned page, each at another place."""
    page = ocr.scanned_page(scale=2)
    places = [(y, x) for y in range(0, 64, 8) for x in range(0, 448, 56)]
    return [ocr.normalise(page[y : y + 320, x : x + 320]) for y, x in places[:AWAITERS]]


async def measure(
    way: str, file: Path, inputs: Sequence[ocr.Floats], expected: Sequence[ocr.Floats], rounds: int, runs: int
) -> list[Run]:
    """Several runs of one way, after one round that does not count."""
    if way == TO_THREAD:
        session = ocr.direct_session(file)
        return await measure_calls(lambda x: asyncio.to_thread(session, x), inputs, expected, rounds, runs)
    async with aiotrt.load(file, device="host", slots=WAYS[way], threads=1, warmup=[inputs[0]]) as model:
        return await measure_calls(model, inputs, expected, rounds, runs)


async def measure_calls(
    call: Callable[[ocr.Floats], Awaitable[Any]],
    inputs: Sequence[ocr.Floats],
    expected: Sequence[ocr.Floats],
    rounds: int,
    runs: int,
) -> list[Run]:
    """The loop's lag when idle, and while every awaiter makes `rounds` calls."""

    async def awaiter(i: int, results: list[Any]) -> None:
        for _ in range(rounds):
            result = await call(inputs[i])
            results.append((i, result))

    await asyncio.gather(*(call(x) for x in inputs))
    measured = []
    for _ in range(runs):
        idle = await idle_lag(1.0 if runs > 1 else 0.2)
        results: list[Any] = []
        async with Heartbeat() as heartbeat:
            with Usage() as usage:
                await asyncio.gather(*(awaiter(i, results) for i in range(len(inputs))))
        wrong = sum(not np.array_equal(result, expected[i]) for i, result in results)
        rate = len(results) / usage.seconds
        measured.append(Run(idle, heartbeat.spread, rate, usage.cpu, usage.others, wrong))
    return measured


def show(rows: Sequence[Row], awaiters: int) -> None:
    """The rows as a table, medians over the runs."""
    table = Table(title=f"{awaiters} awaiters; lag in ms, medians of {rows[0].runs} runs", title_justify="left")
    for heading in ("loop", "way"):
        table.add_column(heading, no_wrap=True)
    for heading in ("calls/s", "p50", "p99", "idle p99", "over", "wrong"):
        table.add_column(heading, justify="right")
    table.add_column("bar")
    for row in rows:
        table.add_row(
            row.loop,
            row.way,
            f"{row.rate:,.0f}",
            *(f"{1e3 * span:,.1f}" for span in (row.lag.p50, row.lag.p99, row.idle.p99, row.over_idle)),
            str(row.wrong),
            "" if row.way == TO_THREAD else "meets" if row.meets else "misses",
        )
    console.print(table)
    console.print("over: the lag's p99 over the idle loop's. wrong: results that differ from the engine's own in any bit.")
    others = [row.others for row in rows if row.others is not None]
    if others and max(others) > 0.2:
        console.print(f"Other programs used {statistics.median(others):.1f} cores meanwhile, at most {max(others):.1f}.")
