"""The specification of one model's inputs, and the check of each call's inputs against it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np
import torch

from aiotrt.errors import DeviceError, InputError
from aiotrt.tensors.argument import Argument
from aiotrt.tensors.conversion import NUMPY_DTYPES, TORCH_DTYPES, dtype_name, numpy_view
from aiotrt.tensors.kind import DEVICE, NUMPY, Kind
from aiotrt.tensors.parameters import Parameters
from aiotrt.tensors.reading import as_array, as_tensor, is_array, shape_and_dtype
from aiotrt.tensors.signature import Signature
from aiotrt.tensors.structure import is_tensor, paths, place_name, take_apart
from aiotrt.tensors.tensor_spec import Shapes, TensorSpec

__all__ = ["InputSpecs", "remember"]

#: How many signatures are cached. An evicted one is recognised again, at a higher cost.
KEPT: Final = 64


class InputSpecs:
    """The inputs of one model: declared by its engine, or recognised from the arguments of each call.

    Args:
        specs: the inputs that the engine declares; None if it declares none.
        parameters: the parameters that calls are matched against, if the engine declares no inputs.
        holds: returns whether a tensor is in the memory of the model's device.
        device: that device in torch, for messages.
        of_items: whether the inputs are single items of a batch, without the batch axis.
        fixed: whether `seal` restricts calls to the signatures that were accepted before it; if there were none, to the
            first one after it.
        devices: for messages too, the names of several devices, of which `device` is the first.

    Attributes:
        specs: the declared inputs, or the first inputs that the engine accepted; None until then.
        holds: as given.
        accepted: the signatures that the engine accepted; if they are not fixed, the last `KEPT` ones.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec] | None,
        parameters: Parameters,
        holds: Callable[[torch.Tensor], bool],
        device: torch.device,
        *,
        of_items: bool = False,
        fixed: bool = False,
        devices: str = "",
    ) -> None:
        self.specs: Signature | None = None
        self.accepted: dict[Signature, None] = {}
        self.parameters = parameters
        self.holds = holds
        self._device = device
        self._devices = devices or str(device)
        self._of_items = of_items
        self._fixed = fixed or specs is not None
        self._is_sealed = False
        self._only: Signature | None = None  # the only allowed one, if all its arguments are tensors
        self._recognised: dict[object, tuple[Signature, Sequence[int] | None]] = {}
        self._fitting: tuple[Signature | None, Shapes] = None, ()  # the last shapes that passed: mostly the next call's too
        if specs is not None:
            self._is_sealed = True
            self.settle(specs if isinstance(specs, Signature) else Signature(specs))

    def known(self) -> Signature:
        """Return the signature of the inputs.

        Raises:
            InputError: the inputs are not known yet.
        """
        if self.specs is None:
            raise InputError("the inputs' dtypes are not known yet: pass an example input instead of its shape")
        return self.specs

    def confirm(self, specs: Signature) -> None:
        """Check that inputs of this signature are still allowed.

        Raises:
            InputError: other signatures have been fixed meanwhile.
        """
        if self._fixed and self._is_sealed and self.accepted and specs not in self.accepted:
            fixed = " or ".join(f"({signature})" for signature in self.accepted)
            raise InputError(f"the inputs were fixed as {fixed}, got ({specs})")

    def settle(self, specs: Signature) -> None:
        """Record that the engine has accepted inputs of this signature.

        Raises:
            InputError: other signatures have been fixed meanwhile.
        """
        if specs in self.accepted:
            return
        self.confirm(specs)
        if self._fixed:
            self.accepted[specs] = None
        else:
            remember(self.accepted, specs, None)
        self.specs = self.specs or specs
        self._narrow()

    def seal(self) -> None:
        """If signatures are fixed, allow only the accepted ones from now on; if there are none, the next one."""
        self._is_sealed = True
        self._narrow()

    def explain(self, specs: Signature, error: BaseException) -> BaseException:
        """Return the caller's error for a failed build: for a new signature an `InputError` that names both signatures."""
        if not self.accepted or specs in self.accepted or isinstance(error, (DeviceError, InputError)):
            return error
        # Without the error's text, which may name files: servers send this message to clients.
        what = f"the engine raised {type(error).__name__}"
        refusal = InputError(f"inputs ({specs}) do not work ({what}); inputs ({self.specs}) do")
        refusal.__cause__ = error
        return refusal

    def parse(self, values: Sequence[object], named: Mapping[str, object]) -> tuple[list[Argument], Shapes, Kind, Signature]:
        """Find the signature of one call's inputs and check them: `recognise`, then `check`."""
        signature, leaves = self.recognise(values, named)
        return *self.check(signature, leaves), signature

    def recognise(self, values: Sequence[object], named: Mapping[str, object]) -> tuple[Signature, Sequence[Any]]:
        """Find the signature of one call's inputs.

        Returns:
            The signature, and the call's tensors and arrays in the signature's order.

        Raises:
            InputError: an input does not fit; the message names the first mismatch.
        """
        only = self._only
        if only is None:
            signature, leaves = self._infer(values, named)
            if self._fixed:
                self.confirm(signature)
            return signature, leaves
        if named:
            return only, self._place(only, values, named)
        if len(values) != len(only):
            self._count(only, values, named)
        return only, values

    def check(self, signature: Signature, leaves: Sequence[object]) -> tuple[list[Argument], Shapes, Kind]:
        """Check the tensors and arrays of one call.

        Returns:
            The arguments, their shapes, and the kind that the outputs should have.

        Raises:
            InputError: an input does not fit; the message names the first mismatch.
        """
        kind: Kind = NUMPY
        arguments = []
        checked = []
        for i, spec in enumerate(signature):  # with one leaf for each spec
            value = leaves[i]
            argument = self._argument(spec, value)
            checked.append(argument.shape)
            if argument.tensor is not None:
                kind = DEVICE
            elif kind is NUMPY and not isinstance(value, np.ndarray) and not is_array(value):
                kind = Kind.TORCH
            arguments.append(argument)
        shapes = tuple(checked)
        if shapes != self._fitting[1] or signature is not self._fitting[0]:
            for spec, shape in zip(signature, shapes, strict=True):
                self._check_shape(spec, shape)
            self._fitting = signature, shapes
        return arguments, shapes, kind

    def shapes(self, values: Sequence[object], named: Mapping[str, object]) -> Shapes:
        """Check shapes that are passed in the place of inputs.

        Raises:
            InputError: the inputs are not known yet, or a shape does not fit.
        """
        specs = self.known()
        if named or len(values) != len(specs):
            values = self._place(specs, values, named)
        shapes = []
        for spec, value in zip(specs, values, strict=True):
            assert isinstance(value, Sequence)
            shape = tuple(map(operator.index, value))  # numpy's integers too
            self._check_shape(spec, shape)
            shapes.append(shape)
        return tuple(shapes)

    def check_part(self, spec: TensorSpec, value: object) -> Argument:
        """Check a value for a part of an input: everything but its shape."""
        _, dtype = shape_and_dtype(spec.name, value)
        if dtype != spec.dtype:
            _refuse(spec, f"dtype {dtype_name(dtype)}", _conversion(value, spec.dtype))
        return self._argument(spec, value)

    def _infer(self, values: Sequence[object], named: Mapping[str, object]) -> tuple[Signature, Sequence[Any]]:
        """Recognise the signature of one call of an engine that declares no inputs."""
        leaves: list[Any] = [*values, *named.values()]
        probes = leaves  # the objects to read dtype and rank from
        for i, leaf in enumerate(leaves):
            if type(leaf) is not torch.Tensor and type(leaf) is not np.ndarray:
                if not is_tensor(leaf):
                    return self._infer_nested(values, named)
                leaves, probes = self._read(self._names(values, named)[i], i, leaves, probes)
        key = len(values), *named, *[(probe.dtype, probe.ndim) for probe in probes]
        found = self._recognised.get(key)
        if found is None:
            names = self._names(values, named)
            rank = {name: i for i, name in enumerate(self.parameters.names)}
            # In the function's order: calls that differ only in the order of named arguments share one program.
            order = [*range(len(values))]
            order += sorted(range(len(values), len(names)), key=lambda i: (rank.get(names[i], len(rank)), names[i]))
            signature = self._known_as(Signature([_spec(names[i], probes[i]) for i in order]))
            found = signature, (None if order == sorted(order) else order)
            remember(self._recognised, key, found)
        signature, permutation = found
        return signature, leaves if permutation is None else [leaves[i] for i in permutation]

    def _infer_nested(self, values: Sequence[object], named: Mapping[str, object]) -> tuple[Signature, Sequence[Any]]:
        rank = {name: i for i, name in enumerate(self.parameters.names)}
        ordered = sorted(named, key=lambda name: (rank.get(name, len(rank)), name))
        whole = tuple(values), {name: named[name] for name in ordered}
        names = self._names(values, whole[1])
        given = [*values, *whole[1].values()]
        try:
            structure, leaves = take_apart(whole)
        except RecursionError:
            raise InputError(f"{self._culprit(names, given)}: it contains itself, or is nested too deeply") from None
        except TypeError as error:
            self._refuse_leaf(names, given, str(error))
        if not leaves:
            as_tensor(names[0], given[0])  # raises an error that names the value's type
        probes = leaves
        for i, leaf in enumerate(leaves):
            if type(leaf) is not torch.Tensor and type(leaf) is not np.ndarray:
                places = [name for name, leaf in _leaf_names(names, given) if is_tensor(leaf)]
                leaves, probes = self._read(places[i], i, leaves, probes)
        key = structure, *[(probe.dtype, probe.ndim) for probe in probes]
        found = self._recognised.get(key)
        if found is None:
            places = [name for name, leaf in _leaf_names(names, given) if is_tensor(leaf)]
            constants = [(name, leaf) for name, leaf in _leaf_names(names, given) if not is_tensor(leaf)]
            specs = [_spec(name, probe) for name, probe in zip(places, probes, strict=True)]
            found = self._known_as(Signature(specs, structure, constants)), None
            remember(self._recognised, key, found)
        return found[0], leaves

    def _names(self, values: Sequence[object], named: Mapping[str, object]) -> list[str]:
        """Return the names of one call's arguments, after checking them."""
        names = [*(self._name(i, len(values)) for i in range(len(values))), *named]
        known = self.parameters
        if not names:
            raise InputError("the model takes at least one input, got none")
        for name in names:
            if name in named and name not in known.names and not known.any_name:
                listing = ", ".join(known.names)
                _refuse_name(name, listing or "by position only")
            if names.count(name) > 1:
                raise InputError(f"input {name!r} was given twice, by position and by name")
        for name in known.required:
            if name not in names:
                raise InputError(f"missing input {name!r}")
        return names

    def _known_as(self, signature: Signature) -> Signature:
        """Return the known object that equals this signature, so that most comparisons are by identity."""
        for known in (*self.accepted, *(found[0] for found in self._recognised.values())):
            if known == signature:
                return known
        return signature

    def _narrow(self) -> None:
        if self._fixed and self._is_sealed and len(self.accepted) == 1 and self.known().structure is None:
            self._only = self.specs

    @staticmethod
    def _read(name: str, i: int, leaves: list[Any], probes: list[Any]) -> tuple[list[Any], list[Any]]:
        """Convert leaf `i` if it is not a plain tensor or array, and return the leaves and the probes for its dtype."""
        value = leaves[i]
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return leaves, probes
        if is_array(value):  # converted only once, because that may be slow
            leaves[i] = probes[i] = as_array(name, value)
            return leaves, probes
        probes = [*probes[:i], as_tensor(name, value), *probes[i + 1 :]]
        return leaves, probes

    @staticmethod
    def _culprit(names: Sequence[str], given: Sequence[object]) -> str:
        """Return the name of the argument that cannot be flattened."""
        for name, value in zip(names, given, strict=True):
            try:
                take_apart(value)
            except (RecursionError, TypeError):
                return f"input {name!r}"
        return "the inputs"

    def _refuse_leaf(self, names: Sequence[str], given: Sequence[object], kind: str) -> NoReturn:
        for name, leaf in _leaf_names(names, given):
            if type(leaf).__name__ == kind:
                as_tensor(name, leaf)  # raises an error that names the value's type
        raise InputError(f"{self._culprit(names, given)}: expected tensors, arrays and hashable constants, got {kind}")

    def _name(self, i: int, count: int) -> str:
        known = self.parameters.positional
        if i < len(known):
            return known[i]
        if self.parameters.any_position:
            return f"input_{i}"
        listing = f" ({', '.join(known)})" if known else ""
        raise InputError(f"the model takes {len(known)} input{'s' * (len(known) != 1)}{listing} by position, got {count}")

    def _place(self, specs: Signature, values: Sequence[object], named: Mapping[str, object]) -> list[object]:
        if len(values) > len(specs):
            self._count(specs, values, named)
        missing = object()
        placed: list[object] = [*values, *[missing] * (len(specs) - len(values))]
        index = {spec.name: i for i, spec in enumerate(specs)}
        for name, value in named.items():
            i = index.get(name)
            if i is None:
                _refuse_name(name, ", ".join(index))
            if placed[i] is not missing:
                raise InputError(f"input {name!r} was given twice, by position and by name")
            placed[i] = value
        lacking = [spec.name for spec, value in zip(specs, placed, strict=True) if value is missing]
        if lacking:
            raise InputError(f"missing input{'s' * (len(lacking) > 1)} {', '.join(map(repr, lacking))}")
        return placed

    @staticmethod
    def _count(specs: Signature, values: Sequence[object], named: Mapping[str, object]) -> NoReturn:
        plural = "s" * (len(specs) != 1)
        listing = ", ".join(map(str, specs))
        raise InputError(f"expected {len(specs)} input{plural} ({listing}), got {len(values) + len(named)}")

    def _argument(self, spec: TensorSpec, value: object) -> Argument:
        """Check a value's type, dtype and device, and return its `Argument`; the shape is not checked."""
        array = value if isinstance(value, np.ndarray) else as_array(spec.name, value) if is_array(value) else None
        if array is not None:
            if (dtype := TORCH_DTYPES.get(array.dtype)) is not spec.dtype:
                got = str(array.dtype) if dtype is None else dtype_name(dtype)
                _refuse(spec, f"dtype {got}", _conversion(array, spec.dtype))
            return Argument(array.shape, value, host=array)
        tensor = as_tensor(spec.name, value)
        if tensor.dtype is not spec.dtype:
            _refuse(spec, f"dtype {dtype_name(tensor.dtype)}", _conversion(value, spec.dtype))
        shape = tuple(tensor.shape)
        if self.holds(tensor):
            return Argument(shape, (value, tensor), tensor=tensor)
        if tensor.device.type != "cpu":
            where = f"the model is on {self._devices}: move it with .to({str(self._device)!r})"
            _refuse(spec, f"a tensor on {tensor.device}", where)
        return Argument(shape, value, host=numpy_view(tensor))

    def _check_shape(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        if not spec.fits(shape):
            self._refuse_shape(spec, shape)
        if min(shape, default=0) < 0:
            _refuse(spec, f"shape {shape}", "no dimension can be negative")

    def _refuse_shape(self, spec: TensorSpec, shape: tuple[int, ...]) -> NoReturn:
        assert spec.shape is not None
        if len(shape) != len(spec.shape):
            hint = ""
            if self._of_items:
                hint = "with batching, a call takes a single item, without the batch axis"
            elif len(shape) == len(spec.shape) - 1:
                hint = "for a batch of one item, add a dimension with x[None]"
            _refuse(spec, f"rank {len(shape)}, shape {shape}", hint)
        limits = ""
        if spec.minimum is not None and spec.maximum is not None:
            limits = f"the engine allows {spec.minimum} to {spec.maximum}"
        _refuse(spec, f"shape {shape}", limits)


def _spec(name: str, value: Any) -> TensorSpec:
    _, dtype = shape_and_dtype(name, value)
    return TensorSpec(name, (None,) * value.ndim, dtype)


def _leaf_names(names: Sequence[str], given: Sequence[object]) -> list[tuple[str, object]]:
    """Return all leaves of these arguments with their names, such as ``images[0]``."""
    return [(place_name(name, place), leaf) for name, one in zip(names, given, strict=True) for place, leaf in paths(one)]


def remember(where: dict[Any, Any], key: object, value: object) -> None:
    """Add an entry to a bounded dict, which evicts its oldest entry."""
    where[key] = value
    if len(where) > KEPT:
        del where[next(iter(where))]


def _refuse(spec: TensorSpec, got: str, hint: str = "") -> NoReturn:
    raise InputError(f"input {spec.name!r}: expected {spec}, got {got}" + (f"; {hint}" if hint else ""))


def _refuse_name(name: str, listing: str) -> NoReturn:
    hint = ""
    if name in {"deadline", "priority"}:
        hint = "; deadline= and priority= need load(..., batching=aiotrt.Batching(stack=False)), or Batching() to stack them"
    raise InputError(f"there is no input {name!r}; the inputs are {listing}{hint}")


def _conversion(value: object, dtype: torch.dtype) -> str:
    if isinstance(value, np.ndarray):
        numpy_dtype = NUMPY_DTYPES.get(dtype)
        if numpy_dtype is None or value.dtype == object:
            return ""
        return f"convert it with .astype(np.{numpy_dtype})"
    return f"convert it with .to({dtype})"
