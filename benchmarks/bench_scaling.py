"""Does an await cost the same, however many there are?

    python -m benchmarks scaling

Processor time for one await, along four axes: `waiters` (1 to 1,024 callers of one model with 4 slots), `events` (1 to
1,024 coroutines in `aiotrt.wait`, each with an event of its own behind the same work), `models` (1 to 64, a caller and a
slot each) and `streams` (1 to 16 slots of one model, 64 callers). The bar: no more than a fifth over the cheapest of the
rows before it on its axis. (The first is the dearest where one waits alone, since whoever waits alone has all looks to pay.)
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Final

import aiotrt
from benchmarks.measure import Request, Spread
from benchmarks.rows import Bench, Entry, Part, Plan, Row, measure_in_turns, verdict
from benchmarks.waits import CALL, Line, Work, opened

__all__ = ["SCALING"]

AXES: Final = {
    "waiters": (1, 4, 16, 64, 256, 1024),
    "events": (1, 4, 16, 64, 256, 1024),
    "models": (1, 4, 16, 64),
    "streams": (1, 2, 4, 8, 16),
}
QUICK_AXES: Final = {"waiters": (1, 16), "events": (1, 16), "models": (1, 4), "streams": (1, 2)}
NOMINAL: Final = {"cuda": 200e-6, "host": 1e-3}
SLOTS: Final = 4
AWAITERS: Final = 64
BAR: Final = 1.2


def scaling(bench: Bench) -> Iterator[Row]:
    """All axes; the rows of each take turns."""
    work = Work(bench.device, NOMINAL[bench.device])
    plan = bench.plan(seconds=0.05, least=32)
    axes = QUICK_AXES if bench.quick else AXES
    for axis, loop in bench.each("scaling", [(axis, loop) for axis in axes for loop in bench.loops]):

        def failed(n: str, error: Exception, says: str = f"scaling: {axis}, {loop}") -> None:
            bench.fail(f"{says}, {n}", error)

        entries = {str(n): OF[axis](work, n, plan) for n in axes[axis]}
        measured = bench.run(loop, measure_in_turns(entries, plan, failed)) or {}
        for name, (runs, lags) in measured.items():
            n = int(name)
            if axis == "events":  # a request is a wave of them; the rate is of waits
                runs = [replace(run, rate=n * run.rate) for run in runs]
            way = "aiotrt.wait" if axis == "events" else CALL
            yield Row.measured("scaling", loop, way, {"axis": axis, "n": n}, work.seconds, runs, lags=lags)


def waiters(work: Work, n: int, plan: Plan) -> Entry:
    """So many callers of one model."""
    return Entry(opened(CALL, work, SLOTS), max(2 * n, plan.count(work.seconds / min(n, SLOTS))), n)


def streams(work: Work, n: int, plan: Plan) -> Entry:
    """So many slots of one model."""
    return Entry(opened(CALL, work, n), max(2 * AWAITERS, plan.count(work.seconds / n)), AWAITERS)


def models(work: Work, n: int, plan: Plan) -> Entry:
    """So many models."""
    return Entry(_models(work, n), max(2 * n, plan.count(work.seconds / n)), n)


def events(work: Work, n: int, plan: Plan) -> Entry:
    """So many events, all behind one launch, and a coroutine for each."""
    return Entry(_waves(work, n), max(4, plan.count(work.seconds) // max(1, n // 16)))


@asynccontextmanager
async def _models(work: Work, n: int) -> AsyncIterator[Sequence[Request]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(opened(CALL, work, 1)) for _ in range(n)]


@asynccontextmanager
async def _waves(work: Work, n: int) -> AsyncIterator[Request]:
    line = Line(work.device, work.function)
    marks = [work.device.event() for _ in range(n)]

    async def wave() -> None:
        line.submit()
        for mark in marks:
            line.stream.record(mark)
        await asyncio.gather(*(aiotrt.wait(mark) for mark in marks))

    # A model keeps the hub open meanwhile: else the last wait of a wave closes it, and the next one opens another.
    keeper: AbstractAsyncContextManager[Request] = opened(CALL, work, 1)
    async with keeper:
        yield wave
    line.close()


OF: Final[dict[str, Callable[[Work, int, Plan], Entry]]] = {
    "waiters": waiters,
    "events": events,
    "models": models,
    "streams": streams,
}


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """Against the cheapest of those before it, of the same axis and loop."""
    cheapest: dict[tuple[object, str], Row] = {}
    for row in sorted(rows, key=lambda row: row.setting["n"]):
        axis = row.setting["axis"], row.loop
        if (base := cheapest.get(axis)) is not None:
            times = row.cpu_seconds / base.cpu_seconds
            row.verdict = verdict([] if times <= BAR else [f"{times:.2f} times the CPU of {base.setting['n']}, not {BAR}"])
        if base is None or row.cpu_seconds < base.cpu_seconds:
            cheapest[axis] = row


SCALING: Final[Part] = Part(
    "scaling", "CPU for an await, by number of waiters, events, models and streams", scaling, judge, 180
)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["scaling", *sys.argv[1:]]))
