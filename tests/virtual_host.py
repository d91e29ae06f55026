"""The host device in virtual time: the same streams, events and graphs, but the schedule says when a closure runs.

What the runtime does differently where host memory is device memory can so be tried under many orders, without waiting and
without luck. There is no hazard detector: closures are opaque, so a race is found by the wrong result that it makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from aiotrt.devices.base import Event, Stream
from aiotrt.devices.host import HostDevice, HostEvent, HostStream, _Failure, _Record, _thread
from aiotrt.testing import Schedule, VirtualLoop, VirtualTime, Workers

__all__ = ["VirtualHost", "held_host_streams", "run_on_host"]

T = TypeVar("T")


class VirtualHost(HostDevice):
    """A `HostDevice` whose streams are queues in virtual time.

    Args:
        schedule: what happens when, or a seed for it.
    """

    def __init__(self, schedule: Schedule | int) -> None:
        super().__init__()
        self.time = VirtualTime(schedule)
        self._opened: list[_Stream] = []

    def _open(self, name: str | None) -> HostStream:
        stream = _Stream(self, name)
        self._opened.append(stream)
        self._streams.add(stream)
        return stream

    def event(self) -> HostEvent:
        return _Event(self.time)

    def call(self, stream: Stream, function: Callable[[], T]) -> T:
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(function())
            except Exception as error:  # it belongs to whoever called
                done.set_exception(error)

        stream.run(call)
        self.time.block_until(done.done, "a call")
        return done.result()

    def workers(self, count: int) -> Workers:
        return Workers(self.time, count)


class _Event(HostEvent):
    __slots__ = ("_time",)

    def __init__(self, time: VirtualTime) -> None:
        super().__init__()
        self._time = time

    def synchronize(self) -> None:
        record = self.last
        if record is not None:
            self._time.block_until(lambda: record.is_reached, "an event")
            self.query()


class _Stream(HostStream):
    """A queue of closures, and of records that it waits for."""

    def __init__(self, device: VirtualHost, name: str | None) -> None:
        self._device = device
        self._time = device.time
        self._queue: deque[Callable[[_Failure], None] | _Record] = deque()
        self._is_running = False
        self._is_open = True
        self._failure = _Failure()
        self._work: Any = self  # where HostStream puts what is submitted
        self.name = name or f"stream {id(self)}"

    def put(self, item: Callable[[_Failure], None] | _Record) -> None:
        self._time.checkpoint("submitting to a stream")
        self._queue.append(item)
        self._pump()

    def record(self, event: Event | None = None) -> Event:
        return super().record(_Event(self._time) if event is None else event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, HostEvent), event
        self._check_open()
        if event.last is not None:
            self.put(event.last)

    def synchronize(self) -> None:
        reached = threading.Event()
        self.put(lambda failure: reached.set())
        self._time.block_until(reached.is_set, "a stream")

    def close(self) -> None:
        self._is_open = False

    def _check_open(self) -> None:
        assert self._is_open, f"{self.name} is closed"

    def _pump(self) -> None:
        while self._queue and not self._is_running:
            head = self._queue[0]
            if not isinstance(head, _Record):
                self._is_running = True
                self._time.enable(self.name, self._run)
            elif head.is_reached:
                self._queue.popleft()
            else:
                return

    def _run(self) -> None:
        item = self._queue.popleft()
        assert not isinstance(item, _Record)
        before = getattr(_thread, "is_stream", False)
        _thread.is_stream = True
        try:
            with torch.no_grad():
                item(self._failure)
        finally:
            _thread.is_stream = before
        self._is_running = False
        for stream in self._device._opened:  # it may have been what another one waits for
            stream._pump()


@contextlib.contextmanager
def held_host_streams(device: VirtualHost, *streams: Any) -> Iterator[None]:
    """Work submitted to these streams from now on starts only after the block has ended."""
    latch = _Record()
    for stream in streams:
        stream.put(latch)
    try:
        yield
    finally:
        latch.reach(None)
        for stream in device._opened:
            stream._pump()


def run_on_host(main: Coroutine[Any, Any, T], device: VirtualHost) -> T:
    """Run `main` on a loop in the device's virtual time."""
    contexts: list[dict[str, Any]] = []

    async def watched() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
        return await main

    try:
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(device)) as runner:  # type: ignore[arg-type]
            result = runner.run(watched())
    finally:
        device.time.end()
    assert not contexts, f"the loop's exception handler was told: {contexts}"
    return result
