"""What a device is: streams, events, graphs and memory, in CUDA's own terms and with CUDA's semantics.

`cuda` implements these on a GPU and `host` on worker threads; everything above speaks only of what stands here. The
semantics that an implementation must keep, and that the conformance tests check on each:

- A stream runs its work in order. Different streams are unordered, except through events.
- `record` marks a point in a stream. `wait` makes everything submitted to a stream *later* wait for the event's *last
  record made before the call*. An event that was never recorded is complete.
- A graph reads and writes the memory it was captured with, and one graph never overlaps itself.
- `Stream.record`, `wait`, `copy` and `Graph.launch` return at once. `Device.capture` and `Device.call` block, and
  are for worker threads only.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import torch

from aiotrt._workers import Workers
from aiotrt.errors import DeviceError

__all__ = ["BaseDevice", "BaseGraph", "CaptureError", "Copies", "Device", "Event", "Graph", "Stream", "write_back"]

T = TypeVar("T")

#: Bytes of host memory that the interpreter's threads copy: waking one costs about as much as copying a mebibyte.
LARGE_COPY: Final = (1 << 20) + 1

#: What to copy, each to where and from where.
Copies: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Event(Protocol):
    """A point in a stream's order."""

    def query(self) -> bool:
        """Whether everything before the last record has completed. Use `Device.query`, which understands faults."""
        ...

    def synchronize(self) -> None:
        """Block until it has: for worker threads, never for the event loop's."""
        ...


class Stream(Protocol):
    """An in-order queue of work on one device."""

    @property
    def handle(self) -> int:
        """The driver's handle (``CUstream``), or an identity where there is no driver."""
        ...

    def record(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, after all work submitted so far, and return it."""
        ...

    def wait(self, event: Event) -> None:
        """Make all work submitted from now on wait for `event`, on the device."""
        ...

    def query(self) -> bool:
        """Whether everything submitted so far has completed; False too where that is not worth finding out."""
        ...

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submit a copy between tensors of equal shape and dtype; host tensors must be pinned, and both kept alive."""
        ...

    def run(self, function: Callable[[], object]) -> None:
        """Submit what `function` does: called at once with this stream current (cuda), or later in order (host).

        What it raises is raised here (cuda) or by `Device.query` of the next event recorded (host).
        """
        ...

    def synchronize(self) -> None:
        """Block until all work submitted so far has completed: for worker threads."""
        ...

    def close(self) -> None:
        """Let the stream go; work submitted earlier still completes."""
        ...


class Graph(Protocol):
    """Captured work, bound to the memory it was captured with."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that it keeps beside its inputs, for outputs and intermediates."""
        ...

    def launch(
        self,
        stream: Stream,
        before: Copies = (),
        after: Copies = (),
        wait: Event | None = None,
        record: Event | None = None,
    ) -> None:
        """Submit to `stream` the copies `before`, one replay, and the copies `after`, in this order.

        As `Stream.copy` does. On CUDA whole copies into the `inputs` that the capture was told of, and out of what it
        returned, are part of the graph, and cost next to nothing.

        Args:
            stream: where.
            before: copied first.
            after: copied last.
            wait: what the replay waits for on the device, as `Stream.wait` does; the copies before it need not.
            record: recorded when the replay has ended; the copies after it need not have.
        """
        ...

    def submit(
        self,
        stream: Stream,
        origin: Stream | None,
        mark: Event,
        inputs: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        event: Event,
    ) -> None:
        """Submit all of one request: wait for the caller, copy in, replay, copy out, and record.

        Args:
            stream: where.
            origin: the caller's stream, which is waited for; None where nothing depends on it.
            mark: recorded there if that takes an event.
            inputs: the buffers that the graph reads.
            sources: what is copied into each of them.
            outputs: what the graph writes.
            results: where each of them is copied to; empty for nowhere.
            event: recorded last.
        """
        ...

    def prepare(self, results: Sequence[torch.Tensor]) -> None:
        """Do ahead what `submit` would do for these results, which are probably the next ones.

        May be called while launches are in flight, which it does not change.
        """
        ...

    def copy_job(
        self,
        stream: Stream,
        copies: Sequence[tuple[Any, Any]],
        inputs: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        event: Event,
        kept: object,
    ) -> Any | None:
        """Return a job that copies host arrays, and then submits as `submit` does, in a thread without the interpreter lock.

        None where there is no such thread, or where the copies need the interpreter. See `aiotrt.runtime.copy_job.Job`.

        Args:
            stream: where.
            copies: to which array, and from which.
            inputs: the buffers that the graph reads.
            sources: what is copied into each of them.
            outputs: what the graph writes.
            results: where each of them is copied to.
            event: recorded last.
            kept: an object that must not be freed before the work is complete.
        """
        ...

    def close(self) -> None:
        """Free it. The last launch must have completed."""
        ...


class Device(Protocol):
    """One device, shared by all models on it.

    Attributes:
        name: what a person would call it, with its index.
        torch_device: where torch puts tensors that live on it.
        unified: whether host memory *is* device memory, so that staging and device buffers are one.
        submits_from_threads: whether running Python on a stream occupies the calling thread (cuda) rather than the
            stream's own (host), so that work without a graph must be submitted from a worker thread.
        tells: whether it says by itself when an event is complete (host), or must be asked (cuda); see `when_complete`.
        thread_copy_bytes: from how many bytes of host inputs on a thread copies and launches, while other slots are busy.
        fault: the fault that broke the device, if one did.
    """

    name: str
    torch_device: torch.device
    thread_copy_bytes: int
    unified: bool
    submits_from_threads: bool
    tells: bool
    fault: DeviceError | None

    @property
    def captures(self) -> int:
        """How many captures have ended in the process, where each waits for the one before; else always 0."""
        ...

    def stream(self) -> Stream:
        """A new stream that never synchronises implicitly with the default stream."""
        ...

    def event(self) -> Event:
        """A new event, without timing."""
        ...

    def current_stream(self) -> Stream:
        """The calling thread's current stream."""
        ...

    def current_handle(self) -> int:
        """The handle of that stream, which costs less."""
        ...

    def adopt_stream(self, stream: object) -> Stream:
        """Somebody else's stream object (or handle) as a `Stream`.

        Raises:
            TypeError: it is not a stream of this kind of device.
        """
        ...

    def query(self, event: Event) -> bool:
        """Whether `event` is complete; False also where the driver says "ask later".

        Raises:
            DeviceError: the device is broken.
            Exception: whatever the work recorded by `event` raised (host).
        """
        ...

    def probe(self, event: Event) -> Callable[[], bool]:
        """What `query` does with this event, as a function to be called often.

        Where that raises, `query` must be asked: the error is the driver's own, and may mean "ask later".
        """
        ...

    def when_complete(self, event: Event, callback: Callable[[], None]) -> None:
        """Call `callback`, on whichever thread, once the last record of `event` made before this call is complete.

        At once if it is. What became of the work, `query` says. Only where the device `tells`; `callback` must not raise.
        """
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised device memory, allocated in the current stream's order."""
        ...

    def maker(self, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Return `empty` for the shape and dtype of this tensor, as a function to be called often."""
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised page-locked host memory. Blocks."""
        ...

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether this host tensor is page-locked memory, for as long as anybody refers to it.

        Then `Stream.copy` may read it where it is.
        """
        ...

    def capture(
        self,
        stream: Stream,
        body: Callable[[], Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor] = (),
        *,
        ordered: bool = False,
    ) -> tuple[Graph, list[torch.Tensor]]:
        """Warm up `body` on `stream`, then capture it there.

        Blocks. One capture at a time in the process, thread-local mode, garbage collection held off.

        Args:
            stream: where; the graph may be launched anywhere.
            body: submits the work, and returns what it writes.
            inputs: buffers that copies given to `Graph.launch` will go to.
            ordered: whether its launches will be given events to wait for and to record.

        Returns:
            The graph, and the tensors that every launch of it writes.

        Raises:
            CaptureError: it ran, but cannot be captured; the reason is the message, the stream is usable.
            Exception: whatever `body` raised when it ran without capture.
        """
        ...

    def exclusive(self) -> AbstractContextManager[object]:
        """Inside, aiotrt captures nothing in this process: for what no capture survives. Blocks: for worker threads."""
        ...

    def call(self, stream: Stream, function: Callable[[], T]) -> T:
        """Call `function` with `stream` current, and return what it returned. Blocks; its device work may go on."""
        ...

    def synchronize(self) -> None:
        """Block until all work submitted to the device so far, on any stream, has completed: for worker threads."""
        ...

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in this device's memory, and not in the host's."""
        ...

    def workers(self, count: int) -> Executor:
        """A pool of `count` daemon threads for what blocks. `submit` raises ResourceError where it has no thread at all."""
        ...

    def is_on_stream(self) -> bool:
        """Whether the calling code is itself work on a stream (host: a function given to `Stream.run`)."""
        ...

    def check_loop(self) -> None:
        """Raise unless models on this device can be used on the running loop.

        Raises:
            UsageError: its time is not this loop's.
        """
        ...

    def prepare_thread(self) -> None:
        """Make the calling thread fit to launch and to poll. Idempotent and cheap after the first call."""
        ...

    def on_fault(self, callback: Callable[[DeviceError], None]) -> Callable[[], None]:
        """Call `callback`, on the thread that finds the fault, when the device breaks; returns how to stop that."""
        ...

    def fail(self, error: DeviceError) -> None:
        """The device is broken: remember `error` and tell everybody, once."""
        ...


class CaptureError(Exception):
    """The work runs, but cannot be captured; the message is the reason."""


class BaseGraph(ABC):
    """The order of a launch, for graphs beside which everything else is submitted by itself."""

    @abstractmethod
    def replay(self, stream: Stream) -> None:
        """Submit one replay: for `launch`, which has said what else belongs to it."""

    def launch(
        self,
        stream: Stream,
        before: Copies = (),
        after: Copies = (),
        wait: Event | None = None,
        record: Event | None = None,
    ) -> None:
        """Submit the copies `before`, one replay and the copies `after`: see `Graph.launch`."""
        for destination, source in before:
            stream.copy(destination, source)
        if wait is not None:
            stream.wait(wait)
        self.replay(stream)
        if record is not None:
            stream.record(record)
        for destination, source in after:
            stream.copy(destination, source)

    def submit(
        self,
        stream: Stream,
        origin: Stream | None,
        mark: Event,
        inputs: Sequence[torch.Tensor],
        sources: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
        event: Event,
    ) -> None:
        """Submit all of one request: see `Graph.submit`."""
        if origin is not None and not origin.query():
            origin.record(mark)
            stream.wait(mark)
        after = list(zip(results, outputs, strict=True)) if results else ()
        self.launch(stream, list(zip(inputs, sources, strict=True)), after)
        stream.record(event)

    def prepare(self, results: Sequence[torch.Tensor]) -> None:  # noqa: B027  # nothing is to be done for most
        """Do ahead what `submit` would do for these results."""

    def copy_job(self, *_: Any) -> Any | None:
        """Return None: there are no such threads. See `Graph.copy_job`."""
        return None


class BaseDevice(ABC):
    """The parts of a `Device` that are the same for all: its fault, its worker threads, and that it must be asked."""

    fault: DeviceError | None = None
    tells = False
    thread_copy_bytes = LARGE_COPY
    captures = 0

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[DeviceError], None]] = {}
        self._faults_lock = threading.RLock()  # a finalizer that runs inside it stops listening

    def on_fault(self, callback: Callable[[DeviceError], None]) -> Callable[[], None]:
        key = object()
        with self._faults_lock:
            self._callbacks[key] = callback

        def stop() -> None:
            with self._faults_lock:
                self._callbacks.pop(key, None)

        return stop

    def fail(self, error: DeviceError) -> None:
        with self._faults_lock:
            if self.fault is not None:
                return
            self.fault = error
            callbacks = list(self._callbacks.values())
        for callback in callbacks:
            callback(error)

    @abstractmethod
    def current_stream(self) -> Stream: ...

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor: ...

    @abstractmethod
    def query(self, event: Event) -> bool: ...

    def current_handle(self) -> int:
        return self.current_stream().handle

    def probe(self, event: Event) -> Callable[[], bool]:
        return partial(self.query, event)

    def maker(self, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        return partial(self.empty, tuple(like.shape), like.dtype)

    def when_complete(self, event: Event, callback: Callable[[], None]) -> None:
        raise NotImplementedError(f"{self!r} must be asked")

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return False

    def exclusive(self) -> AbstractContextManager[object]:
        return contextlib.nullcontext()

    def check_loop(self) -> None:
        return

    def workers(self, count: int) -> Executor:
        return Workers(count)


def write_back(outputs: list[torch.Tensor], new: Sequence[torch.Tensor]) -> None:
    """Put new results where readers look for them: into the fixed tensors, or in their place if their shape changed."""
    for i, tensor in enumerate(new):
        if tensor.shape == outputs[i].shape and tensor.dtype == outputs[i].dtype:
            outputs[i].copy_(tensor)
        else:
            outputs[i] = tensor.clone()
