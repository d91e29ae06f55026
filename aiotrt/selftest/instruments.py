"""What a device is examined with: a latch that holds its streams, a clock that it reads itself, and what it says of itself.

No model needs any of this to run: it is for `aiotrt verify` and for tests.
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
    """Holds streams until it is opened: "the device is still busy" as a state to enter, not a time to hope for.

    While a stream is held, nothing may block on it, and on CUDA nothing may synchronise the whole device, which the first
    use of a kernel can do: run what is to be held once before that without a latch. As an async context manager it is open
    afterwards at the latest, so that whoever fails holds up nobody else.

    Args:
        device: whose streams; the host device or a CUDA device, or its name.
    """

    def __init__(self, device: Device | str) -> None:
        self._device = open_device(device)
        self._opened = threading.Event()
        self._value = self._device.pinned((1,), torch.int32).zero_()

    def hold(self, stream: Stream) -> None:
        """What is submitted to `stream` from now on waits for the latch.

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
        """Let them go. From any thread, any number of times."""
        self._value.fill_(1)
        self._opened.set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open()


class StreamClock:
    """When a stream reached a point in its work: by the GPU's clock on CUDA, by the host's on the host device."""

    def __init__(self, device: Device) -> None:
        self._cuda = device.torch_device.type == "cuda"

    def mark(self, stream: Stream) -> Any:
        """Mark the point between what was submitted to `stream` before and what will be after."""
        if self._cuda:
            return stream.record(torch.cuda.Event(enable_timing=True))
        times: list[float] = []
        stream.run(lambda: times.append(time.perf_counter()))
        return times

    def milliseconds(self, first: Any, last: Any) -> float:
        """The time between two marks of one stream, which it has passed."""
        if self._cuda:
            return float(first.elapsed_time(last))
        return float(last[0] - first[0]) * 1e3


@dataclass(frozen=True)
class Memory:
    """Memory in use at one moment, in bytes; None where it cannot be told.

    Attributes:
        resident: of this process, on the host.
        allocated: by torch's allocator on the device.
        used: on the device by everybody, other processes included: TensorRT allocates for itself too.
    """

    resident: int | None
    allocated: int | None = None
    used: int | None = None


def memory(device: Device) -> Memory:
    """What is in use now."""
    resident = None
    if _STATM.exists():
        resident = int(_STATM.read_text(encoding="ascii").split()[1]) * 4096
    if device.torch_device.type != "cuda":
        return Memory(resident)
    free, total = torch.cuda.mem_get_info(device.torch_device)
    return Memory(resident, torch.cuda.memory_allocated(device.torch_device), total - free)


def describe(device: Device) -> dict[str, str]:
    """Name, driver and versions, for a report."""
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
    """The kernel driver's version; the API does not tell it."""
    try:
        words = _DRIVER.read_text(encoding="utf-8").split()
    except OSError:
        return "unknown"
    return next((word for word in words if "." in word and word.replace(".", "").isdigit()), "unknown")
