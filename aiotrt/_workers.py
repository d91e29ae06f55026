"""Worker threads for blocking calls; a blocked thread does not keep the process alive."""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Final, TypeAlias, TypeVar

from aiotrt.errors import ResourceError

__all__ = ["Workers", "processors"]

T = TypeVar("T")
Job: TypeAlias = Callable[[], None]

#: Seconds that process exit waits for running jobs, over all pools, because a job inside torch while Python shuts down
#: could crash the process.
EXIT_TIMEOUT: Final = 1.0

_pools: Final[weakref.WeakSet[Workers]] = weakref.WeakSet()


def processors() -> int:
    """Return the number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


class Workers(Executor):
    """A pool of daemon threads. A job runs on the thread that became idle last.

    `concurrent.futures.ThreadPoolExecutor` joins its threads when the process ends, so one job that never returns, such as
    the first call of a module that hangs, would keep the process alive. It also rotates through its threads, so each job
    finds cold CPU caches: on the CPU of an H200 machine a module of 340 us took 520 us.

    Args:
        count: the maximum number of threads.
        name: the prefix of the threads' names.
        begin: called first in each thread; None for nothing.
    """

    def __init__(self, count: int, name: str = "aiotrt-worker", begin: Job | None = None) -> None:
        self._count = count
        self._name = name
        self._begin = begin
        self._threads: list[threading.Thread] = []
        self._shared = _Shared()
        self._stop = weakref.finalize(self, self._shared.stop)  # a pool that is garbage-collected gets no more jobs
        self._stop.atexit = False
        _pools.add(self)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call `fn` on a thread of this pool.

        Cancelling the future prevents a queued call; a running call is not interrupted.

        Raises:
            ResourceError: the pool has no thread, and none can be started. The job is not accepted.
            RuntimeError: the pool was shut down.
        """
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # the future raises it
                future.set_exception(error)
            else:
                future.set_result(result)

        self.give(job)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs. The threads end after the accepted jobs; with `wait`, block until they have ended."""
        self._stop()
        if wait:
            for thread in self._threads:
                thread.join()

    def give(self, job: Job) -> None:
        """Call `job` on a thread. It must not raise. Raises as `submit` does."""
        shared = self._shared
        with shared.lock:
            if shared.is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if shared.idle:
                shared.idle.pop().put(job)
            elif len(self._threads) == self._count or not self._start(job):
                shared.jobs.append(job)

    def _start(self, job: Job) -> bool:
        """Start a thread that runs this job first; False if none can be started, and another thread has to run it.

        Raises:
            ResourceError: none can be started, and there is no other thread.
        """
        name = f"{self._name}_{len(self._threads)}"
        # The thread holds no reference to the pool, so that a dropped pool is garbage-collected and ends its threads.
        thread = threading.Thread(target=_serve, args=(self._shared, [job], self._begin), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:
                raise ResourceError(f"no worker thread could be started: {error}; too many threads are running") from error
            return False
        self._threads.append(thread)
        return True


class _Shared:
    """State shared by the threads of a pool.

    Attributes:
        lock: held for each change. Reentrant, because a garbage collection inside it may end the pool.
        jobs: jobs that wait for a thread; while there are any, no thread is idle.
        idle: the queue from which each idle thread takes its next job, in the order in which the threads became idle.
        is_shut: whether the threads end when they have no more jobs.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.jobs: deque[Job] = deque()
        self.idle: list[queue.SimpleQueue[Job | None]] = []
        self.is_shut = False

    def stop(self) -> None:
        with self.lock:
            self.is_shut = True
            while self.idle:
                self.idle.pop().put(None)


def _serve(shared: _Shared, first: list[Job], begin: Job | None) -> None:
    if begin is not None:
        begin()
    inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    job: Job | None = first.pop()
    while job is not None:
        job()
        job = None  # a finished job must not keep its tensors alive until the next one comes
        with shared.lock:
            if shared.jobs:
                job = shared.jobs.popleft()
                continue
            shared.idle.append(inbox)
            if shared.is_shut:  # read after the thread is listed as idle: a garbage collection in between may end the pool
                shared.stop()
        job = inbox.get()


@atexit.register
def _end() -> None:
    ends = time.monotonic() + EXIT_TIMEOUT
    pools = list(_pools)
    for pool in pools:
        pool.shutdown(wait=False)
    for pool in pools:
        for thread in pool._threads:
            thread.join(max(0.0, ends - time.monotonic()))
