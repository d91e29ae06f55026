"""One device of a model on several devices: its executor, and when it could run a request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Final

from aiotrt.devices import Device
from aiotrt.runtime.executor import Executor
from aiotrt.runtime.placement import BUILD, Prospect
from aiotrt.runtime.programs import Program
from aiotrt.runtime.request import Request
from aiotrt.runtime.slots import FREE, State
from aiotrt.tensors import Key

__all__ = ["Member"]

#: How many keys of programs built ahead are remembered, so that a program that cannot be built is not tried for each call.
MOST_TRIED: Final = 256


class Member:
    """One device of a model.

    Args:
        index: its index among the model's devices.
        executor: the executor on this device.
        devices: all devices of the model.

    Attributes:
        open: the request of an empty batch in its executor's queue, which takes the first item when it gets a slot.
        submitted: batches submitted to its executor. The executor counts them among its requests; with this counter and the
            next three the other requests can be told apart.
        completed: batches that had results.
        failed: batches that had an error.
        cancelled: batches that no caller waited for any more.
        empty: cancelled batches that held no call.
        is_building: whether a program is being built ahead of calls.
        tried: the keys of the programs for which that was tried.
    """

    def __init__(self, index: int, executor: Executor, devices: Sequence[Device]) -> None:
        self.index = index
        self.executor = executor
        self.devices = devices
        self.open: Request | None = None
        self.submitted = self.completed = self.failed = self.cancelled = self.empty = 0
        self.is_building = False
        self.tried: dict[Key, None] = {}
        self._lanes = list({id(slot.lane): slot.lane for slot in executor.slots}.values())

    @property
    def free(self) -> int:
        """How many slots are free."""
        return self.executor.machine.count(FREE)

    def try_ahead(self, key: Key) -> bool:
        """Return whether to build a program for this key ahead of calls, and remember the key: True once for each."""
        if self.is_building or key in self.tried or not self.free:
            return False
        self.tried[key] = None
        if len(self.tried) > MOST_TRIED:
            del self.tried[next(iter(self.tried))]
        return True

    def prospect(self, holders: Mapping[int, Program], extra: float, now: float, *, granted: bool = False) -> Prospect:
        """Return when this device could run a request.

        Args:
            holders: the programs that the request could run, by slot.
            extra: seconds that copies between devices take.
            now: the time on the hub's clock.
            granted: whether an empty batch holds a slot that the request can have.
        """
        states = self.executor.machine.states
        free = granted + states.count(FREE)
        run = max((program.estimate.seconds for program in holders.values()), default=0.0)
        if not holders or (free and not granted and not any(states[index] is FREE for index in holders)):
            extra += BUILD
        if free == len(states):
            # Estimates age: work that was slow because of other work on the device is tried again from time to time.
            idle = now - max([lane.last_done for lane in self._lanes])
            return Prospect(free, 0.0, run / (1.0 + max(idle, 0.0)), extra)
        backlog = 0.0
        for lane in self._lanes:
            if lane.pending:
                began = max(lane.pending[0].submitted, lane.last_done)
                # Overdue work counts as needing as much more time as it is late: so a hung device is avoided.
                backlog += abs(lane.pending[0].estimate.seconds - (now - began))
                backlog += sum([pending.estimate.seconds for pending in lane.pending]) - lane.pending[0].estimate.seconds
        ends = bool(free)
        for state, slot in zip(states, self.executor.slots, strict=True):
            if state is not FREE and slot.request is not None:
                ends = ends or not slot.request.is_lease or slot.request.is_warmup
                if state is State.PREPARING and slot.program is None:
                    backlog += BUILD
        return Prospect(free, backlog if ends else inf, run, extra)
