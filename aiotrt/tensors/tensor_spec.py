"""What an engine says of one of its inputs or outputs."""

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
    """One input or output: its name, extents and dtype.

    Attributes:
        name: the engine's own name for it.
        shape: one entry per dimension; None where the extent may differ from call to call. None for any rank.
        dtype: the torch dtype.
        minimum: the smallest allowed extents, where the engine declares them.
        maximum: the largest allowed extents, where the engine declares them.
    """

    name: str
    shape: tuple[int | None, ...] | None
    dtype: torch.dtype
    minimum: tuple[int, ...] | None = None
    maximum: tuple[int, ...] | None = None

    def __str__(self) -> str:
        extents = "..."
        if self.shape is not None:
            extents = ", ".join("*" if extent is None else str(extent) for extent in self.shape)
        return f"{self.name}: {dtype_name(self.dtype)} ({extents})"

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of this shape is within the spec."""
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
