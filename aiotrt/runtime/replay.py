"""One launch of a lease."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiotrt.completion.waiter import Waiter
from aiotrt.devices import Event
from aiotrt.errors import AiotrtError

__all__ = ["Replay"]


class Replay(Waiter):
    """One launch of a lease. The hub polls its produce event, and awaiting the replay ends when that event is complete.

    Attributes:
        event: the produce event.
        failure: the error of the launch, if part of its work may be on the stream.
        is_given: whether the holder of the lease has the event, and may query it at any time.
        number: its number among the launches of its lease, from 1.
    """

    __slots__ = ("event", "failure", "is_given", "number")

    def __init__(self, loop: asyncio.AbstractEventLoop, event: Event, query: Callable[[], bool], *, is_given: bool) -> None:
        # As in `Waiter` and `Pending`, without two more calls for each launch. Their other attributes are set at the launch.
        self.query = query
        self.submitted = self.notified = 0.0
        self._loop = loop
        self.is_done = self._is_cancelled = self._asyncio_future_blocking = False
        self._value = self._error = self._message = self._callback = self._context = self._others = None
        self.event = event
        self.failure: AiotrtError | None = None
        self.is_given = is_given
        self.number = 0
