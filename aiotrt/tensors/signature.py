"""What one call's inputs are."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self, TypeAlias

from aiotrt.tensors.structure import Structure
from aiotrt.tensors.tensor_spec import Shapes, TensorSpec

__all__ = ["Key", "Signature", "Specs"]


class Signature(tuple[TensorSpec, ...]):  # noqa: SLOT001  # a tuple of any length cannot have slots
    """What one call's inputs are, but for their shapes: a spec for each tensor, and the structure that they come in. A key.

    Args:
        specs: one for each tensor, in order.
        structure: of the positional and the named arguments, as a pair; None where each argument is a tensor.
        constants: the leaves of the structure that are no tensors, by name, for messages.

    Attributes:
        item: of a batch's inputs, the signature of its items; else None.
    """

    structure: Structure | None
    constants: tuple[tuple[str, object], ...]
    item: Signature | None
    _hash: int
    _batched: Signature | None

    def __new__(
        cls, specs: Iterable[TensorSpec], structure: Structure | None = None, constants: Sequence[tuple[str, object]] = ()
    ) -> Self:
        """Make one; the hash is taken once."""
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
        """The inputs of one call: with batching, of an item."""
        inputs = [str(spec) for spec in self.item or self]
        return ", ".join(
            inputs + [f"{name}={getattr(value, '__qualname__', reprlib.repr(value))}" for name, value in self.constants]
        )

    def batched(self) -> Signature:
        """The signature of batches of items of this one: each tensor has one more axis, the first."""
        if self._batched is None:
            specs = [TensorSpec(s.name, None if s.shape is None else (None, *s.shape), s.dtype) for s in self]
            self._batched = Signature(specs, self.structure, self.constants)
            self._batched.item = self
        return self._batched

    def unbatched(self) -> Signature:
        """The signature of the items of batches of this one."""
        if self.item is None:
            specs = [replace(s, shape=_rest(s.shape), minimum=_rest(s.minimum), maximum=_rest(s.maximum)) for s in self]
            self.item = Signature(specs, self.structure, self.constants)
            self.item._batched = self
        return self.item


def _rest(sizes: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """Sizes without the first axis; None where none are known."""
    return None if sizes is None else sizes[1:]


Specs: TypeAlias = Signature
#: What tells one model's programs apart: the inputs' shapes, the addresses of inputs that a graph reads where they are, and
#: their signature.
Key: TypeAlias = tuple[Shapes, tuple[tuple[int, int], ...], Signature]
