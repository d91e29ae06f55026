from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from aiotrt.completion.prediction import (
    LONGEST_SLEEP,
    OVERDUE_SHARE,
    RECENT,
    SHORTEST_SLEEP,
    Estimate,
    Lateness,
    next_look,
)

seconds = st.floats(1e-6, 100.0)


def test_an_estimate_starts_with_what_it_sees_first() -> None:
    exact, censored = Estimate(), Estimate()
    exact.between(0.002, 0.002)
    censored.at_most(0.002)
    assert exact.seconds == censored.seconds == 0.002


@given(st.lists(st.floats(0.001, 0.002), min_size=1, max_size=200))
def test_an_estimate_stays_within_what_was_seen(durations: list[float]) -> None:
    estimate = Estimate()
    for duration in durations:
        estimate.between(duration, duration)
    assert min(durations) * 0.999 <= estimate.seconds <= max(durations) * 1.001


def test_an_estimate_follows_a_drift_both_ways() -> None:
    estimate = Estimate()
    for duration in [0.001] * 50 + [0.010] * 100:
        estimate.between(duration, duration)
    assert estimate.seconds == pytest.approx(0.010, rel=0.01)
    for _ in range(50):
        estimate.between(0.001, 0.001)
    assert estimate.seconds == pytest.approx(0.001, rel=0.01)


def test_late_looks_do_not_make_later_looks_later() -> None:
    """Each look finds the work complete, a little later than the prediction: the estimate must shrink until one is early."""
    estimate = Estimate()
    estimate.between(0.001, 0.001)
    for _ in range(300):
        estimate.at_most(estimate.seconds + 100e-6)
    assert estimate.seconds < 0.0001


def test_a_first_look_that_came_much_too_late_is_unlearned_in_a_few_calls() -> None:
    estimate = Estimate()
    estimate.at_most(0.115)  # a burst of 64 calls, whose first completion was seen that late
    calls = 0
    while estimate.seconds > 0.012:
        estimate.at_most(max(0.012, estimate.seconds))
        calls += 1
    assert calls <= 10


def test_lateness_is_learned_per_length_of_sleep() -> None:
    lateness = Lateness()
    for _ in range(300):
        lateness.learn(50e-6, 10e-6)
        lateness.learn(5e-3, 120e-6)
    assert lateness.allowance(60e-6) == pytest.approx(15e-6, abs=3e-6)
    assert lateness.allowance(6e-3) == pytest.approx(125e-6, abs=5e-6)


def test_a_stalled_loop_teaches_lateness_little() -> None:
    lateness = Lateness()
    lateness.learn(1e-3, 3600.0)
    assert lateness.allowance(1e-3) < 2e-3


@given(started=seconds, waited=seconds, estimate=seconds)
def test_overdue_looks_are_bounded_by_a_share_of_the_time_waited(started: float, waited: float, estimate: float) -> None:
    now = started + waited
    delay = next_look(now, started, started + estimate, 0.0) - now
    slack = 1e-9 + now * 1e-12
    assert SHORTEST_SLEEP - slack <= delay <= max(SHORTEST_SLEEP, min(OVERDUE_SHARE * waited, LONGEST_SLEEP)) + slack


def test_spinning_ends_with_its_budget() -> None:
    assert next_look(1.00001, 0.0, 1.0, 40e-6) == 1.00001
    assert next_look(1.00005, 0.0, 1.0, 40e-6) > 1.00005


def test_short_work_is_slept_on_from_the_start() -> None:
    """Else nothing would ever be learned about short sleeps, and a processor would go into looking."""
    assert Lateness().allowance(62e-6) < 62e-6


def test_what_a_shorter_sleep_taught_counts_for_the_wait_that_it_came_from() -> None:
    lateness = Lateness(initial=90e-6)
    for _ in range(100):
        due = 250e-6 - lateness.allowance(250e-6)
        lateness.learn(due, 15e-6)
    assert lateness.allowance(250e-6) < 30e-6


def test_the_first_sleeps_teach_fast() -> None:
    lateness = Lateness()
    for _ in range(4):
        lateness.learn(5e-3, 120e-6)
    assert lateness.allowance(5e-3) > 100e-6


def test_a_stall_at_the_first_sleep_is_soon_forgotten() -> None:
    lateness = Lateness()
    lateness.learn(1e-3, 3600.0)
    for _ in range(20):
        due = max(0.0, 1e-3 - lateness.allowance(1e-3))
        assert due > 0.0
        lateness.learn(due, 20e-6)
    assert lateness.allowance(1e-3) < 0.5e-3


def test_an_estimate_is_trusted_once_the_next_time_agrees_and_until_one_does_not() -> None:
    estimate, trusted = Estimate(), []
    for seconds in (0.001, 0.0011, 1.0, 0.001, 0.001):
        estimate.between(seconds, seconds)
        trusted.append(estimate.is_trusted)
    assert trusted == [False, True, False, False, True]
    assert estimate.seconds == 0.001  # the stall was forgotten at once
    estimate.at_most(0.0001)
    assert not estimate.is_trusted


@pytest.mark.parametrize("first_is_exact", [False, True])
@pytest.mark.parametrize("both", [False, True])
def test_the_shortest_time_is_of_as_many_times_as_it_says(both: bool, first_is_exact: bool) -> None:
    estimate = Estimate()
    estimate.between(0.001, 0.001)
    for count in range(1, 2 * RECENT):
        assert estimate.shortest == 0.001
        if both and count > 1 and count % 2 == first_is_exact:
            estimate.at_most(0.005)
        else:
            estimate.between(0.005, 0.005)
    assert estimate.shortest == 0.001
    estimate.between(0.005, 0.005)
    assert estimate.shortest > 0.004
