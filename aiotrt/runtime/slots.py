"""The slot machine: which slot may do what, and which caller gets the next one.

Rule 1: every decision about who owns a slot is made in this file.
Rule 2: this file touches no device, no tensor and no event loop, so that all of it can be tested by enumeration.

Theory of operation. A model has N slots. Each is always in one state of `State`, each state has one owner, and `TABLE` is
the whole list of legal moves: a pair that is not in it is a bug in aiotrt, and raises. Callers who find no free slot wait
in one queue, first come first served. Every method is synchronous and leaves the machine consistent, and what must be done
as a consequence comes back as `Grant` values for the caller to act upon, so there is no moment, at a cancellation or
anywhere else, at which a slot has two owners or none.

The shape is that of a connection pool that decides without doing input or output.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Container, Mapping
from typing import Any, Final, NamedTuple

__all__ = [
    "BROKEN",
    "CLAIMED",
    "COMPLETE",
    "COPIED",
    "DRAINING",
    "FREE",
    "IN_FLIGHT",
    "LAUNCH",
    "TABLE",
    "Event",
    "Grant",
    "IllegalTransitionError",
    "Slots",
    "State",
]


class _Named(enum.Enum):
    # Members are single objects, so identity will do; enum's own hash is a Python function over the name, and a lookup in
    # `TABLE` would cost as much as a launch.
    __hash__ = object.__hash__


class State(_Named):
    """The state of a slot. The comments name its owner."""

    FREE = "free"  # the pool; the next launch may still have to wait, on the device, for consumer events
    CLAIMED = "claimed"  # one caller, who writes inputs
    PREPARING = "preparing"  # a worker thread, on behalf of one caller: capturing a graph, or copying something large
    IN_FLIGHT = "in_flight"  # the device; one caller waits
    READABLE = "readable"  # the holder of a lease, who reads outputs
    DRAINING = "draining"  # the device or a worker thread; no caller waits
    BROKEN = "broken"  # no owner, permanently


class Event(_Named):
    """What can happen to a slot."""

    GRANT = "grant"  # the pool hands it to a caller
    PREPARE = "prepare"  # a worker thread takes over
    PREPARED = "prepared"  # the worker thread is done
    LAUNCH = "launch"  # work was submitted and its produce event recorded
    COPIED = "copied"  # the produce event passed and the results were copied out
    COMPLETE = "complete"  # the produce event passed (or the abandoned worker thread ended); results are still in the slot
    RELEASE = "release"  # the caller releases it: the lease ends, or the wait is abandoned
    FAULT = "fault"  # the device failed


# Global names for the members that every call uses: before Python 3.12 the lookup of `State.FREE` goes through the
# enumeration's metaclass, which costs as much as two function calls.
FREE: Final = State.FREE
CLAIMED: Final = State.CLAIMED
IN_FLIGHT: Final = State.IN_FLIGHT
DRAINING: Final = State.DRAINING
BROKEN: Final = State.BROKEN
LAUNCH: Final = Event.LAUNCH
COPIED: Final = Event.COPIED
COMPLETE: Final = Event.COMPLETE

TABLE: Final[Mapping[State, Mapping[Event, State]]] = {
    State.FREE: {
        Event.GRANT: State.CLAIMED,
        Event.FAULT: State.BROKEN,
    },
    State.CLAIMED: {
        Event.PREPARE: State.PREPARING,
        Event.LAUNCH: State.IN_FLIGHT,
        Event.RELEASE: State.FREE,
        Event.FAULT: State.BROKEN,
    },
    State.PREPARING: {
        Event.PREPARED: State.CLAIMED,
        Event.LAUNCH: State.IN_FLIGHT,  # the worker thread itself submitted the work
        Event.RELEASE: State.DRAINING,
        Event.FAULT: State.BROKEN,
    },
    State.IN_FLIGHT: {
        Event.LAUNCH: State.IN_FLIGHT,  # a lease may queue several launches; the last one's event counts
        Event.COPIED: State.FREE,
        Event.COMPLETE: State.READABLE,
        Event.RELEASE: State.DRAINING,
        Event.FAULT: State.BROKEN,
    },
    State.READABLE: {
        Event.PREPARE: State.PREPARING,
        Event.LAUNCH: State.IN_FLIGHT,
        Event.RELEASE: State.FREE,
        Event.FAULT: State.BROKEN,
    },
    State.DRAINING: {
        Event.COMPLETE: State.FREE,
        Event.FAULT: State.BROKEN,
    },
    State.BROKEN: {},
}


_new: Final = tuple.__new__  # a named tuple's own constructor is a Python function


class IllegalTransitionError(AssertionError):
    """A move that `TABLE` does not have: a bug in aiotrt, please report it."""


class Grant(NamedTuple):
    """The action "give slot `slot` to `ticket`": the slot is CLAIMED already."""

    slot: int
    ticket: Any


class Slots:
    """N slots and the queue of callers who wait for one.

    Args:
        count: how many slots; at least 1.
        max_waiting: how many bounded requests may wait; None for no bound.
    """

    def __init__(self, count: int, max_waiting: int | None = None) -> None:
        self.states: list[State] = [State.FREE] * count
        self.max_waiting = max_waiting
        self._free: list[int] = list(range(count - 1, -1, -1))
        self._queue: OrderedDict[Any, bool] = OrderedDict()  # tickets that wait, in order, and whether each is bounded
        self._counted = 0

    @property
    def waiting(self) -> int:
        """How many callers wait."""
        return len(self._queue)

    def count(self, state: State) -> int:
        """How many slots are in `state`."""
        return self.states.count(state)

    def request(self, ticket: Any, prefer: Container[int] = (), bounded: bool = True) -> Grant | None:
        """Request a slot.

        Args:
            ticket: stands for the caller; hashable, and in the queue once at most.
            prefer: slots that suit the ticket better than others, if one of them is free.
            bounded: whether `max_waiting` applies to the ticket, and the ticket counts against it.

        Returns:
            A grant if a slot is free (then the queue is empty, since `move` serves it first); None if the ticket now waits.

        Raises:
            OverflowError: the queue is at its bound. Nothing changed.
        """
        free = self._free
        if free:
            at = len(free) - 1
            if free[at] not in prefer:
                for i in range(at - 1, -1, -1):
                    if free[i] in prefer:
                        at = i
                        break
            slot = free.pop(at)
            self.states[slot] = CLAIMED
            return _new(Grant, (slot, ticket))
        if bounded:
            if self.max_waiting is not None and self._counted >= self.max_waiting:
                raise OverflowError
            self._counted += 1
        self._queue[ticket] = bounded
        return None

    def withdraw(self, ticket: Any) -> None:
        """Remove `ticket` from the queue, in which it must be."""
        self._counted -= self._queue.pop(ticket)

    def withdraw_all(self) -> list[Any]:
        """Empty the queue, and return its tickets in order."""
        left = list(self._queue)
        self._queue.clear()
        self._counted = 0
        return left

    def move(self, slot: int, event: Event) -> Grant | None:
        """Apply `event` to `slot`.

        Returns:
            The grant that follows, if the move freed the slot and a caller waits: a freed slot goes to the queue before
            it goes to the pool. Without this, a slot could be free while a caller waits, and the wake-up would be lost.

        Raises:
            IllegalTransitionError: `TABLE` has no such move. Nothing changed.
        """
        states = self.states
        before = states[slot]
        try:
            after = TABLE[before][event]
        except KeyError:
            raise IllegalTransitionError(f"slot {slot} is {before.name} and cannot {event.name}") from None
        if before is FREE:  # only FAULT gets here: GRANT goes through `request` and the queue
            self._free.remove(slot)
        elif after is FREE:
            if self._queue:
                ticket, counted = self._queue.popitem(last=False)
                self._counted -= counted
                states[slot] = CLAIMED
                return _new(Grant, (slot, ticket))
            self._free.append(slot)
        states[slot] = after
        return None

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {s.value}" for s in State if (n := self.states.count(s)))
        return f"<Slots {counts}, {self.waiting} waiting>"
