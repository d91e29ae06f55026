"""Worker threads for work that would block the event loop, and a limit on the memory of all decoders together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import anyio
import anyio.to_thread

__all__ = ["COPIED", "memory", "off_loop"]

T = TypeVar("T")

#: From how many bytes on what may be copied is copied in a thread.
COPIED: Final = 1 << 20
#: From how many bytes on JSON is parsed one text at a time: threads that hold the interpreter lock by turns would keep the
#: loop waiting for all of them.
_LARGE_JSON: Final = 256 << 10
#: Memory of decoders, 1 GiB, is handed out by 16 MiB.
_UNIT: Final = 16 << 20
_UNITS: Final = 64


class _Workers:
    """The limits of one event loop."""

    def __init__(self) -> None:
        # Not anyio's own limiter, which handlers in threads share: those may wait for what is decoded here.
        self.threads = anyio.CapacityLimiter(max(2, len(os.sched_getaffinity(0))))
        self.large_json = anyio.CapacityLimiter(1)
        self.memory = asyncio.Semaphore(_UNITS)
        self.turn = asyncio.Lock()


_workers: dict[asyncio.AbstractEventLoop, _Workers] = {}


async def off_loop(function: Callable[[], T], size: int | None = None, least: int = 16 << 10, *, json: int = 0) -> T:
    """Run a function that takes a while in a thread, or at once where it is for fewer bytes than `least`.

    Args:
        function: what to run.
        size: bytes that it works on; None for many.
        least: from how many bytes on it runs in a thread.
        json: bytes of JSON that it parses.
    """
    if size is not None and size < least:
        return function()
    workers = _of_this_loop()
    return await anyio.to_thread.run_sync(function, limiter=workers.large_json if json >= _LARGE_JSON else workers.threads)


@asynccontextmanager
async def memory(size: int) -> AsyncIterator[None]:
    """Enter when decoders that are running leave `size` bytes of 1 GiB; with more than that, when none is running."""
    workers, taken = _of_this_loop(), 0
    try:
        async with workers.turn:  # two callers that hold half of what they need would wait for each other
            for _ in range(min(-(-size // _UNIT), _UNITS)):
                await workers.memory.acquire()
                taken += 1
        yield
    finally:
        for _ in range(taken):
            workers.memory.release()


def _of_this_loop() -> _Workers:
    loop = asyncio.get_running_loop()
    workers = _workers.get(loop)
    if workers is None:
        for other in [other for other in _workers if other.is_closed()]:
            del _workers[other]
        workers = _workers[loop] = _Workers()
    return workers
