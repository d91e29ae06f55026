"""The machine's fine points: which slot is granted, and in which order callers are served."""

from __future__ import annotations

import itertools

import pytest

from aiotrt.runtime.slots import Event, Grant, Slots


@pytest.mark.parametrize(("count", "preferred"), [(n, i) for n in range(1, 5) for i in range(n)])
def test_the_preferred_slot_is_found_wherever_it_is(count: int, preferred: int) -> None:
    slots: Slots = Slots(count)
    assert slots.request("a", prefer={preferred}) == Grant(preferred, "a")
    others = [i for i in range(count) if i != preferred]
    granted = [slots.request(ticket) for ticket in "bcde"[: len(others)]]
    assert granted == [Grant(i, ticket) for i, ticket in zip(others, "bcde", strict=False)]


def test_callers_may_leave_from_anywhere_and_the_others_keep_their_order() -> None:
    slots: Slots = Slots(1)
    slots.request(object())
    tickets = [object() for _ in range(1000)]
    for ticket in tickets:
        assert slots.request(ticket) is None
    for ticket in tickets[::3]:
        slots.withdraw(ticket)
    staying = [ticket for i, ticket in enumerate(tickets) if i % 3]
    assert slots.waiting == len(staying)
    assert [slots.move(0, Event.RELEASE) for _ in staying] == [Grant(0, ticket) for ticket in staying]


@pytest.mark.parametrize("freed", [0, 1])
def test_a_freed_slot_goes_to_the_first_in_line_whatever_others_prefer(freed: int) -> None:
    for prefers in itertools.product(((), (0,), (1,), (0, 1)), repeat=3):
        slots: Slots = Slots(2)
        holders = [slots.request(ticket) for ticket in "ab"]
        assert holders == [Grant(0, "a"), Grant(1, "b")]
        for ticket, prefer in zip("cde", prefers, strict=True):
            assert slots.request(ticket, prefer=prefer) is None
        served = [slots.move(slot, Event.RELEASE) for slot in (freed, 1 - freed, freed)]
        assert served == [Grant(freed, "c"), Grant(1 - freed, "d"), Grant(freed, "e")], f"they prefer {prefers}"
