"""Routes: how the short path recognises calls of one signature, and which slots have the program for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from aiotrt.devices import Device
from aiotrt.runtime.programs import Program
from aiotrt.tensors import Argument, Key, Kind, Shapes, Specs
from aiotrt.tensors.conversion import NUMPY_DTYPES

__all__ = ["IN_PLACE_BYTES", "Route"]

_TENSOR: Final = torch.Tensor
_STRIDED: Final = torch.strided
#: Page-locked host inputs of at least this size are read in place. To query whether memory is page-locked takes about 2 us
#: of the loop's thread, and to copy that many bytes takes 5 to 10 us (H200's host).
IN_PLACE_BYTES: Final = 128 << 10
#: Attributes of an input that only the long way handles; see `handshake`.
_HANDSHAKE: Final = frozenset({"_trt_ready_event", "_trt_reuse_as_input_buffer"})


class Route:
    """One signature: the type, dtype, shape and place of each input, all of them plain.

    A plain tensor is contiguous and has no attributes of the handshake, no gradient and no lazy flag, so that a call needs
    no `Argument` objects. A call that does not match takes the long way, which explains what is wrong with it.

    Args:
        values: the inputs that were accepted.
        arguments: the arguments that the long way made of them.
        specs: what they were checked against.
        shapes: the shapes of the inputs.
        kind: what the results should be.
        holders: the programs for these shapes, by slot, kept up to date by the cache.
        device: the device where device inputs are.
        holds: whether a tensor is on any of the model's devices; None if `device` is the only one.

    Attributes:
        on_host: the indices of the inputs on the host.
        nbytes: how many bytes the inputs on the host have.
    """

    __slots__ = (
        "_any_holds",
        "_holds",
        "_index",
        "_is_pinned",
        "_large",
        "_signature",
        "holders",
        "kind",
        "nbytes",
        "on_device",
        "on_host",
        "shapes",
        "specs",
    )

    def __init__(
        self,
        values: Sequence[Any],
        arguments: Sequence[Argument],
        specs: Specs,
        shapes: Shapes,
        kind: Kind,
        holders: Mapping[int, Program],
        device: Device,
        holds: Callable[[torch.Tensor], bool] | None = None,
    ) -> None:
        self.specs = specs
        self.shapes = shapes
        self.kind = kind
        self.holders = holders
        self.on_host = tuple(i for i, argument in enumerate(arguments) if argument.host is not None)
        self.on_device = len(self.on_host) < len(arguments)
        self.nbytes = sum(argument.host.nbytes for argument in arguments if argument.host is not None)
        self._is_pinned = device.is_pinned
        #: The inputs that the device reads in place, without a copy, if their memory is page-locked.
        self._large = tuple(
            i
            for i, argument in enumerate(arguments)
            if argument.host is not None and argument.host.nbytes >= IN_PLACE_BYTES and not device.unified
        )
        self._holds = device.holds
        self._any_holds = holds or device.holds
        self._index: int | None = device.torch_device.index  # of a GPU; None for a device in host memory
        self._signature = [
            (type(value), value.dtype, tuple(value.shape), argument.host is not None)
            for value, argument in zip(values, arguments, strict=True)
        ]

    @property
    def key(self) -> Key:
        """The key of its program, among those of a slot."""
        return self.shapes, (), self.specs

    @staticmethod
    def suits(values: Sequence[object], arguments: Sequence[Argument], device: Device) -> bool:
        """Return whether calls like this one can have a route."""
        for value, argument in zip(values, arguments, strict=True):
            if argument.host is None:
                # A host input that the device reads in place is not in the device's own memory.
                if type(value) is not _TENSOR or not device.holds(value):
                    return False
            elif type(value) is not np.ndarray and (type(value) is not _TENSOR or value.dtype not in NUMPY_DTYPES):
                return False  # a tensor on the host is copied as an array, so numpy must know its dtype
        return True

    def matches(self, values: Sequence[object]) -> bool:
        """Return whether these inputs have this signature."""
        if len(values) != len(self._signature):
            return False
        index = self._index
        one: Any
        try:
            for one, (kind, dtype, size, on_host) in zip(values, self._signature):  # noqa: B905  # of the same length
                if type(one) is not kind:
                    return False
                if kind is not _TENSOR:
                    if one.dtype != dtype or one.shape != size:
                        return False
                elif (
                    one.dtype is not dtype
                    or one.shape != size
                    or not one.is_contiguous()
                    or one.is_neg()
                    or (dtype.is_complex and one.is_conj())
                    or (one.__dict__ and not _HANDSHAKE.isdisjoint(one.__dict__))
                ):
                    return False
                elif on_host:
                    if not one.is_cpu or one.requires_grad or one.layout is not _STRIDED or self._any_holds(one):
                        return False
                elif index is None:
                    if one.layout is not _STRIDED or not self._holds(one):
                        return False
                elif one.get_device() != index:
                    return False
        except RuntimeError:  # a nested tensor has no shape, and a row-sparse tensor no memory order
            return False
        return not self._large or not self._has_pinned(values)

    def _has_pinned(self, values: Sequence[Any]) -> bool:
        """Return whether a large input is page-locked, so that the long way reads it without a copy to staging memory."""
        for i in self._large:
            value = values[i]
            if type(value) is np.ndarray:
                if not (value.flags.writeable and value.flags.c_contiguous):  # the long way would copy it too
                    continue
                try:
                    value = torch.from_numpy(value)
                except (TypeError, ValueError):  # the stride of an axis of size 1 may be anything
                    continue
            if self._is_pinned(value):
                return True
        return False

    def still_matches(self, values: Sequence[object]) -> bool:
        """Return whether inputs that matched still match: the caller may have changed one in place meanwhile."""
        index = self._index
        one: Any
        for one, (kind, dtype, size, on_host) in zip(values, self._signature, strict=True):
            if one.dtype != dtype or one.shape != size:
                return False
            if kind is _TENSOR:
                if not one.is_contiguous():
                    return False
                if on_host:
                    if one.requires_grad:
                        return False
                elif index is not None and one.get_device() != index:
                    return False
        return True
