"""The signature of one call's inputs."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self, TypeAlias

from aiotrt.tensors.structure import Structure
from aiotrt.tensors.tensor_spec import Shapes, TensorSpec

__all__ = ["Key", "Signature", "Specs"]


class Signature(tuple[TensorSpec, ...]):  # noqa: SLOT001  # a tuple of any length cannot have slots
    """The inputs of one call without their shapes: a spec for each tensor, and the structure of the arguments. Hashable.

    Args:
        specs: one for each tensor, in order.
        structure: the structure of the pair of positional and named arguments; None if each argument is a tensor.
        constants: the names and values of the structure's leaves that are not tensors, for messages.

    Attributes:
        item: for a batch, the signature of one item; else None.
    """

    structure: Structure | None
    constants: tuple[tuple[str, object], ...]
    item: Signature | None
    _hash: int
    _batched: Signature | None

    def __new__(
        cls, specs: Iterable[TensorSpec], structure: Structure | None = None, constants: Sequence[tuple[str, object]] = ()
    ) -> Self:
        """Create a signature and compute its hash once."""
        self = super().__new__(cls, specs)
        self.structure = structure
        self.constants = tuple(constants)
        self.item = self._batched = None
        self._hash = hash((tuple.__hash__(self), structure))
        return self

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Signature)
            and self._hash == other._hash
            and tuple.__eq__(self, other)
            and self.structure == other.structure
        )

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        """List the inputs of one call; for a batch, those of one item."""
        inputs = [str(spec) for spec in self.item or self]
        return ", ".join(
            inputs + [f"{name}={getattr(value, '__qualname__', reprlib.repr(value))}" for name, value in self.constants]
        )

    def batched(self) -> Signature:
        """Return the signature of a batch of such items: each tensor has one more axis, the first."""
        if self._batched is None:
            specs = [TensorSpec(s.name, None if s.shape is None else (None, *s.shape), s.dtype) for s in self]
            self._batched = Signature(specs, self.structure, self.constants)
            self._batched.item = self
        return self._batched

    def unbatched(self) -> Signature:
        """Return the signature of one item of such a batch: each tensor without its first axis."""
        if self.item is None:
            specs = [replace(s, shape=_rest(s.shape), minimum=_rest(s.minimum), maximum=_rest(s.maximum)) for s in self]
            self.item = Signature(specs, self.structure, self.constants)
            self.item._batched = self
        return self.item


def _rest(sizes: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Return the sizes without the first axis; None if they are unknown."""
    return None if sizes is None else sizes[1:]


Specs: TypeAlias = Signature
#: The key of a program in its model's cache: the inputs' shapes, the addresses of the inputs that a graph reads in place,
#: and the inputs' signature.
Key: TypeAlias = tuple[Shapes, tuple[tuple[int, int], ...], Signature]
