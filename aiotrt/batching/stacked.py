"""One input of a batch, made of its items' inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from aiotrt.errors import InputError
from aiotrt.tensors import Argument, Specs
from aiotrt.tensors.conversion import Array

__all__ = ["Stacked", "check_stackable", "write_rows"]


class Stacked(Argument):
    """One input of a batch: the items' arguments on a new axis 0, the last one repeated up to the batch's size.

    Args:
        items: at least one, all on the host or all on the device, of equal shapes.
        size: of the batch.
    """

    __slots__ = ("items",)

    def __init__(self, items: Sequence[Argument], size: int) -> None:
        first = items[0]
        shape = (size, *first.shape)
        # Its values are never read: it shows that the input is on the host, and how much there is to copy.
        host = None if first.host is None else np.broadcast_to(first.host, shape)
        super().__init__(shape, None, host, first.tensor)
        self.items = items

    def write(self, view: Array) -> None:
        """Copy each item into its row."""
        write_rows(view, [item.host for item in self.items])

    def copies(self, buffer: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Return the copies of the items to their rows, and of the last one to the rows that are left."""
        tensors = [item.tensor for item in self.items if item.tensor is not None]
        tensors += tensors[-1:] * (self.shape[0] - len(tensors))
        return [(buffer[i], tensor) for i, tensor in enumerate(tensors)]


def write_rows(view: Array, items: Sequence[Any]) -> None:
    """Copy each array, or host tensor, into its row, and the last one into the rows that are left."""
    i = 0
    for item in items:
        view[i] = item if type(item) is np.ndarray else item.numpy()
        i += 1
    view[i:] = view[i - 1]


def check_stackable(items: Sequence[Argument], specs: Specs) -> None:
    """Raise unless the inputs of an item can be rows of a batch's inputs.

    Raises:
        InputError: an input cannot; the message names it.
    """
    for item, spec in zip(items, specs, strict=True):
        try:
            Stacked([item], 1)
        except ValueError as error:
            raise InputError(
                f"input {spec.name!r} has {len(item.shape)} extents, which leaves none for the batch: pass items of fewer, "
                f"or load without batching= ({error})"
            ) from None
