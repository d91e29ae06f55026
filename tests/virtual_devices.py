"""One law on two devices: the simulated GPU and the host device, both in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeAlias

import pytest
import torch

import aiotrt
from aiotrt.testing import Schedule, SimulatedDevice
from tests.simulated import held_streams, run_simulated
from tests.tools import Affine, executor_of, frame
from tests.virtual_host import VirtualHost, held_host_streams, run_on_host

__all__ = ["DEVICES", "VirtualDevice", "held", "held_slots", "later", "load", "on_both", "read", "run_on"]

VirtualDevice: TypeAlias = SimulatedDevice | VirtualHost

DEVICES: Final = ("simulated", "host")

#: Runs a law once on each device.
on_both: Final = pytest.mark.parametrize("where", DEVICES)


def run_on(
    where: str, program: Callable[[Any], Coroutine[Any, Any, None]], schedules: Sequence[Schedule | int] = range(3)
) -> None:
    """Run `program` on the device called `where`, once under each schedule."""
    for schedule in schedules:
        if where == "simulated":
            simulated = SimulatedDevice(schedule)
            run_simulated(program(simulated), simulated)
        else:
            host = VirtualHost(schedule)
            run_on_host(program(host), host)


def load(device: Any, *, slots: int = 1, **options: Any) -> aiotrt.Model:
    """A model of `Affine`, warmed up for a `frame` unless told otherwise."""
    model: aiotrt.Model = aiotrt.load(Affine(), device=device, slots=slots, **{"warmup": frame(0), **options})
    return model


def held(device: VirtualDevice, *streams: Any) -> contextlib.AbstractContextManager[None]:
    """Work submitted to these streams from now on starts only after the block has ended."""
    if isinstance(device, SimulatedDevice):
        return held_streams(device, *streams)
    return held_host_streams(device, *streams)


def held_slots(device: VirtualDevice, model: aiotrt.Model) -> contextlib.AbstractContextManager[None]:
    """Hold the streams of all slots of `model`."""
    return held(device, *[slot.stream for slot in executor_of(model).slots])


def read(device: VirtualDevice, tensor: torch.Tensor) -> torch.Tensor:
    """The contents of a device tensor. Its work must be complete."""
    return device.read(tensor) if isinstance(device, SimulatedDevice) else tensor


async def later() -> None:
    """Return after everything that can happen now has happened: virtual time jumps, nothing sleeps."""
    await asyncio.sleep(0.1)
