"""What does awaiting a TensorRT engine cost, next to TensorRT by itself and to polygraphy's runner?

    python -m benchmarks tensorrt
    python -m benchmarks.bench_tensorrt [--network NAME]... [--loop NAME] [--limit SECONDS] [--quick] [--out DIR]

Five networks at FP16, on one GPU, in one run: PP-OCR's detector and recogniser, ResNet-50, a ViT and RF-DETR-Seg-Nano, as
far as the packages are installed that they come from. One awaiter: bare TensorRT (enqueue and synchronise; replay of a
captured graph and synchronise; the same with host input and results), polygraphy's `TrtRunner` if it is installed, and
aiotrt with host input, with device input and by lease. Then 64 awaiters on 1, 2 and 4 slots, as a share of the ceiling: the
same graphs launched back to back on as many streams, and nobody waiting.

The time of the GPU itself is that of graph replays back to back, between two of its own time stamps. Every way must give
the same bits as bare TensorRT. The engines are built first, which takes seconds each. What is missing or fails is among the
results, which are written after each network, and takes no other with it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import aiotrt
from benchmarks.bare import Bare
from benchmarks.measure import (
    HEARTBEAT,
    PARTIAL,
    RESULTS,
    Heartbeat,
    Request,
    Spread,
    Usage,
    drive,
    finish,
    idle_lag,
    loops,
    mean_of_known,
    median_of,
    run_on,
    write,
)  # fmt: skip
from benchmarks.networks import NETWORKS, Array, MissingError, Network

AWAITERS: Final = 64
SLOTS: Final = (1, 2, 4)
ENQUEUE: Final = "bare enqueue"
GRAPH: Final = "bare graph"
GRAPH_HOST: Final = "bare host"
POLYGRAPHY: Final = "polygraphy"
POLYGRAPHY_HOST: Final = "polygraphy host"
LEASE: Final = "aiotrt lease"
CALL: Final = "aiotrt call"
CALL_HOST: Final = "aiotrt host"
AIOTRT: Final = (LEASE, CALL, CALL_HOST)

console: Final = Console()


@dataclass(frozen=True)
class Run:
    """One run. Times in seconds."""

    latency: Spread
    rate: float
    cpu: float
    others: float | None


@dataclass(frozen=True)
class Row:
    """One way to run one network: the summary of its runs.

    Attributes:
        ceiling: runs a second when nothing waits; None for one awaiter.
        overhead: an await's time over the GPU's own, p50.
        lag: of the event loop meanwhile.
        wrong: whether a result differs from bare TensorRT's in any bit.
        runs: how many there were.
        latency: the median of each figure over the runs; `rate` and `cpu` likewise.
        others: cores that other programs used meanwhile, the mean; None if unknown.
        spread: the least and the most over the runs of p50, p99, rate and cpu.
    """

    network: str
    way: str
    slots: int
    awaiters: int
    ceiling: float | None
    overhead: float
    lag: Spread
    wrong: bool
    runs: int
    latency: Spread
    rate: float
    cpu: float
    others: float | None
    spread: dict[str, tuple[float, float]]


def summary_of(runs: Sequence[Run]) -> dict[str, Any]:
    """The fields of a row that summarise its runs."""
    figures = {
        "p50": [run.latency.p50 for run in runs],
        "p99": [run.latency.p99 for run in runs],
        "rate": [run.rate for run in runs],
        "cpu": [run.cpu for run in runs],
    }
    return {
        "runs": len(runs),
        "latency": median_of(run.latency for run in runs),
        "rate": statistics.median(figures["rate"]),
        "cpu": statistics.median(figures["cpu"]),
        "others": mean_of_known(run.others for run in runs),
        "spread": {name: (min(values), max(values)) for name, values in figures.items()},
    }


@dataclass(frozen=True)
class Plan:
    """How much to measure: runs of each way, and seconds of each run."""

    runs: int
    seconds: float

    def count(self, expected: float) -> int:
        """How many requests make one run, if each takes this long."""
        return max(AWAITERS, min(20_000, round(self.seconds / expected)))


class Line:
    """A bare context with its graph: one of the streams of the ceiling."""

    def __init__(self, path: Path, x: Array) -> None:
        self.bare = Bare(path)
        self.bare.prepare(x.shape)
        self.bare.input.copy_(torch.from_numpy(x))
        torch.cuda.synchronize()
        self._graph = self.bare.capture()
        self.launch = self._launcher()

    def synchronize(self) -> None:
        """Block until all of it has completed."""
        self.bare.stream.synchronize()

    def gpu_seconds(self, count: int) -> float:
        """What one replay takes on the GPU, launched back to back; the least of three series."""
        series = []
        for _ in range(3):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(5):
                self.launch()
            begin.record(self.bare.stream)
            for _ in range(count):
                self.launch()
            end.record(self.bare.stream)
            end.synchronize()
            series.append(float(begin.elapsed_time(end)) / 1e3 / count)
        return min(series)

    def _launcher(self) -> Callable[[], None]:
        """By the driver, as aiotrt does it: torch's own replay makes the stream current first, which takes longer."""
        raw = getattr(self._graph, "raw_cuda_graph_exec", None)
        if raw is None:  # an older torch

            def replay() -> None:
                with torch.cuda.stream(self.bare.stream):
                    self._graph.replay()

            return replay
        from cuda.bindings import driver

        executable, stream = driver.CUgraphExec(int(raw())), driver.CUstream(self.bare.stream.cuda_stream)

        def launch() -> None:
            (status,) = driver.cuGraphLaunch(executable, stream)
            assert int(status) == 0, status

        return launch


class Bench:
    """One network's engine, and everything it is measured with.

    Attributes:
        skipped: what could not be measured, and why.
        facts: for the results: times of the GPU, of loading and of compiling.
    """

    def __init__(self, network: Network, path: Path, plan: Plan) -> None:
        self.network = network
        self.path = path
        self.plan = plan
        self.skipped: dict[str, str] = {}
        self.x = network.example(0)
        self.tensor = torch.from_numpy(self.x).cuda()
        self.lines = [Line(path, self.x) for _ in range(max(SLOTS))]
        bare = self.bare = self.lines[0].bare
        self.expected = bare.run(self.x)
        # About a tenth of a second of work, and not so much that it fills the queue of launches, which blocks.
        self.gpu = self.lines[0].gpu_seconds(20)
        self.ceilings = {slots: self._ceiling(slots) for slots in SLOTS}
        self.facts: dict[str, Any] = {
            "shape": self.x.shape,
            "input_bytes": self.x.nbytes,
            "output_bytes": sum(output.nbytes for output in self.expected),
            "gpu_seconds": self.gpu,
            "ceilings": self.ceilings,
            "bare_seconds": bare.seconds,
            "ready_seconds": {},
        }

    async def rows(self, told: Callable[[str], None]) -> AsyncIterator[Row]:
        """Measure every way."""
        single: list[tuple[str, Callable[[], Any]]] = [
            (ENQUEUE, self._enqueue),
            (GRAPH, self._graph),
            (GRAPH_HOST, self._graph_host),
            (POLYGRAPHY, lambda: self._polygraphy(host=False)),
            (POLYGRAPHY_HOST, lambda: self._polygraphy(host=True)),
        ]
        for way, opened in single:
            told(f"{self.network.name}: {way}")
            try:
                async with opened() as (request, results):
                    yield await self._measure(way, request, results, slots=1, awaiters=1)
            except Exception as error:  # somebody else's program: whatever it raises is worth a line, not the run
                if way not in (POLYGRAPHY, POLYGRAPHY_HOST):
                    raise
                self.skipped[way] = f"{type(error).__name__}: {error}".splitlines()[0]
        for slots in SLOTS:
            told(f"{self.network.name}: loading {slots} slots")
            started = time.perf_counter()
            async with aiotrt.load(self.path, device="cuda", slots=slots, warmup=[self.x, self.tensor]) as model:
                self.facts["ready_seconds"][slots] = time.perf_counter() - started
                calls: dict[str, Request] = {CALL: lambda: model(self.tensor), CALL_HOST: lambda: model(self.x)}
                if slots == 1:
                    async with model.lease(self.x.shape) as slot:
                        slot.inputs[0][...] = self.x
                        yield await self._measure(LEASE, slot.replay, arrays, slots=1, awaiters=1)
                    for way, call in calls.items():
                        told(f"{self.network.name}: {way}")
                        yield await self._measure(way, call, arrays, slots=1, awaiters=1)
                for way, call in calls.items():
                    told(f"{self.network.name}: {way}, {AWAITERS} awaiters, {slots} slots")
                    yield await self._measure(way, call, arrays, slots=slots, awaiters=AWAITERS)
                for reason in model.statistics().fallbacks:
                    self.skipped["graphs"] = reason

    async def _measure(
        self, way: str, request: Request, results: Callable[[Any], list[Array]], *, slots: int, awaiters: int
    ) -> Row:
        """Several runs in a row, after one that does not count, and one more beside a heartbeat."""
        plan, ceiling = self.plan, self.ceilings[slots] if awaiters > 1 else None
        wrong = not all(
            got.tobytes() == want.tobytes() for got, want in zip(results(await request()), self.expected, strict=True)
        )
        started = time.perf_counter()
        await drive(request, awaiters, 2 * AWAITERS)
        count = plan.count((time.perf_counter() - started) / 2 / AWAITERS)
        await drive(request, awaiters, count // 4)
        runs = []
        for _ in range(plan.runs):
            gc.collect()
            with Usage() as usage:
                seconds = await drive(request, awaiters, count)
            runs.append(Run(Spread.of(seconds), len(seconds) / usage.seconds, usage.cpu, usage.others))
        async with Heartbeat() as heartbeat:
            await drive(request, awaiters, count)
        overhead = statistics.median(run.latency.p50 for run in runs) - self.gpu
        summary = summary_of(runs)
        return Row(self.network.name, way, slots, awaiters, ceiling, overhead, heartbeat.spread, wrong, **summary)

    def _ceiling(self, slots: int) -> float:
        """Runs a second when nobody waits: back to back, round robin over `slots` streams; best of 3."""
        count, best = self.plan.count(self.gpu / slots), 0.0
        for _ in range(3):
            started = time.perf_counter()
            for i in range(count):
                self.lines[i % slots].launch()
            for line in self.lines[:slots]:
                line.synchronize()
            best = max(best, count / (time.perf_counter() - started))
        return best

    # The ways without aiotrt: each a function that runs once, and one that makes arrays of what that returned...

    @asynccontextmanager
    async def _enqueue(self) -> AsyncIterator[tuple[Request, Callable[[Any], list[Array]]]]:
        async def request() -> None:
            self.bare.enqueue()
            self.bare.stream.synchronize()

        yield request, lambda _: self.bare.results()

    @asynccontextmanager
    async def _graph(self) -> AsyncIterator[tuple[Request, Callable[[Any], list[Array]]]]:
        line = self.lines[0]

        async def request() -> None:
            line.launch()
            line.synchronize()

        yield request, lambda _: self.bare.results()

    @asynccontextmanager
    async def _graph_host(self) -> AsyncIterator[tuple[Request, Callable[[Any], list[Array]]]]:
        """What one writes by hand: through page-locked memory, and copies of the results that one may keep."""
        line, bare = self.lines[0], self.bare
        staged = torch.empty_like(bare.input, device="cpu", pin_memory=True)
        outputs = list(bare.outputs.values())
        staged_outputs = [torch.empty_like(output, device="cpu", pin_memory=True) for output in outputs]

        async def request() -> list[Array]:
            np.copyto(staged.numpy(), self.x)
            with torch.cuda.stream(bare.stream):
                bare.input.copy_(staged, non_blocking=True)
                line.launch()
                for pinned, output in zip(staged_outputs, outputs, strict=True):
                    pinned.copy_(output, non_blocking=True)
            line.synchronize()
            return [pinned.numpy().copy() for pinned in staged_outputs]

        yield request, list

    @asynccontextmanager
    async def _polygraphy(self, *, host: bool) -> AsyncIterator[tuple[Request, Callable[[Any], list[Array]]]]:
        """Its runner, on a context like bare TensorRT's."""
        os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read when it is first imported
        log = importlib.import_module("polygraphy.logger").G_LOGGER
        log.module_severity = log.ERROR
        runner_of = importlib.import_module("polygraphy.backend.trt").TrtRunner
        bare = Bare(self.path)
        bare.prepare(self.x.shape)
        feed = {"x": self.x if host else self.tensor}
        with runner_of(bare.context, optimization_profile=bare.context.active_optimization_profile) as runner:

            async def request() -> Any:
                return runner.infer(feed, copy_outputs_to_host=host)

            yield request, lambda results: arrays(tuple(results.values()))


def arrays(result: object) -> list[Array]:
    """What a call gave, as arrays of one's own."""
    results = list(result) if isinstance(result, tuple) else [result]
    return [value.cpu().numpy() if isinstance(value, torch.Tensor) else np.array(value) for value in results]


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", choices=list(NETWORKS), action="append", help="these only; by default all")
    parser.add_argument("--loop", choices=list(loops()), default=list(loops())[-1], help="by default uvloop, if installed")
    parser.add_argument("--quick", action="store_true", help="one short run of each, to see that it works; no results")
    parser.add_argument("--out", type=Path, help=f"folder for the results; {RESULTS.name} beside this file if not quick")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no further network is begun")
    arguments = parser.parse_args(words)
    deadline = time.monotonic() + arguments.limit
    if not torch.cuda.is_available() or importlib.util.find_spec("tensorrt_rtx") is None:
        console.print("skipped: it takes an NVIDIA GPU and tensorrt_rtx")
        return
    plan = Plan(runs=1, seconds=0.02) if arguments.quick else Plan(runs=5, seconds=0.12)
    idle = run_on(arguments.loop, idle_lag(0.2 if arguments.quick else 1.0))
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    skipped: dict[str, dict[str, str]] = {}
    unreached: list[str] = []
    failed: dict[str, str] = {}
    folder = arguments.out or (None if arguments.quick else RESULTS)

    def results() -> dict[str, Any]:
        return {
            "quick": arguments.quick,
            "limit": arguments.limit if math.isfinite(arguments.limit) else None,
            "heartbeat": HEARTBEAT,
            "loop": arguments.loop,
            "tensorrt_rtx": importlib.import_module("tensorrt_rtx").__version__,
            "awaiters": AWAITERS,
            "idle_lag": idle,
            "networks": facts,
            "skipped": skipped,
            "unreached": unreached,
            "failed": failed,
            "rows": rows,
        }

    with tempfile.TemporaryDirectory() as engines, console.status("starting") as status:
        os.environ["AIOTRT_CACHE_DIR"] = engines  # what is compiled for these engines is of no use to anybody later
        for name in arguments.network or NETWORKS:
            if time.monotonic() > deadline:
                unreached.append(name)
                continue
            try:
                measured, facts[name], missed = measure(NETWORKS[name], Path(engines), plan, arguments.loop, status.update)
                rows += measured
                if missed:
                    skipped[name] = missed
            except MissingError as error:
                skipped[name] = {"all": str(error)}
            except Exception as error:  # whatever a network, its exporter or TensorRT raises
                traceback.print_exc()
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            if folder is not None:
                write(f"tensorrt{PARTIAL}", results(), folder)
            gc.collect()
    if folder is not None:
        console.print(finish("tensorrt", results(), folder, is_whole=not failed and not unreached), soft_wrap=True)
    if unreached:
        console.print(f"not come to in {arguments.limit:.0f} s (--limit): {', '.join(unreached)}")
    show(rows, facts, skipped, idle)
    if failed:
        sys.exit("".join(f"FAILED: {name}: {reason}\n" for name, reason in failed.items()))


def measure(
    network: Network, folder: Path, plan: Plan, loop: str, told: Callable[[str], None]
) -> tuple[list[Row], dict[str, Any], dict[str, str]]:
    """Build one network's engine in `folder` and measure it in every way: rows, facts, and what was skipped.

    Raises:
        MissingError: what it is made from is not installed.
    """
    told(f"{network.name}: building")
    started = time.perf_counter()
    path = network.build(folder)
    built = time.perf_counter() - started
    told(f"{network.name}: bare TensorRT")
    bench = Bench(network, path, plan)
    rows = run_on(loop, collect(bench, told))
    return rows, {"build_seconds": built, **bench.facts}, bench.skipped


async def collect(bench: Bench, told: Callable[[str], None]) -> list[Row]:
    """All rows of one network."""
    return [row async for row in bench.rows(told)]


def show(rows: Sequence[Row], facts: dict[str, Any], skipped: dict[str, dict[str, str]], idle: Spread) -> None:
    """A short table."""
    if not rows:
        console.print("nothing was measured")
    for name in dict.fromkeys(row.network for row in rows):
        fact = facts[name]
        shape = "x".join(map(str, fact["shape"]))
        table = Table(
            title=f"{name} {shape}, FP16: the GPU's own time {1e6 * fact['gpu_seconds']:,.0f} us",
            title_justify="left",
            box=box.SIMPLE,
            padding=0,
        )
        table.add_column("way", no_wrap=True)
        for heading in ("p50 us", "p99 us", "over", "runs/s", "share", "CPU", "lag ms"):
            table.add_column(heading, justify="right", no_wrap=True)
        chosen = [row for row in rows if row.network == name]
        for i, row in enumerate(chosen):
            many = row.awaiters > 1
            table.add_row(
                row.way + (f", {row.awaiters} on {row.slots}" if many else ""),
                f"{1e6 * row.latency.p50:,.0f}",
                f"{1e6 * row.latency.p99:,.0f}",
                "" if many else f"{1e6 * row.overhead:+,.1f}",
                f"{row.rate:,.0f}",
                f"{row.rate / row.ceiling:.2f}" if row.ceiling else "",
                f"{row.cpu:.0%}",
                f"{1e3 * (row.lag.p99 - idle.p99):+,.1f}",
                style="bold" if row.way in AIOTRT else None,
                end_section=i + 1 < len(chosen) and chosen[i + 1].awaiters != row.awaiters,
            )
        console.print(table)
        ready = ", ".join(f"{slots}: {seconds:.1f} s" for slots, seconds in fact["ready_seconds"].items())
        first = sum(seconds for what, seconds in fact["bare_seconds"].items() if what != "load")
        console.print(
            f"built in {fact['build_seconds']:.1f} s; a bare context and its first run, which compile: {first:.1f} s"
        )
        console.print(f"then aiotrt is ready, by slots: {ready}")
    for row in rows:
        if row.wrong:
            console.print(f"NOT the bits of bare TensorRT: {row.network}, {row.way}, {row.awaiters} on {row.slots}")
    for name, reasons in skipped.items():
        for what, reason in reasons.items():
            console.print(f"not measured: {name}, {what}: {reason}", markup=False, soft_wrap=True)
    console.print("over: an await's time over the GPU's own. share: of the ceiling, the same graphs with nobody waiting.")
    console.print(
        "lag: of the loop, p99, over the idle loop's; the bare ways and polygraphy block it. host: input and results."
    )
    others = [row.others for row in rows if row.others is not None]
    if others and max(others) > 0.2:
        console.print(f"Other programs used {statistics.median(others):.1f} cores meanwhile, at most {max(others):.1f}.")


if __name__ == "__main__":
    main()
