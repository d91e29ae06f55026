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
            self.tensor, self.host = tensor if dtype in NUMPY_DTYPES else tensor.view(dtype), None

    def write(self, view: Array) -> None:
        """Copy a host input into the program's staging memory: a plain copy, by this thread."""
        assert self.host is not None
        np.copyto(view, self.host)

    def copies(self, buffer: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
        """What must be copied on the device to bring a device input into the program's buffer: to where, from where."""
        assert self.tensor is not None
        return ((buffer, self.tensor),)
