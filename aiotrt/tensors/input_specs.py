"""The inputs of one model: what they must be, and the check of each call's."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import numpy as np
import torch

from aiotrt.errors import InputError
from aiotrt.tensors.argument import Argument
from aiotrt.tensors.conversion import NUMPY_DTYPES, TORCH_DTYPES, dtype_name, numpy_view
from aiotrt.tensors.kind import DEVICE, NUMPY, Kind
from aiotrt.tensors.parameters import Parameters
from aiotrt.tensors.reading import as_array, as_tensor, is_array, shape_and_dtype
from aiotrt.tensors.tensor_spec import Shapes, Specs, TensorSpec

__all__ = ["InputSpecs"]


class InputSpecs:
    """The inputs of one model: declared by its engine, or fixed by the first example that the engine accepts.

    Args:
        specs: the engine's declaration, if it makes one.
        parameters: what a first example is matched against, where the engine declares nothing.
        holds: whether a tensor is in the model's device's memory.
        device: that device's name in torch, for messages.
        of_items: whether these are single items of a batch, without its axis.
    """

    def __init__(
        self,
        specs: Sequence[TensorSpec] | None,
        parameters: Parameters,
        holds: Callable[[torch.Tensor], bool],
        device: torch.device,
        *,
        of_items: bool = False,
    ) -> None:
        self.specs: Specs | None = None if specs is None else tuple(specs)
        self.parameters = parameters
        self._holds = holds
        self._device = device
        self._of_items = of_items
        self._fitting: Shapes = ()  # the shapes that fitted last: mostly those of the next call too

    def known(self) -> Specs:
        """The inputs, which must be known.

        Raises:
            InputError: they are not yet.
        """
        if self.specs is None:
            raise InputError("the inputs' dtypes are not known yet: pass an example input instead of its shape")
        return self.specs

    def settle(self, specs: Specs) -> None:
        """The engine has accepted inputs of these specs.

        Raises:
            InputError: others were accepted meanwhile.
        """
        if self.specs is None:
            self.specs = specs
        elif specs is not self.specs and specs != self.specs:
            earlier, later = (", ".join(map(str, some)) for some in (self.specs, specs))
            raise InputError(f"the inputs were fixed as {earlier} by an earlier call, got {later}")

    def parse(self, values: Sequence[object], named: Mapping[str, object]) -> tuple[list[Argument], Shapes, Kind, Specs]:
        """Check one call's inputs.

        Returns:
            The arguments in the engine's order, their shapes, the kind its outputs should have, and the specs that they were
            checked against: provisional ones, that `settle` fixes, while the engine has accepted nothing yet.

        Raises:
            InputError: the first thing that does not fit.
        """
        specs = self.specs
        if specs is None:
            specs = self._infer(values, named)
        if named:
            values = self._place(specs, values, named)
        elif len(values) != len(specs):
            self._count(specs, values, named)
        kind: Kind = NUMPY
        arguments = []
        extents = []
        for i, spec in enumerate(specs):  # there are as many values
            value = values[i]
            argument = self._argument(spec, value)
            extents.append(argument.shape)
            if argument.tensor is not None:
                kind = DEVICE
            elif kind is NUMPY and not isinstance(value, np.ndarray) and not is_array(value):
                kind = Kind.TORCH
            arguments.append(argument)
        shapes = tuple(extents)
        if shapes != self._fitting or specs is not self.specs:
            for spec, shape in zip(specs, shapes, strict=True):
                self._check_shape(spec, shape)
            if specs is self.specs:
                self._fitting = shapes
        return arguments, shapes, kind, specs

    def shapes(self, values: Sequence[object], named: Mapping[str, object]) -> Shapes:
        """Check shapes, given like inputs.

        Raises:
            InputError: the inputs are not fixed yet, or a shape does not fit.
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

    def check(self, name: str, value: object) -> Argument:
        """Check a value for the input `name`, extents aside: that is for assignments to part of an input."""
        spec = next(spec for spec in self.known() if spec.name == name)
        _, dtype = shape_and_dtype(name, value)
        if dtype != spec.dtype:
            _refuse(spec, f"dtype {dtype_name(dtype)}", _conversion(value, spec.dtype))
        return self._argument(spec, value)

    def _infer(self, values: Sequence[object], named: Mapping[str, object]) -> Specs:
        """What a first example says: how many inputs there are, and their names, dtypes and ranks."""
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
        specs = []
        for name, value in zip(names, [*values, *named.values()], strict=True):
            shape, dtype = shape_and_dtype(name, value)
            specs.append(TensorSpec(name, (None,) * len(shape), dtype))
        # In the function's order, whatever the caller's: two first calls that differ in that alone must agree.
        rank = {name: i for i, name in enumerate(known.names)}
        given = specs[: len(values)]
        return (*given, *sorted(specs[len(values) :], key=lambda spec: (rank.get(spec.name, len(rank)), spec.name)))

    def _name(self, i: int, count: int) -> str:
        known = self.parameters.positional
        if i < len(known):
            return known[i]
        if self.parameters.any_position:
            return f"input_{i}"
        listing = f" ({', '.join(known)})" if known else ""
        raise InputError(f"the model takes {len(known)} input{'s' * (len(known) != 1)}{listing} by position, got {count}")

    def _place(self, specs: Specs, values: Sequence[object], named: Mapping[str, object]) -> list[object]:
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
    def _count(specs: Specs, values: Sequence[object], named: Mapping[str, object]) -> NoReturn:
        plural = "s" * (len(specs) != 1)
        listing = ", ".join(map(str, specs))
        raise InputError(f"expected {len(specs)} input{plural} ({listing}), got {len(values) + len(named)}")

    def _argument(self, spec: TensorSpec, value: object) -> Argument:
        """What a value is, its extents aside."""
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
        if self._holds(tensor):
            return Argument(shape, (value, tensor), tensor=tensor)
        if tensor.device.type != "cpu":
            where = f"the model is on {self._device}: move it with .to({str(self._device)!r})"
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
                hint = "with batching a call is for a single item, which has no batch axis"
            elif len(shape) == len(spec.shape) - 1:
                hint = "for one item of a batch add a dimension with x[None]"
            _refuse(spec, f"rank {len(shape)}, shape {shape}", hint)
        limits = ""
        if spec.minimum is not None and spec.maximum is not None:
            limits = f"the engine allows {spec.minimum} to {spec.maximum}"
        _refuse(spec, f"shape {shape}", limits)


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
