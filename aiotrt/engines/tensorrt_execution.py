"""One execution context of a TensorRT engine: its shapes, its addresses, and the outputs it writes.

A captured graph contains the shapes, the addresses and the activation memory of its context. So a context keeps one set of
shapes, owns the memory of its outputs, and uses activation memory that never moves. All contexts of a slot share that
memory, because a slot's work is ordered on one stream.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from aiotrt.devices.base import Device, Stream
from aiotrt.engines.tensorrt_api import Api, ExecutionContext
from aiotrt.engines.tensorrt_kernels import timed
from aiotrt.engines.tensorrt_runtime import Product
from aiotrt.errors import EngineError
from aiotrt.tensors import TensorSpec

__all__ = ["Layout", "Profile", "TensorRTExecution", "Values", "Workspace"]

_ALIGNMENT: Final = 256  # bytes; TensorRT requires it of addresses, and torch's CUDA allocator guarantees it


@dataclass(frozen=True, slots=True)
class Values:
    """The range of a host (shape) input's values under one profile: smallest, optimal and largest."""

    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    def allow(self, values: Sequence[int]) -> bool:
        """Whether the profile allows these values."""
        return all(low <= value <= high for low, value, high in zip(self.minimum, values, self.maximum, strict=True))


@dataclass(frozen=True, slots=True)
class Profile:
    """One optimisation profile: the range of the dynamic inputs.

    Attributes:
        index: its index in TensorRT.
        extents: the smallest and the largest shape of each dynamic input.
        usual: the shape of each dynamic input that it was tuned for.
        values: the range of the values of each host input.
    """

    index: int
    extents: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    usual: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Values]

    def allows(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the profile allows inputs of these shapes."""
        return all(
            all(a <= b <= c for a, b, c in zip(low, shapes[name], high, strict=True))
            for name, (low, high) in self.extents.items()
        )

    def __str__(self) -> str:
        return f"{self.index}: " + ", ".join(f"{name} {low} to {high}" for name, (low, high) in self.extents.items())


@dataclass(frozen=True, slots=True)
class Layout:
    """The inputs and outputs of an engine.

    Attributes:
        path: the engine's file, for messages.
        inputs: the inputs, in the engine's order.
        outputs: the outputs, in the engine's order.
        host: the names of the inputs and outputs that are in host memory.
    """

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    host: frozenset[str]


class Workspace:
    """The resources that all contexts of one slot share: activation memory at a constant address, and auxiliary streams.

    TensorRT's own auxiliary streams synchronise with the default stream, which other code uses: during a capture that code's
    work would fail and invalidate the capture. The streams of this class do not synchronise with the default stream.

    Args:
        device: the device of memory and streams.
        nbytes: the size of the activation memory.
        streams: how many auxiliary streams the engine uses.
    """

    def __init__(self, device: Device, nbytes: int, streams: int) -> None:
        self.nbytes = nbytes
        self._memory = device.empty((max(1, nbytes),), torch.uint8)
        self.address = self._memory.data_ptr()
        self._streams = [device.stream() for _ in range(streams)]
        weakref.finalize(self, _close, self._streams)
        self.auxiliary = [stream.handle for stream in self._streams]


def _close(streams: Sequence[Stream]) -> None:
    for stream in streams:
        stream.close()


class TensorRTExecution:
    """One execution context, for one slot and one set of shapes.

    Args:
        product: the product that the context belongs to.
        context: a new context without activation memory.
        layout: the engine's inputs and outputs.
        device: the device that runs it.
        stream: the slot's stream.
        workspace: the slot's activation memory.
        profile: the profile that allows the shapes; None if the engine has no profiles.
        shapes: the shapes of the inputs, by name.
        nbytes: bytes of device memory that are counted as its own in addition to its outputs.
        compiled: called after the first run, in which TensorRT-RTX compiles missing kernels.

    Attributes:
        uncapturable: the reason why it cannot be captured in a graph; None if it can.

    Raises:
        EngineError: TensorRT rejected a shape, an address or the profile.
    """

    def __init__(
        self,
        product: Product,
        context: ExecutionContext,
        layout: Layout,
        device: Device,
        stream: Stream,
        workspace: Workspace,
        profile: Profile | None,
        shapes: Mapping[str, tuple[int, ...]],
        nbytes: int,
        compiled: Callable[[], None],
    ) -> None:
        self.nbytes = nbytes
        self.uncapturable: str | None = None
        self._compiled = compiled
        self._product = product
        self._context: ExecutionContext | None = context
        self._layout = layout
        self._device = device
        self._workspace: Workspace | None = workspace  # keeps it alive while a graph may use it
        self._values: Mapping[str, Values] = {} if profile is None else profile.values
        self._names = tuple(shapes)
        self._cuda = device.torch_device.type == "cuda"
        self._slot_stream = stream.handle
        self._addresses: dict[str, int] = {}
        self._host: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._allocators: dict[str, Any] = {}
        self._warm = False
        try:
            if profile is not None and (profile.extents or profile.values):
                index = profile.index
                what = f"selecting optimisation profile {index}"
                self._must(what, lambda: context.set_optimization_profile_async(index, stream.handle))
                # The switch may copy on the stream; without this wait, work on another stream could run before that copy.
                stream.synchronize()
            # On the slot's stream, because torch's allocator orders the reuse of memory by the stream of its allocation.
            device.call(stream, lambda: self._prepare(context, workspace, shapes))
        except BaseException:
            self.close()
            raise

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
        context = self._context
        if context is None:
            raise EngineError(f"{self._layout.path}: this execution context is closed")
        bound = [self._bind(context, name, tensor) for name, tensor in zip(self._names, inputs, strict=True)]
        if self._host:
            self._infer(context)  # the outputs' shapes follow from the values
        was_warm, self._warm = self._warm, True
        if was_warm:
            self._enqueue(context)
        else:
            with timed("%s: enqueued for the first time", self._layout.path):
                self._enqueue(context)
            self._compiled()
        del bound  # kept until here: the allocator could reuse a copy that is freed before the enqueue
        return {spec.name: self._output(spec) for spec in self._layout.outputs}

    def close(self) -> None:
        with self._device.exclusive():  # deleting a context frees memory, and may wait for the device
            self._context = None  # first, because it points to the other objects
        self._workspace = None
        self._outputs.clear()
        self._allocators.clear()
        self._host.clear()

    # Preparing...

    def _prepare(self, context: ExecutionContext, workspace: Workspace, shapes: Mapping[str, tuple[int, ...]]) -> None:
        for spec in self._layout.inputs:
            self._set_shape(context, spec, shapes[spec.name])
        what = f"{self._layout.path}: setting the activation memory"
        self._product.ask(what, lambda: context.set_device_memory(workspace.address, workspace.nbytes))
        if workspace.auxiliary:
            what = f"{self._layout.path}: setting the auxiliary streams"
            self._product.ask(what, lambda: context.set_aux_streams(workspace.auxiliary))
        if self._host:
            self._not_capturable(f"the values of {', '.join(map(repr, self._host))} are read by the CPU in every run")
        else:
            self._infer(context)

    def _set_shape(self, context: ExecutionContext, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        name = spec.name
        if name in self._layout.host:
            self._host[name] = host = torch.zeros(shape, dtype=spec.dtype)
            self._address(context, name, host.data_ptr())
        self._must(f"setting input {name!r} to {shape}", lambda: context.set_input_shape(name, shape))

    def _infer(self, context: ExecutionContext) -> None:
        """Allocate every output whose shape follows from the inputs."""
        unknown = self._product.ask(f"{self._layout.path}: inferring shapes", context.infer_shapes)
        if unknown:
            raise EngineError(f"{self._layout.path}: TensorRT cannot infer shapes without {', '.join(map(repr, unknown))}")
        for spec in self._layout.outputs:
            shape = tuple(context.get_tensor_shape(spec.name))
            if spec.name in self._allocators:
                continue
            if min(shape, default=0) < 0:
                self._allocate_late(context, spec)
                continue
            self._check_strides(spec.name, shape, context.get_tensor_strides(spec.name))
            output = self._outputs.get(spec.name)
            if output is not None and output.shape == shape:
                continue
            host = spec.name in self._layout.host
            # At least one element: an empty torch tensor has no address, and TensorRT requires one.
            elements = max(1, math.prod(shape))
            memory = torch.empty(elements, dtype=spec.dtype) if host else self._device.empty((elements,), spec.dtype)
            self._outputs[spec.name] = memory[: math.prod(shape)].view(shape)
            self._address(context, spec.name, memory.data_ptr())
            if host:
                self._not_capturable(f"output {spec.name!r} is written to host memory")
            elif output is None:
                self.nbytes += memory.nbytes

    def _allocate_late(self, context: ExecutionContext, spec: TensorSpec) -> None:
        """Set an output allocator, which TensorRT calls during the run, when it knows the output's size."""
        allocator = self._allocators[spec.name] = _output_allocator(self._product.api, self._device)
        what = f"setting an output allocator for {spec.name!r}"
        self._must(what, lambda: context.set_output_allocator(spec.name, allocator))
        self._not_capturable(f"the shape of output {spec.name!r} depends on the data")

    def _check_strides(self, name: str, shape: tuple[int, ...], strides: Sequence[int]) -> None:
        """Check that an output is row-major, as its torch tensor will be. Strides TensorRT does not report are ignored."""
        expected = 1
        for size, stride in reversed(list(zip(shape, strides, strict=False))):
            if size > 1 and stride > 0 and stride != expected:
                raise EngineError(
                    f"{self._layout.path}: output {name!r} of shape {shape} has strides {tuple(strides)}, "
                    "not row-major ones; build the engine with linear formats for its inputs and outputs"
                )
            expected *= size

    def _not_capturable(self, reason: str) -> None:
        if self.uncapturable is None:
            self.uncapturable = reason

    # Running...

    def _bind(self, context: ExecutionContext, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Set `tensor` as the input, and return the tensor that must stay alive until the run is enqueued."""
        if name in self._host:
            self._read(name, tensor)
            return tensor
        if not tensor.is_contiguous() or (self._cuda and tensor.data_ptr() % _ALIGNMENT):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        if self._addresses.get(name) != tensor.data_ptr():
            self._address(context, name, tensor.data_ptr())
        return tensor

    def _read(self, name: str, tensor: torch.Tensor) -> None:
        """Copy the values of a host input to the host. Blocks until the device has computed them."""
        host = self._host[name]
        host.copy_(tensor)
        allowed = self._values.get(name)
        values = host.flatten().tolist()
        if allowed is None or allowed.allow(values):
            return
        if self._warm:
            raise EngineError(
                f"{self._layout.path}: input {name!r} holds {values}; "
                f"the engine's profile allows {list(allowed.minimum)} to {list(allowed.maximum)}"
            )
        # The warm-up passes zeros, which TensorRT would reject as shapes: replace them with valid values.
        host.copy_(torch.tensor(allowed.optimum, dtype=host.dtype).view(host.shape))

    def _enqueue(self, context: ExecutionContext) -> None:
        stream = torch.cuda.current_stream(self._device.torch_device) if self._cuda else None
        handle = self._slot_stream if stream is None else stream.cuda_stream
        for allocator in self._allocators.values():
            allocator.shape = allocator.error = None
        try:
            self._must("enqueueing the engine", lambda: context.execute_async_v3(handle))
        except EngineError:
            for allocator in self._allocators.values():
                if allocator.error is not None:
                    raise allocator.error from None
            if stream is not None and not torch.cuda.is_current_stream_capturing():
                stream.query()  # if the device is broken, this raises its fault, which affects more than this call
            raise

    def _output(self, spec: TensorSpec) -> torch.Tensor:
        allocator = self._allocators.get(spec.name)
        if allocator is not None:
            return self._allocated(spec, allocator)
        output = self._outputs[spec.name]
        if spec.name in self._layout.host and self._cuda:
            torch.cuda.current_stream(self._device.torch_device).synchronize()
            return output.to(self._device.torch_device)
        return output

    def _allocated(self, spec: TensorSpec, allocator: Any) -> torch.Tensor:
        shape = allocator.shape
        if shape is None:
            raise EngineError(f"{self._layout.path}: TensorRT did not report the shape of output {spec.name!r}")
        nbytes = math.prod(shape) * spec.dtype.itemsize
        output: torch.Tensor = allocator.memory[:nbytes].view(spec.dtype).view(shape)
        return output

    def _address(self, context: ExecutionContext, name: str, address: int) -> None:
        self._must(f"setting the address of {name!r}", lambda: context.set_tensor_address(name, address))
        self._addresses[name] = address

    def _must(self, what: str, call: Callable[[], bool]) -> None:
        self._product.must(f"{self._layout.path}: {what}", call)


def _output_allocator(api: Api, device: Device) -> Any:
    base: Any = api.IOutputAllocator

    class Allocator(base):  # type: ignore[misc]
        """Allocates an output while the engine runs, on the thread that enqueues it, with its stream current."""

        def __init__(self) -> None:
            base.__init__(self)  # super() would not construct the C++ object
            self.memory = device.empty((1,), torch.uint8)
            self.shape: tuple[int, ...] | None = None
            self.error: BaseException | None = None

        def reallocate_output(self, tensor_name: str, memory: int, size: int, alignment: int) -> int:
            try:
                if self.memory.nbytes < size:
                    # torch reuses the old memory in this stream's order, after the work that still reads it.
                    self.memory = device.empty((size,), torch.uint8)
                return self.memory.data_ptr()
            except BaseException as error:  # an exception that enters TensorRT's C++ code ends the process
                self.error = error
                return 0

        def reallocate_output_async(self, tensor_name: str, memory: int, size: int, alignment: int, stream: int) -> int:
            return self.reallocate_output(tensor_name, memory, size, alignment)

        def notify_shape(self, tensor_name: str, shape: Sequence[int]) -> None:
            self.shape = tuple(shape)

    return Allocator()
