"""What does a wrong prediction cost?

    python -m benchmarks jitter

One awaiter and work whose length changes from call to call, unforeseeably: log-normal, bimodal, drifting, the same but for
stalls; queued behind a neighbour's work, which the call's inputs depend on; and beside another process on the same device.
For every way of finding completion that there is, and for a blocking `synchronize`. The bar: "predict", the default, is
nowhere worse than "interval". They take turns, so each run of one is compared with the other's run of the same minute: the
median of those differences must not be above zero by more than two of its standard errors, and 2 us.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch

import aiotrt
from aiotrt.devices import Stream
from benchmarks.hold import Hold, MissingKernelError
from benchmarks.measure import Heartbeat, Spread, Usage
from benchmarks.rows import Bench, Part, Plan, Row, Run, verdict
from benchmarks.waits import FLOOR, Line, Progress

__all__ = ["JITTER"]

MODES: Final[tuple[Progress, ...]] = get_args(Progress)
SECOND: Final = "second process"
SCENARIOS: Final = ("constant", "log-normal", "bimodal", "drifting", "stalls", "queued", SECOND)
BASE: Final = {"cuda": 300e-6, "host": 1e-3}  # seconds, on average
COUNT: Final = {"cuda": 400, "host": 100}
QUICK_COUNT: Final = 8
TURN: Final = 50  # calls of one way that count, before it is another's turn
FIRST: Final = 5  # calls at the beginning of a turn that do not: who had the one before makes a difference to them
ALL: Final = slice(None)

#: One call's lengths: its own, and the neighbour's that it is queued behind.
Lengths = tuple[float, float]


def lengths(scenario: str, base: float, count: int) -> list[Lengths]:
    """The same ones for every way."""
    random = np.random.default_rng(7)
    if scenario == "log-normal":
        own = base * np.minimum(5, random.lognormal(-0.125, 0.5, count))
    elif scenario == "bimodal":
        own = base * np.where(random.random(count) < 0.15, 4, 0.5)
    elif scenario == "drifting":
        own = base * (1 + 0.8 * np.sin(2 * math.pi * np.arange(count) / 80))
    elif scenario == "stalls":
        own = base * np.where(random.random(count) < 0.03, 10, 1)
    else:
        own = np.full(count, base)
    before = random.uniform(0, 2 * base, count) if scenario == "queued" else np.zeros(count)
    return [(float(a), float(b)) for a, b in zip(own, before, strict=True)]


def jitter(bench: Bench) -> Iterator[Row]:
    """Every scenario, by every mode."""
    try:
        hold = Hold(bench.device)
    except MissingKernelError as error:
        bench.skipped["jitter"] = str(error)
        return
    plan = bench.plan()
    for scenario in SCENARIOS:
        if bench.is_over:
            bench.unreached.append(f"jitter, {scenario}")
            continue
        calls = Calls(hold, lengths(scenario, BASE[bench.device], QUICK_COUNT if bench.quick else COUNT[bench.device]))
        with neighbour(bench.device, scenario == SECOND):
            for loop in bench.each(f"jitter, {scenario}", bench.loops):
                found = bench.run(loop, measured(calls, (FLOOR, *MODES), plan))
                # The runs' latencies are over the lengths asked for; what a launch takes beside them is the device's too.
                for way, (runs, lag) in (found or {}).items():
                    facts = beside(runs, found["interval"][0]) if found and way == "predict" else {}
                    at = {"scenario": scenario}
                    yield Row.measured("jitter", loop, way, at, hold.base, runs, lags=[lag], facts=facts)


class Calls:
    """Calls of these lengths, one after the other."""

    def __init__(self, hold: Hold, lengths: Sequence[Lengths]) -> None:
        self.hold = hold
        self._lengths = lengths
        self._inputs = [(hold.seconds(own), hold.seconds(before)) for own, before in lengths]

    def __len__(self) -> int:
        return len(self._lengths)

    async def over(self, request: Callable[[torch.Tensor], Any], ahead_of_it: Stream, which: slice = ALL) -> list[float]:
        """How much longer than its length each of these calls takes."""
        over = []
        for (own, before), (x, ahead) in zip(self._lengths[which], self._inputs[which], strict=True):
            started = time.perf_counter()
            if before:
                ahead_of_it.run(partial(self.hold, ahead))
            await request(x)
            over.append(time.perf_counter() - started - own - before)
        return over


async def measured(calls: Calls, ways: Sequence[str], plan: Plan) -> dict[str, tuple[list[Run], Spread]]:
    """Several runs of each way, after one that does not count, and one beside a heartbeat.

    The ways take turns: a machine that is slow for a second is so to all of them.
    """
    async with AsyncExitStack() as stack:
        lines = {way: await stack.enter_async_context(opened(calls.hold, way)) for way in ways}
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for way in ways:
            await calls.over(*lines[way])
        for _ in range(plan.runs):
            turns = {way: Turns() for way in ways}
            with Usage() as together:
                for start in range(0, len(calls), TURN):
                    for way in ways:
                        with Usage() as usage:
                            over = await calls.over(*lines[way], slice(start, start + FIRST))
                            over += await calls.over(*lines[way], slice(start, start + TURN))
                        turns[way].add(over, usage)
            for way in ways:
                runs[way].append(turns[way].run(together))
        lags = {}
        for way in ways:
            async with Heartbeat() as heartbeat:
                await calls.over(*lines[way])
            lags[way] = heartbeat.spread
        return {way: (runs[way], lags[way]) for way in ways}


class Turns:
    """One way's turns in one run."""

    def __init__(self) -> None:
        self._over: list[float] = []
        self._calls = 0
        self._seconds = self._processor = 0.0

    def add(self, over: Sequence[float], usage: Usage) -> None:
        """One more."""
        self._over += over[FIRST:]
        self._calls += len(over)
        self._seconds += usage.seconds
        self._processor += usage.seconds * usage.cpu

    def run(self, together: Usage) -> Run:
        """All of them; `together` is of all ways' turns."""
        seconds = self._seconds
        return Run(Spread.of(self._over), self._calls / seconds, self._processor / seconds, together.others)


@asynccontextmanager
async def opened(hold: Hold, way: str) -> AsyncIterator[tuple[Callable[[torch.Tensor], Any], Stream]]:
    """A function that runs once, with this input, and a stream whose work that run waits for."""
    example, current = hold.seconds(0.0), hold.device.current_stream()
    if way != FLOOR:
        mode = next(mode for mode in MODES if mode == way)
        async with aiotrt.load(
            hold, device=hold.device.name, slots=1, warmup=[example], outputs="device", progress=mode
        ) as model:
            # Device inputs are ordered after the caller's current stream. The host device has none: there a neighbour can
            # only be ahead on the slot's own stream.
            assert model._executor is not None
            yield model, model._executor.slots[0].stream if hold.device.unified else current
        return
    line, mark = Line(hold.device, hold, example), hold.device.event()

    async def blocking(x: torch.Tensor) -> None:
        line.stream.wait(current.record(mark))
        line.stream.copy(line.input, x)
        line.submit()
        line.block()

    yield blocking, current
    line.close()


@contextmanager
def neighbour(device: str, is_there: bool) -> Iterator[None]:
    """Another process on the device, while the block runs."""
    if not is_there:
        yield
        return
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.neighbour", device],
        cwd=Path(__file__).parent.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()  # it is ready, or has failed
        if process.poll() is not None:
            raise RuntimeError("the neighbour process failed")
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def beside(runs: Sequence[Run], interval: Sequence[Run]) -> dict[str, dict[str, tuple[float, float]]]:
    """The facts for the judge: by how much each run is later than "interval" in its run of the same minute."""
    pairs = [(own.latency, other.latency) for own, other in zip(runs, interval, strict=True)]
    return {
        "over_interval": {
            name: paired([getattr(own, name) - getattr(other, name) for own, other in pairs]) for name in ("p50", "p99")
        }
    }


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """Judge the default by "interval" of the same runs."""
    for row in rows:
        if (over := row.facts.get("over_interval")) is None:
            continue
        misses = [
            f"{name} {1e6 * worse:.1f} us worse than interval, give or take {1e6 * error:.1f}"
            for name, (worse, error) in over.items()
            if worse > max(2e-6, 2 * error)
        ]
        row.verdict = verdict(misses)


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Their median, and its standard error: as the mean's is of as many normal ones, times the root of pi / 2; and their
    deviation from the median deviation, which one outlier leaves as it is.
    """
    middle = statistics.median(differences)
    deviation = 1.4826 * statistics.median(abs(one - middle) for one in differences)
    return middle, math.sqrt(math.pi / 2 / len(differences)) * deviation


JITTER: Final[Part] = Part("jitter", "durations that nobody can predict, for every progress mode", jitter, judge, 240)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["jitter", *sys.argv[1:]]))
