"""The hub: device events become awaitables by being looked at when they are about to be true.

Rule 1: one hub per event loop, used only on that loop's thread, so it needs no lock.
Rule 2: it never blocks. It sleeps on one timer, and when it is awake it makes one query for each line that is due.

Theory of operation. Work on one stream completes in order, so the hub keeps one `Lane` per stream, a first-in-first-out
queue of `Pending`, and polls only heads. Each lane that has one is listed, with the time at which it is due; the timer is
set for the first. There are as many lanes as slots, so a list is searched in less time than a heap is kept in order. When to
poll is decided in `prediction`, which is pure; this file carries it out.

A query has three answers. True: the head is complete, its callback runs, and the next becomes the head. False: not yet,
or "ask later". An exception: that work failed, and its callback is told why; what follows from a `DeviceError` is the
callback's business. Callbacks run inside the poll, one after the other, and may submit more work; what they leave no
time for is looked at when the loop has had its turn.

A device that says by itself when work is complete is not guessed at: its word, given on whichever thread, makes the lane
due, and the look that follows is the same. Until then it is looked at now and then, and when it is overdue.
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
#: A look that is later than this, in seconds, and than this share of its hang timeout, was late since the loop, the process
#: or the machine stood still, and the work may have too. Then no time counts since the look before. If it is less late, time
#: does count: a busy loop must find hangs as well.
STALL: Final = 0.1
STALL_SHARE: Final = 0.1
#: Seconds of one poll after which the loop has its turn. What follows from a completion takes about as long, the next launch
#: among it; without this a loop that serves many slots at once runs late by all of them, twice.
TURN: Final = 50e-6
#: Seconds of one poll after which those who await what it completed are woken by the loop's next iteration.
WAKES: Final = 100e-6
#: Where no more than this many seconds pass from poll to poll, the loop has nothing else to do. Then each poll of a spin
#: makes so many queries more, since an iteration of the loop takes longer than a query.
IDLE: Final = 10e-6
REPEATS: Final = 16
PATROL: Final = 1.0  # seconds between looks at work whose end the device will tell
_DUE: Final = attrgetter("due")


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
            spin = SPIN_BUDGET if processors() > 2 else 0.0
        self.progress = progress
        self.polls = 0  # queries made
        self.wakes = 0  # times the timer fired
        self._loop = loop
        self._clock = clock
        self._spin = spin
        self._timer = timer(loop, self._fire)
        #: What the timer must be read with when it has fired, if it must be.
        self._read: Callable[[], object] | None = getattr(self._timer, "read", None)
        self._lateness = Lateness()
        self.lanes: list[Lane] = []  # those with something pending
        self._armed = inf  # when the timer is set to fire
        self._slept = 0.0
        self._soon: asyncio.Handle | None = None
        self.is_polling = False
        self._left = -inf  # when the last poll ended, but for its last query
        #: The lanes of which the device has told, on whichever thread, and whether the loop is to look there.
        self._told: deque[Lane] = deque()
        self._is_told = False
        self.finished: list[Waiter] = []  # done, and those who await them were not woken yet
        self._waking: asyncio.Handle | None = None  # wakes those that a poll left to the loop
        self._users = 0
        self._closed = False

    # Finding the hub of a loop...

    @classmethod
    def acquire(cls, progress: Progress = PREDICT) -> Hub:
        """The running loop's hub for this way of finding completion, opened on first use; give it back with `release`.

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
            lane: the line of the event's stream.
            query: asks the event; must not block.
            on_done: called on the loop's thread, from inside the poll.
            estimate: what is known about the work's duration; learns from it.
            hang_timeout: seconds as the head of its lane after which the work counts as hung; None for never.
            when_complete: as for `add`.

        Raises:
            UsageError: the hub is closed: its models are, or were forgotten.
        """
        self.add(lane, Pending(query, on_done, Estimate() if estimate is None else estimate, hang_timeout), when_complete)

    def add(self, lane: Lane, pending: Pending, when_complete: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Poll `pending` when it is about to be complete, after what is in `lane` before it.

        Args:
            lane: of the event's stream.
            pending: the event; in no lane now.
            when_complete: calls what it is given when the event is complete, on any thread; None where the event must be
                polled.

        Raises:
            UsageError: the hub is closed: its models are, or were forgotten.
        """
        if self._closed:  # nothing would ever poll, and its timer's descriptor may be another's by now
            raise UsageError(
                "nothing looks at this model's events any more: it was closed or forgotten while it was in use; keep it "
                "until its calls and leases have ended"
            )
        pending.submitted = now = self._clock()
        if when_complete is not None and self.progress is PREDICT:  # the others say how to poll
            pending.notified = inf
        queue = lane.pending
        queue.append(pending)
        if len(queue) == 1:
            lane.begin()
            due = self._first_poll(now, pending)
            if lane.prepare is not None:
                due -= EARLIER_TO_PREPARE
            lane.due = due
            if not lane.is_listed:  # it is while its last one is being completed
                lane.is_listed = True
                self.lanes.append(lane)
            if not self.is_polling and self._soon is None:
                self._arm(now, due)
        if pending.notified:
            assert when_complete is not None
            # Weakly: the device's thread may be the last to drop this, and the request has its caller's inputs.
            when_complete(partial(self._notify, lane, weakref.ref(pending)))

    def add_ended(
        self, lane: Lane, pending: Pending, when_complete: Callable[[Callable[[], None]], None] | None = None
    ) -> None:
        """As `add`, for work that has probably ended: poll at once what the next iteration would. Not inside a task."""
        is_first = self._soon is None  # else the loop is to have its turn before the next poll
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
        """On whichever thread: the device says that it is complete."""
        if not self._noted(reference):
            return
        self._told.append(lane)
        if not self._is_told:  # else the loop has not looked yet, and finds this one too
            self._is_told = True
            try:
                self._loop.call_soon_threadsafe(self._notified)
            except RuntimeError:  # the loop is closed: nobody waits there any more
                pass

    def _noted(self, reference: weakref.ref[Pending]) -> bool:
        # A function of its own, so that this thread does not hold the request when the loop's may drop it.
        pending = reference()
        if pending is not None:
            pending.notified = self._clock()
        return pending is not None

    def _notified(self) -> None:
        self._is_told = False  # first: who is told of from here on calls this again
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
        """The timer has fired."""
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
        """Query the head of each lane that is due, call back for those that are complete, and wake who awaits them."""
        self._soon = None
        if self._closed:
            return
        clock = self._clock
        lanes = self.lanes
        start = now = inf  # an interrupt before the clock is read: then the loop polls again at once
        self.is_polling = True
        try:
            start = now = clock()
            # Collected first and polled after: what is due again at once is polled next time, or the loop would get no turn.
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
                left = len(pending)  # only what is pending now: what callbacks submit is polled next time
                is_first = True
                while left and pending:
                    left -= 1
                    head = pending[0]
                    self.polls += 1
                    error: BaseException | None = None
                    try:
                        is_complete = head.query()
                    except (KeyboardInterrupt, SystemExit):
                        raise  # the loop's business; the event is polled again
                    except BaseException as failure:
                        is_complete, error = self._confirmed(head, failure)
                    if not is_complete and error is None:  # as it was at the latest time that was read before the query
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
                        # One bad callback must not take the others' wake-ups with it.
                        message = "aiotrt: a completion callback raised"
                        self._loop.call_exception_handler({"message": message, "exception": failure})
                    finally:  # after an interrupt too: the next head must not inherit this one's polls
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
                    break  # the others are the first after the loop's turn
        except BaseException:  # an interrupt: without this, a task whose work is complete might wait forever
            if self.finished and self._waking is None:
                self._waking = self._loop.call_soon(self._wake_others)
            raise
        finally:
            # After an interrupt too, for a loop that goes on as a notebook's does: its lane is listed still, and due.
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
        """Set when to poll a head again that is not complete; or return the error, if it hangs."""
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
        """Wake who awaits this waiter, which is done when the caller returns: at the end of the poll, or by the loop."""
        if self.is_polling:
            self.finished.append(waiter)
        else:
            waiter.wake_soon()

    def _wake(self, start: float) -> None:
        """Wake the tasks that await what polls have completed, in that order.

        Directly, which saves an iteration of the loop: the first task, and others until `WAKES` has passed since `start`.
        The others in the next iteration, and all of them inside a task, since there no other task can be resumed.
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
        finally:  # an interrupt too: the others must not wait for ever
            if finished and self._waking is None:
                self._waking = self._loop.call_soon(self._wake_others)

    def _wake_others(self) -> None:
        self._waking = None
        self._wake(self._clock())

    def _hung(self, lane: Lane, head: Pending, now: float, started: float, due: float) -> DeviceHangError | None:
        """What to say of work that is not complete, and was to be polled when it was `due`: nothing, or that it hangs."""
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
        """When to poll work that starts now: it is alone in its lane."""
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
        """When to poll the head of this lane again, which is not complete now."""
        if self.progress is not PREDICT:
            return now if self.progress is SPIN else next_look(now, started, started, 0.0)
        if head.notified > now:  # once it was notified, and is not complete, it was recorded again: it is polled, as others
            return _patrol(now, head, started, lane.stalled)
        estimate = head.estimate
        spin = self._spin
        predicted = started
        # Where nothing is known, a bounded spin from its start on: work that is shorter than the shortest sleep would be
        # found late each time, and nothing would ever be learned about it.
        if estimate.is_trusted:
            predicted += estimate.seconds
            wait = predicted - now
            if wait > SHORTEST_SLEEP and (not spin or wait > LONGEST_SPIN or wait > SPIN_SHARE * estimate.seconds):
                wait -= self._lateness.allowance(wait)
                if wait > SHORTEST_SLEEP:
                    if estimate.first == estimate.seconds:
                        return now + wait
                    # It was as short as this of late, but mostly it is not: no spinning yet.
                    return min(now + wait, next_look(now, started, started, 0.0))
            if not lane.is_polled and now < predicted and not spin:
                # The first poll came early, and there is no spinning until the time comes: sleep until just then.
                return max(predicted, next_look(now, now, now, 0.0))
        lane.spin_until = predicted + spin
        return next_look(now, started, predicted, spin)

    def _arm(self, now: float, due: float, was_long: bool = False) -> None:
        """Poll when this is due: in the loop's next iteration, or when the timer fires."""
        if due <= now:
            # After a long poll, asyncio's timers: a turn begins with what was to be called soon, and ends with them. Who
            # became ready meanwhile is called in between, and waits for this poll and the next, and not for a third.
            self._soon = self._loop.call_later(0.0, self._poll) if was_long else self._loop.call_soon(self._poll)
        elif due < self._armed:
            self._armed = due
            self._slept = due - now
            self._timer.set(due - now)


def _patrol(now: float, head: Pending, started: float, stalled: float) -> float:
    """When to poll work whose end the device will notify: for a notification that was lost, and when it is overdue."""
    patrol = now + PATROL
    if head.hang_timeout is None or started + stalled + head.hang_timeout >= patrol:
        return patrol
    return min(patrol, max(started + stalled + head.hang_timeout, next_look(now, started, started, 0.0)))


async def wait(event: object) -> None:
    """Wait for any device event, whoever recorded it, without blocking the loop.

    Args:
        event: a `torch.cuda.Event`, an event of cuda.core or CuPy, the event that `Lease.launch` returned, or anything
            that carries one as `_trt_produce_event`. It must have been recorded: an unrecorded event is complete.

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


# Weakly: their users hold them, and a hub that was kept here would keep the pending calls of a loop that was closed.
_hubs: Final[weakref.WeakValueDictionary[tuple[asyncio.AbstractEventLoop, Progress], Hub]] = weakref.WeakValueDictionary()
# A finalizer that runs inside it, of a model whose loop is closed, takes it again to release that model's hub.
_hubs_lock = threading.RLock()


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


def check_asyncio(what: str) -> None:
    """Raise unless an asyncio event loop runs on this thread.

    Raises:
        UsageError: none does: there is no loop, or it is another library's, such as trio's.
    """
    if asyncio._get_running_loop() is None:
        raise UsageError(
            f"{what} needs asyncio, and no asyncio event loop runs on this thread: start the program with asyncio.run(...) "
            "or aiotrt.run(...); trio's loop is not supported"
        )


def check_loop(loop: asyncio.AbstractEventLoop, what: str) -> None:
    """Raise unless `loop` is the one running on this thread.

    Raises:
        UsageError: another loop is, or none.
    """
    running = asyncio._get_running_loop()
    if running is not loop:
        where = "outside any event loop" if running is None else "from another event loop"
        raise UsageError(f"{what} was used {where}; use it only in the loop that opened it (load it once per loop)")
