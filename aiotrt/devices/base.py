"""The protocols of a device: streams, events, graphs and memory, in CUDA's own terms and with CUDA's semantics.

`cuda` implements them on a GPU and `host` on worker threads; the rest of aiotrt uses only these protocols. The conformance
tests check on each implementation that it keeps these semantics:

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

#: From how many bytes of host memory on a Python thread copies: waking it costs about as much as copying a mebibyte.
LARGE_COPY: Final = (1 << 20) + 1

#: Copies to make, each as a destination and a source.
Copies: TypeAlias = Sequence[tuple[torch.Tensor, torch.Tensor]]


class Event(Protocol):
    """A point in a stream's order."""

    def query(self) -> bool:
        """Whether everything before the last record has completed. Use `Device.query`, which understands faults."""
        ...

    def synchronize(self) -> None:
        """Block until everything before the last record has completed: for worker threads, never for the loop's thread."""
        ...


class Stream(Protocol):
    """An in-order queue of work on one device."""

    @property
    def handle(self) -> int:
        """The driver's handle (``CUstream``), or where there is no driver a number that is unique to the stream."""
        ...

    def record(self, event: Event | None = None) -> Event:
        """Record `event`, or a new one, after all work submitted so far, and return it."""
        ...

    def wait(self, event: Event) -> None:
        """Make all work submitted from now on wait for `event`, on the device."""
        ...

    def query(self) -> bool:
        """Whether everything submitted so far has completed; a device that does not check it returns False."""
        ...

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Submit a copy between tensors of equal shape and dtype; host tensors must be pinned, and both kept alive."""
        ...

    def run(self, function: Callable[[], object]) -> None:
        """Submit the work of `function`: call it now with this stream current (cuda), or later in the stream's order (host).

        An exception of `function` is raised here (cuda), or by `Device.query` of the next recorded event (host).
        """
        ...

    def synchronize(self) -> None:
        """Block until all work submitted so far has completed: for worker threads."""
        ...

    def close(self) -> None:
        """Release the stream; work submitted earlier still completes."""
        ...


class Graph(Protocol):
    """Captured work, bound to the memory it was captured with."""

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the graph keeps for outputs and intermediates, without its inputs."""
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

        The copies are submitted as by `Stream.copy`. On CUDA, copies into the whole of the `inputs` that were given to
        `Device.capture`, and out of the whole of the tensors that it returned, are nodes of the graph and cost very little.

        Args:
            stream: the stream to submit to.
            before: copied first.
            after: copied last.
            wait: an event that the replay waits for on the device, as with `Stream.wait`; the copies `before` do not wait.
            record: recorded when the replay has ended; the copies `after` may still run then.
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
        """Submit all of one request: wait for the caller's stream, copy in, replay, copy out, and record.

        Args:
            stream: the stream to submit to.
            origin: the caller's stream, for which `stream` waits; None if the request does not depend on it.
            mark: recorded on `origin` where the wait needs an event.
            inputs: the buffers that the graph reads.
            sources: the tensors to copy into them.
            outputs: the buffers that the graph writes.
            results: the tensors to copy them to; empty for no copies.
            event: recorded last.
        """
        ...

    def prepare(self, results: Sequence[torch.Tensor]) -> None:
        """Prepare the graph's copies for these results, probably those of the next `submit`, which then costs less.

        May be called while launches are in flight; it does not change them.
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

        Return None where there is no such thread, or where the copies need the interpreter. See
        `aiotrt.runtime.copy_job.Job`.

        Args:
            stream: the stream to submit to.
            copies: the copies of host arrays, each as a destination and a source.
            inputs: the buffers that the graph reads.
            sources: the tensors to copy into them.
            outputs: the buffers that the graph writes.
            results: the tensors to copy them to.
            event: recorded last.
            kept: an object that must not be freed before the work is complete.
        """
        ...

    def close(self) -> None:
        """Free the graph. The last launch must have completed."""
        ...


class Device(Protocol):
    """One device, shared by all models on it.

    Attributes:
        name: a readable name, with the device's index.
        torch_device: torch's device of the tensors in its memory.
        unified: whether host memory *is* device memory, so that staging and device buffers are the same.
        submits_from_threads: whether running Python on a stream occupies the calling thread (cuda) and not the stream's
            own thread (host). If so, work without a graph must be submitted from a worker thread.
        tells: whether the device calls back when an event is complete (host), or must be polled (cuda); see
            `when_complete`.
        thread_copy_bytes: from how many bytes of host inputs on a thread copies and launches, while other slots are busy.
        fault: the fault that broke the device, or None.
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
        """How many captures have ended in the process, if captures run one after the other; else always 0."""
        ...

    def stream(self) -> Stream:
        """Make a stream that never synchronises implicitly with the default stream."""
        ...

    def event(self) -> Event:
        """Make an event, without timing."""
        ...

    def current_stream(self) -> Stream:
        """Return the calling thread's current stream."""
        ...

    def current_handle(self) -> int:
        """Return the handle of the current stream; costs less than `current_stream`."""
        ...

    def adopt_stream(self, stream: object) -> Stream:
        """Return a foreign stream object, or a handle, as a `Stream`.

        Raises:
            TypeError: `stream` is not a stream of this kind of device.
        """
        ...

    def query(self, event: Event) -> bool:
        """Whether `event` is complete; False also if the driver cannot answer now, because a thread captures.

        Raises:
            DeviceError: the device is broken.
            Exception: an exception of the work before the event's last record (host).
        """
        ...

    def probe(self, event: Event) -> Callable[[], bool]:
        """Return a function that queries this event, for frequent calls.

        If it raises, call `query`: the error is the driver's own, and may only mean that it cannot answer now.
        """
        ...

    def when_complete(self, event: Event, callback: Callable[[], None]) -> None:
        """Call `callback`, on any thread, once the last record of `event` made before this call is complete.

        If it is complete already, `callback` is called at once. `query` then returns or raises the work's outcome. Only for
        devices with `tells`; `callback` must not raise.
        """
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate uninitialised device memory, in the current stream's order."""
        ...

    def maker(self, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Return a function that calls `empty` with the shape and dtype of this tensor, for frequent calls."""
        ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Allocate uninitialised page-locked host memory. Blocks."""
        ...

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether this host tensor's memory is page-locked, and stays so as long as the tensor is referenced.

        Then `Stream.copy` may read it in place.
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

        Blocks. There is one capture at a time in the process, in thread-local mode, without garbage collection meanwhile.

        Args:
            stream: the stream to capture on; the graph may be launched on any stream.
            body: submits the work, and returns the tensors that the work writes.
            inputs: the buffers into which launches may copy.
            ordered: whether launches will be given events to wait for and to record.

        Returns:
            The graph, and the tensors that every launch of it writes.

        Raises:
            CaptureError: `body` ran, but cannot be captured; the message is the reason, and the stream is usable.
            Exception: an exception that `body` raised when it ran without capture.
        """
        ...

    def exclusive(self) -> AbstractContextManager[object]:
        """Return a context in which aiotrt captures nothing in this process, for calls that would break any capture.

        Entering blocks: for worker threads.
        """
        ...

    def call(self, stream: Stream, function: Callable[[], T]) -> T:
        """Call `function` with `stream` current, and return its result. Blocks; the device work of `function` may go on."""
        ...

    def synchronize(self) -> None:
        """Block until all work submitted to the device so far, on any stream, has completed: for worker threads."""
        ...

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is in this device's memory, and not in the host's."""
        ...

    def workers(self, count: int) -> Executor:
        """Make a pool of `count` daemon threads for blocking calls.

        Its `submit` raises ResourceError if the pool has no thread and none can be started.
        """
        ...

    def is_on_stream(self) -> bool:
        """Whether the calling code itself runs on a stream (host: in a function given to `Stream.run`)."""
        ...

    def check_loop(self) -> None:
        """Raise unless models on this device can be used on the running loop.

        Raises:
            UsageError: the device is simulated, and its virtual time is not that of this loop.
        """
        ...

    def prepare_thread(self) -> None:
        """Prepare the calling thread to launch and to poll. Idempotent, and cheap after the first call."""
        ...

    def on_fault(self, callback: Callable[[DeviceError], None]) -> Callable[[], None]:
        """Call `callback` when the device breaks, on the thread that finds the fault.

        Returns a function that removes the callback.
        """
        ...

    def fail(self, error: DeviceError) -> None:
        """Mark the device as broken by `error`, and call the callbacks of `on_fault`. Only the first call has an effect."""
        ...


class CaptureError(Exception):
    """The work runs, but cannot be captured; the message is the reason."""


class BaseGraph(ABC):
    """The steps of a launch in order, for graphs whose copies and events are submitted separately."""

    @abstractmethod
    def replay(self, stream: Stream) -> None:
        """Submit one replay only; `launch` adds its copies and events."""

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

    def prepare(self, results: Sequence[torch.Tensor]) -> None:  # noqa: B027  # most graphs have nothing to prepare
        """Do nothing: there are no copies to prepare. See `Graph.prepare`."""

    def copy_job(self, *_: Any) -> Any | None:
        """Return None: there are no such threads. See `Graph.copy_job`."""
        return None


class BaseDevice(ABC):
    """Defaults of a `Device` that must be polled, with the handling of its fault and its worker threads."""

    fault: DeviceError | None = None
    tells = False
    thread_copy_bytes = LARGE_COPY
    captures = 0

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[DeviceError], None]] = {}
        self._faults_lock = threading.RLock()  # reentrant: a finalizer that runs under it may remove a callback

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
    """Copy new results into the fixed output tensors; replace a tensor in `outputs` where the shape or dtype changed."""
    for i, tensor in enumerate(new):
        if tensor.shape == outputs[i].shape and tensor.dtype == outputs[i].dtype:
            outputs[i].copy_(tensor)
        else:
            outputs[i] = tensor.clone()
