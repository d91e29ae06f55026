"""Testing without a GPU: a simulated GPU in virtual time that detects races, and injection of device faults.

::

    device = SimulatedDevice(seed)


    async def program():
        async with aiotrt.load(net, device=device) as model:
            ...


    run(program(), device)  # raises HazardError for a race, even if the result was right

Equal seeds give equal runs; other seeds give other orders of all operations that a GPU does not order. `fault_points` and
`FaultInjector` make any device call fail.
"""

from __future__ import annotations

from aiotrt.testing.faults import VERBS, Fault, FaultInjector, FaultKind, fault_points
from aiotrt.testing.hazards import Access, HazardError
from aiotrt.testing.loop import VirtualLoop, run
from aiotrt.testing.simulator import SimulatedDevice
from aiotrt.testing.streams import SimulatedEvent, SimulatedGraph, SimulatedStream
from aiotrt.testing.virtual import (
    DeadlockError,
    LoopBlockedError,
    Schedule,
    Scripted,
    Seeded,
    VirtualTime,
    Workers,
    explore,
)

__all__ = [
    "VERBS",
    "Access",
    "DeadlockError",
    "Fault",
    "FaultInjector",
    "FaultKind",
    "HazardError",
    "LoopBlockedError",
    "Schedule",
    "Scripted",
    "Seeded",
    "SimulatedDevice",
    "SimulatedEvent",
    "SimulatedGraph",
    "SimulatedStream",
    "VirtualLoop",
    "VirtualTime",
    "Workers",
    "explore",
    "fault_points",
    "run",
]
