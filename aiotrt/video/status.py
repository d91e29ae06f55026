"""The status of a pipeline: immutable snapshots, and the recorder of their figures."""

from __future__ import annotations

import statistics
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["STAGES", "Latency", "Meter", "PipelineStatus", "SinkStatus", "SourceStatus"]

#: The stages of a frame, in order.
STAGES: Final = ("decode", "queue", "convert", "device", "sink")
WINDOW: Final = 512  # number of durations in a latency
RECENT: Final = 2.0  # seconds over which a rate is computed


@dataclass(frozen=True)
class Latency:
    """Durations of one stage, over the last 512 frames, in seconds.

    Attributes:
        p50: the median.
        p99: the 99th percentile.
        worst: the maximum.
        mean: the mean.
        count: the number of frames since the start.
    """

    p50: float
    p99: float
    worst: float
    mean: float
    count: int


@dataclass(frozen=True)
class SinkStatus:
    """The status of one sink for one source.

    Attributes:
        name: of the sink.
        delivered: results that it processed.
        failed: results for which it raised.
        drops: results dropped because it was too slow and the policy keeps the latest.
        waiting: results that wait for it.
    """

    name: str
    delivered: int
    failed: int
    drops: int
    waiting: int


@dataclass(frozen=True)
class SourceStatus:
    """The status of one source.

    Each frame is counted in exactly one of `completed`, `failed`, `drops`, `waiting` and `in_flight`.

    Attributes:
        state: "closed", "running", "paused", "reconnecting", "ended" or "failed".
        error: the message of the error that ended it; None if there is none.
        frames: the number of frames that it gave.
        expected: the number of frames that it declares; None if it declares none.
        waiting: frames that wait for a model.
        in_flight: frames that are submitted to a model.
        completed: frames with a result.
        failed: frames that a model rejected or for which it failed.
        drops: frames that the policy dropped, by reason.
        reports: the number of problems by kind; see `Kind`.
        fps: results a second, over the last two seconds.
        latency: durations by stage: "decode", "queue", "convert" (to RGB, in a thread), "device" (waiting for a slot
            included) and "sink".
        limited_by: the recent bottleneck: "source" (reading and decoding), "models" (the device, the model's slots or the
            event loop) or "sinks"; empty before the first wait.
        sinks: the status of each sink for this source.
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
        """The sum of all drops."""
        return sum(self.drops.values())


@dataclass(frozen=True)
class PipelineStatus:
    """A snapshot of a pipeline.

    Attributes:
        state: "closed" (not entered yet), "running", "stopping" or "ended".
        sources: the status of each source, by name.
        in_flight: frames that are submitted to a model.
        limit: the maximum of `in_flight`.
        completed: frames with a result, of all sources.
        dropped: frames that policies dropped, of all sources.
        fps: results a second of all sources together, over the last two seconds.
        limited_by: "models" if they limit any source, because then they are saturated; else the bottleneck of most sources.
        reports: the number of problems with sinks as a whole, by kind. A sink that could not be closed may have left an
            incomplete file.
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
    """Recorder of durations by stage, of completions and of waits."""

    def __init__(self) -> None:
        self._durations: dict[str, deque[float]] = {stage: deque(maxlen=WINDOW) for stage in STAGES}
        self._counts = dict.fromkeys(STAGES, 0)
        self._completions: deque[float] = deque(maxlen=WINDOW)
        self._waits: deque[tuple[str, float]] = deque(maxlen=WINDOW)

    def add(self, stage: str, seconds: float) -> None:
        """Record a duration of a stage."""
        self._durations[stage].append(seconds)
        self._counts[stage] += 1

    def completed(self, now: float) -> None:
        """Record a completion."""
        self._completions.append(now)

    def waited(self, what: str, seconds: float) -> None:
        """Record that the lane waited for `what`: "source", "models" or "sinks"."""
        self._waits.append((what, seconds))

    def limit(self) -> str:
        """Return the longest recent wait's reason; empty if there was none."""
        waits: Counter[str] = Counter()
        for what, seconds in self._waits:
            waits[what] += seconds  # type: ignore[assignment]  # a Counter's values may be of any kind
        return waits.most_common(1)[0][0] if sum(waits.values()) > 0 else ""

    def latency(self) -> dict[str, Latency]:
        """Return the durations of each stage that has occurred."""
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
        """Return the recent number of completions a second."""
        recent = [at for at in self._completions if now - at <= RECENT]
        if len(recent) < 2:
            return 0.0
        # Count the time since the last completion beyond the usual interval, so that the rate of a stalled source falls.
        span, gap = recent[-1] - recent[0], now - recent[-1]
        usual = span / (len(recent) - 1)
        return (len(recent) - 1) / (span + max(0.0, gap - usual)) if span > 0 else 0.0
