"""When to poll: the pure decisions behind polling an event just when it completes.

Rule 1: nothing here reads a clock, arms a timer or queries an event; times come in as arguments, in seconds.
Rule 2: a wrong prediction must cost little, so every overdue interval is bounded by a fraction of the time already waited.

The model. Work on one stream runs in order, so the head of a stream's lane started when it was submitted or when its
predecessor completed, whichever came later; its duration is a property of what runs, not of the queue. `Estimate` learns
that duration. Its observations are censored: a completion found at the first poll only says "no later than now", one found
by a later poll says "since the previous poll". It learns from both, in different ways: without that, each late poll would
make the next one later.
Where durations vary, it also keeps the shortest recent one: polling begins at that time, goes on at intervals until shortly
before the estimate, and is close together around the estimate.
`Lateness` learns how long after its time a timer really wakes the loop, which depends on how long it slept, since idle
processors wake slowly. The first poll is aimed ahead of the prediction by that much.
"""

from __future__ import annotations

import enum
from math import inf
from typing import Final

__all__ = ["LONG", "PREDICT", "SPIN", "Estimate", "Lateness", "Progress", "next_look"]

MARGIN: Final = 5e-6  # seconds; aim earlier by this much too, about one loop iteration
SPIN_BUDGET: Final = 40e-6  # seconds after the predicted time for which polling in every loop iteration pays
OVERDUE_SHARE: Final = 0.03  # of the time already waited: the longest sleep between polls of overdue work
OVERDUE_GROWTH: Final = 0.5  # of the time since the prediction: another bound on it, so that work a little late is seen soon
#: After a poll that came early, spin rather than sleep again if this share of the work's length is left, and no more than
#: this many seconds: one more wake-up costs the caller more than the processor time is worth.
SPIN_SHARE: Final = 0.03
LONGEST_SPIN: Final = 200e-6
#: After a sleep of this many seconds the processor is slow for some tens of microseconds. So for work of this length or more
#: the next launch is prepared shortly before the end, and the first poll comes `EARLIER_TO_PREPARE` earlier: see
#: `Lane.prepare`.
LONG: Final = 2e-3
EARLIER_TO_PREPARE: Final = 25e-6
SHORTEST_SLEEP: Final = 20e-6  # seconds; a timer shorter than this costs more than it saves
#: If the shortest duration is within this of the estimate, in seconds or as a share of it, the first poll is for the
#: estimate: see `Estimate.first`.
NEAR: Final = 40e-6
NEAR_SHARE: Final = 0.1
AGREE: Final = 1.5  # times longer or shorter than estimated that still agrees with the estimate
RECENT: Final = 256  # durations; with fewer, a short one in a hundred would be forgotten, and seen late
SHORT: Final = 100e-6  # seconds; the longest sleep in the first bucket of `Lateness`; four times as long in each next one
BUCKETS: Final = 7  # how many of these buckets; one more is for longer sleeps
LONGEST_SLEEP: Final = 5e-3  # seconds; the longest that a completion of overdue work may go unseen
MOST_LATE: Final = 8  # the most first polls in a row that came too late to measure the duration; more count as this many
EARLIER: Final = tuple(1 - min(0.5, 0.003 * 2**late) for late in range(MOST_LATE + 1))  # of the estimate, after so many


class Progress(enum.Enum):
    """How completion is found."""

    PREDICT = "predict"  # sleep until just before the predicted time, spin briefly, then poll less and less often
    SPIN = "spin"  # poll in every loop iteration: the lowest latency, a whole core
    INTERVAL = "interval"  # poll at growing intervals from the start: no prediction, no spinning


# Global names too, for the reason given in `slots`.
PREDICT: Final = Progress.PREDICT
SPIN: Final = Progress.SPIN


class Estimate:
    """How long one kind of work takes on the device.

    Attributes:
        seconds: the estimate; 0.0 until something was learned.
        shortest: the shortest recent duration, of at least the last `RECENT` and at most twice as many.
        first: the duration that the first poll is for. It is the shortest, because sleeping until the estimate would see
            shorter work late by the whole difference; it is the estimate if the difference is small, because each poll
            before the estimate costs another wake-up.
        is_trusted: whether the last duration agreed with the estimate. If it did not, the hub must not sleep until the
            estimate: after a stall that may be a thousand times too long, and the next caller would wait as long.
    """

    __slots__ = ("_before", "_late", "_seen", "_shorter", "_since", "first", "is_trusted", "seconds", "shortest")

    def __init__(self) -> None:
        self.seconds = self.shortest = self.first = 0.0
        self.is_trusted = False
        self._late = 0  # first polls in a row that came too late to measure the duration
        self._before = self._since = inf  # the shortest of the previous `RECENT` durations, and of those after them
        self._seen = 0  # how many durations came after them
        self._shorter = 0  # how many of these were shorter than `shortest`, by an unknown amount

    def between(self, low: float, high: float) -> None:
        """Learn from work that was seen incomplete `low` seconds after it started, and complete `high` seconds after.

        The weights differ so that the estimate settles below the middle: polling early costs a few polls, polling late
        delays the caller.
        """
        self._late = 0
        seconds = (low + high) / 2
        before = self.seconds
        agrees = before / AGREE <= seconds <= before * AGREE
        if before == 0.0 or not (agrees or self.is_trusted):
            self.seconds = seconds  # two disagreements in a row: the duration has changed
        elif seconds < before:
            self.seconds = before + 0.3 * (seconds - before)
        else:
            self.seconds = before + 0.1 * (seconds - before)
        self.is_trusted = agrees
        self._see(high)

    def at_most(self, seconds: float) -> None:
        """Learn from work that was complete at the first poll, this many seconds after it started."""
        if self.seconds == 0.0:
            self.seconds = seconds
            self._see(seconds)
            return
        if seconds < self.seconds / AGREE:
            self.is_trusted = False
        # Poll earlier next time, by growing steps, until a poll comes too early and so measures the duration. The first
        # completion may have been seen very late, and steps that stay small would take hundreds of calls to find that out.
        # Yet the first steps are small: mostly the timer was late, and an estimate that is too low costs a late poll too.
        if seconds < self.seconds:
            self.seconds = seconds
        self.seconds *= EARLIER[self._late]
        if self._late < MOST_LATE:
            self._late += 1
        least = self.seconds
        if seconds < self.shortest:
            # It is unknown by how much. So the steps grow here too, and other durations in between do not reset them, or a
            # duration that comes once in fifty calls would never be polled early enough to be learned.
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
        # Work that was complete before the shortest duration is shorter by an unknown amount: only earlier polls measure it.
        if self._shorter or (near > NEAR and near > NEAR_SHARE * estimate):
            self.first = self.shortest
        else:
            self.first = estimate


class Lateness:
    """How late timers wake the loop, learned separately for sleeps of each length (buckets, each four times longer).

    The initial value is less than most machines need. Too large a value would never be corrected: work that takes no longer
    than the allowance is polled without any sleep, which would use a whole processor permanently.
    """

    __slots__ = ("_deviation", "_mean", "_seen", "ahead")

    def __init__(self, initial: float = 20e-6) -> None:
        buckets = BUCKETS + 1
        self._mean = [initial] * buckets
        self._deviation = [initial / 2] * buckets
        self.ahead = [initial + 1.5 * initial / 2 + MARGIN] * buckets  # allowances in seconds, from the two above
        self._seen = [0] * buckets

    def learn(self, sleep: float, late: float) -> None:
        """Learn that a timer, set to sleep for `sleep` seconds, fired `late` seconds late."""
        bucket = 0
        longest = SHORT
        while sleep > longest and bucket < BUCKETS:
            longest *= 4
            bucket += 1
        late = min(late, 10e-3)  # a stall of the whole loop says nothing about timers
        # The first few have a larger weight, so that the initial value is soon forgotten.
        self._seen[bucket] = seen = self._seen[bucket] + 1
        rate = max(0.05, 1 / (seen + 1))
        error = late - self._mean[bucket]
        self._mean[bucket] += rate * error
        self._deviation[bucket] += rate * (abs(error) - self._deviation[bucket])
        self.ahead[bucket] = self._mean[bucket] + 1.5 * self._deviation[bucket] + MARGIN

    def allowance(self, wait: float) -> float:
        """Return how many seconds earlier to set a timer that is to fire in `wait` seconds."""
        ahead = self.ahead
        bucket = 0
        longest = SHORT
        while wait > longest and bucket < BUCKETS:
            longest *= 4
            bucket += 1
        # The shortened sleep may belong to another bucket, which is the one that `learn` then updates.
        sleep = wait - ahead[bucket]
        while bucket and sleep <= longest / 4:
            longest /= 4
            bucket -= 1
        return ahead[bucket]


def next_look(now: float, started: float, predicted: float, spin: float) -> float:
    """Return when to poll work again that was incomplete at `now`.

    Args:
        now: the time of the last poll.
        started: when the work became the head of its stream.
        predicted: when it was predicted to complete.
        spin: for how long after `predicted` to poll in every iteration; 0.0 for not at all.
    """
    if now < predicted + spin and spin > 0.0:
        return now
    overdue = min(OVERDUE_SHARE * (now - started), OVERDUE_GROWTH * (now - predicted), LONGEST_SLEEP)
    return now + max(SHORTEST_SLEEP, overdue)
