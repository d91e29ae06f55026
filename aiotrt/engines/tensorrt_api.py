"""Protocols for exactly the part of TensorRT's Python API that aiotrt uses.

The adapter types TensorRT's objects as these Protocols, so the type checker proves that it uses no other name. `SURFACE` is
derived from them, and is checked against the real classes of every installed product, and against the test double. To use
another call, add it here first.

Three products have this API: `tensorrt` (10.1 and later), `tensorrt_rtx` and `tensorrt_lean`. A call that fails returns
False or None, or raises RuntimeError, depending on the call and the version; the reason is only in the log.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Final, Protocol

import torch

__all__ = [
    "DTYPES",
    "INSPECTOR_SURFACE",
    "PROTOCOLS",
    "RTX_SURFACE",
    "SURFACE",
    "Api",
    "CudaEngine",
    "Enumerator",
    "ExecutionContext",
    "RtxApi",
    "Runtime",
    "RuntimeCache",
    "RuntimeConfig",
    "missing_names",
]

#: TensorRT's name of each dtype that torch can hold.
DTYPES: Final = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8, "UINT8": torch.uint8, "INT32": torch.int32, "INT64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip


class Enumerator(Protocol):
    """A member of one of TensorRT's enumerations."""

    @property
    def name(self) -> str: ...


class ExecutionContext(Protocol):
    """One execution of an engine: its shapes, addresses and activation memory."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int, /) -> bool: ...
    def set_input_shape(self, name: str, shape: tuple[int, ...], /) -> bool: ...
    def infer_shapes(self) -> Sequence[str]: ...
    def get_tensor_shape(self, name: str, /) -> Sequence[int]: ...
    def get_tensor_strides(self, name: str, /) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, memory: int, /) -> bool: ...
    def set_output_allocator(self, name: str, output_allocator: Any, /) -> bool: ...
    def set_device_memory(self, memory: int, size: int, /) -> None: ...
    def set_aux_streams(self, aux_streams: Sequence[int], /) -> None: ...
    def execute_async_v3(self, stream_handle: int, /) -> bool: ...


class RuntimeCache(Protocol):
    """The kernels that were compiled for an engine; TensorRT-RTX only."""

    def serialize(self) -> Any: ...
    def deserialize(self, blob: bytes, /) -> bool: ...


class RuntimeConfig(Protocol):
    """The configuration of new contexts; TensorRT-RTX only."""

    dynamic_shapes_kernel_specialization_strategy: Enumerator

    def set_execution_context_allocation_strategy(self, strategy: Enumerator, /) -> None: ...
    def create_runtime_cache(self) -> RuntimeCache: ...
    def set_runtime_cache(self, cache: RuntimeCache, /) -> bool: ...


class CudaEngine(Protocol):
    """A deserialised engine."""

    @property
    def num_io_tensors(self) -> int: ...
    @property
    def num_optimization_profiles(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_aux_streams(self) -> int: ...
    @property
    def device_memory_size_v2(self) -> int: ...
    @property
    def streamable_weights_size(self) -> int: ...
    @property
    def weight_streaming_budget_v2(self) -> int: ...

    def get_tensor_name(self, index: int, /) -> str: ...
    def get_tensor_mode(self, name: str, /) -> Enumerator: ...
    def get_tensor_dtype(self, name: str, /) -> Enumerator: ...
    def get_tensor_shape(self, name: str, /) -> Sequence[int]: ...
    def get_tensor_location(self, name: str, /) -> Enumerator: ...
    def get_tensor_vectorized_dim(self, name: str, profile_index: int, /) -> int: ...
    def get_tensor_format_desc(self, name: str, profile_index: int, /) -> str: ...
    def get_tensor_profile_shape(self, name: str, profile_index: int, /) -> Sequence[Sequence[int]]: ...

    # The binding's docstring has the two parameters swapped; by position the index comes first.
    def get_tensor_profile_values(self, profile_index: int, name: str, /) -> Sequence[Sequence[int]]: ...

    # TensorRT-RTX takes either; the other products take the strategy, in every version.
    def create_execution_context(self, how: Enumerator | RuntimeConfig, /) -> ExecutionContext | None: ...
    def create_runtime_config(self) -> RuntimeConfig: ...
    def create_engine_inspector(self) -> EngineInspector: ...


class EngineInspector(Protocol):
    """An inspector, which reports an engine's layers."""

    def get_engine_information(self, format: Enumerator, /) -> str: ...  # noqa: A002


class Runtime(Protocol):
    """A runtime, which deserialises engines."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: bytes | memoryview, /) -> CudaEngine | None: ...


class Severities(Protocol):
    """`ILogger`: the base of loggers, and the severities."""

    INTERNAL_ERROR: Enumerator
    ERROR: Enumerator
    WARNING: Enumerator
    INFO: Enumerator
    VERBOSE: Enumerator

    def log(self, severity: Enumerator, msg: str, /) -> None: ...


class TensorModes(Protocol):
    """`TensorIOMode`."""

    INPUT: Enumerator


class TensorLocations(Protocol):
    """`TensorLocation`."""

    HOST: Enumerator


class AllocationStrategies(Protocol):
    """`ExecutionContextAllocationStrategy`."""

    USER_MANAGED: Enumerator


class InformationFormats(Protocol):
    """`LayerInformationFormat`."""

    JSON: Enumerator


class SpecializationStrategies(Protocol):
    """`DynamicShapesKernelSpecializationStrategy`; TensorRT-RTX only."""

    EAGER: Enumerator


class Api(Protocol):
    """The module `tensorrt`, `tensorrt_rtx` or `tensorrt_lean`."""

    __name__: str
    __version__: str
    ILogger: Severities
    IOutputAllocator: Any
    TensorIOMode: TensorModes
    TensorLocation: TensorLocations
    ExecutionContextAllocationStrategy: AllocationStrategies
    LayerInformationFormat: InformationFormats

    def Runtime(self, logger: Any, /) -> Runtime: ...  # noqa: N802


class RtxApi(Api, Protocol):
    """The module `tensorrt_rtx`, with the names that only it has."""

    DynamicShapesKernelSpecializationStrategy: SpecializationStrategies


def _names(protocol: type) -> tuple[str, ...]:
    names = {**protocol.__dict__, **inspect.get_annotations(protocol)}
    return tuple(name for name in names if not name.startswith("_"))


#: The Protocols by the name of TensorRT's class; the module itself is "".
PROTOCOLS: Final[dict[str, type]] = {
    "": Api,
    "Runtime": Runtime,
    "ICudaEngine": CudaEngine,
    "IExecutionContext": ExecutionContext,
    "ILogger": Severities,
    "TensorIOMode": TensorModes,
    "TensorLocation": TensorLocations,
    "ExecutionContextAllocationStrategy": AllocationStrategies,
    "EngineInspector": EngineInspector,
    "LayerInformationFormat": InformationFormats,
    "IRuntimeConfig": RuntimeConfig,
    "IRuntimeCache": RuntimeCache,
    "DynamicShapesKernelSpecializationStrategy": SpecializationStrategies,
}
#: The names that the adapter uses of TensorRT-RTX only, by class.
RTX_SURFACE: Final[dict[str, tuple[str, ...]]] = {
    "": ("DynamicShapesKernelSpecializationStrategy",),
    "ICudaEngine": ("create_runtime_config",),
    "IRuntimeConfig": _names(RuntimeConfig),
    "IRuntimeCache": _names(RuntimeCache),
    "DynamicShapesKernelSpecializationStrategy": _names(SpecializationStrategies),
}
#: The names that the adapter uses of every product, by class.
SURFACE: Final[dict[str, tuple[str, ...]]] = {
    **{
        holder: tuple(name for name in _names(protocol) if name not in RTX_SURFACE.get(holder, ()))
        for holder, protocol in PROTOCOLS.items()
        if holder not in ("IRuntimeConfig", "IRuntimeCache", "DynamicShapesKernelSpecializationStrategy", "EngineInspector")
    },
    "DataType": tuple(DTYPES),
}
#: The names that the adapter uses of every product but the lean runtime, which has no inspector.
INSPECTOR_SURFACE: Final[dict[str, tuple[str, ...]]] = {"EngineInspector": _names(EngineInspector)}


def missing_names(api: object, surface: dict[str, tuple[str, ...]]) -> list[str]:
    """Return the names of `surface` that a module lacks, as dotted names."""
    return [
        f"{holder}.{name}".removeprefix(".")
        for holder, names in surface.items()
        for name in names
        if not hasattr(getattr(api, holder, None) if holder else api, name)
    ]
