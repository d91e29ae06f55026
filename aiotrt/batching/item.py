"""One caller's item, from its submission to its result."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from aiotrt.batching.group import Group
from aiotrt.completion.waiter import Waiter
from aiotrt.devices import Event, Stream
from aiotrt.runtime.request import Request, Times
from aiotrt.tensors import Argument

__all__ = ["Item"]


class Item(Waiter):
    """One caller's item. Awaiting it gives the item's results.

    It is an `Entry` of the queue; see there for the attributes that are not listed here.

    Attributes:
        values: what is copied into the batch: one array or device tensor for each input.
        arguments: the checked inputs of an item that its group's route does not match.
        origin: the caller's current stream, when inputs or results are on the device.
        ready: events that the slot's stream waits for before it reads device inputs.
        request: the request of its batch, until the batch or the item has ended.
        timer: expires it at its deadline.
        expected: when its result was expected, at its submission; None if that was unknown.
        times: when what happened to it; None without an observer.
        span: what an observer keeps with it.
    """

    __slots__ = (
        "arguments", "arrival", "deadline", "due", "expected", "group", "is_bounded", "origin", "place", "priority", "ready",
        "request", "span", "timer", "times", "values",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        group: Group,
        values: Sequence[Any],
        arguments: Sequence[Argument],
        priority: int,
        arrival: float,
        deadline: float | None,
    ) -> None:
        # As in `Waiter`, without the attributes for polling: a batch is polled, but its items are not.
        self._loop = loop
        self.is_done = self._is_cancelled = self._asyncio_future_blocking = False
        self._value = self._error = self._message = self._callback = self._context = self._others = None
        self.group = group
        self.values = values
        self.arguments = arguments
        self.priority = priority
        self.arrival = self.due = arrival
        self.deadline = deadline
        self.is_bounded = True
        self.place: Literal["queue", "door"] | None = None
        self.origin: Stream | None = None
        self.ready: Sequence[Event] = ()
        self.request: Request | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.expected: float | None = None
        self.times: Times | None = None
        self.span: Any = None
