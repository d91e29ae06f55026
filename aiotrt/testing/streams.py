"""Streams, events and graphs of a simulated device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from aiotrt.devices.base import BaseGraph, Event, Stream
from aiotrt.errors import UsageError
from aiotrt.testing.hazards import Clock, Stack
from aiotrt.testing.intercept import Work
from aiotrt.testing.memory import Memory, Span

if TYPE_CHECKING:
    from aiotrt.testing.simulator import SimulatedDevice

__all__ = ["Record", "SimulatedEvent", "SimulatedGraph", "SimulatedStream"]


@dataclass(eq=False)
class Record:
    """One record of an event on a stream."""

    clock: Clock = field(repr=False)
    is_done: bool = False


class SimulatedEvent:
    """An event. It is complete when its last record is."""

    def __init__(self, device: SimulatedDevice, name: str) -> None:
        self.name = name
        self._device = device
        self._record: Record | None = None
        self._polled: Stack | None = None  # where the host found it not complete; None once it is seen complete

    def query(self) -> bool:
        """Whether the event's last record is complete.

        Raises:
            DeviceError: the device is broken, or the query breaks the capture of another thread.
        """
        device = self._device
        device.verb("query")
        device.unsafe("a query")
        if self._record is None:
            return True
        if not self._record.is_done:
            self._polled = device.detector.where() if self._polled is None else self._polled
            return False
        self._polled = None
        device.detector.observe(self._record.clock)
        return True

    def synchronize(self) -> None:
        """Block until the event is complete. Must not be called on the event loop's thread."""
        self._device.block(lambda: self._record is None or self._record.is_done, f"{self.name}.synchronize()")
        self.query()

    def forget(self) -> None:
        """Record that the host no longer waits for this event: it may be recorded again."""
        self._polled = None

    def __repr__(self) -> str:
        state = "unrecorded" if self._record is None else "complete" if self._record.is_done else "pending"
        return f"<{self.name}, {state}>"


class SimulatedStream:
    """An in-order queue of work."""

    def __init__(self, device: SimulatedDevice, name: str) -> None:
        self.name = name
        self.device = device
        self.actor = device.detector.actor(name)
        self._queue: deque[Record | _Wait | _Instant | Work] = deque()
        self._is_running = False
        self._is_closed = False

    @property
    def handle(self) -> int:
        """The number that identifies the stream."""
        return self.actor

    @property
    def is_idle(self) -> bool:
        """Whether everything submitted so far has completed."""
        return not self._queue

    def record(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, after all work submitted so far, and return it."""
        event = self.device.event() if event is None else event
        assert isinstance(event, SimulatedEvent), event
        self.device.verb("record")
        if event._polled is not None:
            self.device.detector.found_rerecord(event.name, event._polled)
            event._polled = None
        event._record = self.mark()
        return event

    def wait(self, event: Event) -> None:
        """Make all work that is submitted later wait for the latest record of `event`."""
        assert isinstance(event, SimulatedEvent), event
        self.device.verb("wait")
        if event._record is not None:
            self.follow(event._record)

    def query(self) -> bool:
        """Whether the stream is idle and the device is not broken."""
        device = self.device
        device.time.checkpoint("query")
        if device.broken is not None or self._queue:
            return False
        device.detector.observe(device.detector.mark(self.actor))
        return True

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submit a copy between tensors in device or pinned memory, of equal shape and dtype.

        Raises:
            ValueError: a tensor is in pageable memory, or shapes or dtypes differ.
        """
        device = self.device
        device.verb("copy")
        device.needs_context("copying a tensor")
        if destination.shape != source.shape or destination.dtype is not source.dtype:
            raise ValueError(f"cannot copy {source.dtype} {source.shape} to {destination.dtype} {destination.shape}")
        with device.raw():
            memory = device.memory
            written, read = memory.copy_span(destination), memory.copy_span(source)
            if written is None or read is None:
                raise ValueError("source and destination of a copy must be in device or pinned memory")
            copy = _copier(memory, destination, written, source, read)
        what = f"copy of {read.block!r} to {written.block!r}"
        check = self._host_write_check(what, read) if read.block.pinned else None

        def run() -> None:
            if check is not None:
                check()
            copy()

        self.put(Work(what, run, (read,), (written,)))

    def run(self, function: Callable[[], object]) -> None:
        """Call `function` now, with this stream current: its torch operations are submitted to the stream."""
        self.device.call(self, function)

    def synchronize(self) -> None:
        """Block until the stream is idle. Must not be called on the event loop's thread."""
        self.device.block(lambda: not self._queue, f"{self.name}.synchronize()")
        self.device.detector.observe(self.device.detector.mark(self.actor))

    def close(self) -> None:
        """Close the stream. Work that was submitted earlier still completes."""
        self.device.needs_context("closing a stream")
        self._is_closed = True

    # Used by the device...

    def mark(self) -> Record:
        """Append a record, which completes after all work submitted so far, and return it."""
        record = Record(self.device.detector.mark(self.actor))
        self._append(record)
        return record

    def follow(self, record: Record) -> None:
        """Make all work that is submitted later wait for `record`."""
        self.device.detector.wait(self.actor, record.clock)
        if not record.is_done:
            self._append(_Wait(record))

    def put(self, work: Work) -> None:
        """Submit one operation."""
        for span in work.writes:
            if span.block.pinned:
                done, pending = self.device.pinned_writes.get(span.block.number, (0, 0))
                self.device.pinned_writes[span.block.number] = done, pending + 1
        self.device.detector.access(self.actor, work.what, work.reads, work.writes)
        self._append(work)

    def put_instant(self, run: Callable[[], None]) -> None:
        """Submit an action that takes no virtual time."""
        self._append(_Instant(run))

    def pump(self) -> bool:
        """Complete all entries at the head that take no time, and start the next operation; whether anything changed."""
        moved = False
        while self._queue and not self._is_running:
            head = self._queue[0]
            if isinstance(head, Work):
                self._is_running = moved = True
                self.device.time.enable(f"{self.name}: {head.what}", self._finish)
                break
            if isinstance(head, _Wait):
                if not head.record.is_done:
                    break
            elif isinstance(head, _Instant):
                head.run()
            else:
                head.is_done = True
            self._queue.popleft()
            moved = True
        return moved

    def _append(self, item: Record | _Wait | _Instant | Work) -> None:
        if self._is_closed:
            raise UsageError(f"{self.name} is closed")
        self._queue.append(item)
        if len(self._queue) == 1:  # else an earlier entry is pending
            self.device.submitted(self)

    def _finish(self) -> None:
        work = self._queue[0]
        assert isinstance(work, Work)
        self.device.execute(work)
        if self.device.broken is None:
            self._queue.popleft()
            self._is_running = False
            self.device.pump()

    def _host_write_check(self, what: str, source: Span) -> Callable[[], None]:
        """Return a check for a host write to `source` before the copy is executed.

        Writes of the host through numpy are not intercepted, so the check compares the bytes.
        """
        block = source.block
        writes = self.device.pinned_writes
        before = block.memory[source.begin : source.end].copy()
        version, pending = writes.get(block.number, (0, 0))
        stack = self.device.detector.where()

        def check() -> None:
            if pending or writes.get(block.number, (0, 0)) != (version, 0):
                return  # the device wrote there too
            if not np.array_equal(before, block.memory[source.begin : source.end]):
                self.device.detector.found_host_write(what, source, stack)

        return check

    def __repr__(self) -> str:
        return f"<{self.name}, {len(self._queue)} pending>"


def _copier(
    memory: Memory, destination: torch.Tensor, written: Span, source: torch.Tensor, read: Span
) -> Callable[[], object]:
    """Return a function that copies `source` to `destination` without keeping them alive; contiguous tensors as bytes."""
    if destination.is_contiguous() and source.is_contiguous() and not source.is_conj() and not source.is_neg():
        bytes_written = written.block.memory[written.begin : written.end]
        bytes_read = read.block.memory[read.begin : read.end]
        return lambda: np.copyto(bytes_written, bytes_read)
    aliases = memory.alias(destination), memory.alias(source)
    return lambda: aliases[0].copy_(aliases[1])


@dataclass(eq=False)
class _Wait:
    record: Record


@dataclass(eq=False)
class _Instant:
    run: Callable[[], None]


def _combined(works: Sequence[Work]) -> Work:
    reads = {span: None for work in works for span in work.reads}
    writes = {span: None for work in works for span in work.writes}

    def run() -> None:
        for work in works:
            work.run()

    return Work("a graph", run, tuple(reads), tuple(writes))


class SimulatedGraph(BaseGraph):
    """The operations of one capture, and the memory that was allocated for them."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.nbytes = 0
        self.works: list[Work] = []
        self.owned: list[torch.Tensor] = []
        self._device = device
        self._last: Record | None = None
        self._whole: Work | None = None  # all operations as one
        self._is_closed = False

    def replay(self, stream: Stream) -> None:
        """Submit a replay as one operation, ordered after the graph's last replay."""
        assert isinstance(stream, SimulatedStream), stream
        self._device.verb("launch")
        self._device.needs_context("launching a graph")
        if self._is_closed:
            raise UsageError("this graph is closed")
        if self._last is not None:
            stream.follow(self._last)  # a graph never overlaps itself
        if self._whole is None:
            self._whole = _combined(self.works)
        stream.put(self._whole)
        self._last = stream.mark()

    def close(self) -> None:
        """Free the graph. The host must have seen its last launch complete."""
        self._device.needs_context("destroying a graph")
        if self._last is not None and not self._device.detector.knows(self._last.clock):
            self._device.detector.found_early_close()
        self._is_closed = True
        self.owned.clear()
