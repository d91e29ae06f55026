"""torch modules, exported programs and plain functions over tensors, as engines."""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Final

import torch

from aiotrt.devices.base import Device, Stream
from aiotrt.errors import EngineError
from aiotrt.tensors import Parameters, Shapes, Structure, TensorSpec, arrange, children

__all__ = ["ModuleEngine"]

log = logging.getLogger("aiotrt")

MOST_EXPORTS: Final = 64  # for as many signatures and shapes


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
    outputs: tuple[TensorSpec, ...] | None = None
    uncapturable: str | None = None

    def __init__(self, source: object, device: Device) -> None:
        nested: _Exported | None = None
        if isinstance(source, torch.export.ExportedProgram):
            # The module keeps the program's guards on constant extents, so a shape outside them is a clear error.
            self.name = "ExportedProgram"
            function: Any = source.module()
            self.inputs = _exported_inputs(source)
            nested = _Exported(source, function) if self.inputs is None else None
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
        is_module = isinstance(source, torch.nn.Module) or nested is not None
        self._described: Callable[..., object] = function.forward if is_module else function
        self._called: Callable[..., object] = function if nested is None else nested
        self.parameters = Parameters.of(self._described) if nested is None else nested.parameters
        self._exports: dict[Hashable, Callable[..., object] | None] = {}  # in the module's place; None where it has none
        self._exporting = threading.Lock()
        self._is_exported = isinstance(source, torch.export.ExportedProgram)
        self._keywords: tuple[str, ...] = ()
        if isinstance(source, torch.export.ExportedProgram) and source.example_inputs is not None:
            self._keywords = tuple(source.example_inputs[1])
        self._weights: dict[str, torch.Tensor] = {}  # as they were when a program was built last
        if isinstance(function, torch.nn.Module):
            _check_placement(self.name, function, device)

    def execution(self, device: Device, stream: Stream, names: Sequence[str], shapes: Shapes) -> ModuleExecution:
        if self.inputs is not None:  # an exported program takes its inputs just as it was given them then
            count = len(names) - len(self._keywords)
            return ModuleExecution(self, list(range(count)), {k: count + i for i, k in enumerate(self._keywords)})
        return ModuleExecution(self, *arrange(self._described, names))

    def weights(self) -> Sequence[torch.Tensor]:
        """Return the module's present parameters and buffers. A capture must keep them: its graph reads their memory.

        A warning is logged when one was replaced since the last capture.
        """
        if not isinstance(self._function, torch.nn.Module):
            return ()
        # Detached: a parameter whose data is replaced would give the memory back.
        now = {
            name: tensor.detach() for name, tensor in [*self._function.named_parameters(), *self._function.named_buffers()]
        }
        before, self._weights = self._weights, now
        replaced = [name for name, old in before.items() if name in now and now[name].data_ptr() != old.data_ptr()]
        if replaced:
            log.warning(
                "%s: %s (%d of %d weights) was replaced after a graph was captured, and that graph still uses the old one: "
                "load the module again, or update weights in place with copy_ or load_state_dict",
                self.name,
                replaced[0],
                len(replaced),
                len(now),
            )
        return tuple(now.values())

    def function(self, key: Hashable) -> Callable[..., object]:
        """What to call with inputs of this key: the source, or the export that takes its place."""
        return self._exports.get(key) or self._called

    def exported(
        self, key: Hashable, args: Sequence[object], named: Mapping[str, object], reason: str
    ) -> Callable[..., object] | None:
        """The module's `torch.export` for inputs of this key; None if it has none. Blocks for seconds, the first time."""
        if self._is_exported or not isinstance(self._function, torch.nn.Module):
            return None  # an export already, or a function, which might do something else the next time
        with self._exporting:  # the other slots take what the first one made
            if key not in self._exports:
                self._exports[key] = self._export(tuple(args), dict(named), reason)
                if len(self._exports) > MOST_EXPORTS:
                    del self._exports[next(iter(self._exports))]
            return self._exports[key]

    def forget_export(self, function: Callable[..., object] | None) -> None:
        """Use this export for nothing more."""
        with self._exporting:
            for key, export in self._exports.items():
                if export is function:
                    self._exports[key] = None

    def _export(self, args: tuple[Any, ...], named: dict[str, Any], reason: str) -> Callable[..., object] | None:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                # Of a copy, with the same parameters: exporting puts stand-ins into a module for a while, and another slot,
                # or the module's owner, may be calling it.
                module = self._function
                assert isinstance(module, torch.nn.Module)
                shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
                program = torch.export.export(copy.deepcopy(module, shared), args, named, strict=False)
                function: Callable[..., object] = program.module()
        except Exception as error:  # whatever exporting finds unusual; the module itself still runs
            said = str(error).strip().splitlines() or [type(error).__name__]
            log.warning("%s could not be captured (%s), nor exported (%s)", self.name, reason, said[0])
            return None
        log.warning(
            "%s could not be captured (%s): its torch.export takes its place, whose results may differ in the last bits",
            self.name,
            reason,
        )
        return function

    def close(self) -> None:
        pass


class ModuleExecution:
    """Calls the function; torch's allocator and the graph's pool own the memory."""

    nbytes = 0

    def __init__(self, engine: ModuleEngine, positions: Sequence[int], names: Mapping[str, int]) -> None:
        self._engine = engine
        self._positions = positions
        self._names = names
        self._structure: Structure | None = None
        self._is_call = False
        self._function: Callable[..., object] | None = None
        self._has_raised = False
        self._weights = engine.weights()  # alive for as long as a graph may read them, whatever becomes of the module

    def arrange(self, structure: Structure, *, is_call: bool) -> None:
        """Put the inputs into this structure, instead of one for each parameter.

        Args:
            structure: of the arguments.
            is_call: whether that is the pair of positional and named ones; else a tuple or list of positional ones, a
                mapping of named ones, or one argument.
        """
        self._structure, self._is_call = structure, is_call

    def __call__(self, inputs: Sequence[torch.Tensor]) -> object:
        args, named = self._arranged(inputs)
        if self._function is None:
            self._function = self._engine.function(self._key(inputs))
        try:
            return self._function(*args, **named)
        except BaseException:
            self._has_raised = True
            raise

    def export(self, inputs: Sequence[torch.Tensor], reason: str) -> bool:
        """After a capture that failed: run the module's `torch.export` from now on.

        Blocks, for seconds. False if it was not the module that raised, or there is no export of it: nothing changes then.

        Args:
            inputs: as for a call.
            reason: why the capture failed, for the log.
        """
        if not self._has_raised:
            return False
        function = self._engine.exported(self._key(inputs), *self._arranged(inputs), reason)
        if function is None:
            return False
        self._function, self._has_raised = function, False
        return True

    def restore(self) -> None:
        """Run the module itself again: its export could not be captured either, and no other slot need try."""
        self._engine.forget_export(self._function)
        self._function = None

    def _key(self, inputs: Sequence[torch.Tensor]) -> Hashable:
        arrangement = self._structure or (tuple(self._positions), tuple(self._names.items()))
        return arrangement, tuple((tensor.shape, tensor.dtype) for tensor in inputs)

    def _arranged(self, inputs: Sequence[torch.Tensor]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        if self._structure is None:
            return [inputs[i] for i in self._positions], {name: inputs[i] for name, i in self._names.items()}
        value = self._structure.build(inputs)
        if self._is_call:
            args, named = value
            return args, named
        if isinstance(value, Mapping):
            return (), value
        return (value if isinstance(value, (tuple, list)) else (value,)), {}

    def close(self) -> None:
        self._weights = ()


def training_parts(source: object) -> str | None:
    """What of a module in training mode gives other results than in evaluation, for a warning; None if there is nothing."""
    for name, part in source.named_modules() if isinstance(source, torch.nn.Module) else ():
        if part.training and _differs_in_training(part):
            kind = getattr(part, "original_name", type(part).__name__)
            return f"{name!r} ({kind})" if name else kind
    return None


def _differs_in_training(part: torch.nn.Module) -> bool:
    if isinstance(part, (torch.nn.RNNBase, torch.nn.MultiheadAttention)):
        return part.dropout > 0
    if isinstance(part, torch.nn.modules.dropout._DropoutNd):
        return part.p > 0
    if isinstance(part, torch.nn.modules.instancenorm._InstanceNorm):
        return part.track_running_stats
    if isinstance(part, torch.nn.modules.batchnorm._NormBase):
        return True
    name = getattr(part, "original_name", "")  # of a scripted module
    return "BatchNorm" in name or (name.endswith("Dropout") and getattr(part, "p", 1) > 0)


class _Exported:
    """An exported program with nested inputs or constants, as a function.

    Any argument can be given by position or by name. One that is a constant can be left out.

    Args:
        program: the program.
        module: made of it.
    """

    def __init__(self, program: torch.export.ExportedProgram, module: Any) -> None:
        by_position, by_name = children(program.call_spec.in_spec)
        self._module = module
        self._count = len(children(by_position))
        self._names = [*inspect.signature(module.forward).parameters][: self._count] + list(by_name.context)
        self._constants: dict[str, object] = {}
        leaves = iter(_user_inputs(program))
        for name, argument in zip(self._names, [*children(by_position), *children(by_name)], strict=True):
            held = list(itertools.islice(leaves, argument.num_leaves))
            if _is_leaf(argument) and isinstance(held[0], torch.export.graph_signature.ConstantArgument):
                self._constants[name] = held[0].value
        required = tuple(name for name in self._names if name not in self._constants)
        self.parameters = Parameters(tuple(self._names), tuple(self._names), required, any_position=False)

    def __call__(self, *args: object, **named: object) -> object:
        values = self._constants | dict(zip(self._names, args, strict=False)) | named
        count = self._count
        return self._module(
            *[values[name] for name in self._names[:count]], **{name: values[name] for name in self._names[count:]}
        )


def _user_inputs(program: torch.export.ExportedProgram) -> list[Any]:
    """The tensors and constants that the program was exported with, in the order of its arguments."""
    kind = torch.export.graph_signature.InputKind.USER_INPUT
    return [spec.arg for spec in program.graph_signature.input_specs if spec.kind is kind]


def _is_leaf(spec: Any) -> bool:
    return bool(spec.num_nodes == spec.num_leaves == 1)


def _exported_inputs(program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...] | None:
    """The program's inputs; None where they are nested, or not all of them are tensors."""
    if not all(_is_leaf(argument) for group in children(program.call_spec.in_spec) for argument in children(group)):
        return None
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for argument in _user_inputs(program):
        name = argument.name
        value = values.get(name)
        if not isinstance(value, torch.Tensor):
            return None
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
