"""The hub: device events become awaitables by being looked at when they are about to be true.

Rule 1: one hub per event loop, used only on that loop's thread, so it needs no lock.
Rule 2: it never blocks. It sleeps on one timer, and when it is awake it makes one query for each line that is due.

Theory of operation. Work on one stream completes in order, so the hub keeps one `Lane` per stream, a first-in-first-out
line of `_Pending`, and looks only at heads. Each lane has a time at which it is due; the lanes stand in a heap by that
time, and the timer is set for the first. When to look is decided in `prediction`, which is pure; this file carries it out.

A query has three answers. True: the head is complete, its callback runs, and the next becomes the head. False: not yet,
or "ask later". An exception: that work failed, and its callback is told why; what follows from a `DeviceError` is the
callback's business. Callbacks run inside the poll, one after the other, and may submit more work; what they leave no
time for is looked at when the loop has had its turn.

A device that says by itself when work is complete is not guessed at: its word, given on whichever thread, makes the lane
due, and the look that follows is the same. Until then it is looked at now and then, and when it is overdue.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from math import inf
from typing import Final

from aiotrt.completion.prediction import (
    PREDICT,
    SHORTEST_SLEEP,
    SPIN,
    SPIN_BUDGET,
    Estimate,
    Lateness,
    Progress,
    approach,
    first_look,
    next_look,
)
from aiotrt.completion.timers import Timer, open_timer
from aiotrt.devices import event_query
from aiotrt.errors import DeviceHangError, UsageError

__all__ = ["Hub", "Lane", "check_loop", "wait"]

LOOKS_BEFORE_HANG: Final = 3  # overdue looks needed: one alone proves nothing
#: A look that is later than this, in seconds, and than this share of its hang timeout, was late since the loop, the process
#: or the machine stood still, and the work may have too. Then no time counts since the look before. If it is less late, time
#: does count: a busy loop must find hangs as well.
STALL: Final = 0.1
STALL_SHARE: Final = 0.1
#: Seconds of one poll after which the loop has its turn. What follows from a completion takes about as long, the next launch
#: among it; without this a loop that serves many slots at once runs late by all of them, twice.
TURN: Final = 50e-6
PATROL: Final = 1.0  # seconds between looks at work whose end the device will tell


class _Pending:
    """One event that somebody waits for."""

    __slots__ = (
        "estimate", "hang_timeout", "looked", "looks", "on_done", "overdue", "query", "stalled", "submitted", "told",
    )  # fmt: skip

    def __init__(
        self,
        query: Callable[[], bool],
        on_done: Callable[[BaseException | None], None],
        submitted: float,
        estimate: Estimate,
        hang_timeout: float | None,
        told: float,
    ) -> None:
        self.query = query
        self.on_done = on_done
        self.submitted = submitted
        self.estimate = estimate
        self.hang_timeout = hang_timeout
        self.told = told  # when the device said that it is complete; infinity until it does, 0.0 if it will not say
        self.looks = 0  # how often it was found not complete as the head
        self.overdue = 0  # likewise, past its hang timeout
        self.stalled = 0.0  # seconds of its time that do not count: see `STALL`
        self.looked = 0.0  # when it was last


class Lane:
    """The pending events of one stream, in order.

    Attributes:
        pending: them.
        last_done: when the last one was seen to be complete.
        ran: for how many seconds it had run by then.
        late: how many of them may have passed since it was complete: since the look before, or what is above the estimate.
        entry: its live entry in the heap; any other one there is stale.
    """

    __slots__ = ("entry", "last_done", "late", "pending", "ran")

    def __init__(self) -> None:
        self.pending: deque[_Pending] = deque()
        self.last_done = self.ran = self.late = 0.0
        self.entry: tuple[float, int, Lane] | None = None


class Hub:
    """Looks at device events on behalf of one event loop.

    Args:
        loop: the loop; the hub is used on its thread only.
        progress: how completion is found.
        clock: seconds, monotonic; replaced in tests.
        timer: opens the one timer; replaced in tests.
        spin: for how many seconds past the predicted time to look at every iteration; None for the default, which is
            none where there are two processors or fewer, since there spinning takes the processor from what it waits for.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        progress: Progress = PREDICT,
        clock: Callable[[], float] = time.perf_counter,
        timer: Callable[[asyncio.AbstractEventLoop, Callable[[], None]], Timer] = open_timer,
        spin: float | None = None,
    ) -> None:
        if spin is None:
            spin = SPIN_BUDGET if _processors() > 2 else 0.0
        self.progress = progress
        self.polls = 0  # queries made
        self.wakes = 0  # times the timer fired
        self._loop = loop
        self._clock = clock
        self._spin = spin
        self._timer = timer(loop, self._fire)
        self._lateness = Lateness()
        self._heap: list[tuple[float, int, Lane]] = []
        self._order = itertools.count()  # breaks ties in the heap, first come first served
        self._armed: float | None = None  # when the timer is set to fire
        self._slept = 0.0
        self._soon: asyncio.Handle | None = None
        self._polling = False
        self._users = 0
        self._closed = False

    # Finding the hub of a loop...

    @classmethod
    def acquire(cls, progress: Progress = PREDICT) -> Hub:
        """The running loop's hub for this way of finding completion, opened on first use; give it back with `release`."""
        loop = asyncio.get_running_loop()
        _drop_hubs_of_closed_loops()
        with _hubs_lock:
            hub = _hubs.get((loop, progress))
            if hub is None:
                hub = _hubs[loop, progress] = cls(loop, progress=progress)
            hub._users += 1
            return hub

    @classmethod
    def install(cls, hub: Hub) -> None:
        """Make `hub` its loop's, for its way of finding completion: a test's loop has a clock and timers of its own."""
        with _hubs_lock:
            hub._users += 1
            _hubs[hub._loop, hub.progress] = hub

    def release(self) -> None:
        """One user less; the last one closes it. From any thread once the loop is closed, else on the loop's."""
        with _hubs_lock:
            self._users -= 1
            if self._users > 0:
                return
            _hubs.pop((self._loop, self.progress), None)
        self.close()

    def close(self) -> None:
        """Stop looking. Whatever is still pending is dropped: its owners fail it."""
        self._closed = True
        self._timer.close()
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        self._heap.clear()

    # Watching...

    def watch(
        self,
        lane: Lane,
        query: Callable[[], bool],
        on_done: Callable[[BaseException | None], None],
        *,
        estimate: Estimate | None = None,
        hang_timeout: float | None = None,
        when_complete: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        """Call `on_done` once when `query` answers true, or with the error that it raises.

        Args:
            lane: the line of the event's stream.
            query: asks the event; must not block.
            on_done: called on the loop's thread, from inside the poll.
            estimate: what is known about the work's duration; learns from it.
            hang_timeout: seconds as the head of its lane after which the work counts as hung; None for never.
            when_complete: calls what it is given when the event is complete, on any thread; None where it must be asked.

        Raises:
            UsageError: the hub is closed: its models are, or were forgotten.
        """
        if self._closed:  # nothing would ever look, and its timer's descriptor may be another's by now
            raise UsageError(
                "nothing looks at this model's events any more: it was closed or forgotten while it was in use; keep it "
                "until its calls and leases have ended"
            )
        if self.progress is not PREDICT:
            when_complete = None  # the others say how to look
        now = self._clock()
        pending = _Pending(
            query, on_done, now, Estimate() if estimate is None else estimate, hang_timeout, inf if when_complete else 0.0
        )
        lane.pending.append(pending)
        if len(lane.pending) == 1:
            self._enlist(lane, self._first_look(now, pending))
            if not self._polling:
                self._arm(now)
        if when_complete:
            when_complete(partial(self._tell, lane, pending))

    def forget(self, lane: Lane) -> None:
        """Drop everything pending on `lane`; its callbacks never run."""
        lane.pending.clear()
        lane.entry = None

    def _tell(self, lane: Lane, pending: _Pending) -> None:
        """On whichever thread: the device says that it is complete."""
        pending.told = self._clock()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits there any more
            self._loop.call_soon_threadsafe(self._told, lane)

    def _told(self, lane: Lane) -> None:
        if lane.pending and not self._closed:
            self._enlist(lane, self._clock())
            self._poll()

    # Looking...

    def _fire(self) -> None:
        now = self._clock()
        self.wakes += 1
        if self._armed is not None:
            self._lateness.learn(self._slept, now - self._armed)
            self._armed = None
        self._poll()

    def _spin_once(self) -> None:
        self._soon = None
        self._poll()

    def _poll(self) -> None:
        if self._closed:
            return
        now = self._clock()
        heap = self._heap
        due = []
        try:
            self._polling = True
            while heap and heap[0][0] <= now:
                entry = heap[0]
                if entry[2].entry is entry:
                    due.append(entry)
                heappop(heap)  # only now: an interrupt must find it in one of the two
            # Collected first and looked at after: a lane that is due again at once goes back into the heap, and must not
            # be found again in this same poll, or the loop would never get its turn.
            for number, entry in enumerate(due):
                if number and self._clock() - now > TURN:
                    for other in due[number:]:
                        heappush(heap, other)  # the first to be looked at after the loop's turn
                    break
                self._look(entry[2], entry[0])
        except BaseException:
            # An interrupt, after which the loop may go on, as a notebook's does: who was not looked at would never be.
            for _, _, lane in due:
                if lane.pending:
                    self._enlist(lane, now)
            raise
        finally:
            self._polling = False
            if heap:
                later = self._clock()
                self._arm(later, was_long=later - now > TURN)

    def _look(self, lane: Lane, due: float) -> None:
        lane.entry = None
        pending = lane.pending
        turns = len(pending)  # those that callbacks submit have theirs when the loop has had one, or it might never
        is_first = True
        while pending and turns:
            turns -= 1
            head = pending[0]
            started = head.submitted
            if started < lane.last_done:
                started = lane.last_done
            self.polls += 1
            error: BaseException | None = None
            try:
                is_complete = head.query()
            except (KeyboardInterrupt, SystemExit):
                raise  # the loop's business; it is asked again
            except BaseException as failure:
                is_complete, error = True, failure
            now = self._clock()
            if not is_complete:
                error = self._hung(head, now, started, due)
                if error is None:
                    head.looks += 1
                    head.looked = now
                    self._enlist(lane, self._next_look(now, head, started))
                    return
            pending.popleft()
            if error is None:
                ran = lane.ran = now - started
                estimate = head.estimate
                if head.told:  # before this look, unless the word is still on its way
                    lane.late = max(0.0, now - max(head.told, started))
                    estimate.between(ran - lane.late, ran - lane.late)
                elif head.looks:
                    lane.late = now - max(head.looked, started)
                    estimate.between(head.looked - started, ran)
                else:
                    lane.late = ran - estimate.seconds if 0.0 < estimate.seconds < ran else 0.0
                    if is_first:  # else its predecessor ended at some time before this look, and nobody knows when it began
                        estimate.at_most(ran)
            is_first = False
            lane.last_done = due = now
            try:
                head.on_done(error)
            except Exception as failure:
                # One bad callback must not take the others' wake-ups with it.
                self._loop.call_exception_handler({"message": "aiotrt: a completion callback raised", "exception": failure})
        if pending and lane.entry is None:  # if it is empty, whoever watches next enlists it
            self._enlist(lane, self._first_look(lane.last_done, pending[0]))

    def _hung(self, head: _Pending, now: float, started: float, due: float) -> DeviceHangError | None:
        """What to say of work that is not complete, and was to be looked at when it was `due`: nothing, or that it hangs."""
        if head.hang_timeout is None:
            return None
        late = now - due
        if late > STALL and late > STALL_SHARE * head.hang_timeout:
            head.stalled += now - max(started, head.looked)
        ran = now - started - head.stalled
        if ran <= head.hang_timeout:
            return None
        head.overdue += 1
        if head.overdue < LOOKS_BEFORE_HANG:
            return None
        return DeviceHangError(
            f"work is overdue: it has run for {ran:.1f} s and was expected to take {head.estimate.seconds:.3g} s "
            f"(hang_timeout={head.hang_timeout:g} s)"
        )

    # When to look...

    def _first_look(self, now: float, head: _Pending) -> float:
        """At work that starts now: it is alone in its lane."""
        estimate = head.estimate
        if head.told > now:
            return _patrol(now, head, now)
        if self.progress is PREDICT and estimate.is_trusted:
            return self._approach(now, first_look(now, now + estimate.shortest, self._lateness), now)
        if self.progress is SPIN:
            return now
        return next_look(now, now, now, self._spin if self.progress is PREDICT else 0.0)

    def _next_look(self, now: float, head: _Pending, started: float) -> float:
        if self.progress is SPIN:
            return now
        if self.progress is Progress.INTERVAL:
            return next_look(now, started, started, 0.0)
        if head.told > now:  # once it was told of, and is not complete, it was recorded again: it is asked, as others are
            return _patrol(now, head, started)
        if not head.estimate.is_trusted:
            # A bounded spin from its start on: work that is shorter than the shortest sleep would be found late each time,
            # and nothing would ever be learned about it.
            return next_look(now, started, started, self._spin)
        aim = first_look(now, started + head.estimate.shortest, self._lateness)
        if aim > now + SHORTEST_SLEEP:
            return self._approach(now, aim, started)
        predicted = started + head.estimate.seconds
        aim = first_look(now, predicted, self._lateness)
        if aim > now + SHORTEST_SLEEP:
            # It was as short as this of late, but mostly it is not: no spinning yet.
            return min(aim, next_look(now, started, started, 0.0))
        if head.looks == 1 and now < predicted and not self._spin:
            # The first look came early, and there is no spinning until the time comes: sleep until just then.
            return max(predicted, next_look(now, now, now, 0.0))
        return next_look(now, started, predicted, self._spin)

    def _approach(self, now: float, due: float, started: float) -> float:
        return approach(now, due, started) if self._spin else due

    def _enlist(self, lane: Lane, due: float) -> None:
        lane.entry = entry = (due, next(self._order), lane)
        heappush(self._heap, entry)

    def _arm(self, now: float, *, was_long: bool = False) -> None:
        heap = self._heap
        while heap and heap[0][2].entry is not heap[0]:  # forgotten lanes leave stale entries behind
            heappop(heap)
        if not heap or self._soon is not None:
            return
        due = heap[0][0]
        if due <= now:
            # After a long poll, asyncio's timers: a turn begins with what was to be called soon, and ends with them. Who
            # became ready meanwhile is called in between, and waits for this poll and the next, and not for a third.
            self._soon = self._loop.call_later(0.0, self._spin_once) if was_long else self._loop.call_soon(self._spin_once)
        elif self._armed is None or due < self._armed:
            self._armed = due
            self._slept = due - now
            self._timer.set(due - now)


def _patrol(now: float, head: _Pending, started: float) -> float:
    """When to look at work whose end the device will tell: for a word that was lost, and when it is overdue."""
    if head.hang_timeout is None:
        return now + PATROL
    return min(now + PATROL, max(started + head.stalled + head.hang_timeout, next_look(now, started, started, 0.0)))


async def wait(event: object) -> None:
    """Wait for any device event, whoever recorded it, without blocking the loop.

    Args:
        event: a `torch.cuda.Event`, an event of cuda.core or CuPy, the event that `Lease.launch` returned, or anything
            that carries one as `_trt_produce_event`. It must have been recorded: an unrecorded event is complete.

    Returns when the event has completed. Cancellation stops the waiting at once and leaves the event alone. Record it
    again only after the wait has ended, or the wait is for the new record.

    Raises:
        UsageError: `event` is none of these.
        DeviceError: the device broke.
    """
    query = event_query(event)
    if query():
        return
    hub = Hub.acquire()
    lane = Lane()
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    try:
        hub.watch(lane, query, done)
        await future
    finally:
        hub.forget(lane)
        hub.release()


_hubs: Final[dict[tuple[asyncio.AbstractEventLoop, Progress], Hub]] = {}
# A finalizer that runs inside it, of a model whose loop is closed, takes it again to release that model's hub.
_hubs_lock = threading.RLock()


def _processors() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _drop_hubs_of_closed_loops() -> None:
    """Forget hubs whose loop was closed under them: their owners can no longer be told anything."""
    with _hubs_lock:
        for key in list(_hubs):
            if key[0].is_closed() and (hub := _hubs.pop(key, None)) is not None:  # a finalizer may have come before
                hub.close()


def _begin_anew() -> None:
    """In a child process: the hubs are the parent's loops', and whoever held the lock is not here to give it back."""
    global _hubs_lock  # noqa: PLW0603  # a process has one
    _hubs.clear()
    _hubs_lock = threading.RLock()


os.register_at_fork(after_in_child=_begin_anew)


def check_loop(loop: asyncio.AbstractEventLoop, what: str) -> None:
    """Raise unless `loop` is the one running on this thread.

    Raises:
        UsageError: another loop is, or none.
    """
    running = asyncio._get_running_loop()
    if running is not loop:
        where = "outside any event loop" if running is None else "from another event loop"
        raise UsageError(f"{what} was used {where}; use it only in the loop that opened it (load it once per loop)")
