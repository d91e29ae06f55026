"""How a pipeline is doing: frozen snapshots, and the recorders that they are made from."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["STAGES", "Latency", "Meter", "PipelineStatus", "SinkStatus", "SourceStatus"]

#: In the order that a frame goes through them. `slot`: waiting for a slot and writing its staging memory, where frames are
#: written there directly; else that is part of `device`.
STAGES: Final = ("decode", "queue", "slot", "device", "sink")
WINDOW: Final = 512  # durations that a latency is made of
RECENT: Final = 2.0  # seconds that a rate is made of


@dataclass(frozen=True)
class Latency:
    """Durations of the last frames, in seconds.

    Attributes:
        p50: half of them are shorter.
        p99: all but one in a hundred are shorter.
        worst: the longest.
        mean: their mean.
        count: how many there were since the start; the figures are of the last 512.
    """

    p50: float
    p99: float
    worst: float
    mean: float
    count: int


@dataclass(frozen=True)
class SinkStatus:
    """One sink, for one source.

    Attributes:
        name: of the sink.
        delivered: results that it took.
        failed: results that it raised for.
        drops: results that it never saw, because it was too slow and the policy keeps the latest.
        waiting: results that wait for it.
    """

    name: str
    delivered: int
    failed: int
    drops: int
    waiting: int


@dataclass(frozen=True)
class SourceStatus:
    """One source. Every frame it gave is in exactly one of `completed`, `failed`, `drops`, `waiting` and `in_flight`.

    Attributes:
        state: "closed", "running", "paused", "reconnecting", "ended" or "failed".
        error: why it failed, if it did.
        frames: how many it gave.
        expected: how many it says it has, if it says so.
        waiting: frames that wait for a model.
        in_flight: frames that are with a model.
        completed: frames with a result.
        failed: frames that a model refused or failed.
        drops: frames that the policy dropped, by reason.
        reports: what went wrong, by kind; see `Kind`.
        fps: results a second, over the last two seconds.
        latency: by stage; see `STAGES`.
        limited_by: what its frames were waited for most of late: "source" (reading and decoding), "models" (the device, the
            model's slots or the event loop) or "sinks"; empty before anything was waited for.
        sinks: what became of its results.
    """

    state: str
    error: str | None
    frames: int
    expected: int | None
    waiting: int
    in_flight: int
    completed: int
    failed: int
    drops: Mapping[str, int]
    reports: Mapping[str, int]
    fps: float
    latency: Mapping[str, Latency]
    limited_by: str
    sinks: tuple[SinkStatus, ...]

    @property
    def dropped(self) -> int:
        """All drops together."""
        return sum(self.drops.values())


@dataclass(frozen=True)
class PipelineStatus:
    """A pipeline at one moment.

    Attributes:
        state: "running", "stopping" or "ended".
        sources: by name.
        in_flight: frames that are with a model.
        limit: how many may be.
        completed: frames with a result, of all sources.
        dropped: frames that policies dropped, of all sources.
        fps: results a second, of all sources together, over the last two seconds.
        limited_by: "models" if a source is limited by them, since then they take no more; else what limits most sources.
        reports: what went wrong with sinks as a whole, by kind: one could not be closed, and its file may not be complete.
    """

    state: str
    sources: Mapping[str, SourceStatus]
    in_flight: int
    limit: int
    completed: int
    dropped: int
    fps: float
    limited_by: str
    reports: Mapping[str, int]


class Meter:
    """Durations by stage, and how often something was completed."""

    def __init__(self) -> None:
        self._durations: dict[str, deque[float]] = {stage: deque(maxlen=WINDOW) for stage in STAGES}
        self._counts = dict.fromkeys(STAGES, 0)
        self._completions: deque[float] = deque(maxlen=WINDOW)
        self._waits: deque[tuple[str, float]] = deque(maxlen=WINDOW)

    def add(self, stage: str, seconds: float) -> None:
        """One duration."""
        self._durations[stage].append(seconds)
        self._counts[stage] += 1

    def completed(self, now: float) -> None:
        """One completion."""
        self._completions.append(now)

    def waited(self, what: str, seconds: float) -> None:
        """The next frame waited for this, or this for it."""
        self._waits.append((what, seconds))

    def limit(self) -> str:
        """What was waited for most, lately."""
        waits: Counter[str] = Counter()
        for what, seconds in self._waits:
            waits[what] += seconds  # type: ignore[assignment]  # a Counter's values may be of any kind
        return waits.most_common(1)[0][0] if sum(waits.values()) > 0 else ""

    def latency(self) -> dict[str, Latency]:
        """Of each stage that there was."""
        found = {}
        for stage, values in self._durations.items():
            if values:
                ordered = sorted(values)
                last = len(ordered) - 1
                found[stage] = Latency(
                    ordered[last // 2],
                    ordered[round(0.99 * last)],
                    ordered[-1],
                    statistics.fmean(ordered),
                    self._counts[stage],
                )
        return found

    def fps(self, now: float) -> float:
        """Completions a second, lately."""
        recent = [at for at in self._completions if now - at <= RECENT]
        if len(recent) < 2:
            return 0.0
        # Until now, unless the next one may still come in time: a source that stands still does not keep its last rate.
        span, gap = recent[-1] - recent[0], now - recent[-1]
        usual = span / (len(recent) - 1)
        return (len(recent) - 1) / (span + max(0.0, gap - usual)) if span > 0 else 0.0
