"""Where does the time of one await go?

    python -m benchmarks stages

One awaiter, one slot, `await model(x)`, input on the device. Five stages, from the call to the resumed coroutine, with
nothing between them, so that they add up to the await:

- call to launch: checks, the slot, the input's copy, until the graph's launch is called;
- launch to start: until the graph begins on the device;
- device: until the produce event, which stands after the graph and the copy of its result;
- end to look: until the look begins that sees it;
- look to resumed: the query, the result, the next turn of the loop.

The time stamps come from functions that are wrapped here, and from events in the graph, so they cost something themselves:
the same awaits are measured without them too. On CUDA the device's clock is put beside the host's by an event that is
recorded on an idle device before each await, and polled until it has passed: how far the two may be apart is among the
results. A row is the mean over the middle half of the awaits by length: unlike medians, means add up.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

import torch

import aiotrt
from aiotrt.completion.lane import Lane, Pending
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.programs import Program
from benchmarks.measure import Spread
from benchmarks.rows import Bench, Part, Plan, Row, measure
from benchmarks.waits import CALL, Work

__all__ = ["STAGES"]

NAMES: Final = ("call to launch", "launch to start", "device", "end to look", "look to resumed")
LENGTHS: Final = {"cuda": (20, 100, 200, 1000, 5000), "host": (1000, 5000)}
COUNT: Final = {20: 500, 100: 500, 200: 500, 1000: 300, 5000: 60}
QUICK_COUNT: Final = 8


@dataclass
class Stamps:
    """One await, in seconds of the host's clock; the device's two are filled in later on CUDA."""

    called: float = 0.0
    launched: float = 0.0
    begun: float = 0.0
    ended: float = 0.0
    looked: float = 0.0
    resumed: float = 0.0

    @property
    def stages(self) -> tuple[float, ...]:
        """What lies between."""
        points = (self.called, self.launched, self.begun, self.ended, self.looked, self.resumed)
        return tuple(b - a for a, b in pairwise(points))


@dataclass
class Probe:
    """Takes the stamps of the await that is under way."""

    work: Work
    now: Stamps = field(default_factory=Stamps)

    def function(self, x: torch.Tensor) -> torch.Tensor:
        """The work, with stamps where it begins and ends."""
        self.now.begun = time.perf_counter()
        y = self.work.function(x)
        self.now.ended = time.perf_counter()
        return y

    def begin(self) -> None:
        """An await is about to be called."""
        self.now = Stamps()

    def end(self) -> None:
        """It is over."""

    def finish(self, taken: Sequence[Stamps]) -> float:
        """Complete the stamps; returns how far the device's may be wrong."""
        return 0.0

    def attach(self, executor: Executor) -> None:
        """The model is there."""


class CudaProbe(Probe):
    """Likewise, with events of the device."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._begin = torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call, unused-ignore]
        self._end: Any = None
        self._first: Any = None
        self._idle = torch.cuda.Stream()
        self._earliest: list[float] = []  # of the anchors, by the host's clock: recorded after this...
        self._latest: list[float] = []  # ...and passed before that
        self._anchors: list[float] = []  # by the device's
        self._times: list[tuple[float, float]] = []  # of begin and end, by the device's

    def attach(self, executor: Executor) -> None:
        from aiotrt.devices.cuda import CudaEvent

        # The produce event itself, with timing: it is recorded where it always is, and tells when it passed.
        event: Any = torch.cuda.Event.__new__(CudaEvent, enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
        slot = executor.slots[0]
        self._end = slot.event = event
        slot.query, slot.confirm = executor.device.probe(event), lambda: executor.device.query(event)

    def function(self, x: torch.Tensor) -> torch.Tensor:
        self._begin.record(torch.cuda.current_stream())
        return self.work.function(x)

    def begin(self) -> None:
        super().begin()
        anchor: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
        torch.cuda.synchronize()
        earliest = time.perf_counter()
        anchor.record(self._idle)
        while not anchor.query():
            pass
        latest = time.perf_counter()
        self._first = self._first or anchor
        self._anchors.append(self._first.elapsed_time(anchor) / 1e3 if anchor is not self._first else 0.0)
        self._earliest.append(earliest)
        self._latest.append(latest)

    def end(self) -> None:
        torch.cuda.synchronize()
        self._times.append((self._first.elapsed_time(self._begin) / 1e3, self._first.elapsed_time(self._end) / 1e3))

    def finish(self, taken: Sequence[Stamps]) -> float:
        # The host's time of a device's time d is d + offset + drift * d. Every anchor bounds it on both sides; the drift
        # comes from all anchors' middles, the offset from the bounds that are the tightest once that is taken away.
        middles = [(a + b) / 2 - d for a, b, d in zip(self._earliest, self._latest, self._anchors, strict=True)]
        drift = statistics.linear_regression(self._anchors, middles).slope if len(middles) > 2 else 0.0
        low = max(a - d - drift * d for a, d in zip(self._earliest, self._anchors, strict=True))
        high = min(b - d - drift * d for b, d in zip(self._latest, self._anchors, strict=True))
        offset = (low + high) / 2
        for stamps, (begun, ended) in zip(taken, self._times, strict=True):
            stamps.begun = begun + offset + drift * begun
            stamps.ended = ended + offset + drift * ended
        return abs(high - low) / 2


@contextmanager
def wrapped(probe: Probe, executor: Executor) -> Iterator[None]:
    """Launches and polls leave their stamps while the block runs."""
    launch, hub = Program.launch, executor.hub
    add = hub.add
    submits = {type(graph): type(graph).submit for program in executor.cache if (graph := program.graph) is not None}

    def stamped_launch(program: Program, *what: Any) -> None:
        probe.now.launched = time.perf_counter()
        launch(program, *what)

    def stamped_submit(graph: Any, *what: Any) -> None:
        probe.now.launched = time.perf_counter()
        submits[type(graph)](graph, *what)

    def stamped_add(lane: Lane, pending: Pending, *what: Any) -> None:
        query = pending.query

        def stamped_query() -> bool:
            polled = time.perf_counter()
            answer = query()
            if answer:
                probe.now.looked = polled
            return answer

        pending.query = stamped_query
        add(lane, pending, *what)

    set_ = setattr  # the type checker is right that methods are not for replacing, and here they are
    set_(Program, "launch", stamped_launch)
    set_(hub, "add", stamped_add)
    for kind in submits:
        set_(kind, "submit", stamped_submit)
    try:
        yield
    finally:
        set_(Program, "launch", launch)
        vars(hub).pop("add", None)
        for kind, submit in submits.items():
            set_(kind, "submit", submit)


def stages(bench: Bench) -> Iterator[Row]:
    """All lengths, on all loops."""
    for length in (1000,) if bench.quick else LENGTHS[bench.device]:
        if bench.is_over:
            bench.unreached.append(f"stages, {length} us")
            continue
        work = Work(bench.device, length / 1e6)
        plan = bench.plan(seconds=0.05, least=20)
        for loop in bench.each(f"stages, {length} us", bench.loops):
            row = bench.run(loop, broken_down(bench, work, length, loop, plan))
            if row is not None:
                yield row


async def broken_down(bench: Bench, work: Work, length: int, loop: str, plan: Plan) -> Row | None:
    """One await taken apart; None where the device cannot say when it began."""
    async with aiotrt.load(work.function, device=bench.device, slots=1, warmup=[work.example]) as model:
        runs, lags = await measure(lambda: model(work.example), plan, awaiters=1, count=plan.count(work.seconds))
    probe = Probe(work) if bench.device == "host" else CudaProbe(work)
    taken = []
    async with aiotrt.load(probe.function, device=bench.device, slots=1, warmup=[work.example]) as model:
        if reasons := model.statistics().fallbacks:
            bench.skipped[f"stages {length} us, {loop}"] = f"events in a graph: {reasons[0]}"
            return None
        executor = model._executor
        assert executor is not None
        probe.attach(executor)
        for _ in range(10 if bench.quick else 50):  # it learns how long this takes
            await model(work.example)
        with wrapped(probe, executor):
            for _ in range(QUICK_COUNT if bench.quick else COUNT[length]):
                probe.begin()
                stamps = probe.now
                stamps.called = time.perf_counter()
                await model(work.example)
                stamps.resumed = time.perf_counter()
                probe.end()
                taken.append(stamps)
    error = probe.finish(taken)
    taken.sort(key=lambda stamps: stamps.resumed - stamps.called)
    middle = taken[len(taken) // 4 : -(len(taken) // 4) or None]
    means = [statistics.fmean(values) for values in zip(*(stamps.stages for stamps in middle), strict=True)]
    facts = {
        "stages": dict(zip(NAMES, means, strict=True)),
        "sum": sum(means),
        "await": statistics.fmean(stamps.resumed - stamps.called for stamps in middle),
        "count": len(taken),
        "clock_error": error,
    }
    return Row.measured("stages", loop, CALL, {"us": length}, work.seconds, runs, lags=lags, facts=facts)


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """There is no bar, but the stages must add up."""
    for row in rows:
        if abs(row.facts["sum"] - row.facts["await"]) > 1e-8:
            row.verdict = "misses: the stages do not add up"


STAGES: Final[Part] = Part("stages", "one await taken apart, from the call to the resumed coroutine", stages, judge, 120)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["stages", *sys.argv[1:]]))
