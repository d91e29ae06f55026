"""A heartbeat on the event loop: how late it is, how fast each model completes requests, and what happened lately."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from prometheus_client import CollectorRegistry, Histogram

from aiotrt.model import Model
from aiotrt.serving.history import History

__all__ = ["Monitor"]

_BUCKETS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
#: Of the average of the rate, in seconds: long enough for slow models, short enough to follow a change of load.
_MEMORY: Final = 5.0


@dataclass
class _Pace:
    """How fast one model completes requests while callers wait."""

    completed: int
    moment: float
    rate: float | None = None  # a second; None until it was busy for an interval

    def look(self, completed: int, now: float, *, is_busy: bool) -> None:
        seconds = now - self.moment
        done = completed - self.completed
        self.completed, self.moment = completed, now
        if done < 0 or seconds <= 0 or not is_busy:
            return  # loaded again meanwhile; or idle, which says nothing about how fast it can be
        weight = min(seconds / _MEMORY, 1.0)
        self.rate = done / seconds if self.rate is None else self.rate + weight * (done / seconds - self.rate)


class Monitor:
    """Beats while it is entered.

    Args:
        models: those that are open now, by name.
        registry: where the histogram of the loop's lag goes.
        period: seconds between beats.

    Attributes:
        history: what happened lately.
    """

    def __init__(self, models: Callable[[], Mapping[str, Model]], registry: CollectorRegistry, period: float = 0.1) -> None:
        self.history = History()
        self._models = models
        self._period = period
        self._paces: dict[str, _Pace] = {}
        self._task: asyncio.Task[None] | None = None
        self._lag = Histogram(
            "aiotrt_event_loop_lag_seconds",
            "How much later than asked a timer of the event loop ran.",
            buckets=_BUCKETS,
            registry=registry,
        )

    def seconds_to_wait(self) -> float:
        """How long the longest line will take at the rate that was measured; 1 if none was."""
        longest = 0.0
        for name, model in self._models().items():
            now = model.statistics()
            pace = self._paces.get(name)
            if now.waiting and pace is not None and pace.rate:
                longest = max(longest, now.waiting / pace.rate)
        return longest or 1.0

    def rate(self, name: str) -> float | None:
        """Requests a second that the model of this name completed while it was busy; None if it never was."""
        pace = self._paces.get(name)
        return None if pace is None else pace.rate

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._beat(), name="aiotrt heartbeat")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _beat(self) -> None:
        was_busy: set[str] = set()
        while True:
            # Not the loop's own clock: uvloop's has whole milliseconds.
            due = time.perf_counter() + self._period
            await asyncio.sleep(self._period)
            now = time.perf_counter()
            lag = max(now - due, 0.0)
            self._lag.observe(lag)
            found = {name: model.statistics() for name, model in self._models().items()}
            self.history.look(found, lag, now, time.time())
            busy: set[str] = set()
            for name, statistics in found.items():
                if statistics.waiting:
                    busy.add(name)
                pace = self._paces.setdefault(name, _Pace(statistics.completed, now))
                # Busy at both ends, and so, as near as matters, between them.
                pace.look(statistics.completed, now, is_busy=name in busy and name in was_busy)
            was_busy = busy
