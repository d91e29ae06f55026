"""Work of a known length for a device, and the ways to wait for it: aiotrt's own, and what one does without it.

The work does nothing for a calibrated time: on CUDA a kernel that spins on the device's clock, on the host device a sleep
in the stream's thread, which gives the interpreter lock away as a kernel would. All ways launch the same captured graph;
they differ in how its end is waited for. Each baseline is written as well as it can be: by the driver's calls where that
is faster, with everything that can be made ahead made ahead.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch

import aiotrt
from aiotrt.devices import Device, Event, Stream, open_device
from benchmarks.measure import Request
from benchmarks.prototype.build import COMPILED, PLAIN, build
from benchmarks.prototype.ways import opened_prototype

__all__ = [
    "AIOTRT", "BASELINES", "CALL", "EXECUTOR", "FLOOR", "IN_ORDER", "LEASE", "NOT_LIKE_FOR_LIKE", "PROTOTYPES",
    "PROTOTYPE_CALL", "PROTOTYPE_CALL_COMPILED", "PROTOTYPE_LEASE", "PROTOTYPE_LEASE_COMPILED", "SLEEP_0", "Line", "Work",
    "ceiling", "opened", "unavailable",
]  # fmt: skip

Progress: TypeAlias = Literal["predict", "spin", "interval"]

FLOOR: Final = "synchronize"  # on the loop, which it blocks, by the driver: nothing finds out sooner
TORCH: Final = "torch replay"  # the same, as one writes it with torch
EXECUTOR: Final = "executor"  # run_in_executor(event.synchronize), as asyncio.to_thread does
EXECUTOR_ASLEEP: Final = "executor, asleep"  # the same, with an event whose waiter sleeps instead of spinning
SLEEP_0: Final = "sleep(0)"  # between queries
SLEEP_1: Final = "sleep(1 ms)"  # between queries
POLLER: Final = "polling thread"  # one thread asks for all, every 20 us, and calls call_soon_threadsafe
CALLBACK: Final = "host callback"  # cuLaunchHostFunc, in C, writes to an eventfd that the loop watches
NUMBA: Final = "numba async_done"
BASELINES: Final = (FLOOR, TORCH, EXECUTOR, EXECUTOR_ASLEEP, SLEEP_0, SLEEP_1, POLLER, CALLBACK, NUMBA)

CALL: Final = "aiotrt call"  # await model(x): copies the input in and the result out, on the device
IN_ORDER: Final = "aiotrt call, in order"  # the same of a model whose slots do not overlap
LEASE: Final = "aiotrt lease"  # await slot.replay(): no copies, like the baselines
AIOTRT: Final = (CALL, LEASE)

#: The shortest path that could be written, as plain Python and compiled; see `benchmarks.prototype.core`.
PROTOTYPE_CALL: Final = "prototype call"
PROTOTYPE_LEASE: Final = "prototype lease"
PROTOTYPE_CALL_COMPILED: Final = "prototype call, compiled"
PROTOTYPE_LEASE_COMPILED: Final = "prototype lease, compiled"
#: By way: the build, and whether it copies input and result.
PROTOTYPES: Final = {
    PROTOTYPE_CALL: (PLAIN, True),
    PROTOTYPE_LEASE: (PLAIN, False),
    PROTOTYPE_CALL_COMPILED: (COMPILED, True),
    PROTOTYPE_LEASE_COMPILED: (COMPILED, False),
}

#: What a reader must know before comparing two rows.
NOT_LIKE_FOR_LIKE: Final = {
    CALL: "does more than any baseline: it checks the input, copies it in and the result out on the device (two small "
    "copies, inside the overhead shown), and hands out memory that nobody else has. The lease copies nothing, like the "
    "baselines",
    IN_ORDER: "each launch waits on the device for the one before it, as on one stream, and its ceiling is one stream's",
    FLOOR: "blocks the loop: nothing else runs meanwhile, so its awaits are not awaits. It needs no event, and is the only "
    "row that records none. With many awaiters it has one launch in flight, whatever the number of slots",
    TORCH: "likewise; the stream is made current once, not for every replay",
    EXECUTOR: "takes a thread for each call in flight. The event spins, which is CUDA's default where there are more "
    "processors than contexts: a whole core for each",
    EXECUTOR_ASLEEP: "likewise, but the waiter sleeps until the driver's interrupt",
    SLEEP_0: "takes the whole core, and the time of everybody else on the loop",
    SLEEP_1: "asyncio rounds its timers up to a millisecond and libuv to the nearest, so that the two are not the same",
    POLLER: "one thread more, and the interpreter lock changes hands for every look",
    CALLBACK: "C, compiled when it runs. The callback itself is work on the stream: the next launch there begins after it",
    NUMBA: "its callback is Python, on a thread of the driver's",
    PROTOTYPE_CALL: "does less than aiotrt's call: one input of one shape, no statistics, no faults, no cancellation of "
    "queued requests. It resumes the caller from inside the poll. It shows what a call could cost, and is of no other use",
    PROTOTYPE_LEASE: "is `prototype call` without copies. With many awaiters each takes any free slot; a lease has one",
    PROTOTYPE_CALL_COMPILED: "is the source of `prototype call` compiled with Cython, and calls the driver from C",
    PROTOTYPE_LEASE_COMPILED: "is the source of `prototype lease` compiled with Cython, and calls the driver from C",
}  # fmt: skip

NOTIFY: Final = """
#include <stdint.h>
#include <unistd.h>
void notify(void *p) { uint64_t one = 1; ssize_t n = write((int)(intptr_t)p, &one, sizeof one); (void)n; }
"""
NAP: Final = 20e-6  # seconds, of the polling thread


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
    """One stream with the work captured on it: the bare device, with no slots and no hub.

    Args:
        device: where.
        function: what to capture.
        example: an input; the line's own has its shape.
        asleep: whether who synchronises with the event sleeps, on CUDA, instead of spinning.

    Attributes:
        stream: its own.
        input: what the function reads.
        outputs: what it writes.
        graph: what was captured.
    """

    def __init__(
        self,
        device: Device,
        function: Callable[[torch.Tensor], torch.Tensor | Sequence[torch.Tensor]],
        example: torch.Tensor | None = None,
        *,
        asleep: bool = False,
    ) -> None:
        device.prepare_thread()
        self.device = device
        self.input = torch.zeros(64, device=device.torch_device) if example is None else example.clone()
        self.stream = device.stream()
        self.graph, self.outputs = device.capture(self.stream, lambda: _listed(function(self.input)))
        self._event = _host_event(device, self.stream) if device.unified else _Raw(self.stream, asleep=asleep)
        self.record = self._event.record
        self.query = self._event.query
        self.synchronize = self._event.synchronize
        self.block = self._block() if device.unified else _cuda().block(self.stream)

    def submit(self) -> None:
        """One launch, and no event."""
        self.graph.launch(self.stream)

    def launch(self) -> None:
        """One launch, and the event after it, which the next launch records again."""
        self.graph.launch(self.stream)
        self._event.record()

    def seconds(self) -> float:
        """What one launch takes, launched back to back: the median of several series."""
        series = []
        least = 0.0
        for count in (3, 20, 20, 20, 20, 20):
            count = count if least < 5e-3 else 3
            started = time.perf_counter()
            for _ in range(count):
                self.submit()
            self.block()
            least = (time.perf_counter() - started) / count
            series.append(least)
        return statistics.median(series[1:])

    def close(self) -> None:
        """Free it; everything launched has completed."""
        self._event.close()
        self.graph.close()
        self.stream.close()

    def _block(self) -> Callable[[], None]:
        def block() -> None:
            self._event.record()
            self._event.synchronize()

        return block


class _Marked:
    """An event of the host device, on its stream."""

    def __init__(self, stream: Stream, event: Event) -> None:
        self._stream, self._event = stream, event
        self.query = event.query
        self.synchronize = event.synchronize

    def record(self) -> None:
        self._stream.record(self._event)

    def close(self) -> None:
        pass


class _Raw:
    """A CUDA event, by the driver's calls: without timing, and with a waiter that spins or sleeps."""

    def __init__(self, stream: Stream, *, asleep: bool) -> None:
        driver = self._driver = importlib.import_module("cuda.bindings.driver")
        flags = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value
        if asleep:
            flags |= driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC.value
        status, self._event = driver.cuEventCreate(flags)
        _checked(status)
        self._stream: Any = stream

    def record(self) -> None:
        _checked(*self._driver.cuEventRecord(self._event, self._stream.driver))

    def query(self) -> bool:
        return int(self._driver.cuEventQuery(self._event)[0]) == 0

    def synchronize(self) -> None:
        _checked(*self._driver.cuEventSynchronize(self._event))

    def close(self) -> None:
        self._driver.cuEventDestroy(self._event)


class _Cuda:
    """What only CUDA has."""

    def __init__(self) -> None:
        self.driver = importlib.import_module("cuda.bindings.driver")

    def block(self, stream: Any) -> Callable[[], None]:
        synchronize, handle = self.driver.cuStreamSynchronize, stream.driver

        def block() -> None:
            _checked(*synchronize(handle))

        return block


@cache
def _cuda() -> _Cuda:
    return _Cuda()


def unavailable(way: str, device: str) -> str | None:
    """Why there is no such way here; None if there is."""
    if way in PROTOTYPES:
        made = build(PROTOTYPES[way][0])
        return made if isinstance(made, str) else None
    if way in (TORCH, EXECUTOR_ASLEEP, CALLBACK, NUMBA) and device == "host":
        return "it takes CUDA"
    if way == CALLBACK:
        return _notify()[1]
    if way == NUMBA:
        try:
            handle = importlib.import_module("numba.cuda").external_stream(0).handle
        except Exception as error:  # it is somebody else's, and may fail as it likes
            return f"numba.cuda cannot be imported: {error}"
        if not hasattr(handle, "value"):
            return "async_done of this numba.cuda needs a handle's value, which these CUDA bindings' handles have not"
    return None


def ceiling(work: Work, slots: int, count: int) -> float:
    """Launches a second when nobody waits for any of them: back to back, round robin over `slots` streams; best of 3."""
    lines = [Line(work.device, work.function) for _ in range(slots)]
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for i in range(count):
            lines[i % slots].launch()
        for line in lines:
            line.block()
        best = max(best, count / (time.perf_counter() - started))
    for line in lines:
        line.close()
    return best


@asynccontextmanager
async def opened(way: str, work: Work, slots: int, progress: Progress = "predict") -> AsyncIterator[Request]:
    """A function that launches the work once, in one of `slots`, and waits for it in this way.

    With one slot, the baselines are for one awaiter at a time: what a queue costs is not theirs to pay then.
    """
    if way in (*AIOTRT, IN_ORDER):
        async with aiotrt.load(
            work.function, device=work.device.name, slots=slots, overlap=way != IN_ORDER, max_queue=None,
            warmup=[work.example], progress=progress,
        ) as model:  # fmt: skip
            if way != LEASE:
                yield lambda: model(work.example)
            else:
                async with model.lease() as slot:
                    slot.inputs[0][...] = work.example
                    yield slot.replay
        return
    if way in PROTOTYPES:
        name, copies = PROTOTYPES[way]
        async with opened_prototype(name, work, slots, copies=copies) as request:
            yield request
        return
    lines = [Line(work.device, work.function, asleep=way == EXECUTOR_ASLEEP) for _ in range(slots)]
    async with _WAITS[way](lines) as requests:
        yield requests[0] if len(requests) == 1 else _any_of(requests)
    for line in lines:
        line.block()
        line.close()


def _any_of(requests: Sequence[Request]) -> Request:
    free: asyncio.LifoQueue[Request] = asyncio.LifoQueue()
    for request in requests:
        free.put_nowait(request)

    async def any_of() -> None:
        request = await free.get()
        try:
            await request()
        finally:
            free.put_nowait(request)

    return any_of


# The ways: each gives a function for each line, that launches it once and waits...


@asynccontextmanager
async def _blocking(lines: Sequence[Line]) -> AsyncIterator[list[Request]]:
    def request(line: Line) -> Request:
        async def wait() -> None:
            line.submit()
            line.block()

        return wait

    yield [request(line) for line in lines]


class _Replay:
    """A replay on torch's current stream, which is the line's for as long as this has its turn."""

    def __init__(self, line: Line) -> None:
        stream: Any = line.stream
        graph: Any = line.graph
        self._stream = stream.torch
        self._replay, self._synchronize = graph._graph.replay, self._stream.synchronize  # torch's own graph and stream

    async def __call__(self) -> None:
        self._replay()
        self._synchronize()

    def turn(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)


@asynccontextmanager
async def _torch(lines: Sequence[Line]) -> AsyncIterator[list[Request]]:
    yield [_Replay(lines[0])]  # one stream, however many there are: torch replays on the current one


@asynccontextmanager
async def _executor(lines: Sequence[Line]) -> AsyncIterator[list[Request]]:
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(len(lines), initializer=lines[0].device.prepare_thread) as pool:

        def request(line: Line) -> Request:
            async def wait() -> None:
                line.launch()
                await loop.run_in_executor(pool, line.synchronize)

            return wait

        yield [request(line) for line in lines]


def _sleeping(seconds: float) -> Callable[[Sequence[Line]], AbstractAsyncContextManager[list[Request]]]:
    @asynccontextmanager
    async def sleeping(lines: Sequence[Line]) -> AsyncIterator[list[Request]]:
        def request(line: Line) -> Request:
            async def wait() -> None:
                line.launch()
                while not line.query():  # noqa: ASYNC110  # this is what is measured
                    await asyncio.sleep(seconds)

            return wait

        yield [request(line) for line in lines]

    return sleeping


@asynccontextmanager
async def _polling(lines: Sequence[Line]) -> AsyncIterator[list[Request]]:
    loop = asyncio.get_running_loop()
    new: deque[tuple[Callable[[], bool], asyncio.Future[None]]] = deque()
    wake, stopping = threading.Event(), threading.Event()

    def resolve(done: list[asyncio.Future[None]]) -> None:
        for future in done:
            future.set_result(None)

    def run() -> None:
        lines[0].device.prepare_thread()
        pending: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        while not stopping.is_set():
            if not pending and not new:
                wake.wait()
                wake.clear()
            while new:
                pending.append(new.popleft())
            answers = [(query(), query, future) for query, future in pending]
            done = [future for answer, _, future in answers if answer]
            pending = [(query, future) for answer, query, future in answers if not answer]
            if done:
                loop.call_soon_threadsafe(resolve, done)
            elif pending:
                time.sleep(NAP)

    def request(line: Line) -> Request:
        async def wait() -> None:
            line.launch()
            future = loop.create_future()
            new.append((line.query, future))
            wake.set()
            await future

        return wait

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield [request(line) for line in lines]
    finally:
        stopping.set()
        wake.set()
        thread.join()


@asynccontextmanager
async def _callback(lines: Sequence[Line]) -> AsyncIterator[list[Request]]:
    loop = asyncio.get_running_loop()
    library, _ = _notify()
    driver = _cuda().driver
    function = driver.CUhostFn(ctypes.cast(library.notify, ctypes.c_void_p).value)
    descriptors: list[int] = []

    def request(line: Line) -> Request:
        stream: Any = line.stream
        descriptor = os.eventfd(0, os.EFD_NONBLOCK)
        descriptors.append(descriptor)
        future: asyncio.Future[None] | None = None

        def readable() -> None:
            os.eventfd_read(descriptor)
            assert future is not None
            future.set_result(None)

        async def wait() -> None:
            nonlocal future
            future = loop.create_future()
            line.submit()
            _checked(*driver.cuLaunchHostFunc(stream.driver, function, descriptor))
            await future

        loop.add_reader(descriptor, readable)
        return wait

    try:
        yield [request(line) for line in lines]
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)
            os.close(descriptor)


@asynccontextmanager
async def _numba(lines: Sequence[Line]) -> AsyncIterator[list[Request]]:
    external_stream = importlib.import_module("numba.cuda").external_stream

    def request(line: Line) -> Request:
        async_done = external_stream(line.stream.handle).async_done

        async def wait() -> None:
            line.submit()
            await async_done()

        return wait

    yield [request(line) for line in lines]


_WAITS: Final[dict[str, Callable[[Sequence[Line]], AbstractAsyncContextManager[list[Request]]]]] = {
    FLOOR: _blocking,
    TORCH: _torch,
    EXECUTOR: _executor,
    EXECUTOR_ASLEEP: _executor,
    SLEEP_0: _sleeping(0),
    SLEEP_1: _sleeping(0.001),
    POLLER: _polling,
    CALLBACK: _callback,
    NUMBA: _numba,
}


@cache
def _notify() -> tuple[Any, str | None]:
    """The C callback, compiled; or why there is none."""
    compiler = next(filter(None, map(shutil.which, ("gcc", "cc", "clang"))), None)
    if compiler is None:
        return None, "there is no C compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "notify.c", Path(folder) / "notify.so"
        source.write_text(NOTIFY, encoding="utf-8")
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)]
        compiled = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if compiled.returncode != 0:
            return None, f"{compiler} failed: {compiled.stderr.strip()}"
        return ctypes.CDLL(str(library)), None  # stays mapped when the file is gone


def _host_event(device: Device, stream: Stream) -> _Marked:
    return _Marked(stream, device.event())


def _listed(outputs: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def _checked(status: Any) -> None:
    if int(status) != 0:
        raise RuntimeError(f"the driver says {status}")


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
