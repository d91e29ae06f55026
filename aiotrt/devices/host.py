"""The host device: the same program, with no GPU.

Rule 1: the semantics are CUDA's, as `devices.base` states them, so what is correct here is correct there.
Rule 2: nothing here is faster or slower on purpose; a stream is a thread, and what it runs should release the
interpreter lock, as torch's and ONNX Runtime's kernels do.

A stream is a worker thread that takes closures from a queue, in order. Recording an event enqueues "mark this record",
waiting for it enqueues "block until it is marked". A graph is the closure that was captured, together with the tensors it
writes. Host memory is device memory here, so `unified` is true and staging buffers are the inputs themselves.
"""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Final, TypeVar

import numpy as np
import torch

from aiotrt.devices.base import BaseDevice, BaseGraph, Event, Graph, Stream, write_back
from aiotrt.errors import ResourceError, UsageError

__all__ = ["HostDevice", "HostEvent", "HostGraph", "HostStream"]

T = TypeVar("T")

_names: Final = itertools.count()
_thread: Final = threading.local()


#: Results of this size are copied by numpy, which keeps the interpreter lock. torch hands it back for every copy, and two
#: switches of threads take longer than to copy as much.
SMALL_BYTES: Final = 4 << 10


class HostEvent:
    """An event that completes when its stream reaches it.

    Each record is an object of its own. So a wait keeps the record that it was made for, and recording again, on whatever
    stream, moves the event on without touching who waits for the record before.
    """

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: _Record | None = None  # the last recording

    def query(self) -> bool:
        record = self.last
        if record is None:
            return True
        if not record.is_reached:
            return False
        if record.error is not None:
            raise record.error
        return True

    def synchronize(self) -> None:
        record = self.last
        if record is not None:
            record.wait()
            if record.error is not None:
                raise record.error


class _Record:
    """One recording of an event. A call makes one, so it has no `threading.Event` of its own, which takes longer to make."""

    __slots__ = ("_callbacks", "_lock", "error", "is_reached")

    def __init__(self) -> None:
        self.is_reached = False
        self.error: BaseException | None = None  # of the work before it
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def reach(self, error: BaseException | None) -> None:
        """The stream is there; tell everybody."""
        self.error = error
        with self._lock:
            self.is_reached = True
        # Let go of: who waited refers to the event, and so to this, and its memory would wait for a garbage collection.
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def when_reached(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the stream's thread when it is there, or at once if it is."""
        with self._lock:  # or the stream could come by between the question and the entry
            if not self.is_reached:
                self._callbacks.append(callback)
                return
        callback()

    def wait(self) -> None:
        """Block until the stream is there."""
        if not self.is_reached:
            reached = threading.Event()
            self.when_reached(reached.set)
            reached.wait()


class HostStream:
    """A worker thread that runs closures in order.

    When a closure raises, the error is kept and attached to the next event recorded: that is how a failure reaches the
    one who waits for it. The stream goes on.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name or f"aiotrt-stream-{next(_names)}"
        self._work: queue.SimpleQueue[Callable[[_Failure], None] | None] = queue.SimpleQueue()
        # Daemonic, and holding only the queue: a stream that nobody closed must not keep the interpreter alive, and must
        # end when it is garbage.
        self._thread = threading.Thread(target=_serve, args=(self._work,), name=self.name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise ResourceError(f"no thread could be started for a stream: {error}; too many threads are running") from error
        self._stop = weakref.finalize(self, self._work.put, None)

    @property
    def handle(self) -> int:
        return id(self)

    def record(self, event: Event | None = None) -> Event:
        event = HostEvent() if event is None else event
        assert isinstance(event, HostEvent), event
        self._check_open()
        record = event.last = _Record()

        def mark(failure: _Failure) -> None:
            record.reach(failure.take())

        self._work.put(mark)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, HostEvent), event
        self._check_open()
        record = event.last  # the last one made before this call, whatever is recorded later
        if record is not None:
            self._work.put(lambda failure: _block(record))

    def query(self) -> bool:
        return False  # ordering costs nothing here

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.run(lambda: destination.copy_(source))

    def run(self, function: Callable[[], object]) -> None:
        self._check_open()

        def call(failure: _Failure) -> None:
            try:
                function()
            except BaseException as error:  # it belongs to whoever waits for the next event, not to this thread
                failure.put(error)

        self._work.put(call)

    def run_and_record(self, function: Callable[[], object], event: Event) -> None:
        """Submit what `run` and `record` do, as one piece of work."""
        assert isinstance(event, HostEvent), event
        self._check_open()
        record = event.last = _Record()

        def call(failure: _Failure) -> None:
            try:
                function()
            except BaseException as error:
                failure.put(error)
            record.reach(failure.take())

        self._work.put(call)

    def synchronize(self) -> None:
        if not self._stop.alive:  # what is queued behind the end is never reached
            self._thread.join()
            return
        reached = threading.Event()
        self._work.put(lambda failure: reached.set())
        reached.wait()

    def close(self) -> None:
        self._stop()

    def _check_open(self) -> None:
        if not self._stop.alive:  # without this, whoever waits for what is submitted now would wait for ever
            raise UsageError(f"stream {self.name} is closed")

    def __repr__(self) -> str:
        return f"<HostStream {self.name}>"


class _Failure:
    """The error of a stream's closures since the last record."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def put(self, error: BaseException) -> None:
        if self._error is not None:
            return
        if isinstance(error, Exception):
            self._error = error
        else:
            # A SystemExit, say. Raised by a query, it would end whichever loop asks, and not be the work's failure.
            self._error = RuntimeError(f"the work raised {type(error).__name__}: {error}")
            self._error.__cause__ = error

    def take(self) -> BaseException | None:
        error, self._error = self._error, None
        return error


def _block(record: _Record) -> None:
    record.wait()


def _serve(work: queue.SimpleQueue[Callable[[_Failure], None] | None]) -> None:
    failure = _Failure()
    _thread.is_stream = True
    with torch.no_grad():
        while (item := work.get()) is not None:
            item(failure)
            del item  # a finished closure must not keep its tensors alive until the next one comes


class HostGraph(BaseGraph):
    """A recorded closure, and the tensors it writes.

    An output whose shape differs from the captured one replaces its tensor in `outputs`: where there is no driver,
    shapes that depend on the data cost nothing more.
    """

    def __init__(self, body: Callable[[], Sequence[torch.Tensor]], outputs: list[torch.Tensor]) -> None:
        self._body = body
        self._outputs = outputs
        self._stream: HostStream | None = None  # of the last launch
        self.nbytes = sum(t.numel() * t.element_size() for t in outputs)

    def replay(self, stream: Stream) -> None:
        self._follow(stream)
        stream.run(self._run)

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
        if origin is not None or sources or results or not isinstance(stream, HostStream):
            super().submit(stream, origin, mark, inputs, sources, outputs, results, event)
            return
        self._follow(stream)
        stream.run_and_record(self._run, event)  # one piece of work: each that the stream's thread takes costs a switch

    def _follow(self, stream: Stream) -> None:
        """A graph never overlaps itself: make this stream wait for the last launch, if that was on another one."""
        assert isinstance(stream, HostStream), stream
        last, self._stream = self._stream, stream
        if last is not None and last is not stream:
            try:
                stream.wait(last.record())
            except UsageError:  # it is closed, and ends when its work has
                stream.run(last.synchronize)

    def _run(self) -> None:
        new = self._body()
        if self.nbytes <= SMALL_BYTES and all(
            tensor.shape == output.shape and tensor.dtype == output.dtype
            for tensor, output in zip(new, self._outputs, strict=True)
        ):
            try:
                for tensor, output in zip(new, self._outputs, strict=True):
                    np.copyto(output.numpy(), tensor.numpy())
                return
            except (RuntimeError, TypeError):  # a lazy flag, a gradient, or a dtype that numpy lacks
                pass
        write_back(self._outputs, new)

    def close(self) -> None:
        pass


class HostDevice(BaseDevice):
    """This machine's processors and memory, as a device.

    Args:
        name: what messages call it; a model may use the host as several devices.
    """

    torch_device = torch.device("cpu")
    unified = True
    submits_from_threads = False
    tells = True

    def __init__(self, name: str = "host") -> None:
        super().__init__()
        self.name = name
        self._local = threading.local()
        self._streams: weakref.WeakSet[HostStream] = weakref.WeakSet()
        self._streams_lock = threading.Lock()  # each thread that asks for its current stream may add one

    def stream(self) -> HostStream:
        return self._open(None)

    def event(self) -> HostEvent:
        return HostEvent()

    def current_stream(self) -> HostStream:
        # The calling thread itself is not a stream: what stands in for "the caller's current stream" is a stream of its
        # own, made on first use, on which device-side waits and copies are ordered.
        stream: HostStream | None = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = self._open(f"aiotrt-current-{threading.current_thread().name}")
        return stream

    def _open(self, name: str | None) -> HostStream:
        stream = HostStream(name)
        with self._streams_lock:
            self._streams.add(stream)
        return stream

    def adopt_stream(self, stream: object) -> HostStream:
        if not isinstance(stream, HostStream):
            raise TypeError(f"expected a stream of the host device (Model.stream()), got {type(stream).__name__}")
        return stream

    def query(self, event: Event) -> bool:
        return event.query()

    def when_complete(self, event: Event, callback: Callable[[], None]) -> None:
        assert isinstance(event, HostEvent), event
        if event.last is None:
            callback()
        else:
            event.last.when_reached(callback)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    pinned = empty

    def capture(
        self,
        stream: Stream,
        body: Callable[[], Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor] = (),
        *,
        ordered: bool = False,
    ) -> tuple[Graph, list[torch.Tensor]]:
        outputs = [t.clone(memory_format=torch.contiguous_format) for t in self.call(stream, body)]
        return HostGraph(body, outputs), outputs

    def call(self, stream: Stream, function: Callable[[], T]) -> T:
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(function())
            except BaseException as error:
                done.set_exception(error)

        stream.run(call)
        return done.result()

    def synchronize(self) -> None:
        with self._streams_lock:
            streams = list(self._streams)
        for stream in streams:
            stream.synchronize()

    def holds(self, tensor: torch.Tensor) -> bool:
        return False  # whatever is in host memory came from the host

    def is_on_stream(self) -> bool:
        return getattr(_thread, "is_stream", False)

    def prepare_thread(self) -> None:
        pass

    def __repr__(self) -> str:
        return "<HostDevice>" if self.name == "host" else f"<HostDevice {self.name}>"
