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

MOST_EXPORTS: Final = 64  # exports kept for one module, each for one signature and set of shapes


class ModuleEngine:
    """A callable over device tensors.

    A module is used on its present device and in its present mode (`eval` or `train`): moving it would surprise its owner.
    A module whose parameters are not on the model's device is refused.

    Args:
        source: a module, an exported program or a function.
        device: the device that will run it.

    Raises:
        EngineError: its parameters are on another device, or it cannot be called.
    """

    inputs: tuple[TensorSpec, ...] | None = None
    outputs: tuple[TensorSpec, ...] | None = None
    uncapturable: str | None = None

    def __init__(self, source: object, device: Device) -> None:
        nested: _Exported | None = None
        if isinstance(source, torch.export.ExportedProgram):
            # The module keeps the program's guards on fixed dimensions, so a call with other sizes is a clear error.
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
        self._exports: dict[Hashable, Callable[..., object] | None] = {}  # None: run the module itself
        self._exporting = threading.Lock()
        self._is_exported = isinstance(source, torch.export.ExportedProgram)
        self._keywords: tuple[str, ...] = ()
        if isinstance(source, torch.export.ExportedProgram) and source.example_inputs is not None:
            self._keywords = tuple(source.example_inputs[1])
        self._weights: dict[str, torch.Tensor] = {}  # as of the last capture
        if isinstance(function, torch.nn.Module):
            _check_placement(self.name, function, device)

    def execution(self, device: Device, stream: Stream, names: Sequence[str], shapes: Shapes) -> ModuleExecution:
        if self.inputs is not None:  # an exported program takes its inputs as in the example of its export
            count = len(names) - len(self._keywords)
            return ModuleExecution(self, list(range(count)), {k: count + i for i, k in enumerate(self._keywords)})
        return ModuleExecution(self, *arrange(self._described, names))

    def weights(self) -> Sequence[torch.Tensor]:
        """Return the module's present parameters and buffers. A capture must keep them: its graph reads their memory.

        A warning is logged when one was replaced since the last capture.
        """
        if not isinstance(self._function, torch.nn.Module):
            return ()
        # Detached: if its data is replaced, a parameter itself would release the memory that the graph reads.
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
        """Return the function to call with inputs of this key: the source, or the export that replaces it."""
        return self._exports.get(key) or self._called

    def exported(
        self, key: Hashable, args: Sequence[object], named: Mapping[str, object], reason: str
    ) -> Callable[..., object] | None:
        """Return the module's `torch.export` for inputs of this key; None if it cannot be exported.

        Blocks for seconds at the first call for a key.
        """
        if self._is_exported or not isinstance(self._function, torch.nn.Module):
            return None  # already an export, or a function, which may behave differently in the next call
        with self._exporting:  # the first slot exports, and the other slots reuse its export
            if key not in self._exports:
                self._exports[key] = self._export(tuple(args), dict(named), reason)
                if len(self._exports) > MOST_EXPORTS:
                    del self._exports[next(iter(self._exports))]
            return self._exports[key]

    def forget_export(self, function: Callable[..., object] | None) -> None:
        """Stop using this export, for all inputs."""
        with self._exporting:
            for key, export in self._exports.items():
                if export is function:
                    self._exports[key] = None

    def _export(self, args: tuple[Any, ...], named: dict[str, Any], reason: str) -> Callable[..., object] | None:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                # Export a copy with the same parameters: exporting temporarily replaces the module's parameters, while
                # another slot or the module's owner may be calling it.
                module = self._function
                assert isinstance(module, torch.nn.Module)
                shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
                program = torch.export.export(copy.deepcopy(module, shared), args, named, strict=False)
                function: Callable[..., object] = program.module()
        except Exception as error:  # of any class: torch.export raises many; the module itself still runs
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
    """An execution that calls the function; torch's allocator and the graph's pool own the memory."""

    nbytes = 0

    def __init__(self, engine: ModuleEngine, positions: Sequence[int], names: Mapping[str, int]) -> None:
        self._engine = engine
        self._positions = positions
        self._names = names
        self._structure: Structure | None = None
        self._is_call = False
        self._function: Callable[..., object] | None = None
        self._has_raised = False
        self._weights = engine.weights()  # kept alive while a graph may read them, even if the module is deleted

    def arrange(self, structure: Structure, *, is_call: bool) -> None:
        """Pass the inputs in this structure from now on, instead of one for each parameter.

        Args:
            structure: the structure of the arguments.
            is_call: whether it is the pair of positional and named arguments. Else it is a tuple or list of positional
                arguments, a mapping of named arguments, or one argument.
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
        """Replace the module by its `torch.export` after a failed capture. Blocks for seconds.

        Args:
            inputs: as for a call.
            reason: why the capture failed, for the log.

        Returns:
            False, with no change, if the module did not raise or cannot be exported; else True.
        """
        if not self._has_raised:
            return False
        function = self._engine.exported(self._key(inputs), *self._arranged(inputs), reason)
        if function is None:
            return False
        self._function, self._has_raised = function, False
        return True

    def restore(self) -> None:
        """Run the module itself again, and stop other slots from using its export, which could not be captured either."""
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
    """Return the first part of a module that is in training mode and gives other results there, for a warning; else None."""
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
    name = getattr(part, "original_name", "")  # the class's name, in a scripted module
    return "BatchNorm" in name or (name.endswith("Dropout") and getattr(part, "p", 1) > 0)


class _Exported:
    """An exported program with nested inputs or constants, as a function.

    Any argument can be passed by position or by name. A constant argument can be omitted.

    Args:
        program: the program.
        module: the module that was made from it.
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
    """Return the tensors and constants with which the program was exported, in the order of its arguments."""
    kind = torch.export.graph_signature.InputKind.USER_INPUT
    return [spec.arg for spec in program.graph_signature.input_specs if spec.kind is kind]


def _is_leaf(spec: Any) -> bool:
    return bool(spec.num_nodes == spec.num_leaves == 1)


def _exported_inputs(program: torch.export.ExportedProgram) -> tuple[TensorSpec, ...] | None:
    """Return the program's inputs; None if they are nested, or if not all of them are tensors."""
    if not all(_is_leaf(argument) for group in children(program.call_spec.in_spec) for argument in children(group)):
        return None
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    specs = []
    for argument in _user_inputs(program):
        name = argument.name
        value = values.get(name)
        if not isinstance(value, torch.Tensor):
            return None
        sizes: list[object] = list(value.shape)  # some may be symbolic
        extents = tuple(size if isinstance(size, int) else None for size in sizes)
        ranges = [_range(program, size) for size in sizes]
        bounded = any(extent is None and high < _UNBOUNDED for extent, (_, high) in zip(extents, ranges, strict=True))
        low, high = (tuple(r[0] for r in ranges), tuple(r[1] for r in ranges)) if bounded else (None, None)
        specs.append(TensorSpec(name, extents, value.dtype, low, high))
    return tuple(specs)


_UNBOUNDED: Final = 1 << 62


def _range(program: torch.export.ExportedProgram, size: object) -> tuple[int, int]:
    """Return the range of a dimension's size. torch.export sets a lower bound of 2, but its programs also run with 1."""
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
