"""The devices on which work runs. `open_device` finds one by name; `event_query` also takes events of other libraries."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeAlias

import torch

from aiotrt._install import install_hint
from aiotrt.devices.base import CaptureError, Copies, Device, Event, Graph, Stream
from aiotrt.devices.host import HostDevice, HostEvent
from aiotrt.errors import InputError, MissingDependencyError, UsageError

__all__ = [
    "CaptureError", "Copies", "Device", "Devices", "Event", "Graph", "Stream", "event_query", "is_several", "open_device",
    "open_devices",
]  # fmt: skip

#: The values of the `device` option of `load`: one device, several of the same kind, or ``"cuda:*"``.
Devices: TypeAlias = str | torch.device | Device | Sequence[str | torch.device | Device]

_EXPECTED: Final = "'auto', 'host', 'cuda', 'cuda:<index>', a torch.device or a Device"
_ALL: Final = "cuda:*"

_devices: Final[dict[str, Device]] = {}
_devices_lock = threading.Lock()
_inherited: Final[list[Device]] = []  # the parent process's; never freed: a child process cannot free GPU memory


def open_device(name: str | torch.device | Device = "auto") -> Device:
    """Return the device of this name. The process has one object for each device, so that its models share its faults.

    Args:
        name: ``"auto"`` (the current CUDA device where there is one, else the host), ``"cuda"``, ``"cuda:1"``, ``"host"``,
            or a `torch.device`. A `Device` is returned unchanged.

    Raises:
        UsageError: there is no such device.
        MissingDependencyError: the device needs a package that is not installed.
    """
    if not isinstance(name, (str, torch.device)):
        if not hasattr(name, "torch_device"):
            raise UsageError(f"unknown device {name!r} of type {type(name).__name__}; expected {_EXPECTED}")
        return name
    name = str(name)
    if name in ("host", "cpu") or (name == "auto" and not torch.cuda.is_available()):
        name = "host"
    elif name in ("auto", "cuda") or name.startswith("cuda:"):
        name = _cuda_name(name)
    else:
        raise UsageError(f"unknown device {name!r}; expected {_EXPECTED}")
    with _devices_lock:
        device = _devices.get(name)
        if device is None:
            device = _devices[name] = _make(name)
        return device


def is_several(devices: object) -> bool:
    """Whether `devices` is a list or ``"cuda:*"``, even if it names only one device."""
    return devices == _ALL if isinstance(devices, str) else isinstance(devices, Sequence)


def open_devices(devices: Devices) -> list[Device]:
    """Return the devices of a list, or for ``"cuda:*"`` every GPU that the process sees, including MIG instances.

    A list may contain the host several times. Each entry is then a device of its own; they share the host's processors.

    Raises:
        InputError: the list is empty, names a device twice, or mixes GPUs and the host.
        UsageError, MissingDependencyError: as `open_device`.
    """
    if isinstance(devices, str) and devices == _ALL:
        _cuda_name("cuda")  # raises where there is no CUDA device
        devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    assert isinstance(devices, Sequence)
    if not devices:
        raise InputError("device=[] names no device; expected a list of devices, such as ['cuda:0', 'cuda:1'], or 'cuda:*'")
    opened: list[Device] = []
    hosts = 0
    for name in devices:
        if isinstance(name, (list, tuple)) or is_several(name):
            raise InputError(f"device={devices!r}: expected one device in each place of the list, got {name!r}")
        if str(name) in ("host", "cpu"):
            opened.append(_host(hosts))
            hosts += 1
            continue
        device = open_device(name)
        if device in opened:
            raise InputError(f"device={devices!r} names {device.name} twice; only the host may be listed several times")
        opened.append(device)
    if len({device.unified for device in opened}) > 1:
        raise InputError(f"device={devices!r} mixes GPUs and the host: their results differ in the last bits; use one kind")
    _connect(opened)
    return opened


def _connect(devices: Sequence[Device]) -> None:
    """Enable copies between GPUs without the host, where possible: torch does that with the first copy of each pair."""
    places = [device.torch_device for device in devices if device.torch_device.type == "cuda"]
    for place in places:
        with devices[0].exclusive(), torch.cuda.device(place):
            for device in devices:
                device.prepare_thread()
            for other in places:
                if other != place:
                    torch.zeros(1, device=place).to(other)


def _host(number: int) -> Device:
    """Return the host's device of this number."""
    if number == 0:
        return open_device("host")
    name = f"host:{number}"
    with _devices_lock:
        device = _devices.get(name)
        if device is None:
            device = _devices[name] = HostDevice(name)
        return device


def event_query(event: object) -> Callable[[], bool]:
    """Return a function that queries whether `event` is complete, as `Device.query` does.

    Raises:
        UsageError: aiotrt cannot query an object of this type.
    """
    event = getattr(event, "_trt_produce_event", event)
    if isinstance(event, HostEvent):
        return event.query
    if (probe := getattr(event, "query", None)) is not None and callable(probe):
        return _translated(probe)  # torch.cuda.Event, and events with the same method
    for name in ("is_done", "done"):  # the attributes of cuda.core and of CuPy
        if hasattr(type(event), name) and not callable(getattr(type(event), name)):  # a future's is a method, always true
            return _translated(partial(getattr, event, name))
    raise UsageError(
        f"cannot wait for an object of type {type(event).__name__}: expected a torch.cuda.Event, an event of cuda.core or "
        "CuPy, the event that Lease.launch returned, or a tensor that carries _trt_produce_event"
    )


def _translated(probe: Callable[[], bool]) -> Callable[[], bool]:
    if not torch.cuda.is_available():
        return probe
    from aiotrt.devices.cuda import prepare_thread, query

    prepare_thread()
    return lambda: query(probe)


def _cuda_name(name: str) -> str:
    if not torch.cuda.is_available():
        raise UsageError(f"device {name!r}: torch {torch.__version__} sees no CUDA device here; use device='host'")
    if name in ("auto", "cuda"):
        return f"cuda:{torch.cuda.current_device()}"
    count = torch.cuda.device_count()
    index = name.removeprefix("cuda:")
    if not index.isdigit() or int(index) >= count:
        raise UsageError(f"there is no device {name!r}; torch sees {count} CUDA device{'s' * (count > 1)}")
    return f"cuda:{int(index)}"


def _make(name: str) -> Device:
    if name == "host":
        return HostDevice()
    try:
        from aiotrt.devices.cuda import CudaDevice
    except ImportError as error:
        raise MissingDependencyError(
            f"device {name!r} needs cuda.bindings ({error}); {install_hint('cuda')}, or use device='host'"
        ) from error
    return CudaDevice(int(name.removeprefix("cuda:")))


def _begin_anew() -> None:
    """Forget the parent's devices in a child process, where their threads, and a thread that held the lock, do not exist."""
    global _devices_lock  # noqa: PLW0603  # a process has one
    _inherited.extend(_devices.values())
    _devices.clear()
    _devices_lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)
