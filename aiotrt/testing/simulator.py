"""A simulated GPU in virtual time, with the same Protocols as a real one.

Rule 1: the semantics are those of CUDA, as `devices.base` states them, and of torch's allocator; `tests/test_conformance.py`
checks this model against the other devices.
Rule 2: nothing happens early: work is executed at a time that the schedule chooses, and until then memory keeps its old
content. A read too early gets wrong data, as on a GPU.

A device tensor is a CPU tensor over memory of the device (`Memory`); torch operations on it are intercepted (`Interceptor`)
and submitted to the current stream, inside `use`, `run`, `call` and `capture`, and everywhere under `testing.run`.
A stream is a queue of operations, records and waits. Only operations take time. The operation at the head of a stream is an
enabled action in `VirtualTime`, which executes one action at a time. A graph is the list of captured operations; it runs as
one operation, without the Python code that was captured. Every access is reported to `Detector`.

Differences from a GPU: an operation is atomic, so torn data is not seen (the detector reports the race); a sticky fault
comes only from an operation that raises, or from a `FaultInjector`; all host threads are one actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import torch

from aiotrt.devices.base import BaseDevice, CaptureError, Event, Graph, Stream
from aiotrt.errors import DeviceError, UsageError
from aiotrt.testing.hazards import HOST, Detector
from aiotrt.testing.intercept import Interceptor, Work
from aiotrt.testing.memory import Memory, Span
from aiotrt.testing.streams import SimulatedEvent, SimulatedGraph, SimulatedStream
from aiotrt.testing.virtual import Schedule, VirtualTime, Workers

__all__ = ["SimulatedDevice"]

T = TypeVar("T")

#: cudaErrorStreamCaptureUnsupported: a query that fails with this code must be repeated later.
ASK_LATER: Final = 900
#: Excluding these keys sends a torch operation straight to its kernel: interception costs 15 us even if it passes it on.
_INTERCEPTED: Final = torch._C.DispatchKeySet(torch._C.DispatchKey.Python).add(torch._C.DispatchKey.PythonTLSSnapshot)


@dataclass(eq=False)
class _Scope:
    """The stream and the graph that a thread's torch operations are submitted to."""

    stream: SimulatedStream
    explicit: bool  # operations without a device tensor belong to the device too
    graph: SimulatedGraph | None = None


class SimulatedDevice(BaseDevice):
    """A simulated GPU in virtual time.

    Use it from one thread, and from `workers`. Time passes in `advance`, in `run_until_idle`, in calls that block, and on
    the event loop of `testing.run`.

    Args:
        schedule: decides durations and orders; a number is the seed of a `Seeded` schedule.
        name: the device's name in messages.
        time: the clock of another device, to share it; then `schedule` is ignored.
        peer: another GPU of the same machine, with which this one shares time, host memory and race detector: a stream of
            one can wait for an event of the other, and copies can go from one to the other.

    Attributes:
        time: the clock.
        detector: the race detector.
        memory: the device's memory and its pinned memory, with those of its peers.
        peers: all GPUs of the machine, including this one.
        broken: the sticky fault; None before one.
    """

    unified = False
    submits_from_threads = True
    torch_device = torch.device("cpu")

    def __init__(
        self,
        schedule: Schedule | int = 0,
        *,
        name: str | None = None,
        time: VirtualTime | None = None,
        peer: SimulatedDevice | None = None,
    ) -> None:
        super().__init__()
        self.peers: list[SimulatedDevice] = [] if peer is None else peer.peers
        self.name = f"simulated:{len(self.peers)}" if name is None else name
        self.peers.append(self)
        if peer is not None:
            time = peer.time
        self.time: VirtualTime = VirtualTime(schedule) if time is None else time
        self.detector: Detector = Detector() if peer is None else peer.detector
        self.memory: Memory = Memory() if peer is None else peer.memory
        self.broken: DeviceError | None = None
        #: The numbers of executed and of pending writes, by pinned block.
        self.pinned_writes: dict[int, tuple[int, int]] = {} if peer is None else peer.pinned_writes
        self._events = 0
        self._streams: dict[int, SimulatedStream] = {} if peer is None else peer._streams  # of all peers
        self._busy: dict[SimulatedStream, None] = {}
        self._local = threading.local()
        self._is_capturing = False
        self._broken_capture: list[str] | None = None  # the calls that broke the capture of `captured_elsewhere`
        self._default = self._open_stream()  # not `stream()`, which would prepare this thread

    # The Device protocol...

    def stream(self) -> SimulatedStream:
        """Create a stream."""
        self.verb("stream")
        self.prepare_thread()
        return self._open_stream()

    def event(self) -> SimulatedEvent:
        """Create an event."""
        self.verb("event")
        self._events += 1
        return SimulatedEvent(self, f"event {self._events}")

    def current_stream(self) -> SimulatedStream:
        """Return the calling thread's current stream: that of the innermost `use`, `run` or `call`, else the default one."""
        return self._scope.stream

    def adopt_stream(self, stream: object) -> SimulatedStream:
        """Return `stream` itself.

        Raises:
            TypeError: it is not a stream of this device.
        """
        if isinstance(stream, SimulatedStream) and stream.device is self:
            return stream
        raise TypeError(f"expected a stream of {self.name}, got {type(stream).__name__}")

    def query(self, event: Event) -> bool:
        """Whether `event` is complete; False also if the query is refused during a capture."""
        try:
            return event.query()
        except DeviceError as error:
            if error.code == ASK_LATER:
                return False
            raise

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate device memory in the current stream's order. It holds garbage."""
        self.verb("empty")
        return self._allocate(shape, None, dtype)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate pinned memory. It holds garbage. Blocks."""
        self.block(lambda: True, "allocating pinned memory")
        with self.raw():
            tensor = self.memory.allocate(shape, None, dtype, None)
            span = self.memory.span(tensor)
        if span is not None:
            self.detector.allocated(span.block)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in pinned memory."""
        with self.raw():
            span = self.memory.copy_span(tensor)
        return span is not None and span.block.pinned

    def capture(
        self,
        stream: Stream,
        body: Callable[[], Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor] = (),
        *,
        ordered: bool = False,
    ) -> tuple[Graph, list[torch.Tensor]]:
        """Run `body` once to warm up, then once to capture the operations that it submits. Blocks.

        Raises:
            CaptureError: `body` cannot be captured.
            Exception: any exception of `body` in the warm-up.
        """
        assert isinstance(stream, SimulatedStream), stream
        self.block(lambda: not self._is_capturing, "a capture")
        self._is_capturing = True
        try:
            self.call(stream, body)
            stream.synchronize()
            graph = SimulatedGraph(self)
            try:
                with self._entered(_Scope(stream, explicit=True, graph=graph)), torch.no_grad():
                    return graph, list(body())
            except DeviceError:
                raise
            except Exception as error:
                graph.close()
                raise CaptureError(str(error) or type(error).__name__) from error
        finally:
            self._is_capturing = False

    def call(self, stream: Stream, function: Callable[[], T]) -> T:
        """Call `function` with `stream` current; the operations that it submits are executed later."""
        assert isinstance(stream, SimulatedStream), stream
        self.verb("call")
        self.prepare_thread()
        with self._entered(_Scope(stream, explicit=True)), torch.no_grad():
            return function()

    def synchronize(self) -> None:
        """Block until every stream is idle. Must not be called on the event loop's thread."""
        self.block(lambda: not self._busy, f"{self.name}.synchronize()")
        for stream in self._streams.values():
            if stream.device is self:
                self.detector.observe(self.detector.mark(stream.actor))

    def prepare_thread(self) -> None:
        """Bind the device's context to the calling thread, and exchange its capture mode: `needs_context`, `unsafe`."""
        self._local.is_prepared = True

    def is_on_stream(self) -> bool:
        """Return False: Python code itself never runs as work on a simulated stream."""
        return False

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in device memory."""
        block = self.memory.block(tensor)
        return block is not None and block.stream is not None and self._streams[block.stream].device is self

    def check_loop(self) -> None:
        """Check that the running loop uses this device's clock: on another loop no work would ever be executed.

        Raises:
            UsageError: the running loop uses another clock.
        """
        if getattr(asyncio.get_running_loop(), "virtual_time", None) is not self.time:
            raise UsageError(
                "a SimulatedDevice needs an event loop in its virtual time, and this loop is not: run the program with "
                "aiotrt.testing.run(main(), device), or use device='host' in a test that has a loop of its own"
            )

    def workers(self, count: int) -> Workers:
        """Create a pool of `count` worker threads in virtual time."""

        def prepare(job: Callable[[], None]) -> None:
            with contextlib.ExitStack() as stack:
                for device in self.peers:
                    stack.enter_context(device.intercepting())
                job()

        return Workers(self.time, count, prepare)

    # For tests and users...

    def tensor(self, values: object, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a device tensor with `values`, which are written in the order of the current stream."""
        with self.raw():
            host = torch.as_tensor(values, dtype=dtype)
        tensor = self.empty(host.shape, host.dtype)
        with self.intercepting():
            tensor.copy_(host)
        return tensor

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of the current content of `tensor`. The host must have seen an event after its last write."""
        self.host_read(tensor)
        with self.raw():
            return tensor.detach().clone()

    def host_read(self, memory: torch.Tensor | np.ndarray[Any, Any], what: str = "a host read") -> None:
        """Report to the detector that the host reads this memory now."""
        if (span := self._span(memory)) is not None:
            self.touched(what, (span,), ())

    def host_write(self, memory: torch.Tensor | np.ndarray[Any, Any], what: str = "a host write") -> None:
        """Report to the detector that the host writes this memory now."""
        if (span := self._span(memory)) is not None:
            self.touched(what, (), (span,))

    @contextlib.contextmanager
    def use(self, stream: SimulatedStream | None = None) -> Iterator[None]:
        """Make `stream` current on this thread: torch operations on device tensors are submitted to it."""
        with self._entered(_Scope(stream or self.current_stream(), explicit=False)):
            yield

    @contextlib.contextmanager
    def intercepting(self) -> Iterator[None]:
        """Intercept this thread's torch operations: those on device tensors are submitted to the current stream."""
        if getattr(self._local, "intercepting", False):
            yield
            return
        self._local.intercepting = True
        try:
            with Interceptor(self):
                yield
        finally:
            self._local.intercepting = False

    @contextlib.contextmanager
    def captured_elsewhere(self) -> Iterator[None]:
        """Simulate, inside the block, that another thread captures in global mode, which is torch's default.

        On a thread that was not prepared, a query, a synchronisation or an allocation of pinned memory fails, and breaks
        that capture.

        Raises:
            CaptureError: the capture was broken; the message names the call.
        """
        broken: list[str] = []
        self._broken_capture = broken
        try:
            yield
        finally:
            self._broken_capture = None
        if broken:
            raise CaptureError(f"a capture in global mode was broken by {broken[0]}, on a thread that was not prepared")

    def advance(self, seconds: float) -> None:
        """Advance virtual time by this many seconds, and execute the work that is due."""
        self.time.advance(seconds)

    def run_until_idle(self) -> None:
        """Execute all work that is not blocked, at any virtual time."""
        self.time.run_until_idle()

    def check(self) -> None:
        """Raise the first hazard found, if any.

        Raises:
            HazardError: the first hazard.
        """
        self._collect()
        self.detector.check()

    # For streams, graphs and the interceptor...

    def verb(self, what: str) -> None:
        """Begin a call on the device: let the schedule preempt the thread, and reclaim freed memory.

        Raises:
            DeviceError: the device is broken.
        """
        if self.time.workers:
            self.time.checkpoint(what)
        if self.memory.is_any_dropped:
            self._collect()
        if self.broken is not None:
            raise self.broken

    def needs_context(self, what: str) -> None:
        """Check that a worker thread is prepared for a driver call. torch's own calls bind the context themselves.

        Raises:
            DeviceError: this is a worker thread without the device's context.
        """
        if self.time.is_worker and not getattr(self._local, "is_prepared", False):
            raise DeviceError(f"{what} in a thread that was not prepared", code=201, name="cudaErrorDeviceUninitialized")

    def unsafe(self, what: str) -> None:
        """Check a call that the driver refuses while another thread captures in global mode.

        Raises:
            DeviceError: the call is refused, and has broken that capture: see `captured_elsewhere`.
        """
        if self._broken_capture is not None and not getattr(self._local, "is_prepared", False):
            self._broken_capture.append(what)
            raise DeviceError(
                f"{what} while another thread captures", code=ASK_LATER, name="cudaErrorStreamCaptureUnsupported"
            )

    def block(self, condition: Callable[[], bool], what: str) -> None:
        """Block the thread in virtual time until `condition` holds or the device breaks.

        Raises:
            DeviceError: the device is broken.
            LoopBlockedError: this is the event loop's thread.
            RuntimeError: the thread is capturing.
        """
        if self._scope.graph is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        self.verb(what)
        self.unsafe(what)
        self.time.block_until(lambda: self.broken is not None or condition(), what)
        if self.broken is not None:
            raise self.broken

    def raw(self) -> contextlib.AbstractContextManager[None]:
        """Return a context manager in which this thread's torch operations are not intercepted."""
        return torch._C._ExcludeDispatchKeyGuard(_INTERCEPTED)

    def submitted(self, stream: SimulatedStream) -> None:
        """Start work that was submitted to `stream`, which was idle. No other stream can be waiting for that work yet."""
        if self.broken is None:
            stream.pump()
            if not stream.is_idle:
                self._busy[stream] = None

    def pump(self) -> None:
        """Start all work that can start, on all devices of the machine, after an operation completed."""
        devices = [device for device in self.peers if device.broken is None]
        moved = 1
        while moved:
            moved = sum([busy.pump() for device in devices for busy in device._busy])  # not any(), which would stop early
        for device in devices:
            for busy in [busy for busy in device._busy if busy.is_idle]:
                del device._busy[busy]

    def execute(self, work: Work) -> None:
        """Execute work, unless the device is broken. An exception breaks it, as a failed assertion in a kernel does."""
        if self.broken is not None:
            return
        try:
            with self.raw(), torch.no_grad():
                work.run()
        except Exception as error:
            self.broken = DeviceError(f"{work.what} failed: {error}", code=710, name="cudaErrorAssert")
            self.broken.__cause__ = error
        for span in work.writes:
            if span.block.pinned:
                done, pending = self.pinned_writes[span.block.number]
                self.pinned_writes[span.block.number] = done + 1, pending - 1

    def is_mine(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a torch operation on these tensors belongs to the device."""
        return self._scope.explicit or any(map(self.holds, tensors))

    def is_a_peers(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether a torch operation on these tensors belongs to another device of the machine."""
        return any(peer.is_mine(tensors) for peer in self.peers if peer is not self)

    def new(self, like: torch.Tensor) -> torch.Tensor:
        """Allocate memory for a result, with the size, strides and dtype of `like`."""
        return self._allocate(like.size(), like.stride(), like.dtype)

    def submit(self, work: Work) -> None:
        """Submit work to the current stream, or add it to the graph that is being captured."""
        scope = self._scope
        if scope.graph is not None:
            scope.graph.works.append(work)
            return
        self.verb(work.what)
        scope.stream.put(work)

    def drain(self, what: str) -> None:
        """Block until the current stream is idle."""
        stream = self.current_stream()
        self.block(lambda: stream.is_idle, what)
        self.detector.observe(self.detector.mark(stream.actor))

    def touched(self, what: str, reads: Sequence[Span], writes: Sequence[Span]) -> None:
        """Record an access of the host to memory of the device."""
        self.detector.access(HOST, what, reads, writes)

    def _open_stream(self) -> SimulatedStream:
        stream = SimulatedStream(self, f"stream {len(self._streams)}")
        self._streams[stream.handle] = stream
        return stream

    @property
    def _scope(self) -> _Scope:
        scopes: list[_Scope] = self._local.__dict__.setdefault("scopes", [])
        return scopes[-1] if scopes else _Scope(self._default, explicit=False)

    @contextlib.contextmanager
    def _entered(self, scope: _Scope) -> Iterator[None]:
        scopes: list[_Scope] = self._local.__dict__.setdefault("scopes", [])
        scopes.append(scope)
        try:
            with self.intercepting():
                yield
        finally:
            scopes.pop()

    def _allocate(self, size: Sequence[int], stride: Sequence[int] | None, dtype: torch.dtype) -> torch.Tensor:
        self._collect()
        scope = self._scope
        with self.raw():
            tensor = self.memory.allocate(size, stride, dtype, scope.stream.handle)
            span = self.memory.span(tensor)
        if span is not None:
            self.detector.allocated(span.block)
        if scope.graph is not None:
            scope.graph.owned.append(tensor)
            scope.graph.nbytes += tensor.numel() * tensor.element_size()
        return tensor

    def _collect(self) -> None:
        """Reclaim the memory whose owners were deleted: in the order of its stream, as torch's allocator does."""
        if not self.memory.is_any_dropped:
            return
        for block in self.memory.dropped():
            span = Span(block, block.generation, 0, block.memory.nbytes)
            stream = None if block.stream is None else self._streams[block.stream]
            self.detector.freed(span, HOST if stream is None else stream.actor)
            if stream is None:
                block.poison()
            elif stream._is_closed or stream.device.broken is not None:
                continue  # it cannot be allocated again
            else:
                stream.put_instant(block.poison)
            self.memory.give_back(block)

    def _span(self, memory: torch.Tensor | np.ndarray[Any, Any]) -> Span | None:
        if isinstance(memory, np.ndarray):
            return self.memory.array_span(memory)
        with self.raw():
            return self.memory.span(memory)

    def __repr__(self) -> str:
        return f"<SimulatedDevice {self.name}: {len(self._busy)} of {len(self._streams)} streams busy>"
