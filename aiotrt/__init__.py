"""aiotrt: ``await model(frame)``, GPU inference for asyncio programs.

Start reading at `aiotrt.model`, the public interface. `aiotrt.runtime.slots` decides which request owns which slot,
`aiotrt.runtime.executor` carries out the decisions, and `aiotrt.completion.hub` detects when work is complete.
"""

from __future__ import annotations

from aiotrt import _build, _impl  # first: `_impl` decides which files the modules below are imported from
from aiotrt.batching.queue import Batching
from aiotrt.buffers import Buffer, Buffers
from aiotrt.building import BuildProgress, build
from aiotrt.completion.hub import wait
from aiotrt.devices import CaptureError, Device, Event, Graph, Stream
from aiotrt.errors import (
    AiotrtError,
    DeadlineError,
    DeviceError,
    DeviceHangError,
    EngineError,
    InputError,
    MissingDependencyError,
    ModelBrokenError,
    ModelClosedError,
    OverloadedError,
    QueueFullError,
    ResourceError,
    UsageError,
)
from aiotrt.lease import Lease
from aiotrt.model import Model, Statistics, load
from aiotrt.run import run
from aiotrt.tensors import TensorSpec

__version__ = _build.__version__

#: The implementation that runs, "native" or "python": whether the modules of the hot path are compiled.
__impl__ = _impl.IMPLEMENTATION

__all__ = [
    "AiotrtError",
    "Batching",
    "Buffer",
    "Buffers",
    "BuildProgress",
    "CaptureError",
    "DeadlineError",
    "Device",
    "DeviceError",
    "DeviceHangError",
    "EngineError",
    "Event",
    "Graph",
    "InputError",
    "Lease",
    "MissingDependencyError",
    "Model",
    "ModelBrokenError",
    "ModelClosedError",
    "OverloadedError",
    "QueueFullError",
    "ResourceError",
    "Statistics",
    "Stream",
    "TensorSpec",
    "UsageError",
    "build",
    "load",
    "run",
    "wait",
]
