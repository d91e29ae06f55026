"""The plain build's calls of the driver and of Linux: cuda.bindings and ctypes."""

from __future__ import annotations

import ctypes
import importlib
import os
import time
from typing import Any, Final

from benchmarks.prototype.core import Slot, System

__all__ = ["CudaSlot", "LinuxSystem"]

EVENT_DISABLE_TIMING: Final = 2
NOT_READY: Final = 600


class CudaSlot(Slot):
    """A slot on CUDA."""

    def __init__(self, estimate: float, graph: int, stream: int) -> None:
        super().__init__(estimate)
        driver = self._driver = importlib.import_module("cuda.bindings.driver")
        self._graph_launch, self._event_record = driver.cuGraphLaunch, driver.cuEventRecord
        self._event_query, self._set_copy = driver.cuEventQuery, driver.cuGraphExecMemcpyNodeSetParams
        self._graph, self._stream = driver.CUgraphExec(graph), driver.CUstream(stream)
        self._event = self._answer("creating an event", driver.cuEventCreate(EVENT_DISABLE_TIMING))
        self._context = self._answer("finding the context", driver.cuCtxGetCurrent())
        self._source = self._destination = 0

    def set_copies(self, node_in: int, node_out: int, into: int, out_of: int, bytes_in: int, bytes_out: int) -> None:
        """Name the graph's copies: nodes, the graph's own addresses, sizes."""
        self._node_in, self._node_out = self._driver.CUgraphNode(node_in), self._driver.CUgraphNode(node_out)
        self._copy_in = self._copy(bytes_in)
        self._copy_in.dstDevice = into
        self._copy_out = self._copy(bytes_out)
        self._copy_out.srcDevice = out_of

    def launch(self) -> int:
        if self._graph_launch(self._graph, self._stream)[0] or self._event_record(self._event, self._stream)[0]:
            raise RuntimeError("launching failed")
        return 0

    def copy_and_launch(self, source: int, destination: int) -> int:
        if self._source != source:
            self._source = self._copy_in.srcDevice = source
            if self._set_copy(self._graph, self._node_in, self._copy_in, self._context)[0]:
                raise RuntimeError("setting the address of the input's copy failed")
        if self._destination != destination:
            self._destination = self._copy_out.dstDevice = destination
            if self._set_copy(self._graph, self._node_out, self._copy_out, self._context)[0]:
                raise RuntimeError("setting the address of the result's copy failed")
        return self.launch()

    def query(self) -> bool:
        status = self._event_query(self._event)[0]
        if not status:
            return True
        if status != NOT_READY:
            raise RuntimeError(f"polling an event: the driver answered {status}")
        return False

    def close(self) -> None:
        self._driver.cuEventDestroy(self._event)

    def _copy(self, nbytes: int) -> Any:
        copy = self._driver.CUDA_MEMCPY3D()
        copy.srcMemoryType = copy.dstMemoryType = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.WidthInBytes, copy.Height, copy.Depth = nbytes, 1, 1
        return copy

    def _answer(self, doing: str, answer: tuple[Any, ...]) -> Any:
        if answer[0]:
            raise RuntimeError(f"{doing}: the driver answered {answer[0]}")
        return answer[1]


class _TimerSpec(ctypes.Structure):
    """The system's struct itimerspec."""

    _fields_ = [(name, ctypes.c_long) for name in ("interval_s", "interval_ns", "value_s", "value_ns")]


class LinuxSystem(System):
    """The monotonic clock and a timerfd."""

    def __init__(self) -> None:
        library = ctypes.PyDLL(None, use_errno=True)  # keeps the interpreter lock: the calls are short
        self._settime = library.timerfd_settime
        self._spec = _TimerSpec()
        self._reference = ctypes.byref(self._spec)
        self.descriptor: int = library.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self.now = time.perf_counter  # type: ignore[method-assign]  # no Python call in between

    def set_timer(self, seconds: float) -> int:
        # 0 would disarm it.
        self._spec.value_s, self._spec.value_ns = divmod(max(1, int(seconds * 1e9)), 1_000_000_000)
        self._settime(self.descriptor, 0, self._reference, None)
        return 0

    def clear(self) -> bool:
        try:
            os.read(self.descriptor, 8)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self.descriptor)
