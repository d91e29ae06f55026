"""What the hub polls: pending events, and the lane of each stream, in which they complete in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from aiotrt.completion.prediction import Estimate

__all__ = ["Lane", "Pending"]


class Pending:
    """One event that is polled.

    Attributes:
        query: whether the event is complete; must not block.
        confirm: called when `query` raises, because it may answer differently; None if the error of `query` counts.
        on_done: called once, from inside the poll, with None or the error that `query` raised.
        estimate: what is known about the duration of the work before the event.
        hang_timeout: seconds as the head of its lane after which the work counts as hung; None for never.
        submitted: when it was added to its lane.
        notified: when the device notified that the event is complete: infinity until it does, 0.0 if it never will.
    """

    __slots__ = ("__weakref__", "confirm", "estimate", "hang_timeout", "notified", "on_done", "query", "submitted")

    def __init__(
        self,
        query: Callable[[], bool],
        on_done: Callable[[BaseException | None], None],
        estimate: Estimate,
        hang_timeout: float | None,
    ) -> None:
        self.query = query
        self.confirm: Callable[[], bool] | None = None
        self.on_done = on_done
        self.estimate = estimate
        self.hang_timeout = hang_timeout
        self.submitted = self.notified = 0.0


class Lane:
    """The pending events of one stream, in order. Only the first one, the head, is polled.

    What was recorded about a head stays until the next head begins, so that the estimate can learn after the callers were
    resumed.

    Attributes:
        pending: the pending events.
        due: when to poll.
        is_listed: whether the hub has this lane among its lanes.
        spin_until: until when each iteration of the loop polls; 0.0 if none does.
        is_polled: whether a poll found the head incomplete.
        polled: when a poll last found it incomplete.
        overdue: how many polls after its hang timeout found it incomplete.
        stalled: seconds of the head's time that do not count towards its hang timeout: see `hub.STALL`.
        last_done: when the last completed event was seen to be complete.
        started: when that event became the head.
        notified: that event's `Pending.notified`.
        is_first: whether it was the first event of this lane that was complete in its poll.
        estimate: the estimate that has yet to learn how long its work took; None if none has.
        prepare: called once, inside the first poll that finds the head incomplete; None for nothing. Set before the work is
            added, which is then polled a little earlier. It must not raise.
    """

    __slots__ = (
        "due", "estimate", "is_first", "is_listed", "is_polled", "last_done", "notified", "overdue", "pending", "polled",
        "prepare", "spin_until", "stalled", "started",
    )  # fmt: skip

    def __init__(self) -> None:
        self.pending: deque[Pending] = deque()
        self.last_done = self.started = self.notified = 0.0
        self.due = 0.0
        self.is_listed = self.is_polled = self.is_first = False
        self.overdue = 0
        self.polled = self.stalled = self.spin_until = 0.0
        self.estimate: Estimate | None = None
        self.prepare: Callable[[], object] | None = None

    @property
    def ran(self) -> float:
        """How many seconds the last completed work ran until it was seen to be complete; valid while its `on_done` runs."""
        return self.last_done - self.started

    @property
    def late(self) -> float:
        """How many seconds of `ran` may have passed after the work was complete; valid when `ran` is.

        These are the seconds since the previous poll, or those above the estimate.
        """
        if self.notified:  # this is before the poll, unless the notification was still on its way
            return max(0.0, self.last_done - max(self.notified, self.started))
        if self.is_polled:
            return self.last_done - max(self.polled, self.started)
        expected = 0.0 if self.estimate is None else self.estimate.seconds
        return self.ran - expected if 0.0 < expected < self.ran else 0.0

    def learn(self) -> None:
        """Teach the estimate, once, how long the last completed work took."""
        estimate, self.estimate = self.estimate, None
        if estimate is None:
            return
        ran = self.last_done - self.started
        if self.notified:
            ran -= self.late
            estimate.between(ran, ran)
        elif self.is_polled:
            estimate.between(self.polled - self.started, ran)
        elif self.is_first:  # else its predecessor completed before this poll, at an unknown time
            estimate.at_most(ran)

    def begin(self) -> None:
        """Reset what was recorded about the head, because there is a new one."""
        if self.estimate is not None:
            self.learn()
        self.is_polled = False
        self.overdue = 0
        self.polled = self.stalled = self.spin_until = 0.0

    def forget(self) -> None:
        """Drop all pending events; their callbacks never run."""
        self.pending.clear()
        self.prepare = None
        self.is_polled = False
        self.overdue = 0
        self.stalled = self.spin_until = 0.0
