"""Whose a cancellation is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

__all__ = ["CancelledElsewhereError", "only_own"]


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
