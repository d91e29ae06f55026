"""OpenTelemetry: a span for each call, under the caller's; and one for each batch, linked to those of its calls.

Only the API package is used, where it is installed: whether spans go anywhere, and where, is for the application's SDK.
"""

from __future__ import annotations

import time
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

import aiotrt
from aiotrt.batching.batch import Batch
from aiotrt.batching.item import Item
from aiotrt.runtime.request import Request, Times

__all__ = ["Tracing"]


class Tracing:
    """Spans of one model.

    Args:
        name: the model's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tracer = trace.get_tracer("aiotrt", aiotrt.__version__)

    def begin(self, call: Request | Item) -> None:
        """A call comes in. The span that is current is its parent. Without an SDK there is none."""
        # One that goes nowhere would cost as much as all else that a call is measured with.
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return
        call.span = self._tracer.start_span(
            f"aiotrt {self._name}", kind=SpanKind.INTERNAL, attributes={"aiotrt.model": self._name}
        )

    def end(self, call: Request | Item, outcome: str, queued: float | None, error: BaseException | None) -> None:
        """It has ended.

        Args:
            call: it was given to `begin`.
            outcome: a word for how.
            queued: for how many seconds it waited; None if it never left the queue.
            error: what the caller got instead of a result.
        """
        span: Span | None = call.span
        if span is None:
            return
        if span.is_recording():
            span.set_attribute("aiotrt.outcome", outcome)
            if queued is not None:
                span.set_attribute("aiotrt.queue_seconds", queued)
            span.set_attributes(_on_the_device(call.times))
            if error is not None:
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
        span.end()

    def batch(self, batch: Batch, times: Times, seconds: float, *, failed: bool) -> None:
        """A batch has ended, and began so many seconds ago. It has many callers, and so no parent: links say whose it is."""
        contexts = [call.span.get_span_context() for call in batch.items if call.span is not None]
        links = [Link(context) for context in contexts if context.trace_flags.sampled]
        if not links:
            return  # nobody looks at any of its calls
        attributes: dict[str, Any] = {
            "aiotrt.model": self._name,
            "aiotrt.batch.items": len(batch.items),
            "aiotrt.batch.size": batch.size,
        } | _on_the_device(times)
        now = time.time_ns()
        span = self._tracer.start_span(
            f"aiotrt {self._name} batch",
            context=Context(),
            attributes=attributes,
            links=links,
            start_time=now - round(seconds * 1e9),
        )
        if failed:
            span.set_status(Status(StatusCode.ERROR))
        span.end(now)


def _on_the_device(times: Times | None) -> dict[str, float]:
    return {"aiotrt.gpu_seconds": times.ran - times.late} if times is not None and times.seen else {}
