"""Streams, events and graphs of a simulated device: queues of work, and what stands in them."""

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
    """One use of `record`."""

    clock: Clock = field(repr=False)
    is_done: bool = False


class SimulatedEvent:
    """An event; its last record is what counts."""

    def __init__(self, device: SimulatedDevice, name: str) -> None:
        self.name = name
        self._device = device
        self._record: Record | None = None
        self._polled: Stack | None = None  # where the host found it not complete, and has not seen it complete since

    def query(self) -> bool:
        """Whether its last record is complete.

        Raises:
            DeviceError: the device is broken, or this breaks somebody's capture.
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
        """Block until it is; not for the event loop's thread."""
        self._device.block(lambda: self._record is None or self._record.is_done, f"{self.name}.synchronize()")
        self.query()

    def forget(self) -> None:
        """The host no longer waits for what it asked this event: it may be recorded again."""
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
        """An identity."""
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
        """Make all work submitted from now on wait for the last record of `event` made before this."""
        assert isinstance(event, SimulatedEvent), event
        self.device.verb("wait")
        if event._record is not None:
            self.follow(event._record)

    def query(self) -> bool:
        """Whether it is idle, and the device is not broken."""
        device = self.device
        device.time.checkpoint("query")
        if device.broken is not None or self._queue:
            return False
        device.detector.observe(device.detector.mark(self.actor))
        return True

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submit a copy between tensors of the device, or pinned ones, of equal shape and dtype.

        Raises:
            ValueError: one is in pageable memory, or they differ.
        """
        device = self.device
        device.verb("copy")
        device.needs_context("copying a tensor")
        if destination.shape != source.shape or destination.dtype is not source.dtype:
            raise ValueError(f"cannot copy {source.dtype} {source.shape} to {destination.dtype} {destination.shape}")
        with device.raw():
            memory = device.memory
            to, of = memory.copy_span(destination), memory.copy_span(source)
            if to is None or of is None:
                raise ValueError("a copy needs device or pinned memory at both ends")
            copy = _copier(memory, destination, to, source, of)
        what = f"copy of {of.block!r} to {to.block!r}"
        check = self._host_write_check(what, of) if of.block.pinned else None

        def run() -> None:
            if check is not None:
                check()
            copy()

        self.put(Work(what, run, (of,), (to,)))

    def run(self, function: Callable[[], object]) -> None:
        """Call `function` now with this stream current: the torch operations in it are submitted."""
        self.device.call(self, function)

    def synchronize(self) -> None:
        """Block until it is idle; not for the event loop's thread."""
        self.device.block(lambda: not self._queue, f"{self.name}.synchronize()")
        self.device.detector.observe(self.device.detector.mark(self.actor))

    def close(self) -> None:
        """Let it go; work submitted earlier still completes."""
        self.device.needs_context("closing a stream")
        self._is_closed = True

    # Used by the device...

    def mark(self) -> Record:
        """A record of everything submitted so far."""
        record = Record(self.device.detector.mark(self.actor))
        self._append(record)
        return record

    def follow(self, record: Record) -> None:
        """Wait for it."""
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
        """Submit something that takes no time."""
        self._append(_Instant(run))

    def pump(self) -> bool:
        """Pass everything at the head that takes no time, and start the operation behind it; whether anything moved."""
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
        if len(self._queue) == 1:  # else it waits behind what is there
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
        """The host writes pinned memory unseen, through numpy; what it wrote too early shows in the bytes."""
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


def _copier(memory: Memory, destination: torch.Tensor, to: Span, source: torch.Tensor, of: Span) -> Callable[[], object]:
    """What copies one into the other, later, without keeping either alive: bytes, where they lie in one piece."""
    if destination.is_contiguous() and source.is_contiguous() and not source.is_conj() and not source.is_neg():
        bytes_to, bytes_of = to.block.memory[to.begin : to.end], of.block.memory[of.begin : of.end]
        return lambda: np.copyto(bytes_to, bytes_of)
    aliases = memory.alias(destination), memory.alias(source)
    return lambda: aliases[0].copy_(aliases[1])


@dataclass(eq=False)
class _Wait:
    record: Record


@dataclass(eq=False)
class _Instant:
    run: Callable[[], None]


def _together(works: Sequence[Work]) -> Work:
    reads = {span: None for work in works for span in work.reads}
    writes = {span: None for work in works for span in work.writes}

    def run() -> None:
        for work in works:
            work.run()

    return Work("a graph", run, tuple(reads), tuple(writes))


class SimulatedGraph(BaseGraph):
    """The operations of one capture, and the memory that they were given."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.nbytes = 0
        self.works: list[Work] = []
        self.owned: list[torch.Tensor] = []
        self._device = device
        self._last: Record | None = None
        self._whole: Work | None = None  # all of them as one
        self._is_closed = False

    def replay(self, stream: Stream) -> None:
        """Submit one replay: one operation, after the last one of this graph."""
        assert isinstance(stream, SimulatedStream), stream
        self._device.verb("launch")
        self._device.needs_context("launching a graph")
        if self._is_closed:
            raise UsageError("this graph is closed")
        if self._last is not None:
            stream.follow(self._last)  # a graph never overlaps itself
        if self._whole is None:
            self._whole = _together(self.works)
        stream.put(self._whole)
        self._last = stream.mark()

    def close(self) -> None:
        """Free it; its last launch must have completed, and the host must have seen that."""
        self._device.needs_context("destroying a graph")  # and the event that an ordered one has
        if self._last is not None and not self._device.detector.knows(self._last.clock):
            self._device.detector.found_early_close()
        self._is_closed = True
        self.owned.clear()
