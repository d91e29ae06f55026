from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

import aiotrt
from aiotrt._workers import Workers
from tests.tools import no_threads


def idle(pool: Workers, count: int) -> None:
    """Wait until so many threads have come back for more."""
    while len(pool._shared.idle) != count:
        time.sleep(0)


def test_jobs_run_side_by_side_on_as_many_threads_as_there_are() -> None:
    pool = Workers(3)
    together = threading.Barrier(3)
    assert sorted(future.result() for future in [pool.submit(together.wait) for _ in range(3)]) == [0, 1, 2]
    for _ in range(20):
        pool.submit(int).result()
    assert len(pool._threads) == 3
    pool.shutdown()
    assert not any(thread.is_alive() for thread in pool._threads)


def test_a_thread_that_is_idle_takes_the_next_job() -> None:
    pool = Workers(3)
    pool.submit(int).result()
    idle(pool, 1)
    pool.submit(int).result()
    assert len(pool._threads) == 1
    pool.shutdown()


def test_the_thread_that_became_idle_last_takes_the_next_job() -> None:
    pool, together, gate = Workers(3), threading.Barrier(3), threading.Event()
    for future in [pool.submit(together.wait) for _ in range(3)]:
        future.result()
    idle(pool, 3)
    held = pool.submit(lambda: gate.wait() and threading.get_ident())
    idle(pool, 2)
    gate.set()
    last = held.result()
    for _ in range(10):
        idle(pool, 3)
        assert pool.submit(threading.get_ident).result() == last
    pool.shutdown()


def test_what_a_job_raises_is_its_futures() -> None:
    pool = Workers(1)
    with pytest.raises(SystemExit):
        pool.submit(sys.exit).result()
    assert pool.submit(int).result() == 0
    pool.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(int)


def test_jobs_that_were_accepted_are_done_after_a_shutdown() -> None:
    pool, gate = Workers(2), threading.Event()
    done: list[int] = []
    for _ in range(2):
        pool.submit(gate.wait)
    futures = [pool.submit(done.append, i) for i in range(3)]
    futures[-1].cancel()
    pool.shutdown(wait=False)
    gate.set()
    for thread in pool._threads:
        thread.join()
    assert done == [0, 1]


def test_a_pool_that_is_garbage_ends_its_threads() -> None:
    pool = Workers(2)
    pool.submit(int).result()
    threads, reference = pool._threads, weakref.ref(pool)
    del pool
    gc.collect()
    assert reference() is None
    for thread in threads:
        thread.join()


def test_a_job_that_gets_no_thread_is_refused_and_never_done() -> None:
    pool = Workers(2)
    done: list[int] = []
    with no_threads(), pytest.raises(aiotrt.ResourceError, match="no worker thread could be started: can't start new"):
        pool.submit(done.append, 1)
    pool.submit(int).result()
    gate = threading.Event()
    waiting = pool.submit(gate.wait)
    with no_threads():
        second = pool.submit(done.append, 2)  # the one that there is does it later
    gate.set()
    assert waiting.result()
    second.result()
    assert done == [2]
    pool.shutdown()


def test_a_job_that_never_returns_does_not_keep_the_process() -> None:
    program = "import threading; from aiotrt._workers import Workers; Workers(1).submit(threading.Event().wait)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_end_of_the_process_waits_for_jobs_under_way() -> None:
    program = """
import atexit, threading
from aiotrt._workers import Workers
gate, pool = threading.Event(), Workers(1)
pool.submit(lambda: (gate.wait(), print("done")))
atexit.register(gate.set)
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, timeout=60, capture_output=True, text=True)
    assert done.stdout == "done\n"
