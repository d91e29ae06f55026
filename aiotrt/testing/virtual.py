"""Virtual time: a clock that moves only when something is made to happen, and the choice of what happens next.

Rule 1: nothing here sleeps or reads a real clock.
Rule 2: one thread runs at a time. Worker threads are real ones (they have thread-local state, and no running event loop),
but each is parked unless the scheduler resumed it, and the scheduler waits until it parks again. So every run is a function
of the schedule, and can be repeated.

Theory of operation. Whatever may happen next, such as the completion of the operation at the head of a stream or the
start of a worker's job, is an enabled action with a nominal time. `VirtualTime.step` lets a `Schedule` choose among those
that are due: the nominal order is only likely, never promised, since real devices and threads promise none. A worker may
also lose the processor at every device call it makes (`VirtualTime.checkpoint`), and blocks by parking with a condition.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import math
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

__all__ = ["DeadlockError", "LoopBlockedError", "Schedule", "Scripted", "Seeded", "VirtualTime", "Workers", "explore"]

T = TypeVar("T")


class DeadlockError(AssertionError):
    """Somebody waits for what can no longer happen."""


class LoopBlockedError(AssertionError):
    """A call that blocks was made on the event loop's thread."""


class Schedule(Protocol):
    """Decides everything that a real device and real threads leave open."""

    def choose(self, options: Sequence[str]) -> int:
        """The index of the option that happens; the first is the nominal one."""
        ...

    def duration(self, what: str) -> float:
        """The nominal duration of this, in seconds of virtual time."""
        ...

    def preempts(self, what: str) -> bool:
        """Whether a worker thread loses the processor before this call on the device."""
        ...


class Seeded:
    """Adversarial at random: durations spread evenly over three orders of magnitude, and half of all choices are free.

    Args:
        seed: equal seeds give equal runs.
        shortest: the shortest duration, in seconds.
        longest: the longest duration, in seconds.
    """

    def __init__(self, seed: int, *, shortest: float = 1e-6, longest: float = 1e-3) -> None:
        self._random = random.Random(seed)
        self._range = math.log(shortest), math.log(longest)

    def choose(self, options: Sequence[str]) -> int:
        """The nominal option, or any."""
        if len(options) == 1 or self._random.random() < 0.5:
            return 0
        return self._random.randrange(len(options))

    def duration(self, what: str) -> float:
        """Seconds, of any order of magnitude in the range."""
        return math.exp(self._random.uniform(*self._range))

    def preempts(self, what: str) -> bool:
        """Every fourth time."""
        return self._random.random() < 0.25


class Scripted:
    """Follows a list of choices, then takes the first option always; everything takes ten microseconds.

    Args:
        choices: what to choose where there is a choice.

    Attributes:
        taken: each choice that was made, and of how many options.
    """

    def __init__(self, choices: Sequence[int] = ()) -> None:
        self.taken: list[tuple[int, int]] = []
        self._choices = deque(choices)

    def choose(self, options: Sequence[str]) -> int:
        """The next of the script."""
        if len(options) == 1:
            return 0
        choice = self._choices.popleft() if self._choices else 0
        self.taken.append((choice, len(options)))
        return choice

    def duration(self, what: str) -> float:
        """Always the same."""
        return 10e-6

    def preempts(self, what: str) -> bool:
        """Never: a script is about the order of what happens, and each preemption would double the number of scripts."""
        return False


def explore(scenario: Callable[[Schedule], object], *, limit: int = 10_000) -> int:
    """Run `scenario` once under every schedule there is.

    Args:
        scenario: makes its own device from the schedule, and must do the same whenever the choices are the same.
        limit: how many runs are too many.

    Returns:
        How many runs there were.

    Raises:
        RuntimeError: there are more than `limit`.
    """
    choices: list[int] = []
    for runs in itertools.count(1):
        schedule = Scripted(choices)
        scenario(schedule)
        taken = schedule.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:  # all options of the last choice were tried
            taken.pop()
        if not taken:
            return runs
        if runs >= limit:
            raise RuntimeError(f"more than {limit} schedules: make the scenario smaller")
        choices = [choice for choice, _ in taken]
        choices[-1] += 1
    raise AssertionError


@dataclass(eq=False)
class _Action:
    when: float
    order: int
    what: str
    run: Callable[[], None] = field(repr=False)


class VirtualTime:
    """The clock, and everything that may happen.

    Args:
        schedule: decides; a number is the seed of a `Seeded` one.

    Attributes:
        now: seconds.
    """

    def __init__(self, schedule: Schedule | int = 0) -> None:
        self.schedule: Schedule = Seeded(schedule) if isinstance(schedule, int) else schedule
        self.now = 100.0  # not zero, which too many programs take for "never"
        self._order = itertools.count()
        self._actions: list[_Action] = []
        self._blocked: list[tuple[Callable[[], bool], _Worker, str]] = []
        self._workers: set[_Worker] = set()
        self._thread = threading.local()
        self._is_over = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing can happen by itself."""
        return not self._actions

    @property
    def workers(self) -> int:
        """How many worker threads there are."""
        return len(self._workers)

    @property
    def is_worker(self) -> bool:
        """Whether the calling thread is a worker thread."""
        return getattr(self._thread, "worker", None) is not None

    def enable(self, what: str, run: Callable[[], None], duration: float | None = None) -> None:
        """From now on `run` may be called, nominally after `duration` seconds (None: what the schedule says)."""
        when = self.now + (self.schedule.duration(what) if duration is None else duration)
        self._actions.append(_Action(when, next(self._order), what, run))

    def step(self, limit: float = math.inf) -> bool:
        """Let one thing happen, if one is due by the time `limit`; whether it did."""
        if self._blocked:
            self._unblock()  # the host itself may have made true what somebody waits for
        if not self._actions:
            return False
        due = [a for a in self._actions if a.when <= limit]
        if not due:
            return False
        if len(due) > 1:
            due.sort(key=lambda a: (a.when, a.order))
        action = due[self.schedule.choose([a.what for a in due])]
        self._actions.remove(action)
        self.now = max(self.now, action.when)
        action.run()
        return True

    def advance(self, seconds: float) -> None:
        """Let this much time pass, and all happen that is due in it."""
        limit = self.now + seconds
        while self.step(limit):
            pass
        self.now = max(self.now, limit)

    def run_until_idle(self) -> None:
        """Let everything happen that can."""
        while self.step():
            pass

    def block_until(self, condition: Callable[[], bool], what: str) -> None:
        """Block the calling thread, in virtual time, until `condition` holds.

        Raises:
            DeadlockError: nothing can happen that would make it hold.
            LoopBlockedError: this is the event loop's thread.
        """
        worker: _Worker | None = getattr(self._thread, "worker", None)
        if worker is not None:
            while not condition():
                self._blocked.append((condition, worker, what))
                worker.park()
            return
        if asyncio._get_running_loop() is not None:
            raise LoopBlockedError(f"{what} blocks, and was called on the event loop's thread")
        while not condition():
            if not self.step():
                raise DeadlockError(f"{what} waits for ever: nothing is left that could happen; {self.describe()}")

    def checkpoint(self, what: str) -> None:
        """A worker thread may lose the processor here; any other thread goes on."""
        worker: _Worker | None = getattr(self._thread, "worker", None)
        if worker is None:
            return
        if self._is_over:  # without this, a thread that goes round in a circle would never end
            raise _Abandoned
        if self.schedule.preempts(what):
            self.enable(f"resume {worker.name}", worker.resume)
            worker.park()

    def describe(self) -> str:
        """Who is blocked, and in what."""
        blocked = "; ".join(f"{worker.name} is blocked in {what}" for _, worker, what in self._blocked)
        return blocked or "no worker is blocked"

    def end(self) -> None:
        """Nothing happens any more: worker threads end where they stand, by an exception."""
        self._is_over = True
        self._actions.clear()
        self._blocked.clear()
        while self._workers:
            next(iter(self._workers)).resume()

    def _unblock(self) -> None:
        for entry in [entry for entry in self._blocked if entry[0]()]:
            self._blocked.remove(entry)
            _, worker, what = entry
            self.enable(f"resume {worker.name} after {what}", worker.resume)


class _Abandoned(BaseException):
    """Ends a worker thread whose simulation is over."""


class _Worker:
    """A thread that runs only between `resume` and `park`."""

    def __init__(self, time: VirtualTime, name: str, job: Callable[[], None]) -> None:
        self.name = name
        self._time = time
        self._job = job
        self._go = threading.Semaphore(0)
        self._parked = threading.Semaphore(0)
        time._workers.add(self)
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def resume(self) -> None:
        """On the scheduler's thread: let it run until it parks or ends."""
        self._go.release()
        self._parked.acquire()

    def park(self) -> None:
        """On its own thread: let the scheduler go on, until it resumes this."""
        if not self._time._is_over:
            self._parked.release()
            self._go.acquire()
        if self._time._is_over:
            raise _Abandoned

    def _run(self) -> None:
        self._go.acquire()
        self._time._thread.worker = self
        try:
            if not self._time._is_over:
                self._job()
        finally:
            self._time._workers.discard(self)
            self._parked.release()


class Workers(concurrent.futures.Executor):
    """A thread pool in virtual time: jobs start, and go on after every device call, when the schedule says so.

    Args:
        time: whose schedule.
        count: how many jobs may be under way at once.
        prepare: called in each thread around each job, as ``prepare(job)``.
    """

    def __init__(
        self, time: VirtualTime, count: int, prepare: Callable[[Callable[[], None]], None] = lambda job: job()
    ) -> None:
        self._time = time
        self._count = count
        self._prepare = prepare
        self._numbers = itertools.count()
        self._waiting: deque[Callable[[], None]] = deque()
        self._busy = 0
        self._is_shut = False

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """Call `fn` in a worker thread, when the schedule says so."""
        if self._is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(fn(*args, **kwargs))
            except _Abandoned:
                raise
            except BaseException as error:  # it belongs to whoever holds the future
                future.set_exception(error)

        self._waiting.append(job)
        self._start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs; with `wait`, block in virtual time until those under way have ended."""
        self._is_shut = True
        if cancel_futures:
            self._waiting.clear()
        if wait:
            self._time.block_until(lambda: not self._busy and not self._waiting, "shutting down a thread pool")

    def _start(self) -> None:
        if not self._waiting or self._busy >= self._count:
            return
        self._busy += 1
        job = self._waiting.popleft()

        def run() -> None:
            try:
                self._prepare(job)
            except _Abandoned:
                pass
            finally:
                self._busy -= 1
                self._start()

        worker = _Worker(self._time, f"worker-{next(self._numbers)}", run)
        self._time.enable(f"start {worker.name}", worker.resume)
