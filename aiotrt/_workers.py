"""Worker threads for what blocks: they end with the process, whatever holds them up."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
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
    """A pool of daemon threads.

    `concurrent.futures.ThreadPoolExecutor` joins its threads when the process ends, so one job that never returns, such as
    the first call of a module that hangs, would keep the process alive.

    Args:
        count: the most threads it has.
        name: of the threads.
    """

    def __init__(self, count: int, name: str = "aiotrt-worker") -> None:
        self._count = count
        self._name = name
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._is_shut = False
        self._stop = weakref.finalize(self, self._jobs.put, None)  # a pool that is garbage has no more jobs
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

        with self._lock:
            if self._is_shut:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._jobs.put(job)  # first: a new thread that finds no job counts as idle
            if len(self._threads) < self._count and not self._idle.acquire(blocking=False):
                self._start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more jobs. The threads end after those that were accepted; with `wait`, block until they have."""
        with self._lock:
            self._is_shut = True
            self._stop()
        if wait:
            for thread in self._threads:
                thread.join()

    def _start(self) -> None:
        name = f"{self._name}_{len(self._threads)}"
        # The thread holds the queue and not the pool, which ends its threads when it is garbage.
        thread = threading.Thread(target=_serve, args=(self._jobs, self._idle), name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            if not self._threads:  # else one of those does the job
                self._jobs.get_nowait()
                raise ResourceError(f"no worker thread could be started: {error}; too many threads are running") from error
        else:
            self._threads.append(thread)


def _serve(jobs: queue.SimpleQueue[Job | None], idle: threading.Semaphore) -> None:
    while True:
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            idle.release()
            job = jobs.get()
        if job is None:
            jobs.put(None)  # for the next thread
            return
        job()
        del job  # a finished job must not keep its tensors alive until the next one comes


@atexit.register
def _end() -> None:
    ends = time.monotonic() + EXIT_TIMEOUT
    pools = list(_pools)
    for pool in pools:
        pool.shutdown(wait=False)
    for pool in pools:
        for thread in pool._threads:
            thread.join(max(0.0, ends - time.monotonic()))
