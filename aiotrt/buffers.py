"""The input and output buffers of a leased slot, which the lease's holder reads and writes."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import Any, Final, overload

import numpy as np
import torch

from aiotrt.errors import InputError, UsageError
from aiotrt.runtime.hold import Hold
from aiotrt.tensors import DEVICE, number, numpy_view, widened

__all__ = ["Buffer", "Buffers"]

_LEGACY_STREAM: Final = 1  # the CUDA array interface's number for the legacy default stream, whose handle is 0


class Buffer:
    """One input or output buffer of a leased slot.

    Attributes:
        name: the engine's name for it.
    """

    def __init__(self, hold: Hold, index: int, name: str, *, is_input: bool) -> None:
        self.name = name
        self._hold = hold
        self._index = index
        self._is_input = is_input

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes of its dimensions."""
        return tuple(self._tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its torch dtype."""
        return self._tensor.dtype

    @property
    def tensor(self) -> torch.Tensor:
        """The device tensor itself, without a copy.

        After a launch, work on the current stream may read an output's tensor. On the host device plain Python runs on no
        stream: there the tensor may be read once its produce event is complete, or by a function that `Stream.run` runs,
        in that stream's order. An input may be written through its tensor.

        Raises:
            UsageError: the lease has ended; a replay without a graph is not on the device yet; for an output, nothing was
                launched yet, or (host) the launch is not complete; for an input (host), an assigned value was not copied
                to it yet.
        """
        hold = self._hold
        if hold.executor.device.is_on_stream():
            # Called by a function that runs on a stream, perhaps after the lease has ended. `consumed` made the slot's next
            # launch wait for that stream, so the contents are still those of this lease.
            return self._tensor
        hold.check()
        hold.check_submitted()
        if not self._is_input:
            hold.check_launched()
        hold.order()
        if hold.unified:
            hold.check_settled(f"{'input' if self._is_input else 'output'} {self.name!r}")
        if not self._is_input:
            return hold.handed_out(self._tensor)
        hold.check_arrived(self._index, self.name)
        hold.wrote(self._index, host=False)
        return self._tensor

    @property
    def host(self) -> torch.Tensor:
        """Its page-locked staging memory as a host tensor, without a copy (`numpy()` makes it an array).

        The next launch copies an input that was written here to the device. An output is here once the launch is complete,
        if the lease was taken with ``outputs="torch"`` or ``"numpy"``.

        Raises:
            UsageError: the lease has ended; the last launch is not complete; the lease has no outputs on the host; on the
                host device, a value assigned to an input was not copied to it yet.
        """
        hold = self._hold
        hold.check()
        hold.check_submitted()
        if not self._is_input:
            hold.check_launched()
        hold.check_settled(f"{'input' if self._is_input else 'output'} {self.name!r}")
        if self._is_input:
            hold.check_arrived(self._index, self.name)
            hold.wrote(self._index, host=True)
            return hold.program.staged_input(self._index)
        if hold.unified:
            return self._tensor
        staged = hold.program.staged_outputs[self._index]
        if staged is None or hold.kind is DEVICE:
            raise UsageError(
                f"output {self.name!r} is on the device only: use its tensor there, or lease with outputs='torch'"
            )
        return staged

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Return `host` as an array, for ``np.asarray(buffer)``. Raises as `host` does.

        No copy is made, unless `dtype` or `copy` requires one, or numpy lacks the dtype: see `Lease.replay`.
        """
        host = self.host
        array = widened(numpy_view(host), host.dtype)
        if copy is False and not np.shares_memory(array, numpy_view(host)):
            raise ValueError(f"{self.name!r} is {host.dtype}, which numpy lacks, so an array of it must be a copy")
        return np.array(array, dtype, copy=copy)

    def __dlpack__(self, **options: Any) -> Any:
        """Return `tensor` as a DLPack capsule, for functions like ``torch.from_dlpack(buffer)``. Raises as `tensor` does."""
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[enum.IntEnum, int]:
        """Return DLPack's type and number of the buffer's device."""
        return self._tensor.__dlpack_device__()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """Describe `tensor` for libraries such as CuPy and Numba; on CUDA only. Raises as `tensor` does.

        The description names the current stream. A library that reads the tensor must order its work after that stream.
        """
        if not self._tensor.is_cuda:
            raise AttributeError(f"{self!r} is in host memory: use np.asarray")
        description: dict[str, Any] = self.tensor.__cuda_array_interface__
        handle = self._hold.executor.device.current_handle()
        return {**description, "version": 3, "stream": handle or _LEGACY_STREAM}

    def __setitem__(self, index: Any, value: object) -> None:
        """Write an input, or part of it.

        Args:
            index: as for numpy; ``...`` for all of it.
            value: a number; a host array or tensor, which is copied to staging memory before this returns; a device tensor,
                which is copied in the order of the current stream; or another lease's output buffer, which is copied on
                the device once it is produced.

        Raises:
            InputError: wrong dtype, shape or device, a number that the dtype does not hold, or no such index. Nothing was
                written.
            UsageError: the lease has ended; the buffer is an output; a launch is not complete and the value is on the host;
                a replay without a graph is not on the device yet; or one input gets values both from the host and from
                the device.
        """
        hold = self._hold
        hold.check()
        hold.check_submitted()
        if not self._is_input:
            raise UsageError(f"output {self.name!r} is written by the model; only inputs can be assigned to")
        if isinstance(value, Buffer):
            value._hold.check()
            value._hold.check_submitted()
            value._hold.check_launched()
            value._hold.order()
            if value.dtype is not self.dtype:
                raise InputError(f"input {self.name!r}: expected {self.dtype}, got {value!r}")
            self._write_device(index, value._tensor)
            # The current stream makes the copy: without this the other slot's next launch could overwrite its source first.
            value._hold.consumed(None)
            return
        if isinstance(value, (bool, int, float, complex, np.generic)):
            self._write_host(index, value)
            return
        argument = hold.executor.specs.check_part(hold.specs[self._index], value)
        if argument.tensor is not None:
            self._write_device(index, argument.tensor)
        else:
            self._write_host(index, argument.host)

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_") and name != "name":
            raise AttributeError(f"write to a buffer with buffer[...] = value, not to its attribute {name!r}")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<Buffer {self.name}: {str(self.dtype).removeprefix('torch.')} {self.shape}>"

    @property
    def _tensor(self) -> torch.Tensor:
        program = self._hold.program
        return program.inputs[self._index] if self._is_input else program.outputs[self._index]

    def _write_host(self, index: Any, value: Any) -> None:
        hold = self._hold
        hold.check_settled(f"input {self.name!r}")
        view = hold.program.input_views[self._index]
        assert view is not None
        if not isinstance(value, np.ndarray):
            value = self._number(value)
        self._check_broadcast(view, index, value.shape)
        hold.wrote(self._index, host=True)  # after the checks: a refused value was not written
        if hold.unified and not hold.is_current_idle():
            # Earlier copies are still queued on the current stream: this one must come after them.
            value = np.array(value)
            hold.on_current(self._index, lambda: view.__setitem__(index, value))
        else:
            view[index] = value

    def _write_device(self, index: Any, source: torch.Tensor) -> None:
        hold = self._hold
        destination = self._tensor
        hold.order()  # the last launch must have read its inputs before they change
        self._check_broadcast(destination, index, source.shape)
        hold.wrote(self._index, host=False)

        def write() -> None:
            with torch.no_grad():
                destination[index] = source

        if hold.unified:
            hold.on_current(self._index, write)
        else:
            write()  # torch submits it to the current stream

    def _number(self, value: object) -> np.ndarray[Any, Any]:
        try:
            return number(value, self.dtype)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"input {self.name!r}: expected a number that {self.dtype} holds, got {value!r}") from error

    def _check_broadcast(self, whole: Any, index: Any, shape: Sequence[int]) -> None:
        try:
            place = tuple(whole[index].shape)
        except (IndexError, TypeError, ValueError) as error:
            raise InputError(f"input {self.name!r} of shape {self.shape} has no {index!r}: {error}") from error
        try:
            fits = np.broadcast_shapes(place, shape) == place  # torch.broadcast_shapes imports sympy: 0.3 s on the loop
        except ValueError:
            fits = False
        if not fits:
            raise InputError(f"input {self.name!r}: expected a value of shape {place}, got {tuple(shape)}")


class Buffers:
    """The inputs or outputs of a leased slot, by position, by name, or as attributes of their names.

    Like a tuple, but without a tuple's methods, because an input may have the name ``count`` or ``index``.
    """

    def __init__(self, what: str, buffers: Sequence[Buffer]) -> None:
        self._what = what
        self._buffers = tuple(buffers)
        self._by_name = {buffer.name: buffer for buffer in buffers}

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[Buffer]:
        return iter(self._buffers)

    @overload
    def __getitem__(self, key: int | str) -> Buffer: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Buffer, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Buffer | tuple[Buffer, ...]:
        """Return the buffer of a name or position; for a slice, a tuple of buffers.

        Raises:
            KeyError: no buffer has this name.
            IndexError: there is no buffer at this position.
        """
        try:
            return self._by_name[key] if isinstance(key, str) else self._buffers[key]
        except LookupError as error:
            raise type(error)(self._lacks(key)) from None

    def __getattr__(self, name: str) -> Buffer:
        by_name: dict[str, Buffer] = self.__dict__["_by_name"]
        if name not in by_name:
            raise AttributeError(self._lacks(name))
        return by_name[name]

    def _lacks(self, key: object) -> str:
        return f"there is no {self._what} {key!r}; the {self._what}s are {', '.join(self._by_name)}"

    def __setattr__(self, name: str, value: object) -> None:
        if not name.startswith("_"):
            raise AttributeError(f"write to a buffer with {self._what}s.{name}[...] = value")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"<{self._what}s {list(self._buffers)}>"
