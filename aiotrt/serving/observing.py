"""What is measured of each call: seconds for Prometheus and the status page, spans for OpenTelemetry.

The runtime tells an `Observer` of each call as it comes in, and nothing else: how it ended, its future says, and when, the
times that the runtime keeps with it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Histogram

from aiotrt.batching.batch import Batch
from aiotrt.batching.item import Item
from aiotrt.errors import DeadlineError, QueueFullError
from aiotrt.model import Model
from aiotrt.runtime.request import Request, Times

if TYPE_CHECKING:
    from aiotrt.serving.tracing import Tracing

__all__ = ["Durations", "Observer", "tracing_of"]

_log: Final = logging.getLogger("aiotrt")
_BUCKETS: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip


class Durations:
    """The histograms, for all models.

    Args:
        registry: where they go.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, ["model"], buckets=_BUCKETS, registry=registry)

        self.requests = histogram("aiotrt_request_seconds", "From a call's coming to its result; of those completed.")
        self.queue = histogram("aiotrt_queue_seconds", "From a call's coming to its slot or batch; of those that got there.")
        self.gpu = histogram("aiotrt_gpu_seconds", "Of a request, or a batch, on the device.")
        self.wake_up = histogram("aiotrt_wake_up_seconds", "From the end on the device to the caller; at most.")


class Observer:
    """Measures one model's calls.

    Args:
        name: the model's.
        durations: where seconds go.
        took: told how long each completed call took.
        tracing: makes spans; None for none.
    """

    def __init__(self, name: str, durations: Durations, took: Callable[[str, float], None], tracing: Tracing | None) -> None:
        self._name = name
        self._requests = durations.requests.labels(name)
        self._queue = durations.queue.labels(name)
        self._gpu = durations.gpu.labels(name)
        self._wake_up = durations.wake_up.labels(name)
        self._took = took
        self._tracing = tracing

    def observe(self, model: Model) -> None:
        """Look at what this model does from now on."""
        model.observe(self)

    def __call__(self, what: Request | Item) -> None:
        """Something comes in, in its caller's context."""
        if isinstance(what, Request) and isinstance(what.batch, Batch):
            what.add_done_callback(functools.partial(self._batch_ended, what, what.batch))
        elif isinstance(what, Item) or not what.is_lease:  # the duration of a lease is not measured
            if self._tracing is not None:
                try:
                    self._tracing.begin(what)
                except Exception:  # of somebody's span processor: it must not cost a caller his result, or the model a slot
                    _log.exception("a span could not be begun")
            what.add_done_callback(functools.partial(self._call_ended, what))

    def _call_ended(self, call: Request | Item, future: asyncio.Future[Any]) -> None:
        now, times = time.perf_counter(), call.times
        assert times is not None
        error = None if future.cancelled() else future.exception()
        queued = times.granted - times.entered if times.granted else None
        if queued is not None:
            self._queue.observe(queued)
        if times.seen:
            self._ran(times, now)
        if future.cancelled():
            outcome = "cancelled"
        elif error is None:
            outcome = "completed"
            self._requests.observe(now - times.entered)
            self._took(self._name, now - times.entered)
        elif isinstance(error, DeadlineError):
            outcome = "expired"
        else:
            outcome = "rejected" if isinstance(error, QueueFullError) else "failed"
        if self._tracing is not None:
            self._tracing.end(call, outcome, queued, error)

    def _batch_ended(self, request: Request, batch: Batch, future: asyncio.Future[Any]) -> None:
        now, times = time.perf_counter(), request.times
        if future.cancelled() or times is None:
            return  # nobody waits for it any more
        if times.seen:
            self._ran(times, now)
        if self._tracing is not None:
            self._tracing.batch(batch, times, now - times.granted, failed=future.exception() is not None)

    def _ran(self, times: Times, now: float) -> None:
        self._gpu.observe(times.ran - times.late)
        self._wake_up.observe(times.late + now - times.seen)


def tracing_of(name: str) -> Tracing | None:
    """Spans for the model of this name, where OpenTelemetry's API is installed."""
    try:
        from aiotrt.serving.tracing import Tracing
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        return None
    return Tracing(name)
