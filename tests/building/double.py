"""TensorRT 10 and 11 as far as building goes, for what TensorRT-RTX's builder cannot be made to do, and has not.

Its names are checked against the real classes in test_tensorrt.py.
"""

from __future__ import annotations

import enum
import types
from pathlib import Path
from typing import Any

import onnx


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity


class IProgressMonitor:
    pass


class Tensor:
    is_shape_tensor = False
    dtype = types.SimpleNamespace(name="FLOAT")

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        self._dims = value.type.tensor_type.shape.dim
        self.shape = tuple(dim.dim_value or -1 for dim in self._dims)

    def get_dimension_name(self, i: int) -> str | None:
        return self._dims[i].dim_param or None


class Layer:
    def __init__(self, node: onnx.NodeProto) -> None:
        self.name = f"node_of_{node.output[0]}"
        self.type = types.SimpleNamespace(name=node.op_type.upper())


class Network:
    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.layers: list[Layer] = []

    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))
    num_layers = property(lambda self: len(self.layers))

    def get_input(self, i: int) -> Tensor:
        return self.inputs[i]

    def get_output(self, i: int) -> Tensor:
        return self.outputs[i]

    def get_layer(self, i: int) -> Layer:
        return self.layers[i]


class ParserError:
    def node(self) -> int:
        return 3

    def node_name(self) -> str:
        return ""

    def node_operator(self) -> str:
        return "Nope"

    def desc(self) -> str:
        return "no such\n  operator"


class OnnxParser:
    num_errors = 1

    def __init__(self, network: Network, logger: Any) -> None:
        self._network = network

    def parse(self, data: bytes, path: str) -> bool:
        assert Path(path).exists()
        if World.fails == "parse":
            return False
        graph = onnx.load_model_from_string(data).graph
        self._network.inputs = [Tensor(value) for value in graph.input]
        self._network.outputs = [Tensor(value) for value in graph.output]
        self._network.layers = [Layer(node) for node in graph.node]
        return True

    def get_error(self, i: int) -> ParserError:
        return ParserError()


class TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return b"timings:" + self.data


class Profile:
    def __bool__(self) -> bool:
        return World.fails != "profile"

    def set_shape(self, name: str, low: Any, usual: Any, high: Any) -> None:
        if World.fails == "set_shape":
            raise ValueError("inconsistent")
        World.said.append(f"profile {name} {low} {usual} {high}")


class Config:
    progress_monitor: Any
    builder_optimization_level = 3

    def __init__(self) -> None:
        World.config = self
        self.flags = {"TF32"}

    def set_flag(self, flag: enum.Enum) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: enum.Enum) -> None:
        self.flags.discard(flag.name)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        World.said.append(f"{pool} {size}")

    def add_optimization_profile(self, profile: Profile) -> int:
        return -1 if World.fails == "add_optimization_profile" else 0

    def create_timing_cache(self, data: bytes) -> TimingCache | None:
        return None if data == b"damaged" else TimingCache(data)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        return cache.data != b"another GPU's"


class Builder:
    def __init__(self, logger: Any) -> None:
        if World.fails == "builder":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int) -> Network | None:
        World.said.append(f"network {flags}")
        return None if World.fails == "network" else Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        config.progress_monitor.phase_start("build", None, 1)
        if World.fails == "build":
            self._logger.log(Severity.WARNING, "it began well")
            self._logger.log(Severity.VERBOSE, "idle talk")
            self._logger.log(Severity.ERROR, "no memory")
            return None
        return b"ftrt" + bytes(100) if config.progress_monitor.step_complete("build", 0) else None


class World:
    """What went on, and what shall fail."""

    fails: str | None = None
    said: list[str] = []  # noqa: RUF012
    config: Config


def tensorrt(version: str) -> Any:
    """The module, as version 10 or 11 has it."""
    World.fails, World.said = None, []
    weak = ["FP16", "BF16"] if version.startswith("10.") else []
    names: dict[str, Any] = {
        "__name__": f"tensorrt {version}",  # the logs are kept by name
        "__version__": version,
        "ILogger": ILogger,
        "IProgressMonitor": IProgressMonitor,
        "Builder": Builder,
        "OnnxParser": OnnxParser,
        "BuilderFlag": enum.Enum("BuilderFlag", ["TF32", *weak]),
        "NetworkDefinitionCreationFlag": enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1}),
        "MemoryPoolType": types.SimpleNamespace(WORKSPACE="workspace"),
    }
    return types.SimpleNamespace(**names)
