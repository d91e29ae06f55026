"""The CUDA device: torch for tensors, events and capture; `cuda.bindings` for streams, launches and copies.

Only this file and `cuda_graphs` import CUDA bindings. To launch on a stream, torch needs the stream to be current, and
making it current costs more (16 us, measured on an H200) than the launch itself (2.8 us). So the hot path calls the driver
with the stream's handle.

Two rules keep captures safe, those of aiotrt and those of other code in the process. First, captures are in thread-local
mode, one at a time, on streams that no other code can get. torch's own streams come from a pool and are given out again
and again, so other code could submit to one that is being captured. Second, every thread that polls first exchanges its
capture mode. Without that, measured on an H200, an event query fails with 900 while any thread captures in global mode,
torch's default, and invalidates that capture.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Self, TypeVar

import torch
from cuda.bindings import driver, runtime

from aiotrt._impl import IMPLEMENTATION
from aiotrt._workers import Workers, processors
from aiotrt.devices.base import BaseDevice, BaseGraph, CaptureError, Copies, Event, Graph, Stream
from aiotrt.devices.cuda_graphs import CopyingGraph, DirectGraph, is_plain
from aiotrt.devices.numa import near, stay_near
from aiotrt.errors import AiotrtError, DeviceError

__all__ = ["CudaDevice", "CudaGraph", "CudaStream", "prepare_thread", "query"]

T = TypeVar("T")

_log: Final = logging.getLogger("aiotrt")

ASK_LATER: Final = 900  # cudaErrorStreamCaptureUnsupported: a thread captures; the event's state is unknown
#: Codes of a refused call, after which the context still works; any other code is a fault of the device.
PASSING: Final = frozenset({1, 2, 400, 600, 701, 720, 801, *range(900, 911)})

#: Handles of default streams: the legacy one as 0 and as CU_STREAM_LEGACY, and each thread's as CU_STREAM_PER_THREAD.
DEFAULT_STREAMS: Final = frozenset({0, 1, 2})

#: Threads of the compiled build that copy host inputs and launch: copying in two uses most of the memory's bandwidth.
COPYING_THREADS: Final = 2
#: From how many bytes of host inputs on such a thread copies and launches, while other slots are busy.
COPYING_BYTES: Final = 384 << 10
EXIT_TIMEOUT: Final = 1.0  # seconds that process exit waits for these threads

#: The status of a successful driver call. It is always this object, so the hot path compares by identity.
_DONE: Final = driver.CUresult.CUDA_SUCCESS

_submitter: Any = None  # the module `_submitter`, in a native build, once there is a device
_capture_lock: Final = threading.RLock()
#: Never freed: torch's allocator may go on querying a graph whose capture failed for whether it still captures.
_failed_captures: Final[list[torch.cuda.CUDAGraph]] = []
_thread: Final = threading.local()


class CudaEvent(torch.cuda.Event):
    """An event that is recorded and waited for through the driver, in a quarter of the time that torch takes (0.5 us).

    Attributes:
        driver: the event's handle; None until the first record, at which torch creates the event.
        address: the handle as a number; 0 until the first record.
    """

    driver: Any = None
    address: int = 0

    def __new__(cls) -> Self:
        return super().__new__(cls)  # type: ignore[no-untyped-call, no-any-return, unused-ignore]


class CudaStream:
    """A CUDA stream, made by aiotrt or by other code.

    Args:
        device: the stream's device.
        stream: torch's object of the stream.
        pool: the memory pool of the graphs that are captured on the stream; None until there is one.
        owned: whether aiotrt made the stream, so that the device can reuse it once it is closed.
    """

    def __init__(
        self, device: CudaDevice, stream: torch.cuda.Stream, pool: _Pool | None = None, *, owned: bool = False
    ) -> None:
        self.torch = stream
        self.handle: int = stream.cuda_stream
        self.driver = driver.CUstream(self.handle)  # made once: each driver call would convert a number anew
        self.pool = pool
        self._device = device
        self._owned = owned

    def record(self, event: Event | None = None) -> Event:
        event = CudaEvent() if event is None else event
        if type(event) is CudaEvent and event.driver is not None:
            answer = driver.cuEventRecord(event.driver, self.driver)
            if answer[0] is not _DONE:
                _check("recording an event", answer)
            return event
        assert isinstance(event, torch.cuda.Event), event
        with _faults("recording an event"):
            event.record(self.torch)
        if isinstance(event, CudaEvent):
            event.address = event.cuda_event
            event.driver = driver.CUevent(event.address)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event), event
        if isinstance(event, CudaEvent) and event.driver is not None:
            _check("waiting for an event on a stream", driver.cuStreamWaitEvent(self.driver, event.driver, 0))
            return
        with _faults("waiting for an event on a stream"):
            event.wait(self.torch)

    def query(self) -> bool:
        # No error is raised here: after any status but success the caller submits to the stream, which reports a fault.
        return driver.cuStreamQuery(self.driver)[0] is _DONE

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        if destination.nbytes == 0:  # its address may be null
            return
        if is_plain(source) and destination.is_contiguous() and destination.dtype is source.dtype:
            _check(
                "copying a tensor",
                driver.cuMemcpyAsync(destination.data_ptr(), source.data_ptr(), destination.nbytes, self.driver),
            )
            return
        with _faults("copying a tensor"), self.current(), torch.no_grad():
            destination.copy_(source, non_blocking=True)

    def run(self, function: Callable[[], object]) -> None:
        with _faults("submitting work"), self.current(), torch.no_grad():
            function()

    def current(self) -> contextlib.AbstractContextManager[object]:
        """Return a context in which this is the thread's current stream."""
        # `torch.cuda.stream` makes two Python objects of streams: entering and leaving it takes 15 us on an H200's CPU,
        # and `_Current` 3 us.
        if torch._C._cuda_getDevice() != self.torch.device_index:
            return torch.cuda.stream(self.torch)
        return _Current(self.torch)

    def synchronize(self) -> None:
        with _faults("synchronising a stream"):
            self.torch.synchronize()

    def close(self) -> None:
        if self._owned:
            self._owned = False
            # Reused, not destroyed: torch keeps the memory that it allocated for a stream and in a pool, and gives it to no
            # other stream or pool.
            self._device.idle_streams.append((self.torch, self.pool))

    def __repr__(self) -> str:
        return f"<CudaStream {self.handle:#x} on {self._device.name}>"


class _Current:
    """A context in which a stream of the thread's current GPU is its current stream."""

    __slots__ = ("_before", "_stream")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        self._before = torch._C._cuda_getCurrentStream(self._stream.device_index)
        torch.cuda.set_stream(self._stream)

    def __exit__(self, *error: object) -> None:
        stream, index, kind = self._before
        torch._C._cuda_setStream(stream_id=stream, device_index=index, device_type=kind)


class _DefaultStream(CudaStream):
    """The default stream of a GPU that may not be the current one.

    Its handle means the default stream of the current GPU. So each call makes its own GPU current: without that the driver
    would use the wrong GPU's stream, and order nothing.
    """

    def record(self, event: Event | None = None) -> Event:
        with torch.cuda.device(self._device.index):
            return super().record(event)

    def wait(self, event: Event) -> None:
        with torch.cuda.device(self._device.index):
            super().wait(event)

    def query(self) -> bool:
        with torch.cuda.device(self._device.index):
            return super().query()

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.device(self._device.index):
            super().copy(destination, source)


class _Pool:
    """The memory that the graphs captured on one stream share. They can share it because they never run at the same time.

    torch refuses a pool whose graphs are all gone, and frees its memory only when memory runs short. So each pool keeps one
    graph that is never launched. Thus the next model on the stream captures into the same memory.

    Args:
        index: the device's index; the current stream is the one to capture on.
        graph: the graph to capture for the pool.
    """

    def __init__(self, index: int, graph: torch.cuda.CUDAGraph) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._index = index
        self._graph = graph
        with torch.cuda.stream(torch.cuda.default_stream()):  # on any other one, this could reserve 2 MiB more
            flag = torch.empty(1, device="cuda")
        graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
        try:
            flag.zero_()  # torch warns of a graph with nothing in it
        finally:
            graph.capture_end()

    def abandon(self) -> None:
        """End recording into the pool after a failed capture: without this torch would refuse the next capture into it."""
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self._index, self.handle)


class CudaGraph(BaseGraph):
    """An instantiated CUDA graph.

    Args:
        graph: torch's graph, which owns the memory.
        copying: made from `graph`, where that is possible; with None, torch replays `graph`.
        bare: made from `graph`, without copies; None if `copying` is None or ordered.
        direct: made from `graph`, with copies from and to device memory; None where `bare` is, and if the graph has buffers
            that no node can copy.
        random: the generator state with which the graph draws random numbers; None if it draws none.
        nbytes: the bytes that the capture added to the memory that torch reserves.
    """

    def __init__(
        self,
        graph: torch.cuda.CUDAGraph,
        copying: CopyingGraph | None,
        random: _Random | None,
        nbytes: int,
        bare: DirectGraph | None = None,
        direct: DirectGraph | None = None,
    ) -> None:
        self.nbytes = nbytes
        self._graph = graph
        self._copying = copying
        self._bare = bare
        self._direct = direct
        #: The lists of a program's host memory that `copying` last copied from and to, and the version of `copying` then.
        #: A request with the same lists does not set its copies again.
        self._sources: Any = None
        self._results: Any = None
        self._version = -1
        self._native: Any = None
        if bare is not None and _submitter is not None:
            native = self._native = _native(bare, direct, self.submit)
            self.submit, self.prepare = native.submit, native.prepare  # type: ignore[method-assign]
        self._random = random

    def launch(
        self,
        stream: Stream,
        before: Copies = (),
        after: Copies = (),
        wait: Event | None = None,
        record: Event | None = None,
    ) -> None:
        assert isinstance(stream, CudaStream), stream
        if self._copying is not None:
            before, after = self._copying.set(before, after)
            if self._copying.ordered:
                self._copying.order(_handle(wait), _handle(record, stream))
                wait = record = None
        super().launch(stream, before, after, wait, record)

    def replay(self, stream: Stream) -> None:
        assert isinstance(stream, CudaStream), stream
        if self._copying is not None:
            answer = driver.cuGraphLaunch(self._copying.handle, stream.driver)
            if answer[0] is not _DONE:
                _check("launching a graph", answer)
        elif self._random is None:
            stream.run(self._graph.replay)
        else:
            with self._random.drawn():
                stream.run(self._graph.replay)  # torch's own replay passes the kernels their seed

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
        # Inlined, because it runs for each call: the same steps as in `BaseGraph.submit`, in the same order.
        graph: Any = self._direct if results else None if sources else self._bare
        is_set = sources is self._sources and self._is_set(results)
        if is_set:
            graph = self._copying
        if graph is None or type(stream) is not CudaStream or type(event) is not CudaEvent or event.driver is None:
            self._submit_and_remember(stream, origin, mark, inputs, sources, outputs, results, event)
            return
        handle = graph.handle
        if results and not is_set:
            if len(sources) != len(graph.inputs) or len(results) != len(graph.outputs):
                raise RuntimeError(
                    f"{len(graph.inputs)} inputs and {len(graph.outputs)} results, not {len(sources)} and {len(results)}"
                )
            for port, tensor in zip(graph.inputs + graph.outputs, [*sources, *results]):  # noqa: B905
                address = tensor.data_ptr()
                if address != port.now:
                    if not tensor.is_cuda:  # only `copying` has nodes for pinned memory
                        self._submit_and_remember(stream, origin, mark, inputs, sources, outputs, results, event)
                        return
                    port.point(handle, address)
        if origin is not None and (
            driver.cuStreamQuery(origin.driver)[0] is not _DONE if type(origin) is CudaStream else not origin.query()
        ):
            origin.record(mark)
            stream.wait(mark)
        answer = driver.cuGraphLaunch(handle, stream.driver)
        if answer[0] is not _DONE:
            _check("launching a graph", answer)
        answer = driver.cuEventRecord(event.driver, stream.driver)
        if answer[0] is not _DONE:
            _check("recording an event", answer)

    def _is_set(self, results: object) -> bool:
        return results is self._results and self._copying is not None and self._copying.version == self._version

    def _submit_and_remember(self, stream: Any, origin: Any, mark: Any, *copies_and_event: Any) -> None:
        super().submit(stream, origin, mark, *copies_and_event)
        _, sources, _, results, _ = copies_and_event
        self._remember(sources, results)

    def _remember(self, sources: Any, results: Any) -> None:
        """Remember that the graph copies from and to these lists, if they are a program's lists of host memory."""
        copying = self._copying
        if copying is None or copying.ordered or not copying.is_complete or type(sources) is not list:
            return
        for tensor in (*sources, *results):
            if tensor.is_cuda:  # it belongs to a caller: the graph must not keep it alive
                return
        self._sources, self._results, self._version = sources, results, copying.version
        if self._native is not None:
            self._native.remember(copying, int(copying.handle), sources, results)

    def prepare(self, results: Sequence[torch.Tensor]) -> None:
        # An update of an executable graph takes effect from its next launch on.
        graph = self._direct
        if graph is not None:
            for port, tensor in zip(graph.outputs, results, strict=True):
                address = tensor.data_ptr()
                if address != port.now and tensor.is_cuda:
                    port.point(graph.handle, address)

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
        copying = self._copying
        if _submitter is None or copying is None or copying.ordered or type(event) is not CudaEvent or event.address == 0:
            return None
        if any(destination.dtype != source.dtype or destination.shape != source.shape for destination, source in copies):
            return None
        if sources is not self._sources or not self._is_set(results):
            copying.set(list(zip(inputs, sources, strict=True)), list(zip(results, outputs, strict=True)))
            if not copying.is_complete:
                return None  # some copies are not nodes of the graph
            self._remember(sources, results)
        try:
            return _submitter.CopyJob(
                copies, int(copying.handle), stream.handle, event.address, copying.context, (kept, event),
                COPYING_THREADS, _fail_job, functools.partial(query, event.query),
            )  # fmt: skip
        except (BufferError, TypeError, ValueError):  # an array that is not contiguous, or whose dtype has no buffer
            return None

    def close(self) -> None:
        for name in ("submit", "prepare"):
            self.__dict__.pop(name, None)  # a reference cycle
        for made in (self._copying, self._bare, self._direct):
            if made is not None:
                made.close()
        self._copying = self._bare = self._direct = self._native = self._sources = self._results = None
        self._graph.reset()


class CudaDevice(BaseDevice):
    """One CUDA GPU.

    Args:
        index: torch's index of the GPU.
    """

    unified = False
    submits_from_threads = True

    def __init__(self, index: int) -> None:
        super().__init__()
        torch.cuda.init()
        _load_submitter()
        self.index = index
        if _submitter is not None and processors() > COPYING_THREADS:
            self.thread_copy_bytes = COPYING_BYTES
        self.name = f"cuda:{index}"
        self.torch_device = torch.device("cuda", index)
        self.current_handle = functools.partial(torch._C._cuda_getCurrentRawStream, index)  # type: ignore[method-assign]
        self._near = near(_bus_id(index))
        self._streams: dict[int, CudaStream] = {}  # streams that other code made, by handle
        self.idle_streams: list[tuple[torch.cuda.Stream, _Pool | None]] = []  # our closed streams, to be reused

    def stream(self) -> CudaStream:
        self.prepare_thread()
        pool = None
        try:
            stream, pool = self.idle_streams.pop()
        except IndexError:
            with torch.cuda.device(self.index):
                flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
                (handle,) = _check("creating a stream", driver.cuStreamCreate(flags))
            stream = torch.cuda.ExternalStream(int(handle), device=self.torch_device)
        return CudaStream(self, stream, pool, owned=True)

    def event(self) -> CudaEvent:
        return CudaEvent()

    def current_stream(self) -> CudaStream:
        handle = torch._C._cuda_getCurrentRawStream(self.index)
        return self._streams.get(handle) or self._adopt(torch.cuda.current_stream(self.torch_device))

    def adopt_stream(self, stream: object) -> CudaStream:
        if isinstance(stream, CudaStream):
            return stream
        if isinstance(stream, torch.cuda.Stream):
            return self._adopt(stream)
        protocol = getattr(stream, "__cuda_stream__", None)
        if protocol is not None:
            stream = int(protocol()[1])
        if isinstance(stream, int):
            return self._adopt(torch.cuda.ExternalStream(stream, device=self.torch_device))
        raise TypeError(f"expected a torch.cuda.Stream or an object with __cuda_stream__, got {type(stream).__name__}")

    def query(self, event: Event) -> bool:
        try:
            return event.query()
        except Exception as error:
            return _not_now(error)

    def probe(self, event: Event) -> Callable[[], bool]:
        if _submitter is not None and isinstance(event, CudaEvent):
            probe: Callable[[], bool] = _submitter.Probe(event)
            return probe
        return functools.partial(torch._C._CudaEventBase.query, event)  # type: ignore[arg-type]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=self.torch_device)

    def maker(self, like: torch.Tensor) -> Callable[[], torch.Tensor]:
        if type(like) is torch.Tensor and is_plain(like):
            return functools.partial(torch.empty_like, like)  # one argument to parse: half the time of `torch.empty`
        return functools.partial(torch.empty, tuple(like.shape), dtype=like.dtype, device=self.torch_device)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        with torch.cuda.device(self.index):  # else the memory would belong to another GPU, which may break
            return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        # torch returns False for memory that was registered after its allocation. That is right: its owner may unregister
        # it while the device reads it.
        with contextlib.suppress(RuntimeError):  # a fault: the next submission raises it
            return tensor.is_pinned()
        return False

    def capture(
        self,
        stream: Stream,
        body: Callable[[], Sequence[torch.Tensor]],
        inputs: Sequence[torch.Tensor] = (),
        *,
        ordered: bool = False,
    ) -> tuple[Graph, list[torch.Tensor]]:
        assert isinstance(stream, CudaStream), stream
        with _capture_lock, torch.cuda.device(self.index), torch.cuda.stream(stream.torch), torch.no_grad():
            self.prepare_thread()
            generator = torch.cuda.default_generators[self.index]
            offset = generator.get_offset()
            # Warm up on this stream: the first matrix product fails inside a capture, because cuBLAS allocates memory.
            with _faults("warming up before a capture"):
                body()
                stream.torch.synchronize()
            random = _Random(self.index, draws=generator.get_offset() != offset)
            reserved = torch.cuda.memory_reserved(self.index)
            graph = _graph(random)
            with _no_collection(), random.captured():
                outputs = _record(graph, stream, body, random)
            nbytes = max(0, torch.cuda.memory_reserved(self.index) - reserved)
            copying, bare, direct = _executables(graph, inputs, outputs, ordered=ordered)
            CudaDevice.captures += 1
            return CudaGraph(graph, copying, random if random.draws else None, nbytes, bare, direct), outputs

    def workers(self, count: int) -> Workers:
        return Workers(count, begin=functools.partial(stay_near, self._near))

    def exclusive(self) -> contextlib.AbstractContextManager[object]:
        return _capture_lock

    def call(self, stream: Stream, function: Callable[[], T]) -> T:
        assert isinstance(stream, CudaStream), stream
        self.prepare_thread()
        with _faults("submitting work"), stream.current(), torch.no_grad():
            return function()

    def synchronize(self) -> None:
        with _faults("synchronising"):
            torch.cuda.synchronize(self.torch_device)

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device == self.torch_device

    def is_on_stream(self) -> bool:
        return False  # Python code never runs on a CUDA stream; the current stream orders what it submits

    def prepare_thread(self) -> None:
        prepare_thread(self.index)

    def _adopt(self, stream: torch.cuda.Stream) -> CudaStream:
        handle = stream.cuda_stream
        is_default = handle in DEFAULT_STREAMS and torch.cuda.device_count() > 1
        return self._streams.setdefault(handle, (_DefaultStream if is_default else CudaStream)(self, stream))

    def __repr__(self) -> str:
        return f"<CudaDevice {self.name}: {torch.cuda.get_device_name(self.index)}>"


def _bus_id(index: int) -> str:
    """Return the GPU's PCI bus id, such as ``0000:3B:00.0``; empty if the driver does not know it."""
    status, found = runtime.cudaDeviceGetPCIBusId(32, index)
    return "" if int(status) else bytes(found).partition(b"\0")[0].decode()


def query(probe: Callable[[], bool]) -> bool:
    """Query an event through `probe`; False also if the driver cannot answer now, because a thread captures.

    Raises:
        DeviceError: the driver reported another error.
    """
    try:
        return probe()
    except Exception as error:
        return _not_now(error)


def _not_now(error: Exception) -> bool:
    code, name = _code(error)
    if code == ASK_LATER:
        return False
    raise DeviceError("the device failed while work was pending", code=code, name=name) from error


def prepare_thread(index: int | None = None) -> None:
    """Bind the device's context to the calling thread, and exchange its capture mode; see the module's docstring."""
    done: set[int] = _thread.__dict__.setdefault("done", set())
    if index is None:
        index = torch.cuda.current_device()
    if index in done:
        return
    with torch.cuda.device(index):
        if not done:
            mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            runtime.cudaThreadExchangeStreamCaptureMode(mode)
        # Driver calls need the context, and any runtime call binds it. After a fault this call fails, and so does every
        # later call but those that free: the error is raised there.
        with contextlib.suppress(RuntimeError):
            torch.cuda.current_stream().query()
    done.add(index)


class _Random:
    """The random numbers of one graph. They continue the process's sequence, through the graph's own generator state.

    torch (2.11) marks the generator state that a capture uses, until the capture has ended successfully. Until then, and
    permanently after a failed capture, torch refuses every random number that other code draws from that state, also in
    replays of other graphs. So each capture gets its own state. Before a replay that state is set to the position of the
    process's sequence, and after it the sequence is moved on. So `torch.manual_seed` has the same effect as without a graph.

    The process's generator must have the graph's state only while a body that draws is captured. No other code on this GPU
    can draw then.

    Args:
        index: the device's index.
        draws: whether the body draws random numbers.
    """

    _elsewhere: Final[dict[int, torch.Generator]] = {}  # the process's states, while a capture uses its generators
    _drawing: Final = threading.Lock()

    def __init__(self, index: int, *, draws: bool) -> None:
        self.draws = draws
        self._index = index
        self._generator = torch.cuda.default_generators[index]
        self._sequence = self._generator.graphsafe_get_state()
        self._state = self._sequence.clone_state()

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """Return a context for one capture. The caller calls `begun` directly after the capture has begun."""
        with self._drawing:  # a replay between these two statements would draw from this graph's state
            self._elsewhere[self._index] = self._sequence
            self._generator.graphsafe_set_state(self._state)
        try:
            yield
        finally:
            self._give_back()

    def begun(self) -> None:
        """Give the process's state back after a capture has begun, if its body draws no random numbers."""
        if not self.draws:
            self._give_back()

    @contextlib.contextmanager
    def drawn(self) -> Iterator[None]:
        """Return a context for one replay of the graph."""
        with self._drawing:  # two threads must not draw the same part of the sequence
            sequence = self._elsewhere.get(self._index, self._generator)
            if self._state.initial_seed() != sequence.initial_seed():
                self._state.manual_seed(sequence.initial_seed())
            self._state.set_offset(sequence.get_offset())
            yield
            sequence.set_offset(self._state.get_offset())

    def _give_back(self) -> None:
        with self._drawing:
            self._generator.graphsafe_set_state(self._sequence)
            self._elsewhere.pop(self._index, None)


def _graph(random: _Random) -> torch.cuda.CUDAGraph:
    """Make a graph to capture into. torch replays a graph that draws random numbers; others keep the captured graph."""
    if not random.draws:
        with contextlib.suppress(TypeError):  # an older torch
            return torch.cuda.CUDAGraph(keep_graph=True)
    return torch.cuda.CUDAGraph()


def _load_submitter() -> None:
    """In a native build, import the compiled module that submits, and pass it the addresses of the driver's functions.

    Raises:
        ImportError: the driver lacks one of these functions.
    """
    global _submitter  # noqa: PLW0603  # a process has one driver
    if IMPLEMENTATION != "native" or _submitter is not None:
        return
    submitter = importlib.import_module("aiotrt.devices._submitter")
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    addresses = {}
    for name in submitter.NAMES:
        try:
            addresses[name] = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
        except AttributeError:
            raise ImportError(f"the CUDA driver has no {name}: update it, or set AIOTRT_IMPL=python") from None
    submitter.fill(addresses)
    _submitter = submitter
    atexit.register(_end_threads)


def _end_threads() -> None:
    ends = time.monotonic() + EXIT_TIMEOUT
    while _submitter.end() and time.monotonic() < ends:  # a thread may be held by a launch on a device that hangs
        time.sleep(1e-3)


def _native(bare: DirectGraph, direct: DirectGraph | None, fallback: Callable[..., None]) -> Any:
    ports = [] if direct is None else [*direct.inputs, *direct.outputs]
    return _submitter.Submitter(
        int(bare.handle),
        0 if direct is None else int(direct.handle),
        int(bare.context),
        [(int(port.node), port.buffer.data_ptr(), port.buffer.nbytes) for port in ports],
        0 if direct is None else len(direct.inputs),
        fallback,
        _fail,
    )


def _handle(event: Event | None, stream: CudaStream | None = None) -> Any:
    """Return the driver's handle of an event, for a graph's node.

    With `stream`, an event that was never recorded is recorded there, because torch creates it at its first record.
    """
    if event is None:
        return None
    assert isinstance(event, CudaEvent), event
    if event.driver is None and stream is not None:
        stream.record(event)
    return event.driver


def _executables(
    graph: torch.cuda.CUDAGraph, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], *, ordered: bool
) -> tuple[CopyingGraph | None, DirectGraph | None, DirectGraph | None]:
    """Make the executable graphs: for any copies, without copies, and with copies in device memory only.

    All are None if torch has to replay the captured graph. See `CudaGraph` for when the other two are None.
    """
    try:
        raw = int(graph.raw_cuda_graph())
    except (AttributeError, RuntimeError):  # an older torch, or the captured graph was not kept
        return None, None, None
    made: list[CopyingGraph | DirectGraph] = []
    try:
        made.append(copying := CopyingGraph(raw, inputs, outputs, _check, ordered=ordered))
        if ordered:
            return copying, None, None
        made.append(bare := DirectGraph(raw, (), (), _check))
        if not copying.is_whole:
            return copying, bare, None
        return copying, bare, DirectGraph(raw, inputs, outputs, _check)
    except RuntimeError as error:  # the graph has a node that a child graph must not have
        _log.debug("a graph is replayed by torch: %s", error)
        for each in made:
            each.close()
        graph.instantiate()
        return None, None, None
    except BaseException:
        for each in made:
            each.close()
        raise


def _record(
    graph: torch.cuda.CUDAGraph, stream: CudaStream, body: Callable[[], Sequence[torch.Tensor]], random: _Random
) -> list[torch.Tensor]:
    pool = stream.pool
    try:
        if pool is None:
            pool = stream.pool = _Pool(torch.cuda.current_device(), _graph(random))
        graph.capture_begin(pool=pool.handle, capture_error_mode="thread_local")
        random.begun()
        try:
            outputs = list(body())
            if not any(output.numel() for output in outputs):
                torch.zeros(1, device="cuda")  # the graph may be empty, and torch warns of empty graphs
        except BaseException:
            # Ending the capture takes the stream out of capture mode; it raises if the capture was invalidated. The zeros
            # are there because the graph may be empty, and torch warns of empty graphs.
            with contextlib.suppress(Exception):
                torch.zeros(1, device="cuda")
            with contextlib.suppress(Exception):
                graph.capture_end()
            raise
        graph.capture_end()
    except Exception as error:
        # Unrelated later calls would return the error of the failed capture, until it is read twice.
        runtime.cudaGetLastError()
        runtime.cudaGetLastError()
        if pool is not None:
            pool.abandon()
            stream.pool = None
        _failed_captures.append(graph)
        code, name = _code(error)
        if code != -1 and code not in PASSING:
            raise DeviceError("the device failed during a capture", code=code, name=name) from error
        raise CaptureError(_reason(error)) from error
    return outputs


def _reason(error: Exception) -> str:
    """Return the message of aiotrt's own errors, and the first line of others: torch adds advice for other cases."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(line.strip() for line in lines) if isinstance(error, AiotrtError) else lines[0]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    # A garbage collection on this thread could free another graph or event in the middle of the capture, which the driver
    # does not allow. Captures run one after the other, so no other capture enables collection meanwhile.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _faults(doing: str) -> Iterator[None]:
    """Return a context that turns torch's report of a device fault into a `DeviceError`, and lets other errors pass."""
    try:
        yield
    except DeviceError:
        raise
    except Exception as error:
        code, name = _code(error)
        if code == -1 or code in PASSING:
            raise
        raise DeviceError(f"the device failed while {doing}", code=code, name=name) from error


def _check(doing: str, answer: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values of a driver call, or raise its error."""
    status, *values = answer
    code = int(status)
    if code == 0:
        return tuple(values)
    if code in PASSING:
        raise RuntimeError(f"{doing} failed: {status.name} ({code})")
    raise DeviceError(f"the device failed while {doing}", code=code, name=status.name)


def _fail(doing: str, status: int) -> None:
    """Raise the error of a status that the compiled module got."""
    _check(doing, (driver.CUresult(status),))


def _fail_job(doing: str, status: int, is_lost: bool) -> None:
    """Raise the error of a job's status; `is_lost` if the end of the submitted work cannot be detected."""
    try:
        _fail(doing, status)
    except RuntimeError as error:
        if is_lost:
            raise DeviceError(f"a launch by a thread could not be followed up: {error}") from error
        raise


def _code(error: BaseException) -> tuple[int, str]:
    """Return the CUDA status and its name from an exception of torch, CuPy or cuda.core; -1 if there is no status."""
    code = getattr(error, "error_code", getattr(error, "status", None))
    if isinstance(code, int):
        return code, _name(code)
    match = re.search(r"\b(CUDA_ERROR_[A-Z_]+|cudaError[A-Za-z]+)\b", str(error))
    if match is not None:
        for enumeration in (driver.CUresult, runtime.cudaError_t):
            if match[1] in enumeration.__members__:
                return int(enumeration.__members__[match[1]]), match[1]
    return -1, type(error).__name__


def _name(code: int) -> str:
    try:
        return str(runtime.cudaError_t(code).name)
    except ValueError:
        return "unknown"
