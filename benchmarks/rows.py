"""What every part of the suite gives: rows of several runs each, judged against the bars, within a bounded time."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

from benchmarks.measure import Heartbeat, Request, Spread, Usage, drive, loops, mean_of_known, median_of, pace, run_on

__all__ = ["MEETS", "Bench", "Entry", "Part", "Plan", "Row", "Run", "Turned", "measure", "measure_in_turns", "verdict"]

T = TypeVar("T")

MEETS: Final = "meets"
AGAIN: Final = 5  # requests at the beginning of a turn that do not count: who had the one before makes a difference to them
#: Turns of the loop after which all awaiters have made their first request. They make it in one turn, which with hundreds of
#: them is late by what they take themselves.
BEGINNING: Final = 2


@runtime_checkable
class Turned(Protocol):
    """A request that takes something to be so while it has its turn."""

    async def __call__(self) -> object:
        """The request."""
        ...

    def turn(self) -> AbstractContextManager[object]:
        """That."""
        ...


@dataclass(frozen=True)
class Run:
    """One run. Times in seconds.

    Attributes:
        latency: of an await, from the call to the resumed coroutine.
        rate: awaits a second.
        cpu: processor time over wall time, of all threads.
        others: cores that other programs used meanwhile.
        pace: what the same piece of Python took before and after it, on average; None where that was not measured.
    """

    latency: Spread
    rate: float
    cpu: float
    others: float | None
    pace: float | None = None


@dataclass
class Row:
    """One way to wait, in one setting: the summary of its runs. Times are in seconds.

    Attributes:
        setting: tells the row from the part's other rows: numbers and words, by name.
        device_seconds: the device's time for one request; None if unknown.
        ceiling: requests a second of the device when nothing waits; None if not measured.
        runs: how many there were.
        samples: awaits of the shortest run.
        latency: of an await; the median of each figure over the runs.
        rate: awaits a second, the median.
        cpu: processor time over wall time, the median.
        cpu_seconds: processor time for one await, the median.
        others: cores that other programs used meanwhile, the mean; None if unknown.
        lag: of the loop, from runs of their own, the median of each figure; None if not measured.
        spread: the least and the most over the runs of p50, p99, rate and cpu; of the p99 of the lag, if there were several
            runs for it; and of the pace, if it was measured.
        facts: what else the row says.
        verdict: "meets", "misses: ..." or, if there is no target, empty.
    """

    part: str
    loop: str
    way: str
    setting: Mapping[str, float | str]
    device_seconds: float | None
    ceiling: float | None
    runs: int
    samples: int
    latency: Spread
    rate: float
    cpu: float
    cpu_seconds: float
    others: float | None
    lag: Spread | None
    spread: dict[str, tuple[float, float]]
    facts: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""

    @property
    def overhead(self) -> Spread:
        """The latency less `device_seconds`."""
        less, latency = self.device_seconds or 0.0, self.latency
        return replace(latency, p50=latency.p50 - less, p99=latency.p99 - less, worst=latency.worst - less)

    @classmethod
    def measured(
        cls,
        part: str,
        loop: str,
        way: str,
        setting: Mapping[str, float | str],
        device_seconds: float | None,
        runs: Sequence[Run],
        *,
        ceiling: float | None = None,
        lags: Sequence[Spread] = (),
        facts: dict[str, Any] | None = None,
    ) -> Row:
        """Summarise runs.

        Args:
            part, loop, way, setting, device_seconds, ceiling, facts: as the attributes.
            runs: at least one.
            lags: of the loop, from runs of their own; none if not measured.
        """
        figures: dict[str, list[float]] = {
            "p50": [run.latency.p50 for run in runs],
            "p99": [run.latency.p99 for run in runs],
            "rate": [run.rate for run in runs],
            "cpu": [run.cpu for run in runs],
            "lag": [lag.p99 for lag in lags] if len(lags) > 1 else [],
            "pace": [run.pace for run in runs if run.pace is not None],
        }
        return cls(
            part, loop, way, setting, device_seconds, ceiling,
            runs=len(runs),
            samples=min(run.latency.count for run in runs),
            latency=median_of(run.latency for run in runs),
            rate=statistics.median(figures["rate"]),
            cpu=statistics.median(figures["cpu"]),
            cpu_seconds=statistics.median(run.cpu / run.rate for run in runs),
            others=mean_of_known(run.others for run in runs),
            lag=median_of(lags) if lags else None,
            spread={name: (min(values), max(values)) for name, values in figures.items() if values},
            facts=facts or {},
        )  # fmt: skip

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Row:
        """Make a row of a written one, without its verdict, which is computed again."""
        figures = {name.name: record[name.name] for name in fields(cls) if name.name != "verdict"}
        latency, lag = record["latency"], record["lag"]
        return cls(**{**figures, "latency": Spread(**latency), "lag": None if lag is None else Spread(**lag)})


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        runs: of each setting.
        seconds: of each run.
        least: requests of each run; of fewer than a hundred there is no 99th percentile.
        warm: requests before, which teach aiotrt how long the work takes, and bring clocks and caches up.
        lag: seconds of a run beside a heartbeat.
    """

    runs: int
    seconds: float
    least: int
    warm: int = 30
    lag: float = 0.25

    def count(self, expected: float, most: int = 20_000) -> int:
        """How many requests make one run, if each takes this long."""
        return max(self.least, min(most, round(self.seconds / expected)))


class Bench:
    """What a part is measured with.

    Args:
        device: "host" or "cuda".
        quick: one short run of each setting, to see that it works.
        limit: seconds after which no further setting is begun.
        tell: hears what is being measured.
        video: of the user's, for the parts that take frames; see `clips.clip`.
        weights: of RF-DETR-Seg-Nano; None for random ones.

    Attributes:
        loops: the event loops to run on.
        limit: see there.
        skipped: what cannot be measured here, and why.
        unreached: what was not come to in the time there was.
        failed: what raised, and what.
    """

    def __init__(
        self,
        device: str,
        *,
        quick: bool,
        limit: float,
        tell: Callable[[str], None],
        video: Path | None = None,
        weights: Path | None = None,
    ) -> None:
        self.device = device
        self.quick = quick
        self.tell = tell
        self.video = video
        self.weights = weights
        self.loops = tuple(loops())
        self.skipped: dict[str, str] = {}
        self.unreached: list[str] = []
        self.failed: dict[str, str] = {}
        self._setting = ""
        self.limit = limit
        self._deadline = time.monotonic() + limit

    def plan(self, *, seconds: float = 0.03, least: int = 30) -> Plan:
        """Five runs, or in a hurry one short one."""
        return Plan(1, 0.01, min(4, least), 4, 0.02) if self.quick else Plan(5, seconds, least)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._deadline

    def each(self, what: str, settings: Iterable[T]) -> Iterator[T]:
        """These settings one after the other, as long as there is time; the others are noted."""
        for setting in settings:
            words = setting if isinstance(setting, tuple) else (setting,)
            says = f"{what}: {', '.join(str(word) for word in words if isinstance(word, str | float | int))}"
            if self.is_over:
                self.unreached.append(says)
            else:
                self.tell(says)
                self._setting = says
                yield setting

    def run(self, loop: str, main: Coroutine[Any, Any, T]) -> T | None:
        """Run `main` to its end on a new loop of this name; None if it raised, which is noted: the other settings go on."""
        try:
            return run_on(loop, main)
        except Exception as error:
            self.fail(self._setting, error)
            return None

    def fail(self, what: str, error: Exception) -> None:
        """Note it."""
        self.failed[what] = "".join(traceback.format_exception(error)[-6:])

    @property
    def is_whole(self) -> bool:
        """Whether everything was come to, and nothing failed."""
        return not self.failed and not self.unreached


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        name: as on the command line.
        about: what it answers, in one line.
        rows: measures.
        judge: fills in the rows' verdicts, from them and from the idle loops' lags.
        limit: seconds that it has where nobody says otherwise.
    """

    name: str
    about: str
    rows: Callable[[Bench], Iterator[Row]]
    judge: Callable[[Sequence[Row], Mapping[str, Spread]], None]
    limit: float = 100.0


async def measure(
    request: Request | Sequence[Request], plan: Plan, *, awaiters: int, count: int, lags: int = 1
) -> tuple[list[Run], list[Spread]]:
    """Several runs in a row, after some requests that do not count.

    And `lags` more beside a heartbeat, which would cost the others what they are measured by.
    """
    with _turn(request):
        await drive(request, awaiters, _warm(awaiters, count, plan))
        gc.collect()
        runs = [await _run(request, awaiters, count) for _ in range(plan.runs)]
        return runs, [await _lag(request, awaiters, runs, plan) for _ in range(lags)]


@dataclass(frozen=True)
class Entry:
    """Who takes part in `measure_in_turns`.

    Attributes:
        opening: gives the request, or one for each awaiter; open until all have ended.
        count: requests of each run.
        awaiters: how many there are.
    """

    opening: AbstractAsyncContextManager[Request | Sequence[Request]]
    count: int
    awaiters: int = 1


async def measure_in_turns(
    entries: Mapping[str, Entry], plan: Plan, failed: Callable[[str, Exception], None]
) -> dict[str, tuple[list[Run], list[Spread]]]:
    """Several runs of each entry, as `measure` makes them; `failed` hears of those that raise.

    They take turns, a run each: the host's processors are slow for seconds at a time, and then they are so to all.
    """
    async with AsyncExitStack() as stack:
        requests: dict[str, Request | Sequence[Request]] = {}
        runs: dict[str, list[Run]] = {}
        lags: dict[str, list[Spread]] = {}

        async def turn(name: str, step: Callable[[str, Entry], Coroutine[Any, Any, None]]) -> None:
            try:
                with _turn(requests[name]):
                    await step(name, entries[name])
            except Exception as error:
                del requests[name]
                failed(name, error)

        async def warmed(name: str, entry: Entry) -> None:
            await drive(requests[name], entry.awaiters, _warm(entry.awaiters, entry.count, plan))

        async def run(name: str, entry: Entry) -> None:
            await drive(requests[name], entry.awaiters, max(entry.awaiters, min(plan.warm, AGAIN)))
            runs.setdefault(name, []).append(await _run(requests[name], entry.awaiters, entry.count))

        async def lagged(name: str, entry: Entry) -> None:
            lags[name] = [await _lag(requests[name], entry.awaiters, runs[name], plan)]

        for name, entry in entries.items():
            try:
                requests[name] = await stack.enter_async_context(entry.opening)
            except Exception as error:
                failed(name, error)
        for step in (warmed, *(run for _ in range(plan.runs)), lagged):
            gc.collect()
            for name in list(requests):
                await turn(name, step)
        return {name: (runs[name], lags[name]) for name in requests}


def _warm(awaiters: int, count: int, plan: Plan) -> int:
    return min(count, 8 * plan.warm) if awaiters > 1 else plan.warm


def _turn(request: Request | Sequence[Request]) -> AbstractContextManager[object]:
    return request.turn() if isinstance(request, Turned) else nullcontext()


async def _run(request: Request | Sequence[Request], awaiters: int, count: int) -> Run:
    before = pace()
    with Usage() as usage:
        seconds = await drive(request, awaiters, count)
    return Run(Spread.of(seconds), len(seconds) / usage.seconds, usage.cpu, usage.others, (before + pace()) / 2)


async def _lag(request: Request | Sequence[Request], awaiters: int, runs: Sequence[Run], plan: Plan) -> Spread:
    """The loop has its turn after each request, as it has in a program: else one that blocks would be late once, by all."""
    count = round(plan.lag * statistics.median(run.rate for run in runs))
    driving = asyncio.create_task(drive(request, awaiters, max(awaiters, count), yielding=True))
    for _ in range(BEGINNING):
        await asyncio.sleep(0)
    async with Heartbeat() as heartbeat:
        await driving
    return heartbeat.spread


def verdict(misses: Sequence[str]) -> str:
    """What a row with a bar says."""
    return "misses: " + "; ".join(misses) if misses else MEETS
