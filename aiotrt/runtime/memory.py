"""Device memory that belongs to callers, and memory that must not be freed while a device may write to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch

from aiotrt.devices import Device, Stream

__all__ = ["allocate", "keep", "release_when_idle"]

_kept: Final[list[object]] = []


def allocate(device: Device, origin: Stream, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Allocate device memory for copies of `outputs`, in the order of the caller's stream.

    The allocator reuses freed memory in the order of the stream that was current at its allocation. So this must be the
    caller's stream, on which the results are used and dropped: with any other stream, memory could be handed out again while
    the caller's last kernels read it.
    """
    if origin.handle == device.current_stream().handle:
        return _empty(device, outputs)
    return device.call(origin, partial(_empty, device, outputs))


def keep(what: object) -> None:
    """Leak deliberately what a device may still write to: a leak is better than a dangling pointer."""
    _kept.append(what)


def release_when_idle(what: object, device: Device) -> None:
    """Stop keeping `what` when the device has completed all work submitted so far. Blocks: for worker threads.

    Raises:
        DeviceError: the device broke; `what` is kept permanently.
    """
    device.prepare_thread()
    device.synchronize()
    _kept.remove(what)


def _empty(device: Device, outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    if torch.is_inference_mode_enabled():  # perhaps another task's mode: see `tensors.conversion.own`
        with torch.inference_mode(False):
            return _empty(device, outputs)
    return [device.empty(output.shape, output.dtype) for output in outputs]
