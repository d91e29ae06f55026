"""What an engine of TensorRT's double is made of: enumerations, bases to derive from, and the network that it computes."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

__all__ = [
    "Border",
    "DataType",
    "DynamicShapesKernelSpecializationStrategy",
    "ExecutionContextAllocationStrategy",
    "Extents",
    "ILogger",
    "IOutputAllocator",
    "LayerInformationFormat",
    "MisuseError",
    "Network",
    "Severity",
    "TensorIOMode",
    "TensorLocation",
    "Tensors",
]

Extents: TypeAlias = tuple[int, ...]
Tensors: TypeAlias = dict[str, torch.Tensor]


class MisuseError(AssertionError):
    """What was done would crash TensorRT, corrupt memory, or give nonsense without a word."""


class DataType(enum.Enum):
    """What a tensor's elements are."""

    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    BF16 = 7
    INT64 = 8
    INT4 = 9
    FP4 = 10
    E8M0 = 11


class TensorIOMode(enum.Enum):
    """Whether a tensor goes in or out."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    """Where a tensor's memory is."""

    DEVICE = 0
    HOST = 1


class ExecutionContextAllocationStrategy(enum.Enum):
    """Who allocates activation memory."""

    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class LayerInformationFormat(enum.Enum):
    """How layers are told of."""

    ONELINE = 0
    JSON = 1


class DynamicShapesKernelSpecializationStrategy(enum.Enum):
    """When kernels are compiled for a shape."""

    LAZY = 0
    EAGER = 1
    NONE = 2


class Severity(enum.Enum):
    """How bad a message is."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """The base of loggers; its `__init__` must be called, as the binding's must."""

    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        self.bound = True

    def log(self, severity: Severity, msg: str, /) -> None:
        """Take a message."""
        raise NotImplementedError


class IOutputAllocator:
    """The base of output allocators; likewise."""

    def __init__(self) -> None:
        self.bound = True


@dataclass(frozen=True)
class Border:
    """An input or output of a network.

    Attributes:
        name: its name.
        shape: its extents; -1 where they may differ.
        dtype: a name of TensorRT's `DataType`.
        host: whether it lives in host memory.
        vectorized: the dimension that is packed into vectors, or -1.
        form: how TensorRT would describe its layout.
    """

    name: str
    shape: Extents
    dtype: str = "FLOAT"
    host: bool = False
    vectorized: int = -1
    form: str = "Row major linear format"


@dataclass(frozen=True)
class Network:
    """What an engine of the double computes, and what is wrong with it.

    Attributes:
        inputs: its inputs.
        outputs: its outputs.
        function: from input tensors to output tensors, by name. On shapes alone it runs on torch's meta device.
        profiles: by dynamic input, the smallest, optimal and largest extents.
        values: by host input, the smallest, optimal and largest values, one mapping per profile.
        infer: from the inputs' shapes and host values to the outputs' shapes, -1 where those depend on the data; None to
            run `function` on the meta device.
        capturable: whether it can be enqueued while its stream is being captured (CUDA only).
        host_code: whether it contains code for the host.
        plugin: a plugin that it needs and that nobody has.
        compute: the compute capability it was built for.
        version: the version that wrote it; None for the double's own.
        streamed: bytes of weights that are streamed.
        auxiliary: how many streams it uses beside the one that it is given.
    """

    inputs: tuple[Border, ...]
    outputs: tuple[Border, ...]
    function: Callable[[Tensors], Tensors]
    profiles: tuple[Mapping[str, tuple[Extents, Extents, Extents]], ...] = ({},)
    values: tuple[Mapping[str, tuple[Extents, Extents, Extents]], ...] = ()
    infer: Callable[[Mapping[str, Extents], Mapping[str, list[int]]], Mapping[str, Extents]] | None = None
    capturable: bool = True
    host_code: bool = False
    plugin: str | None = None
    compute: str = "9.0"
    version: str | None = None
    streamed: int = 0
    auxiliary: int = 0

    def border(self, name: str) -> Border | None:
        """The input or output of this name."""
        return next((border for border in (*self.inputs, *self.outputs) if border.name == name), None)
