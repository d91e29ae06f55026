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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, Final

import aiotrt
from benchmarks.measure import Request, Spread
from benchmarks.rows import Bench, Part, Plan, Row, Run, measure, verdict
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
    """All axes."""
    work = Work(bench.device, NOMINAL[bench.device])
    plan = bench.plan(seconds=0.05, least=32)
    axes = QUICK_AXES if bench.quick else AXES
    settings = [(axis, n, loop) for axis, numbers in axes.items() for n in numbers for loop in bench.loops]
    for axis, n, loop in bench.each("scaling", settings):
        way = "aiotrt.wait" if axis == "events" else CALL
        measured = bench.run(loop, OF[axis](work, n, plan))
        if measured is not None:
            yield Row("scaling", loop, way, {"axis": axis, "n": n}, work.seconds, measured[0], lags=measured[1])


async def waiters(work: Work, n: int, plan: Plan) -> tuple[list[Run], list[Spread]]:
    """So many callers of one model."""
    async with opened(CALL, work, SLOTS) as request:
        return await measure(request, plan, awaiters=n, count=max(2 * n, plan.count(work.seconds / min(n, SLOTS))))


async def streams(work: Work, n: int, plan: Plan) -> tuple[list[Run], list[Spread]]:
    """So many slots of one model."""
    async with opened(CALL, work, n) as request:
        return await measure(request, plan, awaiters=AWAITERS, count=max(2 * AWAITERS, plan.count(work.seconds / n)))


async def models(work: Work, n: int, plan: Plan) -> tuple[list[Run], list[Spread]]:
    """So many models."""
    async with AsyncExitStack() as stack:
        requests = [await stack.enter_async_context(opened(CALL, work, 1)) for _ in range(n)]
        return await measure(requests, plan, awaiters=n, count=max(2 * n, plan.count(work.seconds / n)))


async def events(work: Work, n: int, plan: Plan) -> tuple[list[Run], list[Spread]]:
    """So many events, all behind one launch, and a coroutine for each; the rate is of waits."""
    async with _waves(work, n) as request:
        runs, lags = await measure(request, plan, awaiters=1, count=max(4, plan.count(work.seconds) // max(1, n // 16)))
    return [replace(run, rate=n * run.rate) for run in runs], lags


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


OF: Final[dict[str, Callable[[Work, int, Plan], Coroutine[Any, Any, tuple[list[Run], list[Spread]]]]]] = {
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
