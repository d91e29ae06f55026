"""The hub in virtual time: a clock that a test turns, a timer that fires when the clock passes it, and events."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest

import aiotrt
from aiotrt.completion.hub import Hub, wait
from aiotrt.completion.lane import Lane, Pending
from aiotrt.completion.prediction import EARLIER_TO_PREPARE, Estimate, Lateness, Progress
from aiotrt.errors import DeviceError, DeviceHangError

pytestmark = [pytest.mark.asyncio, pytest.mark.every_loop]


class World:
    """Virtual time: `advance` turns the clock, fires the timer, and gives the loop its turns."""

    def __init__(
        self, progress: Progress = Progress.PREDICT, spin: float = 0.0, late: float = 0.0, turn: float = 3e-6
    ) -> None:
        self.now = 100.0
        self._turn = turn  # how long an iteration of the loop takes
        self.due: float | None = None
        self.fired = 0
        self._late = late
        self.hub = Hub(
            asyncio.get_running_loop(),
            progress=progress,
            clock=lambda: self.now,
            timer=lambda _, fire: Timer(self, fire),
            spin=spin,
        )

    async def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            if self.hub._soon is not None:  # it wants the loop's next iteration
                self.now += self._turn
                await asyncio.sleep(0)
            elif self.due is not None and self.due + self._late <= end:
                self.now, self.due = self.due + self._late, None
                self.fired += 1
                self.fire()
            else:
                self.now = end

    def stall(self, seconds: float) -> None:
        """The loop, or the machine, stands still for so long: then a timer that was due fires."""
        self.now += seconds
        if self.due is not None and self.due <= self.now:
            self.due = None
            self.fire()

    fire: Callable[[], None]


class Timer:
    def __init__(self, world: World, fire: Callable[[], None]) -> None:
        self._world = world
        world.fire = fire

    def set(self, delay: float) -> None:
        self._world.due = self._world.now + delay

    def close(self) -> None:
        self._world.due = None


class Work:
    """An event that completes at a time, and what became of it."""

    def __init__(self, world: World, duration: float | None, error: BaseException | None = None) -> None:
        self._world = world
        self._until = None if duration is None else world.now + duration
        self._error = error
        self.outcomes: list[BaseException | None] = []
        self.seen_at = 0.0
        self.ran = self.late = 0.0  # as its lane says when it is done
        self.queries = 0
        self._lane: Lane | None = None

    def query(self) -> bool:
        self.queries += 1
        if self._until is None or self._world.now < self._until:
            return False
        if self._error is not None:
            raise self._error
        return True

    def done(self, error: BaseException | None) -> None:
        self.outcomes.append(error)
        self.seen_at = self._world.now
        assert self._lane is not None
        self.ran, self.late = self._lane.ran, self._lane.late

    def watch(self, lane: Lane, **options: Any) -> Work:
        self._lane = lane
        self._world.hub.watch(lane, self.query, self.done, **options)
        return self


async def test_completion_is_found_and_reported_once() -> None:
    world = World()
    work = Work(world, 0.001).watch(Lane())
    await world.advance(0.0009)
    assert work.outcomes == []
    await world.advance(0.0011)
    assert work.outcomes == [None]
    await world.advance(1.0)
    assert work.outcomes == [None]


async def test_once_learned_it_is_looked_for_just_before_its_time() -> None:
    world = World()
    lane, estimate = Lane(), Estimate()
    work = Work(world, 0.0)
    for _ in range(100):
        work = Work(world, 0.010).watch(lane, estimate=estimate)
        await world.advance(0.012)
        assert work.outcomes == [None]
    assert estimate.seconds == pytest.approx(0.010, rel=0.05)
    assert work.queries <= 8
    assert work.seen_at - (world.now - 0.002) < 0.0005


def learned(seconds: float) -> Estimate:
    """What is known of work that has always taken so long."""
    estimate = Estimate()
    for _ in range(2):
        estimate.between(seconds, seconds)
    return estimate


@pytest.mark.parametrize("before", [0, 1, 2, 50])
async def test_after_a_stall_the_next_completion_is_found_as_soon_as_ever(before: int) -> None:
    """One long time among short ones, or the very first, must not be slept on: the next caller would wait as long."""
    world = World()
    lane, estimate = Lane(), Estimate()
    for duration in [0.001] * before + [1.0] + [0.001] * 5:
        start = world.now
        work = Work(world, duration).watch(lane, estimate=estimate)
        await world.advance(duration * 1.1 + 0.001)
        assert work.outcomes == [None]
        assert work.seen_at - start - duration < 0.04 * duration + 50e-6


async def test_work_that_takes_longer_than_ever_is_found_within_a_share_of_the_wait() -> None:
    world = World()
    lane, estimate = Lane(), learned(0.001)
    start = world.now
    work = Work(world, 0.100).watch(lane, estimate=estimate)
    await world.advance(0.2)
    assert work.outcomes == [None]
    assert work.seen_at - start - 0.100 < 0.004
    assert work.queries < 200


async def test_only_the_head_of_a_lane_is_asked() -> None:
    world = World()
    lane = Lane()
    first, second = Work(world, 0.010).watch(lane), Work(world, 0.005).watch(lane)
    await world.advance(0.009)
    assert first.queries > 0
    assert second.queries == 0
    await world.advance(0.003)
    assert first.outcomes == second.outcomes == [None]


async def test_lanes_do_not_wait_for_each_other() -> None:
    world = World()
    slow, fast = Work(world, None).watch(Lane()), Work(world, 0.001).watch(Lane())
    await world.advance(0.1)
    assert fast.outcomes == [None]
    assert slow.outcomes == []


async def test_queueing_behind_others_does_not_teach_a_longer_duration() -> None:
    world = World()
    lane, estimate = Lane(), Estimate()
    for _ in range(50):
        start = world.now
        works = [Work(world, 0.001 * (i + 1)).watch(lane, estimate=estimate) for i in range(8)]
        await world.advance(start + 0.010 - world.now)
        assert all(work.outcomes == [None] for work in works)
    assert estimate.seconds < 0.0012


async def test_a_late_timer_is_learned_and_allowed_for() -> None:
    world = World(late=100e-6)
    lane, estimate = Lane(), Estimate()
    start, work = world.now, Work(world, 0.0)
    for _ in range(200):
        start = world.now
        work = Work(world, 0.005).watch(lane, estimate=estimate)
        await world.advance(0.008)
    assert work.seen_at - start - 0.005 < 250e-6


async def test_work_that_failed_tells_its_own_callback_and_nobody_else() -> None:
    world = World()
    lane = Lane()
    error = ValueError("no")
    failed, fine = Work(world, 0.001, error).watch(lane), Work(world, 0.002).watch(lane)
    await world.advance(0.1)
    assert failed.outcomes == [error]
    assert fine.outcomes == [None]


async def test_a_device_error_reaches_the_callback() -> None:
    world = World()
    error = DeviceError("fault", code=700, name="cudaErrorIllegalAddress")
    work = Work(world, 0.001, error).watch(Lane())
    await world.advance(0.1)
    assert work.outcomes == [error]


async def test_overdue_work_is_a_hang() -> None:
    world = World()
    lane = Lane()
    work = Work(world, None).watch(lane, hang_timeout=5.0)
    await world.advance(4.9)
    assert work.outcomes == []
    await world.advance(0.2)
    (error,) = work.outcomes
    assert isinstance(error, DeviceHangError)
    assert "hang_timeout=5 s" in str(error)


async def test_one_late_look_after_a_stall_of_the_loop_is_not_a_hang() -> None:
    world = World()
    work = Work(world, None).watch(Lane(), hang_timeout=5.0)
    await asyncio.sleep(0)
    assert world.due is not None
    world.stall(3600.0)
    assert work.outcomes == []
    await world.advance(4.9)
    assert work.outcomes == []
    await world.advance(0.2)
    assert len(work.outcomes) == 1


async def test_waiting_in_line_does_not_count_towards_a_hang() -> None:
    world = World()
    lane = Lane()
    works = [Work(world, 3.0 * (i + 1)).watch(lane, hang_timeout=5.0) for i in range(4)]
    await world.advance(13.0)
    assert [work.outcomes for work in works] == [[None]] * 4


async def test_what_is_forgotten_is_never_reported_and_costs_nothing_more() -> None:
    world = World()
    lane = Lane()
    work = Work(world, 0.001).watch(lane)
    world.hub.forget(lane)
    await world.advance(1.0)
    assert work.outcomes == []
    assert world.due is None
    assert not world.hub.lanes


async def test_a_callback_may_watch_more() -> None:
    world = World()
    lane = Lane()
    chain: list[Work] = []

    def again(error: BaseException | None) -> None:
        if len(chain) < 5:
            work = Work(world, 0.001)
            chain.append(work)
            world.hub.watch(lane, work.query, again)

    again(None)
    await world.advance(0.1)
    assert len(chain) == 5
    assert world.due is None


async def test_work_that_ended_before_it_is_added_is_found_at_once() -> None:
    world = World()
    lane, other = Lane(), Lane()
    works = [Work(world, 0.0) for _ in range(3)]
    found: list[list[int]] = []

    def add(work: Work, lane: Lane) -> None:
        work._lane = lane
        world.hub.add_ended(lane, Pending(work.query, work.done, learned(1e-6), None))
        found.append([len(each.outcomes) for each in works])

    add(works[0], lane)
    works[1].watch(other, estimate=learned(1e-6))  # the loop is to have its turn before this is polled
    add(works[2], lane)
    await world.advance(0.001)
    assert found == [[1, 0, 0], [1, 0, 0]]
    assert [work.outcomes for work in works] == [[None]] * 3


async def test_work_that_had_not_ended_when_it_was_added_is_polled_once_in_each_iteration() -> None:
    world = World(Progress.SPIN)
    work = Work(world, None)
    world.hub.add_ended(Lane(), Pending(work.query, work.done, Estimate(), None))
    for queries in range(1, 5):
        assert work.queries == queries
        await asyncio.sleep(0)


async def test_a_callback_that_raises_takes_nobody_with_it() -> None:
    world = World()
    contexts: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
    lane = Lane()

    def bad(error: BaseException | None) -> None:
        raise RuntimeError("bad callback")

    world.hub.watch(lane, Work(world, 0.001).query, bad)
    fine = Work(world, 0.001).watch(lane)
    await world.advance(0.1)
    assert fine.outcomes == [None]
    assert "bad callback" in str(contexts[0]["exception"])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("where", ["query", "callback"])
async def test_an_interrupt_is_the_loops_and_loses_nobody_if_that_goes_on(
    where: str, interrupt: type[BaseException]
) -> None:
    world = World()
    raised: list[BaseException] = []

    def once() -> bool:
        if not raised:
            raised.append(interrupt())
            raise raised[0]
        return True

    def interrupted(_: BaseException | None) -> None:
        once()

    before = Work(world, 0.010).watch(Lane(), estimate=learned(0.010))
    lane = Lane()
    struck = Work(world, 0.0)
    if where == "query":
        world.hub.watch(lane, once, struck.done, estimate=learned(0.010))
    else:
        world.hub.watch(lane, lambda: True, interrupted, estimate=learned(0.010))
    behind = Work(world, 0.010).watch(lane, estimate=learned(0.010))
    after = Work(world, 0.010).watch(Lane(), estimate=learned(0.010))
    with pytest.raises(interrupt):
        await world.advance(0.020)
    assert raised
    await world.advance(0.020)
    assert struck.outcomes == ([None] if where == "query" else [])
    assert before.outcomes == behind.outcomes == after.outcomes == [None]
    assert not world.hub.lanes


async def test_an_error_of_whatever_kind_is_told_to_who_waits() -> None:
    world = World()
    error = asyncio.CancelledError("of the work, and not of who looks")
    work = Work(world, 0.001, error).watch(Lane())
    await world.advance(0.1)
    assert work.outcomes == [error]


async def test_spinning_looks_at_every_turn_and_lets_others_run() -> None:
    world = World(Progress.SPIN)
    work = Work(world, 0.001).watch(Lane())
    turns = 0
    for _ in range(10):
        await asyncio.sleep(0)
        turns += 1
    assert work.queries >= 5
    assert turns == 10
    assert world.fired == 0
    await world.advance(0.002)
    await asyncio.sleep(0)
    assert work.outcomes == [None]
    world.hub.close()


async def test_interval_needs_no_estimate() -> None:
    world = World(Progress.INTERVAL)
    start = world.now
    work = Work(world, 0.010).watch(Lane())
    await world.advance(0.02)
    assert work.outcomes == [None]
    assert work.seen_at - start - 0.010 < 0.001
    assert work.queries < 150


async def test_many_lanes_cost_one_query_each_when_due() -> None:
    world = World()
    works = []
    for _ in range(500):
        works.append(Work(world, 0.010).watch(Lane(), estimate=learned(0.010)))
    await world.advance(0.020)
    assert all(work.outcomes == [None] for work in works)
    assert world.hub.polls <= 500 * 6


async def test_the_hub_of_a_loop_is_shared_and_closes_with_its_last_user() -> None:
    first, second = Hub.acquire(), Hub.acquire()
    assert first is second

    def is_closed() -> bool:
        return first._closed

    first.release()
    assert not is_closed()
    second.release()
    assert is_closed()
    third = Hub.acquire()
    assert third is not first
    third.release()


async def test_wait_returns_at_once_for_a_complete_event() -> None:
    class Complete:
        def query(self) -> bool:
            return True

    await wait(Complete())


async def test_wait_waits_and_can_be_cancelled() -> None:
    class Pending:
        complete = False

        def query(self) -> bool:
            return self.complete

    event = Pending()
    first, second = asyncio.ensure_future(wait(event)), asyncio.ensure_future(wait(event))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    event.complete = True
    await second


async def test_wait_finds_the_produce_event_that_something_carries() -> None:
    class Complete:
        def query(self) -> bool:
            return True

    class Tensor:
        _trt_produce_event = Complete()

    await wait(Tensor())


async def test_wait_raises_what_the_event_raises() -> None:
    class Bad:
        asked = 0

        def query(self) -> bool:
            self.asked += 1
            if self.asked > 3:
                raise DeviceError("fault", code=719, name="cudaErrorLaunchFailure")
            return False

    with pytest.raises(DeviceError, match="cudaErrorLaunchFailure"):
        await wait(Bad())


@pytest.mark.parametrize("name", ["is_done", "done"])
async def test_wait_asks_an_event_that_says_by_an_attribute_whether_it_is_done(name: str) -> None:
    class Asked:
        times = 0

        def is_it(self) -> bool:
            self.times += 1
            return self.times > 3

    setattr(Asked, name, property(Asked.is_it))
    event = Asked()
    await wait(event)
    assert event.times == 4


class Later:
    """Its method says whether it is done; the method itself is true."""

    def is_done(self) -> bool:
        return False


@pytest.mark.parametrize("kind", [int, asyncio.Future, concurrent.futures.Future, Later])
async def test_wait_refuses_what_is_no_event(kind: Callable[[], object]) -> None:
    what = kind()
    with pytest.raises(
        aiotrt.UsageError, match=rf"cannot wait for an object of type {type(what).__name__}: .* that Lease\.launch returned"
    ):
        await wait(what)


async def test_what_the_next_launch_needs_is_prepared_in_the_first_poll_before_the_end() -> None:
    world = World(spin=40e-6)
    lane = Lane()
    start = world.now
    prepared: list[float] = []

    def prepare() -> None:
        assert lane.is_polled
        prepared.append(world.now - start)
        world.now += 10e-6

    lane.prepare = prepare
    plain = Work(world, 0.010).watch(Lane(), estimate=learned(0.010))
    work = Work(world, 0.010).watch(lane, estimate=learned(0.010))
    due = lane.due
    await world.advance(0.012)
    assert work.outcomes == plain.outcomes == [None]
    assert len(prepared) == 1
    assert prepared[0] == pytest.approx(due - start, abs=5e-6)
    earlier = Lateness().allowance(0.010) + EARLIER_TO_PREPARE
    assert due == pytest.approx(start + 0.010 - earlier, rel=0.0, abs=1e-9)


async def test_what_a_callback_submits_with_something_to_prepare_is_polled_earlier_too() -> None:
    world = World(spin=40e-6)
    lane = Lane()
    due: list[float] = []

    def more(error: BaseException | None) -> None:
        lane.prepare = lambda: None
        Work(world, 0.010).watch(lane, estimate=learned(0.010))
        due.append(lane.due)

    world.hub.watch(lane, Work(world, 0.0).query, more)
    while not due:
        await world.advance(1e-5)
    assert due == [lane.due]


@pytest.mark.parametrize("ends", ["complete", "forgotten"])
async def test_what_ends_before_its_first_poll_prepares_nothing(ends: str) -> None:
    world = World(spin=40e-6)
    lane = Lane()
    lane.prepare = lambda: pytest.fail("nothing is in flight")
    first = Work(world, 0.001 if ends == "complete" else None).watch(lane, estimate=learned(0.010))
    if ends == "forgotten":
        world.hub.forget(lane)
    await world.advance(0.011)
    second = Work(world, 0.010).watch(lane, estimate=learned(0.010))
    await world.advance(0.012)
    assert first.outcomes == ([None] if ends == "complete" else [])
    assert second.outcomes == [None]
