"""When the hub looks, to the microsecond, in the virtual time of `test_completion`, and what it counts and learns by it."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest

import aiotrt
from aiotrt._workers import processors
from aiotrt.completion import hub as completion
from aiotrt.completion.hub import IDLE, PATROL, POLLS_BEFORE_HANG, REPEATS, STALL, STALL_SHARE, TURN, Hub
from aiotrt.completion.lane import Lane, Pending
from aiotrt.completion.prediction import (
    LONGEST_SLEEP,
    LONGEST_SPIN,
    MARGIN,
    OVERDUE_SHARE,
    SHORTEST_SLEEP,
    SPIN_BUDGET,
    SPIN_SHARE,
    Estimate,
    Lateness,
    Progress,
)
from aiotrt.completion.waiter import Waiter
from aiotrt.errors import DeviceHangError
from tests.test_completion import Timer, Work, World, learned

pytestmark = pytest.mark.asyncio


class Watched(Work):
    """Work that remembers when it was looked at."""

    def __init__(self, world: World, duration: float | None) -> None:
        super().__init__(world, duration)
        self.times: list[float] = []

    def query(self) -> bool:
        self.times.append(self._world.now)
        return super().query()


class Noted(Timer):
    """A timer that notes for how long it was set."""

    delays: list[float]

    def set(self, delay: float) -> None:
        self.delays.append(delay)
        super().set(delay)


def noted(world: World) -> list[float]:
    """For how long the world's timer is set, each time from now on."""
    timer = Noted(world, world.hub._fire)
    timer.delays = []
    world.hub._timer = timer
    return timer.delays


async def test_queries_and_wakes_are_counted_from_nothing() -> None:
    world = World()
    assert (world.hub.polls, world.hub.wakes) == (0, 0)
    works = [Work(world, duration).watch(Lane()) for duration in (0.001, 0.002)]
    await world.advance(0.01)
    assert world.hub.polls == sum(work.queries for work in works) > 2
    assert world.hub.wakes == world.fired > 2


async def test_the_first_look_is_before_the_prediction_and_the_second_is_at_it() -> None:
    world = World()
    start = world.now
    work = Watched(world, None)
    work.watch(Lane(), estimate=learned(0.010))
    await world.advance(0.0101)
    assert work.times[:3] == pytest.approx(
        [start + 0.010 - Lateness().allowance(0.010), start + 0.010, start + 0.010 + SHORTEST_SLEEP], abs=1e-9
    )


async def test_a_first_look_just_before_the_prediction_is_not_followed_at_once() -> None:
    allowed = Lateness().allowance(0.010)
    world = World(late=allowed - 5e-6)
    delays = noted(world)
    Work(world, None).watch(Lane(), estimate=learned(0.010))
    await world.advance(0.01005)
    assert delays[:2] == pytest.approx([0.010 - allowed, SHORTEST_SLEEP], abs=1e-9)


def varying(shortest: float, seconds: float) -> Estimate:
    """What is known of work that mostly takes `seconds` and now and then is shorter."""
    estimate = learned(seconds)
    estimate.between(shortest, shortest)
    for _ in range(100):
        estimate.between(seconds, seconds)
    return estimate


@pytest.mark.parametrize("spin", [0.0, SPIN_BUDGET])
async def test_work_that_is_sometimes_shorter_is_looked_at_from_then_on_and_closely_when_it_is_expected(spin: float) -> None:
    world = World(spin=spin)
    start, allowed = world.now, Lateness().allowance(0.010)
    work = Watched(world, 0.010)
    work.watch(Lane(), estimate=varying(0.002, 0.010))
    await world.advance(0.011)
    early = [time - start for time in work.times if time - start < 0.010 - allowed - 1e-9]
    assert early[0] == pytest.approx(0.002 - allowed, abs=1e-9)
    assert early[1] == pytest.approx(0.002, abs=OVERDUE_SHARE * 0.002 + 1e-9)
    gaps = [b - a for a, b in pairwise(early[1:])]
    assert gaps == pytest.approx([OVERDUE_SHARE * time for time in early[1:-1]], abs=4e-6), "neither spinning nor asleep"
    then = next(time - start for time in work.times if time - start > 0.010 - allowed - 1e-9)
    assert then < (0.010 if spin else 0.010 - allowed + 4e-6)
    assert work.seen_at - start < 0.010 + (4e-6 if spin else SHORTEST_SLEEP)


@pytest.mark.parametrize(("turn", "queries"), [(IDLE / 3, REPEATS + 1), (2 * IDLE, 1)])
async def test_a_spin_polls_several_times_in_each_iteration_of_a_loop_that_has_nothing_else_to_do(
    turn: float, queries: int
) -> None:
    world = World(spin=10 * IDLE, turn=turn)
    work = Watched(world, 0.001)
    work.watch(Lane(), estimate=learned(0.001 - 4 * IDLE))
    await world.advance(0.002)
    assert work.outcomes == [None]
    moments = Counter(work.times)
    first, *others, last = sorted(moments)
    assert moments[first] == 1, "the spin begins after this one"
    assert others
    assert {moments[moment] for moment in others} == {queries}
    assert moments[last] == 1, "it was complete"


async def test_what_a_callback_submits_in_a_spin_is_polled_in_the_next_iteration() -> None:
    world = World(spin=10 * IDLE)
    lane = Lane()
    polled: list[str] = []
    late: list[float] = []
    answers = itertools.chain([False, False, False], itertools.repeat(True))  # complete at a query that is a repeat

    def first() -> bool:
        polled.append("first")
        return next(answers)

    def second() -> bool:
        polled.append("second")
        return True

    def done(_: BaseException | None) -> None:
        late.append(lane.late)
        world.hub.watch(lane, second, lambda _: polled.append("done"), estimate=learned(1e-9))
        polled.append("end")

    world.hub.watch(lane, first, done, estimate=learned(0.001))
    world.now += 0.001
    world.fire()
    while "end" not in polled:
        world.now += 1e-6
        await asyncio.sleep(0)
    assert late == [0.0], "the query before was made at the same moment"
    assert polled[-2:] == ["first", "end"], "the loop had no iteration in between"
    assert polled.count("first") == 4
    await world.advance(0.001)
    assert polled[-1] == "done"


@pytest.mark.parametrize(
    ("length", "early", "spins"),
    [
        (0.005, 0.9 * SPIN_SHARE * 0.005, True),
        (0.005, 1.1 * SPIN_SHARE * 0.005, False),
        (0.020, 0.9 * LONGEST_SPIN, True),
        (0.020, 1.1 * LONGEST_SPIN, False),
    ],
)
@pytest.mark.parametrize("spin", [0.0, SPIN_BUDGET])
async def test_after_a_poll_that_came_a_little_early_there_is_no_second_sleep(
    length: float, early: float, spins: bool, spin: float
) -> None:
    world = World(spin=spin)
    delays = noted(world)
    world.hub._lateness.ahead[:] = [*[1e-9] * 3, *[early] * (len(world.hub._lateness.ahead) - 3)]  # of sleeps over 1.6 ms
    work = Work(world, length).watch(Lane(), estimate=learned(length))
    await world.advance(length + 0.001)
    assert work.outcomes == [None]
    assert delays[0] == pytest.approx(length - early, abs=1e-9)
    assert len(delays) == 1 if spins and spin else len(delays) > 1


async def test_work_behind_other_work_is_slept_on_too() -> None:
    world = World(spin=SPIN_BUDGET)
    lane, start = Lane(), world.now
    Work(world, 0.010).watch(lane, estimate=learned(0.010))
    second = Watched(world, 0.030)
    second.watch(lane, estimate=learned(0.020))
    await world.advance(0.040)
    assert len(set(second.times)) < 20
    assert second.seen_at - start < 0.0301


RANDOM = random.Random(5)
LENGTHS = {
    "log-normal": [0.003 * min(5.0, RANDOM.lognormvariate(-0.125, 0.5)) for _ in range(400)],
    "bimodal": [0.012 if RANDOM.random() < 0.15 else 0.0015 for _ in range(400)],
    "rarely short": [0.0015 if RANDOM.random() < 0.03 else 0.012 for _ in range(400)],
    "drifting": [0.003 * (1 + 0.8 * math.sin(2 * math.pi * i / 80)) for i in range(400)],
    "queued": [0.003 + RANDOM.uniform(0.0, 0.006) for _ in range(400)],
}


@pytest.mark.parametrize("spin", [0.0, SPIN_BUDGET])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
async def test_however_lengths_vary_prediction_sees_them_no_later_than_intervals_do(
    lengths: list[float], spin: float
) -> None:
    async def late(progress: Progress) -> list[float]:
        world = World(progress, spin=spin, late=15e-6)
        lane, estimate, found = Lane(), Estimate(), []
        for length in lengths * 2:
            start = world.now
            work = Work(world, length).watch(lane, estimate=estimate)
            while not work.outcomes:
                await world.advance(0.0005)
            found.append(work.seen_at - start - length)
        return sorted(found[len(lengths) :])  # by then it has learned

    predicted, regular = await late(Progress.PREDICT), await late(Progress.INTERVAL)
    for share in (0.5, 0.9, 0.99):
        i = int(share * len(lengths))
        assert predicted[i] <= 1.4 * regular[i] + SHORTEST_SLEEP, f"at {share:.0%}"


async def test_the_next_look_is_at_the_head_whatever_stands_behind_it() -> None:
    world = World()
    lane, start = Lane(), world.now
    first = Work(world, 0.020).watch(lane, estimate=learned(0.010))
    Work(world, 0.030).watch(lane, estimate=learned(10.0))
    await world.advance(0.025)
    assert first.outcomes == [None]
    assert first.seen_at - start < 0.0205
    assert first.queries < 150


@pytest.mark.parametrize("behind", [0, 1])
async def test_work_that_a_callback_submits_is_not_looked_at_before_the_loop_has_had_its_turn(behind: int) -> None:
    """However short it is: with many callers in line, the loop would stand still until the last one was served."""
    world = World(spin=SPIN_BUDGET)
    lane, done = Lane(), []

    def submit_another(_: BaseException | None) -> None:
        done.append(world.now)
        if len(done) < 20:
            world.hub.watch(lane, lambda: True, submit_another, estimate=learned(10e-6))

    for _ in range(1 + behind):
        world.hub.watch(lane, lambda: True, submit_another, estimate=learned(10e-6))
    turns = [len(done)]
    while len(done) < 20:
        await world.advance(3e-6)
        turns.append(len(done))
    assert max(b - a for a, b in pairwise(turns)) == 1 + behind


@pytest.mark.parametrize(("takes", "at_once"), [(0.0, 6), (0.4 * TURN, 3), (2 * TURN, 1)])
async def test_completions_of_which_much_follows_leave_the_loop_its_turn(takes: float, at_once: int) -> None:
    """Who was not looked at for that is first then: nobody is passed over for work that came later."""
    world = World(spin=SPIN_BUDGET)
    seen: list[int] = []

    def watch(i: int, lane: Lane) -> None:
        def done(_: BaseException | None) -> None:
            seen.append(i)
            world.now += takes
            if len(seen) < 30:
                watch(i, lane)

        world.hub.watch(lane, lambda: True, done, estimate=learned(10e-6))

    for i in range(6):
        watch(i, Lane())
    turns = [0]
    while len(seen) < 30:
        await world.advance(3e-6)
        turns.append(len(seen))
    assert max(b - a for a, b in pairwise(turns)) == at_once
    assert seen == [*range(6)] * 5


@pytest.mark.parametrize(("takes", "expected"), [(0.0, "look, other"), (2 * TURN, "other, look")])
async def test_after_a_long_poll_who_became_ready_meanwhile_is_called_before_the_next_one(
    takes: float, expected: str
) -> None:
    """A heartbeat, say: without this it waits for a third long poll. After a short one nothing is lost by looking first."""
    world = World(spin=SPIN_BUDGET)
    order: list[str] = []
    loop = asyncio.get_running_loop()
    mine, theirs = socket.socketpair()
    with mine, theirs:

        def other() -> None:
            order.append("other")
            loop.remove_reader(theirs)

        loop.add_reader(theirs, other)

        def done(_: BaseException | None) -> None:
            world.now += takes
            mine.send(b"now")  # somebody becomes ready while this poll is at work
            world.hub.watch(Lane(), look, lambda _: None, estimate=learned(10e-6))

        def look() -> bool:
            order.append("look")
            return True

        world.hub.watch(Lane(), lambda: True, done, estimate=learned(10e-6))
        while len(order) < 2:
            await world.advance(3e-6)
            await asyncio.sleep(0)
        if not isinstance(loop, asyncio.BaseEventLoop):
            expected = "other, look"  # uvloop looks for what became ready before it calls what was to be called soon
        assert ", ".join(order) == expected


def submitting(work: Work, lane: Lane, seconds: float) -> Callable[[BaseException | None], None]:
    """A callback that submits work which is expected to take so long."""

    def submit(_: BaseException | None) -> None:
        work.watch(lane, estimate=learned(seconds))

    return submit


async def test_what_callbacks_submit_is_looked_at_by_its_own_prediction_whatever_stands_behind_it() -> None:
    world = World()
    lane, start = Lane(), world.now
    long = Work(world, 1.0)
    short = Work(world, 0.001)
    world.hub.watch(lane, lambda: True, submitting(short, lane, 0.001))
    world.hub.watch(lane, lambda: True, submitting(long, lane, 1.0))
    await world.advance(0.002)
    assert short.outcomes == [None]
    assert short.seen_at - start < 0.0011
    assert short.queries < 10


async def test_the_only_work_that_callbacks_submit_is_looked_at_too() -> None:
    world = World(spin=SPIN_BUDGET)
    lane = Lane()
    short = Work(world, 0.001)
    world.hub.watch(lane, lambda: True, submitting(short, lane, 0.001))
    world.hub.watch(lane, lambda: True, lambda _: None)
    await world.advance(0.002)
    assert short.outcomes == [None]


async def test_each_lane_is_looked_at_when_it_is_due_and_not_before() -> None:
    world = World()
    slow = Work(world, 1.0).watch(Lane(), estimate=learned(1.0))
    start = world.now
    gone = Lane()
    Work(world, 0.010).watch(gone, estimate=learned(0.010))
    fast = Work(world, 0.001).watch(Lane(), estimate=learned(0.001))
    world.hub.forget(gone)
    await world.advance(0.002)
    assert fast.outcomes == [None]
    assert fast.seen_at - start < 0.00103
    assert slow.queries == 0
    assert world.due is not None
    assert world.due - start > 0.9, "woken for what was forgotten"
    await world.advance(1.0)
    assert slow.outcomes == [None]


async def test_lanes_that_are_due_together_share_a_timer() -> None:
    world = World()
    delays = noted(world)
    works = [Work(world, 0.010).watch(Lane(), estimate=learned(0.010)) for _ in range(3)]
    assert len(delays) == 1
    await world.advance(0.02)
    assert [work.outcomes for work in works] == [[None]] * 3


async def test_a_timer_that_is_exact_is_soon_trusted() -> None:
    world = World()
    lane, early = Lane(), []
    for _ in range(300):
        work = Watched(world, 0.001)
        start = world.now
        work.watch(lane, estimate=learned(0.001))
        await world.advance(0.002)
        early.append(start + 0.001 - work.times[0])
    assert early[0] > 30e-6
    assert early[-1] == pytest.approx(MARGIN, abs=0.5e-6)


async def test_what_is_complete_at_the_first_look_took_no_longer_than_that() -> None:
    world = World()
    estimate = Estimate()
    work = Work(world, 0.0)
    work.watch(Lane(), estimate=estimate)
    start = world.now
    await world.advance(0.001)
    assert work.queries == 1
    assert estimate.seconds == pytest.approx(work.seen_at - start, abs=1e-12)
    assert estimate.seconds == pytest.approx(SHORTEST_SLEEP, abs=1e-9)


async def test_a_clock_may_begin_at_zero() -> None:
    world = World()
    world.now = 0.0
    estimate = Estimate()
    work = Work(world, 0.010).watch(Lane(), estimate=estimate)
    await world.advance(0.02)
    assert work.outcomes == [None]
    assert estimate.seconds == pytest.approx(0.010, rel=0.05)


async def test_work_is_overdue_past_its_timeout_and_hung_when_it_was_found_so_three_times() -> None:
    world = World()
    work = Work(world, None).watch(Lane(), estimate=learned(5.0), hang_timeout=5.0)

    def look_at(time: float | None) -> None:
        assert time is not None
        world.now, world.due = time, None
        world.fire()

    look_at(world.due)
    assert world.due == pytest.approx(105.0)
    look_at(105.0)  # not a moment too late
    assert work.queries == 2
    for _ in range(1, POLLS_BEFORE_HANG):
        look_at(world.due)
    assert work.queries == POLLS_BEFORE_HANG + 1
    assert work.outcomes == []
    look_at(world.due)
    assert isinstance(work.outcomes[0], DeviceHangError)


@pytest.mark.parametrize("overdue", range(POLLS_BEFORE_HANG))
async def test_how_often_the_work_before_was_overdue_is_nothing_to_the_next(overdue: int) -> None:
    world = World()
    lane = Lane()
    first = Work(world, None).watch(lane, estimate=learned(5.0), hang_timeout=5.0)
    world.now += 5.001
    for _ in range(overdue):
        lane.due = world.now
        world.fire()
    first._until = world.now
    lane.due = world.now
    world.fire()
    assert first.outcomes == [None]
    second = Work(world, None).watch(lane, estimate=learned(5.0), hang_timeout=5.0)
    world.now += 5.001
    for _ in range(POLLS_BEFORE_HANG):
        assert second.outcomes == []
        lane.due = world.now
        world.fire()
    assert isinstance(second.outcomes[0], DeviceHangError)


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("stalls", [(0.5,), (2.3,), (4.2,), (0.1, 0.2, 2.5, 4.0)])
async def test_while_the_machine_stands_still_no_work_is_overdue(stalls: tuple[float, ...], told: bool) -> None:
    """A debugger, a machine that is moved: the clock goes on, and nothing else does. A hang is found all the same."""
    world = World()
    kind = Told if told else Watched
    start, stood = world.now, 0.0
    works = [kind(world, duration) for duration in (4.5, None)]
    for work in works:
        work.watch(Lane(), hang_timeout=5.0)
    for stall in stalls:
        await world.advance(start + stood + stall - world.now)
        stood += 3600.0
        works[0]._until = start + stood + 4.5
        world.stall(3600.0)
    await world.advance(start + stood + 4.9 - world.now)
    assert works[1].outcomes == []
    if told:  # it is looked at now and then, and not yet as what is overdue is
        assert works[1].queries <= 5 + len(stalls)
    # What went by since the look before does not count either.
    await world.advance(0.2 + sum(min(stall, PATROL) if told else 0.02 for stall in stalls))
    assert works[0].outcomes == [None]
    assert isinstance(works[1].outcomes[0], DeviceHangError)


@pytest.mark.parametrize(("late", "hang_timeout"), [(STALL, 0.5), (STALL_SHARE * 16.0, 16.0)])
async def test_a_look_is_not_that_late_until_it_is_later(late: float, hang_timeout: float) -> None:
    world = World()
    lane = Lane()
    Work(world, None).watch(lane, hang_timeout=hang_timeout)
    (head,) = lane.pending
    world.hub._hung(lane, head, late, 0.0, 0.0)
    assert lane.stalled == 0.0
    later = math.nextafter(late, math.inf)
    world.hub._hung(lane, head, later, 0.0, 0.0)
    assert lane.stalled == later


@pytest.mark.parametrize(("late", "hang_timeout"), [(0.09, 0.2), (0.4, 5.0)])
async def test_a_loop_that_is_always_late_finds_hangs_too(late: float, hang_timeout: float) -> None:
    world = World(late=late)
    start = world.now
    work = Work(world, None).watch(Lane(), hang_timeout=hang_timeout)
    await world.advance(3 * hang_timeout)
    assert isinstance(work.outcomes[0], DeviceHangError)
    assert work.seen_at - start < hang_timeout + (POLLS_BEFORE_HANG + 1) * (late + LONGEST_SLEEP)


async def test_a_stall_in_the_time_of_the_work_before_is_nothing_to_the_next() -> None:
    world = World()
    lane = Lane()
    first = Work(world, 1.0).watch(lane, hang_timeout=5.0)
    second = Work(world, None).watch(lane, hang_timeout=5.0)
    await world.advance(0.5)
    world.stall(3600.0)
    start = world.now
    assert first.outcomes == [None]
    await world.advance(5.1)
    assert isinstance(second.outcomes[0], DeviceHangError)
    assert second.seen_at - start < 5.05


async def test_who_must_wait_after_a_stall_until_the_loop_has_had_its_turn_is_not_overdue_for_that() -> None:
    world = World()

    def busy(_: BaseException | None) -> None:
        world.now += 2 * TURN

    world.hub.watch(Lane(), lambda: True, busy, estimate=learned(1.0))
    work = Work(world, None).watch(Lane(), estimate=learned(1.0), hang_timeout=5.0)
    world.stall(3600.0)
    assert work.queries == 0
    await world.advance(4.9)
    assert work.queries > 1
    assert work.outcomes == []
    await world.advance(0.2)
    assert isinstance(work.outcomes[0], DeviceHangError)


async def test_work_that_nothing_is_known_of_is_found_at_once_while_it_is_young_where_there_is_spinning() -> None:
    world = World(spin=SPIN_BUDGET)
    for _ in range(5):
        start = world.now
        work = Work(world, 10e-6).watch(Lane(), estimate=Estimate())
        await world.advance(0.001)
        assert work.seen_at - start < 14e-6
    start = world.now
    old = Watched(world, 0.050)
    old.watch(Lane(), estimate=Estimate())
    await world.advance(0.060)
    young = [time for time in old.times if time - start < SPIN_BUDGET]
    assert len(young) > 10
    assert len(old.times) - len(young) < 200
    assert old.seen_at - start < 0.052


async def test_looking_at_intervals_begins_with_one() -> None:
    world = World(Progress.INTERVAL, spin=1.0)
    delays = noted(world)
    Work(world, 0.010).watch(Lane(), estimate=learned(0.010))
    assert delays == pytest.approx([SHORTEST_SLEEP])
    await world.advance(0.001)
    assert min(delays) >= SHORTEST_SLEEP * 0.999


@pytest.mark.parametrize(("count", "spin"), [(1, 0.0), (2, 0.0), (3, SPIN_BUDGET), (64, SPIN_BUDGET)])
async def test_it_spins_only_where_there_is_a_processor_to_spare(count: int, spin: float) -> None:
    def timer(*_: Any) -> Timer:
        return Timer(World(), lambda: None)

    with mock.patch.object(completion, "processors", return_value=count):
        assert Hub(asyncio.get_running_loop(), timer=timer)._spin == spin
    assert Hub(asyncio.get_running_loop(), timer=timer, spin=0.125)._spin == 0.125


@pytest.mark.parametrize(("system", "count"), [({0, 5, 7}, 3), (8, 8), (None, 1)])
async def test_processors_are_those_that_this_process_may_use(system: Any, count: int) -> None:
    def affinity(process: int) -> set[int]:
        assert process == 0, "of another process"
        if not isinstance(system, set):
            raise AttributeError("sched_getaffinity")
        return system

    with mock.patch("os.sched_getaffinity", affinity, create=True), mock.patch("os.cpu_count", return_value=system):
        assert processors() == count


async def test_a_lane_says_how_long_its_work_ran_and_since_when_it_may_have_been_complete() -> None:
    world = World()
    lane, start = Lane(), world.now
    first = Watched(world, 0.010)
    first.watch(lane, estimate=learned(0.010))
    second = Watched(world, 0.030)
    second.watch(lane, estimate=learned(0.020))
    await world.advance(0.015)
    assert first.ran == pytest.approx(first.seen_at - start, abs=1e-12)
    assert first.late == pytest.approx(first.times[-1] - first.times[-2], abs=1e-12)
    assert 0.0 < first.late < 0.001
    await world.advance(0.030)
    assert second.ran == pytest.approx(second.seen_at - first.seen_at, abs=1e-12), "it began when the one before was done"
    assert second.late == pytest.approx(second.times[-1] - second.times[-2], abs=1e-12)


@pytest.mark.parametrize(
    ("known", "duration", "late", "ran", "unseen"),
    [
        (None, 0.0, 0.0, SHORTEST_SLEEP, 0.0),  # nothing is known, so nothing is said
        (0.010, 0.001, 0.0, 0.010 - Lateness().allowance(0.010), 0.0),  # it was shorter than ever
        (0.010, 0.001, 0.005, 0.015 - Lateness().allowance(0.010), 0.005 - Lateness().allowance(0.010)),
    ],
)
async def test_what_is_complete_at_the_first_look_is_as_late_as_it_was_expected_before(
    known: float | None, duration: float, late: float, ran: float, unseen: float
) -> None:
    world = World(late=late)
    lane = Lane()
    work = Work(world, duration).watch(lane, estimate=None if known is None else learned(known))
    await world.advance(0.020)
    assert work.queries == 1
    assert (work.ran, work.late) == pytest.approx((ran, unseen), abs=1e-9)


async def test_a_lane_that_has_seen_nothing_says_so() -> None:
    lane = Lane()
    assert (lane.last_done, lane.ran, lane.late) == (0.0, 0.0, 0.0)


async def test_a_first_poll_is_ahead_of_the_estimate_by_the_allowance() -> None:
    world = World()
    hub = world.hub
    for _ in range(100):  # short sleeps end late, longer ones do not
        hub._lateness.learn(90e-6, 60e-6)
        hub._lateness.learn(300e-6, 5e-6)
    for wait in range(1, 400):
        pending = Pending(lambda: False, lambda _: None, learned(wait * 1e-6), None)
        seconds = pending.estimate.seconds
        expected = world.now + max(0.0, seconds - hub._lateness.allowance(seconds))
        assert hub._first_poll(world.now, pending) == pytest.approx(expected, abs=1e-9)


async def test_who_awaits_is_resumed_at_the_end_of_the_poll() -> None:
    world = World()
    loop = asyncio.get_running_loop()
    waiter = Waiter(loop, lambda: True, lambda _: None, Estimate(), None)
    order: list[str] = []
    waiter.add_done_callback(lambda _: order.append("resumed"))

    def done(_: BaseException | None) -> None:
        waiter.resolve(None)
        world.hub.finish(waiter)

    world.hub.watch(Lane(), lambda: True, done, estimate=learned(0.001))
    world.now += 0.002
    loop.call_soon(world.fire)
    loop.call_soon(order.append, "the next handle")
    await asyncio.sleep(0)
    assert order == ["resumed", "the next handle"]


def resumed_by(world: World, count: int) -> list[int]:
    """Watch so much work, complete at the next poll; returns the list of who was resumed, by number."""
    resumed: list[int] = []

    def watch(number: int) -> None:
        waiter = Waiter(asyncio.get_running_loop(), lambda: True, lambda _: None, Estimate(), None)
        waiter.add_done_callback(lambda _: resumed.append(number))

        def done(_: BaseException | None) -> None:
            waiter.resolve(None)
            world.hub.finish(waiter)

        world.hub.watch(Lane(), lambda: True, done, estimate=learned(0.001))

    for number in range(count):
        watch(number)
    world.now += 0.002
    return resumed


async def test_all_who_await_what_one_poll_completes_are_resumed_at_its_end() -> None:
    world = World()
    resumed = resumed_by(world, 3)
    asyncio.get_running_loop().call_soon(world.fire)
    counted = []
    asyncio.get_running_loop().call_soon(lambda: counted.append(len(resumed)))
    await asyncio.sleep(0)
    assert counted == [3]


@pytest.mark.parametrize(
    ("by", "call"), [*[("the timer", call) for call in (1, 2, 3, 4, 5)], *[("the loop", call) for call in (1, 2, 3, 4)]]
)
async def test_who_awaits_is_resumed_after_an_interrupt_at_any_reading_of_the_clock(by: str, call: int) -> None:
    """At the poll's beginning, when an event was found complete, and between two lanes."""
    world = World()
    resumed = resumed_by(world, 2)
    readings = 0

    def clock() -> float:
        nonlocal readings
        readings += 1
        if readings == call:
            raise KeyboardInterrupt
        return world.now

    world.hub._clock = clock
    with pytest.raises(KeyboardInterrupt):
        (world.fire if by == "the timer" else world.hub._poll)()
    for _ in range(3):
        await asyncio.sleep(0)
    assert resumed == [0, 1]


@pytest.mark.parametrize("where", ["the timer is read", "the timer was read", "the clock is read"])
async def test_an_interrupt_when_the_timer_fires_leaves_the_poll_to_the_loop(where: str) -> None:
    """The timer does not fire again by itself."""
    world = World()
    resumed = resumed_by(world, 2)
    later = Work(world, 0.5).watch(Lane())
    left = [1]

    def interrupt() -> float:
        if left:
            left.clear()
            raise KeyboardInterrupt
        return world.now

    if where == "the clock is read":
        world.hub._clock = interrupt
    else:
        world.hub._read = interrupt
        if where == "the timer was read":
            world.hub._armed = math.inf
    world.due = None  # it has fired
    with pytest.raises(KeyboardInterrupt):
        world.fire()
    assert world.hub._soon is not None
    for _ in range(3):
        await asyncio.sleep(0)
    assert resumed == [0, 1]
    await world.advance(1.0)
    assert later.outcomes == [None], "the timer was not set again"


@pytest.mark.parametrize("reading", [1, 2])
async def test_an_interrupt_when_the_device_notifies_leaves_the_poll_to_the_loop(reading: int) -> None:
    world = World()
    lane = Lane()
    waiter = Waiter(asyncio.get_running_loop(), lambda: True, lambda _: world.hub.finished.append(waiter), Estimate(), None)
    notify: list[Callable[[], None]] = []
    world.hub.add(lane, waiter, notify.append)
    resumed: list[Any] = []
    waiter.add_done_callback(resumed.append)
    waiter.is_done = True
    waiter.notified = world.now  # as `notify` does, which would have the loop call `_notified` once more
    world.hub._told.append(lane)
    readings = 0

    def clock() -> float:
        nonlocal readings
        readings += 1
        if readings == reading:
            raise KeyboardInterrupt
        return world.now

    world.hub._clock = clock
    with pytest.raises(KeyboardInterrupt):
        world.hub._notified()
    for _ in range(4):
        await asyncio.sleep(0)
    assert resumed == [waiter]


@pytest.mark.skipif(aiotrt.__impl__ == "native", reason="compiled code calculates without calling a number's methods")
async def test_who_awaits_is_resumed_after_an_interrupt_when_nothing_else_is_pending() -> None:
    """The lane has left the list by then, so nothing else would make the loop poll again."""
    world = World()
    resumed = resumed_by(world, 1)

    class Moment(float):
        def __sub__(self, other: float) -> float:
            if other != -math.inf and not world.hub.lanes:
                raise KeyboardInterrupt
            return float(self) - other

    world.hub._clock = lambda: Moment(world.now)
    with pytest.raises(KeyboardInterrupt):
        world.hub._poll()
    assert resumed == []
    world.hub._clock = lambda: world.now
    for _ in range(3):
        await asyncio.sleep(0)
    assert resumed == [0]


async def test_an_interrupt_before_the_callback_of_a_waiter_leaves_it_to_the_loop() -> None:
    world = World()
    resumed: list[Any] = []

    class Interrupted(Waiter):
        interrupts = 1

        def wake(self) -> None:
            if Interrupted.interrupts:
                Interrupted.interrupts -= 1
                raise KeyboardInterrupt
            super().wake()

    waiter = Interrupted(asyncio.get_running_loop(), lambda: True, lambda _: None, Estimate(), None)
    waiter.add_done_callback(resumed.append)
    waiter.resolve(None)
    world.hub.finished.append(waiter)
    with mock.patch("asyncio.current_task", return_value=None), pytest.raises(KeyboardInterrupt):
        world.hub._wake(world.now)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert resumed == [waiter]


async def test_a_waiter_that_was_used_again_is_not_woken_before_its_end() -> None:
    """An interrupt after its callback leaves it in the list, and its task has submitted it again by then."""
    world = World()
    resumed: list[Any] = []
    waiter = Waiter(asyncio.get_running_loop(), lambda: True, lambda _: None, Estimate(), None)
    waiter.add_done_callback(resumed.append)
    world.hub.finished.append(waiter)
    with mock.patch("asyncio.current_task", return_value=None):
        world.hub._wake(world.now)
    assert resumed == []
    assert world.hub.finished == []
    waiter.set_result(None)
    await asyncio.sleep(0)
    assert resumed == [waiter]


async def test_callbacks_that_run_the_loop_resume_each_task_once() -> None:
    """As a notebook's loop does that may be run inside itself."""
    world = World()
    resumed: list[int] = []

    def add(number: int) -> None:
        waiter = Waiter(asyncio.get_running_loop(), lambda: True, lambda _: None, Estimate(), None)

        def callback(_: Any) -> None:
            resumed.append(number)
            world.hub._wake(world.now)

        waiter.add_done_callback(callback)
        waiter.resolve(None)
        world.hub.finished.append(waiter)

    for number in range(3):
        add(number)
    with mock.patch("asyncio.current_task", return_value=None):
        world.hub._wake(world.now)
    assert resumed == [0, 1, 2]
    assert world.hub.finished == []


async def test_after_an_interrupt_the_next_in_line_does_not_inherit_the_polls_of_the_one_before() -> None:
    world = World()
    lane = Lane()

    def interrupted(_: BaseException | None) -> None:
        raise KeyboardInterrupt

    first, estimate = Work(world, 0.002), learned(0.001)
    world.hub.watch(lane, first.query, interrupted, estimate=estimate, hang_timeout=5.0)
    Work(world, None).watch(lane)
    await world.advance(0.0015)
    assert lane.is_polled
    assert lane.spin_until
    lane.overdue, lane.stalled = POLLS_BEFORE_HANG - 1, 1.0
    before = estimate.seconds
    world.now += 0.002
    with pytest.raises(KeyboardInterrupt):
        world.fire()
    assert (lane.is_polled, lane.overdue, lane.stalled, lane.spin_until) == (False, 0, 0.0, 0.0)
    assert estimate.seconds != before, "it learned nothing"


@pytest.mark.parametrize("count", [1, 2])
async def test_a_poll_inside_a_task_resumes_nobody_itself(count: int) -> None:
    """As a debugger's or a nested loop's may be: another task cannot be entered then."""
    world = World()
    resumed = resumed_by(world, count)
    world.fire()
    assert resumed == []
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert resumed == list(range(count))


async def test_a_callback_may_close_the_hub() -> None:
    world = World()
    lane = Lane()
    failures: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    world.hub.watch(lane, lambda: True, lambda _: world.hub.close(), estimate=learned(0.001))
    await world.advance(0.002)
    world.hub.forget(lane)
    assert not world.hub.lanes
    assert not failures


async def test_who_awaits_is_resumed_after_an_interrupt_though_nothing_is_pending_any_more() -> None:
    world = World()
    waiter = Waiter(asyncio.get_running_loop(), lambda: True, lambda _: None, Estimate(), None)
    resumed: list[Any] = []
    waiter.add_done_callback(resumed.append)

    def interrupted(_: BaseException | None) -> None:
        waiter.resolve(None)
        world.hub.finish(waiter)
        raise KeyboardInterrupt

    world.hub.watch(Lane(), lambda: True, interrupted, estimate=learned(0.001))
    with pytest.raises(KeyboardInterrupt):
        await world.advance(0.002)
    await asyncio.sleep(0)
    assert resumed == [waiter]
    assert not world.hub.lanes


async def test_the_time_of_work_counts_from_its_own_start() -> None:
    world = World()
    lane = Lane()
    first = Work(world, 0.9).watch(lane, hang_timeout=1.0)
    second = Work(world, 1.8).watch(lane, hang_timeout=1.0)
    await world.advance(2.0)
    assert first.outcomes == second.outcomes == [None]


@pytest.mark.parametrize("before", [False, True])
async def test_a_stall_early_in_the_work_does_not_count_when_it_is_overdue_later(before: bool) -> None:
    world = World()
    lane = Lane()
    if before:
        Work(world, 0.01).watch(lane, hang_timeout=1.0)
        await world.advance(0.02)
    work = Work(world, 1.3).watch(lane, hang_timeout=1.0)
    await world.advance(0.2)
    world.stall(0.5)
    await world.advance(0.7)
    assert work.outcomes == [None]


async def test_a_stall_in_the_work_before_that_went_on_is_nothing_to_the_next_either() -> None:
    world = World()
    lane = Lane()
    first = Work(world, 2.0).watch(lane, hang_timeout=5.0)
    second = Work(world, None).watch(lane, hang_timeout=1.0)
    await world.advance(0.2)
    world.stall(1.0)
    await world.advance(0.9)
    assert first.outcomes == [None]
    await world.advance(1.2)
    assert isinstance(second.outcomes[0], DeviceHangError)


async def test_how_often_the_work_before_was_polled_is_nothing_to_the_next() -> None:
    world = World()
    lane = Lane()
    first = Work(world, 0.010).watch(lane)
    await world.advance(0.020)
    assert first.queries > 1
    estimate = learned(0.010)
    second = Work(world, 0.001).watch(lane, estimate=estimate)
    await world.advance(0.020)
    assert second.late == 0.0  # complete at its first poll, before its time
    assert estimate.seconds > 0.0099


async def test_a_timer_that_has_fired_is_read() -> None:
    loop = asyncio.get_running_loop()
    hub = Hub(loop, spin=0.0)
    done = asyncio.Event()
    hub.watch(Lane(), lambda: True, lambda _: done.set(), estimate=learned(0.002))
    await done.wait()
    wakes = hub.wakes
    for _ in range(20):
        await asyncio.sleep(0)
    hub.close()
    assert hub.wakes == wakes


async def test_lanes_that_are_due_are_polled_in_the_order_of_their_times() -> None:
    world = World()
    order: list[float] = []

    def query(seconds: float) -> Callable[[], bool]:
        def ask() -> bool:
            order.append(seconds)
            return True

        return ask

    lengths = (0.003, 0.001, 0.002)
    for few in (lengths, lengths[:2]):
        for seconds in few:
            world.hub.watch(Lane(), query(seconds), lambda _: None, estimate=learned(seconds))
        world.stall(0.010)
        await world.advance(0.001)
        assert order == sorted(few)
        order.clear()


async def test_a_timer_that_fires_without_having_been_set_teaches_nothing() -> None:
    world = World()
    before = list(world.hub._lateness.ahead)
    world.fire()
    assert world.hub._lateness.ahead == before


async def test_a_callback_may_forget_its_own_lane() -> None:
    world = World()
    lane = Lane()
    world.hub.watch(lane, lambda: True, lambda _: world.hub.forget(lane), estimate=learned(0.001))
    behind = Work(world, 0.0).watch(lane)
    await world.advance(0.010)
    assert behind.outcomes == []
    assert not world.hub.lanes
    again = Work(world, 0.001).watch(lane)
    await world.advance(0.010)
    assert again.outcomes == [None]


# --- Where the device tells ---------------------------------------------------------------------------------------------


class Told(Watched):
    """Work whose end the device tells when the test says so."""

    def __init__(self, world: World, duration: float | None, error: BaseException | None = None) -> None:
        super().__init__(world, duration)
        self._error = error
        self.callbacks: list[Callable[[], None]] = []

    def watch(self, lane: Lane, **options: Any) -> Told:
        super().watch(lane, when_complete=self.callbacks.append, **options)
        return self

    async def tell(self) -> None:
        """The device's word, from a thread of its own; then the loop has its turn."""
        (callback,) = self.callbacks
        thread = threading.Thread(target=callback)
        thread.start()
        thread.join()
        await asyncio.sleep(0)


async def test_work_whose_end_is_told_is_looked_at_then_and_not_before() -> None:
    world = World(spin=SPIN_BUDGET)
    lane, estimate = Lane(), learned(0.003)
    for _ in range(3):
        work = Told(world, 0.010).watch(lane, estimate=estimate)
        await world.advance(0.010)
        assert work.queries == 0
        await work.tell()
        assert work.outcomes == [None]
        assert work.queries == 1
    assert estimate.seconds == pytest.approx(0.010)


async def test_how_long_it_ran_is_told_too_whenever_it_is_looked_at() -> None:
    world = World()
    lane = Lane()
    work = Told(world, 0.010).watch(lane, estimate=(estimate := Estimate()))
    await world.advance(0.010)
    work.callbacks[0]()
    await world.advance(0.004)  # the loop is busy
    await asyncio.sleep(0)
    assert work.outcomes == [None]
    assert (lane.ran, lane.late) == pytest.approx((0.014, 0.004))
    assert estimate.seconds == pytest.approx(0.010)


async def test_what_is_found_before_its_word_comes_was_not_late() -> None:
    world = World()
    lane = Lane()
    first, second = (Told(world, 0.010).watch(lane) for _ in range(2))
    await world.advance(0.010)
    await first.tell()
    assert first.outcomes == second.outcomes == [None]
    assert lane.late == 0.0
    await second.tell()
    assert second.outcomes == [None]
    assert (first.queries, second.queries) == (1, 1)


async def test_what_stands_behind_told_work_is_waited_for_likewise() -> None:
    world = World(spin=SPIN_BUDGET)
    lane = Lane()
    first, second = (Told(world, duration).watch(lane, estimate=learned(0.010)) for duration in (0.010, 0.020))
    await world.advance(0.010)
    await first.tell()
    await world.advance(0.010)
    assert (first.queries, second.queries) == (1, 1)
    await second.tell()
    assert second.outcomes == [None]
    assert second.queries == 2


async def test_a_failure_is_told_of_like_success() -> None:
    world = World()
    error = RuntimeError("the work")
    work = Told(world, 0.0, error).watch(Lane())
    await work.tell()
    assert work.outcomes == [error]


async def test_a_lane_that_is_told_leaves_the_others_as_they_are() -> None:
    world = World()
    asked = Watched(world, 0.010)
    asked.watch(Lane(), estimate=learned(0.010))
    told = Told(world, 0.001).watch(Lane())
    await world.advance(0.001)
    await told.tell()
    assert told.outcomes == [None]
    assert asked.queries == 0
    await world.advance(0.010)
    assert asked.outcomes == [None]


@pytest.mark.parametrize("hang_timeout", [None, 60.0])
async def test_a_word_that_is_lost_is_made_up_for(hang_timeout: float | None) -> None:
    world = World(spin=SPIN_BUDGET)
    start = world.now
    work = Told(world, 2.5 * PATROL).watch(Lane(), hang_timeout=hang_timeout)
    await world.advance(4 * PATROL)
    assert [time - start for time in work.times] == pytest.approx([PATROL, 2 * PATROL, 3 * PATROL])
    assert work.outcomes == [None]


@pytest.mark.parametrize("hang_timeout", [0.050, 2.5 * PATROL])
async def test_told_work_hangs_as_soon_as_other_work_does(hang_timeout: float) -> None:
    world = World()
    start = world.now
    work = Told(world, None).watch(Lane(), hang_timeout=hang_timeout)
    await world.advance(hang_timeout * 0.99)
    assert work.queries == int(hang_timeout / PATROL)
    await world.advance(hang_timeout)
    assert isinstance(work.outcomes[0], DeviceHangError)
    assert work.seen_at - start < 1.15 * hang_timeout
    overdue = [time - start for time in work.times if time - start >= hang_timeout * 0.99]
    gaps = [b - a for a, b in pairwise(overdue)]
    assert gaps == pytest.approx([min(OVERDUE_SHARE * time, LONGEST_SLEEP) for time in overdue[:-1]], abs=4e-6)
    assert work.queries == int(hang_timeout / PATROL) + 1 + POLLS_BEFORE_HANG


async def test_told_work_is_not_polled_as_overdue_work_for_the_time_in_which_the_machine_stood_still() -> None:
    world = World()
    work = Told(world, None).watch(Lane(), hang_timeout=2.5 * PATROL)
    await world.advance(0.5 * PATROL)
    world.stall(3600.0)
    await world.advance(2.4 * PATROL)
    assert work.queries == 3
    await world.advance(PATROL)
    assert isinstance(work.outcomes[0], DeviceHangError)


async def test_work_that_is_told_of_too_early_is_asked_from_then_on() -> None:
    """As when its event was recorded again: of that record nobody tells."""
    world = World()
    start = world.now
    work = Told(world, 0.020).watch(Lane())
    await world.advance(0.010)
    await work.tell()
    assert work.outcomes == []
    await world.advance(0.015)
    assert work.outcomes == [None]
    assert work.seen_at - start < 0.021


@pytest.mark.parametrize("progress", [Progress.SPIN, Progress.INTERVAL])
async def test_who_says_how_to_look_is_not_told(progress: Progress) -> None:
    world = World(progress)
    work = Told(world, 0.010).watch(Lane())
    await world.advance(0.012)
    assert work.callbacks == []
    assert work.outcomes == [None]


async def test_a_word_of_what_was_forgotten_is_not_heeded() -> None:
    world = World()
    lane = Lane()
    work = Told(world, 0.0).watch(lane)
    world.hub.forget(lane)
    await work.tell()
    assert not lane.is_listed
    assert work.queries == 0


async def test_a_hub_that_is_closed_is_told_nothing() -> None:
    world = World()
    work = Told(world, 0.0).watch(Lane())
    world.hub.close()
    await work.tell()
    assert world.hub.lanes == []
    assert work.queries == 0


async def test_a_loop_that_is_closed_is_told_nothing() -> None:
    loop = asyncio.new_event_loop()
    world = World()
    world.hub._loop = loop
    work = Told(world, 0.0).watch(Lane())
    loop.close()
    work.callbacks[0]()  # on a thread of the device's, which must live


async def test_what_is_complete_already_is_looked_at_when_the_loop_has_had_its_turn() -> None:
    world = World()
    work = Work(world, 0.0)
    world.hub.watch(Lane(), work.query, work.done, when_complete=lambda callback: callback())
    assert work.queries == 0
    await asyncio.sleep(0)
    assert work.outcomes == [None]


async def test_told_work_stands_in_its_line_before_it_can_be_told_of() -> None:
    """Words may come from the device's thread at any moment, and the one that comes first is the only one."""
    world = World()
    lane, seen = Lane(), []
    work = Work(world, 0.0)
    world.hub.watch(lane, work.query, work.done, when_complete=lambda _: seen.append(len(lane.pending)))
    assert seen == [1]
