"""TensorRT engines: one adapter for `tensorrt`, `tensorrt_rtx` and `tensorrt_lean`.

An engine file is code. It is deserialised only on a CUDA device, and only after the check of its checksum, if one is given.
CPU code inside it is refused unless allowed. If the file's header does not identify its product, the installed one is tried.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from aiotrt.devices.base import Device, Stream
from aiotrt.engines.tensorrt_api import (
    DTYPES,
    Api,
    CudaEngine,
    Enumerator,
    ExecutionContext,
    RtxApi,
    Runtime,
    RuntimeConfig,
)
from aiotrt.engines.tensorrt_execution import Layout, Profile, TensorRTExecution, Values, Workspace
from aiotrt.engines.tensorrt_kernels import Kernels, timed
from aiotrt.engines.tensorrt_plan import HEADER_BYTES, check_plan, read_plan
from aiotrt.engines.tensorrt_runtime import Product, open_product
from aiotrt.errors import EngineError, InputError
from aiotrt.tensors import Parameters, Shapes, TensorSpec

__all__ = ["TensorRTEngine"]


class TensorRTEngine:
    """A deserialised engine, shared by all slots of a model.

    Args:
        path: the ``.engine`` or ``.plan`` file.
        device: the CUDA device that will run it.
        runtime: the module to run it with (``"tensorrt"``, ``"tensorrt_rtx"`` or ``"tensorrt_lean"``); None for the first
            installed one that reads files of the product in the file's header.
        sha256: the file's checksum, in hexadecimal; a file with another checksum is refused before anything else is read.
        allow_host_code: whether CPU code inside the file may run; set it only for files from a source that you trust.
        runtime_module: the module itself, for tests.
        require_cuda: False if `runtime_module` needs no GPU.

    Attributes:
        plan: the file's header.
        runtime: the module that runs it, with its version.
        outputs: the declared outputs.
        profiles: its optimisation profiles.
        workspace: the bytes of activation memory that each slot needs.
        layers: the number of its layers.

    Raises:
        EngineError: the file is missing, empty, truncated, damaged, does not match `sha256`, was written by another product
            or version or for another GPU, or contains CPU code; or a tensor has a dtype that torch does not support.
        MissingDependencyError: no installed product reads the file.
    """

    parameters = Parameters()

    def __init__(
        self,
        path: Path,
        device: Device,
        *,
        runtime: str | None = None,
        sha256: str | None = None,
        allow_host_code: bool = False,
        runtime_module: Api | None = None,
        require_cuda: bool = True,
    ) -> None:
        self.name = path.name
        self.uncapturable: str | None = None
        self._path = path
        self._device = device
        self._lock = threading.Lock()
        # Weak: only the executions own a workspace, so the last one frees it.
        self._workspaces: weakref.WeakValueDictionary[int, Workspace] = weakref.WeakValueDictionary()
        self._executions: weakref.WeakSet[TensorRTExecution] = weakref.WeakSet()
        self._config: RuntimeConfig | None = None  # TensorRT-RTX only; shared by all contexts
        data = _read(path, sha256)
        self.plan = read_plan(data)
        check_plan(path, self.plan, data[:HEADER_BYTES], len(data))
        if require_cuda and (device.torch_device.type != "cuda" or not torch.cuda.is_available()):
            where = "but torch finds none here" if not torch.cuda.is_available() else "so load it with device='cuda'"
            raise EngineError(
                f"{path}: TensorRT engines run on CUDA devices, {where}; on the CPU, load the .onnx file that it was built "
                f"from with device='host' (this model's device is {device.name})"
            )
        self._product: Product = open_product(path, self.plan, runtime, runtime_module)
        self.runtime = f"{self._product.name} {self._product.version}"
        self._kernels = Kernels(path, hashlib.sha256(data).hexdigest()) if self._product.specializes else None
        with self._current_device(), device.exclusive():
            self._runtime: Runtime | None = self._product.must(f"{path}: creating a runtime", self._product.runtime)
            # Always set: the default differs between versions.
            self._runtime.engine_host_code_allowed = allow_host_code
            with timed("%s: deserialised", path):
                self._engine: CudaEngine | None = self._deserialize(self._runtime, data)
        try:
            self._describe(self._engine)
        except BaseException:
            self.close()
            raise

    def execution(self, device: Device, stream: Stream, names: Sequence[str], shapes: Shapes) -> TensorRTExecution:
        engine = self._engine
        if engine is None:
            raise EngineError(f"{self._path}: this engine is closed")
        by_name = dict(zip(names, shapes, strict=True))
        profile = self._fitting(by_name)
        with self._lock:
            # Exclusive, because the creation of a context synchronises with the default stream.
            with device.exclusive(), timed("%s: created a context", self._path):
                context = device.call(stream, lambda: self._context(engine))
            workspace = self._workspaces.get(stream.handle)
            nbytes = 0
            if workspace is None:
                # The size for the largest profile: captured graphs contain the address, so the workspace cannot grow later.
                workspace = self._workspaces[stream.handle] = device.call(
                    stream, lambda: Workspace(device, self.workspace, engine.num_aux_streams)
                )
                nbytes = workspace.nbytes
        with timed("%s: prepared a context for %s", self._path, by_name):  # includes TensorRT-RTX's compilation
            execution = TensorRTExecution(
                self._product, context, self._layout, device, stream, workspace, profile, by_name, nbytes, self._compiled
            )
        self._executions.add(execution)
        if self.uncapturable is None:
            self.uncapturable = execution.uncapturable
        return execution

    def _compiled(self) -> None:
        if self._kernels is not None:
            self._kernels.save()

    def close(self) -> None:
        # TensorRT requires contexts to be deleted before their engine, and the engine before its runtime.
        for execution in list(self._executions):
            execution.close()
        self._config = None
        if self._kernels is not None:
            self._kernels.close()
        self._engine = None
        self._runtime = None

    # Loading...

    def _current_device(self) -> contextlib.AbstractContextManager[object]:
        where = self._device.torch_device
        return torch.cuda.device(where) if where.type == "cuda" else contextlib.nullcontext()

    def _deserialize(self, runtime: Runtime, data: bytes) -> CudaEngine:
        product = self._product
        mark = product.log.mark()
        try:
            engine = runtime.deserialize_cuda_engine(memoryview(data)[self.plan.offset :] if self.plan.offset else data)
        except Exception as error:
            raise product.refusal(self._path, self.plan, len(data), mark) from error
        if engine is None:
            raise product.refusal(self._path, self.plan, len(data), mark)
        return engine

    def _describe(self, engine: CudaEngine) -> None:
        product, api = self._product, self._product.api
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        count = engine.num_optimization_profiles
        for name in names:
            self._check_format(engine, name, max(1, count))
        inputs = [name for name in names if engine.get_tensor_mode(name) == api.TensorIOMode.INPUT]
        host = frozenset(name for name in names if engine.get_tensor_location(name) == api.TensorLocation.HOST)
        what = f"{self._path}: reading the optimisation profiles"
        self.profiles = tuple(product.ask(what, lambda: [_profile(engine, i, inputs, host) for i in range(count)]))
        self.inputs: tuple[TensorSpec, ...] | None = tuple(self._spec(engine, name, input=True) for name in inputs)
        self.outputs = tuple(self._spec(engine, name, input=False) for name in names if name not in inputs)
        self._layout = Layout(str(self._path), self.inputs, self.outputs, host)
        self.workspace = engine.device_memory_size_v2
        self.layers = engine.num_layers
        if engine.streamable_weights_size > 0 and engine.weight_streaming_budget_v2 < engine.streamable_weights_size:
            self.uncapturable = "its weights are streamed from host memory in every run"

    def _spec(self, engine: CudaEngine, name: str, *, input: bool) -> TensorSpec:  # noqa: A002
        kind: Enumerator = engine.get_tensor_dtype(name)
        dtype = DTYPES.get(kind.name)
        if dtype is None:
            raise EngineError(
                f"{self._path}: tensor {name!r} has dtype {kind.name}, which torch does not support; "
                f"build the engine with inputs and outputs of {', '.join(DTYPES)}"
            )
        shape = tuple(None if size < 0 else size for size in engine.get_tensor_shape(name))
        allowed = [profile.extents[name] for profile in self.profiles if name in profile.extents] if input else []
        if not allowed:
            return TensorSpec(name, shape, dtype)
        minimum = tuple(min(sizes) for sizes in zip(*(low for low, _ in allowed), strict=True))
        maximum = tuple(max(sizes) for sizes in zip(*(high for _, high in allowed), strict=True))
        return TensorSpec(name, shape, dtype, minimum, maximum)

    def _check_format(self, engine: CudaEngine, name: str, profiles: int) -> None:
        for index in range(profiles):
            form = engine.get_tensor_format_desc(name, index)
            if engine.get_tensor_vectorized_dim(name, index) != -1 or "channel major" in form.lower():
                raise EngineError(
                    f"{self._path}: tensor {name!r} has format {form!r}, expected row-major; "
                    "build the engine with linear formats for its inputs and outputs"
                )

    def layer_names(self) -> list[str]:
        """Return the names of the layers; empty if the engine was built without them, or the product cannot report them.

        Raises:
            EngineError: TensorRT failed to report the layers.
        """
        engine, form = self._engine, self._product.api.LayerInformationFormat.JSON
        assert engine is not None, "closed"
        if not hasattr(self._product.api, "EngineInspector"):
            return []
        what = f"{self._path}: reading the layers"
        facts = self._product.ask(what, lambda: json.loads(engine.create_engine_inspector().get_engine_information(form)))
        return [layer if isinstance(layer, str) else str(layer["Name"]) for layer in facts.get("Layers", ())]

    # Running...

    def _fitting(self, shapes: Mapping[str, tuple[int, ...]]) -> Profile | None:
        """Return the first profile that allows these shapes; None if the engine has no profiles."""
        if not self.profiles:
            return None
        for profile in self.profiles:
            if profile.allows(shapes):
                return profile
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        listing = "; ".join(map(str, self.profiles))
        raise InputError(f"{self._path}: no optimisation profile allows {got}; the engine has {listing}")

    def _context(self, engine: CudaEngine) -> ExecutionContext:
        api = self._product.api
        strategy = api.ExecutionContextAllocationStrategy.USER_MANAGED
        what = f"{self._path}: creating an execution context"
        if not self._product.specializes:
            return self._product.must(what, lambda: engine.create_execution_context(strategy))
        if self._config is None:
            made = self._product.must(f"{self._path}: creating a runtime configuration", engine.create_runtime_config)
            configuring = f"{self._path}: configuring the runtime"
            self._product.ask(configuring, lambda: self._configure(made, cast("RtxApi", api), strategy))
            self._config = made
        config = self._config
        return self._product.must(what, lambda: engine.create_execution_context(config))

    def _configure(self, config: RuntimeConfig, api: RtxApi, strategy: Enumerator) -> None:
        """Set how TensorRT-RTX creates contexts."""
        config.set_execution_context_allocation_strategy(strategy)
        # By default it compiles kernels for new shapes in the background, and a graph would keep the slow ones permanently.
        config.dynamic_shapes_kernel_specialization_strategy = api.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._kernels is not None:
            self._kernels.attach(config)


def _read(path: Path, sha256: str | None) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise EngineError(f"{path}: there is no such file") from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise EngineError(f"{path}: the file is empty; copy or build it again")
    if sha256 is not None and (digest := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise EngineError(
            f"{path}: its SHA-256 is {digest}, expected {sha256.lower()}; the file is damaged or was changed, "
            "and was not loaded"
        )
    return data


def _profile(engine: CudaEngine, index: int, inputs: Sequence[str], host: frozenset[str]) -> Profile:
    extents = {}
    usual = {}
    values = {}
    for name in inputs:
        if min(engine.get_tensor_shape(name), default=0) < 0:
            low, usual[name], high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            extents[name] = (low, high)
        if name in host:
            limits = [tuple(limit) for limit in engine.get_tensor_profile_values(index, name)]
            if len(limits) == 3:  # empty where the profile sets none
                values[name] = Values(*limits)
    return Profile(index, extents, usual, values)
