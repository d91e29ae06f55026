"""Which of several devices a request goes to: the pure decision."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiotrt.runtime.placement import BUILD, Prospect, choose, copy_seconds

MS = 1e-3


@pytest.mark.parametrize(
    ("prospects", "chosen"),
    [
        ([Prospect(1, 0, 0, 0), Prospect(2, 0, 0, 0)], 1),  # nothing is known: more slots are free there
        ([Prospect(1, 1 * MS, MS, 0), Prospect(1, 2 * MS, MS, 0)], 0),
        ([Prospect(1, 0, 9 * MS, 0), Prospect(1, 2 * MS, MS, 0)], 1),  # the other one is faster by more than it is behind
        ([Prospect(1, 0, MS, copy_seconds(0)), Prospect(1, 0, MS, 0)], 1),
        ([Prospect(1, 0, MS, copy_seconds(0)), Prospect(1, 9 * MS, MS, 0)], 0),  # a copy costs less than the backlog
        ([Prospect(1, 0, 0, 0), Prospect(1, 0, MS, 0)], 0),  # what has not run there is taken to be as slow as elsewhere
    ],
)
def test_of_free_devices_the_one_that_finishes_first(prospects: list[Prospect], chosen: int) -> None:
    assert choose(prospects) == (chosen, 0.0)


def test_a_busy_device_is_waited_for_only_if_it_finishes_earlier_with_all_that_waits() -> None:
    fast, slow = Prospect(0, MS, MS, 0), Prospect(2, 0, 20 * MS, 0)
    chosen, seconds = choose([fast, slow], 1)
    assert chosen == 0
    assert seconds == pytest.approx(2 * MS)
    assert choose([fast, slow], 14).device == 0
    assert choose([fast, slow], 16) == (1, 0.0), "the slow one must not idle while so many wait"


def test_a_device_without_the_program_is_avoided_while_another_has_it_soon() -> None:
    has, lacks = Prospect(0, MS, MS, 0), Prospect(2, 0, 0, BUILD)
    assert choose([has, lacks]).device == 0
    assert choose([has, lacks], 1000) == (1, 0.0)


def test_without_a_free_slot_the_least_behind_is_named_and_a_device_whose_slots_are_all_leased_last() -> None:
    assert choose([Prospect(0, 9 * MS, MS, 0), Prospect(0, 2 * MS, MS, 0)]) == (1, inf)
    assert choose([Prospect(0, inf, MS, 0), Prospect(0, 2 * MS, MS, 0)]) == (1, inf)
    assert choose([Prospect(0, inf, 0, 0)]) == (0, inf)


seconds = st.floats(0, 10)
prospects = st.lists(
    st.builds(Prospect, st.integers(0, 3), seconds | st.just(inf), seconds, seconds), min_size=1, max_size=8
)


@given(prospects, st.integers(1, 1000))
@example([Prospect(1, 0.0, 0.0, BUILD), Prospect(0, 0.0, 0.0, 0.0)], 1)
def test_what_is_chosen_can_start_now_or_is_worth_a_wait_that_ends(found: list[Prospect], waiting: int) -> None:
    chosen, wait = choose(found, waiting)
    assert 0 <= chosen < len(found)
    if wait == 0.0:
        assert found[chosen].free
    elif any(one.free for one in found):
        assert not found[chosen].free
        assert wait < inf
