"""The outputs of a program: their names, and the structure in which a caller gets them."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

import torch

from aiotrt.errors import EngineError
from aiotrt.tensors.structure import Structure, is_tensor, paths, place_name, take_apart

__all__ = ["OutputNames", "flatten"]


class OutputNames:
    """The names of a program's outputs, and how results are packed.

    Args:
        names: one for each tensor.
        structure: the structure that results are packed into; None for a named tuple, or for a single tensor by itself.

    Attributes:
        is_bare: whether the result is a single tensor by itself.
        is_flat: whether the result is a single tensor, or one container of tensors.
        is_mapping: whether the result is a mapping.
        pack: packs a sequence of results, one for each name, into the caller's result.
        read: returns the tensors of a returned value if it is flat and has this structure; else None.
    """

    __slots__ = ("is_bare", "is_flat", "is_mapping", "names", "pack", "read", "structure")

    def __init__(self, names: Sequence[str], structure: Structure | None = None) -> None:
        self.names = tuple(names)
        self.structure = structure
        self.is_bare = len(self.names) == 1 if structure is None else structure.is_bare
        self.is_flat = structure is None or structure.is_flat
        self.is_mapping = structure is not None and structure.is_mapping
        self.read: Callable[[Any], list[Any] | None] = (lambda value: None) if structure is None else structure.reader
        self.pack: Callable[[Sequence[object]], Any]
        if self.is_bare:
            self.pack = itemgetter(0)
        elif structure is None:
            # rename: tensor names need not be Python identifiers; other names are accessible by position only.
            container: Any = namedtuple("Outputs", self.names, rename=True)  # type: ignore[misc]  # noqa: PYI024
            self.pack = container._make
        else:
            self.pack = structure.builder

    def become(self, other: OutputNames) -> None:
        """Copy all attributes of `other`, which has as many names: the structure of a result may depend on the data."""
        for name in self.__slots__:
            setattr(self, name, getattr(other, name))


def flatten(
    source: str, value: object, device: torch.device, *, declared: bool = False, known: OutputNames | None = None
) -> tuple[OutputNames, list[torch.Tensor]]:
    """Flatten the value that an engine, a module or a function returned.

    Args:
        source: the name of the engine, module or function, for messages.
        value: any structure with at least one tensor.
        device: the device that the tensors are moved to.
        declared: whether `value` is an engine's mapping of outputs by name, which callers get as a named tuple.
        known: the names of the previous value; returned again if the structure is unchanged.

    Returns:
        The names and structure, and the tensors in their order.

    Raises:
        EngineError: the value is anything else; the message names the place and the type.
    """
    if isinstance(value, torch.Tensor):
        bare = known if known is not None and known.is_bare else OutputNames(("output",), None if declared else _TENSOR)
        return bare, [_strided(source, bare.names[0], value, device)]
    if declared and known is not None and isinstance(value, Mapping) and tuple(value) == known.names:
        return known, [_strided(source, name, tensor, device) for name, tensor in value.items()]
    if known is not None and (tensors := known.read(value)) is not None:
        return known, [_strided(source, name, tensor, device) for name, tensor in zip(known.names, tensors, strict=True)]
    try:
        structure, tensors = take_apart(value)
    except TypeError as error:
        got = _at(value, str(error))
        raise EngineError(f"{source} returned {got}; it must return a tensor, or a structure of tensors") from None
    except RecursionError:
        got = type(value).__name__
        raise EngineError(f"{source} returned a {got} that contains itself, or is nested too deeply") from None
    if known is None or structure != known.structure:
        if not tensors:
            raise EngineError(_without_tensors(source, value))
        places = [place for place, leaf in paths(value) if is_tensor(leaf)]
        known = OutputNames([_name(place) for place in places], None if declared else structure)
    for name, tensor in zip(known.names, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            where = "" if structure.is_bare else f" as {name!r}"
            raise EngineError(f"{source} returned {type(tensor).__name__}{where}; it must return a tensor there")
    return known, [_strided(source, name, tensor, device) for name, tensor in zip(known.names, tensors, strict=True)]


_TENSOR: Final = take_apart(torch.empty(0))[0]


def _without_tensors(source: str, value: object) -> str:
    if value is None or not isinstance(value, (Mapping, tuple, list)):
        got = "nothing (None)" if value is None else type(value).__name__
        return f"{source} returned {got}; it must return a tensor, or a structure of tensors"
    got = f"a {type(value).__name__} without a tensor" if len(value) else f"an empty {type(value).__name__}"
    return f"{source} returned {got}; it must return at least one tensor"


def _name(place: Sequence[int | str]) -> str:
    if not place:
        return "output"
    first, *rest = place
    return place_name(f"output_{first}" if isinstance(first, int) else first, rest)


def _at(value: object, kind: str) -> str:
    """Describe the first leaf of class `kind` in a result, with its place."""
    for place, leaf in paths(value):
        if place and type(leaf).__name__ == kind:
            return f"{kind} as {_name(place)!r}"
    return kind


def _strided(source: str, name: str, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else tensor.layout
        raise EngineError(f"{source} returned {name!r} as a {kind} tensor; return a strided one")
    if tensor.is_meta:
        raise EngineError(f"{source} returned {name!r} as a meta tensor, which has no data; return one on {device}")
    return tensor.detach() if tensor.device == device else tensor.detach().to(device)
