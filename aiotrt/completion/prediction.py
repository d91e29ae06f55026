"""When to look: the pure decisions behind polling an event just as it becomes true.

Rule 1: nothing here reads a clock, arms a timer or queries an event; times come in as arguments, in seconds.
Rule 2: a wrong prediction must cost little, so every overdue interval is bounded by a fraction of the time already waited.

The model. Work on one stream runs in order, so the head of a stream's line started when it was submitted or when its
predecessor completed, whichever came later; its duration is a property of what runs, not of the queue. `Estimate` learns
that duration. What it sees is censored: a completion found at the first look says only "no later than now", one found by
a later look says "since the look before". Both teach it, differently: without that, each late look would make the next
one later.
Where lengths vary it keeps the shortest of late too: the looks begin with that one, go on at intervals while it is too early
for the estimate, and are close together around it.
`Lateness` learns how long after its time a timer really wakes the loop, which depends on how long it slept, since idle
processors wake slowly. The first look is aimed ahead of the prediction by that much.
"""

from __future__ import annotations

import enum
from math import inf
from typing import Final

__all__ = ["LONG", "PREDICT", "SPIN", "Estimate", "Lateness", "Progress", "next_look"]

MARGIN: Final = 5e-6  # seconds; aim this much earlier still, about one loop iteration
SPIN_BUDGET: Final = 40e-6  # seconds after the predicted time for which looking at every loop iteration pays
OVERDUE_SHARE: Final = 0.03  # of the time already waited: the longest sleep between overdue looks
OVERDUE_GROWTH: Final = 0.5  # of the time since the prediction: the same; so that work a little late is seen soon
#: After a poll that came early, spin rather than sleep again if this share of the work's length is left, and no more than
#: this many seconds: to wake up once more costs the caller more than the processor time is worth.
SPIN_SHARE: Final = 0.03
LONGEST_SPIN: Final = 200e-6
#: After a sleep of this many seconds the processor is slow for some tens of microseconds. So what the launch after work of
#: this length needs is prepared shortly before its end, and the first poll comes so much earlier: see `Lane.prepare`.
LONG: Final = 2e-3
EARLIER_TO_PREPARE: Final = 25e-6
SHORTEST_SLEEP: Final = 20e-6  # seconds; a timer shorter than this costs more than it saves
#: A length within this of the estimate, in seconds or as a share of it, gets no poll of its own: see `Estimate.first`.
NEAR: Final = 40e-6
NEAR_SHARE: Final = 0.1
AGREE: Final = 1.5  # times longer or shorter than estimated that still agrees with the estimate
RECENT: Final = 256  # times: fewer, and one in a hundred that is short would be forgotten, and seen late
SHORT: Final = 100e-6  # seconds; the longest sleep of the first bucket of `Lateness`, and four times as long for each next
BUCKETS: Final = 7  # of them, and another for all that is longer
LONGEST_SLEEP: Final = 5e-3  # seconds; the longest that a completion of overdue work may go unseen
MOST_LATE: Final = 8  # looks in a row that came too late to say when; more than these count as these
EARLIER: Final = tuple(1 - min(0.5, 0.003 * 2**late) for late in range(MOST_LATE + 1))  # times the estimate, after so many


class Progress(enum.Enum):
    """How completion is found."""

    PREDICT = "predict"  # sleep until just before the predicted time, spin briefly, then look ever less often
    SPIN = "spin"  # look at every loop iteration: the lowest latency, a whole core
    INTERVAL = "interval"  # look at growing intervals from the start: no prediction, no spinning


# By names of their own too, as in `slots`.
PREDICT: Final = Progress.PREDICT
SPIN: Final = Progress.SPIN


class Estimate:
    """How long one kind of work takes on the device.

    Attributes:
        seconds: the estimate; 0.0 until something was learned.
        shortest: the least of late, of the last `RECENT` times at least and of no more than twice as many.
        first: what the first poll is for. The shortest, since work that is shorter than expected and slept on is seen late,
            by all the difference; the estimate where that is little, since each poll before it takes another wake-up.
        is_trusted: whether the last time agreed with it. One that is not must not be slept on: after a stall it may be a
            thousand times too long, and the next caller would wait as long.
    """

    __slots__ = ("_before", "_late", "_seen", "_shorter", "_since", "first", "is_trusted", "seconds", "shortest")

    def __init__(self) -> None:
        self.seconds = self.shortest = self.first = 0.0
        self.is_trusted = False
        self._late = 0  # looks in a row that came too late to say when
        self._before = self._since = inf  # the least of the `RECENT` times before, and of those after them
        self._seen = 0  # how many those are
        self._shorter = 0  # how many of them were complete before any of late would have been

    def between(self, low: float, high: float) -> None:
        """The work was seen not complete this long after it started, and then complete this long after.

        The weights differ so that the estimate settles below the middle: arriving early costs a few looks, arriving late
        is seen by the caller.
        """
        self._late = 0
        seconds = (low + high) / 2
        before = self.seconds
        agrees = before / AGREE <= seconds <= before * AGREE
        if before == 0.0 or not (agrees or self.is_trusted):
            self.seconds = seconds  # twice in a row: it has changed
        elif seconds < before:
            self.seconds = before + 0.3 * (seconds - before)
        else:
            self.seconds = before + 0.1 * (seconds - before)
        self.is_trusted = agrees
        self._see(high)

    def at_most(self, seconds: float) -> None:
        """The work was complete at the first look, this long after it started."""
        if self.seconds == 0.0:
            self.seconds = seconds
            self._see(seconds)
            return
        if seconds < self.seconds / AGREE:
            self.is_trusted = False
        # Look earlier next time, until a look comes too early and says when; and ever more so. The first completion may have
        # been seen very late, and steps that stay small would take hundreds of calls to find that out. The first steps are
        # small all the same: mostly it was the timer that was late, and an estimate that is too low costs a late look too.
        if seconds < self.seconds:
            self.seconds = seconds
        self.seconds *= EARLIER[self._late]
        if self._late < MOST_LATE:
            self._late += 1
        least = self.seconds
        if seconds < self.shortest:
            # By how much, nobody knows. So the same again; and times in between do not start it anew, or a length that comes
            # once in fifty calls would never be looked at early enough to learn it.
            self._shorter = min(self._shorter + 1, 4)
            least *= 1 - min(0.5, 0.003 * 4**self._shorter)
        self._see(least)

    def _see(self, seconds: float) -> None:
        if seconds < self._since:
            self._since = seconds
            self.shortest = min(self._before, seconds)
        self._seen += 1
        if self._seen == RECENT:
            self._before, self._since = self._since, inf
            self._seen = self._shorter = 0
        estimate = self.seconds
        near = estimate - self.shortest
        # Work that was complete before the shortest time is shorter by an unknown amount: only earlier polls can measure it.
        if self._shorter or (near > NEAR and near > NEAR_SHARE * estimate):
            self.first = self.shortest
        else:
            self.first = estimate


class Lateness:
    """How late timers wake the loop, learned separately for sleeps of each length (buckets, each four times longer).

    What it starts from is less than most machines need. Too much would never be found out: work that takes no longer than
    the allowance is looked at without any sleep, and a whole processor would go into that for ever.
    """

    __slots__ = ("_deviation", "_mean", "_seen", "ahead")

    def __init__(self, initial: float = 20e-6) -> None:
        buckets = BUCKETS + 1
        self._mean = [initial] * buckets
        self._deviation = [initial / 2] * buckets
        self.ahead = [initial + 1.5 * initial / 2 + MARGIN] * buckets  # seconds ahead of time, from the two above
        self._seen = [0] * buckets

    def learn(self, sleep: float, late: float) -> None:
        """A timer set to sleep this long woke this late."""
        bucket = 0
        longest = SHORT
        while sleep > longest and bucket < BUCKETS:
            longest *= 4
            bucket += 1
        late = min(late, 10e-3)  # a stall of the whole loop says nothing about timers
        # The first few count for more, so that what it started from is soon forgotten.
        self._seen[bucket] = seen = self._seen[bucket] + 1
        rate = max(0.05, 1 / (seen + 1))
        error = late - self._mean[bucket]
        self._mean[bucket] += rate * error
        self._deviation[bucket] += rate * (abs(error) - self._deviation[bucket])
        self.ahead[bucket] = self._mean[bucket] + 1.5 * self._deviation[bucket] + MARGIN

    def allowance(self, wait: float) -> float:
        """How much earlier than in `wait` seconds to set a timer."""
        ahead = self.ahead
        bucket = 0
        longest = SHORT
        while wait > longest and bucket < BUCKETS:
            longest *= 4
            bucket += 1
        # A sleep that is so much shorter may be in another bucket, and it is there that it teaches.
        sleep = wait - ahead[bucket]
        while bucket and sleep <= longest / 4:
            longest /= 4
            bucket -= 1
        return ahead[bucket]


def next_look(now: float, started: float, predicted: float, spin: float) -> float:
    """When to look again at work that was not complete at `now`.

    Args:
        now: the time of the look.
        started: when the work became the head of its stream.
        predicted: when it was predicted to complete.
        spin: for how long after `predicted` to look at every iteration; 0.0 never to.
    """
    if now < predicted + spin and spin > 0.0:
        return now
    overdue = min(OVERDUE_SHARE * (now - started), OVERDUE_GROWTH * (now - predicted), LONGEST_SLEEP)
    return now + max(SHORTEST_SLEEP, overdue)
