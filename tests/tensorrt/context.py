"""The double's execution context: it tells apart where TensorRT's own answers False, crashes or computes nonsense."""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aiotrt.engines.tensorrt_api import DTYPES
from tests.tensorrt.network import Border, Extents, ILogger, IOutputAllocator, MisuseError, Network, Severity

__all__ = ["ExecutionContext", "Failure", "Part"]


@dataclass
class Failure:
    """What one call does instead of its work: raise, or answer this."""

    answer: object
    after: int
    message: str


@dataclass(eq=False)
class Part:
    """An object of TensorRT's; its parent outlives it, as the binding sees to."""

    double: Any  # the `TensorRTDouble`
    logger: ILogger

    def log(self, message: str, severity: Severity = Severity.ERROR) -> None:
        """Write to the log."""
        self.logger.log(severity, message)

    def point(self, call: str) -> Failure | None:
        """Count a call; its failure, where it shall fail."""
        double = self.double
        failure: Failure | None = double.failures.get(call)
        double.calls[call] += 1
        if failure is None or double.calls[call] <= failure.after:
            return None
        self.log(failure.message)
        if isinstance(failure.answer, Exception):
            raise failure.answer
        return failure

    def refuse(self, message: str) -> bool:
        """Say why in the log, and False to the caller."""
        self.log(message)
        return False


class ExecutionContext(Part):
    """`IExecutionContext`."""

    def __init__(self, engine: Any, cache: Any = None) -> None:
        super().__init__(engine.double, engine.logger)
        self._cache = cache
        self._auxiliary: list[int] = []
        self._engine = engine  # a parent outlives its children
        self._network: Network = engine.network
        # Only the first context of an engine has a profile from the start.
        self._profile: int | None = 0 if engine.contexts == 1 else None
        self._shapes: dict[str, Extents] = {b.name: b.shape for b in self._network.inputs if min(b.shape, default=0) >= 0}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._memory: tuple[int, int] | None = None
        self._views: dict[tuple[str, int, Extents], torch.Tensor] = {}
        self._used = False
        weakref.finalize(self, engine.double.ended.append, "context")

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int, /) -> bool:
        """Choose a profile; the binding raises where it cannot."""
        failure = self.point("set_optimization_profile_async")
        if failure or profile_index not in range(len(self._network.profiles)):
            raise RuntimeError("Error in set optimization profile async.")
        if self._used and profile_index != self._profile:
            raise MisuseError("a profile was changed under a context that has run: its graphs are void")
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...], /) -> bool:
        """Choose the shape of an input; False where it is not allowed."""
        if self.point("set_input_shape"):
            return False
        border = self._network.border(name)
        if border is None or border not in self._network.inputs:
            return self.refuse(f"Error Code 3: {name} is not an input")
        if self._profile is None and self._network.profiles != ({},):
            return self.refuse("Error Code 3: no optimization profile is selected")
        if not self._allowed(border, shape):
            return self.refuse(f"Error Code 3: {name}: {shape} is outside of optimization profile {self._profile}")
        if self._used and self._shapes[name] != shape:
            raise MisuseError("a shape was changed under a context that has run: its graphs are void")
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        """The names of the inputs that are not specified enough; raises where shapes do not work out."""
        if self.point("infer_shapes"):
            raise RuntimeError("shape inference failed")
        lacking = [border.name for border in self._network.inputs if border.name not in self._shapes]
        lacking += [b.name for b in self._network.inputs if b.host and b.name not in self._addresses]
        if not lacking:
            self._infer()
        return lacking

    def get_tensor_shape(self, name: str, /) -> list[int]:
        """The extents of an input or output; -1 where they are not known."""
        border = self._border(name)
        if border in self._network.inputs:
            return list(self._shapes.get(name, border.shape))
        if any(i.name not in self._shapes or (i.host and i.name not in self._addresses) for i in self._network.inputs):
            return list(border.shape)
        return list(self._infer()[name])

    def get_tensor_strides(self, name: str, /) -> list[int]:
        """The strides of a tensor, in elements."""
        shape = self.get_tensor_shape(name)
        return [math.prod(shape[i + 1 :]) for i in range(len(shape))]

    def set_tensor_address(self, name: str, memory: int, /) -> bool:
        """Where an input or output is."""
        if self.point("set_tensor_address"):
            return False
        border = self._network.border(name)
        if border is None or not memory:
            return self.refuse(f"Error Code 3: {name!r} cannot be at {memory:#x}")
        if self.double.device.type == "cuda" and not border.host and memory % 256:
            return self.refuse(f"Error Code 3: the address of {name!r} is not aligned to 256 bytes")
        self._addresses[name] = memory
        return True

    def set_output_allocator(self, name: str, output_allocator: Any, /) -> bool:
        """Who gives an output its memory."""
        if self.point("set_output_allocator"):
            return False
        if not (isinstance(output_allocator, IOutputAllocator) and getattr(output_allocator, "bound", False)):
            raise MisuseError("an output allocator whose base was not initialised")
        self._allocators[name] = output_allocator
        return True

    def set_device_memory(self, memory: int, size: int, /) -> None:
        """The activation memory."""
        self.point("set_device_memory")
        if size < self._engine.device_memory_size_v2:
            raise MisuseError(f"{size} bytes of activation memory where {self._engine.device_memory_size_v2} are used")
        if self._used and (memory, size) != self._memory:
            raise MisuseError("activation memory was moved under a context that has run: its graphs are void")
        self._memory = (memory, size)

    def set_aux_streams(self, aux_streams: Sequence[int], /) -> None:
        """The streams to use beside the one that it is given."""
        self._auxiliary = list(aux_streams)

    def execute_async_v3(self, stream_handle: int, /) -> bool:
        """Run on the stream; False where something is missing."""
        if self.point("execute_async_v3"):
            return False
        network = self._network
        unset = [
            b.name for b in (*network.inputs, *network.outputs) if b.name not in {**self._addresses, **self._allocators}
        ]
        if unset or self.infer_shapes():
            return self.refuse(f"Error Code 3: neither address nor allocator is set for {', '.join(unset) or 'an input'}")
        if self._memory is None:
            raise MisuseError("enqueued without activation memory")
        if not stream_handle:
            raise MisuseError("enqueued on the default stream, which synchronises with every other one")
        if len(self._auxiliary) < network.auxiliary or len({stream_handle, 0, *self._auxiliary}) != 2 + len(self._auxiliary):
            raise MisuseError("auxiliary streams of TensorRT's own, or doubled ones: they break captures, or lock up")
        if self._cache is not None:
            self._cache.compiled.add(repr(sorted(self._shapes.items())).encode())
        cuda = self.double.device.type == "cuda"
        if cuda and not network.capturable and torch.cuda.is_current_stream_capturing():
            return self.refuse("Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
        self._used = True
        self.double.enqueued.append(stream_handle)
        stream: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if cuda:
            stream = torch.cuda.stream(torch.cuda.ExternalStream(stream_handle, device=self.double.device))
        with stream, torch.no_grad():
            return self._run(stream_handle)

    def _run(self, stream_handle: int) -> bool:
        values = {border.name: self._view(border, self._shapes[border.name]) for border in self._network.inputs}
        scratch = self._activations(self._network.inputs[0])
        scratch.copy_(values[self._network.inputs[0].name])
        # From the activation memory, so that two contexts that use it at once spoil each other's results.
        values[self._network.inputs[0].name] = scratch
        results = self._network.function(values)
        for border in self._network.outputs:
            result = results[border.name]
            if result.dtype is not DTYPES[border.dtype]:
                raise MisuseError(f"the network's function returns {result.dtype} for {border}")
            if border.name in self._allocators:
                if not self._give(border, result, stream_handle):
                    return self.refuse(f"Error Code 2: OutOfMemory (no memory for output {border.name!r})")
            else:
                self._view(border, tuple(result.shape)).copy_(result)
        return True

    def _give(self, border: Border, result: torch.Tensor, stream_handle: int) -> bool:
        """Ask the allocator for memory, for more than it takes in the end, as TensorRT does; and tell it the shape."""
        allocator = self._allocators[border.name]
        address = allocator.reallocate_output_async(
            border.name, self._addresses.get(border.name, 0), result.nbytes + 512, 256, stream_handle
        )
        if not address:
            return False
        self._addresses[border.name] = address
        self._view(border, tuple(result.shape)).copy_(result)
        allocator.notify_shape(border.name, list(result.shape))
        return True

    def _view(self, border: Border, shape: Extents) -> torch.Tensor:
        """The memory at an input's or output's address, as a tensor."""
        address = self._addresses[border.name]
        key = (border.name, address, shape)
        view = self._views.get(key)
        if view is None:  # made once: during a capture on CUDA it could not be
            device = torch.device("cpu") if border.host else self.double.device
            view = self._views[key] = _at(address, shape, DTYPES[border.dtype], device)
        return view

    def _activations(self, border: Border) -> torch.Tensor:
        assert self._memory is not None
        shape = self._shapes[border.name]
        key = ("", self._memory[0], shape)
        if key not in self._views:
            device = torch.device("cpu") if border.host else self.double.device
            self._views[key] = _at(self._memory[0], shape, DTYPES[border.dtype], device)
        return self._views[key]

    def _infer(self) -> Mapping[str, Extents]:
        values = {b.name: self._view(b, self._shapes[b.name]) for b in self._network.inputs if b.host}
        if self._network.infer is not None:
            return self._network.infer(self._shapes, {name: view.flatten().tolist() for name, view in values.items()})
        meta = {
            b.name: values.get(b.name, torch.empty(self._shapes[b.name], dtype=DTYPES[b.dtype], device="meta"))
            for b in self._network.inputs
        }
        return {name: tuple(result.shape) for name, result in self._network.function(meta).items()}

    def _allowed(self, border: Border, shape: Sequence[int]) -> bool:
        if len(shape) != len(border.shape):
            return False
        if any(want not in (-1, got) for want, got in zip(border.shape, shape, strict=True)):
            return False
        limits = self._network.profiles[self._profile or 0].get(border.name)
        return limits is None or all(a <= b <= c for a, b, c in zip(limits[0], shape, limits[2], strict=True))

    def _border(self, name: str) -> Border:
        border = self._network.border(name)
        if border is None:
            raise RuntimeError(f"there is no tensor {name}")
        return border


@dataclass(frozen=True)
class _CudaMemory:
    """Device memory at an address, in the form that torch takes."""

    address: int
    nbytes: int

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": (self.address, False), "version": 3, "strides": None}


def _at(address: int, shape: Extents, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The memory at an address as a tensor; nothing is copied, and nothing is kept alive."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cuda":
        raw = torch.as_tensor(_CudaMemory(address, nbytes), device=device)
    else:
        raw = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), dtype=torch.uint8)
    return raw.view(dtype).view(shape)
