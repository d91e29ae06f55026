"""Whose a cancellation is, and what goes on in spite of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import TypeVar

__all__ = ["CancelledElsewhereError", "only_own", "to_its_end"]

T = TypeVar("T")


class CancelledElsewhereError(RuntimeError):
    """What was awaited was cancelled by somebody else: a failure of what awaited it, and nothing that a task ends by."""

    def __init__(self) -> None:
        super().__init__("what it awaited was cancelled by somebody else")


@contextlib.contextmanager
def only_own() -> Iterator[None]:
    """Around what awaits code of the user's: a cancellation that is not the current task's is an error like any other.

    Else it would end the task, silently, and whoever waits for what the task does would wait for ever.

    Raises:
        CancelledElsewhereError: in its place.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise CancelledElsewhereError from error


async def to_its_end(work: asyncio.Future[T]) -> T:
    """The result of what must not be cut short. Cancelled, this waits for it all the same, and is cancelled then."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([work])
        if not work.cancelled():
            work.exception()  # seen; nobody wants it any more
        raise
