"""The host device: runs the same programs without a GPU.

Rule 1: the semantics are CUDA's, as `devices.base` states them, so that a program that is correct here is correct on CUDA.
Rule 2: no step is made faster or slower artificially. A stream is a thread, and the functions that it runs should release
the interpreter lock, as torch's and ONNX Runtime's kernels do.

A stream is a worker thread that takes closures from a queue, in order. Recording an event enqueues "mark this record";
waiting for the event enqueues "block until the record is marked". A graph is the captured closure, together with the
tensors that it writes. Host memory is device memory here, so `unified` is true and staging buffers are the inputs
themselves.
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


#: Results of up to this size are copied by numpy, which keeps the interpreter lock. torch releases it for every copy, and
#: the two switches between threads take longer than such a copy.
SMALL_BYTES: Final = 4 << 10


class HostEvent:
    """An event that completes when its stream reaches its last record.

    Each record is a separate object. So a wait keeps the record that it was made for, and recording the event again, on any
    stream, does not affect waits for earlier records.
    """

    __slots__ = ("last",)

    def __init__(self) -> None:
        self.last: _Record | None = None  # None before the first record

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
    """One record of an event. Each call makes one, so it has no `threading.Event`, which takes longer to create."""

    __slots__ = ("_callbacks", "_lock", "error", "is_reached")

    def __init__(self) -> None:
        self.is_reached = False
        self.error: BaseException | None = None  # of the work before it
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.Lock()

    def reach(self, error: BaseException | None) -> None:
        """Mark the record as reached, and call the callbacks."""
        self.error = error
        with self._lock:
            self.is_reached = True
        # Drop the callbacks: they refer to the event, and so to this record, and the cycle would keep their memory until the
        # next garbage collection.
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def when_reached(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the stream's thread when the stream reaches the record, or at once if it has."""
        with self._lock:  # else the stream could reach the record between the check and the append
            if not self.is_reached:
                self._callbacks.append(callback)
                return
        callback()

    def wait(self) -> None:
        """Block until the stream reaches the record."""
        if not self.is_reached:
            reached = threading.Event()
            self.when_reached(reached.set)
            reached.wait()


class HostStream:
    """A worker thread that runs closures in order.

    When a closure raises, the stream keeps the error and attaches it to the next recorded event, from which the waiting
    caller gets it. The stream goes on.
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name or f"aiotrt-stream-{next(_names)}"
        self._work: queue.SimpleQueue[Callable[[_Failure], None] | None] = queue.SimpleQueue()
        # A daemon thread that holds only the queue: a stream that was not closed must not keep the interpreter alive, and
        # must end when it is garbage-collected.
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
        record = event.last  # the last record made before this call; later records do not matter
        if record is not None:
            self._work.put(lambda failure: _block(record))

    def query(self) -> bool:
        return False  # not checked: a wait costs next to nothing here

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self.run(lambda: destination.copy_(source))

    def run(self, function: Callable[[], object]) -> None:
        self._check_open()

        def call(failure: _Failure) -> None:
            try:
                function()
            except BaseException as error:  # it is raised where the next event is awaited, not on this thread
                failure.put(error)

        self._work.put(call)

    def run_and_record(self, function: Callable[[], object], event: Event) -> None:
        """Submit the work of `run` and `record` as one closure."""
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
        if not self._stop.alive:  # closed: a closure that is queued now would never run
            self._thread.join()
            return
        reached = threading.Event()
        self._work.put(lambda failure: reached.set())
        reached.wait()

    def close(self) -> None:
        self._stop()

    def _check_open(self) -> None:
        if not self._stop.alive:  # without this, a caller would wait permanently for work submitted now
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
            # For example SystemExit: raised by a query, it would end the event loop instead of failing the work.
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

    An output whose shape differs from the captured one replaces its tensor in `outputs`. Without a driver, shapes that
    depend on the data have no extra cost.
    """

    def __init__(self, body: Callable[[], Sequence[torch.Tensor]], outputs: list[torch.Tensor]) -> None:
        self._body = body
        self._outputs = outputs
        self._stream: HostStream | None = None  # the stream of the last launch
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
        stream.run_and_record(self._run, event)  # one closure: each one costs a switch of threads

    def _follow(self, stream: Stream) -> None:
        """Make this stream wait for the last launch if that was on another stream, because a graph never overlaps itself."""
        assert isinstance(stream, HostStream), stream
        last, self._stream = self._stream, stream
        if last is not None and last is not stream:
            try:
                stream.wait(last.record())
            except UsageError:  # `last` is closed: its thread ends when its work has
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
        name: its name in messages; a model may use the host as several devices.
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
        self._streams_lock = threading.Lock()  # `current_stream` may add a stream on any thread

    def stream(self) -> HostStream:
        return self._open(None)

    def event(self) -> HostEvent:
        return HostEvent()

    def current_stream(self) -> HostStream:
        # The calling thread itself is not a stream. Its "current stream" is a separate stream, made on first use, on which
        # device-side waits and copies are ordered.
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
        return False  # all tensors in host memory count as the host's

    def is_on_stream(self) -> bool:
        return getattr(_thread, "is_stream", False)

    def prepare_thread(self) -> None:
        pass

    def __repr__(self) -> str:
        return "<HostDevice>" if self.name == "host" else f"<HostDevice {self.name}>"
