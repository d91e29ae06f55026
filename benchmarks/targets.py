"""The project's targets, measured and judged in one run: does aiotrt meet them?

    python -m benchmarks targets [--quick] [--device auto|host|cuda] [--only GROUP...] [--loop LOOP] [--out DIR]

Groups of lines: `call` and `lease` (one awaiter, 20 us to 5 ms of work), `throughput` (64 awaiters), `host` (pageable host
input), `lag` (of a saturated loop), `waiters` (1 to 1,024) and `threads` (a function that does nothing, on the host device,
against `asyncio.to_thread`). All ways of one setting take turns, a run each, and a line compares rows of one setting only.
The prototype is measured in the build of aiotrt that runs. On the host device only `threads` has targets; the other groups
run there if they are named, to see that they work.

A way that fails is reported and left out. The result is `targets-<device>.json`, or `targets-<device>-partial.json` if
something was left out.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch

import aiotrt
from benchmarks import bench_host_input as host_input
from benchmarks import bench_scaling as scaling
from benchmarks import tables
from benchmarks.measure import (
    HEARTBEAT,
    PARTIAL,
    RESULTS,
    Request,
    Spread,
    Usage,
    as_record,
    drive,
    finish,
    idle_lag,
    loops,
    median_of,
    write,
)
from benchmarks.rows import Bench, Entry, Plan, Row, Run, measure, measure_in_turns
from benchmarks.stored import packed
from benchmarks.suite import INTERRUPTED, Teller, seconds_of, unwritable
from benchmarks.target_lines import GROUPS, NATIVE, ONE, PYTHON, TO_THREAD, TargetLine, lines_of, prototypes_of
from benchmarks.waits import CALL, EXECUTOR, FLOOR, LEASE, SLEEP_0, Work, opened, unavailable

__all__ = ["compact", "figures_of", "implementation", "main", "results_of"]

#: Settings on CUDA, and on the host device, whose sleeps cannot be as short.
LENGTHS: Final = {"cuda": (20, 50, 100, 200, 1000, 5000), "host": (1000,)}
MANY: Final = {"cuda": ((50, 2), (50, 4), (200, 4), (1000, 4)), "host": ((1000, 4),)}
SIZES: Final = {"cuda": (16 << 10, 64 << 10, 256 << 10, 1 << 20, 6 << 20), "host": (16 << 10,)}
SATURATED: Final = {"cuda": (20, 50, 200, 1000), "host": (1000,)}
WAITERS: Final = {"cuda": (1, 4, 16, 64, 256, 1024), "host": (1, 16)}
CALLERS: Final = (1, 16)
AWAITERS: Final = 64
SLOTS: Final = 4
LIMIT: Final = 480.0  # seconds after which no setting is begun
MOST: Final = 4000  # requests of a run
DIGITS: Final = 5  # significant digits of a stored figure
NOTHING_CALLS: Final = 400  # of a run on the host device


class Settings:
    """What one run of the targets measures.

    Attributes:
        bench: device, loops, time limit, failures.
        plan: runs of each way, and their length.
        prototypes: the prototype's ways that are measured: a call and a lease, or none.
        kinds: "call", "lease" or both.
        most: requests of a run, at most.
    """

    def __init__(self, bench: Bench, plan: Plan, only: Sequence[str], prototypes: Sequence[str], most: int) -> None:
        self.bench = bench
        self.plan = plan
        self.only = only
        self.prototypes = tuple(prototypes)
        self.kinds = [kind for kind in ("call", "lease") if kind in only]
        self.most = most
        self._works: dict[float, Work] = {}

    def work(self, seconds: float) -> Work:
        """Work of this length, measured once."""
        if seconds not in self._works:
            self._works[seconds] = Work(self.bench.device, seconds)
        return self._works[seconds]

    def count(self, expected: float, awaiters: int = 1) -> int:
        """Requests of a run, if each takes this long."""
        return min(self.most, max(2 * awaiters if awaiters > 1 else 1, self.plan.count(expected, MOST)))

    def in_turns(
        self, part: str, says: str, loop: str, entries: Mapping[str, Entry]
    ) -> Mapping[str, tuple[list[Run], list[Spread]]]:
        """Measure these ways in turns; what fails is noted."""

        def failed(way: str, error: Exception) -> None:
            self.bench.fail(f"{part}: {says}, {loop}, {way}", error)

        # No run beside a heartbeat: lag has rows of its own.
        return self.bench.run(loop, measure_in_turns(entries, replace(self.plan, lag=0.0), failed)) or {}


def one_awaiter(settings: Settings) -> Iterator[Row]:
    """One awaiter, input on the device."""
    bench = settings.bench
    call, lease = ([way] for way in settings.prototypes) if settings.prototypes else ([], [])
    ways = [FLOOR, EXECUTOR, SLEEP_0]
    ways += [CALL, *call] if "call" in settings.kinds else []
    ways += [LEASE, *lease] if "lease" in settings.kinds else []
    for length in bench.each("one awaiter, us", LENGTHS[bench.device]):
        work = settings.work(length / 1e6)
        for loop in bench.loops:
            entries = {way: Entry(opened(way, work, 1), settings.count(work.seconds)) for way in ways}
            for way, (runs, _) in settings.in_turns(ONE, f"{length} us", loop, entries).items():
                yield Row.measured(ONE, loop, way, {"us": length}, work.seconds, runs)


def throughput(settings: Settings) -> Iterator[Row]:
    """Many awaiters."""
    bench = settings.bench
    ways = [EXECUTOR, SLEEP_0, CALL, *settings.prototypes[:1]]
    for length, slots in bench.each("throughput, us and slots", MANY[bench.device]):
        work = settings.work(length / 1e6)
        count = settings.count(work.seconds / slots, AWAITERS)
        setting: dict[str, float | str] = {"us": length, "slots": slots, "awaiters": AWAITERS}
        for loop in bench.loops:
            entries = {way: Entry(opened(way, work, slots), count, AWAITERS) for way in ways}
            measured = settings.in_turns("throughput", f"{length} us, {slots} slots", loop, entries)
            for way, (runs, _) in measured.items():
                yield Row.measured("throughput", loop, way, setting, work.seconds, runs)


def host(settings: Settings) -> Iterator[Row]:
    """Pageable host input, against a blocking loop with the same copies."""
    bench = settings.bench
    work = settings.work(host_input.NOMINAL[bench.device])
    wanted = [(size, slots) for size in SIZES[bench.device] for slots in (1, SLOTS)]
    for size, slots in bench.each("host input, bytes and slots", wanted):
        x = torch.zeros(size, dtype=torch.uint8)
        setting: dict[str, float | str] = {"bytes": size, "slots": slots}
        expected = work.seconds / slots + size / 8e9
        for loop in bench.loops:
            awaiters = 1 if slots == 1 else AWAITERS
            entries = {
                host_input.LOOP: Entry(host_input.blocking(work, x, slots), settings.count(expected)),
                CALL: Entry(host_input.opened(work, x, slots), settings.count(expected, awaiters), awaiters),
            }
            for way, (runs, _) in settings.in_turns("host", f"{size} bytes, {slots} slots", loop, entries).items():
                yield Row.measured("host", loop, way, setting, work.seconds, runs)


def lag(settings: Settings) -> Iterator[Row]:
    """How late a saturated loop runs, against the idle loop, in turns."""
    bench, plan = settings.bench, settings.plan
    rounds = max(2, plan.runs // 2)
    for length in bench.each("lag, us", SATURATED[bench.device]):
        work = settings.work(length / 1e6)
        count = settings.count(work.seconds / SLOTS, AWAITERS)

        async def measured(work: Work = work, count: int = count) -> tuple[list[Run], list[Spread], list[Spread]]:
            runs, busy, idle = [], [], []
            once = replace(plan, runs=1)
            async with opened(CALL, work, SLOTS) as request:
                for _ in range(rounds):
                    idle.append(await idle_lag(max(plan.lag, 0.05)))
                    more, lags = await measure(request, once, awaiters=AWAITERS, count=count)
                    runs += more
                    busy += lags
            return runs, busy, idle

        for loop in bench.loops:
            found = bench.run(loop, measured())
            if found is not None:
                runs, busy, idle = found
                facts = {"idle_lag": asdict(median_of(idle))}
                setting: dict[str, float | str] = {"us": length, "slots": SLOTS, "awaiters": AWAITERS}
                yield Row.measured("lag", loop, CALL, setting, work.seconds, runs, lags=busy, facts=facts)


def waiters(settings: Settings) -> Iterator[Row]:
    """CPU for an await, by the number of waiters."""
    bench, plan = settings.bench, settings.plan
    work = settings.work(scaling.NOMINAL[bench.device])
    for loop in bench.each("waiters", bench.loops):
        entries = {str(n): scaling.waiters(work, n, plan) for n in WAITERS[bench.device]}
        entries = {n: replace(entry, count=min(settings.most, entry.count)) for n, entry in entries.items()}
        for n, (runs, _) in settings.in_turns("waiters", "all", loop, entries).items():
            yield Row.measured("waiters", loop, CALL, {"n": int(n)}, work.seconds, runs)


def threads(settings: Settings) -> Iterator[Row]:
    """A function that does nothing, on the host device: CPU of the loop's thread for a call."""
    bench, plan = settings.bench, settings.plan
    count = min(settings.most, NOTHING_CALLS)
    for callers, loop in bench.each("threads, callers", [(callers, loop) for callers in CALLERS for loop in bench.loops]):
        found = bench.run(loop, _nothing(callers, plan.runs, max(callers, count)))
        for way, (runs, seconds) in (found or {}).items():
            facts = {"loop_cpu": median(seconds), "loop_cpu_range": (min(seconds), max(seconds))}
            yield Row.measured("threads", loop, way, {"callers": callers}, None, runs, facts=facts)


def nothing(x: torch.Tensor) -> torch.Tensor:
    """The function."""
    return x


async def _nothing(callers: int, rounds: int, count: int) -> dict[str, tuple[list[Run], list[float]]]:
    """Of each way: the runs, and the seconds of the loop's thread for a call in each."""
    x = torch.zeros(64)
    found: dict[str, tuple[list[Run], list[float]]] = {CALL: ([], []), TO_THREAD: ([], [])}
    async with AsyncExitStack() as stack:
        model = await stack.enter_async_context(aiotrt.load(nothing, device="host", warmup=[x]))
        requests: dict[str, Request] = {CALL: lambda: model(x), TO_THREAD: lambda: asyncio.to_thread(nothing, x)}
        for request in requests.values():
            await drive(request, callers, max(callers, count // 4))
        for _ in range(rounds):
            for way, request in requests.items():
                with Usage() as usage:
                    before = time.thread_time()
                    taken = await drive(request, callers, count)
                    seconds = (time.thread_time() - before) / len(taken)
                runs, own = found[way]
                runs.append(Run(Spread.of(taken), len(taken) / usage.seconds, usage.cpu, usage.others))
                own.append(seconds)
    return found


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


_MEASURED: Final[Mapping[str, Callable[[Settings], Iterator[Row]]]] = {
    "throughput": throughput,
    "host": host,
    "lag": lag,
    "waiters": waiters,
    "threads": threads,
}


def implementation() -> str:
    """Which build of aiotrt runs."""
    return str(getattr(aiotrt, "__impl__", PYTHON))


def compact(row: Row) -> dict[str, Any]:
    """A row as it is stored: medians, the runs' spread, and no more digits than it is worth."""
    latency, idle = row.latency, row.facts.get("idle_lag")
    figures: dict[str, float | None] = {
        "device_us": None if row.device_seconds is None else 1e6 * row.device_seconds,
        "p50_us": 1e6 * latency.p50,
        "p99_us": 1e6 * latency.p99,
        "rate": row.rate,
        "cpu": row.cpu,
        "cpu_us": 1e6 * row.cpu_seconds,
        "lag_p99_us": None if row.lag is None else 1e6 * row.lag.p99,
        "idle_lag_p99_us": None if idle is None else 1e6 * idle["p99"],
        "loop_cpu_us": 1e6 * row.facts["loop_cpu"] if "loop_cpu" in row.facts else None,
    }
    spreads = {"p50_range_us": (1e6, "p50"), "rate_range": (1.0, "rate"), "cpu_range": (1.0, "cpu")}
    return {
        "part": row.part,
        "loop": row.loop,
        "way": row.way,
        "setting": ", ".join(f"{name} {value}" for name, value in row.setting.items()),
        "runs": row.runs,
        "samples": row.samples,
        **{name: None if value is None else _digits(value) for name, value in figures.items()},
        **{name: [_digits(scale * end) for end in row.spread[key]] for name, (scale, key) in spreads.items()},
    }


def as_stored(line: TargetLine) -> dict[str, Any]:
    """A line as it is stored."""
    return {
        "group": line.group,
        "loop": line.loop,
        "what": line.what,
        "measured": _digits(line.measured),
        "target": line.goal,
        "verdict": line.verdict,
    }


def results_of(
    settings: Settings, build: str, rows: Sequence[Row], lines: Sequence[TargetLine], seconds: float
) -> dict[str, Any]:
    """The contents of the result file."""
    bench = settings.bench
    return {
        "device": bench.device,
        "quick": bench.quick,
        "implementation": build,
        "only": list(settings.only),
        "loops": list(bench.loops),
        "limit": bench.limit,
        "seconds": seconds,
        "heartbeat": HEARTBEAT,
        "skipped": bench.skipped,
        "unreached": bench.unreached,
        "failed": {what: how[-600:] for what, how in list(bench.failed.items())[:20]},
        "met": sum(line.verdict == "meets" for line in lines),
        "judged": sum(not line.unknown for line in lines),
        "lines": packed([as_stored(line) for line in lines]),
        "figures": packed([compact(row) for row in rows]),
    }


def figures_of(rows: Sequence[Row]) -> list[tables.Table]:
    """The figures behind the lines."""
    made = [
        _figures(
            f"{loop}: one awaiter, us over the device's own time, p50 / p99 (share of a core)",
            [row for row in rows if (row.part, row.loop) == (ONE, loop)],
            lambda row: f"{int(row.setting['us']):,} us",
            lambda row: f"{1e6 * row.overhead.p50:,.1f} / {1e6 * row.overhead.p99:,.0f} ({row.cpu:.0%})",
        )
        for loop in dict.fromkeys(row.loop for row in rows)
    ]
    made += [
        _figures(
            f"{loop}: {AWAITERS} awaiters, awaits a second (share of a core)",
            [row for row in rows if (row.part, row.loop) == ("throughput", loop)],
            lambda row: f"{int(row.setting['us']):,} us, {row.setting['slots']} slots",
            lambda row: f"{row.rate:,.0f} ({row.cpu:.0%})",
        )
        for loop in dict.fromkeys(row.loop for row in rows)
    ]
    made += [
        _figures(
            f"{loop}: a function that does nothing on the host device, us of the loop's thread for a call",
            [row for row in rows if (row.part, row.loop) == ("threads", loop)],
            lambda row: f"{row.setting['callers']} callers",
            lambda row: f"{1e6 * row.facts['loop_cpu']:,.1f}",
        )
        for loop in dict.fromkeys(row.loop for row in rows)
    ]
    return [table for table in made if table.rows]


def _figures(
    title: str, rows: Sequence[Row], column_of: Callable[[Row], str], cell_of: Callable[[Row], str]
) -> tables.Table:
    columns = list(dict.fromkeys(map(column_of, rows)))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row.way, {})[column_of(row)] = cell_of(row)
    lines = [[way, *(by_column.get(column, "") for column in columns)] for way, by_column in cells.items()]
    return tables.Table(title, ["way", *columns], lines)


def main(words: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if something failed to run, and 0 whether targets are met or not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks targets", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "host", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="few short runs: a first impression in a minute and a half")
    parser.add_argument("--only", nargs="+", choices=GROUPS, help="measure these lines only", metavar="GROUP")
    parser.add_argument("--loop", choices=list(loops()), help="measure on this event loop only")
    parser.add_argument("--count", type=int, default=MOST, metavar="N", help="requests of a run, at most")
    parser.add_argument("--limit", type=seconds_of, default=LIMIT, help="seconds after which no setting is begun")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the results; otherwise benchmarks/results, or none if quick"
    )
    arguments = parser.parse_args(words)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "host"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU here; --device host runs without one")
    if arguments.count < 1:
        parser.error(f"--count {arguments.count}: expected at least 1")
    folder: Path | None = arguments.out or (None if arguments.quick else RESULTS)
    if folder is not None and (why := unwritable(folder)):
        parser.error(f"--out {folder}: {why}")
    only = [name for name in GROUPS if name in arguments.only] if arguments.only else list(GROUPS)
    if device == "host" and not arguments.only:
        only = ["threads"]
    tell = Teller(arguments.limit)
    bench = Bench(device, quick=arguments.quick, limit=arguments.limit, tell=tell)
    if arguments.loop:
        bench.loops = (arguments.loop,)
    plan = Plan(3, 0.02, 20, 10, 0.1) if arguments.quick else Plan(7, 0.05, 100, 30, 0.25)
    is_all = not arguments.only and not arguments.loop
    return run(bench, plan, only, arguments.count, folder, is_all=is_all)


def run(bench: Bench, plan: Plan, only: Sequence[str], most: int, folder: Path | None, *, is_all: bool) -> int:
    """Measure, judge, write, print."""
    started = time.monotonic()
    build = implementation()
    judged_as = NATIVE if build == NATIVE else PYTHON
    prototypes = list(prototypes_of(judged_as))
    if {"call", "lease", "throughput"} & set(only) and (missing := unavailable(prototypes[0], bench.device)):
        bench.skipped[", ".join(prototypes)] = missing
        prototypes = []
    settings = Settings(bench, plan, only, prototypes, most)
    rows: list[Row] = []
    name = f"targets-{bench.device}"

    def results() -> dict[str, Any]:
        lines = [line for line in lines_of(rows, judged_as) if line.group in only]
        return results_of(settings, build, rows, lines, time.monotonic() - started)

    parts: list[Callable[[Settings], Iterator[Row]]] = [one_awaiter] if settings.kinds else []
    parts += [_MEASURED[group] for group in only if group in _MEASURED]
    status = 0
    try:
        for part in parts:
            try:
                rows += part(settings)
            except Exception as error:  # the other groups go on
                bench.fail(f"{part.__name__}, the rest", error)
            if folder is not None:  # a hang leaves what was measured before
                write(f"{name}{PARTIAL}", results(), folder)
    except KeyboardInterrupt:  # what was measured before is worth keeping
        bench.failed["interrupted"] = "by the keyboard"
        status = INTERRUPTED
    bench.tell("")
    found = results()
    record = as_record(name, found)
    for table in (*figures_of(rows), *tables.tables_of(record)):
        print(f"{tables.as_text(table)}\n")
    show(record)
    if folder is not None:
        print(finish(name, found, folder, is_whole=bench.is_whole and is_all))
    return status or (1 if bench.failed else 0)


def show(record: Mapping[str, Any]) -> None:
    """Machine, what was left out, and how many targets are met."""
    for what, how in record["failed"].items():
        print(f"FAILED, left out: {what}:\n{how}")
    for what, why in record["skipped"].items():
        print(f"not measured: {what}: {why}")
    if record["unreached"]:
        print(f"not reached in {record['limit']:.0f} s (--limit): {'; '.join(record['unreached'])}")
    print(f"{tables.heading_of(record)}; {record['implementation']} build, {record['seconds']:.0f} s")
    print(f"meets {record['met']} of {record['judged']} targets")


def _digits(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


if __name__ == "__main__":
    sys.exit(main())
