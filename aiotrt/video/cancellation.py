"""Distinguish a task's own cancellation from that of an operation it awaits, and await work that must not be interrupted."""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import TypeVar

__all__ = ["CancelledElsewhereError", "own_cancellation_only", "wait_until_done"]

T = TypeVar("T")


class CancelledElsewhereError(RuntimeError):
    """An awaited operation was cancelled, but not the task that awaited it. It is an ordinary failure of that task."""

    def __init__(self) -> None:
        super().__init__("an operation that it awaited was cancelled from outside")


class own_cancellation_only:  # noqa: N801  # named as the context managers of contextlib are
    """Turn a cancellation of something other than the current task into an error; for blocks that await user code.

    Otherwise such a cancellation would end the task silently, and consumers of its results would wait permanently.

    Raises:
        CancelledElsewhereError: the block raised `asyncio.CancelledError`, and the current task is not being cancelled.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise CancelledElsewhereError from error


async def wait_until_done(work: asyncio.Future[T]) -> T:
    """Return the result of work that must not be interrupted. If cancelled, wait for the work to end, then raise that."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # retrieved, or asyncio would log it
        raise
