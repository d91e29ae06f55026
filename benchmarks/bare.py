"""TensorRT-RTX by itself, for comparison: one context, enqueue and synchronise, and nothing of aiotrt's between."""

from __future__ import annotations

import hashlib
import importlib
import time
from pathlib import Path

import torch

from aiotrt.building.log import log_of
from aiotrt.engines.tensorrt_api import DTYPES
from aiotrt.engines.tensorrt_kernels import Kernels
from benchmarks.networks import Array, Shape

__all__ = ["Bare"]


class Bare:
    """A deserialised engine with one context, at one shape at a time.

    Its context is as TensorRT makes it, but for two things. Kernels are compiled for each shape before they run ("eager"),
    as aiotrt has it: by default TensorRT-RTX does so behind one's back and changes kernels between two runs, so that the
    same input gives other bits. And what is compiled is kept where aiotrt keeps it, since that takes seconds: whoever comes
    second takes it from there.

    Args:
        path: the engine's file.

    Attributes:
        seconds: what it took to make the context, and the first run at each shape.
        input: the device memory that it reads.
        outputs: the device memory that it writes, by name.
    """

    def __init__(self, path: Path) -> None:
        trt = self._trt = importlib.import_module("tensorrt_rtx")
        self.seconds: dict[str, float] = {}
        # TensorRT keeps the first logger that it is given, so it must be the one that lives as long as the process.
        self._runtime = trt.Runtime(log_of(trt).logger)
        data = path.read_bytes()
        started = time.perf_counter()
        self.engine = self._runtime.deserialize_cuda_engine(data)
        assert self.engine is not None, path
        self.seconds["load"] = time.perf_counter() - started
        started = time.perf_counter()
        self._config = self.engine.create_runtime_config()
        self._config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self._kernels = Kernels(path, hashlib.sha256(data).hexdigest())
        self._kernels.attach(self._config)
        self.context = self.engine.create_execution_context(self._config)
        assert self.context is not None, path
        self.seconds["context"] = time.perf_counter() - started
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self._names = [name for name in names if self.engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]
        (self._input_name,) = (name for name in names if name not in self._names)
        self.stream = torch.cuda.Stream()
        self.shape: Shape = ()
        self.input = torch.empty(0)
        self.outputs: dict[str, torch.Tensor] = {}

    def prepare(self, shape: Shape) -> None:
        """Be ready for inputs of this shape."""
        if shape == self.shape:
            return
        started = time.perf_counter()
        context = self.context
        if self.engine.num_optimization_profiles and -1 in tuple(self.engine.get_tensor_shape(self._input_name)):
            assert context.set_optimization_profile_async(self._profile(shape), self.stream.cuda_stream)
            self.stream.synchronize()
        assert context.set_input_shape(self._input_name, shape)
        assert not context.infer_shapes()
        self.shape = shape
        self.input = self._empty(self._input_name).zero_()
        self.outputs = {name: self._empty(name) for name in self._names}
        for name, tensor in {self._input_name: self.input, **self.outputs}.items():
            assert context.set_tensor_address(name, tensor.data_ptr())
        torch.cuda.synchronize()
        self.enqueue()
        self.stream.synchronize()
        self._kernels.save()
        self.seconds.setdefault(f"first run at {'x'.join(map(str, shape))}", time.perf_counter() - started)

    def enqueue(self) -> None:
        """Submit one run."""
        assert self.context.execute_async_v3(self.stream.cuda_stream)

    def run(self, x: Array) -> list[Array]:
        """One run: host input, host results."""
        self.prepare(x.shape)
        self.input.copy_(torch.from_numpy(x))
        torch.cuda.synchronize()
        self.enqueue()
        self.stream.synchronize()
        return self.results()

    def results(self) -> list[Array]:
        """Copies of what the last run wrote."""
        return [output.cpu().numpy() for output in self.outputs.values()]

    def capture(self) -> torch.cuda.CUDAGraph:
        """A graph of one run at the present shape."""
        self.enqueue()
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self.enqueue()
        return graph

    def replay(self, graph: torch.cuda.CUDAGraph, x: Array) -> list[Array]:
        """One replay of such a graph: host input, host results."""
        self.input.copy_(torch.from_numpy(x))
        for output in self.outputs.values():
            output.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            graph.replay()
        self.stream.synchronize()
        return self.results()

    def is_capturable(self) -> bool:
        """What TensorRT itself says about a capture of a run at the present shape."""
        return bool(self.context.is_stream_capturable(self.stream.cuda_stream))

    def _profile(self, shape: Shape) -> int:
        for index in range(int(self.engine.num_optimization_profiles)):
            low, _, high = (tuple(limit) for limit in self.engine.get_tensor_profile_shape(self._input_name, index))
            if all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return index
        raise ValueError(f"no profile allows {shape}")

    def _empty(self, name: str) -> torch.Tensor:
        shape = tuple(self.context.get_tensor_shape(name))
        return torch.empty(shape, dtype=DTYPES[self.engine.get_tensor_dtype(name).name], device="cuda")
