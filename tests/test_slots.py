from __future__ import annotations

import itertools
import sys

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiotrt.runtime.slots import TABLE, Event, Grant, IllegalTransitionError, Slots, State

LEGAL = {
    (State.FREE, Event.GRANT, State.CLAIMED),
    (State.FREE, Event.FAULT, State.BROKEN),
    (State.CLAIMED, Event.PREPARE, State.PREPARING),
    (State.CLAIMED, Event.LAUNCH, State.IN_FLIGHT),
    (State.CLAIMED, Event.RELEASE, State.FREE),
    (State.CLAIMED, Event.FAULT, State.BROKEN),
    (State.PREPARING, Event.PREPARED, State.CLAIMED),
    (State.PREPARING, Event.LAUNCH, State.IN_FLIGHT),
    (State.PREPARING, Event.RELEASE, State.DRAINING),
    (State.PREPARING, Event.FAULT, State.BROKEN),
    (State.IN_FLIGHT, Event.LAUNCH, State.IN_FLIGHT),
    (State.IN_FLIGHT, Event.COPIED, State.FREE),
    (State.IN_FLIGHT, Event.COMPLETE, State.READABLE),
    (State.IN_FLIGHT, Event.RELEASE, State.DRAINING),
    (State.IN_FLIGHT, Event.FAULT, State.BROKEN),
    (State.READABLE, Event.PREPARE, State.PREPARING),
    (State.READABLE, Event.LAUNCH, State.IN_FLIGHT),
    (State.READABLE, Event.RELEASE, State.FREE),
    (State.READABLE, Event.FAULT, State.BROKEN),
    (State.DRAINING, Event.COMPLETE, State.FREE),
    (State.DRAINING, Event.FAULT, State.BROKEN),
}

WAYS = {  # how to bring a slot into a state
    State.CLAIMED: [],
    State.PREPARING: [Event.PREPARE],
    State.IN_FLIGHT: [Event.LAUNCH],
    State.READABLE: [Event.LAUNCH, Event.COMPLETE],
    State.DRAINING: [Event.LAUNCH, Event.RELEASE],
    State.BROKEN: [Event.FAULT],
}


def test_the_table_is_what_the_design_says() -> None:
    assert {(state, event, after) for state, moves in TABLE.items() for event, after in moves.items()} == LEGAL


@pytest.mark.parametrize(("state", "event"), list(itertools.product(WAYS, Event)))
def test_every_pair_either_moves_as_the_table_says_or_raises_and_changes_nothing(state: State, event: Event) -> None:
    slots: Slots = Slots(1)
    slots.request("a")
    for step in WAYS[state]:
        slots.move(0, step)
    assert slots.states == [state]
    after = TABLE[state].get(event)
    if after is None:
        with pytest.raises(IllegalTransitionError, match=rf"slot 0 is {state.name} and cannot {event.name}"):
            slots.move(0, event)
        assert slots.states == [state]
    else:
        slots.move(0, event)
        assert slots.states == [after]


def test_a_free_slot_is_granted_at_once_and_otherwise_the_ticket_waits() -> None:
    slots: Slots = Slots(2)
    assert slots.request("a") == Grant(0, "a")
    assert slots.request("b") == Grant(1, "b")
    assert slots.request("c") is None
    assert slots.waiting == 1


def test_a_freed_slot_goes_to_the_first_in_line() -> None:
    slots: Slots = Slots(1)
    slots.request("a")
    slots.request("b")
    slots.request("c")
    slots.move(0, Event.LAUNCH)
    assert slots.move(0, Event.COPIED) == Grant(0, "b")
    assert slots.states == [State.CLAIMED]
    assert slots.move(0, Event.RELEASE) == Grant(0, "c")
    assert slots.move(0, Event.RELEASE) is None
    assert slots.states == [State.FREE]


def test_one_who_withdrew_is_passed_over() -> None:
    slots: Slots = Slots(1)
    for ticket in range(4):
        slots.request(ticket)
    slots.withdraw(1)
    assert slots.waiting == 2
    assert slots.move(0, Event.RELEASE) == Grant(0, 2)


def test_a_preferred_slot_is_chosen_among_the_free() -> None:
    slots: Slots = Slots(3)
    assert slots.request("a", prefer={2}) == Grant(2, "a")
    assert slots.request("b", prefer={2}) == Grant(0, "b")


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_the_line_is_bounded(bound: int) -> None:
    slots: Slots = Slots(1, bound)
    slots.request(-1)
    for ticket in range(bound):
        assert slots.request(ticket) is None
    with pytest.raises(OverflowError):
        slots.request(99)
    assert slots.waiting == bound
    assert slots.request(100, bounded=False) is None


@pytest.mark.parametrize("end", ["served", "withdrawn"])
def test_who_is_not_bounded_does_not_count_in_line(end: str) -> None:
    slots: Slots = Slots(1, 1)
    slots.request(0)
    for ticket in (1, 2, 3):
        assert slots.request(ticket, bounded=False) is None
    assert slots.request(4) is None
    assert slots.waiting == 4
    for ticket in (1, 2, 3):
        with pytest.raises(OverflowError):
            slots.request(5)
        if end == "served":
            assert slots.move(0, Event.RELEASE) == Grant(0, ticket)
        else:
            slots.withdraw(ticket)
    with pytest.raises(OverflowError):
        slots.request(5)
    assert slots.move(0, Event.RELEASE) == Grant(0, 4)
    assert slots.request(5) is None


def test_a_fault_of_a_free_slot_takes_it_out_of_the_pool() -> None:
    slots: Slots = Slots(2)
    slots.move(0, Event.FAULT)
    assert slots.request("a") == Grant(1, "a")
    assert slots.request("b") is None


def test_repr_counts() -> None:
    slots: Slots = Slots(2)
    slots.request("a")
    assert repr(slots) == "<Slots 1 free, 1 claimed, 0 waiting>"


def test_leaving_the_queue_keeps_memory_proportional_to_those_who_wait() -> None:
    slots: Slots = Slots(1)
    slots.request(object())
    staying = object()
    slots.request(staying)
    size = sys.getsizeof(slots._queue)
    for _ in range(10_000):
        ticket = object()
        slots.request(ticket)
        slots.withdraw(ticket)
    assert slots.waiting == 1
    assert sys.getsizeof(slots._queue) < 2 * size + 1000
    assert slots.move(0, Event.RELEASE) == Grant(0, staying)


class Callers(RuleBasedStateMachine):
    """Callers who request, launch, wait, abandon, lease and fault, in any order, against a plain model of fairness."""

    numbers = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.slots: Slots = Slots(3, max_waiting=4)
        self.line: list[int] = []  # the model: who waits, in order
        self.uncounted: set[int] = set()
        self.holders: dict[int, int] = {}  # slot to ticket

    def take(self, grant: Grant | None) -> None:
        if grant is None:
            return
        if self.line:
            assert grant.ticket == self.line.pop(0), "somebody jumped the line"
        assert grant.slot not in self.holders, "a slot with two owners"
        self.holders[grant.slot] = grant.ticket

    @rule(prefer=st.sets(st.integers(0, 2)), bounded=st.booleans())
    def request(self, prefer: set[int], bounded: bool) -> None:
        ticket = next(self.numbers)
        free = self.slots.count(State.FREE)
        counted = sum(other not in self.uncounted for other in self.line)
        try:
            grant = self.slots.request(ticket, prefer=prefer, bounded=bounded)
        except OverflowError:
            assert bounded
            assert free == 0
            assert counted == 4
            return
        if grant is None:
            assert free == 0, "made to wait while a slot was free"
            assert not bounded or counted < 4, "in line, and the line was full"
            self.line.append(ticket)
            self.uncounted |= set() if bounded else {ticket}
        else:
            assert not self.line, "served before those who wait"
            self.take(grant)

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.line))
        self.line.remove(ticket)
        self.slots.withdraw(ticket)

    @rule(slot=st.integers(0, 2), event=st.sampled_from(list(Event)))
    def move(self, slot: int, event: Event) -> None:
        before = self.slots.states[slot]
        if event is Event.GRANT or event not in TABLE[before]:
            if event is not Event.GRANT:
                with pytest.raises(IllegalTransitionError):
                    self.slots.move(slot, event)
            return
        after = TABLE[before][event]
        if after in (State.FREE, State.BROKEN):
            self.holders.pop(slot, None)
        self.take(self.slots.move(slot, event))

    @invariant()
    def no_slot_is_free_while_somebody_waits(self) -> None:
        if self.line:
            assert self.slots.count(State.FREE) == 0

    @invariant()
    def slots_are_conserved(self) -> None:
        assert self.slots.waiting == len(self.line)
        owned = [i for i, state in enumerate(self.slots.states) if state not in (State.FREE, State.BROKEN)]
        assert sorted(self.holders) == owned
        assert sorted(self.slots._free) == [i for i, state in enumerate(self.slots.states) if state is State.FREE]


Callers.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestCallers = Callers.TestCase


@pytest.mark.parametrize("bound", [1, 2])
def test_when_all_have_left_the_queue_as_many_may_wait_as_before(bound: int) -> None:
    slots: Slots = Slots(1, bound)
    slots.request(0)
    for _ in range(2):
        for ticket in range(1, 1 + bound):
            assert slots.request(ticket) is None
        with pytest.raises(OverflowError):
            slots.request(99)
        assert slots.withdraw_all() == list(range(1, 1 + bound))
