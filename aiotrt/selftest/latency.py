"""Measure the latency of a run, in the layout of trtexec. Percentiles are measured values, not interpolated.

The phases are timed on the slot's own stream: the same copies in, launch and copies out as in a call, in the same order,
with marks between them. With a graph, several runs are submitted while the stream is held and then released together, so
that no delay of the CPU is attributed to the device. Throughput and the awaited call are measured through the public API.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from aiotrt.devices import Device, Stream
from aiotrt.runtime.hold import Hold
from aiotrt.runtime.programs import Program
from aiotrt.selftest.bench import Bench, together, within
from aiotrt.selftest.instruments import Latch, StreamClock
from aiotrt.selftest.report import Finding

__all__ = ["ROWS", "latency", "summary"]

#: The titles of the table's rows by key; names and order are trtexec's where it has them.
ROWS: Final = {
    "latency_ms": "Latency",
    "enqueue_time_ms": "Enqueue Time",
    "h2d_latency_ms": "H2D Latency",
    "gpu_compute_time_ms": "GPU Compute Time",
    "d2h_latency_ms": "D2H Latency",
    "awaited_call_ms": "Awaited Call",
}
#: Runs that are submitted together; far fewer than a stream accepts before submitting blocks.
_BATCH: Final = 8
#: The minimum number of runs of each kind, so that percentiles are meaningful.
_LEAST: Final = 20


@dataclass
class _Phases:
    """The durations of each phase in milliseconds, one for each run."""

    total: list[float] = field(default_factory=list)
    enqueue: list[float] = field(default_factory=list)
    h2d: list[float] = field(default_factory=list)
    compute: list[float] = field(default_factory=list)
    d2h: list[float] = field(default_factory=list)


async def latency(bench: Bench) -> Finding:
    """Measure throughput with all slots busy, single awaited calls, and the phases of a run on the device."""
    share = bench.options.duration / 3
    samples = [sample for sample in await bench.samples() if sample.case is bench.usual]
    inputs = [sample.inputs for sample in samples]
    awaited = await within(_awaited(bench, inputs, share), "one caller's calls", share)
    bench.progress(1 / 3)
    count, seconds = await within(_throughput(bench, inputs, share), "many callers' calls", share)
    bench.progress(2 / 3)
    phases = await _phases(bench, inputs[0], share)
    unified = bench.device.unified
    shapes = ", ".join(f"{name} {shape}" for name, shape in bench.usual.named.items())
    figures: dict[str, Any] = {
        "shapes": {name: list(shape) for name, shape in bench.usual.named.items()},
        "slots": bench.options.slots,
        "throughput_qps": count / seconds,
        "throughput_runs": count,
        "throughput_seconds": seconds,
        "latency_ms": summary(phases.total),
        "enqueue_time_ms": summary(phases.enqueue),
        "h2d_latency_ms": None if unified else summary(phases.h2d),
        "gpu_compute_time_ms": None if unified else summary(phases.compute),
        "d2h_latency_ms": None if unified else summary(phases.d2h),
        "awaited_call_ms": summary(awaited),
        "not_applicable": {},
    }
    if unified:
        figures["not_applicable"] = {
            "h2d_latency_ms": "the device uses host memory: nothing is copied in",
            "gpu_compute_time_ms": "there is no GPU; Latency is the time on the host device's stream",
            "d2h_latency_ms": "the device uses host memory: nothing is copied out",
        }
    middle, call = figures["latency_ms"]["median"], figures["awaited_call_ms"]["median"]
    return Finding(
        f"{count / seconds:,.1f} qps; median latency {middle:.3f} ms, of an awaited call {call:.3f} ms, at {shapes}", figures
    )


def summary(values: Sequence[float]) -> dict[str, float]:
    """Compute the statistics that trtexec prints. Every percentile is a measured value."""
    median, p90, p95, p99 = np.percentile(values, [50, 90, 95, 99], method="inverted_cdf")
    return {
        "min": float(min(values)),
        "max": float(max(values)),
        "mean": float(np.mean(values)),
        "median": float(median),
        "p90": float(p90),
        "p95": float(p95),
        "p99": float(p99),
        "runs": len(values),
    }


async def _awaited(bench: Bench, inputs: Sequence[Any], seconds: float) -> list[float]:
    """Time calls of one caller, in milliseconds, from the call until it has the results."""
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    warm = _LEAST
    while warm > 0 or len(times) < _LEAST or time.perf_counter() < deadline:
        started = time.perf_counter()
        await bench.model(*inputs[len(times) % len(inputs)])
        if warm > 0:
            warm -= 1  # the hub learns the duration that it predicts
        else:
            times.append((time.perf_counter() - started) * 1e3)
    return times


async def _throughput(bench: Bench, inputs: Sequence[Any], seconds: float) -> tuple[int, float]:
    """Run two callers for each slot; return the number of calls and the seconds that they took."""
    started = time.perf_counter()
    deadline = started + seconds
    count = 0

    async def call(number: int) -> None:
        nonlocal count
        while count < _LEAST or time.perf_counter() < deadline:
            await bench.model(*inputs[(number + count) % len(inputs)])
            count += 1

    await together(call(number) for number in range(2 * bench.options.slots))
    return count, time.perf_counter() - started


async def _phases(bench: Bench, inputs: Any, seconds: float) -> _Phases:
    phases = _Phases()
    async with bench.model.lease(bench.usual.named, outputs="torch") as slot:
        for buffer, value in zip(slot.inputs, inputs, strict=True):
            buffer[...] = value
        await within(slot.replay(), "a replay")
        hold = slot._hold
        assert isinstance(hold, Hold)
        deadline = time.perf_counter() + seconds
        first = True
        while first or len(phases.total) < _LEAST or time.perf_counter() < deadline:
            # In a worker, because a launch without a graph occupies its thread. The lease owns the slot meanwhile.
            batch = await asyncio.to_thread(_batch, bench.device, hold.slot.stream, hold.program)
            if not first:  # the first batch is the warm-up
                for name, values in vars(batch).items():
                    getattr(phases, name).extend(values)
            first = False
    return phases


def _batch(device: Device, stream: Stream, program: Program) -> _Phases:
    """Run several times in sequence, and time each phase. Called on a worker thread."""
    device.prepare_thread()
    clock, phases, marks = StreamClock(device), _Phases(), []
    latch = Latch(device)
    # A run without a graph submits any number of operations and may wait for the device, so it must not be held.
    hold = program.captured and not device.unified
    runs = _BATCH if hold else 1
    try:
        if hold:
            latch.hold(stream)
        for _ in range(runs):
            began = clock.mark(stream)
            if not device.unified:
                for i, buffer in enumerate(program.inputs):
                    stream.copy(buffer, program.staged_input(i))
            copied_in = clock.mark(stream)
            before = time.perf_counter()
            program.launch()
            phases.enqueue.append((time.perf_counter() - before) * 1e3)
            computed = clock.mark(stream)
            if not device.unified:
                if not program.captured:
                    program.stage((), outputs=True)  # a run without a graph may change a shape
                for staged, output in zip(program.staged_outputs, program.outputs, strict=True):
                    assert staged is not None
                    stream.copy(staged, output)
            marks.append((began, copied_in, computed, clock.mark(stream)))
    finally:
        latch.open()
        stream.synchronize()
    for began, copied_in, computed, ended in marks:
        phases.h2d.append(clock.milliseconds(began, copied_in))
        phases.compute.append(clock.milliseconds(copied_in, computed))
        phases.d2h.append(clock.milliseconds(computed, ended))
        phases.total.append(clock.milliseconds(began, ended))
    return phases
