"""torch modules, exported programs and plain functions over tensors, as engines."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from aiotrt.devices.base import Device, Stream
from aiotrt.errors import EngineError
from aiotrt.tensors import Shapes, TensorSpec, parameters_of

__all__ = ["ModuleEngine"]


class ModuleEngine:
    """A callable over device tensors.

    A module is used as it stands, on the device and in the mode (`eval` or `train`) that its owner put it: moving somebody
    else's module would surprise them. A module whose parameters live elsewhere than the model's device is refused.

    Args:
        source: a module, an exported program or a function.
        device: where it will run.

    Raises:
        EngineError: its parameters are on another device, or it cannot be called.
    """

    inputs: tuple[TensorSpec, ...] | None = None
    uncapturable: str | None = None

    def __init__(self, source: object, device: Device) -> None:
        if isinstance(source, torch.export.ExportedProgram):
            # The module keeps the program's guards on constant extents, so a shape outside them is a clear error.
            self.name = "ExportedProgram"
            function: Any = source.module()
            self.inputs = _exported_inputs(source)
        elif isinstance(source, torch.nn.Module):
            self.name = type(source).__name__
            function = source
        elif callable(source):
            self.name = getattr(source, "__name__", type(source).__name__)
            function = source
        else:
            raise EngineError(
                f"expected a file, a torch module, an ExportedProgram or a function, got {type(source).__name__}"
            )
        self._function: Callable[..., object] = function
        described = source.forward if isinstance(source, torch.nn.Module) else function
        self.parameters = None if self.inputs is not None else parameters_of(described)
        # By name where the names are known, so that optional parameters can be skipped.
        self._by_name = self.parameters is not None and all(
            p.kind is not p.POSITIONAL_ONLY for p in inspect.signature(described).parameters.values()
        )
        if isinstance(function, torch.nn.Module):
            _check_placement(self.name, function, device)

    def execution(self, device: Device, stream: Stream, names: Sequence[str], shapes: Shapes) -> ModuleExecution:
        return ModuleExecution(self._function, tuple(names) if self._by_name else None)

    def close(self) -> None:
        pass


class ModuleExecution:
    """Calls the function; torch's allocator and the graph's pool own the memory."""

    nbytes = 0

    def __init__(self, function: Callable[..., object], names: tuple[str, ...] | None) -> None:
        self._function = function
        self._names = names

    def __call__(self, inputs: Sequence[torch.Tensor]) -> object:
        if self._names is None:
            return self._function(*inputs)
        return self._function(**dict(zip(self._names, inputs, strict=True)))

    def close(self) -> None:
        pass


def _exported_inputs(program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    names: list[object] = list(program.graph_signature.user_inputs)  # constants too, whatever the annotation says
    for name in names:
        value = values.get(str(name))
        if not isinstance(value, torch.Tensor):
            raise EngineError(f"ExportedProgram: input {name!r} is not a tensor; only tensor inputs can be captured")
        sizes: list[object] = list(value.shape)  # symbolic ones among them
        extents = tuple(size if isinstance(size, int) else None for size in sizes)
        specs.append(TensorSpec(str(name), extents, value.dtype))
    return tuple(specs)


def _check_placement(name: str, module: torch.nn.Module, device: Device) -> None:
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device != device.torch_device:
            raise EngineError(
                f"{name}: {key} is on {tensor.device} and the model's device is {device.name}; "
                f"move the module first with module.to({str(device.torch_device)!r})"
            )
