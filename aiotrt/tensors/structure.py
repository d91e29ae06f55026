"""Nested structures of tensors: flattened, compared, and rebuilt.

Structures consist of the containers of `torch.utils._pytree`: lists, tuples, dicts, named tuples, and classes registered
there. Objects of other classes, such as dataclasses, are flattened by their attributes.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch.utils import _pytree as pytree

__all__ = ["Structure", "children", "examples", "is_tensor", "paths", "place_name", "take_apart"]

_CONSTANTS: Final = (
    type(None), bool, int, float, complex, str, bytes, range, slice, type(...), enum.Enum, np.generic,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip
_HEAP_TYPE: Final = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class defined in Python code


class _Tensor:
    """A placeholder for a tensor in a structure."""


_TENSOR: Final = _Tensor()


class Structure:
    """A nested value without its tensors: its containers, and its other leaves, which are constants. Hashable.

    Attributes:
        count: the number of tensors.
        key: a hashable value, equal for equal structures.
    """

    __slots__ = ("_hash", "_places", "_spec", "count", "key")

    def __init__(self, spec: pytree.TreeSpec, places: Sequence[object]) -> None:
        self._spec = spec
        self._places = tuple(places)
        objects = [place.structure for place in places if isinstance(place, _Object)]
        # Compare by identity: a constant may be equal to anything, or raise when it is compared.
        self.count: int = sum([place is _TENSOR for place in places]) + sum(structure.count for structure in objects)
        self.key = _spec_key(spec), tuple(map(_place_key, self._places))
        try:
            self._hash = hash(self.key)
        except Exception:
            for place in places:
                _check_hash(place, _place_key(place))
            raise

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Structure) and self._hash == other._hash and self.key == other.key)

    def __hash__(self) -> int:
        return self._hash

    def build(self, tensors: Sequence[object]) -> Any:
        """Return a new value of this structure with these `count` tensors."""
        return self._build(iter(tensors))

    def _build(self, tensors: Iterator[object]) -> Any:
        leaves = [
            next(tensors) if place is _TENSOR else place.build(tensors) if isinstance(place, _Object) else place
            for place in self._places
        ]
        return pytree.tree_unflatten(leaves, self._spec)

    @property
    def is_bare(self) -> bool:
        """Whether this is a single tensor without a container."""
        return self._spec.type is None and self._places[0] is _TENSOR

    @property
    def is_flat(self) -> bool:
        """Whether this is a single tensor, or one list, tuple or mapping that contains only tensors."""
        return self.is_bare or (
            all(place is _TENSOR for place in self._places)
            and all(child.type is None for child in children(self._spec))
            and issubclass(self._kind, (list, tuple, Mapping))
        )

    @property
    def is_mapping(self) -> bool:
        """Whether this is a mapping."""
        return issubclass(self._kind, Mapping)

    @property
    def builder(self) -> Callable[[Sequence[object]], Any]:
        """A function that does what `build` does, faster if it is called often."""
        kind = self._kind
        if self.is_flat and kind in (tuple, list):
            return kind  # type: ignore[no-any-return]
        if self.is_flat and kind is dict:
            keys = list(self._spec.context)
            return lambda tensors: dict(zip(keys, tensors, strict=True))
        if self.is_flat and hasattr(kind, "_make"):
            return kind._make  # type: ignore[no-any-return]
        return self.build

    @property
    def reader(self) -> Callable[[Any], list[Any] | None]:
        """A fast variant of `take_apart`: returns the tensors of a flat value of this structure, else None."""
        kind, count = self._kind, self.count
        if not self.is_flat or self.is_bare or not (kind in (tuple, list, dict) or hasattr(kind, "_make")):
            return lambda value: None
        keys = list(self._spec.context) if kind is dict else None

        def read(value: Any) -> list[Any] | None:
            if type(value) is not kind or len(value) != count or (keys is not None and list(value) != keys):
                return None
            tensors = list(value) if keys is None else list(value.values())
            for tensor in tensors:
                if type(tensor) is not torch.Tensor:
                    return None
            return tensors

        return read

    @property
    def _kind(self) -> Any:
        """The class of the container; for a leaf, the class of None."""
        kind = self._spec.type
        return self._spec.context if kind is collections.namedtuple else type(None) if kind is None else kind  # noqa: PYI024


class _Object:
    """A placeholder for an object that is flattened by its attributes and, for a subclass of dict or list, by its items."""

    __slots__ = ("kind", "structure")

    def __init__(self, kind: type, structure: Structure) -> None:
        self.kind = kind
        self.structure = structure

    def build(self, tensors: Iterator[object]) -> Any:
        attributes, items = self.structure._build(tensors)
        value = _base(self.kind).__new__(self.kind)  # not the class's constructor, which may need arguments
        if isinstance(value, dict):
            dict.update(value, items)
        elif isinstance(value, list):
            list.extend(value, items)
        for name, attribute in attributes.items():
            object.__setattr__(value, name, attribute)
        return value


def take_apart(value: object) -> tuple[Structure, list[Any]]:
    """Return the structure of a value, and its tensors, arrays and objects that can be read as arrays, in order.

    Raises:
        TypeError: a leaf is neither a tensor nor a constant; the message is the name of its class.
        RecursionError: the value contains itself.
    """
    tensors: list[Any] = []
    return _take_apart(value, tensors), tensors


def paths(value: object) -> list[tuple[tuple[int | str, ...], object]]:
    """Return the place and the value of each leaf, in the order of `take_apart`.

    A place is the sequence of positions, keys and attribute names that leads to the leaf, outermost first.
    """
    children, spec = pytree.tree_flatten(value, is_leaf=lambda one: one is not value or _is_size(one))
    if spec.type is None:
        contents = None if is_tensor(value) or _is_constant(value) else _contents(value)
        if contents is None:
            return [((), value)]
        attributes, items = contents
        return [found for name, one in attributes.items() for found in _below(name, one)] + paths(items)
    labels: Sequence[int | str] = range(len(children))
    if isinstance(value, Mapping) and len(value) == len(children):
        labels = [str(key) for key in value]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        labels = value._fields
    return [found for label, child in zip(labels, children, strict=True) for found in _below(label, child)]


def place_name(first: str, rest: Sequence[int | str]) -> str:
    """Return the name of a place, such as ``images[0]`` or ``cache.layers[1].keys``."""
    return first + "".join(f"[{label}]" if isinstance(label, int) else f".{label}" for label in rest)


def _below(label: int | str, value: object) -> list[tuple[tuple[int | str, ...], object]]:
    return [((label, *place), leaf) for place, leaf in paths(value)]


def examples(warmup: object) -> Iterator[tuple[tuple[object, ...], dict[str, object]]]:
    """Yield the entries of ``warmup=``, each as positional and named inputs.

    A list has one entry per shape; any other value is a single entry. An entry is one input, or a tuple or dict of inputs.
    """
    for entry in warmup if isinstance(warmup, list) else [warmup]:
        if isinstance(entry, Mapping):
            yield (), {str(name): value for name, value in entry.items()}
        elif isinstance(entry, tuple):
            yield entry, {}
        else:
            yield (entry,), {}


def _take_apart(value: object, tensors: list[Any]) -> Structure:
    leaves, spec = pytree.tree_flatten(value, is_leaf=_is_size)
    places: list[object] = []
    for leaf in leaves:
        if is_tensor(leaf):
            tensors.append(leaf)
            places.append(_TENSOR)
        elif _is_constant(leaf):
            places.append(leaf)
        else:
            contents = _contents(leaf)
            if contents is None:
                raise TypeError(type(leaf).__name__)
            places.append(_Object(type(leaf), _take_apart(contents, tensors)))
    return Structure(spec, places)


def _is_size(value: object) -> bool:
    return type(value) is torch.Size  # a leaf, because torch's pytree would rebuild it as a tuple


def is_tensor(leaf: object) -> bool:
    """Whether a value is a tensor, an array, or an object with a protocol for reading it as one."""
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return True
    kind = type(leaf)
    return not isinstance(leaf, np.generic) and any(
        hasattr(kind, name) for name in ("__array__", "__dlpack__", "__cuda_array_interface__")
    )


def _is_constant(leaf: object) -> bool:
    return isinstance(leaf, _CONSTANTS) or callable(leaf)  # functions, classes and modules are compared by identity


def _contents(leaf: object) -> tuple[dict[str, object], object] | None:
    """Return the attributes and items of an object; None if it has other state, as a file or an iterator has."""
    kind = type(leaf)
    if _base(kind) not in (object, dict, list) or kind is object or hasattr(kind, "__next__"):
        return None
    attributes = dict(getattr(leaf, "__dict__", {}))
    for one in kind.__mro__:
        slots = one.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(leaf, name):
                attributes[name] = getattr(leaf, name)
    items = dict(leaf) if isinstance(leaf, dict) else list(leaf) if isinstance(leaf, list) else ()
    return attributes, items


def _base(kind: type) -> Any:
    """Return the first class in the MRO that is not defined in Python code."""
    return next(one for one in kind.__mro__ if not one.__flags__ & _HEAP_TYPE)


def children(spec: pytree.TreeSpec) -> Sequence[pytree.TreeSpec]:
    """Return the specs of a container's children."""
    if hasattr(spec, "children"):
        return spec.children()
    older: Any = spec  # an older torch has an attribute instead
    return older.children_specs  # type: ignore[no-any-return]


def _spec_key(spec: pytree.TreeSpec) -> object:
    if spec.type is None:
        return None
    # The context of a list or tuple adds nothing to its type and its children.
    return spec.type, _frozen(spec.context), *map(_spec_key, children(spec))


def _frozen(context: object) -> object:
    if isinstance(context, (list, tuple)):
        return type(context), *map(_frozen, context)
    if isinstance(context, Mapping):
        return type(context), *((_frozen(key), _frozen(value)) for key, value in context.items())
    _check_hash(context, context)
    return type(context), context


def _check_hash(value: object, key: object) -> None:
    try:
        hash(key)
    except Exception:  # of any class, because the caller's __hash__ raises it
        raise TypeError(f"{type(value).__name__}, which cannot be hashed") from None


def _place_key(place: object) -> object:
    if isinstance(place, _Object):
        return place.kind, place.structure.key
    # Keys must distinguish 1, 1.0 and True, and 0.0 and -0.0, which compare equal; nan must be equal to itself.
    if isinstance(place, (float, complex)):
        return type(place), repr(place)
    if isinstance(place, np.generic):
        return place.dtype, place.tobytes()
    if isinstance(place, slice):
        return slice, *map(_place_key, (place.start, place.stop, place.step))
    return type(place), place
