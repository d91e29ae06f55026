"""How soon, and at what cost, does an awaiter learn that its work is done? And how busy do many awaiters keep the device?

    python -m benchmarks completion throughput

`completion`: one awaiter, work of several lengths, input on the device: the time an await takes over the device's own time,
and the processor time that it costs. `throughput`: many awaiters on several slots: launches a second, as a share of what
the device does when nobody waits. Both on every event loop installed, next to baselines that wait for the same graphs, and
to the shortest path that could be written (`benchmarks.prototype`); with one awaiter all ways take turns.

On CUDA the figures are held against the project's bars; on the host device there are none, and short work takes a sleep's
own imprecision longer.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from benchmarks.measure import Spread
from benchmarks.rows import Bench, Entry, Part, Plan, Row, Run, measure, measure_in_turns, verdict
from benchmarks.waits import (
    AIOTRT,
    BASELINES,
    CALL,
    EXECUTOR,
    FLOOR,
    IN_ORDER,
    PROTOTYPES,
    Work,
    ceiling,
    opened,
    unavailable,
)  # fmt: skip

__all__ = ["COMPLETION", "THROUGHPUT"]

#: Lengths in microseconds. A sleep in a thread cannot be as short as a kernel.
LENGTHS: Final = {"cuda": (20, 50, 100, 200, 1000, 5000, 20_000), "host": (200, 1000, 5000, 20_000)}
#: One awaiter, by length: p50 over the floor's in us (asyncio, uvloop), and share of a core.
COMPLETION_BARS: Final = {
    20: (7, 4, None),
    50: (7, 4, None),
    100: (7, 4, 1 / 3),
    200: (7, 4, 1 / 3),
    1000: (20, 10, 0.09),
    5000: (20, 15, 0.05),
}
P99_BAR: Final = 100  # us over the device's time, for the lengths of 1 and 5 ms

#: Many awaiters: length in us, and for each the pairs of slots and awaiters.
FULL: Final = tuple((slots, awaiters) for slots in (1, 2, 4, 8) for awaiters in (1, 16, 64, 256))
MANY: Final = {50: FULL, 200: FULL, 1000: FULL, 20_000: ((4, 64),)}
QUICK_MANY: Final = {1000: ((1, 16), (2, 16))}
BESIDE_LENGTHS: Final = (50, 1000)
#: The ways beside aiotrt's, and where: pairs of slots and awaiters. Of the prototype a pair is enough to compare.
BESIDE_AT: Final = {(2, 64): BASELINES, (4, 64): (*PROTOTYPES, *BASELINES)}
QUICK_BESIDE_AT: Final = {(2, 16): (*PROTOTYPES, *BASELINES)}
#: One awaiter: up to this length, in us, the prototype is measured too.
COMPARED: Final = 5000
#: Where slots that do not overlap are measured too, against one stream's ceiling.
IN_ORDER_AT: Final = (2, 64)
#: By slots: share of the ceiling, from this length in us on, for 64 awaiters.
THROUGHPUT_BARS: Final = {2: (0.99, 50), 4: (0.95, 200)}
MOST: Final = 2000  # requests of a run
LOOP_BOUND: Final = 40_000  # awaits a second on uvloop, for 4 slots and shorter work, where the loop is the limit


def completion(bench: Bench) -> Iterator[Row]:
    """One awaiter."""
    for length in bench.each("completion, us", (1000,) if bench.quick else LENGTHS[bench.device]):
        work = Work(bench.device, length / 1e6)
        plan = bench.plan(seconds=0.02, least=100 if length <= 5000 else 20)
        ways = []
        for way in (*AIOTRT, *(PROTOTYPES if length <= COMPARED else ()), *BASELINES):
            if why := unavailable(way, bench.device):
                bench.skipped[way] = why
            else:
                ways.append(way)
        for loop in bench.each(f"completion, {length} us", bench.loops):

            def failed(way: str, error: Exception, says: str = f"completion, {length} us: {loop}") -> None:
                bench.fail(f"{says}, {way}", error)

            entries = {way: Entry(opened(way, work, 1), plan.count(work.seconds)) for way in ways}
            measured = bench.run(loop, measure_in_turns(entries, plan, failed))
            for way, (runs, lags) in (measured or {}).items():
                yield Row.measured("completion", loop, way, {"us": length}, work.seconds, runs, lags=lags)


def throughput(bench: Bench) -> Iterator[Row]:
    """Many awaiters."""
    for length, settings in (QUICK_MANY if bench.quick else MANY).items():
        if bench.is_over:
            bench.unreached.append(f"throughput, {length} us")
            continue
        work = Work(bench.device, length / 1e6)
        plan = bench.plan(seconds=0.03, least=16)
        ceilings = {slots: ceiling(work, slots, plan.count(work.seconds / slots)) for slots in {s for s, _ in settings}}
        one_stream = ceiling(work, 1, plan.count(work.seconds))
        wanted = [(slots, awaiters, loop, CALL) for slots, awaiters in settings for loop in bench.loops]
        if IN_ORDER_AT in settings:
            wanted += [(*IN_ORDER_AT, loop, IN_ORDER) for loop in bench.loops]
        if length in BESIDE_LENGTHS:
            beside = QUICK_BESIDE_AT if bench.quick else BESIDE_AT
            wanted += [(*pair, loop, way) for pair in settings for loop in bench.loops for way in beside.get(pair, ())]
        for slots, awaiters, loop, way in bench.each(f"throughput, {length} us", wanted):
            if why := unavailable(way, bench.device):
                bench.skipped[way] = why
                continue
            measured = bench.run(loop, waited(way, work, slots, awaiters, plan))
            setting = {"us": length, "slots": slots, "awaiters": awaiters}
            if measured is not None:
                most = one_stream if way == IN_ORDER else ceilings[slots]
                yield Row.measured(
                    "throughput", loop, way, setting, work.seconds, measured[0], ceiling=most, lags=measured[1]
                )


async def waited(
    way: str, work: Work, slots: int, awaiters: int, plan: Plan, *, lags: int = 1
) -> tuple[list[Run], list[Spread]]:
    """The runs of one way."""
    async with opened(way, work, slots) as request:
        count = max(2 * awaiters, plan.count(work.seconds / min(slots, awaiters), MOST))
        return await measure(request, plan, awaiters=awaiters, count=count, lags=lags)


def judge_completion(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """Against the floor and the executor of the same run."""
    for row in rows:
        length = int(row.setting["us"])
        if row.way not in AIOTRT or length not in COMPLETION_BARS:
            continue
        beside = {other.way: other for other in rows if (other.loop, other.setting) == (row.loop, row.setting)}
        on_asyncio, on_uvloop, cpu = COMPLETION_BARS[length]
        allowed = on_uvloop if row.loop == "uvloop" else on_asyncio
        misses = []
        if FLOOR in beside and (over := 1e6 * (row.latency.p50 - beside[FLOOR].latency.p50)) > allowed:
            misses.append(f"{over:.1f} us over the floor, not {allowed}")
        if cpu is not None and row.cpu > cpu:
            misses.append(f"{row.cpu:.0%} of a core, not {cpu:.0%}")
        if length in (1000, 5000) and 1e6 * row.overhead.p99 > P99_BAR:
            misses.append(f"p99 {1e6 * row.overhead.p99:.0f} us, not {P99_BAR}")
        if length == 1000 and EXECUTOR in beside:
            thread = beside[EXECUTOR]
            if row.overhead.p50 > thread.overhead.p50 / 4:
                misses.append(f"{row.overhead.p50 / thread.overhead.p50:.2f} of the executor's overhead, not a quarter")
            if row.cpu > thread.cpu / 10:
                misses.append(f"{row.cpu / thread.cpu:.2f} of the executor's CPU, not a tenth")
        row.verdict = verdict(misses)


def judge_throughput(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """Against the ceiling of the same run."""
    for row in rows:
        length, slots, awaiters = (int(row.setting[name]) for name in ("us", "slots", "awaiters"))
        if row.way not in (CALL, IN_ORDER) or slots not in THROUGHPUT_BARS or awaiters != 64 or row.ceiling is None:
            continue
        share, least = THROUGHPUT_BARS[slots]
        reached = row.rate / row.ceiling
        if length >= least:
            row.verdict = verdict([] if reached >= share else [f"{reached:.1%} of the ceiling, not {share:.0%}"])
        elif row.loop == "uvloop":
            fast = row.rate >= LOOP_BOUND or reached >= share
            row.verdict = verdict([] if fast else [f"{row.rate:,.0f} awaits/s, not {LOOP_BOUND:,}"])


COMPLETION: Final[Part] = Part(
    "completion", "one awaiter: overhead over device time, CPU, lag", completion, judge_completion, 360
)
THROUGHPUT: Final[Part] = Part("throughput", "many awaiters: share of the ceiling", throughput, judge_throughput, 360)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["completion", "throughput", *sys.argv[1:]]))
