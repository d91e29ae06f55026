"""Decide which frames are processed. Pure logic, without a clock or an event loop.

A `Mailbox` is between a producer and a consumer. It counts dropped items by reason.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass
from typing import Final, Generic, Literal, TypeAlias, TypeVar

from aiotrt.errors import InputError

__all__ = ["OVERTAKEN", "STALE", "TOO_MANY", "Mailbox", "Policy"]

T = TypeVar("T")

Keep: TypeAlias = Literal["every_frame", "latest"]

OVERTAKEN: Final = "overtaken"  # a newer one replaced it before it was taken
STALE: Final = "stale"  # it had waited longer than max_staleness when it was to be taken
TOO_MANY: Final = "max_fps"  # it came earlier than max_fps allows
_ROUNDING: Final = 1e-9  # seconds; timestamps are sums of fractions


@dataclass(frozen=True)
class Policy:
    """What happens to frames that arrive faster than they are processed.

    Args:
        keep: "every_frame" makes the source wait, so no frame is lost; "latest" drops all but the newest.
        max_staleness: seconds; a frame that has waited longer when it is to be taken is dropped, whatever `keep` is.
        max_fps: the maximum number of frames taken in a second: with "every_frame" the source is slowed down to it, with
            "latest" the frames between are dropped.
        buffer: the number of frames that may wait; by default 4, and with "latest" 1.

    Raises:
        InputError: an argument is out of range.
    """

    keep: Keep = "every_frame"
    max_staleness: float | None = None
    max_fps: float | None = None
    buffer: int | None = None

    def __post_init__(self) -> None:
        if self.keep not in ("every_frame", "latest"):
            raise InputError(f"keep must be 'every_frame' or 'latest', got {self.keep!r}")
        for name, value in (("max_staleness", self.max_staleness), ("max_fps", self.max_fps)):
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive or None, got {value!r}")
        if self.buffer is not None and self.buffer < 1:
            raise InputError(f"buffer must be at least 1, got {self.buffer!r}")


class Mailbox(Generic[T]):
    """A queue of waiting items, oldest first, that drops items according to a policy.

    Args:
        policy: which items to keep.

    Attributes:
        drops: the number of dropped items, by reason.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._size = policy.buffer or (1 if policy.keep == "latest" else 4)
        self._waiting: deque[tuple[T, float]] = deque()
        self._due = float("-inf")  # when max_fps allows the next one
        self.drops: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_room(self) -> bool:
        """Whether an item may be put; always with "latest"."""
        return self._policy.keep == "latest" or len(self._waiting) < self._size

    def put(self, item: T, now: float) -> None:
        """Add an item received at `now`; there must be room for it."""
        assert self.has_room
        if self._policy.keep == "latest":
            if self._delay(now) > 0:
                self.drops[TOO_MANY] += 1
                return
            self._count(now)
            if len(self._waiting) >= self._size:
                self._waiting.popleft()
                self.drops[OVERTAKEN] += 1
        self._waiting.append((item, now))

    def delay(self, now: float) -> float:
        """Return the seconds until the next item may be taken; 0 if it may be taken now."""
        return self._delay(now) if self._policy.keep == "every_frame" else 0.0

    def take(self, now: float) -> T | None:
        """Take the oldest item that is not stale; None if there is none."""
        while self._waiting:
            item, received = self._waiting.popleft()
            if self._policy.max_staleness is not None and now - received > self._policy.max_staleness:
                self.drops[STALE] += 1
                continue
            if self._policy.keep == "every_frame":
                self._count(now)
            return item
        return None

    def _delay(self, now: float) -> float:
        return max(0.0, self._due - now) if self._due - now > _ROUNDING else 0.0

    def _count(self, now: float) -> None:
        """Record an item that passes now. Intervals lie on a grid, so that jitter does not accumulate."""
        if self._policy.max_fps is not None:
            interval = 1 / self._policy.max_fps
            self._due = (self._due if self._due > now - interval else now) + interval
