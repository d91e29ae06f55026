"""One device of a model on several: its executor, and what it offers a request."""

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

#: Programs that were built ahead, which are remembered so that one that cannot be built is not tried for each call.
MOST_TRIED: Final = 256


class Member:
    """One device of a model.

    Args:
        index: its number among the model's devices.
        executor: its slots.
        devices: all of the model's.

    Attributes:
        open: the request of an empty batch in its executor's queue, which takes the first item when it gets a slot.
        submitted: batches that its executor got; it counts them too, and so these four tell them from other requests.
        completed: those that had results.
        failed: those that had an error.
        cancelled: those that nobody waited for any more.
        empty: those among the cancelled that held no call.
        is_building: whether a program is being built ahead of calls.
        tried: the keys of those that were.
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
        """Whether a program for this key may be built ahead of calls: once."""
        if self.is_building or key in self.tried or not self.free:
            return False
        self.tried[key] = None
        if len(self.tried) > MOST_TRIED:
            del self.tried[next(iter(self.tried))]
        return True

    def prospect(self, holders: Mapping[int, Program], extra: float, now: float, *, granted: bool = False) -> Prospect:
        """What it offers a request.

        Args:
            holders: the programs that the request could run, by slot.
            extra: seconds that copies between devices take.
            now: the hub's time.
            granted: whether one of the slots that are taken is the request's for the asking.
        """
        states = self.executor.machine.states
        free = granted + states.count(FREE)
        run = max((program.estimate.seconds for program in holders.values()), default=0.0)
        if not holders or (free and not granted and not any(states[index] is FREE for index in holders)):
            extra += BUILD
        if free == len(states):
            # An estimate grows old: work that was slow because of a neighbour is tried again from time to time.
            idle = now - max([lane.last_done for lane in self._lanes])
            return Prospect(free, 0.0, run / (1.0 + max(idle, 0.0)), extra)
        backlog = 0.0
        for lane in self._lanes:
            if lane.pending:
                began = max(lane.pending[0].submitted, lane.last_done)
                # Work that is overdue is taken to need as much longer as it is late by: a hung device is avoided.
                backlog += abs(lane.pending[0].estimate.seconds - (now - began))
                backlog += sum([pending.estimate.seconds for pending in lane.pending]) - lane.pending[0].estimate.seconds
        ends = bool(free)
        for state, slot in zip(states, self.executor.slots, strict=True):
            if state is not FREE and slot.request is not None:
                ends = ends or not slot.request.is_lease or slot.request.is_warmup
                if state is State.PREPARING and slot.program is None:
                    backlog += BUILD
        return Prospect(free, backlog if ends else inf, run, extra)
