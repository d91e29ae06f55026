"""What every part of the suite gives: rows of several runs each, judged against the bars, within a bounded time."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, TypeVar

from benchmarks.measure import Heartbeat, Request, Spread, Usage, drive, loops, median_of, run_on

__all__ = ["MEETS", "Bench", "Part", "Plan", "Row", "Run", "measure", "verdict"]

T = TypeVar("T")

MEETS: Final = "meets"


@dataclass(frozen=True)
class Run:
    """One run. Times in seconds.

    Attributes:
        latency: of an await, from the call to the resumed coroutine.
        rate: awaits a second.
        cpu: processor time over wall time, of all threads.
        others: cores that other programs used meanwhile.
    """

    latency: Spread
    rate: float
    cpu: float
    others: float | None


@dataclass
class Row:
    """One way to wait, in one setting: its runs, and the median of each of their figures.

    Attributes:
        setting: what tells it from the part's other rows: numbers and words, by name.
        device_seconds: what the device takes for one; None where that is not known.
        ceiling: what the device does a second when nobody waits; None where that was not measured.
        lag: of the loop, from a run of its own; None where that was not measured.
        facts: what else there is to say.
        verdict: "meets", "misses: ..." or, where there is no bar, empty.
        overhead: the latency less `device_seconds`.
        cpu_seconds: processor time for one await.
        spread: the least and the most of each figure over the runs.
    """

    part: str
    loop: str
    way: str
    setting: Mapping[str, float | str]
    device_seconds: float | None
    runs: Sequence[Run]
    ceiling: float | None = None
    lag: Spread | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""
    latency: Spread = field(init=False)
    overhead: Spread = field(init=False)
    rate: float = field(init=False)
    cpu: float = field(init=False)
    cpu_seconds: float = field(init=False)
    spread: dict[str, tuple[float, float]] = field(init=False)

    def __post_init__(self) -> None:
        less = self.device_seconds or 0.0
        latency = self.latency = median_of(run.latency for run in self.runs)
        self.overhead = replace(latency, p50=latency.p50 - less, p99=latency.p99 - less, worst=latency.worst - less)
        self.rate = statistics.median(run.rate for run in self.runs)
        self.cpu = statistics.median(run.cpu for run in self.runs)
        self.cpu_seconds = statistics.median(run.cpu / run.rate for run in self.runs)
        figures: dict[str, list[float]] = {
            "p50": [run.latency.p50 for run in self.runs],
            "p99": [run.latency.p99 for run in self.runs],
            "rate": [run.rate for run in self.runs],
            "cpu": [run.cpu for run in self.runs],
        }
        self.spread = {name: (min(values), max(values)) for name, values in figures.items()}


@dataclass(frozen=True)
class Plan:
    """How much to measure: runs of each setting, seconds of each run, and requests at the least."""

    runs: int
    seconds: float
    least: int

    def count(self, expected: float) -> int:
        """How many requests make one run, if each takes this long."""
        return max(self.least, min(20_000, round(self.seconds / expected)))


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
        skipped: what was not measured, and why.
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
        self.failed: dict[str, str] = {}
        self._setting = ""
        self.limit = limit
        self._deadline = time.monotonic() + limit

    def plan(self, *, seconds: float = 0.03, least: int = 30) -> Plan:
        """Five runs, or in a hurry one short one."""
        return Plan(1, 0.01, min(4, least)) if self.quick else Plan(5, seconds, least)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self._deadline

    def each(self, what: str, settings: Iterable[T]) -> Iterator[T]:
        """These settings one after the other, as long as there is time; the others are noted as skipped."""
        for setting in settings:
            words = setting if isinstance(setting, tuple) else (setting,)
            says = f"{what}: {', '.join(map(str, words))}"
            if self.is_over:
                self.skipped[says] = f"the {self.limit:.0f} s were up"
            else:
                self.tell(says)
                self._setting = says
                yield setting

    def run(self, loop: str, main: Coroutine[Any, Any, T]) -> T | None:
        """Run `main` to its end on a new loop of this name; None if it raised, which is noted: the other settings go on."""
        try:
            return run_on(loop, main)
        except Exception as error:
            self.failed[self._setting] = "".join(traceback.format_exception(error)[-6:])
            return None


@dataclass(frozen=True)
class Part:
    """A part of the suite.

    Attributes:
        name: as on the command line.
        about: what it answers, in one line.
        rows: measures.
        judge: fills in the rows' verdicts.
        devices: where it can run.
    """

    name: str
    about: str
    rows: Callable[[Bench], Iterator[Row]]
    judge: Callable[[Sequence[Row], Mapping[str, Spread]], None]
    devices: tuple[str, ...] = ("host", "cuda")


async def measure(
    request: Request | Sequence[Request], plan: Plan, *, awaiters: int, count: int, lag: float = 1.0
) -> tuple[list[Run], Spread | None]:
    """Several runs in a row, after one that does not count: it warms caches, and teaches aiotrt how long the work takes.

    And the loop's lag in one more, `lag` times as long, since the heartbeat would cost the others what they are measured by.
    """
    await drive(request, awaiters, min(count, 256))
    runs = []
    gc.collect()
    for _ in range(plan.runs):
        with Usage() as usage:
            seconds = await drive(request, awaiters, count)
        runs.append(Run(Spread.of(seconds), len(seconds) / usage.seconds, usage.cpu, usage.others))
    if not lag:
        return runs, None
    async with Heartbeat() as heartbeat:
        await drive(request, awaiters, max(awaiters, round(lag * count)))
    return runs, heartbeat.spread


def verdict(misses: Sequence[str]) -> str:
    """What a row with a bar says."""
    return "misses: " + "; ".join(misses) if misses else MEETS
