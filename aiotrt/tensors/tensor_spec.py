"""The specification of one input or output of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from aiotrt.tensors.conversion import dtype_name

__all__ = ["Shapes", "TensorSpec"]

Shapes: TypeAlias = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its name, shape and dtype.

    Attributes:
        name: the engine's name for it.
        shape: the size of each dimension, with None for a dynamic size; None instead of a tuple for any rank.
        dtype: the torch dtype.
        minimum: the smallest allowed shape, if the engine declares one.
        maximum: the largest allowed shape, if the engine declares one.
    """

    name: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype
    minimum: tuple[int, ...] | None = None
    maximum: tuple[int, ...] | None = None

    def __str__(self) -> str:
        sizes = "..."
        if self.shape is not None:
            sizes = ", ".join("*" if size is None else str(size) for size in self.shape)
        return f"{self.name}: {dtype_name(self.dtype)} ({sizes})"

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether the spec allows a tensor of this shape."""
        if self.shape is None:
            return True
        if len(shape) != len(self.shape):
            return False
        for want, got in zip(self.shape, shape, strict=True):
            if want is not None and want != got:
                return False
        return (self.minimum is None or all(low <= got for low, got in zip(self.minimum, shape, strict=True))) and (
            self.maximum is None or all(got <= high for high, got in zip(self.maximum, shape, strict=True))
        )
