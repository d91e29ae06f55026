"""Tensors at the border: what a model takes, whether a value is that, and how it crosses.

Everything a caller passes becomes an `Argument` here or an `InputError` that names the input, what was expected and what
came. Everything a caller gets is made here too, in the kind that went in. Host copies are numpy's, which use one thread
and release the interpreter lock; torch's own host copy would wake every OpenMP thread.
"""

from __future__ import annotations

import enum
import inspect
import operator
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import torch

from aiotrt.errors import EngineError, InputError

__all__ = [
    "DEVICE",
    "NUMPY",
    "Argument",
    "InputSpecs",
    "Key",
    "Kind",
    "OutputNames",
    "Parameters",
    "Shapes",
    "Specs",
    "TensorSpec",
    "arrange",
    "examples",
    "flatten",
    "number",
    "numpy_view",
    "own",
    "widened",
]

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
Specs: TypeAlias = tuple["TensorSpec", ...]
#: What tells one model's programs apart: the inputs' shapes, and the addresses of inputs that a graph reads where they are.
Key: TypeAlias = tuple[Shapes, tuple[tuple[int, int], ...]]
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_TORCH_DTYPES: Final[dict[np.dtype[Any], torch.dtype]] = {
    np.dtype(name): getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
        "float16", "float32", "float64", "complex64", "complex128",
    )
}  # fmt: skip
_NUMPY_DTYPES: Final = {torch_dtype: numpy_dtype for numpy_dtype, torch_dtype in _TORCH_DTYPES.items()}
_SAME_SIZE: Final = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Kind(enum.Enum):
    """What a result is handed out as."""

    NUMPY = "numpy"
    TORCH = "torch"
    DEVICE = "device"


# By names of their own too, as in `slots`.
NUMPY: Final = Kind.NUMPY
_ON_HOST: Final = 1  # kDLCPU of DLPack
DEVICE: Final = Kind.DEVICE


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its name, extents and dtype.

    Attributes:
        name: the engine's own name for it.
        shape: one entry per dimension; None where the extent may differ from call to call.
        dtype: the torch dtype.
        minimum: the smallest allowed extents, where the engine declares them.
        maximum: the largest allowed extents, where the engine declares them.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    minimum: tuple[int, ...] | None = None
    maximum: tuple[int, ...] | None = None

    def __str__(self) -> str:
        extents = ", ".join("*" if extent is None else str(extent) for extent in self.shape)
        return f"{self.name}: {_dtype_name(self.dtype)} ({extents})"

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is within the spec."""
        if len(shape) != len(self.shape):
            return False
        for want, got in zip(self.shape, shape, strict=True):
            if want is not None and want != got:
                return False
        return (self.minimum is None or all(low <= got for low, got in zip(self.minimum, shape, strict=True))) and (
            self.maximum is None or all(got <= high for high, got in zip(self.maximum, shape, strict=True))
        )


class Argument:
    """One checked input of one call.

    Attributes:
        shape: its extents.
        host: a numpy view of the caller's memory, when it is on the host (dtypes that numpy lacks are viewed as integers).
        tensor: the caller's tensor, when it is on the device, or in page-locked memory that the device shall read.
        owner: the caller's object, kept alive for as long as the device may read it.
    """

    __slots__ = ("host", "owner", "shape", "tensor")

    def __init__(
        self, shape: tuple[int, ...], owner: object, host: Array | None = None, tensor: torch.Tensor | None = None
    ) -> None:
        self.shape = shape
        self.owner = owner
        self.host = host
        self.tensor = tensor

    def read_in_place(self, dtype: torch.dtype, is_pinned: Callable[[torch.Tensor], bool]) -> None:
        """If this host input of `dtype` is page-locked memory in plain order, let the device read it where it is."""
        host = self.host
        if host is None or not (host.flags.c_contiguous and host.flags.writeable):  # torch warns of what it may not write
            return
        try:
            tensor = torch.from_numpy(host)
        except (TypeError, ValueError):  # numpy takes no notice of the stride of an axis of extent 1, which may be any
            return
        if is_pinned(tensor):
            self.tensor, self.host = tensor if dtype in _NUMPY_DTYPES else tensor.view(dtype), None

    def write(self, view: Array) -> None:
        """Copy a host input into the program's staging memory: a plain copy, by this thread."""
        assert self.host is not None
        np.copyto(view, self.host)

    def copies(self, buffer: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """What must be copied on the device to bring a device input into the program's buffer: to where, from where."""
        assert self.tensor is not None
        return ((buffer, self.tensor),)


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
            elif kind is NUMPY and not isinstance(value, np.ndarray) and not _is_array(value):
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
        _, dtype = _shape_and_dtype(name, value)
        if dtype != spec.dtype:
            _refuse(spec, f"dtype {_dtype_name(dtype)}", _conversion(value, spec.dtype))
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
            shape, dtype = _shape_and_dtype(name, value)
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
        array = value if isinstance(value, np.ndarray) else _as_array(spec.name, value) if _is_array(value) else None
        if array is not None:
            if (dtype := _TORCH_DTYPES.get(array.dtype)) is not spec.dtype:
                got = str(array.dtype) if dtype is None else _dtype_name(dtype)
                _refuse(spec, f"dtype {got}", _conversion(array, spec.dtype))
            return Argument(array.shape, value, host=array)
        tensor = _as_tensor(spec.name, value)
        if tensor.dtype is not spec.dtype:
            _refuse(spec, f"dtype {_dtype_name(tensor.dtype)}", _conversion(value, spec.dtype))
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


class OutputNames:
    """The names of a model's outputs, and the container they come in: bare when there is one, else a named tuple."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        # rename: engine tensor names need not be Python identifiers; those that are not stay reachable by position.
        self._container: Any = namedtuple("Outputs", self.names, rename=True)  # type: ignore[misc]  # noqa: PYI024

    def pack(self, values: Sequence[object]) -> Any:
        """The results as the caller sees them."""
        return values[0] if len(values) == 1 else self._container._make(values)


def flatten(source: str, value: object) -> tuple[tuple[str, ...], list[torch.Tensor]]:
    """Take apart what a module or function returned.

    Args:
        source: who returned it, for messages.
        value: a tensor, a flat tuple, list, named tuple or mapping of tensors.

    Raises:
        EngineError: it is anything else; the message says where and what.
    """
    if isinstance(value, torch.Tensor):
        return ("output",), [_strided(source, "output", value)]
    if isinstance(value, Mapping):
        names: tuple[str, ...] = tuple(str(name) for name in value)
        items: list[object] = list(value.values())
    elif isinstance(value, (tuple, list)):
        items = list(value)
        names = getattr(value, "_fields", None) or tuple(f"output_{i}" for i in range(len(items)))
    else:
        got = "nothing (None)" if value is None else f"{type(value).__name__}"
        raise EngineError(f"{source} returned {got}; it must return a tensor, or a flat tuple or dict of tensors")
    if not items:
        raise EngineError(f"{source} returned an empty {type(value).__name__}; it must return at least one tensor")
    tensors = []
    for name, item in zip(names, items, strict=True):
        if not isinstance(item, torch.Tensor):
            raise EngineError(
                f"{source} returned {type(item).__name__} as {name!r}; every output must be a tensor "
                "(flatten nested results in postprocess=)"
            )
        tensors.append(_strided(source, name, item))
    return names, tensors


def numpy_view(tensor: torch.Tensor) -> Array:
    """The memory of a host tensor as a numpy array; dtypes that numpy lacks are viewed as integers of their size."""
    tensor = tensor.detach()
    if tensor.is_conj() or tensor.is_neg():  # a lazy flag, which numpy cannot see: without this the signs would be wrong
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.dtype not in _NUMPY_DTYPES:
        tensor = tensor.view(_SAME_SIZE[tensor.element_size()])
    view: Array = tensor.numpy()
    return view


def number(value: object, dtype: torch.dtype) -> Array:
    """A number as an array of no dimensions, viewed as `numpy_view` does.

    Raises:
        OverflowError, RuntimeError, TypeError, ValueError: the dtype does not hold it.
    """
    numpy_dtype = _NUMPY_DTYPES.get(dtype)
    return numpy_view(torch.tensor(value, dtype=dtype)) if numpy_dtype is None else np.array(value, numpy_dtype)


def widened(view: Array, dtype: torch.dtype) -> Array:
    """What numpy gets for a `numpy_view`: itself, or where numpy lacks the dtype a copy in one that holds all its values."""
    if dtype in _NUMPY_DTYPES:
        return view
    wide: Array = torch.from_numpy(view).view(dtype).to(torch.complex64 if dtype.is_complex else torch.float32).numpy()
    return wide


def own(view: Array, dtype: torch.dtype, kind: Kind) -> Array | torch.Tensor:
    """A copy of staged results that belongs to the caller.

    Args:
        view: `numpy_view` of the staging buffer.
        dtype: the tensor's dtype.
        kind: NUMPY or TORCH. numpy has no bfloat16, float8 or complex32: see `widened`.
    """
    if kind is not NUMPY and torch.is_inference_mode_enabled():
        # The mode is the thread's, and so that of whichever task awaits inside one: nobody could write to the result.
        with torch.inference_mode(False):
            return own(view, dtype, kind)
    copy = view.copy()
    if kind is NUMPY:
        return widened(copy, dtype)
    tensor = torch.from_numpy(copy)
    return tensor if dtype in _NUMPY_DTYPES else tensor.view(dtype)


def examples(warmup: object) -> Iterator[tuple[tuple[object, ...], dict[str, object]]]:
    """The entries of ``warmup=``, each as positional and named inputs.

    A list holds one entry per shape; an entry is one tensor or array, or a tuple or dict of them. Anything else than a
    list is one entry.
    """
    for entry in warmup if isinstance(warmup, list) else [warmup]:
        if isinstance(entry, Mapping):
            yield (), {str(name): value for name, value in entry.items()}
        elif isinstance(entry, tuple):
            yield entry, {}
        else:
            yield (entry,), {}


@dataclass(frozen=True)
class Parameters:
    """What a function may be called with; the default is one that will not say.

    Attributes:
        names: of its parameters, in order.
        positional: those of them that inputs by position stand for.
        required: those that must be given.
        any_position: whether it takes more by position; those are called input_0 and so on.
        any_name: whether it takes others by name.
    """

    names: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    any_position: bool = True
    any_name: bool = False

    @classmethod
    def of(cls, function: Callable[..., object]) -> Parameters:
        """Ask the function."""
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return cls()
        plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        return cls(
            tuple(p.name for p in plain),
            # Where a position means nothing else, it may stand for a keyword-only parameter too.
            tuple(p.name for p in plain if not (variadic and p.kind is p.KEYWORD_ONLY)),
            tuple(p.name for p in plain if p.default is p.empty),
            variadic,
            any(p.kind is p.VAR_KEYWORD for p in parameters),
        )


def arrange(function: Callable[..., object], names: Sequence[str]) -> tuple[list[int], dict[str, int]]:
    """Which of the inputs of these names `function` takes by position, in its order, and which by name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return list(range(len(names))), {}
    named = {name: i for i, name in enumerate(names)}
    variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    ordered = (inspect.Parameter.POSITIONAL_ONLY, *[inspect.Parameter.POSITIONAL_OR_KEYWORD] * variadic)
    positions = [named.pop(p.name) for p in parameters if p.kind in ordered and p.name in named]
    if variadic:
        positions += [named.pop(name) for i, name in enumerate(names) if name == f"input_{i}" and name in named]
    return positions, named


def _is_array(value: object) -> bool:
    """Whether numpy takes this as an array in host memory, though it is none: a video frame, an image."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)) or not hasattr(type(value), "__array__"):
        return False
    try:
        if hasattr(value, "__cuda_array_interface__"):
            return False
        return not hasattr(value, "__dlpack_device__") or int(value.__dlpack_device__()[0]) == _ON_HOST
    except Exception:  # reading it through DLPack fails too, and says why
        return False


def _as_array(name: str, value: object) -> Array:
    try:
        return np.asarray(value)
    except Exception as error:
        raise InputError(f"input {name!r}: {type(value).__name__} could not be read as an array: {error}") from error


def _shape_and_dtype(name: str, value: object) -> tuple[tuple[int, ...], torch.dtype]:
    if _is_array(value):
        value = _as_array(name, value)
    if isinstance(value, np.ndarray):
        dtype = _TORCH_DTYPES.get(value.dtype)
        if dtype is None:
            raise InputError(f"input {name!r}: dtype {value.dtype} cannot be held by a tensor")
        return value.shape, dtype
    tensor = _as_tensor(name, value)
    return tuple(tensor.shape), tensor.dtype


def _as_tensor(name: str, value: object) -> torch.Tensor:
    """A strided, detached, real tensor over the caller's memory; no copy."""
    tensor: torch.Tensor
    if isinstance(value, torch.Tensor):
        tensor = value
    elif hasattr(value, "__dlpack__"):
        try:
            tensor = torch.utils.dlpack.from_dlpack(value)
        except Exception as error:
            raise InputError(f"input {name!r}: {type(value).__name__} could not be read through DLPack: {error}") from error
    elif hasattr(value, "__cuda_array_interface__"):
        try:
            tensor = torch.as_tensor(value, device="cuda")
        except Exception as error:
            raise InputError(
                f"input {name!r}: {type(value).__name__} could not be read through __cuda_array_interface__: {error}"
            ) from error
    else:
        hint = "pass named inputs as model(**inputs)" if isinstance(value, Mapping) else "convert it with np.asarray(...)"
        raise InputError(
            f"input {name!r}: expected a numpy array, a torch tensor, or an object with __array__, DLPack or "
            f"__cuda_array_interface__, got {type(value).__name__}; {hint}"
        )
    if tensor.is_nested or tensor.layout is not torch.strided:
        layout = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise InputError(f"input {name!r}: expected a strided tensor, got a {layout} one; convert it with .to_dense()")
    if tensor.is_meta:
        raise InputError(f"input {name!r}: a meta tensor has no data; pass a real one")
    return tensor.detach() if tensor.requires_grad else tensor


def _strided(source: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise EngineError(f"{source} returned {name!r} as a {tensor.layout} tensor; return a strided one")
    return tensor.detach()


def _refuse(spec: TensorSpec, got: str, hint: str = "") -> NoReturn:
    raise InputError(f"input {spec.name!r}: expected {spec}, got {got}" + (f"; {hint}" if hint else ""))


def _refuse_name(name: str, listing: str) -> NoReturn:
    hint = ""
    if name in {"deadline", "priority"}:
        hint = "; deadline= and priority= need load(..., batching=aiotrt.Batching(stack=False)), or Batching() to stack them"
    raise InputError(f"there is no input {name!r}; the inputs are {listing}{hint}")


def _conversion(value: object, dtype: torch.dtype) -> str:
    if isinstance(value, np.ndarray):
        numpy_dtype = _NUMPY_DTYPES.get(dtype)
        if numpy_dtype is None or value.dtype == object:
            return ""
        return f"convert it with .astype(np.{numpy_dtype})"
    return f"convert it with .to({dtype})"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
