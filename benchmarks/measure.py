"""The measuring kit that the benchmarks and the demo share: percentiles, the event loop's lag, CPU share, results as JSON.

A figure is worth what its neighbours in the same run are worth: report a loop's lag beside the idle loop's, an overhead
beside the floor's, and never compare across machines or runs.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeAlias, TypeVar

import numpy as np
import torch

import aiotrt
from aiotrt.completion.timers import open_timer
from benchmarks.stored import as_text, packed, rounded, unpacked

__all__ = [
    "HEARTBEAT",
    "NO_OVERLAP",
    "PARTIAL",
    "RESULTS",
    "Heartbeat",
    "Request",
    "Spread",
    "Usage",
    "as_record",
    "busiest",
    "code",
    "drive",
    "finish",
    "idle_lag",
    "loops",
    "machine",
    "mean_of_known",
    "median_of",
    "pace",
    "run_on",
    "write",
    "write_record",
]

T = TypeVar("T")

Request: TypeAlias = Callable[[], Awaitable[object]]

NO_OVERLAP: Final = "no overlap"  # what limits a way that does one thing at a time
PARTIAL: Final = "-partial"  # the name's end of results that are not whole
RESULTS: Final = Path(__file__).parent / "results"
BUSY: Final = 0.9  # of the time: a device that is at work for longer limits whatever waits for it
BEAT: Final = 1e-3  # seconds between heartbeats
HEARTBEAT: Final = "timerfd"  # what beats; results that do not say so have the loop's own timer, which sees less on uvloop


@dataclass(frozen=True)
class Spread:
    """Where the middle and the tail of a set of durations lie, in the unit that went in."""

    p50: float
    p99: float
    worst: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of `values`, which must not be empty."""
        p50, p99 = np.percentile(values, [50, 99])
        return cls(float(p50), float(p99), float(max(values)), len(values))


def median_of(spreads: Iterable[Spread]) -> Spread:
    """The median of each figure over several runs; the worst is the worst of all."""
    spreads = list(spreads)
    return Spread(
        statistics.median(s.p50 for s in spreads),
        statistics.median(s.p99 for s in spreads),
        max(s.worst for s in spreads),
        sum(s.count for s in spreads),
    )


def mean_of_known(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


class Heartbeat:
    """Measures the event loop's lag while the block runs: how late a task runs on that was to run on every millisecond.

    Each beat is due at its time, whether the loop came to the one before or not: a loop that is blocked for 20 ms is late
    for twenty. The times are a timerfd's, which the loop sees as it sees a socket: its own timers round to a millisecond,
    and uvloop's count from when its turn began, so that they do not see what holds up every turn by less. An idle loop
    shows a lag too, since a processor takes its time to wake: compare with `idle_lag`. The beat that is due when the block
    ends counts as well.

    Attributes:
        lags: in seconds, one for each beat.
    """

    def __init__(self) -> None:
        self.lags: list[float] = []
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat())
        await asyncio.sleep(0)  # the first beat begins before the block does
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._stopping = True
        await self._task

    @property
    def spread(self) -> Spread:
        """The lags' spread, in seconds."""
        return Spread.of(self.lags)

    async def _beat(self) -> None:
        fired = asyncio.Event()
        timer = open_timer(asyncio.get_running_loop(), fired.set)
        due = time.perf_counter() + BEAT
        try:
            while not self._stopping:
                timer.set(max(0.0, due - time.perf_counter()))
                await fired.wait()
                fired.clear()
                now = time.perf_counter()
                while due <= now:
                    self.lags.append(now - due)
                    due += BEAT
        finally:
            timer.close()


async def idle_lag(seconds: float = 1.0) -> Spread:
    """The lag of this loop when nothing else runs on it: the baseline for every other lag of the same run."""
    async with Heartbeat() as heartbeat:
        await asyncio.sleep(seconds)
    return heartbeat.spread


def pace() -> float:
    """Seconds that a fixed piece of plain Python takes just now.

    A processor whose other half belongs to somebody else's machine is slow for seconds at a time, and no counter says so.
    """
    started = time.perf_counter()
    total = 0
    for i in range(2000):
        total += i & 3
    return time.perf_counter() - started


class Usage:
    """Wall time and CPU share of a block; of all the process's threads, so 2.0 is two whole cores.

    Attributes:
        seconds: wall time.
        cpu: processor time over wall time.
        others: how many cores everybody else on this machine used meanwhile; None where the system does not say. Figures
            taken beside a busy neighbour are the neighbour's too.
    """

    seconds = 0.0
    cpu = 0.0
    others: float | None = None

    def __enter__(self) -> Self:
        self._busy = _busy_seconds()
        self._wall, self._processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._wall
        self.cpu = (time.process_time() - self._processor) / self.seconds
        busy = _busy_seconds()
        if self._busy is not None and busy is not None:
            self.others = max(0.0, (busy - self._busy) / self.seconds - self.cpu)


async def drive(request: Request | Sequence[Request], awaiters: int, count: int, *, yielding: bool = False) -> list[float]:
    """So many requests from so many awaiters, in equal shares; returns how long each took.

    Of several requests each awaiter has one. Between two of them the loop has its turn if `yielding`, as it has in a program
    that gets its requests from a network; else only if the request itself gives it.
    """
    seconds: list[float] = []
    requests = [request] if callable(request) else request

    async def awaiter(i: int) -> None:
        request = requests[i % len(requests)]
        for _ in range(i, max(count, awaiters), awaiters):
            started = time.perf_counter()
            await request()
            seconds.append(time.perf_counter() - started)
            if yielding:
                await asyncio.sleep(0)

    if awaiters == 1:
        await awaiter(0)
    else:
        await asyncio.gather(*map(awaiter, range(awaiters)))
    return seconds


def loops() -> dict[str, Callable[[], asyncio.AbstractEventLoop] | None]:
    """The event loops that are installed, by name."""
    found: dict[str, Callable[[], asyncio.AbstractEventLoop] | None] = {"asyncio": None}
    try:
        import uvloop
    except ImportError:
        return found
    return {**found, "uvloop": uvloop.new_event_loop}


def run_on(loop: str, main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a new loop of this name."""
    with asyncio.Runner(loop_factory=loops()[loop]) as runner:
        return runner.run(main)


def machine() -> dict[str, Any]:
    """What this ran on, for the record."""
    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "aiotrt": aiotrt.__version__,
        "code": code(),
        **{name: _version(name) for name in ("torch", "onnxruntime", "uvloop", "cuda-bindings", "numpy")},
        **{
            name: version
            for name in ("numba-cuda", "tensorrt-rtx", "polygraphy", "torchvision", "timm", "rfdetr")
            if (version := _version(name))
        },
        "gpu": None,
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": _driver()}
    return found


@cache
def code() -> str:
    """Which code this is: the beginning of a digest of the package's files, the same wherever they are."""
    folder = Path(aiotrt.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def as_record(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """Add machine, versions and date to a benchmark's results. All is of JSON's types, and rounded as in the file."""
    date = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    plain = json.loads(json.dumps({"benchmark": name, "date": date, "machine": machine(), **results}, default=asdict))
    record: dict[str, Any] = rounded(plain)
    if "rows" in record:
        record["rows"] = unpacked(packed(record["rows"]))
    return record


def busiest(shares: Mapping[str, float], gpu: float | None, limited_by: str | None = None) -> str:
    """Return the stage that limits the others: the one that a pipeline waits for, or else the busiest.

    The loop's share includes polling, so a device that is hardly ever idle comes first. A device that is often idle does
    not limit: if the pipeline waits for its models then, they wait for the loop's thread.

    Args:
        shares: of the time, by stage; the device's is computed from its work alone, and too high where several run at once.
        gpu: the device's share as it was observed; None if nothing observed it.
        limited_by: `PipelineStatus.limited_by`; None without a pipeline, and in older results.
    """
    shares = dict(shares) if gpu is None else {**shares, "device": gpu}
    if shares.get("device", 0.0) >= BUSY:
        return "device"
    if limited_by == "sinks":
        return "sinks"
    is_decoding = shares.get("decode", 0.0) > 0.0
    if limited_by == "source":
        return "decode" if is_decoding else "loop"
    if limited_by == "models":
        shares.pop("decode", None)
    if gpu is not None and (is_decoding or limited_by == "models"):
        shares.pop("device")
    return max(shares, key=lambda stage: shares[stage])


def write(name: str, results: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write a benchmark's results, with machine, versions and date, as ``<folder>/<name>.json``, in place of the last run's.

    The file is replaced at once: a reader, or the next program after a crash, finds one whole run.
    """
    return write_record(as_record(name, results), folder / f"{name}.json")


def write_record(record: Mapping[str, Any], path: Path) -> Path:
    """Write a record into a file, its rows in the stored form."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {**record, "rows": packed(record["rows"])} if "rows" in record else record
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(as_text(stored), encoding="utf-8")
    unfinished.replace(path)
    return path


def finish(name: str, results: Mapping[str, Any], folder: Path, *, is_whole: bool) -> str:
    """Write a run's results where they belong; says where that is.

    Those of a run that came to everything it meant to take the place of the last ones. Others are kept beside them, since
    the documentation is made of these files: half a run would leave half a table.
    """
    partial = f"{name}{PARTIAL}"
    if not is_whole:
        said = f"NOT WHOLE: {write(partial, results, folder)}"
        return f"{said}; {name}.json is left as it was" if (folder / f"{name}.json").exists() else said
    path = write(name, results, folder)
    (folder / f"{partial}.json").unlink(missing_ok=True)
    return f"results: {path}"


def _busy_seconds() -> float | None:
    """Processor seconds that this machine's processors have worked, or were taken away, since it started."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _wait, interrupt, soft, stolen = map(int, fields[1:9])
    return (user + nice + system + interrupt + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _driver() -> str:
    try:
        words = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").split()
    except OSError:
        return "unknown"
    return next((word for word in words if word.count(".") >= 1 and word.replace(".", "").isdigit()), "unknown")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
