"""What is measured of calls and batches, for Prometheus and for OpenTelemetry."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import prometheus_client
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import StatusCode

import aiotrt
from aiotrt import serving
from aiotrt.batching.item import Item
from aiotrt.runtime.slots import State
from aiotrt.serving.history import KEPT, History, quantile
from tests.tools import Affine, count, executor_of, frame, held, turns, until


@contextlib.asynccontextmanager
async def loaded(**options: Any) -> AsyncIterator[tuple[serving.Models, aiotrt.Model]]:
    """A model called "m" that makes batches on one slot."""
    batching = aiotrt.Batching(max_size=4, **options)

    def source() -> aiotrt.Model:
        return aiotrt.load(Affine(), device="host", slots=1, max_queue=4, warmup=[frame(0)], batching=batching)

    models = serving.Models({"m": source})
    await models.load("m")
    try:
        yield models, models["m"]
    finally:
        await models.aclose()


def measured(models: serving.Models) -> dict[str, float]:
    """Every metric, by name and labels."""
    text = prometheus_client.generate_latest(models.registry).decode()
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


# --- Prometheus ---------------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize("stack", [True, False])
async def test_seconds_in_the_queue_and_altogether(stack: bool) -> None:
    async with loaded(stack=stack) as (models, model):
        with held(model):
            first = asyncio.ensure_future(model(frame(1)))
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            rest = [asyncio.ensure_future(model(frame(value))) for value in range(3)]
            gone = asyncio.ensure_future(model(frame(9)))
            await turns()
            with pytest.raises(aiotrt.QueueFullError):
                await model(frame(10))
            gone.cancel()
            await turns()
            with pytest.raises(aiotrt.DeadlineError):
                await model(frame(11), deadline=0.02)
        await asyncio.gather(first, *rest)
        await turns()
        found = measured(models)
        assert found['aiotrt_request_seconds_count{model="m"}'] == 4
        assert found['aiotrt_queue_seconds_count{model="m"}'] == 4, "of those that left it for a batch"
        assert (
            found['aiotrt_gpu_seconds_count{model="m"}']
            == found['aiotrt_wake_up_seconds_count{model="m"}']
            == (2 if stack else 4)
        )
        # Three have waited for the one that was held, as long as the deadline at least.
        assert 0.06 <= found['aiotrt_queue_seconds_sum{model="m"}'] <= found['aiotrt_request_seconds_sum{model="m"}']
        assert 0.019 <= found['aiotrt_gpu_seconds_sum{model="m"}'] + found['aiotrt_wake_up_seconds_sum{model="m"}'] < 60
        assert found['aiotrt_graph_hits_total{model="m"}'] + found['aiotrt_graph_misses_total{model="m"}'] == (
            2 if stack else 4
        )
        assert found['aiotrt_graph_hits_total{model="m"}'] > 0
        for outcome, number in (("completed", 4), ("cancelled", 1), ("rejected", 1), ("expired", 1), ("failed", 0)):
            assert found[f'aiotrt_requests_total{{model="m",outcome="{outcome}"}}'] == number, outcome
        if stack:
            sizes = [found[f'aiotrt_batch_size_bucket{{le="{le}",model="m"}}'] for le in ("1.0", "2.0", "4.0", "+Inf")]
            assert sizes == [1, 1, 2, 2]
            assert found['aiotrt_batch_size_sum{model="m"}'] == 4
        else:
            assert 'aiotrt_batch_size_sum{model="m"}' not in found


@pytest.mark.asyncio
async def test_calls_of_a_model_without_batching_are_measured_and_leases_are_not(exporter: InMemorySpanExporter) -> None:
    models = serving.Models({"m": lambda: aiotrt.load(Affine(), device="host", slots=1)})
    await models.load("m")
    model = models["m"]
    for shape in ((2, 3), (2, 3), (1, 1)):
        await model(frame(1, shape))
    async with model.lease((2, 3)) as slot:
        slot.inputs[0][...] = frame(2)
        await slot.replay()
    await turns()
    found = measured(models)
    for name in ("request", "queue", "gpu", "wake_up"):
        assert found[f'aiotrt_{name}_seconds_count{{model="m"}}'] == 3, name
        assert 0 <= found[f'aiotrt_{name}_seconds_sum{{model="m"}}'] < 60, name
    assert (found['aiotrt_graph_hits_total{model="m"}'], found['aiotrt_graph_misses_total{model="m"}']) == (2, 2)
    spans = named(exporter, "aiotrt m")
    assert [span.attributes["aiotrt.outcome"] for span in spans if span.attributes is not None] == ["completed"] * 3
    assert all("aiotrt.gpu_seconds" in (span.attributes or {}) for span in spans)
    assert await models.aclose()


@pytest.mark.asyncio
async def test_a_model_that_was_loaded_again_is_measured_on() -> None:
    async with loaded() as (models, model):
        await model(frame(1))
        await models.unload("m")
        await models.load("m")
        await models["m"](frame(2))
        await turns()
        assert measured(models)['aiotrt_request_seconds_count{model="m"}'] == 2


# --- the last minutes ---------------------------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_the_history_is_bounded_and_its_samples_are_sums() -> None:
    async with loaded() as (_, model):
        history = History()
        history.look({"m": model.statistics()}, 0.001, 0.0, 1000.0)
        await asyncio.gather(*[model(frame(value)) for value in range(3)])
        for seconds in (0.01, 0.02, 0.03, 0.04):
            history.took("m", seconds)
        history.took("nobody", 1.0)
        history.look({"m": model.statistics()}, 0.005, 0.5, 1000.5)
        assert not history.samples
        with held(model):
            calls = [asyncio.ensure_future(model(frame(value))) for value in range(3)]
            await until(lambda: count(model, State.IN_FLIGHT) == 1)
            calls += [asyncio.ensure_future(model(frame(value))) for value in range(2)]
            await turns()
            history.look({"m": model.statistics()}, 0.002, 1.0, 1001.0)
        await asyncio.gather(*calls)
        (sample,) = history.samples
        assert (sample["number"], sample["at"], sample["lag"]) == (1, 1001.0, 0.005)
        m = sample["models"]["m"]
        assert (m["completed"], m["waiting"], m["batches"]) == (3.0, 2, {3: 2})
        assert m["latency"] == {"p50": 0.02, "p95": 0.04, "p99": 0.04}
        assert m["slots"]["in_flight"] == pytest.approx(1 / 3, abs=0.001)
        history.look({"m": model.statistics()}, 0.0, 2.0, 1002.0)
        assert history.samples[1]["models"]["m"]["completed"] == 5.0
        assert history.samples[1]["models"]["m"]["latency"]["p50"] is None
        history.look({}, 0.0, 3.0, 1003.0)
        assert history.samples[2]["models"] == {}
        for second in range(4, 4 + 2 * KEPT):
            history.look({}, 0.0, float(second), 1000.0 + second)
        assert len(history.samples) == KEPT
        assert [sample["number"] for sample in history.after(history.number - 2)] == [history.number - 1, history.number]


def test_quantiles() -> None:
    assert quantile([], 0.5) is None
    hundred = [float(i) for i in range(1, 101)]
    assert [quantile(hundred, share) for share in (0.0, 0.01, 0.5, 0.95, 0.99, 1.0)] == [1, 1, 50, 95, 99, 100]
    assert quantile([7.0], 0.99) == 7.0


# --- OpenTelemetry ------------------------------------------------------------------------------------------------------


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """Where spans go."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    yield exporter
    provider.shutdown()


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


@pytest.mark.asyncio
async def test_each_call_is_a_span_under_its_callers_and_a_batch_links_to_those_of_its_calls(
    exporter: InMemorySpanExporter,
) -> None:
    tracer = trace.get_tracer("the application")

    async def handler(number: int) -> None:
        with tracer.start_as_current_span(f"request {number}"):
            await model(frame(number))

    async with loaded() as (_, model):
        await asyncio.gather(*[handler(number) for number in range(6)])
        await turns()
    calls, batches = named(exporter, "aiotrt m"), named(exporter, "aiotrt m batch")
    requests = [span for span in exporter.get_finished_spans() if span.name.startswith("request")]
    parents = {span.context.span_id for span in requests if span.context is not None}
    assert {call.parent.span_id for call in calls if call.parent is not None} == parents
    assert len(parents) == 6
    linked = [link.context.span_id for batch in batches for link in batch.links]
    assert sorted(linked) == sorted(call.context.span_id for call in calls if call.context is not None)
    assert [len(batch.links) for batch in batches] == [4, 2]
    for batch in batches:
        assert batch.parent is None, "it has many callers"
        assert batch.attributes is not None
        attributes = dict(batch.attributes)
        gpu = attributes.pop("aiotrt.gpu_seconds")
        assert isinstance(gpu, float)
        assert 0 <= gpu < 60
        assert attributes == {
            "aiotrt.model": "m", "aiotrt.batch.items": len(batch.links), "aiotrt.batch.size": len(batch.links)
        }  # fmt: skip
        members = [call for call in calls if call.context in [link.context for link in batch.links]]
        for call in members:
            assert call.attributes is not None
            assert call.attributes["aiotrt.outcome"] == "completed"
            assert call.start_time is not None
            assert batch.start_time is not None
            assert batch.end_time is not None
            queued = call.attributes["aiotrt.queue_seconds"]
            assert isinstance(queued, float)
            # Two clocks are compared, of which one may be set meanwhile: to a millisecond.
            assert batch.start_time - call.start_time == pytest.approx(queued * 1e9, abs=1e6)
            assert batch.end_time > batch.start_time


@pytest.mark.asyncio
async def test_how_a_call_ended_is_on_its_span(exporter: InMemorySpanExporter) -> None:
    def picky(x: Any) -> Any:
        if (x == 13).any():
            raise ValueError("thirteen")
        return x + 1

    batching = aiotrt.Batching(overload="latest", max_size=1)
    models = serving.Models({"m": lambda: aiotrt.load(picky, device="host", slots=1, batching=batching, warmup=[frame(0)])})
    await models.load("m")
    model = models["m"]
    with pytest.raises(aiotrt.EngineError):
        await model(frame(13))
    await turns()
    with held(model):
        first = asyncio.ensure_future(model(frame(1)))
        await until(lambda: count(model, State.IN_FLIGHT) == 1)
        with pytest.raises(aiotrt.DeadlineError):
            await model(frame(2), deadline=0.01)
        calls = [asyncio.ensure_future(model(frame(value))) for value in (3, 4)]
        await turns()
        calls[1].cancel()
        await turns()
    await first
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(results[0], aiotrt.QueueFullError)
    await turns()
    assert await models.aclose()
    spans = named(exporter, "aiotrt m")
    outcomes = [span.attributes["aiotrt.outcome"] for span in spans if span.attributes is not None]
    assert outcomes == ["failed", "expired", "rejected", "cancelled", "completed"]
    failed = spans[0]
    assert (failed.status.status_code, failed.status.description) == (StatusCode.ERROR, "EngineError")
    assert failed.events[0].attributes is not None
    assert "thirteen" in str(failed.events[0].attributes["exception.message"])
    assert [span.status.status_code for span in spans[3:]] == [StatusCode.UNSET] * 2, "to go is no error"
    batches = named(exporter, "aiotrt m batch")
    assert [batch.status.status_code for batch in batches] == [StatusCode.ERROR, StatusCode.UNSET]


@pytest.mark.asyncio
async def test_a_span_processor_that_raises_costs_nobody_a_result(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def on_start(*_: object, **__: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(SimpleSpanProcessor, "on_start", on_start)
    async with loaded() as (_, model):
        assert np.array_equal(await model(frame(2)), frame(7))
        await turns()
        assert model.statistics().free == 1
    assert "out of order" in caplog.text
    assert not exporter.get_finished_spans()


@pytest.mark.asyncio
async def test_without_an_sdk_there_are_no_spans() -> None:
    seen: list[Any] = []
    async with loaded() as (_, model):
        executor = executor_of(model)
        observe = executor.observer
        assert observe is not None

        def observer(what: Any) -> None:
            observe(what)
            seen.append(what.span if isinstance(what, Item) else what)

        executor.observer = observer
        await model(frame(2))
        await turns()
        assert seen[0] is None


@pytest.mark.asyncio
async def test_what_is_not_sampled_makes_no_batch_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    async with loaded() as (_, model):
        assert np.array_equal(await model(frame(2)), frame(7))
        await turns()
    assert not exporter.get_finished_spans()
    provider.shutdown()


def test_without_opentelemetry_there_are_no_spans_and_all_else_works() -> None:
    program = """
import asyncio, sys
import fastapi, numpy  # some versions of FastAPI bring it along, and want it themselves
sys.modules["opentelemetry"] = None
from aiotrt import serving
import aiotrt
async def main():
    models = serving.Models({"m": lambda: aiotrt.load(lambda x: x + 1, device="host", batching=aiotrt.Batching())})
    await models.load("m")
    assert (await models["m"](numpy.ones(3))).tolist() == [2, 2, 2]
    assert await models.aclose()
asyncio.run(main())
assert "aiotrt.serving.tracing" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=50)
