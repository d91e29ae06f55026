"""torch modules, exported programs and plain functions over tensors, as engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from aiotrt.devices.base import Device, Stream
from aiotrt.errors import EngineError
from aiotrt.tensors import Parameters, Shapes, TensorSpec, arrange

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
        self._described: Callable[..., object] = source.forward if isinstance(source, torch.nn.Module) else function
        self.parameters = Parameters.of(self._described)
        self._keywords: tuple[str, ...] = ()
        if isinstance(source, torch.export.ExportedProgram) and source.example_inputs is not None:
            self._keywords = tuple(source.example_inputs[1])
        if isinstance(function, torch.nn.Module):
            _check_placement(self.name, function, device)

    def execution(self, device: Device, stream: Stream, names: Sequence[str], shapes: Shapes) -> ModuleExecution:
        if self.inputs is not None:  # an exported program takes its inputs just as it was given them then
            count = len(names) - len(self._keywords)
            return ModuleExecution(self._function, list(range(count)), {k: count + i for i, k in enumerate(self._keywords)})
        return ModuleExecution(self._function, *arrange(self._described, names))

    def close(self) -> None:
        pass


class ModuleExecution:
    """Calls the function; torch's allocator and the graph's pool own the memory."""

    nbytes = 0

    def __init__(self, function: Callable[..., object], positions: Sequence[int], names: Mapping[str, int]) -> None:
        self._function = function
        self._positions = positions
        self._names = names

    def __call__(self, inputs: Sequence[torch.Tensor]) -> object:
        return self._function(*[inputs[i] for i in self._positions], **{name: inputs[i] for name, i in self._names.items()})

    def close(self) -> None:
        pass


def _exported_inputs(program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not torch.export.graph_signature.InputKind.USER_INPUT:
            continue
        name = spec.arg.name
        value = values.get(name)
        if not isinstance(value, torch.Tensor):
            raise EngineError(f"ExportedProgram: input {name!r} is not a tensor; only tensor inputs can be captured")
        sizes: list[object] = list(value.shape)  # symbolic ones among them
        extents = tuple(size if isinstance(size, int) else None for size in sizes)
        ranges = [_range(program, size) for size in sizes]
        bounded = any(extent is None and high < _UNBOUNDED for extent, (_, high) in zip(extents, ranges, strict=True))
        low, high = (tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)) if bounded else (None, None)
        specs.append(TensorSpec(name, extents, value.dtype, low, high))
    return tuple(specs)


_UNBOUNDED: Final = 1 << 62


def _range(program: torch.export.ExportedProgram, size: object) -> tuple[int, int]:
    """Of an extent. The lower bound 2 is an artefact of exporting: what was exported runs with 1 as well."""
    if isinstance(size, int):
        return size, size
    limits = program.range_constraints.get(size.node.expr)  # type: ignore[attr-defined]
    if limits is None:
        return 1, _UNBOUNDED
    low = int(limits.lower)
    return 1 if low <= 2 else low, int(limits.upper) if limits.upper.is_Integer else _UNBOUNDED


def _check_placement(name: str, module: torch.nn.Module, device: Device) -> None:
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.device != device.torch_device:
            raise EngineError(
                f"{name}: {key} is on {tensor.device} and the model's device is {device.name}; "
                f"move the module first with module.to({str(device.torch_device)!r})"
            )
