"""A double of TensorRT's runtime: the same names, real work on the raw addresses and the raw stream, and no GPU needed.

    double = TensorRTDouble("tensorrt_rtx")
    path.write_bytes(double.plan(Network(inputs=(Border("x", (-1, 4)),), outputs=(Border("y", (-1, 4)),), function=...)))
    engine = TensorRTEngine(path, device, runtime_module=double, require_cuda=False)

Rule 1: its names and signatures are those of `aiotrt.engines.tensorrt_api`, which are checked against the real classes.
Rule 2: where TensorRT answers False or None and writes to its log, so does this; where TensorRT raises, so does this.
Rule 3: where TensorRT crashes, corrupts memory or silently computes nonsense, this raises `MisuseError`.

It reads its inputs and writes its outputs at the addresses that it is given, on CUDA on the stream whose handle it is
given, and it computes in the activation memory that it is given, so a wrong one shows. What it makes of a damaged file is
its own: a checksum.
"""

from __future__ import annotations

import hashlib
import json
import math
import weakref
from collections import Counter
from typing import Any, Final

import torch

from aiotrt.engines.tensorrt_api import DTYPES
from tests.tensorrt.context import ExecutionContext, Failure, Part
from tests.tensorrt.network import (
    Border,
    DataType,
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    ILogger,
    IOutputAllocator,
    LayerInformationFormat,
    MisuseError,
    Network,
    TensorIOMode,
    TensorLocation,
)

__all__ = ["Border", "MisuseError", "Network", "TensorRTDouble"]

_TAGS: Final = {"tensorrt": b"ftrt", "tensorrt_lean": b"ftrt", "tensorrt_rtx": b"vtrt"}


class TensorRTDouble:
    """What stands in for the module `tensorrt`, `tensorrt_rtx` or `tensorrt_lean`.

    Args:
        product: the module's name.
        version: four numbers.
        compute: the compute capability of the GPU that it plays.
        device: where the addresses that it is given point to.

    Attributes:
        calls: how often each call was made.
        ended: "context", "engine" and "runtime", in the order in which they were destroyed.
        enqueued: the stream handle of every run.
    """

    DataType = DataType
    TensorIOMode = TensorIOMode
    TensorLocation = TensorLocation
    LayerInformationFormat = LayerInformationFormat
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    ILogger = ILogger
    IOutputAllocator = IOutputAllocator

    def __init__(
        self,
        product: str = "tensorrt_rtx",
        version: str = "1.6.1.120",
        compute: str = "9.0",
        device: torch.device | str = "cpu",
    ) -> None:
        self.__name__ = product
        self.__version__ = version
        self.compute = compute
        self.device = torch.device(device)
        self.calls: Counter[str] = Counter()
        self.ended: list[str] = []
        self.enqueued: list[int] = []
        self.Runtime = type("Runtime", (Runtime,), {"_double": self})
        self.ICudaEngine = CudaEngine
        self.EngineInspector = EngineInspector
        self.IExecutionContext = ExecutionContext
        if product == "tensorrt_rtx":
            self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy
            self.IRuntimeConfig = RuntimeConfig
            self.IRuntimeCache = RuntimeCache
        self._networks: list[Network] = []
        self.failures: dict[str, Failure] = {}

    def plan(self, network: Network) -> bytes:
        """A serialised engine that only this double can read, under a header as the product writes it."""
        self._networks.append(network)
        tag = _TAGS[self.__name__]
        version = bytes(int(part) for part in (network.version or self.__version__).split("."))
        payload = (len(self._networks) - 1).to_bytes(8, "little") + bytes(range(256))
        size = 64 + len(payload) + 32
        header = tag + bytes(4) + (2).to_bytes(8, "little") + size.to_bytes(8, "little") + version + tag
        body = header.ljust(64, b"\0") + payload
        return body + hashlib.sha256(body).digest()

    def fail(self, call: str, answer: object, *, after: int = 0, message: str = "injected failure") -> None:
        """Make a call answer this, or raise it where it is an exception, from the `after`-th on; and log `message`."""
        self.failures[call] = Failure(answer, self.calls[call] + after, message)

    def mend(self) -> None:
        """Let nothing fail any more."""
        self.failures.clear()


class Runtime:
    """`Runtime`."""

    _double: TensorRTDouble

    def __init__(self, logger: ILogger, /) -> None:
        if not getattr(logger, "bound", False):
            raise MisuseError("a logger whose base was not initialised")
        self._part = Part(self._double, logger)
        self._allowed = False
        self._part.point("Runtime")
        weakref.finalize(self, self._double.ended.append, "runtime")

    @property
    def engine_host_code_allowed(self) -> bool:
        """Whether engines with host code may be loaded."""
        return self._allowed

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, allowed: bool) -> None:
        self._allowed = allowed

    def deserialize_cuda_engine(self, serialized_engine: bytes | memoryview, /) -> CudaEngine | None:
        """Load an engine; None where it cannot be."""
        part, double = self._part, self._double
        if part.point("deserialize_cuda_engine"):
            return None
        data = bytes(serialized_engine)
        refusal = self._refusal(data)
        if refusal is not None:
            part.log(refusal)
            return None
        return CudaEngine(double, part.logger, double._networks[int.from_bytes(data[64:72], "little")], self)

    def _refusal(self, data: bytes) -> str | None:
        double = self._double
        if data[:4] != _TAGS[double.__name__]:
            return "Error Code 1: Serialization (Serialization assertion plan->header.magicTag failed.)"
        if len(data) < 128 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
            return "Error Code 1: Serialization (Serialization assertion failed: the checksum does not match.)"
        network = double._networks[int.from_bytes(data[64:72], "little")]
        version = ".".join(map(str, data[24:28]))
        if version != double.__version__:
            return f"Error Code 6: expecting library version {double.__version__} got {version}, please rebuild."
        if network.compute != double.compute:
            return f"Error Code 6: incompatible device, expecting compute {double.compute} got compute {network.compute}"
        if network.host_code and not self._allowed:
            return "Error Code 3: the engine contains host code, and engineHostCodeAllowed is not set"
        if network.plugin is not None:
            return f"Error Code 4: Cannot find plugin: {network.plugin}, version: 1"
        return None


class RuntimeCache:
    """`IRuntimeCache`: the shapes that were compiled for, one line each."""

    def __init__(self, double: TensorRTDouble) -> None:
        self._stamp = f"{double.__version__} {double.compute}".encode()
        self.compiled: set[bytes] = set()
        self._is_reversed = False

    def serialize(self) -> bytes:
        """All of it; as with the real one, the same kernels are other bytes each time."""
        self._is_reversed = not self._is_reversed
        return b"\n".join([self._stamp, *sorted(self.compiled, reverse=self._is_reversed)])

    def deserialize(self, blob: bytes, /) -> bool:
        """Take what another one serialised; False where that is damaged, or for another version or GPU."""
        stamp, *compiled = bytes(blob).split(b"\n")
        if stamp != self._stamp:
            return False
        self.compiled |= set(compiled)
        return True


class RuntimeConfig:
    """`IRuntimeConfig`."""

    def __init__(self, double: TensorRTDouble) -> None:
        self._double = double
        self.cache: RuntimeCache | None = None
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self._specialization = DynamicShapesKernelSpecializationStrategy.LAZY

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> DynamicShapesKernelSpecializationStrategy:
        """When kernels are compiled for a shape."""
        return self._specialization

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, strategy: DynamicShapesKernelSpecializationStrategy) -> None:
        self._specialization = DynamicShapesKernelSpecializationStrategy(strategy)

    def create_runtime_cache(self) -> RuntimeCache:
        """A new cache, which no context uses yet."""
        return RuntimeCache(self._double)

    def set_runtime_cache(self, cache: RuntimeCache, /) -> bool:
        """Have the contexts made with this use it."""
        self.cache = cache
        return True

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy, /) -> None:
        """Say who allocates activation memory."""
        self.strategy = ExecutionContextAllocationStrategy(strategy)


class EngineInspector:
    """`EngineInspector`."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def get_engine_information(self, format: LayerInformationFormat, /) -> str:  # noqa: A002
        """The one layer there is, named after what it gives."""
        if format is not LayerInformationFormat.JSON:
            raise MisuseError("the adapter asks for JSON")
        return json.dumps({"Layers": [f"compute {self._network.outputs[0].name}"]})


class CudaEngine(Part):
    """`ICudaEngine`."""

    def __init__(self, double: TensorRTDouble, logger: ILogger, network: Network, runtime: Runtime) -> None:
        super().__init__(double, logger)
        self.network = network
        self.contexts = 0
        self._runtime = runtime  # a parent outlives its children
        weakref.finalize(self, double.ended.append, "engine")

    @property
    def num_io_tensors(self) -> int:
        """How many inputs and outputs there are."""
        return len(self.network.inputs) + len(self.network.outputs)

    @property
    def num_optimization_profiles(self) -> int:
        """How many profiles there are."""
        return len(self.network.profiles)

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return 1

    @property
    def num_aux_streams(self) -> int:
        """How many streams it uses beside the one that it is given."""
        return self.network.auxiliary

    @property
    def device_memory_size_v2(self) -> int:
        """Bytes of activation memory: one copy of the first input, at its largest."""
        first = self.network.inputs[0]
        shapes = [profile[first.name][2] for profile in self.network.profiles if first.name in profile] or [first.shape]
        return max(math.prod(shape) for shape in shapes) * DTYPES[first.dtype].itemsize

    @property
    def streamable_weights_size(self) -> int:
        """Bytes of weights that could be streamed."""
        return self.network.streamed

    @property
    def weight_streaming_budget_v2(self) -> int:
        """Bytes of weights that stay on the device."""
        return 0

    def get_tensor_name(self, index: int, /) -> str:
        """The name of an input or output."""
        return (*self.network.inputs, *self.network.outputs)[index].name

    def get_tensor_mode(self, name: str, /) -> TensorIOMode:
        """Whether it is an input."""
        return TensorIOMode.INPUT if self._border(name) in self.network.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str, /) -> Any:
        """Its dtype."""
        return DataType[self._border(name).dtype]

    def get_tensor_shape(self, name: str, /) -> list[int]:
        """Its extents, -1 where they may differ."""
        return list(self._border(name).shape)

    def get_tensor_location(self, name: str, /) -> TensorLocation:
        """Where its memory is."""
        return TensorLocation.HOST if self._border(name).host else TensorLocation.DEVICE

    def get_tensor_vectorized_dim(self, name: str, profile_index: int, /) -> int:
        """Which dimension is packed into vectors."""
        return self._border(name).vectorized

    def get_tensor_format_desc(self, name: str, profile_index: int, /) -> str:
        """Its layout in words."""
        return self._border(name).form

    def get_tensor_profile_shape(self, name: str, profile_index: int, /) -> list[list[int]]:
        """The smallest, optimal and largest extents under a profile."""
        return [list(shape) for shape in self.network.profiles[profile_index][name]]

    def get_tensor_profile_values(self, profile_index: int, name: str, /) -> list[list[int]]:
        """The smallest, optimal and largest values under a profile; empty where none are set."""
        if not self._border(name).host:
            raise RuntimeError(f"{name} is not a shape tensor")
        values = self.network.values[profile_index] if profile_index < len(self.network.values) else {}
        return [list(limit) for limit in values.get(name, ())]

    def create_execution_context(
        self, how: ExecutionContextAllocationStrategy | RuntimeConfig, /
    ) -> ExecutionContext | None:
        """A new context; None where it cannot be made."""
        if self.point("create_execution_context"):
            return None
        strategy = how.strategy if isinstance(how, RuntimeConfig) else how
        if strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            raise MisuseError("a context that allocates for itself moves its memory when its profile changes")
        if isinstance(how, RuntimeConfig) and (
            how.dynamic_shapes_kernel_specialization_strategy is DynamicShapesKernelSpecializationStrategy.LAZY
        ):
            raise MisuseError("lazily compiled kernels change under a captured graph")
        self.contexts += 1
        return ExecutionContext(self, how.cache if isinstance(how, RuntimeConfig) else None)

    def create_runtime_config(self) -> RuntimeConfig | None:
        """How to make a context."""
        return None if self.point("create_runtime_config") else RuntimeConfig(self.double)

    def create_engine_inspector(self) -> EngineInspector:
        """What tells of its layers."""
        return EngineInspector(self.network)

    def _border(self, name: str) -> Border:
        border = self.network.border(name)
        if border is None:
            raise RuntimeError(f"there is no tensor {name}")
        return border
