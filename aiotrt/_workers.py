"""Worker threads for what blocks: they end with the process, whatever holds them up."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Final, TypeAlias, TypeVar

from aiotrt.errors import ResourceError

__all__ = ["Workers"]

T = TypeVar("T")
Job: TypeAlias = Callable[[], None]

#: Seconds that the end of the process waits for jobs under way, over all pools: one that ends inside torch while Python
#: shuts down could crash the process.
EXIT_TIMEOUT: Final = 1.0

_pools: Final[weakref.WeakSet[Workers]] = weakref.WeakSet()


class Workers(Executor):
    """A pool of daemon threads. A job goes to the thread that became idle last.

    `concurrent.futures.ThreadPoolExecutor` joins its threads when the process ends, so one job that never returns, such as
    the first call of a module that hangs, would keep the process alive. And its threads take turns, so that each job finds
    a processor's caches cold: on an H200's host a module of 340 us took 520 us.

    Args:
        count: the most threads it has.
        name: of the threads.
    """

    def __init__(self, count: int, name: str = "aiotrt-worker") -> None:
        self._count = count
        self._name = name
        self._threads: list[threading.Thread] = []
        self._shared = _Shared()
        self._stop = weakref.finalize(self, self._shared.stop)  # a pool that is garbage has no more jobs
        self._stop.atexit = False
        _pools.add(self)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call `fn` on a thread of this pool.

        Raises:
            ResourceError: the pool has no thread, and none can be started. The job was not accepted.
            RuntimeError: the pool was shut down.
        """
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:  # it belongs to the holder of the future
                future.set_exception(error)
            else:
                future.set_result(result)

        shared = self._shared
        with shared.lock:
            if shared.is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            if shared.idle:
                shared.idle.pop().put(job)
            elif len(self._threads) == self._count or not self._start(job):
                shared.jobs.append(job)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs. The threads end after those that were accepted; with `wait`, block until they have."""
        self._stop()
        if wait:
            for thread in self._threads:
                thread.join()

    def _start(self, job: Job) -> bool:
        """Start a thread that begins with this job; False if none can be started and another thread will do it."""
        name = f"{self._name}_{len(self._threads)}"
        # The thread does not hold the pool, which ends its threads when it is garbage.
        thread = threading.Thread(target=_serve, args=(self._shared, [job]), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:
                raise ResourceError(f"no worker thread could be started: {error}; too many threads are running") from error
            return False
        self._threads.append(thread)
        return True


class _Shared:
    """What the threads of a pool share.

    Attributes:
        lock: held for each change. Reentrant, because a garbage collection inside it may end the pool.
        jobs: those that wait for a thread: while there are any, no thread is idle.
        idle: where each idle thread waits for its next job; the one that became idle last is the last.
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


def _serve(shared: _Shared, first: list[Job]) -> None:
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
            if shared.is_shut:  # asked after the thread is listed as idle: a collection in between may end the pool
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
