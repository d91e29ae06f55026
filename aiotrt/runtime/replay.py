"""One launch of a lease."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiotrt.completion.waiter import Waiter
from aiotrt.devices import Event
from aiotrt.errors import AiotrtError

__all__ = ["Replay"]


class Replay(Waiter):
    """One launch of a lease: its produce event is polled, and awaiting it ends when that is complete.

    Attributes:
        event: the produce event.
        failure: what the launch failed with, if part of its work may be on the stream.
        is_given: whether the holder of the lease has the event, and may ask it at any time.
        number: the how manieth launch of its lease it is.
    """

    __slots__ = ("event", "failure", "is_given", "number")

    def __init__(self, loop: asyncio.AbstractEventLoop, event: Event, query: Callable[[], bool], *, is_given: bool) -> None:
        # As `Waiter` and `Pending` do, without two more calls for each launch. The rest is set when it is launched.
        self.query = query
        self.submitted = self.notified = 0.0
        self._loop = loop
        self.is_done = self._is_cancelled = self._asyncio_future_blocking = False
        self._value = self._error = self._message = self._callback = self._context = self._others = None
        self.event = event
        self.failure: AiotrtError | None = None
        self.is_given = is_given
        self.number = 0
