"""The machine's fine points: a slot that suits is found wherever it is, and leaving a line is cheap."""

from __future__ import annotations

import itertools

import pytest

from aiotrt.runtime.slots import Event, Grant, Line, Slots


@pytest.mark.parametrize(("count", "preferred"), [(n, i) for n in range(1, 5) for i in range(n)])
def test_the_preferred_slot_is_found_wherever_it_is(count: int, preferred: int) -> None:
    slots: Slots[str] = Slots(count)
    assert slots.request("a", prefer={preferred}) == Grant(preferred, "a")
    others = [i for i in range(count) if i != preferred]
    granted = [slots.request(ticket) for ticket in "bcde"[: len(others)]]
    assert granted == [Grant(i, ticket) for i, ticket in zip(others, "bcde", strict=False)]


def test_leaving_a_line_is_cheap_while_most_of_it_stays() -> None:
    line: Line[object] = Line()
    tickets = [object() for _ in range(1000)]
    for ticket in tickets:
        line.join(ticket)
    before = line._tickets
    for ticket in tickets[:400]:
        line.leave(ticket)
    assert line._tickets is before, "it was copied, though most of them stay"
    assert len(line) == 600
    for ticket in tickets[400:600]:
        line.leave(ticket)
    assert len(line._tickets) < 1000, "most of it is gone, and kept"
    assert len(line) == 400
    left = list(itertools.takewhile(lambda ticket: ticket is not None, iter(line.next, 0)))
    assert left == tickets[600:]


@pytest.mark.parametrize("freed", [0, 1])
def test_a_freed_slot_goes_to_the_first_in_line_whatever_others_prefer(freed: int) -> None:
    for prefers in itertools.product(((), (0,), (1,), (0, 1)), repeat=3):
        slots: Slots[str] = Slots(2)
        holders = [slots.request(ticket) for ticket in "ab"]
        assert holders == [Grant(0, "a"), Grant(1, "b")]
        for ticket, prefer in zip("cde", prefers, strict=True):
            assert slots.request(ticket, prefer=prefer) is None
        served = [slots.move(slot, Event.RELEASE) for slot in (freed, 1 - freed, freed)]
        assert served == [Grant(freed, "c"), Grant(1 - freed, "d"), Grant(freed, "e")], f"they prefer {prefers}"
