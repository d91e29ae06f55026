"""The hub: makes device events awaitable by polling each one when it is about to be complete.

Rule 1: one hub per event loop, used only on that loop's thread, so it needs no lock.
Rule 2: it never blocks. It sleeps on one timer, and when it is awake it makes one query for each lane that is due.

Theory of operation. Work on one stream completes in order, so the hub keeps one `Lane` per stream, a first-in-first-out
queue of `Pending`, and polls only heads. Each lane with a head is listed, with the time at which it is due; the timer is
set for the earliest. There are as many lanes as slots, so a list is searched in less time than a heap is kept in order. When
to poll is decided in `prediction`, which is pure; this file carries it out.

A query has three answers. True: the head is complete, its callback runs, and the next becomes the head. False: not yet,
or "query again later". An exception: that work failed, and its callback gets the error; a `DeviceError` is the callback's to
handle. Callbacks run inside the poll, one after the other, and may submit more work. Lanes for which a poll has no time left
are polled after an iteration of the loop.

For a device that notifies when work is complete, nothing is predicted: the notification comes on any thread and makes the
lane due, and the poll that follows is the same. Until then the work is polled now and then, and when it is overdue.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from math import inf
from operator import attrgetter
from typing import Final

from aiotrt._workers import processors
from aiotrt.completion.lane import Lane, Pending
from aiotrt.completion.prediction import (
    EARLIER_TO_PREPARE,
    LONGEST_SPIN,
    PREDICT,
    SHORTEST_SLEEP,
    SPIN,
    SPIN_BUDGET,
    SPIN_SHARE,
    Estimate,
    Lateness,
    Progress,
    next_look,
)
from aiotrt.completion.timers import Timer, open_timer
from aiotrt.completion.waiter import Waiter
from aiotrt.devices import event_query
from aiotrt.errors import DeviceHangError, ResourceError, UsageError

__all__ = ["Hub", "check_asyncio", "check_loop", "wait"]

POLLS_BEFORE_HANG: Final = 3  # overdue polls needed: one alone proves nothing
#: A poll that is later than this, in seconds, and than this share of its hang timeout, was late because the loop, the
#: process or the machine stood still, and the work may have stood still too. Then the time since the previous poll does not
#: count towards the hang timeout. After a smaller delay it does count, because a busy loop must find hangs as well.
STALL: Final = 0.1
STALL_SHARE: Final = 0.1
#: Seconds after which a poll ends and leaves the rest to the next one, so that the loop can run an iteration. What follows
#: from one completion, such as the next launch, takes about as long. Without this limit a loop that serves many slots at
#: once runs late by the time of all of them, twice.
TURN: Final = 50e-6
#: Seconds of one poll after which the tasks that await completed work are woken by the loop's next iteration.
WAKES: Final = 100e-6
#: If no more than this many seconds pass from poll to poll, the loop has nothing else to do. Then each poll of a spin makes
#: up to `REPEATS` more queries, since an iteration of the loop takes longer than a query.
IDLE: Final = 10e-6
REPEATS: Final = 16
PATROL: Final = 1.0  # seconds between polls of work whose completion the device notifies
_DUE: Final = attrgetter("due")


class Hub:
    """Polls device events on behalf of one event loop.

    Args:
        loop: the loop; the hub is used on its thread only.
        progress: how completion is found.
        clock: seconds, monotonic; replaced in tests.
        timer: opens the one timer; replaced in tests.
        spin: for how many seconds past the predicted time to poll in every iteration; None for the default, which is 0 with
            two processors or fewer, since there spinning takes the processor from the work that it waits for.
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
            spin = SPIN_BUDGET if processors() > 2 else 0.0
        self.progress = progress
        self.polls = 0  # queries made
        self.wakes = 0  # times the timer fired
        self._loop = loop
        self._clock = clock
        self._spin = spin
        self._timer = timer(loop, self._fire)
        #: Reads the timer after it has fired; None if it need not be read.
        self._read: Callable[[], object] | None = getattr(self._timer, "read", None)
        self._lateness = Lateness()
        self.lanes: list[Lane] = []  # those with pending events
        self._armed = inf  # when the timer is set to fire
        self._slept = 0.0
        self._soon: asyncio.Handle | None = None
        self.is_polling = False
        self._left = -inf  # when the last poll ended, not counting its last query
        #: The lanes for which the device has notified, on any thread; and whether the loop is scheduled to poll them.
        self._told: deque[Lane] = deque()
        self._is_told = False
        self.finished: list[Waiter] = []  # done, but the tasks that await them were not woken yet
        self._waking: asyncio.Handle | None = None  # wakes the tasks that a poll left to the loop
        self._users = 0
        self._closed = False

    # Finding the hub of a loop...

    @classmethod
    def acquire(cls, progress: Progress = PREDICT) -> Hub:
        """Return the running loop's hub for this `progress`, opened on first use; each call must be paired with `release`.

        Raises:
            ResourceError: there is no file descriptor for its timer.
        """
        loop = asyncio.get_running_loop()
        _drop_hubs_of_closed_loops()
        with _hubs_lock:
            hub = _hubs.get((loop, progress))
            if hub is None:
                try:
                    hub = _hubs[loop, progress] = cls(loop, progress=progress)
                except OSError as error:
                    raise ResourceError(
                        f"the event loop's timer could not be opened: {error}; close files, or raise the limit (ulimit -n)"
                    ) from error
            hub._users += 1
            return hub

    @classmethod
    def install(cls, hub: Hub) -> None:
        """Make `acquire` return `hub` for its loop and its `progress`: tests have their own clock and timers."""
        with _hubs_lock:
            hub._users += 1
            _hubs[hub._loop, hub.progress] = hub

    def release(self) -> None:
        """Remove one user; the last one closes the hub. On the loop's thread, or on any thread once the loop is closed."""
        with _hubs_lock:
            self._users -= 1
            if self._users > 0:
                return
            _hubs.pop((self._loop, self.progress), None)
        self.close()

    def close(self) -> None:
        """Stop polling. Events that are still pending are dropped; their owners fail them."""
        self._closed = True
        self._timer.close()
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        for lane in self.lanes:
            lane.is_listed = False
        self.lanes.clear()

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
            lane: the lane of the event's stream.
            query: whether the event is complete; must not block.
            on_done: called on the loop's thread, from inside the poll.
            estimate: what is known about the work's duration; it learns from this work.
            hang_timeout: seconds as the head of its lane after which the work counts as hung; None for never.
            when_complete: as for `add`.

        Raises:
            UsageError: the hub is closed, because its models were closed or forgotten.
        """
        self.add(lane, Pending(query, on_done, Estimate() if estimate is None else estimate, hang_timeout), when_complete)

    def add(self, lane: Lane, pending: Pending, when_complete: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Append `pending` to `lane`, and poll it when it is the head and about to be complete.

        Args:
            lane: the lane of the event's stream.
            pending: the event; in no lane now.
            when_complete: takes a callback, and calls it on any thread when the event is complete; None if the event must be
                polled.

        Raises:
            UsageError: the hub is closed, because its models were closed or forgotten.
        """
        if self._closed:  # nothing would ever poll, and the timer's descriptor may be another file's by now
            raise UsageError(
                "nothing looks at this model's events any more: it was closed or forgotten while it was in use; keep it "
                "until its calls and leases have ended"
            )
        pending.submitted = now = self._clock()
        if when_complete is not None and self.progress is PREDICT:  # the other values of `progress` say when to poll
            pending.notified = inf
        queue = lane.pending
        queue.append(pending)
        if len(queue) == 1:
            lane.begin()
            due = self._first_poll(now, pending)
            if lane.prepare is not None:
                due -= EARLIER_TO_PREPARE
            lane.due = due
            if not lane.is_listed:  # it is listed while its last event is being completed
                lane.is_listed = True
                self.lanes.append(lane)
            if not self.is_polling and self._soon is None:
                self._arm(now, due)
        if pending.notified:
            assert when_complete is not None
            # A weak reference: the device's thread may be the last to drop this callback, and must not free the request and
            # its caller's inputs.
            when_complete(partial(self._notify, lane, weakref.ref(pending)))

    def add_ended(
        self, lane: Lane, pending: Pending, when_complete: Callable[[Callable[[], None]], None] | None = None
    ) -> None:
        """Like `add`, for work that has probably ended: poll now and not in the next iteration. Not inside a task."""
        is_first = self._soon is None  # else a poll is scheduled, and the loop must run an iteration before it
        self.add(lane, pending, when_complete)
        if is_first and self._soon is not None:
            self._soon.cancel()
            self._poll()

    def forget(self, lane: Lane) -> None:
        """Drop everything pending on `lane`; its callbacks never run."""
        lane.forget()
        if lane.is_listed:
            lane.is_listed = False
            self.lanes.remove(lane)

    def _notify(self, lane: Lane, reference: weakref.ref[Pending]) -> None:
        """Take the device's notification that an event is complete. Any thread may call this."""
        if not self._noted(reference):
            return
        self._told.append(lane)
        if not self._is_told:  # else `_notified` is scheduled already, and finds this lane too
            self._is_told = True
            try:
                self._loop.call_soon_threadsafe(self._notified)
            except RuntimeError:  # the loop is closed: no caller waits there any more
                pass

    def _noted(self, reference: weakref.ref[Pending]) -> bool:
        # A separate function, so that this thread holds no reference to the request when the loop's thread may drop it.
        pending = reference()
        if pending is not None:
            pending.notified = self._clock()
        return pending is not None

    def _notified(self) -> None:
        self._is_told = False  # first: a notification from here on schedules this again
        try:
            now = self._clock()
            told = self._told
            while told:
                told.popleft().due = now
            if self._soon is None:
                self._poll()
        except BaseException:  # an interrupt: no other notification of this work will come
            self._loop.call_soon(self._notified)
            raise

    # Polling...

    def _fire(self) -> None:
        """Poll, since the timer has fired."""
        try:
            if self._read is not None:
                try:
                    self._read()
                except BlockingIOError:  # set again between becoming readable and being read
                    return
            self.wakes += 1
            if self._armed < inf:
                self._lateness.learn(self._slept, self._clock() - self._armed)
                self._armed = inf
            if self._soon is None:  # else the loop is about to poll
                self._poll()
        except BaseException:  # an interrupt: the timer does not fire again by itself
            self._armed = inf
            if self._soon is None:
                self._soon = self._loop.call_soon(self._poll)
            raise

    def _poll(self) -> None:
        """Query the head of each lane that is due, call `on_done` of completed heads, and wake the tasks that await them."""
        self._soon = None
        if self._closed:
            return
        clock = self._clock
        lanes = self.lanes
        start = now = inf  # an interrupt before the clock is read: then the loop polls again at once
        self.is_polling = True
        try:
            start = now = clock()
            # All due lanes are collected before any is polled: a lane that is due again at once is polled next time, or the
            # loop would never run an iteration.
            due = []
            for lane in lanes:
                if lane.due <= now:
                    due.append(lane)  # noqa: PERF401  # a comprehension has a scope of its own, which no types reach
            repeats = 0
            if len(due) > 1:
                due.sort(key=_DUE)
            elif start - self._left < IDLE:
                repeats = REPEATS
            for lane in due:
                planned = lane.due
                pending = lane.pending
                left = len(pending)  # only events pending now: work submitted by callbacks is polled next time
                is_first = True
                while left and pending:
                    left -= 1
                    head = pending[0]
                    self.polls += 1
                    error: BaseException | None = None
                    try:
                        is_complete = head.query()
                    except (KeyboardInterrupt, SystemExit):
                        raise  # for the loop to handle; the event is polled again
                    except BaseException as failure:
                        is_complete, error = self._confirmed(head, failure)
                    if not is_complete and error is None:  # so it was incomplete at `now`, which was read before the query
                        if now >= lane.spin_until:
                            error = self._incomplete(lane, head, now, planned)
                        elif repeats:  # it stays due
                            repeats -= 1
                            left += 1
                            lane.polled = now
                            now = clock()
                            continue
                        if error is None:
                            lane.is_polled = True
                            lane.polled = now
                            prepare = lane.prepare
                            if prepare is not None:
                                lane.prepare = None
                                prepare()
                                now = clock()
                            break
                    now = clock()
                    pending.popleft()
                    started = head.submitted
                    lane.started = started if started > lane.last_done else lane.last_done  # noqa: FURB136  # a call
                    if error is None:
                        lane.estimate = head.estimate
                        lane.notified = head.notified
                        lane.is_first = is_first
                    is_first = False
                    lane.prepare = None
                    lane.last_done = planned = now
                    lane.due = -inf  # `add` sets it, if the callback submits the next head
                    try:
                        head.on_done(error)
                    except Exception as failure:
                        # One failing callback must not cost the others their wake-ups.
                        message = "aiotrt: a completion callback raised"
                        self._loop.call_exception_handler({"message": message, "exception": failure})
                    finally:  # after an interrupt too: the next head must not inherit what was recorded for this one
                        if pending and lane.due == -inf:
                            lane.begin()
                else:
                    if pending:
                        if lane.due == -inf:
                            lane.due = self._first_poll(lane.last_done, pending[0])
                    elif lane.is_listed:  # unless a callback forgot it
                        lane.is_listed = False
                        lanes.remove(lane)
                    if lanes:
                        now = clock()
                if now - start > TURN:
                    break  # the other lanes are the first of the next poll, which follows an iteration of the loop
        except BaseException:  # an interrupt: without this, a task whose work is complete might wait forever
            if self.finished and self._waking is None:
                self._waking = self._loop.call_soon(self._wake_others)
            raise
        finally:
            # After an interrupt too, since the loop may go on, as a notebook's does: the lane is still listed, and due.
            self.is_polling = False
            self._left = now
            if lanes:
                earliest = lanes[0].due
                if len(lanes) > 1:
                    for lane in lanes:
                        if lane.due < earliest:
                            earliest = lane.due
                self._arm(now, earliest, now - start > TURN)
        if self.finished and self._waking is None:
            self._wake(start)
        for lane in due:
            if lane.estimate is not None:
                lane.learn()

    def _confirmed(self, head: Pending, failure: BaseException) -> tuple[bool, BaseException | None]:
        """Return whether the event is complete, and its error, after its query raised."""
        if head.confirm is None:
            return False, failure
        try:
            return head.confirm(), None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            return False, error

    def _incomplete(self, lane: Lane, head: Pending, now: float, planned: float) -> DeviceHangError | None:
        """Set when to poll an incomplete head again; or return the error, if it hangs."""
        started = head.submitted
        if started < lane.last_done:
            started = lane.last_done
        timeout = head.hang_timeout
        if timeout is not None and (now - started > timeout or now - planned > STALL):
            error = self._hung(lane, head, now, started, planned)
            if error is not None:
                return error
        lane.due = self._next_poll(now, lane, head, started)
        return None

    def now(self) -> float:
        """The time on the hub's clock, which `Pending.submitted` and `Lane.last_done` are on, in seconds."""
        return self._clock()

    def finish(self, waiter: Waiter) -> None:
        """Wake the tasks that await this waiter, at the end of the current poll or by the loop.

        The waiter need not be done yet, but must be when the caller of this method returns.
        """
        if self.is_polling:
            self.finished.append(waiter)
        else:
            waiter.wake_soon()

    def _wake(self, start: float) -> None:
        """Wake the tasks that await what polls have completed, in the order of completion.

        The first task, and others until `WAKES` has passed since `start`, are resumed directly, which saves an iteration of
        the loop. The rest is resumed in the next iteration. So are all of them if this runs inside a task, where no other
        task can be resumed.
        """
        finished = self.finished
        try:
            if asyncio.current_task(self._loop) is None:
                while finished:
                    waiter = finished[0]
                    waiter.wake()
                    # Removed after the call, since an interrupt may come before it. A nested run of the loop, inside the
                    # callback, may have removed it already.
                    if finished and finished[0] is waiter:
                        del finished[0]
                    if finished and self._clock() - start > WAKES:
                        break
        finally:  # after an interrupt too: the other tasks must not wait forever
            if finished and self._waking is None:
                self._waking = self._loop.call_soon(self._wake_others)

    def _wake_others(self) -> None:
        self._waking = None
        self._wake(self._clock())

    def _hung(self, lane: Lane, head: Pending, now: float, started: float, due: float) -> DeviceHangError | None:
        """Return the error for incomplete work that hangs, else None. This poll of it was planned for `due`."""
        assert head.hang_timeout is not None
        late = now - due
        if late > STALL and late > STALL_SHARE * head.hang_timeout:
            lane.stalled += now - max(started, lane.polled)
        ran = now - started - lane.stalled
        if ran <= head.hang_timeout:
            return None
        lane.overdue += 1
        if lane.overdue < POLLS_BEFORE_HANG:
            return None
        return DeviceHangError(
            f"work is overdue: it has run for {ran:.1f} s and was expected to take {head.estimate.seconds:.3g} s "
            f"(hang_timeout={head.hang_timeout:g} s)"
        )

    # When to poll...

    def _first_poll(self, now: float, head: Pending) -> float:
        """Return when to poll a new head for the first time. Its work starts at `now`."""
        estimate = head.estimate
        if head.notified > now:
            return _patrol(now, head, now, 0.0)
        if self.progress is not PREDICT:
            return now if self.progress is SPIN else next_look(now, now, now, 0.0)
        if not estimate.is_trusted:
            return next_look(now, now, now, self._spin)
        wait = estimate.first
        wait -= self._lateness.allowance(wait)
        return now + wait if wait > 0.0 else now

    def _next_poll(self, now: float, lane: Lane, head: Pending, started: float) -> float:
        """Return when to poll the head of this lane again, which is incomplete now."""
        if self.progress is not PREDICT:
            return now if self.progress is SPIN else next_look(now, started, started, 0.0)
        # An event that is incomplete although it was notified has been recorded again: it is polled like any other.
        if head.notified > now:
            return _patrol(now, head, started, lane.stalled)
        estimate = head.estimate
        spin = self._spin
        predicted = started
        # Without a trusted estimate, spin for a bounded time from the start: otherwise work that is shorter than the
        # shortest sleep would be found late each time, and its duration would never be learned.
        if estimate.is_trusted:
            predicted += estimate.seconds
            wait = predicted - now
            if wait > SHORTEST_SLEEP and (not spin or wait > LONGEST_SPIN or wait > SPIN_SHARE * estimate.seconds):
                wait -= self._lateness.allowance(wait)
                if wait > SHORTEST_SLEEP:
                    if estimate.first == estimate.seconds:
                        return now + wait
                    # Some recent work was as short as this, but most was not: no spinning yet.
                    return min(now + wait, next_look(now, started, started, 0.0))
            if not lane.is_polled and now < predicted and not spin:
                # The first poll came early, and spinning is disabled: sleep until the predicted time.
                return max(predicted, next_look(now, now, now, 0.0))
        lane.spin_until = predicted + spin
        return next_look(now, started, predicted, spin)

    def _arm(self, now: float, due: float, was_long: bool = False) -> None:
        """Schedule a poll for the time `due`: in the loop's next iteration, or when the timer fires."""
        if due <= now:
            # After a long poll, a timer of asyncio's that is due at once: an iteration first runs what `call_soon`
            # scheduled, and timers last. I/O callbacks run in between, so they wait for this poll and the next, but not for
            # a third.
            self._soon = self._loop.call_later(0.0, self._poll) if was_long else self._loop.call_soon(self._poll)
        elif due < self._armed:
            self._armed = due
            self._slept = due - now
            self._timer.set(due - now)


def _patrol(now: float, head: Pending, started: float, stalled: float) -> float:
    """Return when to poll work whose completion the device notifies: should that be lost, and when it is overdue."""
    patrol = now + PATROL
    if head.hang_timeout is None or started + stalled + head.hang_timeout >= patrol:
        return patrol
    return min(patrol, max(started + stalled + head.hang_timeout, next_look(now, started, started, 0.0)))


async def wait(event: object) -> None:
    """Wait for any device event, whichever library recorded it, without blocking the loop.

    Args:
        event: a `torch.cuda.Event`, an event of cuda.core or CuPy, the event that `Lease.launch` returned, or any object
            with such an event as `_trt_produce_event`. It must have been recorded: an unrecorded event is complete.

    Returns when the event has completed. Cancellation stops the waiting at once and leaves the event alone. Record it
    again only after the wait has ended, or the wait is for the new record.

    Raises:
        UsageError: `event` is none of these, or no asyncio event loop runs here.
        DeviceError: the device broke.
    """
    check_asyncio("aiotrt.wait")
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


# Weak references: hubs are kept by their users. A hub kept here would keep the pending calls of a closed loop.
_hubs: Final[weakref.WeakValueDictionary[tuple[asyncio.AbstractEventLoop, Progress], Hub]] = weakref.WeakValueDictionary()
# Re-entrant: while a thread holds it, the finalizer of a model whose loop is closed may run there and release its hub.
_hubs_lock = threading.RLock()


def _drop_hubs_of_closed_loops() -> None:
    """Close hubs whose loop was closed while they were in use: no callback can reach their owners any more."""
    with _hubs_lock:
        for key in list(_hubs):
            if key[0].is_closed() and (hub := _hubs.pop(key, None)) is not None:  # a finalizer may have removed it
                hub.close()


def _begin_anew() -> None:
    """Reset in a child process: the hubs belong to the parent's loops, and a thread that held the lock does not exist."""
    global _hubs_lock  # noqa: PLW0603  # a process has one
    _hubs.clear()
    _hubs_lock = threading.RLock()


os.register_at_fork(after_in_child=_begin_anew)


def check_asyncio(what: str) -> None:
    """Raise unless an asyncio event loop runs on this thread.

    Raises:
        UsageError: no asyncio loop runs here; perhaps another library's does, such as trio's.
    """
    if asyncio._get_running_loop() is None:
        raise UsageError(
            f"{what} needs asyncio, and no asyncio event loop runs on this thread: start the program with asyncio.run(...) "
            "or aiotrt.run(...); trio's loop is not supported"
        )


def check_loop(loop: asyncio.AbstractEventLoop, what: str) -> None:
    """Raise unless `loop` is the one running on this thread.

    Raises:
        UsageError: another loop runs there, or none.
    """
    running = asyncio._get_running_loop()
    if running is not loop:
        where = "outside any event loop" if running is None else "from another event loop"
        raise UsageError(f"{what} was used {where}; use it only in the loop that opened it (load it once per loop)")
