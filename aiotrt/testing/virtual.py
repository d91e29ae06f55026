"""Virtual time: a clock that advances only with the actions executed on it, and the schedules that choose the next action.

Rule 1: nothing here sleeps or reads a real clock.
Rule 2: one thread runs at a time. Worker threads are real threads (with thread-local state, and no running event loop), but
each is parked unless the scheduler has resumed it, and the scheduler waits until it parks again. So every run is a function
of the schedule, and can be repeated.

Theory of operation. Each possible next event, such as the completion of the operation at the head of a stream or the start
of a worker's job, is an enabled action with a nominal time. `VirtualTime.step` lets a `Schedule` choose among the actions
that are due. The nominal order is likely and not guaranteed, because real devices and threads guarantee no order. A worker
may also be preempted at each of its device calls (`VirtualTime.checkpoint`), and blocks by parking with a condition.
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
    """Raised when the program waits for an event that can no longer happen."""


class LoopBlockedError(AssertionError):
    """Raised when a blocking call is made on the event loop's thread."""


class Schedule(Protocol):
    """Decides all orders and durations that real devices and threads do not guarantee."""

    def choose(self, options: Sequence[str]) -> int:
        """Return the index of the action to execute; the first is the nominal one."""
        ...

    def duration(self, what: str) -> float:
        """Return the nominal duration of an action, in seconds of virtual time."""
        ...

    def preempts(self, what: str) -> bool:
        """Whether a worker thread is preempted before this call on the device."""
        ...


class Seeded:
    """A random, adversarial schedule: durations vary over three orders of magnitude, and half of all choices are random.

    Args:
        seed: equal seeds give equal runs.
        shortest: the shortest duration, in seconds.
        longest: the longest duration, in seconds.
    """

    def __init__(self, seed: int, *, shortest: float = 1e-6, longest: float = 1e-3) -> None:
        self._random = random.Random(seed)
        self._range = math.log(shortest), math.log(longest)

    def choose(self, options: Sequence[str]) -> int:
        """Return the nominal option or, in half of all choices, a random one."""
        if len(options) == 1 or self._random.random() < 0.5:
            return 0
        return self._random.randrange(len(options))

    def duration(self, what: str) -> float:
        """Return a random duration in seconds, distributed evenly over the logarithm of the range."""
        return math.exp(self._random.uniform(*self._range))

    def preempts(self, what: str) -> bool:
        """Return True at random, once in four calls on average."""
        return self._random.random() < 0.25


class Scripted:
    """A schedule that follows a list of choices, then always takes the first option. Each action takes ten microseconds.

    Args:
        choices: the indices to choose, one for each choice with more than one option.

    Attributes:
        taken: the choices that were made, as pairs of the index and the number of options.
    """

    def __init__(self, choices: Sequence[int] = ()) -> None:
        self.taken: list[tuple[int, int]] = []
        self._choices = deque(choices)

    def choose(self, options: Sequence[str]) -> int:
        """Return the next choice of the script."""
        if len(options) == 1:
            return 0
        choice = self._choices.popleft() if self._choices else 0
        self.taken.append((choice, len(options)))
        return choice

    def duration(self, what: str) -> float:
        """Return ten microseconds."""
        return 10e-6

    def preempts(self, what: str) -> bool:
        """Return False: each possible preemption would double the number of scripts."""
        return False


def explore(scenario: Callable[[Schedule], object], *, limit: int = 10_000) -> int:
    """Run `scenario` once under every possible schedule.

    Args:
        scenario: called with a schedule, from which it creates its device; must be deterministic for equal choices.
        limit: the maximum number of runs.

    Returns:
        The number of runs.

    Raises:
        RuntimeError: there are more than `limit` schedules.
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
    """The virtual clock, and the actions that may be executed next.

    Args:
        schedule: chooses the actions; a number is the seed of a `Seeded` schedule.

    Attributes:
        now: the virtual time in seconds.
    """

    def __init__(self, schedule: Schedule | int = 0) -> None:
        self.schedule: Schedule = Seeded(schedule) if isinstance(schedule, int) else schedule
        self.now = 100.0  # not zero, which many programs interpret as "never"
        self._order = itertools.count()
        self._actions: list[_Action] = []
        self._blocked: list[tuple[Callable[[], bool], _Worker, str]] = []
        self._workers: set[_Worker] = set()
        self._thread = threading.local()
        self._is_over = False

    @property
    def is_idle(self) -> bool:
        """Whether no action is enabled."""
        return not self._actions

    @property
    def workers(self) -> int:
        """The number of worker threads."""
        return len(self._workers)

    @property
    def is_worker(self) -> bool:
        """Whether the calling thread is a worker thread."""
        return getattr(self._thread, "worker", None) is not None

    def enable(self, what: str, run: Callable[[], None], duration: float | None = None) -> None:
        """Enable the action `run`, nominally after `duration` seconds; with None the schedule chooses the duration."""
        when = self.now + (self.schedule.duration(what) if duration is None else duration)
        self._actions.append(_Action(when, next(self._order), what, run))

    def step(self, limit: float = math.inf) -> bool:
        """Execute one action, if one is due by the time `limit`; whether it did."""
        if self._blocked:
            self._unblock()  # the host may have changed a condition that a worker waits for
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
        """Advance the clock by this many seconds, and execute all actions that are due in that time."""
        limit = self.now + seconds
        while self.step(limit):
            pass
        self.now = max(self.now, limit)

    def run_until_idle(self) -> None:
        """Execute actions until none is enabled."""
        while self.step():
            pass

    def block_until(self, condition: Callable[[], bool], what: str) -> None:
        """Block the calling thread, in virtual time, until `condition` holds.

        Raises:
            DeadlockError: no action is left, so `condition` cannot become true.
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
                raise DeadlockError(f"{what} waits permanently: no event is left that could end it; {self.describe()}")

    def checkpoint(self, what: str) -> None:
        """Let the schedule preempt the calling thread here, if it is a worker thread."""
        worker: _Worker | None = getattr(self._thread, "worker", None)
        if worker is None:
            return
        if self._is_over:  # without this, a thread in an endless loop would never end
            raise _Abandoned
        if self.schedule.preempts(what):
            self.enable(f"resume {worker.name}", worker.resume)
            worker.park()

    def describe(self) -> str:
        """Describe which workers are blocked in which calls, for messages."""
        blocked = "; ".join(f"{worker.name} is blocked in {what}" for _, worker, what in self._blocked)
        return blocked or "no worker is blocked"

    def end(self) -> None:
        """End the simulation: no further action is executed, and an exception ends each worker thread where it is."""
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
    """Raised in a worker thread to end it when its simulation is over."""


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
        """Run the worker until it parks or ends. Called on the scheduler's thread."""
        self._go.release()
        self._parked.acquire()

    def park(self) -> None:
        """Return control to the scheduler until it resumes this worker. Called on the worker's thread."""
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
    """A thread pool in virtual time: the schedule decides when jobs start, and when they continue after device calls.

    Args:
        time: the clock, with its schedule.
        count: the maximum number of jobs that run at once.
        prepare: called in the job's thread as ``prepare(job)``; must call `job`.
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
        """Schedule a call of `fn` in a worker thread, and return the future of its result."""
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
            except BaseException as error:  # raised to the owner of the future
                future.set_exception(error)

        self._waiting.append(job)
        self._start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs; with `wait`, block in virtual time until all submitted jobs have ended."""
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
