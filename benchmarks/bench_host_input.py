"""What does an input in host memory cost?

    python -m benchmarks host_input

Work of 100 us (1 ms on the host device) behind inputs of 1 KiB to 24 MiB, pageable and page-locked, on 1 and 4 slots. Beside
it, a blocking loop that does the same copies by hand: into page-locked memory, to the device, the result back and into
memory of its own; with 4 slots it waits only for the launch before the last three, so that copies and work overlap. A
page-locked input it copies straight to the device, as aiotrt does from 128 KiB on. The ceiling is what the device does when
nobody copies on the host: copies to and from page-locked memory, and the work, back to back. The two take turns.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from typing import Final

import numpy as np
import torch

import aiotrt
from benchmarks.measure import Request, Spread
from benchmarks.rows import Bench, Entry, Part, Row, measure_in_turns, verdict
from benchmarks.waits import Line, Work

__all__ = ["HOST_INPUT"]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
SIZES: Final = (KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 6 * MIB, 24 * MIB)
QUICK_SIZES: Final = (64 * KIB, 2 * MIB)
MEMORY: Final = ("pageable", "pinned")
SLOTS: Final = (1, 4)
AWAITERS: Final = {1: 1, 4: 64}
NOMINAL: Final = {"cuda": 100e-6, "host": 1e-3}

AIOTRT: Final = "aiotrt call"
LOOP: Final = "blocking loop"

#: For 1 MiB, pageable.
JUDGED: Final = MIB
ONE_BAR: Final = 5  # us over the blocking loop
SHARE_BAR: Final = 0.8  # of the ceiling, for 4 slots
CPU_BAR: Final = 1.5


class Copier:
    """The blocking loop: some lines, each with page-locked memory, taken in turn."""

    def __init__(self, work: Work, x: torch.Tensor, slots: int) -> None:
        device = self._device = work.device
        example = torch.empty(x.shape, dtype=x.dtype, device=device.torch_device)
        self._lines = [Line(device, heading(work), example) for _ in range(slots)]
        self._staged = [device.pinned(x.shape, x.dtype) for _ in self._lines]
        self._results = [device.pinned(line.outputs[0].shape, line.outputs[0].dtype) for line in self._lines]
        self._x = x
        self._array = x.numpy()
        self._is_pinned = x.is_pinned() if torch.cuda.is_available() else False
        self._turn = itertools.cycle(range(slots))
        for i in range(slots):
            self.submit(i)
        for line in self._lines:
            line.block()

    def once(self) -> object:
        """Wait for the line whose turn it is, take its result, and give it the next input."""
        i = next(self._turn)
        if len(self._lines) > 1:
            self._lines[i].synchronize()
        if not self._is_pinned:
            np.copyto(self._staged[i].numpy(), self._array)
        self.submit(i)
        if len(self._lines) == 1:
            self._lines[i].synchronize()
        return self._results[i].numpy().copy()

    def submit(self, i: int) -> None:
        """The copies and the work; nothing on the host."""
        line = self._lines[i]
        line.stream.copy(line.input, self._x if self._is_pinned else self._staged[i])
        line.submit()
        line.stream.copy(self._results[i], line.outputs[0])
        line.record()

    def ceiling(self, count: int) -> float:
        """Requests a second when nobody copies on the host, best of 3."""

        def seconds() -> float:
            started = time.perf_counter()
            self._all(count)
            return (time.perf_counter() - started) / count

        return 1 / min(seconds() for _ in range(3))

    def close(self) -> None:
        """Free it."""
        for line in self._lines:
            line.block()
            line.close()

    def _all(self, count: int) -> None:
        for i in range(count):
            self.submit(i % len(self._lines))
        for line in self._lines:
            line.block()


def heading(work: Work) -> Callable[[torch.Tensor], torch.Tensor]:
    """The work, on the input's first bytes: what the input costs is its way, not its use."""
    return lambda x: work.function(x[:64])


def host_input(bench: Bench) -> Iterator[Row]:
    """All of it."""
    work = Work(bench.device, NOMINAL[bench.device])
    plan = bench.plan(seconds=0.03, least=12)
    settings = [
        (size, memory, slots) for size in (QUICK_SIZES if bench.quick else SIZES) for memory in MEMORY for slots in SLOTS
    ]
    # First what is judged: should the time be up, the rest is missed less.
    settings.sort(key=lambda s: (s[0] != JUDGED, s[1] == "pinned"))
    for size, memory, slots in bench.each("host_input", settings):
        if memory == "pinned" and bench.device == "host":
            bench.skipped["pinned"] = "page-locked memory takes CUDA"
            continue
        x = torch.zeros(size, dtype=torch.uint8)
        if memory == "pinned":
            x = x.pin_memory()
        setting: dict[str, float | str] = {"bytes": size, "memory": memory, "slots": slots}
        awaiters = {LOOP: 1, AIOTRT: AWAITERS[slots]}
        # Not so many that the driver's queue of launches is full, which blocks.
        with closing(Copier(work, x, slots)) as copier:
            ceiling = copier.ceiling(20 if bench.quick else 200)
        count = plan.count(1 / ceiling)
        for loop in bench.loops:

            def failed(way: str, error: Exception, says: str = f"host_input: {size}, {memory}, {slots}: {loop}") -> None:
                bench.fail(f"{says}, {way}", error)

            entries = {
                LOOP: Entry(blocking(work, x, slots), count),
                AIOTRT: Entry(opened(work, x, slots), max(count, AWAITERS[slots]), AWAITERS[slots]),
            }
            measured = bench.run(loop, measure_in_turns(entries, plan, failed)) or {}
            for way, (runs, lags) in measured.items():
                at = {**setting, "awaiters": awaiters[way]}
                yield Row.measured("host_input", loop, way, at, None, runs, ceiling=ceiling, lags=lags)


@asynccontextmanager
async def blocking(work: Work, x: torch.Tensor, slots: int) -> AsyncIterator[Request]:
    """The blocking loop, which leaves the event loop no turn."""
    with closing(Copier(work, x, slots)) as copier:

        async def request() -> object:
            return copier.once()

        yield request


@asynccontextmanager
async def opened(work: Work, x: torch.Tensor, slots: int) -> AsyncIterator[Request]:
    """A call with that input."""
    given = x if x.is_pinned() else x.numpy()
    async with aiotrt.load(heading(work), device=work.device.name, slots=slots, warmup=[given]) as model:
        yield lambda: model(given)


def judge(rows: Sequence[Row], idle: Mapping[str, Spread]) -> None:
    """Against the blocking loop of the same run."""

    def key(row: Row) -> tuple[object, ...]:
        return row.setting["bytes"], row.setting["memory"], row.setting["slots"]

    loops = {(row.loop, *key(row)): row for row in rows if row.way == LOOP}  # in older files on no loop
    for row in rows:
        if row.way != AIOTRT or (row.setting["bytes"], row.setting["memory"]) != (JUDGED, "pageable"):
            continue
        misses: list[str] = []
        if (loop := loops.get((row.loop, *key(row)), loops.get(("none", *key(row))))) is None:
            continue
        if row.setting["slots"] == 1:
            if (over := 1e6 * (row.latency.p50 - loop.latency.p50)) > ONE_BAR:
                misses.append(f"{over:.1f} us over the blocking loop, not {ONE_BAR}")
        else:
            assert row.ceiling is not None
            if row.rate < loop.rate:
                misses.append(f"{row.rate / loop.rate:.2f} of the blocking loop's rate")
            if row.rate < SHARE_BAR * row.ceiling:
                misses.append(f"{row.rate / row.ceiling:.0%} of the ceiling, not {SHARE_BAR:.0%}")
            if row.cpu > CPU_BAR:
                misses.append(f"{row.cpu:.0%} CPU, not {CPU_BAR:.0%}")
        row.verdict = verdict(misses)


HOST_INPUT: Final[Part] = Part(
    "host_input", "inputs in host memory, against a blocking loop with the same copies", host_input, judge, 180
)


if __name__ == "__main__":
    from benchmarks.suite import main

    sys.exit(main(["host_input", *sys.argv[1:]]))
