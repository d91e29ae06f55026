"""Devices: where work runs. `open_device` finds one by name; `event_query` understands anybody's events."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Final

import torch

from aiotrt._install import install_hint
from aiotrt.devices.base import CaptureError, Copies, Device, Event, Graph, Stream
from aiotrt.devices.host import HostDevice, HostEvent
from aiotrt.errors import MissingDependencyError, UsageError

__all__ = ["CaptureError", "Copies", "Device", "Event", "Graph", "Stream", "event_query", "open_device"]

_EXPECTED: Final = "'auto', 'host', 'cuda', 'cuda:<index>', a torch.device or a Device"

_devices: Final[dict[str, Device]] = {}
_devices_lock = threading.Lock()
_inherited: Final[list[Device]] = []  # of the parent process; never freed, since on a GPU that cannot be done from here


def open_device(name: str | torch.device | Device = "auto") -> Device:
    """The device of this name; one object per device in the process, so that all models on it share its faults.

    Args:
        name: ``"auto"`` (the current CUDA device where there is one, else the host), ``"cuda"``, ``"cuda:1"``, ``"host"``,
            or a `torch.device`; a `Device` is itself.

    Raises:
        UsageError: there is no such device.
        MissingDependencyError: it needs a package that is not installed.
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


def event_query(event: object) -> Callable[[], bool]:
    """A function that asks `event` whether it is complete, and answers as `Device.query` does.

    Raises:
        UsageError: nothing here knows how to ask it.
    """
    event = getattr(event, "_trt_produce_event", event)
    if isinstance(event, HostEvent):
        return event.query
    if (probe := getattr(event, "query", None)) is not None and callable(probe):
        return _translated(probe)  # torch.cuda.Event, and whatever follows its example
    for name in ("is_done", "done"):  # of cuda.core, and of CuPy
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
    """In a child process: the parent's devices have threads that are not here, and whoever held the lock is not either."""
    global _devices_lock  # noqa: PLW0603  # a process has one
    _inherited.extend(_devices.values())
    _devices.clear()
    _devices_lock = threading.Lock()


os.register_at_fork(after_in_child=_begin_anew)
