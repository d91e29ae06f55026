"""Instruments for testing a device: a latch that holds its streams, a clock on the device, memory use and versions.

They are for `aiotrt verify` and for tests; models do not use them.
"""

from __future__ import annotations

import platform
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch

from aiotrt.devices import open_device
from aiotrt.devices.base import Device, Stream
from aiotrt.errors import DeviceError

__all__ = ["Latch", "Memory", "StreamClock", "describe", "memory"]

_STATM: Final = Path("/proc/self/statm")
_DRIVER: Final = Path("/proc/driver/nvidia/version")


class Latch:
    """Holds streams until it is opened, so that a test can enter the state "the device is still busy" instead of timing it.

    While a stream is held, nothing may block on it, and on CUDA nothing may synchronize the whole device, which the first
    use of a kernel can do: run the held work once before, without a latch. As an async context manager it opens at the end
    of the block at the latest, so that a failure leaves no stream held.

    Args:
        device: the device of the streams, the host device or a CUDA device, or its name.
    """

    def __init__(self, device: Device | str) -> None:
        self._device = open_device(device)
        self._opened = threading.Event()
        self._value = self._device.pinned((1,), torch.int32).zero_()

    def hold(self, stream: Stream) -> None:
        """Make work that is submitted to `stream` from now on wait for the latch.

        Raises:
            DeviceError: the driver cannot hold a stream.
        """
        if self._device.torch_device.type != "cuda":
            stream.run(self._opened.wait)
            return
        from cuda.bindings import driver

        (status,) = driver.cuStreamWaitValue32(
            stream.handle, self._value.data_ptr(), 1, driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise DeviceError("the driver cannot hold a stream", code=int(status), name=status.name)

    def open(self) -> None:
        """Release all held streams. May be called from any thread, any number of times."""
        self._value.fill_(1)
        self._opened.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open()


class StreamClock:
    """Measures when a stream reaches points in its work, with the GPU's clock on CUDA, else with the CPU's."""

    def __init__(self, device: Device) -> None:
        self._cuda = device.torch_device.type == "cuda"

    def mark(self, stream: Stream) -> Any:
        """Mark the point between work submitted to `stream` before and after this call."""
        if self._cuda:
            return stream.record(torch.cuda.Event(enable_timing=True))
        times: list[float] = []
        stream.run(lambda: times.append(time.perf_counter()))
        return times

    def milliseconds(self, first: Any, last: Any) -> float:
        """Return the milliseconds between two marks that a stream has passed."""
        if self._cuda:
            return float(first.elapsed_time(last))
        return float(last[0] - first[0]) * 1e3


@dataclass(frozen=True)
class Memory:
    """Memory in use at one moment, in bytes; None if unknown.

    Attributes:
        resident: host memory of this process.
        allocated: device memory of torch's allocator.
        used: device memory of all allocators and processes, because TensorRT has its own.
    """

    resident: int | None
    allocated: int | None = None
    used: int | None = None


def memory(device: Device) -> Memory:
    """Measure the memory in use."""
    resident = None
    if _STATM.exists():
        resident = int(_STATM.read_text(encoding="ascii").split()[1]) * 4096
    if device.torch_device.type != "cuda":
        return Memory(resident)
    free, total = torch.cuda.mem_get_info(device.torch_device)
    return Memory(resident, torch.cuda.memory_allocated(device.torch_device), total - free)


def describe(device: Device) -> dict[str, str]:
    """Return the device's name, driver and versions, for a report."""
    where = device.torch_device
    facts = {"name": device.name, "torch": str(torch.__version__), "python": platform.python_version()}
    if where.type != "cuda":
        return facts | {"processor": platform.machine()}
    from cuda import bindings
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    major, minor = torch.cuda.get_device_capability(where)
    return facts | {
        "gpu": torch.cuda.get_device_name(where),
        "compute_capability": f"{major}.{minor}",
        "driver": _driver(),
        "cuda_of_driver": f"{version // 1000}.{version % 1000 // 10}",
        "cuda_of_torch": str(torch.version.cuda),
        "cuda-bindings": str(bindings.__version__),
    }


def _driver() -> str:
    """Read the version of the kernel driver, which the API does not provide."""
    try:
        words = _DRIVER.read_text(encoding="utf-8").split()
    except OSError:
        return "unknown"
    return next((word for word in words if "." in word and word.replace(".", "").isdigit()), "unknown")
