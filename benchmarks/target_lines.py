"""The targets, and how a run is judged by them: one line for each setting and loop, from rows of that run alone.

CPU is processor time for one await, of all threads, so that a slower way is not excused by its lower rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.bench_host_input import LOOP
from benchmarks.rows import Row
from benchmarks.waits import (
    CALL,
    EXECUTOR,
    LEASE,
    PROTOTYPE_CALL,
    PROTOTYPE_CALL_COMPILED,
    PROTOTYPE_LEASE,
    PROTOTYPE_LEASE_COMPILED,
    SLEEP_0,
)

__all__ = ["GROUPS", "NATIVE", "ONE", "PYTHON", "TO_THREAD", "TargetLine", "lines_of", "prototypes_of"]

#: The groups of lines, as on the command line.
GROUPS: Final = ("call", "lease", "throughput", "host", "lag", "waiters", "threads")
ONE: Final = "one"  # the part of the rows of both `call` and `lease`
TO_THREAD: Final = "asyncio.to_thread"

#: Values of `aiotrt.__impl__`.
PYTHON: Final = "python"
NATIVE: Final = "native"

SHORT: Final = 200  # us: the longest of the short lengths
#: One awaiter, short lengths: p50 over the prototype's in us, and CPU as a multiple of it, by build.
SHORT_OVER: Final = {("call", PYTHON): 7.0, ("lease", PYTHON): 4.0, ("call", NATIVE): 5.0, ("lease", NATIVE): 3.0}
SHORT_CPU: Final = {NATIVE: 1.25}
#: The same for 1 and 5 ms, in both builds.
LONG_OVER: Final = {"call": 15.0, "lease": 8.0}
LONG_CPU: Final = 1.3
#: From this length on, in us, the CPU is below the sleep(0) loop's.
BELOW_SLEEP_0: Final = 100
#: 64 awaiters: share of the prototype's rate, its CPU from this length on, and share of the sleep(0) loop's rate.
RATE: Final = 0.85
MANY_CPU: Final = (200, 1.3)
SLEEP_0_RATE: Final = 0.97
#: Host input: one awaiter, us over the blocking loop's p50, up to this size; many awaiters, multiples of its rate.
HOST_OVER: Final = (10.0, 1 << 20)
HOST_RATES: Final = {16 << 10: 0.95, 256 << 10: 0.95, 1 << 20: 1.3, 6 << 20: 2.0}
#: Lag: us over the idle loop's p99.
LAG: Final = 200.0
#: Waiters: CPU for an await, as a multiple of the cheapest row with fewer waiters.
FLAT: Final = 1.2
#: A function on the host device that does nothing: CPU of the loop's thread, as a multiple of `asyncio.to_thread`'s.
THREADS: Final = {1: 1.0, 16: 1.5}


@dataclass(frozen=True)
class TargetLine:
    """One target in one setting.

    Attributes:
        group: one of GROUPS.
        what: the setting and the figure.
        loop: the event loop.
        measured: the figure.
        target: its limit.
        unit: of both: "us", "times" or "of".
        at_least: whether the target is a lower limit.
        unknown: why nothing follows from the figure; empty if something does.
    """

    group: str
    what: str
    loop: str
    measured: float
    target: float
    unit: str
    at_least: bool = False
    unknown: str = ""

    @property
    def miss(self) -> float:
        """By how much the target is missed; 0.0 or less if it is met."""
        return self.target - self.measured if self.at_least else self.measured - self.target

    @property
    def verdict(self) -> str:
        if self.unknown:
            return f"unknown: {self.unknown}"
        return "meets" if self.miss <= 0 else f"misses by {_figure(self.miss, self.unit)}"

    @property
    def goal(self) -> str:
        """The target in words."""
        return f"{'>=' if self.at_least else '<='} {_figure(self.target, self.unit)}"

    @property
    def figure(self) -> str:
        """The measured figure in words."""
        return _figure(self.measured, self.unit)


def prototypes_of(implementation: str) -> tuple[str, str]:
    """The prototype's ways, a call and a lease, that a build of aiotrt is compared with."""
    if implementation == NATIVE:
        return PROTOTYPE_CALL_COMPILED, PROTOTYPE_LEASE_COMPILED
    return PROTOTYPE_CALL, PROTOTYPE_LEASE


def lines_of(rows: Sequence[Row], implementation: str) -> list[TargetLine]:
    """Judge the rows of one run.

    What cannot be compared, because the row beside it is missing, has no line.

    Args:
        rows: of the run.
        implementation: PYTHON or NATIVE: which build of aiotrt it was.
    """
    lines: list[TargetLine] = []
    for (part, loop, _), beside in _settings(rows).items():
        if part == ONE:
            for kind, way in (("call", CALL), ("lease", LEASE)):
                if way in beside:
                    lines += _one(kind, beside[way], beside, implementation)
        elif part == "throughput" and CALL in beside:
            lines += _many(beside[CALL], beside, implementation)
        elif part == "host" and {CALL, LOOP} <= beside.keys():
            lines += _host(beside[CALL], beside[LOOP])
        elif part == "lag" and CALL in beside:
            lines += _lag(beside[CALL])
        elif part == "threads" and {CALL, TO_THREAD} <= beside.keys():
            callers = int(beside[CALL].setting["callers"])
            times = _loop_cpu(beside[CALL]) / _loop_cpu(beside[TO_THREAD])
            what = f"nothing, {callers} callers: loop's CPU, times to_thread's"
            lines.append(TargetLine("threads", what, loop, times, THREADS[callers], "times"))
    for loop in dict.fromkeys(row.loop for row in rows):
        lines += _waiters([row for row in rows if (row.part, row.loop) == ("waiters", loop)])
    return sorted(lines, key=lambda line: GROUPS.index(line.group))


def _settings(rows: Sequence[Row]) -> Mapping[tuple[str, str, str], Mapping[str, Row]]:
    """The rows by way, by part, loop and setting."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row.part, row.loop, str(row.setting)), {})[row.way] = row
    return found


def _one(kind: str, row: Row, beside: Mapping[str, Row], implementation: str) -> Iterator[TargetLine]:
    length = int(row.setting["us"])
    is_short = length <= SHORT

    def line(what: str, measured: float, target: float, unit: str) -> TargetLine:
        return TargetLine(kind, f"{kind}, {length:,} us: {what}", row.loop, measured, target, unit)

    call, lease = prototypes_of(implementation)
    if prototype := beside.get(call if kind == "call" else lease):
        over = SHORT_OVER[kind, implementation] if is_short else LONG_OVER[kind]
        yield line("p50 over the prototype's", _p50_over(row, prototype), over, "us")
        cpu = SHORT_CPU.get(implementation) if is_short else LONG_CPU
        if cpu is not None:
            yield line("CPU, times the prototype's", row.cpu_seconds / prototype.cpu_seconds, cpu, "times")
    if thread := beside.get(EXECUTOR):
        yield line("p50 over the executor's", _p50_over(row, thread), 0.0, "us")
        yield line("p99 over the executor's", 1e6 * (row.latency.p99 - thread.latency.p99), 0.0, "us")
        yield line("CPU, times the executor's", row.cpu_seconds / thread.cpu_seconds, 1.0, "times")
    if (asking := beside.get(SLEEP_0)) and length >= BELOW_SLEEP_0:
        yield line("CPU, times the sleep(0) loop's", row.cpu_seconds / asking.cpu_seconds, 1.0, "times")


def _many(row: Row, beside: Mapping[str, Row], implementation: str) -> Iterator[TargetLine]:
    length, slots = int(row.setting["us"]), int(row.setting["slots"])

    def line(what: str, measured: float, target: float, unit: str = "times", *, at_least: bool = False) -> TargetLine:
        says = f"{row.setting['awaiters']} awaiters, {slots} slots, {length:,} us: {what}"
        return TargetLine("throughput", says, row.loop, measured, target, unit, at_least)

    if prototype := beside.get(prototypes_of(implementation)[0]):
        yield line("rate, of the prototype's", row.rate / prototype.rate, RATE, "of", at_least=True)
        if length >= MANY_CPU[0]:
            yield line("CPU, times the prototype's", row.cpu_seconds / prototype.cpu_seconds, MANY_CPU[1])
    if thread := beside.get(EXECUTOR):
        yield line("p50 over the executor's", _p50_over(row, thread), 0.0, "us")
        yield line("CPU, times the executor's", row.cpu_seconds / thread.cpu_seconds, 1.0)
    if (asking := beside.get(SLEEP_0)) and length >= BELOW_SLEEP_0:
        yield line("CPU, times the sleep(0) loop's", row.cpu_seconds / asking.cpu_seconds, 1.0)
        yield line("rate, of the sleep(0) loop's", row.rate / asking.rate, SLEEP_0_RATE, "of", at_least=True)


def _host(row: Row, loop: Row) -> Iterator[TargetLine]:
    size, slots = int(row.setting["bytes"]), int(row.setting["slots"])
    says = f"host input, {size // 1024:,} KiB, {slots} slots"
    if slots == 1 and size <= HOST_OVER[1]:
        yield TargetLine("host", f"{says}: p50 over the blocking loop's", row.loop, _p50_over(row, loop), HOST_OVER[0], "us")
    elif slots > 1 and size in HOST_RATES:
        what = f"{says}: rate, of the blocking loop's"
        yield TargetLine("host", what, row.loop, row.rate / loop.rate, HOST_RATES[size], "of", at_least=True)


def _lag(row: Row) -> Iterator[TargetLine]:
    if row.lag is None:
        return
    idle = 1e6 * float(row.facts["idle_lag"]["p99"])
    unknown = f"the idle loop was {idle:.0f} us late itself" if idle > LAG else ""
    what = f"lag, {row.setting['awaiters']} awaiters, {row.setting['us']:,} us: p99 over the idle loop's"
    yield TargetLine("lag", what, row.loop, 1e6 * row.lag.p99 - idle, LAG, "us", unknown=unknown)


def _waiters(rows: Sequence[Row]) -> Iterator[TargetLine]:
    """The worst of all numbers of waiters."""
    least, worst, at = float("inf"), 0.0, 0
    for row in sorted(rows, key=lambda row: row.setting["n"]):
        if least < float("inf") and row.cpu_seconds / least > worst:
            worst, at = row.cpu_seconds / least, int(row.setting["n"])
        least = min(least, row.cpu_seconds)
    if at:
        most = max(int(row.setting["n"]) for row in rows)
        what = f"1 to {most:,} waiters: CPU, times the least with fewer"
        yield TargetLine("waiters", what, rows[0].loop, worst, FLAT, "times")


def _p50_over(row: Row, other: Row) -> float:
    return 1e6 * (row.latency.p50 - other.latency.p50)


def _loop_cpu(row: Row) -> float:
    return float(row.facts["loop_cpu"])


def _figure(value: float, unit: str) -> str:
    return f"{value:,.1f} us" if unit == "us" else f"{value:.2f}"
