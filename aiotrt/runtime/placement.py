"""Which of several devices a request goes to: the one where it is expected to finish first.

Rule 1: nothing here reads a clock or touches a device; the input is a `Prospect` for each device, the result is a `Choice`.
Rule 2: a wrong estimate costs little. A request waits for a busy device only for a bounded time, and only while that device
alone would serve all waiting requests before another device could serve a single one. So no device idles under load.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final, NamedTuple

__all__ = ["BUILD", "Choice", "Prospect", "choose", "copy_seconds"]

#: Seconds that a program is expected to take to build, warm-up and capture included.
BUILD: Final = 0.1
#: For a copy between two devices: seconds before its first byte, and bytes per second. PCI Express 4 with 16 lanes has 25e9.
COPY_LATENCY: Final = 30e-6
COPY_RATE: Final = 10e9
#: A request waits for a busy device only if that is expected to finish in less than this share of a free device's time.
WORTH: Final = 0.8
#: Seconds; the least time that a request waits for a busy device with unknown durations, rather than have a program built.
SHORTEST_WAIT: Final = 1e-3


class Prospect(NamedTuple):
    """When one device could run a request.

    Attributes:
        free: how many slots are free.
        backlog: seconds that the work in flight there will still take; infinity if no slot will become free by itself.
        run: seconds that the request takes there; 0.0 if unknown.
        extra: additional seconds, to build its program and to copy between devices.
    """

    free: int
    backlog: float
    run: float
    extra: float


class Choice(NamedTuple):
    """What `choose` decided.

    Attributes:
        device: the index of the chosen device among the prospects.
        seconds: 0.0 if the request can start there now; else how long it should wait for that device at most.
    """

    device: int
    seconds: float


def choose(prospects: Sequence[Prospect], waiting: int = 1) -> Choice:
    """Choose a device for the first request in the queue.

    Args:
        prospects: those of the devices that work; at least one.
        waiting: how many requests wait, including this one.
    """
    unknown = max([prospect.run for prospect in prospects])  # a device that has not run it counts as the slowest that has
    best = busy = -1
    least = least_busy = inf
    for i, (free, backlog, run, extra) in enumerate(prospects):
        run = run or unknown
        if free:
            finish = backlog + extra + run
            if finish < least or best < 0 or (finish == least and free > prospects[best].free):
                best, least = i, finish
        else:
            finish = backlog + extra + waiting * run
            if finish < least_busy or busy < 0:
                busy, least_busy = i, finish
    if best < 0:
        return Choice(busy, inf)
    if busy >= 0 and least_busy < WORTH * least:
        return Choice(busy, max(least_busy, SHORTEST_WAIT))
    return Choice(best, 0.0)


def copy_seconds(nbytes: int) -> float:
    """Return how long a copy between two devices is expected to take."""
    return COPY_LATENCY + nbytes / COPY_RATE
