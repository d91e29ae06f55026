"""What is learned, and when to look, in numbers: each step is small, and in the direction that costs little when wrong."""

from __future__ import annotations

import pytest

from aiotrt.completion.prediction import (
    AGREE,
    LONGEST_SLEEP,
    MARGIN,
    NEAR,
    NEAR_SHARE,
    RECENT,
    SHORT,
    SHORTEST_SLEEP,
    Estimate,
    Lateness,
    next_look,
)


def exactly(estimate: Estimate, *times: float) -> list[float]:
    """What it says after each of these, which were seen exactly."""
    said = []
    for seconds in times:
        estimate.between(seconds, seconds)
        said.append(estimate.seconds)
    return said


def test_it_begins_with_nothing_and_takes_the_first_time_as_it_is() -> None:
    estimate = Estimate()
    assert (estimate.seconds, estimate.is_trusted) == (0.0, False)
    estimate.between(1.0, 3.0)
    assert (estimate.seconds, estimate.is_trusted) == (2.0, False)
    other = Estimate()
    other.at_most(3.0)
    assert (other.seconds, other.is_trusted) == (3.0, False)


def test_it_moves_a_tenth_up_and_three_tenths_down() -> None:
    assert exactly(Estimate(), 1.0, 1.0, 1.25, 1.25) == [1.0, 1.0, 1.025, pytest.approx(1.0475)]
    assert exactly(Estimate(), 1.0, 1.0, 0.75) == [1.0, 1.0, pytest.approx(0.925)]
    estimate = Estimate()
    exactly(estimate, 1.0, 1.0)
    estimate.between(0.5, 1.5)  # the middle is what it was
    assert estimate.seconds == 1.0
    estimate.between(0.5, 1.0)
    assert estimate.seconds == pytest.approx(1 - 0.3 * 0.25)


def test_one_that_disagrees_moves_it_a_little_and_a_second_one_wholly() -> None:
    estimate = Estimate()
    assert exactly(estimate, 1.0, 1.0, 10.0, 10.0, 10.0) == [1.0, 1.0, 1.9, 10.0, 10.0]
    assert estimate.is_trusted
    # Likewise the first two: they disagree, so neither is trusted, and the later one counts.
    assert exactly(Estimate(), 1.0, 5.0, 0.5, 1.0) == [1.0, 5.0, 0.5, 1.0]


@pytest.mark.parametrize(("seconds", "agrees"), [(2.0 / AGREE, True), (2.0 * AGREE, True), (1.33, False), (3.01, False)])
def test_half_as_long_again_agrees_and_longer_does_not(seconds: float, agrees: bool) -> None:
    estimate = Estimate()
    exactly(estimate, 2.0, 2.0, seconds)
    assert estimate.is_trusted == agrees


@pytest.mark.parametrize(("seconds", "agrees"), [(2.0, True), (2.0 / AGREE, True), (1.33, False), (9.0, True)])
def test_one_that_is_complete_at_the_first_look_disagrees_only_when_it_is_much_shorter(seconds: float, agrees: bool) -> None:
    estimate = Estimate()
    exactly(estimate, 2.0, 2.0)
    estimate.at_most(seconds)
    assert estimate.is_trusted == agrees


def test_late_looks_in_a_row_make_the_next_one_ever_earlier() -> None:
    estimate = Estimate()
    estimate.at_most(1.0)
    shares = []
    for _ in range(12):
        before = estimate.seconds
        estimate.at_most(before + 1.0)
        shares.append(1 - estimate.seconds / before)
    doubling = [0.003, 0.006, 0.012, 0.024, 0.048, 0.096, 0.192, 0.384]
    assert shares == pytest.approx(doubling + [0.5] * 4)
    estimate.between(1.0, 1.0)  # an early look: the next late one is the first again
    before = estimate.seconds
    estimate.at_most(before)
    assert estimate.seconds == pytest.approx(before * 0.997)
    estimate.at_most(0.25 * before)  # complete much earlier than that: it cannot take longer
    assert estimate.seconds == pytest.approx(0.25 * before * 0.994)


def test_the_shortest_is_the_least_that_was_seen_however_it_was_seen() -> None:
    estimate, said = Estimate(), []
    assert estimate.shortest == 0.0
    for low, high in ((2.0, 4.0), (4.0, 8.0), (1.0, 3.0), (1.0, 8.0)):
        estimate.between(low, high)
        said.append(estimate.shortest)
    assert said == [4.0, 4.0, 3.0, 3.0]  # as it was seen complete: what was seen before that, it was longer than
    other = Estimate()
    other.at_most(2.0)
    assert other.shortest == 2.0
    other.at_most(3.0)  # later than before, by the timer: as for the estimate
    assert other.shortest == other.seconds == pytest.approx(2.0 * 0.997)


@pytest.mark.parametrize("before", [0, 1, 100])
def test_the_shortest_counts_for_some_hundred_times_and_not_for_ever(before: int) -> None:
    estimate = Estimate()
    exactly(estimate, *[2.0] * before, 1.0)
    kept = 0
    while estimate.shortest == 1.0:
        exactly(estimate, 2.0)
        kept += 1
    assert kept == 2 * RECENT - before
    assert estimate.shortest == 2.0


def test_what_is_complete_before_the_shortest_makes_the_first_look_ever_earlier() -> None:
    """By how much it was shorter, nobody saw. Times in between that are as ever do not start the steps anew."""
    estimate = Estimate()
    exactly(estimate, 1.0, 1.0)
    shares = []
    for _ in range(6):
        early = 0.999 * estimate.shortest
        estimate.at_most(early)
        shares.append(1 - estimate.shortest / (early * 0.997))
        exactly(estimate, 1.0, 1.0)
    assert shares == pytest.approx([0.012, 0.048, 0.192, 0.5, 0.5, 0.5])


def test_the_steps_of_the_shortest_start_anew_with_the_times_that_it_is_of() -> None:
    estimate = Estimate()
    exactly(estimate, 1.0, 1.0)
    for _ in range(3):
        estimate.at_most(0.999 * estimate.shortest)
    exactly(estimate, *[1.0] * (2 * RECENT - 4))
    assert estimate.shortest == 1.0
    estimate.at_most(0.999)
    assert estimate.shortest == pytest.approx(0.999 * 0.997 * (1 - 0.012))


def test_a_look_that_is_late_but_not_early_teaches_the_shortest_no_more_than_the_estimate() -> None:
    estimate = Estimate()
    exactly(estimate, 1.0, 1.0)
    estimate.at_most(estimate.shortest)
    assert estimate.shortest == estimate.seconds == pytest.approx(0.997)


@pytest.mark.parametrize(
    ("seconds", "shortest", "is_near"),
    [
        (NEAR, 0.0, True),  # within so many seconds, whatever the share
        (1.01 * NEAR, 0.0, False),
        (10.0, 10.0 - 10.0 * NEAR_SHARE, True),  # or within a share, whatever the seconds
        (10.0, 9.99 - 10.0 * NEAR_SHARE, False),
        (3 * NEAR, 2.5 * NEAR, True),
    ],
)
def test_the_first_poll_is_for_the_shortest_where_that_is_far_from_the_estimate(
    seconds: float, shortest: float, is_near: bool
) -> None:
    estimate = Estimate()
    exactly(estimate, seconds, seconds)
    estimate.shortest = estimate._since = shortest
    estimate.between(seconds, seconds)
    assert (estimate.seconds, estimate.shortest) == (seconds, shortest)
    assert estimate.first == (seconds if is_near else shortest)


def test_the_first_poll_is_for_the_shortest_once_that_was_complete_before_it() -> None:
    """However near it is: by how much it was shorter, only an earlier poll can find out."""
    estimate = Estimate()
    exactly(estimate, 1.0, 1.0)
    assert estimate.first == estimate.seconds
    estimate.at_most(0.999 * estimate.shortest)
    assert estimate.seconds > estimate.first == estimate.shortest
    exactly(estimate, *[1.0] * RECENT)
    assert estimate.first == estimate.seconds > 0.999


def needed(lateness: Lateness, sleep: float) -> float:
    """How much earlier to set a timer that is to sleep this long, in that sleep's own bucket."""
    shorter = [i for i in range(7) if sleep > SHORT * 4**i]
    return lateness.ahead[len(shorter)]


def test_sleeps_are_told_apart_by_factors_of_four() -> None:
    def taught_by(sleep: float) -> list[int]:
        lateness = Lateness(0.0)
        lateness.learn(sleep, 1e-3)
        return [i for i in range(8) if lateness.ahead[i] > 2 * MARGIN]

    limits = [100e-6 * 4**i for i in range(7)]
    assert [taught_by(limit * 0.999) for limit in limits] == [[i] for i in range(7)]
    assert [taught_by(limit * 1.001) for limit in limits] == [[i] for i in range(1, 8)]
    assert taught_by(100e-6) == [0]
    assert taught_by(3600.0) == [7]


def test_each_length_of_sleep_has_its_own_lateness_to_begin_with() -> None:
    lateness = Lateness()
    for sleep in (50e-6, 1e-3, 1.0, 1000.0):
        assert needed(lateness, sleep) == pytest.approx(20e-6 + 1.5 * 10e-6 + MARGIN)
    other = Lateness(1e-3)
    assert needed(other, 1.0) == pytest.approx(1e-3 + 1.5 * 0.5e-3 + MARGIN)
    other.learn(1.0, 1e-3)  # as late as it began with: what it is off by halves
    assert needed(other, 1.0) == pytest.approx(1e-3 + 1.5 * 0.25e-3 + MARGIN)


def test_the_first_sleep_counts_half_and_none_less_than_a_twentieth() -> None:
    lateness = Lateness(0.0)
    lateness.learn(1.0, 8e-3)
    assert needed(lateness, 1.0) == pytest.approx(4e-3 + 1.5 * 4e-3 + MARGIN)
    lateness.learn(1.0, 4e-3)
    assert needed(lateness, 1.0) == pytest.approx(4e-3 + 1.5 * 4e-3 * 2 / 3 + MARGIN)
    lateness.learn(1.0, 8e-3)  # the third: a quarter, of what it is later than the mean, and of what that is off by
    assert needed(lateness, 1.0) == pytest.approx(5e-3 + 1.5 * (8e-3 / 3 + (4e-3 - 8e-3 / 3) / 4) + MARGIN)
    for _ in range(1000):
        lateness.learn(1.0, 1e-3)
    assert needed(lateness, 1.0) == pytest.approx(1e-3 + MARGIN)
    lateness.learn(1.0, 2e-3)
    assert needed(lateness, 1.0) == pytest.approx(1e-3 + 1e-3 / 20 + 1.5 * 1e-3 / 20 + MARGIN)
    assert needed(lateness, 1e-3) == pytest.approx(MARGIN)  # of other lengths it has learned nothing


def test_no_sleep_teaches_more_than_ten_milliseconds() -> None:
    one, other = Lateness(), Lateness()
    one.learn(1.0, 3600.0)
    other.learn(1.0, 10e-3)
    assert needed(one, 1.0) == needed(other, 1.0)
    less = Lateness()
    less.learn(1.0, 9e-3)
    assert needed(less, 1.0) < needed(other, 1.0)


def test_the_allowance_is_what_the_sleep_needs_that_is_really_slept() -> None:
    lateness = Lateness(90e-6)  # with the deviation, 162.5 microseconds for every length
    for _ in range(300):
        lateness.learn(50e-6, 10e-6)
    # 250 microseconds less those leave a short sleep, which needs 15.
    assert lateness.allowance(250e-6) == pytest.approx(15e-6, abs=1e-6)
    assert lateness.allowance(1e-3) == pytest.approx(162.5e-6)


@pytest.mark.parametrize("bucket", range(1, 8))
def test_the_allowance_is_of_the_bucket_that_the_sleep_ends_up_in(bucket: int) -> None:
    """However far below the wait that is; a sleep as long as a bucket's longest belongs to that bucket."""
    longest = [SHORT * 4**i for i in range(7)]
    lateness = Lateness()
    for sleep, below in [(longest[bucket - 1], bucket - 1), (1.2 * longest[bucket - 1], bucket), (longest[0] / 2, 0)]:
        wait = 2 * longest[bucket - 1]
        lateness.ahead = [float(i) for i in range(8)]
        lateness.ahead[bucket] = wait - sleep
        assert wait - lateness.ahead[bucket] == pytest.approx(sleep, rel=1e-12)
        assert lateness.allowance(wait) == lateness.ahead[below]
    for between in range(bucket):
        wait = 2 * longest[bucket - 1]
        lateness.ahead = [float(i) for i in range(8)]
        lateness.ahead[bucket] = wait - 0.5 * longest[between]
        assert lateness.allowance(wait) == lateness.ahead[between]


@pytest.mark.parametrize(
    ("now", "started", "predicted", "spin", "after"),
    [
        (1.0, 0.0, 1.0, 0.5, 0.0),  # spinning
        (1.25, 1.0, 1.25, 0.25, 0.0),
        (1.5, 1.0, 1.25, 0.25, LONGEST_SLEEP),  # the budget is spent
        (0.9, 0.8, 1.0, 0.0, SHORTEST_SLEEP),  # early, and no budget
        (0.01, 0.0, 0.008, 0.0, 0.0003),  # 3 % of the time waited
        (0.01, 0.0, 0.0098, 0.0, 0.0001),  # half of what it is late
        (0.01, 0.0, 0.00999, 0.0, SHORTEST_SLEEP),
        (5.0, 0.0, 1.0, 0.0, LONGEST_SLEEP),
        (5.0, 4.9, 1.0, 0.0, 0.003),  # the time waited counts from when it became the head
    ],
)
def test_the_next_look(now: float, started: float, predicted: float, spin: float, after: float) -> None:
    assert next_look(now, started, predicted, spin) - now == pytest.approx(after, abs=1e-12)
