"""Work of a known length for a device, and the ways to wait for it: aiotrt's own, and what one does without it.

The work does nothing for a calibrated time: on CUDA a kernel that spins on the device's clock, on the host device a sleep
in the stream's thread, which gives the interpreter lock away as a kernel would. All ways launch the same captured graph, by
the same call; they differ only in how the event after it is waited for.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TypeAlias

import torch

import aiotrt
from aiotrt.devices import Device, Event, open_device

__all__ = ["AIOTRT", "BASELINES", "CALL", "EXECUTOR", "FLOOR", "LEASE", "Request", "Work", "ceiling", "opened"]

Request: TypeAlias = Callable[[], Awaitable[object]]

FLOOR: Final = "synchronize"  # event.synchronize() on the loop, which it blocks: nothing finds out sooner
EXECUTOR: Final = "executor"  # run_in_executor(event.synchronize), as asyncio.to_thread does
SLEEP_0: Final = "sleep(0)"  # between queries
SLEEP_1: Final = "sleep(1 ms)"  # between queries
BASELINES: Final = (FLOOR, EXECUTOR, SLEEP_0, SLEEP_1)

CALL: Final = "aiotrt call"  # await model(x): copies the input in and the result out, on the device
LEASE: Final = "aiotrt lease"  # await slot.replay(): no copies, like the baselines
AIOTRT: Final = (CALL, LEASE)


class Work:
    """A function over a device tensor that takes about so long there.

    Attributes:
        device: where.
        nominal: seconds asked for.
        seconds: what one launch takes when many follow each other closely, measured.
        example: an input, on the device.
    """

    def __init__(self, device_name: str, nominal: float) -> None:
        self.device = open_device(device_name)
        self.nominal = nominal
        self.example = torch.zeros(64, device=self.device.torch_device)
        self.function = _host_work(nominal) if self.device.unified else _cuda_work(self.device, nominal)
        line = Line(self.device, self.function)
        self.seconds = line.seconds()
        line.close()


class Line:
    """One stream with the work captured on it: the bare device, with no slots and no hub."""

    def __init__(self, device: Device, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        device.prepare_thread()
        self._input = torch.zeros(64, device=device.torch_device)
        self._stream, self._event = device.stream(), device.event()
        self._graph, self._outputs = device.capture(self._stream, lambda: [function(self._input)])

    def launch(self) -> Event:
        """One launch, and the event after it, which the next launch records again."""
        self._graph.launch(self._stream)
        self._stream.record(self._event)
        return self._event

    def seconds(self) -> float:
        """What one launch takes, launched back to back: the median of several series."""
        series = []
        for count in (3, 20, 20, 20, 20, 20):
            started = time.perf_counter()
            for _ in range(count):
                self._graph.launch(self._stream)
            self.synchronize()
            series.append((time.perf_counter() - started) / count)
        return statistics.median(series[1:])

    def synchronize(self) -> None:
        """Block until everything launched has completed."""
        self._stream.record(self._event)
        self._event.synchronize()

    def close(self) -> None:
        """Free it; everything launched has completed."""
        self._graph.close()
        self._stream.close()


def ceiling(work: Work, slots: int, count: int) -> float:
    """Launches a second when nobody waits for any of them: back to back, round robin over `slots` streams; best of 3."""
    lines = [Line(work.device, work.function) for _ in range(slots)]
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for i in range(count):
            lines[i % slots].launch()
        for line in lines:
            line.synchronize()
        best = max(best, count / (time.perf_counter() - started))
    for line in lines:
        line.close()
    return best


@asynccontextmanager
async def opened(way: str, work: Work, slots: int) -> AsyncIterator[Request]:
    """A function that launches the work once, in one of `slots`, and waits for it in this way.

    With one slot, the baselines are for one awaiter at a time: what a queue costs is not theirs to pay then.
    """
    if way in AIOTRT:
        async with aiotrt.load(work.function, device=work.device.name, slots=slots, warmup=[work.example]) as model:
            if way == CALL:
                yield lambda: model(work.example)
            else:
                async with model.lease() as slot:
                    slot.inputs[0][...] = work.example
                    yield slot.replay
        return
    lines = [Line(work.device, work.function) for _ in range(slots)]
    with ThreadPoolExecutor(slots) as pool:
        wait = partial(_WAITS[way], pool)
        yield partial(wait, lines[0]) if slots == 1 else partial(_in_any, _queue(lines), wait)
    for line in lines:
        line.close()


def _queue(lines: list[Line]) -> asyncio.LifoQueue[Line]:
    free: asyncio.LifoQueue[Line] = asyncio.LifoQueue()
    for line in lines:
        free.put_nowait(line)
    return free


async def _in_any(free: asyncio.LifoQueue[Line], wait: Callable[[Line], Awaitable[None]]) -> None:
    line = await free.get()
    try:
        await wait(line)
    finally:
        free.put_nowait(line)


async def _block(_: ThreadPoolExecutor, line: Line) -> None:
    line.launch().synchronize()


async def _execute(pool: ThreadPoolExecutor, line: Line) -> None:
    await asyncio.get_running_loop().run_in_executor(pool, line.launch().synchronize)


async def _yield(_: ThreadPoolExecutor, line: Line) -> None:
    event = line.launch()
    while not event.query():  # noqa: ASYNC110  # this is what is measured
        await asyncio.sleep(0)


async def _nap(_: ThreadPoolExecutor, line: Line) -> None:
    event = line.launch()
    while not event.query():  # noqa: ASYNC110  # this is what is measured
        await asyncio.sleep(0.001)


_WAITS: Final = {FLOOR: _block, EXECUTOR: _execute, SLEEP_0: _yield, SLEEP_1: _nap}


def _host_work(nominal: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def work(x: torch.Tensor) -> torch.Tensor:
        time.sleep(nominal)
        return x.clone()

    return work


def _cuda_work(device: Device, nominal: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def spin(cycles: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def work(x: torch.Tensor) -> torch.Tensor:
            torch.cuda._sleep(cycles)
            return x.clone()

        return work

    def seconds(cycles: int) -> float:
        line = Line(device, spin(cycles))
        taken = line.seconds()
        line.close()
        return taken

    seconds(10_000_000)  # brings the clocks up
    few, many = 100_000, 1_100_000
    short, long = seconds(few), seconds(many)
    rate = (many - few) / (long - short)
    return spin(max(1, round((nominal - short) * rate) + few))
