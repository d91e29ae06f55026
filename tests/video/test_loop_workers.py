"""`LoopWorkers`: results, errors, cancelled calls, and a loop that is closed before a call has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from unittest import mock

import pytest

from aiotrt.video.loop_workers import LoopWorkers


@pytest.fixture
def workers() -> Iterator[LoopWorkers]:
    pool = LoopWorkers(1, "test")
    yield pool
    pool.shutdown()


@pytest.mark.asyncio
async def test_the_loop_returns_the_future_as_it_is(workers: LoopWorkers) -> None:
    loop = asyncio.get_running_loop()
    made = workers.submit(threading.get_ident)
    with mock.patch.object(workers, "submit", return_value=made):
        future = loop.run_in_executor(workers, threading.get_ident)
    assert future is made
    assert await future != threading.get_ident()


@pytest.mark.asyncio
@pytest.mark.parametrize(("raised", "expected"), [(ValueError("no"), ValueError), (StopIteration(1), RuntimeError)])
async def test_an_error_reaches_the_caller(workers: LoopWorkers, raised: Exception, expected: type[Exception]) -> None:
    def function() -> None:
        raise raised

    with pytest.raises(expected):
        await workers.submit(function)
    assert await workers.submit(int) == 0  # the thread goes on


@pytest.mark.asyncio
async def test_a_cancelled_call_that_is_queued_never_runs_and_a_running_one_ends(workers: LoopWorkers) -> None:
    opened, began, ran = threading.Event(), threading.Event(), list[str]()

    def running() -> None:
        began.set()
        opened.wait()
        ran.append("running")

    first, second = workers.submit(running), workers.submit(ran.append, "queued")
    await asyncio.to_thread(began.wait)
    first.cancel()
    second.cancel()
    opened.set()
    await workers.submit(int)
    assert first.cancelled()
    assert ran == ["running"]


def test_a_loop_that_is_closed_gets_no_result_and_the_thread_goes_on(workers: LoopWorkers) -> None:
    opened, began = threading.Event(), threading.Event()

    def held() -> None:
        began.set()
        opened.wait()

    async def start() -> None:
        _ = workers.submit(held)
        await asyncio.to_thread(began.wait)

    asyncio.run(start())
    opened.set()

    async def next_one() -> int:
        return await workers.submit(int)

    assert asyncio.run(next_one()) == 0


def test_it_is_called_from_a_loop(workers: LoopWorkers) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        _ = workers.submit(int)
