"""One checked input of one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from aiotrt.tensors.conversion import NUMPY_DTYPES, Array

__all__ = ["Argument"]


class Argument:
    """One checked input of one call.

    Attributes:
        shape: the input's shape.
        host: a numpy view of the caller's host memory (dtypes that numpy lacks are viewed as integers), or None.
        tensor: the caller's tensor in device memory, or in page-locked memory that the device reads in place; or None.
        owner: the caller's object, kept alive while the device may read it.
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
        """Let the device read this host input of `dtype` in place, if it is in page-locked contiguous memory."""
        host = self.host
        if host is None or not (host.flags.c_contiguous and host.flags.writeable):  # torch warns about read-only arrays
            return
        try:
            tensor = torch.from_numpy(host)
        except (TypeError, ValueError):  # an axis of size 1 may have a stride that torch rejects, and be contiguous to numpy
            return
        if is_pinned(tensor):
            self.tensor, self.host = tensor if dtype in NUMPY_DTYPES else tensor.view(dtype), None

    def write(self, view: Array) -> None:
        """Copy a host input into the program's staging memory, on the calling thread."""
        assert self.host is not None
        np.copyto(view, self.host)

    def copies(self, buffer: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """Return the device copies that move a device input into the program's buffer, as (destination, source) pairs."""
        assert self.tensor is not None
        return ((buffer, self.tensor),)
