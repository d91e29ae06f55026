"""How late does the loop run while as many short launches are made as it can make?

    python -m benchmarks loop_lag

On CUDA: 64 and 256 awaiters on 4 slots, beside the ways without aiotrt. The 99th percentile of the loop's lag must be within
200 us of the idle loop's, which is measured before and after each row: there are minutes in which the machine lets an idle
loop run late by more than that, and then nothing is known of a busy one. On the host device, where the lag is the
processors', it is a real network's: see `host_loop_lag`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Final

from benchmarks.bench_completion import waited
from benchmarks.measure import Spread, idle_lag, median_of
from benchmarks.rows import Bench, Part, Row, verdict
from benchmarks.waits import CALL, EXECUTOR, SLEEP_0, Work

__all__ = ["LOOP_LAG"]

#: On CUDA: length in us, awaiters, and way.
SATURATED: Final = (
    (20, 64, CALL), (20, 256, CALL), (50, 64, CALL), (200, 64, CALL), (1000, 64, CALL),
    (200, 64, EXECUTOR), (200, 64, SLEEP_0),
)  # fmt: skip
SLOTS: Final = 4
BAR: Final = 200e-6  # seconds that the lag's p99 may be over the idle loop's


def loop_lag(bench: Bench) -> Iterator[Row]:
    """The loop of a saturated GPU."""
    plan = bench.plan(seconds=0.1, least=64)
    for length, awaiters, way in bench.each("loop_lag", SATURATED):
        work = Work(bench.device, length / 1e6)
        for loop in bench.loops:
            before = bench.run(loop, idle_lag(2 * plan.lag))
            measured = bench.run(loop, waited(way, work, SLOTS, awaiters, plan, lags=plan.runs))
            after = bench.run(loop, idle_lag(2 * plan.lag))
            setting = {"us": length, "slots": SLOTS, "awaiters": awaiters}
            if measured is not None and before is not None and after is not None:
                facts = {"idle_lag": asdict(median_of((before, after)))}
                yield Row.measured("loop_lag", loop, way, setting, work.seconds, measured[0], lags=measured[1], facts=facts)


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """Against the idle loop of the same minute; in files that have none, of the same run."""
    for row in rows:
        if row.way == CALL and row.lag is not None:
            beside: float = row.facts["idle_lag"]["p99"] if "idle_lag" in row.facts else idle[row.loop].p99
            over = row.lag.p99 - beside
            row.verdict = verdict([] if over <= BAR else [f"p99 {1e6 * over:.0f} us over the idle loop's"])
            if beside > BAR:
                row.verdict = f"unknown: the idle loop was {1e6 * beside:.0f} us late itself"


LOOP_LAG: Final[Part] = Part("loop_lag", "how late the loop runs while a model is busy", loop_lag, judge, 120)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["loop_lag", *sys.argv[1:]]))
