"""What happened lately, second by second, for the status page: bounded, and no more than sums."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiotrt.model import Statistics

__all__ = ["History", "quantile"]

#: Seconds in one sample, and how many samples are kept.
PERIOD: Final = 1.0
KEPT: Final = 180
#: Of one model's durations in one sample: more would say no more about percentiles.
_MOST: Final = 8192
_STATES: Final = ("free", "claimed", "preparing", "in_flight", "readable", "draining", "broken")
_OUTCOMES: Final = ("completed", "failed", "cancelled", "rejected", "expired")


class _Lately:
    """One model, since the last sample."""

    def __init__(self, now: Statistics) -> None:
        self.first = now
        self.looks = 0
        self.waiting = 0
        self.states: Counter[str] = Counter()
        self.durations: deque[float] = deque(maxlen=_MOST)

    def look(self, now: Statistics) -> None:
        self.looks += 1
        self.waiting = max(self.waiting, now.waiting)
        for state in _STATES:
            self.states[state] += getattr(now, state)

    def sample(self, now: Statistics, seconds: float) -> dict[str, Any]:
        first, durations = self.first, sorted(self.durations)
        batches = {items: count - first.batches.get(items, 0) for items, count in now.batches.items()}
        return {
            **{name: round((getattr(now, name) - getattr(first, name)) / seconds, 3) for name in _OUTCOMES},
            "waiting": self.waiting,
            "slots": {state: round(self.states[state] / max(self.looks, 1), 3) for state in _STATES},
            "latency": {f"p{percent}": quantile(durations, percent / 100) for percent in (50, 95, 99)},
            "batches": {items: count for items, count in batches.items() if count},
        }


class History:
    """The last `KEPT` samples.

    Attributes:
        samples: the oldest first, each with a ``number`` of its own, which grows.
        number: of the newest; 0 where there is none.
    """

    def __init__(self) -> None:
        self.samples: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._lately: dict[str, _Lately] = {}
        self.number = 0
        self._began: float | None = None
        self._lag = 0.0
        self._polls = 0

    def took(self, name: str, seconds: float) -> None:
        """A call of this model took so long, from its coming to its result."""
        lately = self._lately.get(name)
        if lately is not None:
            lately.durations.append(seconds)

    def look(self, models: Mapping[str, Statistics], lag: float, moment: float, at: float) -> None:
        """Look at everything; often, and at even intervals.

        Args:
            models: what is open now.
            lag: how late the event loop was, in seconds.
            moment: of a monotonic clock.
            at: of the clock on the wall, in seconds since 1970.
        """
        self._lag = max(self._lag, lag)
        for name, now in models.items():
            lately = self._lately.get(name)
            if lately is None or now.submitted < lately.first.submitted:  # loaded, or loaded again
                lately = self._lately[name] = _Lately(now)
            lately.look(now)
        for name in self._lately.keys() - models.keys():
            del self._lately[name]
        if self._began is None:
            self._began, self._polls = moment, _polls(models)
        if moment - self._began >= PERIOD:
            self._sample(models, moment - self._began, at)
            self._began = moment

    def after(self, number: int) -> list[dict[str, Any]]:
        """The samples with higher numbers than this."""
        return [sample for sample in self.samples if sample["number"] > number]

    def _sample(self, models: Mapping[str, Statistics], seconds: float, at: float) -> None:
        self.number += 1
        launches = sum(_launches(now) - _launches(self._lately[name].first) for name, now in models.items())
        polls, self._polls = _polls(models) - self._polls, _polls(models)
        self.samples.append(
            {
                "number": self.number,
                "at": round(at, 3),
                "lag": self._lag,
                "polls": round(polls / launches, 3) if launches and polls >= 0 else None,
                "models": {name: self._lately[name].sample(now, seconds) for name, now in models.items()},
            }
        )
        self._lag = 0.0
        self._lately = {name: _Lately(now) for name, now in models.items()}


def quantile(ascending: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of them does not exceed; None of nothing."""
    return ascending[max(math.ceil(share * len(ascending)) - 1, 0)] if ascending else None


def _launches(now: Statistics) -> int:
    return now.replays + now.fallback_runs


def _polls(models: Mapping[str, Statistics]) -> int:
    """Of the loop's hub, which all models share."""
    return max((now.polls for now in models.values()), default=0)
