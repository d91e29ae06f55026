"""The hub looks when it is time, once, and at nothing that is over: in the virtual time of `test_completion`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from aiotrt.completion import hub as completion
from aiotrt.completion.hub import Hub
from aiotrt.completion.lane import Lane
from aiotrt.completion.prediction import Estimate, Progress
from aiotrt.errors import UsageError
from aiotrt.testing import SimulatedDevice
from tests.simulated import run_simulated
from tests.test_completion import Timer, Work, World, learned

asyncio_test = pytest.mark.asyncio


class CountingTimer(Timer):
    """Says in its world how often it was set."""

    sets = 0

    def set(self, delay: float) -> None:
        type(self).sets += 1
        super().set(delay)


class CountingWorld(World):
    """A world that counts how often its timer is set."""

    def __init__(self) -> None:
        super().__init__()
        CountingTimer.sets = 0
        self.hub._timer = CountingTimer(self, self.hub._fire)


@asyncio_test
async def test_timers_that_are_always_late_are_set_earlier() -> None:
    world = World(late=500e-6, spin=1e-3)
    lane, estimate, late = Lane(), Estimate(), []
    for _ in range(200):
        start = world.now
        work = Work(world, 0.020).watch(lane, estimate=estimate)
        await world.advance(0.025)
        late.append(work.seen_at - start - 0.020)
    assert min(late[:3]) > 200e-6
    assert max(late[-50:]) < 10e-6


@asyncio_test
async def test_work_that_became_much_shorter_is_seen_soon_again() -> None:
    world = World()
    lane, estimate = Lane(), Estimate()
    for _ in range(5):
        estimate.between(0.1, 0.1)
    took = []
    for _ in range(60):
        start = world.now
        work = Work(world, 0.001).watch(lane, estimate=estimate)
        await world.advance(0.2)
        took.append(work.seen_at - start)
    assert took[-1] < 0.0015


@asyncio_test
async def test_an_end_that_is_found_behind_another_one_teaches_nothing() -> None:
    """Its predecessor had ended at some time before, so that nobody knows when it began: not just now."""
    world = World()
    lane, ends = Lane(), list[BaseException | None]()
    first, second, third = (learned(200e-6) for _ in range(3))
    for estimate in (first, second, third):
        world.hub.watch(lane, lambda: True, ends.append, estimate=estimate)
    before = [(estimate.seconds, estimate.shortest, estimate.is_trusted) for estimate in (second, third)]
    await world.advance(0.01)
    assert ends == [None] * 3
    assert [(estimate.seconds, estimate.shortest, estimate.is_trusted) for estimate in (second, third)] == before


@asyncio_test
async def test_the_timer_is_set_once_for_each_sleep() -> None:
    world = CountingWorld()
    for milliseconds in (10, 20, 30):
        Work(world, milliseconds / 1e3).watch(Lane(), estimate=learned(milliseconds / 1e3))
    assert CountingTimer.sets == 1


@asyncio_test
async def test_the_timer_is_set_once_after_each_poll_whatever_is_watched_in_it() -> None:
    world = CountingWorld()
    works = []

    def more(error: BaseException | None) -> None:
        CountingTimer.sets = 0
        for milliseconds in (30, 20, 10):
            works.append(Work(world, milliseconds / 1e3).watch(Lane(), estimate=learned(milliseconds / 1e3)))

    first = Work(world, 0.0)
    world.hub.watch(Lane(), first.query, more)
    while not works:
        await world.advance(1e-5)
    assert CountingTimer.sets == 1
    await world.advance(0.1)
    assert [work.outcomes for work in works] == [[None]] * 3


@asyncio_test
async def test_a_closed_hub_sets_no_timer_and_looks_no_more() -> None:
    world = World()
    estimate = Estimate()
    estimate.between(0.01, 0.01)
    asleep = Work(world, 0.01).watch(Lane(), estimate=estimate)
    assert world.due
    soon = Work(world, 0.0).watch(Lane())
    world.hub.close()
    assert not world.due
    await asyncio.sleep(0)
    world.fire()
    assert asleep.queries == soon.queries == 0
    assert not world.hub.lanes


@asyncio_test
async def test_a_closed_hub_takes_nothing_to_look_at() -> None:
    world = World()
    lane = Lane()
    world.hub.close()
    with pytest.raises(UsageError, match="keep it until its calls and leases have ended"):
        Work(world, 0.0).watch(lane)
    assert not lane.pending
    assert not world.due


def test_hubs_of_loops_that_are_gone_are_closed_when_another_one_is_opened() -> None:
    hubs: list[Hub] = []

    async def acquire() -> None:
        hubs.append(Hub.acquire())

    def files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    asyncio.run(acquire())
    asyncio.run(acquire())
    before = files()
    for _ in range(10):
        asyncio.run(acquire())
    assert files() == before
    assert all(hub._closed for hub in hubs[:-1])
    assert [hub for hub in hubs if hub in completion._hubs.values()] == hubs[-1:]
    hubs[-1].release()
    assert hubs[-1]._closed


def test_a_finalizer_may_release_a_hub_in_the_middle_of_whatever_is_done_with_hubs() -> None:
    """The garbage collector runs where it likes: in the middle of `acquire`, say, a model is gone whose loop is closed."""
    hubs: list[Hub] = []

    async def acquire(progress: Progress) -> None:
        hubs.append(Hub.acquire(progress))

    async def acquire_two() -> None:
        await acquire(Progress.PREDICT)
        await acquire(Progress.SPIN)

    asyncio.run(acquire_two())
    first, second = hubs
    timer = first._timer

    class Closing:
        def set(self, delay: float) -> None:
            timer.set(delay)

        def close(self) -> None:
            timer.close()
            second.release()

    first._timer = Closing()
    asyncio.run(acquire(Progress.PREDICT))  # which drops those of the loop that is closed
    assert first._closed
    assert second._closed
    first.release()
    hubs[-1].release()
    assert not any(hub in completion._hubs.values() for hub in hubs)


@asyncio_test
async def test_a_child_process_begins_with_no_hubs_and_with_a_lock_that_nobody_holds() -> None:
    hub, hubs, lock = Hub.acquire(), dict(completion._hubs), completion._hubs_lock
    try:
        completion._begin_anew()
        assert not completion._hubs
        assert completion._hubs_lock is not lock
        other = Hub.acquire()
        assert other is not hub
        other.release()
    finally:
        completion._hubs.update(hubs)
        completion._hubs_lock = lock
        hub.release()
    assert hub._closed


def test_a_loop_in_virtual_time_has_hubs_in_virtual_time() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        for progress in Progress:
            hub = Hub.acquire(progress)
            assert hub._clock() == loop.time()
            hub.release()

    device = SimulatedDevice(1)
    run_simulated(main(), device)
