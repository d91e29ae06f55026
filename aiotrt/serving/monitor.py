"""A heartbeat on the event loop: how late it is, how fast each model completes requests, and what happened lately."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from prometheus_client import CollectorRegistry, Histogram

from aiotrt.model import Model
from aiotrt.serving.history import History

__all__ = ["Monitor"]

_BUCKETS: Final = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
#: Seconds after which what was measured counts a third: long enough for slow models, short enough to follow the load.
_MEMORY: Final = 5.0


@dataclass
class _Pace:
    """How fast one model completes requests while callers wait: completions over seconds, of which the older count less."""

    completed: int
    moment: float
    done: float = 0.0
    busy: float = 0.0

    @property
    def rate(self) -> float | None:
        """Requests a second; None until one was completed while others waited."""
        return self.done / self.busy if self.done else None

    def look(self, completed: int, now: float, *, is_busy: bool) -> None:
        seconds = now - self.moment
        done = completed - self.completed
        self.completed, self.moment = completed, now
        if done < 0 or seconds <= 0 or not is_busy:
            return  # loaded again meanwhile; or idle, which says nothing about how fast it can be
        # Both by the same weights: an average of rates would begin with whatever the first interval happened to give.
        fade = math.exp(-seconds / _MEMORY)
        self.done, self.busy = self.done * fade + done, self.busy * fade + seconds


class Monitor:
    """Beats while it is entered.

    Args:
        models: those that are open now, by name.
        registry: where the histogram of the loop's lag goes.
        period: seconds between beats.
        clock: the time in seconds.

    Attributes:
        history: what happened lately.
    """

    def __init__(
        self,
        models: Callable[[], Mapping[str, Model]],
        registry: CollectorRegistry,
        period: float = 0.1,
        clock: Callable[[], float] = time.perf_counter,  # not the loop's own: uvloop's has whole milliseconds
    ) -> None:
        self.history = History()
        self._models = models
        self._period = period
        self._clock = clock
        self._paces: dict[str, _Pace] = {}
        self._task: asyncio.Task[None] | None = None
        self._lag = Histogram(
            "aiotrt_event_loop_lag_seconds",
            "How much later than asked a timer of the event loop ran.",
            buckets=_BUCKETS,
            registry=registry,
        )

    def seconds_to_wait(self) -> float | None:
        """How long the longest queue takes at the rate that was measured; None if none waits, or no rate was measured."""
        waits = [
            now.waiting / rate
            for name, model in self._models().items()
            if (now := model.statistics()).waiting and (rate := self.rate(name)) is not None
        ]
        return max(waits, default=None)

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
            due = self._clock() + self._period
            await asyncio.sleep(self._period)
            now = self._clock()
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
